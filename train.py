"""Train one model: `python train.py`, and any setting of configs/ after it; see the README."""

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import hydra
import pytorch_lightning as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from data.datamodule import ImageDataModule
from models.callbacks import RunSummary
from models.checkpoint import load_checkpoint, load_weights
from models.task import ClassificationTask
from stl import SettingError, count_flops

log = logging.getLogger(__name__)
logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)  # tips and hardware notes
warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # inside Lightning
logging.getLogger("timm.scheduler").setLevel(logging.ERROR)  # its remarks on very short schedules
warnings.filterwarnings("ignore", message=".*smaller than the logging interval")
warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")  # train.log is there already


def run_name() -> str:
    """The folder of a run below outputs/: its experiment's name, or its data's where it has none."""
    choices = HydraConfig.get().runtime.choices
    return choices["experiment"] or choices["data"]


OmegaConf.register_new_resolver("run_name", run_name, replace=True)


def build(cfg: DictConfig) -> tuple[ClassificationTask, ImageDataModule]:
    """The task and the data module that a configuration describes."""
    data = instantiate(cfg.data)
    linear = instantiate(cfg.linear)
    model = instantiate(cfg.model, num_classes=data.num_classes, img_size=data.image_size, linear=linear)
    optimizer = instantiate(cfg.optimizer)
    optimizer(model)  # wrong settings show now, not in the middle of a run
    task = ClassificationTask(
        model,
        num_classes=data.num_classes,
        optimizer=optimizer,
        scheduler=instantiate(cfg.scheduler),
        label_smoothing=cfg.label_smoothing,
        augment=instantiate(cfg.augment, num_classes=data.num_classes) if cfg.augment else None,
        config=cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)),
    )
    return task, data


def describe(cfg: DictConfig, data: ImageDataModule) -> dict[str, Any]:
    """The keys of summary.json that are known before training."""
    settings = {key: cfg.linear.get(key) for key in ("tile", "rank", "basis")}
    kind = cfg.linear._target_.rsplit(".", 1)[-1].removesuffix("Linear").lower() or "dense"
    linear = {"type": kind, **settings}
    overrides = sorted(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    return {
        "dataset": data.name,
        "model": cfg.model.name,
        "linear": linear,
        "seed": cfg.seed,
        "overrides": overrides,  # what the command line asked for
    }


def train(cfg: DictConfig, folder: Path) -> None:
    """One run into its folder: config.yaml, flops.json, metrics.csv, checkpoints/ and summary.json.

    Raises SettingError before anything is written where a setting is wrong.
    """
    if not 0 <= cfg.seed < 2**32:
        raise SettingError(f"seed={cfg.seed} must be a whole number from 0 to 2³² − 1")
    if cfg.trainer.limit_val_batches == 0:
        raise SettingError("trainer.limit_val_batches=0 leaves nothing to report; use 1 or more")
    if (folder / "checkpoints").exists() or (folder / "summary.json").exists():
        raise SettingError(f"the run folder {str(folder)!r} holds a run already; set hydra.run.dir to another")
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    task, data = build(cfg)
    ckpt_path = None
    if cfg.ckpt_path:
        checkpoint, ckpt_path = load_checkpoint(cfg.ckpt_path)
        load_weights(task, checkpoint, ckpt_path, task.config)
    flops = count_flops(task.model, (3, data.image_size, data.image_size))
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    summary = RunSummary(folder, describe(cfg, data), flops)
    trainer = instantiate(
        cfg.trainer,
        callbacks=[*(instantiate(callback) for callback in cfg.callbacks.values() if callback), summary],
        logger=[instantiate(logger) for logger in cfg.logger.values() if logger],
        enable_progress_bar=bool(cfg.callbacks.get("progress_bar")),
        enable_checkpointing=bool(cfg.callbacks.get("checkpoint")),
        default_root_dir=folder,
    )
    factors = ", ".join(f"{name} {value:.2f}" for name, value in flops.flop_factor.items())
    log.info("run folder %s", folder)
    log.info(
        "%s parameters, %s MACs an image, fewer than dense by: %s", f"{flops.params:,}", f"{flops.total:,}", factors
    )
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    metrics = trainer.callback_metrics
    if "top1" not in metrics:  # the checkpoint had all its epochs behind it
        metrics = trainer.validate(task, data, verbose=False)[0]
    summary.write(trainer, metrics)
    log.info("top-1 %.2f %%, written to %s", 100 * metrics["top1"], folder / "summary.json")


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
    one_line_errors(lambda: train(cfg, Path(HydraConfig.get().runtime.output_dir)))


if __name__ == "__main__":
    main()
