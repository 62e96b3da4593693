"""Write checkpoints so that a kill at any moment, or a full disk, leaves the last good ones as they were."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from models.checkpoint import newest_first
from stl import SettingError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's, except that a file is complete, and on the disk, before it takes its name."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises SettingError where the file cannot be written."""
        path = Path(path)
        temporary = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, RuntimeError) as error:  # torch turns some failed writes into RuntimeError
            with suppress(OSError):
                temporary.unlink()
            kept = next(iter(newest_first(path.parent)), None)
            cause = error if isinstance(error, OSError) else error.__context__
            reason = cause.strerror if isinstance(cause, OSError) else error
            raise SettingError(
                f"checkpoint {str(path)!r} could not be written ({reason}); last good checkpoint: "
                f"{kept or 'none was written yet'}; make room and start the same command again to go on from it"
            ) from error


class LastCheckpoints(Checkpoint):
    """A checkpoint after every epoch, and every so many steps; the newest are kept.

    Files are called <epochs done>-<steps done>.ckpt; `last.ckpt` is a link to the newest.
    """

    def __init__(self, dirpath: str, keep: int = 2, every_steps: int | None = None) -> None:
        """`every_steps`: optimizer steps between checkpoints inside an epoch; None saves after epochs only."""
        for name, value in (("keep", keep), ("every_steps", every_steps)):
            if not (value is None or value >= 1):
                raise SettingError(f"callbacks.checkpoint.{name}={value} must be 1 or more")
        self.folder, self.keep, self.every_steps = Path(dirpath), keep, every_steps
        self._steps = 0

    @property
    def last_model_path(self) -> str:
        """The newest checkpoint, or "" where there is none."""
        return str(next(iter(newest_first(self.folder)), ""))

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._steps = trainer.global_step
        if trainer.is_global_zero:  # what a kill left half written, and what was too damaged to go on from
            for path in self.folder.glob("*.tmp"):
                path.unlink()
            for path in newest_first(self.folder):
                if _steps_of(path) > trainer.global_step:
                    path.unlink()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        stepped, self._steps = trainer.global_step > self._steps, trainer.global_step
        if stepped and self.every_steps and self._steps % self.every_steps == 0 and between_steps(trainer):
            self.save(trainer, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.save(trainer, trainer.current_epoch + 1)

    def save(self, trainer: pl.Trainer, epochs: int) -> None:
        """Write one now, after so many epochs; every process must call this, between two optimizer steps."""
        path = self.folder / f"{epochs:03d}-{trainer.global_step:08d}.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            link = self.folder / "link.tmp"
            link.unlink(missing_ok=True)
            link.symlink_to(path.name)
            link.replace(self.folder / "last.ckpt")
            for old in newest_first(self.folder)[self.keep :]:
                old.unlink()


def between_steps(trainer: pl.Trainer) -> bool:
    """Whether a batch that has just ended left no gradients behind, and is not the last of its epoch: after that one
    comes the validation, and then the epoch's own checkpoint."""
    progress = trainer.fit_loop.epoch_loop.batch_progress
    accumulated = progress.current.ready % trainer.accumulate_grad_batches == 0
    return accumulated and progress.current.ready < trainer.num_training_batches and not progress.is_last_batch


def _steps_of(path: Path) -> int:
    return int(path.stem.partition("-")[2])
