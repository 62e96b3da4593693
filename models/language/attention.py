"""The masks of attention: none where it then stays on flash kernels under torch.compile, and none without a key.

Where no token is padding, no other sequence precedes it and the cache is empty, scaled_dot_product_attention's
`is_causal` says all that the mask of a causal model does, and without a mask PyTorch takes a flash kernel. In such a
pass transformers leaves the mask out, but not in a compiled one: without a cache it would have to look at the position
of every token, and with PyTorch before 2.14 it takes compiling for exporting. The mask is then built, and slower
kernels run, on keys and values repeated for every head.

A row of padding before the first token may see no token at all, and eager attention then makes it the mean of all of
them, later ones among them. In a dense model nobody looks at it; in a tile that holds tokens as well they would see it.
Such a row sees the first token here, which is later than none, however long the keys of a cache are.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaModel

Given = tuple[tuple[Any, ...], dict[str, Any]]  # what a module is called with


def adapt_masks(model: LlamaModel) -> None:
    """Hooks, by which its layers are given no mask where `is_causal` is all of it; a compiled pass then builds none.
    Else a mask in which every row sees something."""
    model.register_forward_pre_hook(_say_whether_plain, with_kwargs=True)
    for layer in model.layers:
        layer.register_forward_pre_hook(_adapt_mask, with_kwargs=True)


def _say_whether_plain(model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Given:
    """By the arguments alone, not by what stands in tensors; those behind the tokens are looked for by name."""
    cache = named.get("past_key_values")
    empty = cache is None or (isinstance(cache, DynamicCache) and cache.get_seq_length() == 0)
    masked = named.get("attention_mask") is not None or named.get("position_ids") is not None
    return given, named | {"plain": empty and not masked and len(given) < 2, "opened": []}


def _adapt_mask(layer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Given:
    plain, opened = named.pop("plain", False), named.pop("opened", None)
    mask = named.get("attention_mask")
    if plain and layer.self_attn.config._attn_implementation == "sdpa":
        named["attention_mask"] = None
    elif opened is not None and isinstance(mask, Tensor) and mask.ndim == 4:
        if not opened:  # by the first layer, for all
            opened.append(_open(mask))
        named["attention_mask"] = opened[0]
    return given, named


def _open(mask: Tensor) -> Tensor:
    """A mask (B, heads or 1, n, keys), bool or added to scores, whose rows that see nothing see the first key."""
    first = torch.arange(mask.shape[-1], device=mask.device) == 0
    if mask.dtype == torch.bool:
        return mask | (first & ~mask.any(-1, keepdim=True))
    closed = (mask <= torch.finfo(mask.dtype).min).all(-1, keepdim=True)
    return mask.masked_fill(first & closed, 0.0)
