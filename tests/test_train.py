"""train.py as its users run it: every experiment, the run folder, resuming, and what bad input gets."""

import csv
import gc
import json
import shutil
import signal
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from PIL import Image
from running import CONFIGS, QUICK, TIMES, program, run

import train
from stl import SettingError, STLLinear, list_bases

EXPERIMENTS = sorted(
    str(path.relative_to(CONFIGS / "experiment").with_suffix(""))
    for path in CONFIGS.glob("experiment/**/*.yaml")
    if path.parent.name != "llm"  # which tests/models/language takes
)


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


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_takes_one_step(experiment, tmp_path, image_root):
    data = [
        f"data.root={image_root}",
        "data.num_workers=0",
        "data.batch_size=2",
        "trainer.precision=32-true",
        "callbacks.checkpoint=null",
        "data.image_size=64",  # less work; the strides follow
        "+model.depth=2",  # blocks are all alike
    ]
    summary = run(tmp_path, f"experiment={experiment}", *QUICK, *data)
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
        *("epochs", "seed", "images_per_second", "wall_seconds", "git_commit", "versions", "overrides"),
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
    assert sorted(path.name for path in (first_run / "checkpoints").iterdir()) == [
        "001-00000003.ckpt",
        "002-00000006.ckpt",
        "last.ckpt",
    ]


def test_one_seed_gives_one_summary_and_another_seed_another(first_run, tmp_path):
    words = [*QUICK, "trainer.max_epochs=2", "trainer.limit_train_batches=3", "trainer.limit_val_batches=3"]
    first = json.loads((first_run / "summary.json").read_text())
    again, other = run(tmp_path / "again", *words), run(tmp_path / "other", *words, "seed=1")
    assert {k: v for k, v in again.items() if k not in TIMES} == {k: v for k, v in first.items() if k not in TIMES}
    assert other["val_loss"] != first["val_loss"]


def test_a_run_goes_on_from_a_checkpoint(first_run, tmp_path, caplog):
    last = first_run / "checkpoints" / "last.ckpt"
    summary = run(tmp_path / "on", *QUICK, "trainer.limit_train_batches=3", "trainer.max_epochs=8", f"ckpt_path={last}")
    rows = list(csv.DictReader((tmp_path / "on" / "metrics.csv").open()))
    assert summary["epochs"] == 8
    assert [row["epoch"] for row in rows if row["train_loss"]] == [str(epoch) for epoch in range(8)]  # the whole curve
    rates = [float(row["lr-AdamW/encoded"]) for row in rows if row.get("lr-AdamW/encoded")]
    assert max(rates) > 1e-4  # the schedule follows the new number of epochs, it has not ended with the old one

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "001-00000003.ckpt").write_bytes((first_run / "checkpoints" / "001-00000003.ckpt").read_bytes())
    (broken / "last.ckpt").write_bytes(last.read_bytes()[:5000])
    run(tmp_path / "fallback", *QUICK, "trainer.max_epochs=2", f"ckpt_path={broken / 'last.ckpt'}")
    assert "last.ckpt is damaged; trying the one before it" in caplog.text


def test_a_checkpoint_with_all_its_epochs_behind_it_still_gets_its_summary(first_run, tmp_path):
    words = [*QUICK, "trainer.max_epochs=2", "trainer.limit_val_batches=3"]
    summary = run(tmp_path, *words, f"ckpt_path={first_run / 'checkpoints' / 'last.ckpt'}")
    assert summary["val_loss"] == json.loads((first_run / "summary.json").read_text())["val_loss"]


def test_a_run_folder_holds_one_run(first_run, tmp_path, caplog):
    """A complete run stays as it is; another one does not go into its folder, nor does one that is to start anew."""
    words = [*QUICK, "trainer.max_epochs=2", "trainer.limit_train_batches=3", "trainer.limit_val_batches=3"]
    before = {path: path.stat().st_mtime_ns for path in first_run.rglob("*")}
    with caplog.at_level("INFO"):
        run(first_run, *words)
    assert "summary.json: this run is complete" in caplog.text
    with pytest.raises(
        SettingError, match=r"holds a run already; ckpt_path=last goes on with it, or set hydra.run.dir"
    ):
        run(first_run, *words, "ckpt_path=null")
    with pytest.raises(
        SettingError, match=r"other settings: seed was 0, is 1; optimizer\.lr was 0\.002, is 1\.0; make them"
    ):
        run(first_run, *words, "seed=1", "optimizer.lr=1.0")
    with pytest.raises(SettingError, match=r"linear\.rank was 16, is 24"):
        run(first_run, *words, "linear.rank=24")
    changes = r"precision was 32-true, is bf16-mixed; trainer\.gradient_clip_val was None, is 1\.0; callbacks\.ema was"
    with pytest.raises(SettingError, match=changes):
        run(
            first_run,
            *words,
            "trainer.precision=bf16-mixed",
            "trainer.gradient_clip_val=1.0",
            "callbacks=[default,ema]",
        )
    assert {path: path.stat().st_mtime_ns for path in first_run.rglob("*")} == before


