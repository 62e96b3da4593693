"""Signals at moments that random ones hit too seldom; tests/test_resume.py has these."""

import os
import signal

import pytest
from running import QUICK, run

from models.preemption import Preemption
from models.random_state import RandomState

WORDS = [
    *QUICK,
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=6",
    "data.batch_size=16",
    "data.device_batch_size=8",
    "callbacks.checkpoint.every_steps=1",
    "model.name=t2t_vit_tiny",
]


def test_a_signal_before_a_run_goes_on_in_the_middle_of_an_epoch(tmp_path, monkeypatch):
    """Lightning's own handler is there until training begins, and ends such a run with exit code 0."""

    def after_a_step(self, trainer, *_):
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    def before_training(self, *_):
        os.kill(os.getpid(), signal.SIGTERM)

    for place, name, send, number in (
        (Preemption, "on_train_batch_start", after_a_step, signal.SIGUSR1),
        (RandomState, "on_train_start", before_training, signal.SIGTERM),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(place, name, send, raising=False)
            with pytest.raises(SystemExit) as stopped:
                run(tmp_path, *WORDS)
        assert stopped.value.code == 128 + number
    assert run(tmp_path, *WORDS)["epochs"] == 1
