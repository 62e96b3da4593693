"""A cache of keys and values, and what STL layers over tokens remember beside it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import LongTensor, Tensor
from transformers import Cache, DynamicCache

from stl import SettingError, Streaming


class STLCache(DynamicCache):
    """A DynamicCache that holds a `Streaming`: what chooses or repeats its sequences does so there too."""

    stl: Streaming  # set by `streaming`

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        self._choose(lambda places: beam_idx.to(places.device))
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._choose(lambda places: places.repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._choose(lambda places: places[indices])  # a mask becomes numbers
        super().batch_select_indices(indices)

    def _choose(self, choose: Callable[[Tensor], Tensor]) -> None:
        if self.get_seq_length():
            first: Any = self.layers[0]
            self.stl.reorder(choose(torch.arange(len(first.keys), device=first.keys.device)))


def streaming(cache: Cache, model: Any) -> Streaming:
    """What the layers of `model` remember with this cache; an empty DynamicCache becomes an STLCache, in place.

    Raises SettingError for a cache of another kind, and for tokens that the layers of `model` have not all seen.
    """
    if type(cache) not in (DynamicCache, STLCache):
        raise SettingError(
            f"past_key_values is a {type(cache).__name__}, and STL layers over tokens go with a DynamicCache only; "
            "use that, or convert with row_axis='batch'"
        )
    holder: Any = cache
    if cache.get_seq_length() == 0:
        holder.__class__ = STLCache  # in place, for generate and others make a cache and go on with that
        holder.stl = Streaming(model)
    seen = holder.stl.seen if isinstance(cache, STLCache) and cache.stl.model is model else 0
    if seen != cache.get_seq_length():
        raise SettingError(
            f"past_key_values holds {cache.get_seq_length()} tokens, and the STL layers have seen {seen} with it; "
            "a cache must be this model's from its beginning, and cannot be shortened"
        )
    return holder.stl
