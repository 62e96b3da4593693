"""The analytic count of multiply-accumulates (MACs): 1 MAC = one multiply and one add = 2 FLOPs.

A dense layer (k → m) on n rows costs n·k·m MACs. An STL layer costs, with N = ⌈n/t⌉ tiles inside each sample, K = ⌈k/t⌉
and M = ⌈m/t⌉: core N·K·M·r, encode N·K·t²·r and decode N·M·t²·r. Its weight is stored encoded, for which nothing is
due. Linear layers of other kinds say what they cost themselves, see `CountedLinear`. What is not a linear layer
(attention and performer products, convolutions) is counted by PyTorch itself.
"""

import copy
import logging
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil, lcm, prod
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stl.errors import SettingError
from stl.linear import STLLinear
from stl.normalisation import Norm


@runtime_checkable
class CountedLinear(Protocol):
    """A linear layer of another kind, which says itself what it costs: any module with these attributes is one.

    It has a row of its `kind` in the report, beside the rows·in·out MACs of a dense layer. What it computes, modules
    inside it included, has no other row.
    """

    kind: str
    in_features: int
    out_features: int

    def macs(self, shape: Sequence[int]) -> int:
        """MACs of a forward pass on an input, its argument `x`, of this shape (..., in_features)."""


@dataclass(frozen=True)
class LayerCount:
    """One row of the report: a linear layer, or the other products of one module. MACs; `rows` over the whole input.

    But for STL layers core = macs and encode = decode = 0, and for a dense layer macs = dense_macs.
    """

    name: str
    kind: str  # "dense", "stl", the kind of a `CountedLinear`, or "product" for what is not a linear layer
    macs: int
    dense_macs: int
    core: int
    encode: int = 0
    decode: int = 0
    rows: int = 0
    in_features: int = 0
    out_features: int = 0
    tile: int = 0
    rank: int = 0
    params: int = 0


