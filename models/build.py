"""Build any timm model, ours or timm's own, with a choice of linear layer."""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from torch import nn

import models
from stl import SettingError, STLLinear, convert


def build_model(
    name: str, *, num_classes: int, img_size: int, linear: Callable[..., nn.Module] = nn.Linear, **settings: Any
) -> nn.Module:
    """The model that timm knows as `name`, with `linear` in the place of its linear layers.

    Our models are built with `linear` from the start. timm's own are built dense; for STL they are then `convert`ed,
    from scratch, or from their trained weights with pretrained=True.
    `settings` go to the model. Raises SettingError for an unknown name or setting.
    """
    check_name(name)
    settings |= {"num_classes": num_classes}
    if timm.model_entrypoint(name).__module__.startswith(f"{models.__name__}."):
        return _create(name, img_size=img_size, linear=linear, **settings)
    try:
        model = _create(name, img_size=img_size, **settings)
    except SettingError:
        model = _create(name, **settings)  # convolutional models have no img_size and take any
    if isinstance(linear, partial) and linear.func is STLLinear:
        convert(model, from_dense=bool(settings.get("pretrained")), **linear.keywords)
    elif linear is not nn.Linear and getattr(linear, "func", None) is not nn.Linear:
        raise SettingError(f"model.name={name!r} is timm's own and takes linear=dense or linear=stl only")
    return model


def check_name(name: str) -> None:
    """Raises SettingError where timm knows no such model."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=4) or timm.list_models(module="t2t_vit")
        raise SettingError(f"model.name={name!r} is unknown; close to it: {', '.join(close)}")


def _create(name: str, **settings: Any) -> nn.Module:
    try:
        return timm.create_model(name, **settings)
    except TypeError as error:
        raise SettingError(f"model.name={name!r}: {error}; remove that setting from model") from error
