"""Trying out a module's code without a trace of it in the module."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

CONTAINERS = (dict, list, set)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """What changes in the module meanwhile, or in those in it, is put back: attributes, buffers, lists, dicts, sets.

    Raises TypeError where something changed; where a tensor would be written into, before it is.
    """
    before: dict[int, tuple[Any, Any]] = {}
    for child in module.modules():
        _keep(vars(child), before)
    try:
        with _ReadOnly():
            yield
    finally:
        changed = [(held, kept) for held, kept in before.values() if not _same(held, kept)]
        for held, kept in changed:
            held.clear()
            (held.extend if isinstance(held, list) else held.update)(kept)
    if changed:
        raise TypeError("a graph does not say what changes in a module")


def _keep(held: Any, before: dict[int, tuple[Any, Any]]) -> None:
    """A container and those in it, each beside a copy."""
    if isinstance(held, CONTAINERS) and id(held) not in before:
        before[id(held)] = held, copy.copy(held)
        for inner in held.values() if isinstance(held, dict) else held:
            _keep(inner, before)


def _same(held: Any, kept: Any) -> bool:
    """Whether they hold the same objects; equal ones may be tensors, which have no one answer."""
    if isinstance(held, set):
        return held == kept  # in whatever order
    one, other = ([*held, *(held.values() if isinstance(held, dict) else ())] for held in (held, kept))
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


class _ReadOnly(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.is_mutable:
            raise TypeError("a graph does not say what is written into a tensor")
        return function(*args, **(kwargs or {}))