def test_more_epochs_go_on_in_the_same_folder(first_run, tmp_path, caplog):
    shutil.copytree(first_run, tmp_path / "run", symlinks=True)
    newest = tmp_path / "run" / "checkpoints" / "002-00000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:5000])
    words = [*QUICK, "trainer.max_epochs=3", "trainer.limit_train_batches=3", "trainer.limit_val_batches=3"]
    assert run(tmp_path / "run", *words)["epochs"] == 3
    assert f"checkpoint {newest} is damaged; trying the one before it" in caplog.text
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [row["epoch"] for row in rows if row["train_loss"]] == ["0", "1", "2"]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "002-00000006.ckpt",
        "003-00000009.ckpt",
        "last.ckpt",
    ]


def test_the_middle_of_an_epoch_divided_otherwise_is_refused_before_anything_is_written(tmp_path):
    words = [
        *QUICK,
        "trainer.limit_train_batches=4",
        "callbacks.checkpoint.every_steps=3",
        "callbacks.checkpoint.keep=9",
    ]
    run(tmp_path / "whole", *words)
    middle = tmp_path / "whole" / "checkpoints" / "000-00000003.ckpt"
    with pytest.raises(
        SettingError, match=r"middle of epoch 0, .*: the batch of a device was 8, is 4; make them agree"
    ):
        run(tmp_path / "other", *words, "data.device_batch_size=4", f"ckpt_path={middle}")
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_of_other_classes_is_refused_before_anything_is_written(first_run, tmp_path, image_root):
    words = ["data=image_folder", f"data.root={image_root}", "data.image_size=32", "data.num_workers=0"]
    with pytest.raises(
        SettingError, match=r"does not fit: .*head\.spec|does not fit: .*head: the checkpoint has in=96 out=10"
    ):
        run(tmp_path / "new", *QUICK, *words, f"ckpt_path={first_run / 'checkpoints' / 'last.ckpt'}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["linear.tile=2", "linear.rank=4"], "linear.tile=4 in the checkpoint, 2 here; linear.rank=16 in the"),
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


def test_a_whole_epoch_goes_on_with_another_source_and_half_of_one_does_not(tmp_path, image_root):
    source = ["data=image_folder", f"data.root={image_root}", "data.image_size=32", "data.num_workers=0"]
    words = [*QUICK, "data.batch_size=2", "trainer.limit_train_batches=2", "callbacks.checkpoint.every_steps=1"]
    run(tmp_path / "folder", *words, *source)
    files = {path.name[:3]: path for path in (tmp_path / "folder" / "checkpoints").glob("0*.ckpt")}
    root = tmp_path / "shards"
    assert program("scripts/write_shards.py", str(image_root), str(root)).returncode == 0
    source[:2] = ["data=imagenet_wds", f"data.root={root}"]
    words.append("trainer.max_epochs=2")
    with pytest.raises(SettingError, match=r"middle of epoch 0, .*: the source was ImageFolder, is Shards;"):
        run(tmp_path / "half", *words, *source, f"ckpt_path={files['000']}")
    assert run(tmp_path / "whole", *words, *source, f"ckpt_path={files['001']}")["epochs"] == 2


def test_a_run_leaves_nothing_behind_in_its_process(tmp_path):
    """Signal handlers above all: they would keep every trainer of a sweep, with its model."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    run(tmp_path / "done", *QUICK)
    with pytest.raises(SettingError):
        run(tmp_path / "stopped", *QUICK, "data.batch_size=16", "callbacks.checkpoint.dirpath=/dev/null/x")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)] == handlers
    gc.collect()
    assert not [thing for thing in gc.get_objects() if type(thing) is pl.Trainer]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, value):
    forward, heads = STLLinear.forward, []

    def poison_the_head_from_the_third_batch_on(layer, x, residual=None):
        if layer.out_features == 10 and layer.training:
            heads.append(layer)
        return forward(layer, x, residual) * (value if layer.out_features == 10 and len(heads) > 2 else 1)

    monkeypatch.setattr(STLLinear, "forward", poison_the_head_from_the_third_batch_on)
    words = [*QUICK, "trainer.max_epochs=3", "trainer.limit_train_batches=1"]
    with pytest.raises(SettingError) as caught:
        run(tmp_path, *words)
    message = str(caught.value)
    assert "at step 2 of epoch 2, first in layer head;" in message
    assert "checkpoints/002-00000002.ckpt; " in message
    assert "lower optimizer.lr" in message
    assert "\n" not in message
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in kept["state_dict"].values() if value.is_floating_point())
    assert not (tmp_path / "summary.json").exists()
    diverged = json.loads((tmp_path / "diverged.json").read_text())
    assert (diverged["step"], diverged["epoch"], diverged["seed"]) == (2, 2, 0)


def test_weights_that_are_not_finite_are_never_written(tmp_path, monkeypatch):
    """The loss of the last batch of an epoch may be sound and its gradient not."""
    step = torch.optim.AdamW.step

    def overflow_in_the_second_step(optimizer, closure=None):
        loss = step(optimizer, closure)
        parameter = optimizer.param_groups[0]["params"][0]
        if optimizer.state[parameter]["step"] == 2:
            parameter.data[0] = float("inf")
        return loss

    monkeypatch.setattr(torch.optim.AdamW, "step", overflow_in_the_second_step)
    with pytest.raises(
        SettingError, match=r"holds NaN or infinite values at step 2 of epoch 1; last good checkpoint: "
    ):
        run(tmp_path, *QUICK, "trainer.max_epochs=2", "linear=dense")
    kept = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["epoch"] == 0
    assert all(value.isfinite().all() for value in kept["state_dict"].values() if value.is_floating_point())


def test_callbacks_are_switched_off_by_null(tmp_path, capfd):
    run(tmp_path, *QUICK, "callbacks.checkpoint=null")  # QUICK switches the progress bar off
    assert not (tmp_path / "checkpoints").exists()
    assert "Epoch 0" not in capfd.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["linear.basis=hadamard", "linear.rank=17"],
            "error: basis='hadamard' has no tile=4 rank=17; it has tile=2: rank 4;",
        ),
        (["linear.basis=walsh"], f"error: basis='walsh' is unknown; choose one of {', '.join(list_bases())}"),
        (["model.name=t2t_vit_8"], "error: model.name='t2t_vit_8' is unknown; close to it: t2t_vit_"),
        (["data=image_folder", "data.root=nowhere"], "error: data.root='"),
        (["ckpt_path=nowhere.ckpt"], "error: checkpoint 'nowhere.ckpt' does not exist"),
        (
            ["data.batch_size=8", "data.device_batch_size=3"],
            "error: data.batch_size=8 does not split over 1 device with",
        ),
        (["callbacks.checkpoint.keep=0"], "error: callbacks.checkpoint.keep=0 must be 1 or more"),
        (["optimizer.lr=nan"], "error: optimizer.lr=nan must be a positive number"),
        (["seed=-1"], "error: seed=-1 must be a whole number from 0"),
        (["seed=one"], "error: seed=one must be a whole number from 0"),
        (["trainer.max_epochs=0"], "error: trainer.max_epochs=0 must be a whole number, 1 or more"),
        (["trainer.max_epochs=null"], "error: trainer.max_epochs=None must be a whole number, 1 or more"),
        (["num_threads=many"], "error: num_threads=many must be a whole number, 1 or more"),
        (["scheduler.warmup_epochs=long"], "error: scheduler.warmup_epochs=long must be a number that is not negative"),
    ],
)
def test_bad_settings_get_one_line_and_leave_nothing_behind(words, message, tmp_path):
    with pytest.raises(SystemExit) as caught:
        train.one_line_errors(lambda: run(tmp_path / "run", *QUICK, *words))
    line = str(caught.value.code)
    assert line.startswith(message), line
    assert "\n" not in line
    assert not (tmp_path / "run").exists()


def test_the_program_prints_that_line_and_fails(tmp_path):
    result = program("train.py", "seed=-1", f"hydra.run.dir={tmp_path / 'run'}")
    assert result.returncode == 1
    assert result.stderr == "error: seed=-1 must be a whole number from 0 to 2³² − 1\n"
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"train.log"}


@pytest.mark.parametrize("override", ["nonsense=1", "linear.ranks=16", "data.rot=x", "trainer.epochs=3"])
def test_an_unknown_key_is_hydras_error(override, tmp_path):
    with pytest.raises(ConfigCompositionException, match=f"Could not override '{override.split('=')[0]}'"):
        run(tmp_path, override)


def test_a_sweep_over_ranks_gives_a_summary_each(tmp_path):
    result = program("train.py", "-m", *QUICK, "linear.tile=4", "linear.rank=16,24", "logger=csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "outputs" / "digits").iterdir()  # which Hydra names before there is a run
    ranks = [json.loads((folder / str(i) / "summary.json").read_text())["linear"]["rank"] for i in (0, 1)]
    assert ranks == [16, 24]


def test_wandb_without_a_login_is_offline_and_says_so_once(tmp_path):
    """In a process and a home folder of its own, so that nothing knows of a login."""
    env = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    words = [*QUICK, "logger=[csv,wandb]", f"hydra.run.dir={tmp_path / 'run'}"]
    result = program("train.py", *words, env=env, without=("WANDB_MODE", "WANDB_API_KEY"))
    assert result.returncode == 0, result.stderr
    assert (result.stdout + result.stderr).count("nobody is logged in, the run is kept offline") == 1
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_two_epochs_of_the_default_run_are_right_four_times_as_often_as_chance(tmp_path):
    words = ["trainer.max_epochs=2", "num_threads=1", "callbacks.progress_bar=null", "trainer.accelerator=cpu"]
    assert run(tmp_path, *words)["top1"] >= 40.0
