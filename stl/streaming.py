"""Feeding a causal model a few tokens at a time, as generation with a cache of keys and values does."""

from typing import Any

from torch import Tensor, nn

from stl.attention import STLMultiheadAttention
from stl.errors import SettingError
from stl.linear import STLLinear
from stl.stream import Stream

WITHOUT_CACHE = (STLMultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class Streaming:
    """Within it, calls of `model` with n₁, n₂, … tokens of a sequence give what one call with n₁ + n₂ + … gives.

        with torch.no_grad(), stl.Streaming(model) as stream:
            logits = model(prompt, cache)            # any number of tokens at a time
            logits = model(token, cache)             # the next of the same sequences
            stream.reorder(index)                    # a beam search goes on with these

    Up to rounding: products of other sizes are summed in another order. What else remembers tokens, such as a cache of
    keys and values or the number of the next position, is the model's own.

    Over tokens (`row_axis="tokens"`), every `STLLinear` in the model, wherever it stands, keeps the inputs of its last,
    incomplete tile, at most t − 1 for each sequence, and computes them again with the next ones: a step of one token
    costs as much as a tile. An `STLMLP` does so as one. The input of a layer is (batch, …, tokens, features) with the
    new tokens along axis −2, none left out: one that gives the logits of the last token only must not be STL. A 2-D
    input is a batch of lone tokens, as everywhere, and remembers nothing. All sequences of a batch go on together, so
    that shorter ones must be padded, at their end or as the full pass pads them. Over the batch (`row_axis="batch"`) a
    tile holds tokens of one position, and nothing is remembered; sequences must keep their places in the batch, beside
    the same others, where the basis is not exact.

    It may be left and entered again, and goes on where it was; another one, also one inside it or a copy of it, has
    tokens of its own. The model has to keep its layers meanwhile.

    Raises:
        SettingError: a basis over tokens that is not causal; attention modules without a cache of keys and values
        (PyTorch's, and `STLMultiheadAttention`). Within it: sequences of another batch; a layer that is called twice,
        or not for all tokens, in a pass of the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, STLLinear)}
        self._streams = {
            layer: Stream(name, layer.tile) for name, layer in layers.items() if layer.row_axis == "tokens"
        }
        self._entered: list[Any] = []  # what to go back to, once for each time that it was entered
        _check(model, self._streams)

    def __deepcopy__(self, memo: Any) -> "Streaming":
        twin = Streaming(self.model)
        for own, other in zip(twin._streams.values(), self._streams.values(), strict=True):
            own.__dict__.update(vars(other))  # what is kept is never written to
        return twin

    def __enter__(self) -> "Streaming":
        self._entered.append(
            (self.model.register_forward_hook(self._end_pass), [layer.stream for layer in self._streams])
        )
        for layer, own in self._streams.items():
            layer.stream = own
        return self

    def __exit__(self, *error: Any) -> None:
        hook, streams = self._entered.pop()
        hook.remove()
        for layer, outer in zip(self._streams, streams, strict=True):
            layer.stream = outer

    @property
    def seen(self) -> int:
        """Tokens of every sequence so far."""
        return max((stream.seen for stream in self._streams.values()), default=0)

    def reorder(self, index: Tensor) -> None:
        """Go on with sequence index[i], counted along axis 0, in the place of sequence i, for index (B',) of integers.

        As a beam search does with its cache; B' may be another number of sequences than before.
        """
        for stream in self._streams.values():
            stream.reorder(index)

    def reset(self) -> None:
        """Forget all tokens: others begin."""
        for stream in self._streams.values():
            stream.reset()

    def _end_pass(self, *_: Any) -> None:
        """Whatever made a layer's rows another series than the sequence's tokens would give wrong numbers silently."""
        for stream in self._streams.values():
            calls, stream.calls = stream.calls, 0
            if calls > 1:
                what = f"was called {calls} times in one pass"
            elif stream.seen not in (0, self.seen):
                what = f"has seen {stream.seen} of {self.seen} tokens"
            else:
                continue
            raise SettingError(
                f"layer {stream.name!r} {what}; within Streaming(model) a layer must see every token once: leave it "
                "dense or convert it with row_axis='batch', or stream the part of the model where it does; after an "
                "error, reset()"
            )


def _check(model: nn.Module, streams: dict[STLLinear, Stream]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, WITHOUT_CACHE) and any(isinstance(child, STLLinear) for child in module.modules()):
            raise SettingError(
                f"module {name!r} is a {type(module).__name__}, which keeps no keys and values of earlier tokens and "
                "cannot be fed step by step; use attention with a cache"
            )
    for layer, stream in streams.items():
        if layer.outside is None:
            raise SettingError(
                f"layer {stream.name!r} has basis={layer.basis!r} over tokens, where a token sees later ones of its "
                "tile and cannot be computed before them; convert with basis='causal' or row_axis='batch'"
            )
