"""Parameter groups by role, the optimizer over them, and the learning-rate schedule."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import Optimizer

from models.rival import RivalLinear
from stl import SettingError, STLLinear

ROLES = ("dense", "encoded", "basis", "bias_norm")


def parameter_roles(model: nn.Module) -> dict[str, str]:
    """The role of every trainable parameter, by name.

    "encoded" are the weights of STL layers, "basis" their encoders and decoders, "bias_norm" what is 1-D, biases and
    what the model lists in `no_weight_decay()`, "dense" the rest, the factors of rivals among it. Rivals may name other
    roles in `parameter_roles`.
    """
    special: dict[str, str] = {}
    for prefix, module in model.named_modules():
        dot = f"{prefix}." if prefix else ""
        if isinstance(module, STLLinear):
            special |= {f"{dot}weight": "encoded", f"{dot}encoder": "basis", f"{dot}decoder": "basis"}
        elif isinstance(module, RivalLinear):
            special |= {f"{dot}{name}": role for name, role in module.parameter_roles.items()}
    undecayed: set[str] = getattr(model, "no_weight_decay", set)()

    def role(name: str, dimensions: int) -> str:
        if name in special:
            return special[name]
        return "bias_norm" if dimensions <= 1 or name.endswith("bias") or name in undecayed else "dense"

    return {name: role(name, p.ndim) for name, p in model.named_parameters() if p.requires_grad}


def build_optimizer(
    model: nn.Module, *, algorithm: Callable[..., Optimizer], lr: float, groups: Mapping[str, Mapping[str, float]]
) -> Optimizer:
    """`algorithm` over one group a role, each with learning rate lr·lr_mult and its own weight_decay.

    Raises SettingError where `groups` does not name exactly the four roles, or a number is out of range.
    """
    if not (_is_number(lr) and lr > 0):
        raise SettingError(f"optimizer.lr={lr} must be a positive number")
    if set(groups) != set(ROLES):
        raise SettingError(f"optimizer.groups has {sorted(groups)}; it needs exactly {', '.join(ROLES)}")
    roles = parameter_roles(model)
    parameters = dict(model.named_parameters())
    param_groups: list[dict[str, Any]] = []
    for role in ROLES:
        members = [parameters[name] for name, own in roles.items() if own == role]
        if members:
            settings = groups[role]
            if not all(_is_number(value) and value >= 0 for value in settings.values()):
                raise SettingError(f"optimizer.groups.{role}={dict(settings)} must hold numbers that are not negative")
            param_groups.append(
                {
                    "params": members,
                    "name": role,
                    "lr": lr * settings["lr_mult"],
                    "weight_decay": settings["weight_decay"],
                }
            )
    return algorithm(param_groups, lr=lr)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def cosine_schedule(
    optimizer: Optimizer,
    *,
    epochs: int,
    steps_per_epoch: int,
    warmup_epochs: float,
    cooldown_epochs: float,
    warmup_lr: float,
    min_lr: float,
) -> CosineLRScheduler:
    """Linear warm-up from `warmup_lr`, cosine to `min_lr`, then `cooldown_epochs` of the `epochs` at `min_lr`.

    Stepped once a batch with `step_update`; learning rates are absolute and hold for every group.
    Raises SettingError for what is no number, or a negative one.
    """
    settings = {"warmup_epochs": warmup_epochs, "cooldown_epochs": cooldown_epochs}
    for name, value in {**settings, "warmup_lr": warmup_lr, "min_lr": min_lr}.items():
        if not (_is_number(value) and value >= 0):
            raise SettingError(f"scheduler.{name}={value} must be a number that is not negative")
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, round((epochs - cooldown_epochs) * steps_per_epoch)),
        lr_min=min_lr,
        warmup_t=round(warmup_epochs * steps_per_epoch),
        warmup_lr_init=warmup_lr,
        t_in_epochs=False,
    )
