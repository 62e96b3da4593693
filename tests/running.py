"""train.py and other programs of ours, in this process or in their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

import train

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs"
QUICK = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "trainer.limit_val_batches=1", "data.batch_size=8"]
QUICK += ["callbacks.progress_bar=null", "trainer.accelerator=cpu"]

TIMES = {"images_per_second", "wall_seconds", "date"}  # what a clock says differs from run to run


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


def program(
    *words: str, env: dict[str, str] | None = None, without: tuple[str, ...] = (), cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """A program of ours in its own process, on one thread, with variables set or taken out of its environment."""
    own = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    own = {name: value for name, value in own.items() if name not in without}
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, env=own)
