"""What all LightningModules here have in common: one model, one optimizer and one schedule."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from torchmetrics import MeanMetric

from models.compiling import compile_model, overwrites_gradients
from models.sharding import shard
from stl import SettingError, fuse_mlps


class Task(pl.LightningModule, ABC):
    """Training and validation of `model`, on batches (inputs, targets) of which it takes the inputs.

    A subclass has the methods below and a `validation_step`; a configuration names it under `task`.

    Args:
        optimizer: makes the optimizer, from the model.
        scheduler: makes the schedule, from the optimizer and the keywords `epochs` and `steps_per_epoch`; it is
            stepped with `step_update(number of steps done)`.
        compile_mode: torch.compile's mode, one of `models.compiling.MODES`; None does not compile.
        config: the resolved configuration; it travels in every checkpoint, so that one file says what it is.
    """

    takes: ClassVar[str]  # the `unit` of data modules that it learns from
    headline: ClassVar[str]  # of the metrics of a validation
    unit: ClassVar[str]  # of what is counted a second
    packages: ClassVar[tuple[str, ...]] = ()  # that a summary gives the versions of, beside those of all tasks

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: Callable[[nn.Module], Optimizer],
        scheduler: Callable[..., Any],
        compile_mode: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        fuse_mlps(self.model)  # the names of its parameters stay
        self.compile_mode = compile_mode
        compile_model(self.model, compile_mode)
        self.config = config or {}
        self._optimizer, self._scheduler = optimizer, scheduler
        self.train_loss = MeanMetric()  # its state goes into checkpoints, also in the middle of an epoch
        self.train_loss.persistent(True)

    @classmethod
    @abstractmethod
    def configured(cls, cfg: Any, model: nn.Module, data: Any, **settings: Any) -> "Task":
        """As a whole configuration says, for a model and a data module made from it; `settings` are those of `Task`."""

    @abstractmethod
    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """What training lowers."""

    @abstractmethod
    def figures(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """What summaries have of the metrics of a validation."""

    @staticmethod
    def amount(batch: tuple[Tensor, Tensor]) -> int:
        """How many of `unit` there are in a batch."""
        return len(batch[0])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        loss = self._loss(batch)
        self.train_loss.update(loss.detach(), len(batch[0]))
        self.log("loss", loss, prog_bar=True, logger=False)
        return loss

    def on_train_epoch_end(self) -> None:
        # Straight to the loggers: what self.log is given here is written only after the checkpoint of the epoch.
        loss = self.train_loss.compute()
        for logger in self.loggers:
            logger.log_metrics({"train_loss": float(loss), "epoch": self.current_epoch}, step=self.global_step - 1)
        self.train_loss.reset()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.model, FSDPModule):
            assert self.device_mesh is not None
            if self._keeps_gradients:
                raise SettingError(
                    f"compile={self.compile_mode} with trainer=fsdp2 cannot accumulate gradients; set compile=default, "
                    "or data.device_batch_size to null"
                )
            # on a CPU autocast leaves LayerNorm alone, which then does not take bfloat16 weights with float32 inputs
            in_bf16 = self.trainer.precision == "bf16-mixed" and self.device_mesh.device_type == "cuda"
            shard(self.model, self.device_mesh["data_parallel"], torch.bfloat16 if in_bf16 else None)

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.model)
        epochs = self.trainer.max_epochs or 1
        steps = self.trainer.estimated_stepping_batches
        scheduler = self._scheduler(optimizer, epochs=epochs, steps_per_epoch=steps / epochs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        if self._keeps_gradients:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
        optimizer.zero_grad(set_to_none=not self._keeps_gradients)

    @property
    def _keeps_gradients(self) -> bool:
        """Whether gradients need tensors of their own, to which those of each accumulated batch are added."""
        return self.trainer.accumulate_grad_batches > 1 and overwrites_gradients(self.compile_mode)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The schedule is a function of the step and of this run's settings, which may ask for more epochs.
        checkpoint["lr_schedulers"] = []