@dataclass(frozen=True)
class FlopReport:
    """The count of a whole model for one input of `input_shape`; everything in MACs."""

    input_shape: tuple[int, ...]
    layers: tuple[LayerCount, ...]
    params: int

    def _sum(self, what: str, linear_only: bool = True) -> int:
        return sum(getattr(row, what) for row in self.layers if row.kind != "product" or not linear_only)

    @property
    def linear(self) -> int:
        """MACs of the linear layers, encode and decode included."""
        return self._sum("macs")

    @property
    def total(self) -> int:
        """`linear` plus attention and performer products and convolutions."""
        return self._sum("macs", linear_only=False)

    @property
    def macs(self) -> dict[str, int]:
        """total, linear, and what the linear layers spend of it on core, encode and decode."""
        parts = {what: self._sum(what) for what in ("core", "encode", "decode")}
        return {"total": self.total, "linear": self.linear, **parts}

    @property
    def dense_macs(self) -> dict[str, int]:
        """What the same model costs with dense linear layers."""
        return {"total": self._sum("dense_macs", linear_only=False), "linear": self._sum("dense_macs")}

    @property
    def flop_factor(self) -> dict[str, float]:
        """dense MACs / MACs: `core` t³/r of the STL layers, padding, encode and decode aside; `linear`; `total`."""
        stl = [row for row in self.layers if row.kind == "stl"]
        dense = sum(row.dense_macs for row in stl)
        core = sum(row.dense_macs * row.rank / row.tile**3 for row in stl)
        return {
            "core": dense / core if core else 1.0,
            "linear": self.dense_macs["linear"] / self.linear if self.linear else 1.0,
            "total": self.dense_macs["total"] / self.total if self.total else 1.0,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and strings, ready for JSON."""
        return {
            "unit": "MACs",
            "input_shape": list(self.input_shape),
            "macs": self.macs,
            "dense_macs": self.dense_macs,
            "flop_factor": self.flop_factor,
            "params": self.params,
            "layers": [asdict(row) for row in self.layers],
        }

    def __str__(self) -> str:
        width, kind = (max((len(getattr(row, key)) for row in self.layers), default=5) for key in ("name", "kind"))
        lines = [f"{'layer':{width}}  {'kind':{kind}} {'rows':>6} {'in':>5} {'out':>5} {'MACs':>14} {'dense MACs':>14}"]
        for row in self.layers:
            sizes = (row.rows or "", row.in_features or "", row.out_features or "")
            lines.append(
                f"{row.name:{width}}  {row.kind:{kind}} {sizes[0]:>6} {sizes[1]:>5} {sizes[2]:>5} "
                f"{row.macs:>14,} {row.dense_macs:>14,}"
            )
        factor = ", ".join(f"{name} {value:.2f}" for name, value in self.flop_factor.items())
        lines.append(f"linear {self.linear:,} MACs, total {self.total:,} MACs; fewer than dense by: {factor}")
        return "\n".join(lines)


def dense_count(name: str, rows: int, k: int, m: int, params: int) -> LayerCount:
    """The row of a dense layer (k → m) on `rows` rows."""
    macs = rows * k * m
    return LayerCount(name, "dense", macs, macs, macs, rows=rows, in_features=k, out_features=m, params=params)


def stl_count(name: str, layer: STLLinear, shape: Sequence[int]) -> LayerCount:
    """The row of an STL layer for an input of this shape (..., k)."""
    k, m, t, r = layer.in_features, layer.out_features, layer.tile, layer.rank
    dim, needed = (0, 2) if layer.row_axis == "batch" else (-2, 3)
    axis = shape[dim] if len(shape) >= needed else 1  # with fewer dimensions, every row has a tile of its own
    rows = prod(shape[:-1])
    tiles = ceil(axis / t) * (rows // axis if axis else 0)
    blocks, out_blocks = ceil(k / t), ceil(m / t)
    core, encode, decode = tiles * blocks * out_blocks * r, tiles * blocks * t**2 * r, tiles * out_blocks * t**2 * r
    return LayerCount(
        name, "stl", core + encode + decode, rows * k * m, core, encode, decode, rows, k, m, t, r, _parameters(layer)
    )


def own_count(name: str, layer: CountedLinear, shape: Sequence[int], params: int) -> LayerCount:
    """The row of a layer that counts itself, for an input of this shape (..., k)."""
    rows, k, m, macs = prod(shape[:-1]), layer.in_features, layer.out_features, layer.macs(shape)
    return LayerCount(
        name, layer.kind, macs, rows * k * m, macs, rows=rows, in_features=k, out_features=m, params=params
    )


def count_flops(model: nn.Module, input_shape: Sequence[int], dtype: torch.dtype | None = None) -> FlopReport:
    """Count the MACs of one forward pass in evaluation mode, from shapes alone: nothing is computed.

    `input_shape` is the shape of the model's one input with its batch axis; for an image model (3, H, W) is taken as a
    batch of one. `dtype` is the input's, torch.int64 for token ids, and that of the parameters by default. Linear
    layers, also those of `convert`ed models, have a row each, and so has the rest of every module that multiplies
    matrices or convolves. Recurrent layers (LSTM, GRU) are not counted.

    Raises SettingError where that is no shape, or the model does not take an input of it.
    """
    if not isinstance(input_shape, Iterable):
        raise SettingError(f"input_shape={input_shape!r} must be all sizes of the input, such as (3, 224, 224)")
    shape = tuple(int(size) for size in input_shape)
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        raise SettingError(f"{type(model).__name__} holds lazy layers that have no sizes yet; run one batch first")
    reasons, cause = [], None
    for candidate in [shape, (1, *shape)] if len(shape) == 3 else [shape]:
        try:
            return _count(model, candidate, dtype)
        except Exception as error:
            reasons.append((str(error).strip().splitlines() or [type(error).__name__])[0])
            cause = error
    reason = "; as a batch of one: ".join(dict.fromkeys(reasons))
    raise SettingError(f"{type(model).__name__} does not take an input of shape {shape}: {reason}") from cause


def whole_samples(model: nn.Module) -> int:
    """The least number of samples that fill all tiles of the model: 1, but for tiles over the batch, of which padding
    would be counted else."""
    layers = (module for module in model.modules() if isinstance(module, STLLinear))
    return lcm(*(layer.tile for layer in layers if layer.row_axis == "batch"))


def _count(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype | None) -> FlopReport:
    params, log = sum(p.numel() for p in model.parameters()), logging.getLogger("torch._subclasses.fake_tensor")
    counter, fake = FlopCounterMode(display=False), FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(fake):  # takes no memory, and spares the model: some keep tensors of a forward pass
        model = copy.deepcopy(model).eval().requires_grad_(False)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    tally = _Tally(model, counter)
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # fused encoder layers are opaque to the counter
        stack.callback(setattr, log, "disabled", log.disabled)
        log.disabled = True  # what goes wrong is raised
        for module in model.modules():
            if isinstance(module, STLLinear):
                module.backend = "torch"  # each layer by itself, whatever kernels compute at once
                module.forward = partial(_output, module)  # type: ignore[method-assign] # nothing in it is left to count
            module.register_forward_pre_hook(tally.enter)
            module.register_forward_hook(tally.leave, with_kwargs=True)
        for mode in (torch.no_grad(), sdpa_kernel(SDPBackend.MATH), fake, counter):
            stack.enter_context(mode)
        model(torch.zeros(shape, device=like.device, dtype=dtype or like.dtype))
    return FlopReport(shape, tuple(tally.rows), params)


def _output(layer: STLLinear, x: Tensor, residual: Tensor | None = None, norm: Norm | None = None) -> Tensor:
    """What the layer would give, of that shape only."""
    layer.with_rows(x)  # raises where it would
    return x.new_empty(*x.shape[:-1], layer.out_features)


class _Tally:
    """Forward hooks that keep a row for every linear layer, and one for what else each module computes itself."""

    def __init__(self, model: nn.Module, counter: FlopCounterMode) -> None:
        self.rows: list[LayerCount] = []
        self._names = {module: name for name, module in model.named_modules()}
        self._counter = counter
        # For each module being run: FLOPs and rows when it began, FLOPs of its children.
        self._open: list[list[int]] = []

    def enter(self, module: nn.Module, args: tuple) -> None:
        self._open.append([self._counter.get_total_flops(), len(self.rows), 0])

    def leave(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        began, before, children = self._open.pop()
        spent = self._counter.get_total_flops() - began
        if self._open:
            self._open[-1][2] += spent
        name = self._names[module]
        if isinstance(module, STLLinear):
            self.rows.append(stl_count(name, module, _input(args, kwargs, 0, "x").shape))
            return
        if isinstance(module, CountedLinear):
            self.rows[before:] = [own_count(name, module, _input(args, kwargs, 0, "x").shape, _parameters(module))]
            return
        linear = _dense_rows(name, module, args, kwargs)
        products = (spent - children) // 2 - sum(row.macs for row in linear)
        self.rows += linear
        if products > 0:
            self.rows.append(LayerCount(name, "product", products, products, products))


def _dense_rows(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> list[LayerCount]:
    """The dense linear layers that this module, not one of its children, computes."""
    if isinstance(module, nn.Linear):
        rows = prod(_input(args, kwargs, 0, "input").shape[:-1])
        return [dense_count(name, rows, module.in_features, module.out_features, _parameters(module))]
    if isinstance(module, nn.MultiheadAttention):
        query, key, value = (_input(args, kwargs, i, role) for i, role in enumerate(("query", "key", "value")))
        width, out = module.embed_dim, module.out_proj
        counts = []
        for role, x in (("q_proj", query), ("k_proj", key), ("v_proj", value)):
            k = x.shape[-1]
            params = (k + (module.in_proj_bias is not None)) * width
            counts.append(dense_count(f"{name}.{role}", prod(x.shape[:-1]), k, width, params))
        out_rows = prod(query.shape[:-1])
        return [*counts, dense_count(f"{name}.out_proj", out_rows, width, width, _parameters(out))]
    return []


def _input(args: tuple, kwargs: dict[str, Any], position: int, keyword: str) -> Tensor:
    return args[position] if len(args) > position else kwargs[keyword]


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
