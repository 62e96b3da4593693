"""Two STL layers with an activation between them as one module, and the pass that finds them in models.

With kernels the hidden activations never reach memory: the first layer's channels become the second's at once.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from stl import kernels
from stl.errors import SettingError
from stl.functional import check_arguments
from stl.linear import STLLinear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class STLMLP(nn.Module):
    """first → activation → second → dropout, (..., n, k) → (..., n, m); the numbers are those of one after the other.

    The layers keep the names that they are given, so that state dicts stay as they were. The attribute `backend`,
    "auto", says what computes it, as in `stl_linear`. Raises SettingError where the layers do not fit each other, or
    for an unknown activation.
    """

    backend = "auto"

    def __init__(
        self,
        first: STLLinear,
        activation: str,
        second: STLLinear,
        names: tuple[str, str] = ("fc1", "fc2"),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise SettingError(f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        if first.out_features != second.in_features or _cut(first) != _cut(second):
            raise SettingError(f"{second} cannot follow {first}: sizes, tiles and row axes must agree")
        self.activation, self.names, self.dropout = activation, names, dropout
        for name, layer in zip(names, (first, second), strict=True):
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        if kernels.use_triton(self.backend, x, first.tile, max(first.rank, second.rank)):
            y = self._by_kernels(x)
        else:
            y = second(ACTIVATIONS[self.activation](first(x)))
        return F.dropout(y, self.dropout, self.training)

    def _by_kernels(self, x: Tensor) -> Tensor:
        from stl.kernels.mlp import mlp  # needs triton

        first, second = self.layers
        rows = first.with_rows(x)
        ours, theirs = ((layer.weight, layer.encoder, layer.decoder, layer.bias) for layer in (first, second))
        check_arguments(rows, *ours, first.row_axis, first.out_features, self.backend)
        y = mlp(rows, ours, theirs, self.activation, first.row_axis, first.out_features, second.out_features)
        return y.view(*x.shape[:-1], second.out_features)

    @property
    def layers(self) -> tuple[STLLinear, STLLinear]:
        first, second = (getattr(self, name) for name in self.names)
        return first, second

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}"


def fuse_mlps(model: nn.Module) -> list[str]:
    """Put an `STLMLP` in the place of every module of the model that computes first → activation → second, in place.

    What a module computes is read off its traced graph, whatever its class: GELU (exact or tanh), ReLU or SiLU between
    two STL layers, dropout before the output only. Returns the names of what was replaced; state dicts stay as they
    were.
    """
    replaced = []
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        if name and not isinstance(module, STLMLP | STLLinear) and (fused := _fused(module)) is not None:
            setattr(parent, name.rpartition(".")[2], fused.train(module.training))
            replaced.append(name)
    return replaced


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, STLLinear) or super().is_leaf_module(module, qualified_name)


def _fused(module: nn.Module) -> STLMLP | None:
    """An MLP that computes what this module computes; None where it computes something else."""
    if sum(isinstance(child, STLLinear) for child in module.modules()) != 2:
        return None
    try:
        graph = _Tracer().trace(module)
    except Exception:  # whatever a model's code may raise when it is traced; then it is not such a chain
        return None
    layers: list[tuple[str, STLLinear]] = []
    activations, dropouts = [], []
    for node in _chain(graph):
        step = module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
        if isinstance(step, STLLinear):
            layers.append((str(node.target), step))
        elif isinstance(step, nn.Dropout) and (len(layers) == 2 or not step.p):
            dropouts += [step.p] if step.p else []
        elif len(layers) == 1 and (activation := _activation_of(step, node.kwargs)):
            activations.append(activation)
        elif not isinstance(step, nn.Identity):
            return None
    if len(layers) != 2 or len(activations) != 1 or len(dropouts) > 1:
        return None
    (name, first), (name2, second) = layers
    if "." in name + name2 or first.out_features != second.in_features or _cut(first) != _cut(second):
        return None
    return STLMLP(first, activations[0], second, (name, name2), sum(dropouts))


def _chain(graph: fx.Graph) -> list[fx.Node]:
    """The nodes between the one input and the output, where each takes the one before it and nothing else does."""
    first, *steps, last = graph.nodes
    for before, node in pairwise([first, *steps, last]):
        if node.all_input_nodes != [before] or len(before.users) != 1:
            return []
    return steps if first.op == "placeholder" and last.args == (steps[-1],) else []


def _activation_of(step: Any, options: Mapping[str, Any]) -> str | None:
    """The name in ACTIVATIONS of a module or a function; None where it is not among them."""
    approximate = step.approximate if isinstance(step, nn.GELU) else options.get("approximate", "none")
    if isinstance(step, nn.GELU) or step is F.gelu:
        return "gelu" if approximate == "none" else "gelu_tanh"
    if isinstance(step, nn.ReLU) or step in (F.relu, torch.relu):
        return "relu"
    return "silu" if isinstance(step, nn.SiLU) or step is F.silu else None


def _cut(layer: STLLinear) -> tuple[int, str]:
    return layer.tile, layer.row_axis
