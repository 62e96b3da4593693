"""Attention that stays on flash kernels under torch.compile.

Where no token is padding, no other sequence precedes it and the cache is empty, scaled_dot_product_attention's
`is_causal` says all that the mask of a causal model does, and without a mask PyTorch takes a flash kernel. transformers
leaves the mask out in such a pass, but for a compiled one it cannot look whether it may: it builds the mask, and
slower kernels run, on keys and values repeated for every head.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "stl_sdpa"  # as `attn_implementation`


def is_plain(attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None) -> bool:
    """Whether the arguments of a pass alone, not the values of tensors, say that `is_causal` is all of its mask."""
    empty = cache is None or (isinstance(cache, DynamicCache) and cache.get_seq_length() == 0)
    return attention_mask is None and position_ids is None and empty


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    plain: bool = False,
    **rest: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa_attention_forward`, its arguments and result; in a `plain` pass the mask is not used, so
    that a compiled one does not build it."""
    return sdpa_attention_forward(module, query, key, value, None if plain else attention_mask, **rest)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
