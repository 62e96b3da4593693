"""Blocks of a merged LLaMA by kernels: norms are computed as the layers behind them encode, x is added as MLPs decode.

`stl.fuse_blocks` reads what blocks compute off their graphs, and transformers' blocks, called with more than x, have
none.
"""

from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from models.language.merged import MergedAttention
from stl import STLMLP, Norm, STLLinear, fuse_mlps
from stl.tracing import is_changed


class FusedLayer(LlamaDecoderLayer):
    """What transformers' computes; by its forward where kernels do not apply the norms."""

    self_attn: Any
    mlp: Any

    def forward(self, hidden_states: Tensor, *given: Any, **named: Any) -> Tensor:
        x, attention, mlp = hidden_states, self.self_attn, self.mlp
        before, between = _norm(self.input_layernorm), _norm(self.post_attention_layernorm)
        by_kernels = attention.qkv_proj.normalises(before, x) and mlp.normalises(between, x)
        if given or not by_kernels:  # what is not given by name means something else to the attention
            return super().forward(x, *given, **named)
        mixed, _ = attention(x, norm=before, **named)
        x = x + mixed
        return mlp(x, x, between)


def fuse_llama(model: nn.Module) -> list[str]:
    """`stl.fuse_mlps`, and the blocks whose projections are merged and STL, in place.

    Left alone are blocks whose MLP is not fused, as where its halves are no whole tiles, and those with hooks in them;
    hooks that norms get later are not called where kernels compute them. Returns the names of the MLPs and the blocks;
    state dicts stay as they were.
    """
    found = fuse_mlps(model)
    for name, block in model.named_modules():
        if type(block) is LlamaDecoderLayer and _fits(block):
            block.__class__ = FusedLayer
            found.append(name)
    return [name for name, _ in model.named_modules() if name in found]


def _fits(block: LlamaDecoderLayer) -> bool:
    attention: Any = block.self_attn
    merged = type(attention) is MergedAttention and type(attention.qkv_proj) is STLLinear and type(block.mlp) is STLMLP
    plain = all(type(norm) is LlamaRMSNorm for norm in (block.input_layernorm, block.post_attention_layernorm))
    return merged and plain and not any(is_changed(module) for module in block.modules() if module is not block)


def _norm(module: LlamaRMSNorm) -> Norm:
    return Norm(module.weight, None, module.variance_epsilon, False)
