"""Triton's interpreter in a fraction of its time, and with an eye on memory.

At every launch, and at every call inside a kernel, it looks through Triton's whole language and puts its own functions
there, though once is enough; and it computes every sum and product of integers again, for a check of overflow that is
made in debugging alone, which takes a third of the time. And it reads and writes any address, where a GPU may stop, or
give other tensors' numbers: here a program fails that leaves the span of all tensors of its launch.
"""

from collections.abc import Iterator
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

_patch = interpreter._patch_lang
_arguments = GridExecutor._init_args_hst
_load, _store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
_bounds: list[tuple[int, int]] = []  # addresses of the first and the last number of each tensor of the launch


@cache
def _patch_once(function: FunctionType) -> interpreter._LangPatchScope:
    _patch(function)
    return interpreter._LangPatchScope()  # undoes nothing


def _note_arguments(self: GridExecutor, args: Any, kwargs: Any) -> tuple[Any, Any]:
    copied, copied_by_name = _arguments(self, args, kwargs)
    _bounds.clear()
    for argument in _flat([*copied, *copied_by_name.values()]):
        if argument.numel():
            last = sum((size - 1) * stride for size, stride in zip(argument.shape, argument.stride(), strict=True))
            _bounds.append((argument.data_ptr(), argument.data_ptr() + last * argument.element_size()))
    return copied, copied_by_name


def _flat(arguments: Any) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple | list):
            yield from _flat(argument)
        elif isinstance(argument, Tensor):
            yield argument


def _check(pointers: TensorHandle, mask: TensorHandle) -> None:
    places = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
    inside = np.zeros(places.shape, dtype=bool)
    for first, last in _bounds:
        inside |= (places >= first) & (places <= last)
    assert inside.all(), "a kernel leaves the tensors that it was given"


def _checked_load(self: InterpreterBuilder, pointers: TensorHandle, mask: TensorHandle, *others: Any) -> TensorHandle:
    _check(pointers, mask)
    return _load(self, pointers, mask, *others)


def _checked_store(
    self: InterpreterBuilder, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *others: Any
) -> None:
    _check(pointers, mask)
    _store(self, pointers, value, mask, *others)


def patch_once() -> None:
    interpreter._patch_lang = _patch_once
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    GridExecutor._init_args_hst = _note_arguments
    InterpreterBuilder.create_masked_load = _checked_load
    InterpreterBuilder.create_masked_store = _checked_store
