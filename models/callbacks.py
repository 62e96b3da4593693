"""Lightning callbacks: the run's summary, and the stop at a loss or weights that are not finite."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, cast

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from models.task import Task
from stl import FlopReport, SettingError

PACKAGES = ("torch", "torchvision", "timm", "pytorch-lightning", "hydra-core", "numpy")


class DivergedError(SettingError):
    """The loss, or the weights, are not finite: under these settings training does not come to an end."""


class RunSummary(pl.Callback):
    """Writes flops.json when training starts, and summary.json, with the task's figures, when `write` is called;
    diverged.json, with the step and the epoch, where training ends in a DivergedError.

    Its clocks run on over interruptions.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], flops: FlopReport) -> None:
        """`facts` are the keys of the summary that are known beforehand (dataset, model, linear, seed, …)."""
        self.folder, self.facts, self.flops = folder, facts, flops
        self._amount, self._seconds, self._mark = 0, 0.0, 0.0
        self._earlier, self._began = 0.0, 0.0  # seconds of wall time before the last interruption, start of this part
        self._fresh = True

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._began = time.perf_counter()
        if trainer.is_global_zero:
            write_json(self.folder / "flops.json", self.flops.to_dict())

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._mark = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if not self._fresh:  # the first batch pays for start-up
            self._amount += pl_module.amount(batch) * trainer.world_size
            self._seconds += now - self._mark
        self._mark, self._fresh = now, False

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, DivergedError) and trainer.is_global_zero:
            place = {"step": trainer.global_step, "epoch": trainer.current_epoch}
            write_json(self.folder / "diverged.json", self.facts | place | origin(trainer))

    def state_dict(self) -> dict[str, Any]:
        return {"images": self._amount, "seconds": self._seconds, "wall_seconds": self._wall_seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._amount, self._seconds = state_dict["images"], state_dict["seconds"]
        self._earlier = state_dict["wall_seconds"]

    def _wall_seconds(self) -> float:
        return self._earlier + time.perf_counter() - self._began

    def write(self, trainer: pl.Trainer, metrics: Mapping[str, Any]) -> None:
        """Write summary.json from the metrics of the last validation."""
        if not trainer.is_global_zero:
            return
        counts, task = self.flops.to_dict(), cast(Task, trainer.lightning_module)
        summary = {
            **self.facts,
            **task.figures(metrics),
            "params": self.flops.params,
            "input_shape": list(self.flops.input_shape),  # of which the MACs are
            **{key: counts[key] for key in ("macs", "dense_macs", "flop_factor")},
            "epochs": trainer.current_epoch,
            f"{task.unit}_per_second": self._amount / self._seconds if self._seconds else None,
            "wall_seconds": self._wall_seconds(),
            **origin(trainer),
        }
        write_json(self.folder / "summary.json", summary)


def origin(trainer: pl.Trainer) -> dict[str, Any]:
    """When, where and with what a run was."""
    packages = (*PACKAGES, *cast(Task, trainer.lightning_module).packages)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": describe_device(trainer.strategy.root_device),
        "devices": trainer.world_size,
        "precision": str(trainer.precision),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


class StopAtNonFiniteLoss(pl.Callback):
    """Stops at a NaN or infinite loss, before it reaches the weights, and before such weights reach a checkpoint."""

    def __init__(self) -> None:
        self._batch: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        if torch.isfinite(loss):
            return
        with trainer.precision_plugin.forward_context():  # in the precision in which it happened
            layer = first_non_finite_layer(pl_module.model, self._batch[0])
        self._stop(trainer, f"the loss is {loss.item()}", f", first in {layer}")

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A gradient may overflow where the loss does not: such weights are never written."""
        for name, value in checkpoint["state_dict"].items():
            if value.is_floating_point() and not value.isfinite().all():
                self._stop(trainer, f"{name} holds NaN or infinite values")

    def _stop(self, trainer: pl.Trainer, what: str, where: str = "") -> NoReturn:
        kept = getattr(trainer.checkpoint_callback, "last_model_path", "") or "none was written yet"
        raise DivergedError(
            f"{what} at step {trainer.global_step} of epoch {trainer.current_epoch}{where}; last good checkpoint: "
            f"{kept}; lower optimizer.lr or train with trainer.precision=32-true"
        )


@torch.no_grad()
def first_non_finite_layer(model: nn.Module, images: Tensor) -> str:
    """Name of the first layer whose output is not finite for these images; "the loss" where every layer's is."""
    found: list[str] = []
    hooks = []
    for name, module in model.named_modules():
        if not list(module.children()):

            def hook(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                if isinstance(output, Tensor) and not output.isfinite().all():
                    found.append(f"layer {name}")

            hooks.append(module.register_forward_hook(hook))
    try:
        model(images)
    finally:
        for handle in hooks:
            handle.remove()
    if not images.isfinite().all():
        return "the input images"
    return found[0] if found else "the loss"


def describe_device(device: torch.device) -> str:
    """The accelerator's name, or the number of CPU threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()}-thread CPU"


def git_commit() -> str | None:
    """The commit of this code, with "+changes" where files differ from it; None outside a repository.

    The environment variable GIT_COMMIT goes before, for code that was copied out of its repository.
    """
    if commit := os.environ.get("GIT_COMMIT"):
        return commit
    root = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; the file is complete or not there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)
