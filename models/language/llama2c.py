"""Models and tokenizers of llama2.c, https://github.com/karpathy/llama2.c, in its first file format ("version 0").

A model file is seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; vocab_size is negative
where the head is not the embedding) and then the weights in float32. A tokenizer file is an int32, the longest token,
and for each token its score in float32, its length in int32 and its bytes. All are little-endian.
"""

import struct
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from models.language.llama import STLLlamaConfig, STLLlamaForCausalLM
from stl import SettingError

BOS, EOS, FIRST_BYTE = 1, 2, 3  # ids; those of single bytes follow each other


def read_model(path: str | Path) -> STLLlamaForCausalLM:
    """The dense model in a .bin file, float32, in evaluation mode.

    Raises SettingError where the file is missing or has not the size that its header says.
    """
    content = _read(path)
    header = struct.unpack_from("<7i", content) if len(content) >= 28 else (0,) * 7
    width, hidden, layers, heads, kv_heads, vocabulary, length = header
    if min(*header[:5], abs(vocabulary), length) < 1 or width % heads:
        raise SettingError(
            f"{str(path)!r} is no model of llama2.c: its header is {header}; give a .bin file of version 0"
        )
    config = STLLlamaConfig(
        vocab_size=abs(vocabulary),
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=vocabulary > 0,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    size, keys = width // heads, kv_heads * (width // heads)
    shapes = {
        "embed_tokens": (abs(vocabulary), width),
        "input_layernorm": (layers, width),
        "self_attn.q_proj": (layers, width, width),
        "self_attn.k_proj": (layers, keys, width),
        "self_attn.v_proj": (layers, keys, width),
        "self_attn.o_proj": (layers, width, width),
        "post_attention_layernorm": (layers, width),
        "mlp.gate_proj": (layers, hidden, width),
        "mlp.down_proj": (layers, width, hidden),
        "mlp.up_proj": (layers, hidden, width),
        "norm": (width,),
        "rotations": (length, size),  # not needed: LLaMA's own
        **({} if vocabulary > 0 else {"lm_head": (abs(vocabulary), width)}),
    }
    needed = 28 + 4 * sum(map(prod, shapes.values()))
    if len(content) != needed:
        raise SettingError(f"{str(path)!r} has {len(content)} bytes, and its header asks for {needed}; copy it again")
    parts = torch.frombuffer(bytearray(content), dtype=torch.float32, offset=28).split([*map(prod, shapes.values())])
    weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    del weights["rotations"]
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        weights[name] = _halves(weights[name], size)
    state: dict[str, Tensor] = {"lm_head.weight": weights.pop("lm_head", weights["embed_tokens"])}
    for name, weight in weights.items():
        if name in ("embed_tokens", "norm"):
            state[f"model.{name}.weight"] = weight
        else:
            state |= {f"model.layers.{i}.{name}.weight": own for i, own in enumerate(weight)}
    model = STLLlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def _halves(weight: Tensor, size: int) -> Tensor:
    """(layers, heads·size, k) with rows 2i and 2i + 1 of a head, which are rotated together, at i and i + size/2."""
    heads = weight.unflatten(1, (-1, size // 2, 2))
    return heads.transpose(2, 3).flatten(1, 3)


class Tokenizer:
    """Byte-pair encoding by scores, as in run.c: the pair whose token has the best score is joined first.

    Raises SettingError where the file is missing or ends too early.
    """

    def __init__(self, path: str | Path) -> None:
        content, position = _read(path), 4
        self._tokens: list[bytes] = []
        self._scores: list[float] = []
        while position < len(content):
            try:
                score, length = struct.unpack_from("<fi", content, position)
            except struct.error:
                length = -1
            position += 8 + length
            if length < 0 or position > len(content):
                raise SettingError(f"{str(path)!r} is damaged after {len(self._tokens)} tokens; copy it again")
            self._tokens.append(content[position - length : position])
            self._scores.append(score)
        self._ids = {token: i for i, token in reversed([*enumerate(self._tokens)])}

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with that of its beginning before them."""
        ids: list[int] = []
        for character in f" {text}" if text else "":
            token = character.encode()
            ids += [self._ids[token]] if token in self._ids else [byte + FIRST_BYTE for byte in token]
        while True:
            pairs = [self._ids.get(self._tokens[a] + self._tokens[b]) for a, b in pairwise(ids)]
            found = [(self._scores[own], -place, own) for place, own in enumerate(pairs) if own is not None]
            if not found:
                return [BOS, *ids]
            _, place, own = max(found)
            ids[-place : 2 - place] = [own]

    def decode(self, ids: list[int]) -> str:
        """The text of these ids, up to its end."""
        parts: list[bytes] = []
        for before, own in zip([None, *ids], ids, strict=False):
            if own == EOS:
                break
            if own != BOS:
                token = self._tokens[own]
                if FIRST_BYTE <= own < FIRST_BYTE + 256 and token[:3] == b"<0x":
                    token = bytes([own - FIRST_BYTE])
                parts.append(token.removeprefix(b" ") if before == BOS else token)
        return b"".join(parts).decode(errors="replace")


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingError(f"{str(path)!r} cannot be read ({error.strerror}); give a file of llama2.c") from error
