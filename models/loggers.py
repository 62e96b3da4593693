"""Loggers that go on where a checkpoint stands: one curve, one run, however often training was interrupted."""

import csv
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from pytorch_lightning.loggers import CSVLogger, Logger, WandbLogger

log = logging.getLogger(__name__)


class LoggerState(pl.Callback):
    """Every checkpoint carries the rows of metrics.csv so far and the id of the wandb run."""

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        state: dict[str, Any] = {}
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
                curve = Path(logger.log_dir) / "metrics.csv"
                state["metrics.csv"] = curve.read_bytes().decode() if curve.exists() else ""
            elif isinstance(logger, WandbLogger):
                state["wandb"] = logger.version
        checkpoint["loggers"] = state

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        text = checkpoint["loggers"].get("metrics.csv")
        for logger in trainer.loggers:
            if text and isinstance(logger, CSVLogger) and trainer.is_global_zero:
                (Path(logger.log_dir) / "metrics.csv").write_bytes(text.encode())
                logger.experiment.metrics_keys = next(csv.reader(text.splitlines()))


def instantiate_loggers(configs: Mapping[str, Any], checkpoint: Mapping[str, Any] | None) -> list[Logger]:
    """The loggers of a run; one that goes on from a checkpoint goes on with its wandb run."""
    wandb_id = checkpoint["loggers"].get("wandb") if checkpoint else None
    return [
        instantiate(config, **({"id": wandb_id, "resume": "allow"} if name == "wandb" and wandb_id else {}))
        for name, config in configs.items()
        if config
    ]


def logged_in() -> bool:
    """Whether wandb has a key, from its environment variable or an earlier `wandb login`."""
    import wandb  # here, so that everything else runs where it is not installed

    return bool(wandb.api.api_key)


def wandb_logger(**settings: Any) -> WandbLogger:
    """A WandbLogger that is offline unless WANDB_MODE says otherwise or somebody is logged in."""
    if "WANDB_MODE" not in os.environ and not logged_in():
        log.warning("wandb: nobody is logged in, the run is kept offline; `wandb login`, then `wandb sync` the folder")
        settings |= {"offline": True, "mode": "offline"}
    return WandbLogger(**settings)
