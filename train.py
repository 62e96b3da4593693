"""Train one model: `python train.py`, and any setting of configs/ after it; see the README."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Checkpoint

from data.datamodule import BatchDataModule
from models.callbacks import RunSummary
from models.checkpoint import KEPT, check_vocabulary, load_weights
from models.checkpointing import AtomicCheckpointIO
from models.configured import build
from models.loggers import LoggerState, instantiate_loggers
from models.processes import one_job
from models.quiet import quiet
from models.random_state import RandomState
from models.resume import starting_point
from stl import SettingError, count_flops
from stl.flops import whole_samples

log = logging.getLogger(__name__)


def describe(cfg: DictConfig, data: BatchDataModule) -> dict[str, Any]:
    """The keys of summary.json that are known before training."""
    overrides = sorted(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return {
        "dataset": data.name,
        "model": cfg.model.name,
        "linear": describe_linear(cfg.linear),
        "seed": cfg.seed,
        "overrides": overrides,  # what the command line asked for
    }


def describe_linear(linear: DictConfig) -> dict[str, Any]:
    """The kind of the linear layers, tile, rank and basis, null where there are none, and a rival's own settings."""
    settings = {key: linear.get(key) for key in ("tile", "rank", "basis")}
    if kind := getattr(get_object(linear._target_), "kind", None):
        own = {str(key): value for key, value in linear.items() if not str(key).startswith("_")}
        return {"type": kind, **settings, **own}
    name = linear._target_.rsplit(".", 1)[-1]
    return {"type": name.removesuffix("Linear").lower() or "dense", **settings}


def train(cfg: DictConfig, folder: Path) -> None:
    """One run into its folder: config.yaml, flops.json, metrics.csv, checkpoints/ and summary.json; and a tokenizer/
    that it learned.

    A run that the folder holds already goes on from its last checkpoint (ckpt_path=last).
    Raises SettingError before anything is written where a setting is wrong.
    """
    quiet()
    if not (isinstance(cfg.seed, int) and 0 <= cfg.seed < 2**32):
        raise SettingError(f"seed={cfg.seed} must be a whole number from 0 to 2³² − 1")
    for name, value in {"trainer.max_epochs": cfg.trainer.max_epochs, "num_threads": cfg.num_threads or 1}.items():
        if not (isinstance(value, int) and value > 0):
            raise SettingError(f"{name}={value} must be a whole number, 1 or more")
    if cfg.trainer.limit_val_batches == 0:
        raise SettingError("trainer.limit_val_batches=0 leaves nothing to report; use 1 or more")
    start = starting_point(folder, cfg.ckpt_path, cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)))
    if start and (folder / "summary.json").exists() and start[0]["epoch"] + 1 >= cfg.trainer.max_epochs:
        log.info("%s: this run is complete", folder / "summary.json")
        return
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    task, data = build(cfg, fresh=start is None)
    if start:
        check_vocabulary(*start, data.vocabulary)
        load_weights(task, *start, task.config)
    flops = count_flops(task.model, (whole_samples(task.model), *data.input_shape), data.input_dtype)
    summary = RunSummary(folder, describe(cfg, data), flops)
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values() if callback]
    trainer = instantiate(
        cfg.trainer,
        callbacks=[RandomState(cfg.seed), LoggerState(), *callbacks, summary],
        logger=instantiate_loggers(cfg.logger, start[0] if start else None),
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=bool(cfg.callbacks.get("progress_bar")),
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        use_distributed_sampler=False,  # the data module divides the samples
        default_root_dir=folder,
    )
    _, trainer.accumulate_grad_batches = data.split(trainer.world_size)
    data.trainer = trainer
    if start:
        source = start[0]["config"]["data"]["_target_"].rpartition(".")[2]  # may be another, in a new folder
        data.load_state_dict(start[0][source])
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
        data.keep(folder / KEPT)
        factors = ", ".join(f"{name} {value:.2f}" for name, value in flops.flop_factor.items())
        log.info("run folder %s", folder)
        log.info(
            "%s parameters, %s MACs for an input of %s, fewer than dense by: %s",
            f"{flops.params:,}",
            f"{flops.total:,}",
            "×".join(map(str, flops.input_shape)),
            factors,
        )
        if start:
            log.info("going on from %s, after %d steps", start[1], start[0]["global_step"])
    trainer.fit(task, data, ckpt_path=start[1] if start else None, weights_only=True)
    metrics = trainer.callback_metrics
    if task.headline not in metrics:  # the checkpoint had all its epochs behind it
        trainer.loggers = []  # the curve has this validation already
        metrics = trainer.validate(task, data, verbose=False)[0]
    summary.write(trainer, metrics)
    if trainer.is_global_zero:
        log.info("%s %.2f, written to %s", task.headline, task.figures(metrics)[task.headline], folder / "summary.json")


def one_line_errors(run: Callable[[], None]) -> None:
    """Run, and turn a SettingError, however deep a library wrapped it, into one line and exit code 1."""
    try:
        run()
    except (SettingError, InstantiationException, OSError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, SettingError):
            cause = cause.__cause__
        # A data loader's worker puts its traceback before the message.
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        message = lines[-1].removeprefix(f"{SettingError.__module__}.SettingError: ")
        sys.exit(f"error: {message}")


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    with one_job():
        one_line_errors(lambda: train(cfg, Path(HydraConfig.get().runtime.output_dir)))


if __name__ == "__main__":
    main()
