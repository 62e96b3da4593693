"""The STL layers of an MLP with the activation between them as one module.

With kernels the hidden activations never reach memory: the channels of one layer become those of the next at once.
Narrow layers have no channels (`kernels/expanded.py`): those of an MLP are computed one after the other.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from stl import kernels
from stl.errors import SettingError
from stl.functional import check_arguments, check_residual
from stl.kernels.expanded import is_expanded
from stl.linear import STLLinear, check_is_stl
from stl.normalisation import Norm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def _of_layers(name: str) -> property:
    """An attribute of all layers of an MLP: set for each, and "mixed" where they differ."""

    def get(mlp: "STLMLP") -> str:
        first, *others = [getattr(layer, name) for layer in mlp.layers]
        return first if all(other == first for other in others) else "mixed"

    def set_for_each(mlp: "STLMLP", value: str) -> None:
        for layer in mlp.layers:
            setattr(layer, name, value)

    return property(get, set_for_each)


class STLMLP(nn.Module):
    """second(activation(first(x))), or gated second(activation(first(x))·up(x)), then dropout.

    A gated one may have its first two layers in one, whose first half of features is activated and multiplied with the
    second: `halves=True`. Their tiles are then encoded once, by one encoder; a half must be whole tiles.

    Input (..., n, k), output (..., n, m). A residual of the output's shape is added to it, and a norm applied to the
    input; by kernels neither in a pass over memory of its own, unless the layers are narrow. The numbers are those of
    the layers one after the other. The layers keep the names that they are given, in the order first, up, second, so
    that state dicts stay as they were. The attributes `backend` and `fill` are theirs: all get what is set, and where
    they differ it is "mixed".
    Each computes alone where backends differ, and where copies fill a tile. Raises SettingError where the layers are no
    STLLinear or do not fit each other, or for an unknown activation.
    """

    backend = _of_layers("backend")
    fill = _of_layers("fill")

    def __init__(
        self,
        first: STLLinear,
        activation: str,
        second: STLLinear,
        names: Sequence[str] | None = None,
        dropout: float = 0.0,
        *,
        up: STLLinear | None = None,
        halves: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise SettingError(f"activation={activation!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
        layers = [first, *([] if up is None else [up]), second]
        check_is_stl(*layers)
        if halves and up is not None:
            raise SettingError("halves=True takes up from the first layer; give one of the two")
        if halves and second.in_features % second.tile:
            raise SettingError(
                f"halves of {second.in_features} features are no whole tiles of {second.tile}; give first and up apart"
            )
        if not fit(first, up, second, halves):
            before = f"{'the halves of ' * halves}{first}" if up is None else f"{first} and {up}"
            raise SettingError(f"{second} cannot follow {before}: sizes, tiles and row axes must agree")
        self.activation, self.dropout, self.halves = activation, dropout, halves
        usual = ("fc1", "fc2") if up is None else ("gate_proj", "up_proj", "down_proj")
        self.names = tuple(names or (("gate_up_proj", "down_proj") if halves else usual))
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
        streams = [layer.stream_of(x) for layer in self.layers]
        together = [stream for stream in streams if stream is not None]
        if len(together) < len(streams):
            return self._at_once(x, residual, norm)
        # The tiles of all layers are the same rows, which are remembered once, as the first layer takes them.
        for layer in self.layers:
            layer.stream = None
        try:
            y = together[0](self.layers[0].with_rows(x), residual, norm, self._at_once)
        finally:
            for layer, stream in zip(self.layers, together, strict=True):
                layer.stream = stream
        for stream in together[1:]:
            stream.count(x.shape[-2])
        return y

    def _at_once(self, x: Tensor, residual: Tensor | None, norm: Norm | None) -> Tensor:
        first, *up, second = self.layers
        if self.backend == "triton":  # what the reference refuses as well is refused in its words
            check_arguments(first.with_rows(x), *first.tensors(), first.row_axis, first.out_features)
        by_kernels = self.uses_kernels(x)
        if norm is not None and not self.normalises(norm, x):
            x, norm = norm.apply(x), None
        if by_kernels:
            return self._by_kernels(x, residual, norm)
        gate, *factor = first(x).chunk(2, -1) if self.halves else [layer(x) for layer in (first, *up)]
        hidden = ACTIVATIONS[self.activation](gate)
        return second(hidden * factor[0] if factor else hidden, residual)

    def uses_kernels(self, x: Tensor) -> bool:
        """As that of a layer, but not while layers stream or fill tiles each by itself, or where they are narrow."""
        alone = (layer.stream is not None or layer.lacks_samples(x) for layer in self.layers)
        if self.backend == "mixed" or any(alone) or self.is_narrow(x):
            return False
        rank = max(layer.rank for layer in self.layers)
        return kernels.use_triton(self.backend, x, self.layers[0].tile, rank, self.layers[-1].out_features)

    def is_narrow(self, x: Tensor) -> bool:
        """Whether it is faster as its layers, each as one product, than by kernels for all of them."""
        *before, second = self.layers
        sizes = [(layer.in_features, layer.out_features) for layer in self.layers]
        hidden = sum(layer.out_features for layer in before) + second.in_features
        rank = min(layer.rank for layer in self.layers)
        return not second.has_lone_rows(x) and is_expanded(x, second.tile, rank, sizes, second.row_axis, hidden)

    def normalises(self, norm: Norm, x: Tensor) -> bool:
        """As that of a layer."""
        return self.uses_kernels(x) and self.layers[0].holds(norm, x)

    def _by_kernels(self, x: Tensor, residual: Tensor | None, norm: Norm | None) -> Tensor:
        from stl.kernels.mlp import mlp  # needs triton

        first, *up, second = self.layers
        rows = first.with_rows(x)
        between = rows[..., :1].expand(*rows.shape[:-1], second.in_features)  # of that shape, dtype and device
        tensors = [layer.tensors() for layer in self.layers]
        for layer, own in zip(self.layers, tensors, strict=True):
            check_arguments(between if layer is second else rows, *own, layer.row_axis, layer.out_features)
        y = mlp(
            rows,
            tensors[0],
            tensors[1] if up else None,
            tensors[-1],
            self.activation,
            first.row_axis,
            second.in_features,
            second.out_features,
            norm,
            second.with_rows_of(x, residual),
        )
        return y.view(*x.shape[:-1], second.out_features)

    @property
    def layers(self) -> list[STLLinear]:
        """first, up where it is a layer of its own, second."""
        return [getattr(self, name) for name in self.names]

    @property
    def out_features(self) -> int:
        return self.layers[-1].out_features

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, dropout={self.dropout}, halves={self.halves}"


def fit(first: STLLinear, up: STLLinear | None, second: STLLinear, halves: bool = False) -> bool:
    """Whether all cut alike, the layers before the activation have the same sizes, and the second takes them, or half
    of the tiles of the first."""

    def cut(layer: STLLinear) -> tuple[int, str]:
        return layer.tile, layer.row_axis

    def sizes(layer: STLLinear) -> tuple[int, int]:
        return layer.in_features, layer.out_features

    other = first if up is None else up
    alike = cut(first) == cut(other) == cut(second) and sizes(first) == sizes(other)
    if halves and (up is not None or second.in_features % second.tile):
        return False
    return alike and first.out_features == (1 + halves) * second.in_features
