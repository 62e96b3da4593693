"""train.py and other programs of ours, in this process or in their own."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

import eval as evaluation
import train

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
QUICK = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1", "data.batch_size=8"]
QUICK += ["callbacks.progress_bar=null", "trainer.accelerator=cpu"]

TIMES = {"images_per_second", "tokens_per_second", "wall_seconds", "date"}  # what a clock says differs from run to run


def run(folder: Path, *overrides: str) -> dict:
    """train.py in this process; returns summary.json."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = str(folder)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    train.train(cfg, folder)
    return json.loads((folder / "summary.json").read_text())


def evaluate(checkpoint: Path, *overrides: str) -> dict:
    """eval.py in this process, its latency as quickly as can be; returns what it found."""
    words = ["batch_size=360", "latency.repeats=1", "latency.batch_sizes=[1]", "accelerator=cpu"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("eval", overrides=[f"ckpt={checkpoint}", *words, *overrides])
    return evaluation.evaluate(cfg)[0]


# Processes that begin with all imports done, which otherwise take longer than most of these runs.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["running", "eval", "data.digits", "data.shards", "models.augment", "models.t2t_vit"])


def program(
    *words: str, env: dict[str, str] | None = None, without: tuple[str, ...] = (), cwd: Path = ROOT, fresh: bool = False
) -> subprocess.CompletedProcess:
    """A program of ours in its own process, on one thread, with variables set or taken out of its environment.

    `fresh`: with an interpreter of its own, for what is decided when modules are imported.
    """
    own = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    own = {name: value for name, value in own.items() if name not in without}
    if fresh:
        return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, env=own)
    with TemporaryDirectory() as folder:
        process = SERVER.Process(target=_script, args=(words, own, cwd, Path(folder)))
        process.start()
        process.join()
        output, errors = ((Path(folder) / name).read_text() for name in STREAMS)
    return subprocess.CompletedProcess(words, process.exitcode, output, errors)


STREAMS = ("stdout", "stderr")


def _script(words: tuple[str, ...], env: dict[str, str], cwd: Path, folder: Path) -> None:
    for descriptor, name in enumerate(STREAMS, 1):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    as_where_a_program_starts()
    sys.argv = list(words)
    sys.path.insert(0, str((ROOT / words[0]).parent))
    runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def as_where_a_program_starts() -> None:
    """On one thread, and with the loader's workers forked."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
