"""Stop on a signal between two optimizer steps, with a checkpoint written; under SLURM, queue the job again."""

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Checkpoint

from models.checkpointing import LastCheckpoints, between_steps

log = logging.getLogger(__name__)


class Preemption(Checkpoint):  # these are called after all other callbacks, which have then done with the step
    """On one of `signals`, to whichever process, all processes finish the step, write a checkpoint and exit.

    Exit code 128 + the signal's number. Under SLURM the job is queued again, by submitit where submitit started it,
    else by `scontrol requeue`; `scancel --signal=KILL` ends it for good.
    """

    def __init__(self, requeue: bool = True, signals: Sequence[str] = ("SIGTERM", "SIGUSR1", "SIGUSR2")) -> None:
        self.requeue, self.signals = requeue, [signal.Signals[name] for name in signals]
        self._received = 0
        self._earlier: dict[signal.Signals, Any] = {}
        self._group: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")  # on the CPU: a GPU's would wait for the step's kernels
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in self.signals}
        if trainer.received_sigterm:  # on which Lightning ends, with exit code 0, before the first step is complete
            self._received = signal.SIGTERM
        if number := self._agreed():
            self._stop(trainer, number)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if number := self._agreed():  # the epoch before has just written its checkpoint
            self._stop(trainer, number)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if between_steps(trainer) and (number := self._agreed()):
            for callback in trainer.checkpoint_callbacks:
                if isinstance(callback, LastCheckpoints):
                    callback.save(trainer, trainer.current_epoch)
            self._stop(trainer, number)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        """Put the handlers back; before Lightning does the same with those that it found, or its own would stay, and
        with them the whole trainer."""
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def _agreed(self) -> int:
        """The signal that any of the processes got, or 0."""
        received = torch.tensor(int(self._received))
        if self._group is not None:
            dist.all_reduce(received, dist.ReduceOp.MAX, group=self._group)
        return int(received)

    def _stop(self, trainer: pl.Trainer, number: int) -> None:
        submitits = self._earlier.get(signal.SIGUSR2)
        self._restore()
        if trainer.is_global_zero:
            kept = getattr(trainer.checkpoint_callback, "last_model_path", "") or "none written"
            log.warning(
                "stopped by %s after step %d, checkpoint: %s; the same command with the same run folder goes on",
                signal.Signals(number).name,
                trainer.global_step,
                kept,
            )
        if self.requeue and callable(submitits):
            submitits(signal.SIGUSR2, None)
        elif self.requeue and trainer.is_global_zero and "SLURM_JOB_ID" in os.environ:
            requeue_job()
        # Lightning kills the other processes, this one too, when a child of its own fails.
        raise SystemExit(128 + number if trainer.is_global_zero else 0)


def requeue_job() -> None:
    """Ask SLURM to queue this job again, and log what it answered."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{job}_{os.environ['SLURM_ARRAY_TASK_ID']}" if job else os.environ["SLURM_JOB_ID"]
    try:
        answer = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    except OSError as error:
        log.error("job %s could not be queued again: %s", job, error)
        return
    if answer.returncode:
        log.error("job %s could not be queued again: %s", job, answer.stderr.strip())
    else:
        log.warning("job %s is queued again", job)
