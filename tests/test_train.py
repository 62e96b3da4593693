"""train.py as its users run it: every experiment, the run folder, resuming, and what bad input gets."""

import csv
import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from running import CONFIGS, QUICK, program, run

from stl import SettingError, STLLinear

EXPERIMENTS = sorted(
    str(path.relative_to(CONFIGS / "experiment").with_suffix("")) for path in CONFIGS.glob("experiment/**/*.yaml")
)
TIMES = {"images_per_second", "wall_seconds", "date"}


@pytest.fixture(scope="module")
def image_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for index, name in enumerate(("ant", "bee")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (64, 48), (90 * index, 80 * number, 60)).save(folder / f"{number}.jpg")
    return root


def overrides_for(experiment: str, image_root: Path) -> list[str]:
    words = [f"experiment={experiment}", *QUICK]
    if experiment != "digits":
        words += [f"data.root={image_root}", "data.num_workers=0", "data.batch_size=2"]
    return words


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_takes_one_step(experiment, tmp_path, image_root):
    summary = run(tmp_path, *overrides_for(experiment, image_root))
    assert summary["epochs"] == 1
    assert 0 <= summary["top1"] <= 100
    assert summary["linear"]["type"] == ("dense" if experiment.endswith("dense") else "stl")


@pytest.fixture(scope="module")
def first_run(tmp_path_factory) -> Path:
    """Two quick epochs on the digits."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, *QUICK, "trainer.max_epochs=2", "trainer.limit_train_batches=3", "trainer.limit_val_batches=3")
    return folder


def test_the_run_folder_holds_what_scripts_rely_on(first_run):
    summary = json.loads((first_run / "summary.json").read_text())
    assert {
        *("dataset", "model", "linear", "top1", "top5", "val_loss", "params", "macs", "dense_macs", "flop_factor"),
        *("epochs", "seed", "images_per_second", "wall_seconds", "git_commit", "versions"),
    } <= set(summary)
    assert summary["linear"] == {"type": "stl", "tile": 4, "rank": 16, "basis": "frame"}
    assert set(summary["macs"]) == {"total", "linear", "core", "encode", "decode"}
    assert set(summary["dense_macs"]) == {"total", "linear"}
    assert set(summary["flop_factor"]) == {"core", "linear", "total"}
    assert summary["dataset"] == "digits"
    assert summary["model"] == "t2t_vit_tiny"
    assert summary["epochs"] == 2

    flops = json.loads((first_run / "flops.json").read_text())
    assert flops["macs"] == summary["macs"]
    assert flops["params"] == summary["params"]
    assert sum(row["macs"] for row in flops["layers"]) == summary["macs"]["total"]

    rows = list(csv.DictReader((first_run / "metrics.csv").open()))
    assert {"epoch", "step", "train_loss", "val_loss", "top1"} <= set(rows[0])
    config = OmegaConf.load(first_run / "config.yaml")
    assert config.linear.rank == 16
    assert "${" not in (first_run / "config.yaml").read_text()
    checkpoint = torch.load(first_run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["config"] == OmegaConf.to_container(config)
    assert sorted(path.name for path in (first_run / "checkpoints").iterdir()) == ["000.ckpt", "001.ckpt", "last.ckpt"]


def test_one_seed_gives_one_summary_and_another_seed_another(first_run, tmp_path):
    words = [*QUICK, "trainer.max_epochs=2", "trainer.limit_train_batches=3", "trainer.limit_val_batches=3"]
    first = json.loads((first_run / "summary.json").read_text())
    again, other = run(tmp_path / "again", *words), run(tmp_path / "other", *words, "seed=1")
    assert {k: v for k, v in again.items() if k not in TIMES} == {k: v for k, v in first.items() if k not in TIMES}
    assert other["val_loss"] != first["val_loss"]


def test_a_run_goes_on_from_a_checkpoint(first_run, tmp_path, caplog):
    last = first_run / "checkpoints" / "last.ckpt"
    summary = run(tmp_path / "on", *QUICK, "trainer.max_epochs=3", f"ckpt_path={last}")
    rows = list(csv.DictReader((tmp_path / "on" / "metrics.csv").open()))
    assert summary["epochs"] == 3
    assert {row["epoch"] for row in rows if row["epoch"]} == {"2"}

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "000.ckpt").write_bytes((first_run / "checkpoints" / "000.ckpt").read_bytes())
    (broken / "last.ckpt").write_bytes(last.read_bytes()[:5000])
    run(tmp_path / "fallback", *QUICK, "trainer.max_epochs=2", f"ckpt_path={broken / 'last.ckpt'}")
    assert "last.ckpt is damaged; trying the one before it" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["linear.tile=2", "linear.rank=4"], "linear.rank=16 in the .*, 4 here; linear.tile=4 in the checkpoint, 2"),
        (["linear.rank=24"], "linear.rank=16 in the checkpoint, 24 here"),
        (["linear.basis=random"], "linear.basis=frame in the checkpoint, random here"),
        (["linear=dense"], "linear._target_=stl.STLLinear in the checkpoint, torch.nn.Linear here"),
        (["model.name=t2t_vit_7"], "model.name=t2t_vit_tiny in the checkpoint, t2t_vit_7 here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_written(first_run, tmp_path, overrides, message):
    with pytest.raises(SettingError, match=message):
        run(tmp_path / "new", *QUICK, *overrides, f"ckpt_path={first_run / 'checkpoints' / 'last.ckpt'}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, value):
    forward, calls = STLLinear.forward, []

    def fail_in_the_third_batch(layer, x):
        y = forward(layer, x)
        if layer.training and layer.in_features == 128:  # the second layer of each MLP, four a batch
            calls.append(layer)
        return y * value if len(calls) > 8 + 1 else y

    monkeypatch.setattr(STLLinear, "forward", fail_in_the_third_batch)
    words = [*QUICK, "trainer.max_epochs=3", "trainer.limit_train_batches=1"]
    with pytest.raises(SettingError) as caught:
        run(tmp_path, *words)
    message = str(caught.value)
    assert "at step 2 of epoch 2, first in layer tokens_to_token.attention1.kqv" in message
    assert "checkpoints/last.ckpt" in message
    assert "lower optimizer.lr" in message
    assert "\n" not in message
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in kept["state_dict"].values() if value.is_floating_point())
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["linear.basis=hadamard", "linear.rank=17"],
            "error: basis='hadamard' has no tile=4 rank=17; it has tile=2: rank 4;",
        ),
        (["linear.basis=walsh"], "error: basis='walsh' is unknown; choose one of exact48, frame, hadamard"),
        (["model.name=t2t_vit_8"], "error: model.name='t2t_vit_8' is unknown; close to it: t2t_vit_"),
        (["data=image_folder", "data.root=nowhere"], "error: data.root='"),
        (["ckpt_path=nowhere.ckpt"], "error: checkpoint 'nowhere.ckpt' does not exist"),
    ],
)
def test_bad_settings_get_one_line_and_leave_nothing_behind(words, message, tmp_path):
    result = program("train.py", *words, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.returncode == 1
    assert result.stderr.startswith(message), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"train.log"}


@pytest.mark.parametrize("override", ["nonsense=1", "linear.ranks=16", "data.rot=x", "trainer.epochs=3"])
def test_an_unknown_key_is_hydras_error(override):
    result = program("train.py", override)
    assert result.returncode != 0
    assert f"Could not override '{override.split('=')[0]}'" in result.stderr


def test_a_sweep_over_ranks_gives_a_summary_each(tmp_path):
    words = [*QUICK, "linear.tile=4", "linear.rank=16,24", "logger=csv", f"hydra.sweep.dir={tmp_path}"]
    result = program("train.py", "-m", *words)
    assert result.returncode == 0, result.stderr
    ranks = [json.loads((tmp_path / str(i) / "summary.json").read_text())["linear"]["rank"] for i in (0, 1)]
    assert ranks == [16, 24]


def test_wandb_without_a_login_is_offline_and_says_so_once(tmp_path, monkeypatch, caplog):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("models.loggers.logged_in", lambda: False)
    run(tmp_path, *QUICK, "logger=[csv,wandb]")
    assert caplog.text.count("nobody is logged in, the run is kept offline") == 1
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("linear", ["dense", "stl"])
def test_the_default_run_reaches_97_percent_on_the_digits(linear, tmp_path):
    summary = run(tmp_path, f"linear={linear}", "callbacks.progress_bar=null", "trainer.accelerator=cpu", "logger=csv")
    assert summary["top1"] >= 97.0
