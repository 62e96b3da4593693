"""LLaMA with one layer where several read the same x, as Phi-3 has it: queries, keys and values; gate and up.

It computes the same numbers. An STL layer in the place of several encodes their tiles once, by one encoder, and what it
multiplies is one batched GEMM.
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from stl import Norm, SettingError
from stl.tracing import is_changed


class Part(nn.Module):
    """Features of what the merged layer gave, in the place of the layer that gave them."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, merged: Tensor) -> Tensor:
        return merged[..., self.start : self.stop]

    def extra_repr(self) -> str:
        return f"features {self.start} to {self.stop}"


class MergedAttention(LlamaAttention):
    """Of its input transformers' own forward asks nothing but the shape, and hands it to the three parts.

    A norm, for an STL layer, is applied to the input.
    """

    qkv_proj: nn.Module

    def forward(self, hidden_states: Tensor, *arguments: Any, norm: Norm | None = None, **named: Any) -> Any:
        merged = self.qkv_proj(hidden_states) if norm is None else self.qkv_proj(hidden_states, None, norm)
        return super().forward(merged, *arguments, **named)


class MergedMLP(LlamaMLP):
    gate_up_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.gate_up_proj(x))


MERGED: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {  # the merged layer, and whose places its parts take
    MergedAttention: ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    MergedMLP: ("gate_up_proj", ("gate_proj", "up_proj")),
}


def merge_projections(model: nn.Module) -> None:
    """In every block of a LLaMA of dense layers, in place: `qkv_proj` and `gate_up_proj` with their weights.

    Raises SettingError, and leaves the model as it was, where a layer is not dense, has hooks, or is frozen while
    another of those that become one is not.
    """
    places = _places(model)
    for module, kind in places:
        _check({name: module.get_submodule(name) for name in MERGED[kind][1]})
    for module, kind in places:
        _merge(module, kind)


def split_projections(model: nn.Module) -> None:
    """`merge_projections` undone, in place. Raises SettingError where a merged layer is not dense, or has hooks."""
    places = _places(model)
    for module, kind in places:
        _check({MERGED[kind][0]: module.get_submodule(MERGED[kind][0])})
    for module, kind in places:
        _split(module, kind)


def _places(model: nn.Module) -> list[tuple[nn.Module, type[nn.Module]]]:
    """The modules whose layers are to be merged or split, and what they are when merged."""
    blocks = [block for block in model.modules() if isinstance(block, LlamaDecoderLayer)]
    return [place for block in blocks for place in ((block.self_attn, MergedAttention), (block.mlp, MergedMLP))]


def _check(layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if type(layer) is not nn.Linear or is_changed(layer):
            raise SettingError(f"{name} is {layer}, perhaps with hooks; only dense layers can be merged or split")
    if len({layer.weight.requires_grad for layer in layers.values()}) > 1:
        raise SettingError(f"some of {', '.join(layers)} are frozen and some are not; they become one layer")


def _merge(module: nn.Module, kind: type[nn.Module]) -> None:
    name, parts = MERGED[kind]
    layers: list[Any] = [module.get_submodule(part) for part in parts]
    sizes = [layer.out_features for layer in layers]
    given = zip(*(layer.named_parameters() for layer in layers), strict=True)
    setattr(module, name, _dense(layers[0], {own[0][0]: torch.cat([value for _, value in own]) for own in given}))
    for part, (start, stop) in zip(parts, pairwise(accumulate(sizes, initial=0)), strict=True):
        setattr(module, part, Part(start, stop))
    module.__class__ = kind
    module.train(module.training)


def _split(module: nn.Module, kind: type[nn.Module]) -> None:
    name, parts = MERGED[kind]
    merged: Any = module.get_submodule(name)
    for part in parts:
        place: Any = module.get_submodule(part)
        own = {role: value[place.start : place.stop] for role, value in merged.named_parameters()}
        setattr(module, part, _dense(merged, own))
    delattr(module, name)
    module.__class__ = kind.__base__  # type: ignore[assignment]
    module.train(module.training)


def _dense(like: nn.Linear, parameters: dict[str, Tensor]) -> nn.Linear:
    """A layer with these weights, frozen where `like` is."""
    weight = parameters["weight"]
    size = {"bias": "bias" in parameters, "device": weight.device, "dtype": weight.dtype}
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], **size)
    for role, own in layer.named_parameters():
        own.data.copy_(parameters[role])
        own.requires_grad_(like.get_parameter(role).requires_grad)
    return layer
