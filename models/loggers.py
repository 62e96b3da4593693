"""Weights & Biases without a login: the run is kept offline instead of asking."""

import logging
import os
from typing import Any

from pytorch_lightning.loggers import WandbLogger

log = logging.getLogger(__name__)


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
