"""The random states of all processes, and what else each process has of its own, in every checkpoint."""

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist


class RandomState(pl.Callback):
    """Training draws from a stream that depends on the seed and the process alone, and that goes on after a kill.

    Dropout, stochastic depth, mixup and erasing draw from it; the images' own augmentation does not (`data/order.py`).
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self._loaded is None:
            numbers = [self.seed, trainer.global_rank, trainer.global_step]
            pl.seed_everything(int(np.random.SeedSequence(numbers).generate_state(1)[0]), verbose=False)
        else:
            set_states(self._loaded)
            pl_module.train_loss.load_state_dict(self._loaded["train_loss"])
            pl_module.train_loss.to(pl_module.device)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        mine = {**get_states(), "train_loss": pl_module.train_loss.state_dict()}
        states = [mine]
        if trainer.world_size > 1:
            states = [{} for _ in range(trainer.world_size)]
            dist.all_gather_object(states, mine)
        checkpoint["random_state"] = states

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        states = checkpoint["random_state"]
        if len(states) == trainer.world_size:  # else each process starts a new stream from the seed and the step
            self._loaded = states[trainer.global_rank]


def get_states() -> dict[str, Any]:
    """States of Python, NumPy, PyTorch's CPU and this process's GPU, as tensors and plain values."""
    numpy: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - timm's mixup draws from it
    _, keys, *rest = numpy
    return {
        "python": random.getstate(),
        "numpy": {"keys": torch.from_numpy(keys.astype(np.int64)), "rest": rest},
        "cpu": torch.get_rng_state(),
        "gpu": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_states(states: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    keys = states["numpy"]["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *states["numpy"]["rest"]))  # noqa: NPY002
    torch.set_rng_state(states["cpu"])
    if states["gpu"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["gpu"])
