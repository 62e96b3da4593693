"""Blocks of a merged LLaMA by kernels: norms are computed as the layers behind them encode, x is added as MLPs decode.

`stl.fuse_blocks` reads what blocks compute off their graphs, and transformers' blocks, called with more than x, have
none.
"""

from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from models.language.merged import MergedAttention
from stl import STLMLP, STLLinear, fuse_mlps
from stl.normalisation import Norm


class FusedLayer(LlamaDecoderLayer):
    """What transformers' computes; by its forward where kernels do not apply the norms."""

    self_attn: Any
    mlp: Any

    def forward(self, hidden_states: Tensor, **named: Any) -> Tensor:  # type: ignore[override]  # by name, as it is called
        x, attention, mlp = hidden_states, self.self_attn, self.mlp
        before, between = _norm(self.input_layernorm), _norm(self.post_attention_layernorm)
        if not (attention.qkv_proj.normalises(before, x) and mlp.layers[0].normalises(between, x)):
            return super().forward(x, **named)
        mixed, _ = attention(x, norm=before, **named)
        x = x + mixed
        return mlp(x, x, between)


def fuse_llama(model: nn.Module) -> list[str]:
    """`stl.fuse_mlps`, and blocks whose projections are merged and STL, in place. Returns the names of the MLPs and the
    blocks; state dicts stay as they were."""
    found = fuse_mlps(model)
    for name, block in model.named_modules():
        if type(block) is LlamaDecoderLayer and _is_merged(block):
            block.__class__ = FusedLayer
            found.append(name)
    return [name for name, _ in model.named_modules() if name in found]


def _is_merged(block: LlamaDecoderLayer) -> bool:
    attention = block.self_attn
    return type(attention) is MergedAttention and type(attention.qkv_proj) is STLLinear and type(block.mlp) is STLMLP


def _norm(module: LlamaRMSNorm) -> Norm:
    return Norm(module.weight, None, module.variance_epsilon, False)
