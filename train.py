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
from models.checkpoint import load_checkpoint
from models.task import ClassificationTask, check_same_model
from stl import SettingError, count_flops

log = logging.getLogger(__name__)
logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)  # tips and hardware notes
warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")  # inside Lightning
warnings.filterwarnings("ignore", message="Experiment logs directory .* exists")  # train.log is there already


def build(cfg: DictConfig) -> tuple[ClassificationTask, ImageDataModule]:
    """The task and the data module that a configuration describes."""
    data = instantiate(cfg.data)
    linear = instantiate(cfg.linear)
    model = instantiate(cfg.model, num_classes=data.num_classes, img_size=data.image_size, linear=linear)
    task = ClassificationTask(
        model,
        num_classes=data.num_classes,
        optimizer=instantiate(cfg.optimizer),
        scheduler=instantiate(cfg.scheduler),
        label_smoothing=cfg.label_smoothing,
        config=cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)),
    )
    return task, data


def describe(cfg: DictConfig, data: ImageDataModule) -> dict[str, Any]:
    """The keys of summary.json that are known before training."""
    settings = {key: cfg.linear.get(key) for key in ("tile", "rank", "basis")}
    kind = cfg.linear._target_.rsplit(".", 1)[-1].removesuffix("Linear").lower() or "dense"
    return {"dataset": data.name, "model": cfg.model.name, "linear": {"type": kind, **settings}, "seed": cfg.seed}


def train(cfg: DictConfig, folder: Path) -> None:
    """One run into its folder: config.yaml, flops.json, metrics.csv, checkpoints/ and summary.json."""
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    task, data = build(cfg)
    ckpt_path = None
    if cfg.ckpt_path:
        checkpoint, ckpt_path = load_checkpoint(cfg.ckpt_path)
        check_same_model(checkpoint["config"], task.config)
    flops = count_flops(task.model, (3, data.image_size, data.image_size))
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    trainer = instantiate(
        cfg.trainer,
        callbacks=[
            *(instantiate(callback) for callback in cfg.callbacks.values() if callback),
            RunSummary(folder, describe(cfg, data), flops),
        ],
        logger=[instantiate(logger) for logger in cfg.logger.values() if logger],
        default_root_dir=folder,
    )
    factors = ", ".join(f"{name} {value:.2f}" for name, value in flops.flop_factor.items())
    log.info("run folder %s", folder)
    log.info(
        "%s parameters, %s MACs an image, fewer than dense by: %s", f"{flops.params:,}", f"{flops.total:,}", factors
    )
    trainer.fit(task, data, ckpt_path=ckpt_path, weights_only=True)
    if (folder / "summary.json").exists():
        log.info("top-1 %.2f %%, written to %s", 100 * trainer.callback_metrics["top1"], folder / "summary.json")


def one_line_errors(run: Callable[[], None]) -> None:
    """Run, and turn a SettingError, however deep a library wrapped it, into one line and exit code 1."""
    try:
        run()
    except (SettingError, InstantiationException) as error:
        cause: BaseException = error
        while cause.__cause__ is not None and not isinstance(cause, SettingError):
            cause = cause.__cause__
        # A data loader's worker puts its traceback before the message.
        message = str(cause).strip().splitlines()[-1].removeprefix(f"{SettingError.__module__}.SettingError: ")
        sys.exit(f"error: {message}")


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(cfg: DictConfig) -> None:
    one_line_errors(lambda: train(cfg, Path(HydraConfig.get().runtime.output_dir)))


if __name__ == "__main__":
    main()
