"""Attention that stays on flash kernels under torch.compile.

Where no token is padding, no other sequence precedes it and the cache is empty, scaled_dot_product_attention's
`is_causal` says all that the mask of a causal model does, and without a mask PyTorch takes a flash kernel. In such a
pass transformers leaves the mask out, but not in a compiled one: without a cache it would have to look at the position
of every token, and with PyTorch before 2.14 it takes compiling for exporting. The mask is then built, and slower
kernels run, on keys and values repeated for every head.
"""

from typing import Any

from torch import nn
from transformers import DynamicCache, LlamaModel

Given = tuple[tuple[Any, ...], dict[str, Any]]  # what a module is called with


def leave_out_masks(model: LlamaModel) -> None:
    """Hooks, by which its layers are given no mask where `is_causal` is all of it; a compiled pass then builds none."""
    model.register_forward_pre_hook(_say_whether_plain, with_kwargs=True)
    for layer in model.layers:
        layer.register_forward_pre_hook(_leave_out_mask, with_kwargs=True)


def _say_whether_plain(model: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Given:
    """By the arguments alone, not by what stands in tensors; those behind the tokens are looked for by name."""
    cache = named.get("past_key_values")
    empty = cache is None or (isinstance(cache, DynamicCache) and cache.get_seq_length() == 0)
    masked = named.get("attention_mask") is not None or named.get("position_ids") is not None
    return given, named | {"plain": empty and not masked and len(given) < 2}


def _leave_out_mask(layer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Given:
    if named.pop("plain", False) and layer.self_attn.config._attn_implementation == "sdpa":
        named["attention_mask"] = None
    return given, named
