"""The moving average of the weights, through the trainer."""

import pytest
import torch
from running import QUICK, evaluate, run

from models.ema import averaged_weights

EMA = [*QUICK, "callbacks=[default,ema]", "trainer.limit_train_batches=3", "callbacks.progress_bar=null"]
LEARN = ["scheduler.warmup_epochs=0", "scheduler.cooldown_epochs=0", "optimizer.lr=1e-2"]


def checkpoint_of(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def current(checkpoint):
    weights = checkpoint["state_dict"].items()
    return {name.removeprefix("model."): value for name, value in weights if name.startswith("model.")}


def test_without_decay_the_average_is_the_model_itself(tmp_path):
    run(tmp_path, *EMA, *LEARN, "callbacks.ema.decay=0.0")
    checkpoint = checkpoint_of(tmp_path)
    torch.testing.assert_close(averaged_weights(checkpoint), current(checkpoint))


def test_every_step_moves_the_average_by_its_part(tmp_path):
    run(tmp_path / "0", *EMA, *LEARN, "trainer.limit_train_batches=1", "callbacks.ema.decay=1.0")
    start = averaged_weights(checkpoint_of(tmp_path / "0"))  # with decay 1 the average stays where it began
    run(tmp_path / "1", *EMA, *LEARN, "trainer.limit_train_batches=1", "callbacks.ema.decay=0.75")
    checkpoint = checkpoint_of(tmp_path / "1")
    name = "head.weight"
    expected = 0.75 * start[name] + 0.25 * current(checkpoint)[name]
    torch.testing.assert_close(averaged_weights(checkpoint)[name], expected)


def test_validation_and_eval_report_the_average(tmp_path):
    plain = run(tmp_path / "plain", *EMA, *LEARN, "callbacks.ema=null")
    frozen = run(tmp_path / "frozen", *EMA, *LEARN, "callbacks.ema.decay=1.0")
    untrained = run(tmp_path / "untrained", *QUICK, "optimizer.lr=1e-12", "trainer.limit_train_batches=3")
    assert frozen["val_loss"] == pytest.approx(untrained["val_loss"], rel=1e-3)
    assert frozen["val_loss"] != pytest.approx(plain["val_loss"], rel=1e-2)
    for averaged in (True, False):
        figures = evaluate(tmp_path / "frozen" / "checkpoints" / "last.ckpt", f"averaged={averaged}")
        assert figures["averaged_weights"] == averaged


def test_training_goes_on_with_the_current_weights_and_the_kept_average(tmp_path):
    whole = run(tmp_path / "whole", *EMA, *LEARN, "callbacks.ema.decay=1.0", "trainer.max_epochs=1")
    words = ["trainer.max_epochs=2", f"ckpt_path={tmp_path / 'whole' / 'checkpoints' / 'last.ckpt'}", "seed=5"]
    resumed = run(tmp_path / "on", *EMA, *LEARN, "callbacks.ema.decay=1.0", *words)
    assert resumed["val_loss"] == pytest.approx(
        whole["val_loss"], rel=1e-6
    )  # the average of the first run, not of seed 5
    first, second = (current(checkpoint_of(tmp_path / name))["head.weight"] for name in ("whole", "on"))
    assert not torch.equal(first, second)
