"""The moving average of the weights, which is what gets validated and reported."""

from typing import Any

import pytorch_lightning as pl
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.fsdp import FSDPModule

from models.compiling import compile_model
from models.sharding import load_whole_state_dict, shard, whole_state_dict


class ModelEma(pl.Callback):
    """Keeps timm's ModelEmaV3 of the task's model, updated after every optimizer step; validation runs on it.

    Every checkpoint carries it, beside the weights that training goes on with.
    """

    def __init__(self, decay: float) -> None:
        """`decay` is the part of the average that one step keeps."""
        self.decay = decay
        self.ema: ModelEmaV3 | None = None
        self._steps = 0
        self._current: nn.Module | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if self.ema is None:
            self.ema = ModelEmaV3(pl_module.model, decay=self.decay)
            compile_model(self._average, pl_module.compile_mode)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._average.to(pl_module.device)
        if isinstance(pl_module.model, FSDPModule):
            shard(self._average, pl_module.device_mesh["data_parallel"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step > self._steps:  # not while gradients accumulate
            assert self.ema is not None
            self.ema.update(pl_module.model)
            self._steps = trainer.global_step

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._current = pl_module.model
        pl_module.model = self._average

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.model = self._current

    def state_dict(self) -> dict[str, Any]:
        return {"model": whole_state_dict(self._average)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        load_whole_state_dict(self._average, state_dict["model"])

    @property
    def _average(self) -> nn.Module:
        assert self.ema is not None, "setup has not run"
        return self.ema.module


def averaged_weights(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The state dict of the averaged model in a checkpoint, or None where the run kept no average."""
    state = checkpoint.get("callbacks", {}).get(ModelEma.__qualname__)
    return None if state is None else state["model"]
