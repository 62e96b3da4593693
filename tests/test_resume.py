"""Runs that are killed, stopped or run out of disk, and what they come to when they are started again."""

import csv
import io
import json
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llamas import SIZES
from PIL import Image
from running import QUICK, SERVER, TIMES, as_where_a_program_starts, program, run
from sklearn.datasets import load_digits
from texts import stories

from train import one_line_errors

# Every source of randomness at once: augmented images, dropout, stochastic depth, mixup, erasing; two batches a step.
WORDS = [
    *QUICK,
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=6",
    "trainer.limit_val_batches=2",
    "data.batch_size=16",
    "data.device_batch_size=8",
    "model.drop_path_rate=0.2",
    "callbacks=[default,ema]",
    "callbacks.ema.decay=0.9",
    "callbacks.checkpoint.every_steps=2",
    "callbacks.progress_bar=null",
    "+augment._target_=models.augment.BatchAugment",
    "+augment.mixup=0.8",
    "+augment.cutmix=1.0",
    "+augment.switch=0.5",
    "+augment.label_smoothing=0.1",
    "+augment.erasing=0.25",
    "logger=csv",
    "model.name=t2t_vit_tiny",
]


def job(folder: Path, words: list[str], fatal_write: int | None, most_bytes: int | None) -> None:
    """A run in a process of its own, which the n-th checkpoint kills when half of the file is written, or whose files
    cannot grow above a size."""
    as_where_a_program_starts()
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    if fatal_write is not None:
        save, calls = torch.save, []

        def save_half(checkpoint, file):
            calls.append(1)
            whole = io.BytesIO()
            save(checkpoint, whole)
            if len(calls) == fatal_write:
                file.write(whole.getvalue()[: whole.tell() // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            file.write(whole.getvalue())

        torch.save = save_half
    try:
        one_line_errors(lambda: run(folder, *words))
    except SystemExit as end:
        (folder / "end").write_text(str(end))
        raise


def start(folder: Path, words: list[str], fatal_write: int | None = None, most_bytes: int | None = None) -> Any:
    process = SERVER.Process(target=job, args=(folder, words, fatal_write, most_bytes))
    process.start()
    return process


def outcome(folder: Path) -> dict:
    """Everything that must not depend on interruptions."""
    summary = json.loads((folder / "summary.json").read_text())
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())  # two, and the link
    return {
        "summary": {key: value for key, value in summary.items() if key not in TIMES},
        "curve": list(csv.DictReader((folder / "metrics.csv").open())),
        "weights": last["state_dict"],
        "average": last["callbacks"].get("ModelEma", {}).get("model", {}),
        "files": [len(checkpoints), checkpoints[-2:]],  # the one before the last may be that of a signal
    }


def assert_same(one: dict, other: dict) -> None:
    for key in ("summary", "curve", "files"):
        assert one[key] == other[key], key
    for key in ("weights", "average"):
        assert one[key].keys() == other[key].keys()
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items()), key


@pytest.fixture(scope="module", params=["digits", "shards", "text"])
def words(request, tmp_path_factory) -> list[str]:
    """The command line: for the digits, for digits in WebDataset shards, read by two workers, and for text."""
    if request.param == "digits":
        return WORDS
    if request.param == "text":
        return language(tmp_path_factory.mktemp("text"))
    folder, shards = tmp_path_factory.mktemp("digits"), tmp_path_factory.mktemp("shards")
    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images[:160], digits.target[:160], strict=True)):
        split = folder / ("train" if index < 144 else "val") / str(label)
        split.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).resize((40, 40)).save(split / f"{index}.png")
    for label in range(10):  # the classes of both splits are the same
        (folder / "val" / str(label)).mkdir(exist_ok=True)
        Image.new("L", (40, 40)).save(folder / "val" / str(label) / "blank.png")
    assert program("scripts/write_shards.py", str(folder), str(shards), "--per-shard=50").returncode == 0
    own = ["data=imagenet_wds", f"data.root={shards}", "data.image_size=32", "data.num_workers=2", "data.shuffle=20"]
    return [*WORDS, *own, "data.pin_memory=false"]


def language(folder: Path) -> list[str]:
    """A LLaMA with STL layers, its steps of two batches."""
    pytest.importorskip("transformers")
    (folder / "all.txt").write_text("|".join(stories(0, 400)))
    sizes = {"max_position_embeddings": 64, **SIZES}
    return [
        *QUICK,
        "experiment=llm/small_stl",
        "model.calibration=0",
        *(f"model.{key}={value}" for key, value in sizes.items()),
        f"data.root={folder}",
        "data.separator='|'",
        "data.val_share=0.1",
        "data.tokenizer=bytes",
        "data.length=32",
        f"data.packed={folder / 'packed'}",
        "data.device_batch_size=4",
        "trainer.precision=32-true",
        "trainer.max_epochs=3",
        "trainer.limit_train_batches=20",
        "trainer.limit_val_batches=2",
        "callbacks.checkpoint.every_steps=3",
        "logger=csv",
    ]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory) -> tuple[dict, float]:
    """What a run comes to that nothing disturbs, and its seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    server = SERVER.Process(target=time.time)  # the server imports once, before the clock runs
    server.start()
    server.join()
    began = time.monotonic()
    process = start(folder, words)
    process.join()
    assert process.exitcode == 0
    return outcome(folder), time.monotonic() - began


def test_interruptions_change_nothing(tmp_path, words, undisturbed):
    """SIGKILL at random moments, every third time in the middle of a checkpoint write, and SIGTERM; each time the same
    command goes on. A run that was through before its moment came is followed by another."""
    expected, seconds = undisturbed
    moments = random.Random(0)
    kinds = ["kill", "kill", "write"] * 3 + ["kill", "term", "term"] if words is WORDS else ["kill", "write", "term"]
    exits = {
        "kill": [-signal.SIGKILL],
        "write": [-signal.SIGKILL],
        "term": [128 + signal.SIGTERM, -signal.SIGTERM],  # the latter before training has begun
    }
    runs = done = 0
    while done < len(kinds):
        folder, kind = tmp_path / str(runs), kinds[done]
        process = start(folder, words, fatal_write=moments.randint(1, 2) if kind == "write" else None)
        if kind != "write":
            process.join(moments.uniform(0.4, 0.85) * seconds)
            process.kill() if kind == "kill" else process.terminate()
        process.join()
        if process.exitcode == 0:
            assert_same(outcome(folder), expected)
            runs += 1
        else:
            assert process.exitcode in exits[kind]
            done += 1
    process = start(tmp_path / str(runs), words)
    process.join()
    assert process.exitcode == 0
    assert_same(outcome(tmp_path / str(runs)), expected)


def test_a_full_disk_loses_nothing(tmp_path, words, undisturbed):
    if words is not WORDS:
        pytest.skip("how the images come does not matter here")
    expected, _ = undisturbed
    process = start(tmp_path, words)
    while not list(tmp_path.glob("checkpoints/000-*.ckpt")):
        time.sleep(0.01)
    process.kill()
    process.join()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("checkpoints/*.ckpt")}
    process = start(tmp_path, words, most_bytes=500_000)
    process.join()
    assert process.exitcode == 1
    line = (tmp_path / "end").read_text()
    assert line.startswith("error: checkpoint ")
    assert "could not be written (File too large); last good checkpoint: " in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before
    process = start(tmp_path, words)
    process.join()
    assert_same(outcome(tmp_path), expected)
