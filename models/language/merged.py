"""LLaMA with one layer where several read the same x, as Phi-3 has it: queries, keys and values; gate and up.

It computes the same numbers. An STL layer in the place of several encodes their tiles once, by one encoder, and what it
multiplies is one batched GEMM.
"""

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP

from stl.normalisation import Norm


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


def merge_projections(model: nn.Module) -> None:
    """In every block of a LLaMA of dense layers, in place: `qkv_proj` and `gate_up_proj` with their weights."""
    for block in model.modules():
        if isinstance(block, LlamaDecoderLayer):
            _merge(block.self_attn, MergedAttention, "qkv_proj", ("q_proj", "k_proj", "v_proj"))
            _merge(block.mlp, MergedMLP, "gate_up_proj", ("gate_proj", "up_proj"))


def _merge(module: nn.Module, kind: type[nn.Module], name: str, parts: tuple[str, ...]) -> None:
    layers: list[Any] = [module.get_submodule(part) for part in parts]
    first, sizes = layers[0], [layer.out_features for layer in layers]
    merged: Any = nn.utils.skip_init(
        nn.Linear,
        first.in_features,
        sum(sizes),
        bias=first.bias is not None,
        device=first.weight.device,
        dtype=first.weight.dtype,
    )
    for role, own in merged.named_parameters():
        given = [getattr(layer, role) for layer in layers]
        own.requires_grad_(any(one.requires_grad for one in given))
        own.data.copy_(torch.cat(given))
    for part, (start, stop) in zip(parts, pairwise(accumulate(sizes, initial=0)), strict=True):
        setattr(module, part, Part(start, stop))
    setattr(module, name, merged)
    module.__class__ = kind
    module.train(module.training)
