"""What autocast makes of the operators: the tensors that meet in products come in its dtype.

The functions that call them see to it themselves, since a weight is padded for its dtype; a program that was exported
outside of autocast has nothing but the operators.
"""

from typing import Any

import torch
from torch import Tensor

from stl.precision import autocast_dtype

LIBRARY = torch.library.Library("stl", "FRAGMENT")
KEYS = (torch._C.DispatchKey.AutocastCPU, torch._C.DispatchKey.AutocastCUDA)
BELOW = torch._C.DispatchKeySet(KEYS[0]) | torch._C.DispatchKeySet(KEYS[1])


def as_autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in the dtype that autocast asks for where x is; in x's own outside of autocast.

    Those that have it are passed on untouched: of a cast, torch.export would keep that its input had this dtype.
    """
    dtype = autocast_dtype(x) or x.dtype
    return tuple(tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors)


def register_autocast(operator: torch.library.CustomOpDef, first: int, last: int) -> None:
    """Under autocast the operator's arguments from `first` to `last` are cast. (PyTorch's function of this name casts
    all of them, to one dtype for good.)"""

    def call(*arguments: Any) -> Any:
        cast = as_autocast(arguments[first], *arguments[first : last + 1])
        with torch._C._ExcludeDispatchKeyGuard(BELOW):
            return operator(*arguments[:first], *cast, *arguments[last + 1 :])

    for key in KEYS:
        LIBRARY.impl(operator._opoverload, call, key.name)
