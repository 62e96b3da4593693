import wandb
from running import QUICK, run


def test_a_run_that_goes_on_goes_on_in_its_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for epochs in (1, 2):
        run(tmp_path, *QUICK, f"trainer.max_epochs={epochs}", "logger=wandb")
        ids.append(wandb.run.id)
        wandb.finish()  # else the next logger would take up the run that is under way
    assert ids[0] == ids[1]
