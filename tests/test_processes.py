"""Several processes: the same curve as one, the same folder, sweeps, torchrun and SLURM."""

import csv
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from running import QUICK, ROOT, program, run

from models.preemption import requeue_job
from models.processes import run_id

# Without dropout, which draws other numbers in another process, the curve depends on the images of each step alone.
WORDS = [
    *QUICK,
    "scheduler.warmup_epochs=0",
    "scheduler.cooldown_epochs=0",
    "data.batch_size=64",
    "model.t2t_drop_rate=0",
    "callbacks=[default,ema]",
    "callbacks.ema.decay=0.9",
    "callbacks.progress_bar=null",
    "logger=csv",
    "num_threads=1",
    "+trainer.check_val_every_n_epoch=10",
]


def curve(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").open()))


STEPS = 10  # an epoch each, so that the curve has the loss of every one


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run(folder, *WORDS, f"trainer.max_epochs={STEPS}")
    return folder


@pytest.mark.parametrize("trainer", ["default", "fsdp2"])
def test_two_processes_give_the_curve_of_one(trainer, alone, tmp_path):
    """The effective batch of 64 as 2 processes × 16 images × 2 accumulated batches."""
    together = tmp_path / "together"
    split = [
        "trainer.devices=2",
        "data.device_batch_size=16",
        "data.eval_batch_size=32",
        "trainer.limit_train_batches=2",
    ]
    words = [*WORDS, f"trainer.max_epochs={STEPS}", f"trainer={trainer}", *split, f"hydra.run.dir={together}"]
    result = program("train.py", *words)
    assert result.returncode == 0, result.stderr
    summary, expected = (json.loads((folder / "summary.json").read_text()) for folder in (together, alone))
    assert summary["devices"] == 2
    assert summary["top1"] == expected["top1"]
    losses, val_losses = (
        [float(row[key]) for row in curve(together) if row[key]] for key in ("train_loss", "val_loss")
    )
    assert losses == pytest.approx([float(row["train_loss"]) for row in curve(alone) if row["train_loss"]], abs=1e-4)
    assert val_losses == pytest.approx([float(row["val_loss"]) for row in curve(alone) if row["val_loss"]], abs=1e-4)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.005  # it has learned something
    ours, theirs = (torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (together, alone))
    for part in (lambda c: c["state_dict"], lambda c: c["callbacks"]["ModelEma"]["model"]):
        assert part(ours).keys() == part(theirs).keys()
        for name, value in part(theirs).items():
            torch.testing.assert_close(part(ours)[name], value, atol=1e-3, rtol=0)


SHORT = [*WORDS[:-1], "trainer.devices=2"]


def test_a_sweep_of_runs_on_two_processes(tmp_path):
    """Two jobs one after the other in one process, each with a child that must join its own job."""
    result = program("train.py", "-m", *SHORT, "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert result.returncode == 0, result.stderr
    summaries = [json.loads((tmp_path / str(job) / "summary.json").read_text()) for job in (0, 1)]
    assert [summary["seed"] for summary in summaries] == [0, 1]
    assert summaries[0]["val_loss"] != summaries[1]["val_loss"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "multirun.yaml"]


def test_torchrun_gives_all_processes_one_folder(tmp_path):
    words = ["--standalone", "--nproc-per-node=2", str(ROOT / "train.py"), *SHORT]
    result = program("-m", "torch.distributed.run", *words, cwd=tmp_path, fresh=True)
    assert result.returncode == 0, result.stderr
    folders = list((tmp_path / "outputs" / "digits").iterdir())
    assert len(folders) == 1
    assert json.loads((folders[0] / "summary.json").read_text())["devices"] == 2


def test_the_folders_name_is_the_jobs(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    first, second = run_id(), run_id()
    assert first != second
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run_id() == run_id()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--rdzv-id=NAME"):
        run_id()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    assert run_id() == "mine"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert run_id() == "slurm-77"
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert run_id() == "slurm-77-0"


# What a cluster's commands do, on this machine: a submitted script runs at once, as job 77.
COMMANDS = {
    "sbatch": """
        export SLURM_JOB_ID=77 SLURM_JOB_NAME=stl SLURM_NNODES=1 SLURM_JOB_NUM_NODES=1 SLURM_NODELIST=127.0.0.1
        export SLURM_NTASKS=$(grep -oP 'ntasks-per-node=\\K\\d+' "$1") SLURM_JOB_NODELIST=127.0.0.1
        export SLURM_NTASKS_PER_NODE=$SLURM_NTASKS
        echo "$1" > "$HERE/script"
        bash "$1" > "$HERE/job.log" 2>&1 < /dev/null &
        echo $! > "$HERE/pid"
        echo "Submitted batch job 77"
    """,
    "srun": """
        while [[ $1 == --* ]]; do [[ $1 == --output || $1 == --error ]] && shift; shift; done
        for task in $(seq 0 $((SLURM_NTASKS - 1))); do
            SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NODEID=0 SLURM_STEP_ID=0 "$@" > "$HERE/task$task.log" 2>&1 &
        done
        wait
    """,
    "sacct": """
        echo "JobID|State|NodeList"
        kill -0 $(cat "$HERE/pid") 2> /dev/null && echo "77|RUNNING|here" || echo "77|COMPLETED|here"
    """,
    "scontrol": """
        echo "$@" >> "$HERE/requeued"
    """,
}


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a machine that has SLURM's commands."""
    here = tmp_path / "cluster"
    here.mkdir()
    for name, text in COMMANDS.items():
        (here / name).write_text(f"#!/bin/bash\nHERE={here}\n{text}")
        (here / name).chmod(stat.S_IRWXU)
    return {"PATH": f"{here}:{os.environ['PATH']}"}


def test_slurm_through_submitit(cluster, tmp_path):
    words = [*SHORT, "launcher=submitit_slurm", "hydra.launcher.gpus_per_node=0"]
    result = program("train.py", *words, env=cluster, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "outputs" / "digits").iterdir()
    assert json.loads((folder / "0" / "summary.json").read_text())["devices"] == 2
    script = (tmp_path / "cluster" / "script").read_text()
    text = Path(script.strip()).read_text()
    for line in ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=16", "--signal=USR2@120", "--time=1440"):
        assert f"#SBATCH {line}" in text


@pytest.mark.parametrize(
    ("variables", "job"), [({}, "77"), ({"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}, "70_3")]
)
def test_a_slurm_job_is_queued_again(cluster, tmp_path, monkeypatch, caplog, variables, job):
    for name, value in {**cluster, "SLURM_JOB_ID": "77", **variables}.items():
        monkeypatch.setenv(name, value)
    requeue_job()
    assert (tmp_path / "cluster" / "requeued").read_text() == f"requeue {job}\n"
    assert f"job {job} is queued again" in caplog.text
    (tmp_path / "cluster" / "scontrol").write_text("#!/bin/bash\necho 'no such job' >&2; exit 1")
    requeue_job()
    assert f"job {job} could not be queued again: no such job" in caplog.text
