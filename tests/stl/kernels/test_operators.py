"""All operators at once: what compiled code may rely on."""

import pytest
import torch
from agreement import DEVICE, gaussian
from benchmarking import set_backend
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stl import STLMLP, STLLinear, STLNormLinear
from stl.kernels import linear, mlp, norm  # noqa: F401  they register the operators

OPERATORS = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("stl::")}
DTYPE, TOLERANCE = (torch.float32, 1e-6) if DEVICE == "cpu" else (torch.bfloat16, 1e-2)


class Calls(TorchDispatchMode):
    """The operators that are called, each with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if (name := function.name()) in OPERATORS:
            self.of.setdefault(name, []).append((function, args))
        return function(*args, **kwargs or {})


def other_strides(value):
    """The same numbers, the last axis outermost in memory, with numbers between them that are not to be read."""
    if not isinstance(value, Tensor):
        return value
    memory = torch.full((*value.shape[::-1], 2), torch.nan, dtype=value.dtype, device=value.device)[..., 0]
    return memory.permute(*reversed(range(value.ndim))).copy_(value)


def layer(k: int, m: int, **settings) -> STLLinear:
    return STLLinear(k, m, tile=4, rank=16, basis="random", **settings)


def called(module: nn.Module, *residual: Tensor) -> dict:
    """By module(x, *residual), with x of 9 features, and by its gradients."""
    set_backend(module.to(DEVICE, DTYPE), "triton")
    x = gaussian(2, 5, 9, seed=0).to(DTYPE).requires_grad_()
    with Calls() as calls:
        module(x, *residual).sum().backward()
    return calls.of


@pytest.fixture
def calls():
    residual = gaussian(2, 5, 14, seed=1).to(DTYPE)
    made = [
        called(layer(9, 14), residual),
        called(layer(9, 14, bias=False, row_axis="batch")),
        called(STLMLP(layer(9, 16), "gelu", layer(16, 14)), residual),
        called(STLMLP(layer(9, 16), "silu", layer(16, 14), up=layer(9, 16))),
        called(STLMLP(layer(9, 32, bias=False), "silu", layer(16, 14), halves=True)),
        called(STLNormLinear(nn.LayerNorm(9), layer(9, 14))),
    ]
    together: dict = {}
    for of in made:
        for name, each in of.items():
            together.setdefault(name, []).extend(each)
    return together


def test_operators_take_tensors_of_any_strides_and_give_those_that_were_announced(calls):
    assert set(calls) == OPERATORS
    for name, of in calls.items():
        for function, args in of:
            wanted = function(*args)
            got = function(*map(other_strides, args))
            announced = function(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
            every = [out if isinstance(out, tuple) else (out,) for out in (wanted, got, announced)]
            for one, other, fake in zip(*every, strict=True):
                assert (one - other).norm() <= TOLERANCE * one.norm(), name
                assert one.stride() == other.stride() == fake.stride(), name
            assert torch.Tag.flexible_layout in function.tags, name


def test_features_that_are_apart_in_memory_are_copied_once():
    """The operators, forward and backward, then read the copy; rows that are apart stay where they are."""
    module, x = layer(9, 14).to(DEVICE, DTYPE), gaussian(2, 9, 5, seed=0).to(DTYPE).mT
    set_backend(module, "triton")
    with Calls() as calls:
        module(x)
        module(x.contiguous()[:, ::2])
    copied, apart = (arguments[0] for _, arguments in calls.of["stl::encode_gemm"])
    assert torch.equal(copied, x)
    assert copied.is_contiguous()
    assert apart.stride() == (45, 18, 1)
