"""Multi-head attention with STL projections, in the place of `torch.nn.MultiheadAttention`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stl.errors import SettingError
from stl.linear import STLLinear


class STLMultiheadAttention(nn.Module):
    """`torch.nn.MultiheadAttention` whose four projections are `STLLinear`; same `forward`, same shapes.

    PyTorch's module hands its weights to fused functions and never calls its projections, so they cannot be swapped
    one by one. Inputs (batch, tokens, features) with `batch_first`, else (tokens, batch, features); tiles are cut along
    the tokens in both cases.
    """

    q_proj: STLLinear
    k_proj: STLLinear
    v_proj: STLLinear
    out_proj: STLLinear

    def __init__(self, attention: nn.MultiheadAttention, *, from_dense: bool, **settings) -> None:
        """Take over the shape of `attention`, and its weights with `from_dense`; `settings` as for STLLinear."""
        super().__init__()
        width = attention.embed_dim
        self.embed_dim, self.num_heads, self.dropout = width, attention.num_heads, attention.dropout
        self.batch_first = attention.batch_first
        # PyTorch's encoder layers look at these to decide on a fused path, which would bypass this module.
        self.in_proj_bias = None
        self._qkv_same_embed_dim = False
        for name, linear in dense_projections(attention).items():
            setattr(self, name, STLLinear.from_linear(linear, from_dense=from_dense, **settings))
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise SettingError("is_causal=True is only a hint about attn_mask; pass the causal attn_mask as well")
        batched = query.ndim == 3
        q, k, v = (self._batch_first(x) for x in (query, key, value))
        q, k, v = self.q_proj(q), self.k_proj(k), self.v_proj(v)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        mask = self._merge_masks(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            weights = (scores if mask is None else scores + mask).softmax(-1)
            y = F.dropout(weights, dropout) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = self.out_proj(y.transpose(1, 2).flatten(-2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return y[0], None if weights is None else weights[0]
        return (y if self.batch_first else y.transpose(0, 1)), weights

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.ndim == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _merge_masks(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """One additive mask that broadcasts to (batch, heads, queries, keys), or None."""
        masks = []
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            masks.append(mask if mask.ndim == 2 else mask.unflatten(0, (-1, self.num_heads)))
        if key_padding_mask is not None:
            mask = _additive(key_padding_mask, q.dtype)
            masks.append(mask.view(-1, 1, 1, mask.shape[-1]))
        return sum(masks[1:], masks[0]) if masks else None


def dense_projections(attention: nn.MultiheadAttention) -> dict[str, nn.Linear]:
    """The four projections of `attention`, named as in `STLMultiheadAttention`, on its own data."""
    width = attention.embed_dim
    if attention.in_proj_weight is None:
        weights = [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight]
    else:
        weights = _thirds(attention.in_proj_weight)
    biases = [None] * 3 if attention.in_proj_bias is None else _thirds(attention.in_proj_bias)
    projections = {}
    for name, weight, bias in zip(("q_proj", "k_proj", "v_proj"), weights, biases, strict=True):
        projections[name] = nn.Linear(weight.shape[1], width, bias is not None, device="meta")
        projections[name].weight, projections[name].bias = weight, bias
    return projections | {"out_proj": attention.out_proj}


def _thirds(packed: nn.Parameter) -> list[nn.Parameter]:
    """The parts for queries, keys and values of a packed parameter, frozen where it is."""
    return [nn.Parameter(part, packed.requires_grad) for part in packed.detach().chunk(3)]


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
