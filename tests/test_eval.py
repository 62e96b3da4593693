"""eval.py on checkpoints of quick runs."""

import json
import shutil

import pytest
from running import QUICK, program, run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    words = [*QUICK, "trainer.limit_val_batches=1.0", "data.eval_batch_size=360", "trainer.limit_train_batches=40"]
    words += ["scheduler.warmup_epochs=0", "scheduler.cooldown_epochs=0", "optimizer.lr=5e-3"]  # learns something
    return folder, run(folder, *words)


def evaluate(checkpoint, *words):
    return program("eval.py", f"ckpt={checkpoint}", "latency.repeats=1", "accelerator=cpu", *words)


def test_the_figures_of_a_checkpoint_are_printed_and_written(trained):
    folder, summary = trained
    result = evaluate(folder / "checkpoints" / "last.ckpt")
    assert result.returncode == 0, result.stderr
    figures = json.loads((folder / "eval.json").read_text())
    for key in ("dataset", "model", "linear", "top1", "top5", "params", "macs", "dense_macs", "flop_factor"):
        assert figures[key] == summary[key], key
    assert figures["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    assert set(figures["latency_ms"]) == {"1", "32"}
    assert all(ms > 0 for ms in figures["latency_ms"].values())
    for words in (
        "top-1 / top-5",
        "parameters",
        "MACs, linear",
        "MACs, total",
        "FLOP factor, core",
        "latency, batch 1",
    ):
        assert words in result.stdout


def test_other_data_and_batch_sizes_can_be_asked_for(trained):
    folder, summary = trained
    result = evaluate(folder / "checkpoints" / "last.ckpt", "data=digits", "data.split_seed=1", "batch_size=64")
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "eval.json").read_text())["val_loss"] != summary["val_loss"]


def test_what_lightning_does_not_take_gets_one_line(trained):
    result = evaluate(trained[0] / "checkpoints" / "last.ckpt", "precision=foo")
    assert result.returncode == 1
    assert result.stderr.startswith("error: Precision 'foo' is invalid")
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_truncated_checkpoint_falls_back_to_the_one_before(trained, tmp_path):
    folder, _ = trained
    kept = next((folder / "checkpoints").glob("001-*.ckpt"))
    shutil.copy(kept, tmp_path)
    (tmp_path / "last.ckpt").write_bytes(kept.read_bytes()[:9999])
    result = evaluate(tmp_path / "last.ckpt")
    assert result.returncode == 0, result.stderr
    assert "last.ckpt is damaged; trying the one before it" in result.stdout
    assert json.loads((tmp_path / "eval.json").read_text())["checkpoint"].endswith(kept.name)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "error: ckpt is not set; give a checkpoint: python eval.py ckpt="),
        (["ckpt=nowhere.ckpt"], "error: checkpoint 'nowhere.ckpt' does not exist"),
        (["ckpt=models"], "error: checkpoint 'models' is a folder; give a .ckpt file"),
    ],
)
def test_a_missing_checkpoint_gets_one_line(words, message):
    result = program("eval.py", *words)
    assert result.returncode == 1
    assert result.stderr.startswith(message)
    assert len(result.stderr.strip().splitlines()) == 1
