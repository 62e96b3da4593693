"""The STL layers of an MLP with the activation between them as one module, and the pass that finds them in models.

With kernels the hidden activations never reach memory: the channels of one layer become those of the next at once.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from stl import kernels
from stl.errors import SettingError
from stl.functional import check_arguments, check_residual
from stl.linear import STLLinear
from stl.norm_linear import fits, goes_with
from stl.normalisation import Norm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class STLMLP(nn.Module):
    """second(activation(first(x))), or gated second(activation(first(x))·up(x)), then dropout.

    Input (..., n, k), output (..., n, m). A residual of the output's shape is added to it, and a norm applied to the
    input; with kernels neither is a pass over memory of its own. The numbers are those of the layers one after the
    other. The layers keep the names that they are given, in the order first, up, second, so that state dicts stay as
    they were. The attribute `backend`, "auto", says what computes it, as in `stl_linear`. Raises SettingError where
    the layers do not fit each other, or for an unknown activation.
    """

    backend = "auto"

    def __init__(
        self,
        first: STLLinear,
        activation: str,
        second: STLLinear,
        names: Sequence[str] | None = None,
        dropout: float = 0.0,
        *,
        up: STLLinear | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise SettingError(f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        if not _fit(first, up, second):
            before = f"{first}" if up is None else f"{first} and {up}"
            raise SettingError(f"{second} cannot follow {before}: sizes, tiles and row axes must agree")
        layers = [layer for layer in (first, up, second) if layer is not None]
        self.activation, self.dropout = activation, dropout
        self.names = tuple(names or (("fc1", "fc2") if up is None else ("gate_proj", "up_proj", "down_proj")))
        if len(self.names) != len(layers):
            raise SettingError(f"names={self.names} must be {len(layers)}, one for each layer")
        for name, layer in zip(self.names, layers, strict=True):
            self.add_module(name, layer)

    def forward(self, x: Tensor, residual: Tensor | None = None, norm: Norm | None = None) -> Tensor:
        check_residual(residual, x, self.out_features)
        if self.dropout and self.training:
            y = F.dropout(self._compute(x, None, norm), self.dropout)
            return y if residual is None else y + residual
        return self._compute(x, residual, norm)

    def _compute(self, x: Tensor, residual: Tensor | None, norm: Norm | None) -> Tensor:
        """Without the dropout."""
        first, *up, second = self.layers
        by_kernels = self.uses_kernels(x)
        if norm is not None and not (by_kernels and fits(first) and goes_with(norm, x)):
            x, norm = norm.apply(x), None
        if by_kernels:
            return self._by_kernels(x, residual, norm)
        hidden = ACTIVATIONS[self.activation](first(x))
        return second(hidden * up[0](x) if up else hidden, residual)

    def uses_kernels(self, x: Tensor) -> bool:
        """As that of a layer."""
        if any(layer.stream is not None for layer in self.layers):
            return False
        return kernels.use_triton(self.backend, x, self.layers[0].tile, max(layer.rank for layer in self.layers))

    def _by_kernels(self, x: Tensor, residual: Tensor | None, norm: Norm | None) -> Tensor:
        from stl.kernels.mlp import mlp  # needs triton

        first, *up, second = self.layers
        rows = first.with_rows(x)
        between = rows[..., :1].expand(*rows.shape[:-1], first.out_features)  # of that shape, dtype and device
        for layer, given in [(layer, rows) for layer in (first, *up)] + [(second, between)]:
            check_arguments(given, *layer.tensors(), layer.row_axis, layer.out_features, self.backend)
        y = mlp(
            rows,
            first.tensors(),
            up[0].tensors() if up else None,
            second.tensors(),
            self.activation,
            first.row_axis,
            first.out_features,
            second.out_features,
            norm,
            second.with_rows_of(x, residual),
        )
        return y.view(*x.shape[:-1], second.out_features)

    @property
    def layers(self) -> list[STLLinear]:
        """first, up where the MLP is gated, second."""
        return [getattr(self, name) for name in self.names]

    @property
    def out_features(self) -> int:
        return self.layers[-1].out_features

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"


def fuse_mlps(model: nn.Module) -> list[str]:
    """Put an `STLMLP` in the place of every module of the model that computes one, in place.

    What a module computes is read off its traced graph, whatever its class: first → activation → second, or
    second(activation(first(x))·up(x)), of STL layers with GELU (exact or tanh), ReLU or SiLU, dropout before the output
    only. Returns the names of what was replaced; state dicts stay as they were.
    """
    replaced = []
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        if name and not isinstance(module, STLMLP | STLLinear) and (fused := _fused(module)) is not None:
            setattr(parent, name.rpartition(".")[2], fused.train(module.training))
            replaced.append(name)
    return replaced


def _fit(first: STLLinear, up: STLLinear | None, second: STLLinear) -> bool:
    """Whether all cut alike, the layers before the activation have the same sizes, and the second takes them."""

    def cut(layer: STLLinear) -> tuple[int, str]:
        return layer.tile, layer.row_axis

    def sizes(layer: STLLinear) -> tuple[int, int]:
        return layer.in_features, layer.out_features

    other = first if up is None else up
    alike = cut(first) == cut(other) == cut(second) and sizes(first) == sizes(other)
    return alike and first.out_features == second.in_features


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, STLLinear) or super().is_leaf_module(module, qualified_name)


def _fused(module: nn.Module) -> STLMLP | None:
    """An MLP that computes what this module computes; None where it computes something else."""
    if sum(isinstance(child, STLLinear) for child in module.modules()) not in (2, 3):
        return None
    try:
        graph = _Tracer().trace(module)
    except Exception:  # whatever a model's code may raise when it is traced; then it is none
        return None
    return _Reader(module, graph).read()


class _Reader:
    """Reads a traced graph from its output back to its one input."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.nodes = module, list(graph.nodes)

    def read(self) -> STLMLP | None:
        x, *steps, last = self.nodes
        once = all(len(node.users) == 1 for node in steps)
        if not (steps and once and x.op == "placeholder" and isinstance(last.args[0], fx.Node)):
            return None
        end, dropouts = self._behind_dropouts(last.args[0])
        inner = self._hidden(self._input(end)) if self._layer(end) else None
        if inner is None or len(dropouts) > 1:
            return None
        activation, *firsts = inner
        nodes = [*firsts, end]
        layers = [layer for node in nodes if (layer := self._layer(node)) is not None]
        names = [str(node.target) for node in nodes]
        if len(layers) < len(nodes) or "." in "".join(names) or any(node.all_input_nodes != [x] for node in firsts):
            return None
        first, *up, second = layers
        if not _fit(first, up[0] if up else None, second):
            return None
        return STLMLP(first, activation, second, names, sum(dropouts), up=up[0] if up else None)

    def _hidden(self, node: fx.Node) -> tuple[Any, ...] | None:
        """(activation, node of first), or for activation(first)·up (activation, node of first, node of up)."""
        factors = [node]
        if self._step(node) in (operator.mul, torch.mul) and len(node.all_input_nodes) == 2:
            factors = [self._input(node, which) for which in (0, 1)]
            factors.sort(key=lambda factor: self._layer(factor) is not None)  # the activation first
        activation = _activation_of(self._step(factors[0]), factors[0].kwargs)
        if activation is None or len(factors[0].all_input_nodes) != 1:
            return None
        return activation, self._input(factors[0]), *factors[1:]

    def _step(self, node: fx.Node) -> Any:
        """The module or function that is called there."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else node.target

    def _layer(self, node: fx.Node) -> STLLinear | None:
        step = self._step(node)
        return step if isinstance(step, STLLinear) else None

    def _input(self, node: fx.Node, which: int = 0) -> fx.Node:
        """What it is given, without what changes nothing."""
        before, dropouts = self._behind_dropouts(node.all_input_nodes[which])
        return node.all_input_nodes[which] if dropouts else before

    def _behind_dropouts(self, node: fx.Node) -> tuple[fx.Node, list[float]]:
        """What they and identities are given, and their probabilities."""
        dropouts = []
        while isinstance(step := self._step(node), nn.Dropout | nn.Identity):
            dropouts += [step.p] if isinstance(step, nn.Dropout) and step.p else []
            node = node.all_input_nodes[0]
        return node, dropouts


def _activation_of(step: Any, options: Mapping[str, Any]) -> str | None:
    """The name in ACTIVATIONS of a module or a function; None where it is not among them."""
    approximate = step.approximate if isinstance(step, nn.GELU) else options.get("approximate", "none")
    if isinstance(step, nn.GELU) or step is F.gelu:
        return "gelu" if approximate == "none" else "gelu_tanh"
    if isinstance(step, nn.ReLU) or step in (F.relu, torch.relu):
        return "relu"
    return "silu" if isinstance(step, nn.SiLU) or step is F.silu else None
