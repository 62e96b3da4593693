"""Triton's interpreter in a fraction of its time: at every launch, and at every call inside a kernel, it looks through
Triton's whole language and puts its own functions there, though once is enough."""

from functools import cache
from types import FunctionType

from triton.runtime import interpreter

_patch = interpreter._patch_lang


@cache
def _patch_once(function: FunctionType) -> interpreter._LangPatchScope:
    _patch(function)
    return interpreter._LangPatchScope()  # undoes nothing


def patch_once() -> None:
    interpreter._patch_lang = _patch_once
