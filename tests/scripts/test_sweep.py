"""scripts/sweep.yaml: what a wandb agent starts is a configuration."""

import itertools

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from running import CONFIGS, ROOT


def test_every_combination_is_a_configuration():
    sweep = OmegaConf.to_container(OmegaConf.load(ROOT / "scripts/sweep.yaml"), resolve=False)
    assert (ROOT / sweep["program"]).exists()
    choices = [
        [f"{key}={value}" for value in choice.get("values", [choice.get("value")])]
        for key, choice in sweep["parameters"].items()
    ]
    every = list(itertools.product(*choices))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        first, last = (compose("train", overrides=list(words)) for words in (every[0], every[-1]))
    assert (first.linear.rank, last.linear.rank) == (16, 32)
    assert set(first.logger) == {"csv", "wandb"}
    assert first.callbacks.progress_bar is None
