"""What a configuration describes: its data, its model, its task; and the same with the weights of a checkpoint."""

from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, cast

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from models.checkpoint import KEPT, check_there, check_vocabulary, load_weights
from models.ema import averaged_weights
from models.task import Task
from stl import SettingError


def build_model(cfg: DictConfig, data: Any, *, fresh: bool = True) -> nn.Module:
    """The model, for the data module that was made from the same configuration; `fresh` as in `build`."""
    start = {"restored": not fresh} if "weights" in cfg.model else {}
    return instantiate(cfg.model, linear=_linear(cfg), **data.for_model, **start)


def _linear(cfg: DictConfig) -> Any:
    """What makes a linear layer. Raises SettingError for settings that this kind has not."""
    made = instantiate(cfg.linear)
    if not isinstance(made, partial):
        return made
    known = signature(made.func).parameters
    unknown = [name for name in made.keywords if name not in known]
    if unknown and not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in known.values()):
        what, without = (", ".join(f"{sign}linear.{name}" for name in unknown) for sign in ("", "~"))
        raise SettingError(f"{what}: no setting of {made.func.__name__}; remove it with {without}")
    return made


def build(cfg: DictConfig, *, fresh: bool = True) -> tuple[Task, Any]:
    """The task and the data module.

    `fresh`: the model begins as the configuration says; otherwise weights are to be put into it, and it reads none.
    Raises SettingError where a setting is wrong, or task and data do not go together.
    """
    kind = cast(type[Task], get_class(cfg.get("task", "models.classification.ClassificationTask")))
    # What can be wrong before the data are made, which may take long:
    if fresh:
        for setting in ("model.weights", "distillation.teacher"):
            check_there(setting, OmegaConf.select(cfg, setting))
    _linear(cfg)
    data = instantiate(cfg.data, seed=cfg.seed)
    if data.unit != kind.takes:
        raise SettingError(
            f"task={kind.__module__}.{kind.__name__} learns from {kind.takes}, and data={data.name} gives {data.unit}; "
            "set a task, data and a model that go together, as those of configs/experiment/ do"
        )
    model = build_model(cfg, data, fresh=fresh)
    optimizer, scheduler = instantiate(cfg.optimizer), instantiate(cfg.scheduler)
    scheduler(optimizer(model), epochs=1, steps_per_epoch=1)  # wrong settings show now, not in the middle of a run
    task = kind.configured(
        cfg,
        model,
        data,
        optimizer=optimizer,
        scheduler=scheduler,
        compile_mode=cfg.compile,
        config=cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)),
    )
    return task, data


def restore(
    checkpoint: dict[str, Any], path: Path, config: DictConfig, averaged: bool = True
) -> tuple[Task, Any, bool]:
    """The task of a checkpoint, not compiled, with its weights; its data; whether the weights are the averaged ones.

    `config` is the checkpoint's, perhaps with other data; `averaged` asks for the average where the run kept one. The
    tokenizer "bpe" is the one that the run learned, as far as its folder keeps it, whatever the text is now.
    """
    config.compile = None  # latencies are those of the model as it stands
    if config.get("distillation"):
        config.distillation.teacher = None  # of training only
    kept = path.resolve().parent.parent / KEPT
    if config.data.get("tokenizer") == "bpe" and kept.is_dir():
        config.data.tokenizer = str(kept)
    task, data = build(config, fresh=False)
    check_vocabulary(checkpoint, path, data.vocabulary)
    load_weights(task, checkpoint, path, task.config)
    average = averaged_weights(checkpoint) if averaged else None
    if average is not None:
        task.model.load_state_dict(average)
    return task, data, average is not None
