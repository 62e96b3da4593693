"""What the processes of one run must agree on: its folder, and, when Lightning starts them, its settings."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, read_write


def run_name(choices: Mapping[str, str | None]) -> str | None:
    """The folder of a run below outputs/: its experiment's name, or its data's where it has none.

    `choices` are those of the config groups. HydraConfig has them too, but not yet when a sweep's folder is named.
    """
    return choices["experiment"] or choices["data"]


def run_id() -> str:
    """The last part of the run folder's name: the same in all processes of a run, and when it is queued again.

    The SLURM job (and step, for there may be several in one job), torchrun's --rdzv-id, or else the time. Raises
    ValueError where torchrun spans hosts and was given no id.
    """
    if job := os.environ.get("SLURM_JOB_ID"):
        step = os.environ.get("SLURM_STEP_ID")
        return f"slurm-{job}" + (f"-{step}" if step else "")
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    if name and name != "none":
        return name
    began = datetime.now()
    if name:
        if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
            raise ValueError("torchrun over several hosts needs --rdzv-id=NAME, or hydra.run.dir=FOLDER after train.py")
        began = datetime.fromtimestamp(Path(f"/proc/{os.getppid()}").stat().st_ctime)  # torchrun's own start
    return began.strftime("%Y-%m-%d_%H-%M-%S-%f")


# Here, and not in train.py, so that jobs which were sent elsewhere as pickles have them too.
OmegaConf.register_new_resolver("run_name", run_name, replace=True)
OmegaConf.register_new_resolver("run_id", run_id, replace=True, use_cache=True)


@contextmanager
def one_job() -> Iterator[None]:
    """Inside, Lightning's child processes become processes of this job; afterwards the next job finds nothing of it.

    Lightning starts them by repeating the command line, which under --multirun is the whole sweep, with the run folder
    of a single run. And it leaves the process group and its variables behind, so that a second job of the same sweep
    would take itself for a child.
    """
    if not HydraConfig.initialized():
        yield
        return
    config: Any = HydraConfig.get()
    words, variables = sys.argv, dict(os.environ)
    with read_write(config):
        config.run.dir = config.runtime.output_dir
    sys.argv = [words[0], f"--config-name={config.job.config_name}", *config.overrides.task]
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.argv = words
        os.environ.clear()
        os.environ.update(variables)
