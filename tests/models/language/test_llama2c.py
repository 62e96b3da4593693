"""Files of llama2.c, written here: the model against the arithmetic of run.c, and its tokenizer."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stl import SettingError

pytest.importorskip("transformers")

from models.language.llama2c import Tokenizer, read_model

WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCABULARY, LENGTH = 16, 24, 2, 4, 2, 11, 12
SIZE = WIDTH // HEADS
SHAPES = {
    "embedding": (VOCABULARY, WIDTH),
    "attention_norm": (LAYERS, WIDTH),
    "wq": (LAYERS, WIDTH, WIDTH),
    "wk": (LAYERS, KV_HEADS * SIZE, WIDTH),
    "wv": (LAYERS, KV_HEADS * SIZE, WIDTH),
    "wo": (LAYERS, WIDTH, WIDTH),
    "mlp_norm": (LAYERS, WIDTH),
    "w1": (LAYERS, HIDDEN, WIDTH),
    "w2": (LAYERS, WIDTH, HIDDEN),
    "w3": (LAYERS, HIDDEN, WIDTH),
    "norm": (WIDTH,),
    "rotations": (LENGTH, SIZE),
}


def write(path: Path, tied: bool) -> dict[str, np.ndarray]:
    """A random model; returns its weights."""
    generator = np.random.default_rng(0)
    shapes = SHAPES if tied else {**SHAPES, "head": (VOCABULARY, WIDTH)}
    weights = {name: generator.normal(0, 0.4, shape).astype("<f4") for name, shape in shapes.items()}
    header = (WIDTH, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCABULARY if tied else -VOCABULARY, LENGTH)
    path.write_bytes(struct.pack("<7i", *header) + b"".join(weight.tobytes() for weight in weights.values()))
    return weights


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def rotated(x: np.ndarray) -> np.ndarray:
    """(n, heads, size): neighbours of a head are turned together, as run.c does."""
    angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, SIZE, 2) / SIZE)
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def forward(w: dict[str, np.ndarray], ids: list[int]) -> np.ndarray:
    x, n = w["embedding"][ids].astype(float), len(ids)
    for i in range(LAYERS):
        h = normed(x, w["attention_norm"][i])
        q, k, v = ((h @ w[name][i].T).reshape(n, -1, SIZE) for name in ("wq", "wk", "wv"))
        q, k, v = rotated(q), *(part.repeat(HEADS // KV_HEADS, 1) for part in (rotated(k), v))
        scores = np.einsum("ahs,bhs->hab", q, k) / SIZE**0.5 + np.triu(np.full((n, n), -np.inf), 1)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        x = x + np.einsum("hab,bhs->ahs", share / share.sum(-1, keepdims=True), v).reshape(n, WIDTH) @ w["wo"][i].T
        h = normed(x, w["mlp_norm"][i])
        gate = h @ w["w1"][i].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][i].T)) @ w["w2"][i].T
    return normed(x, w["norm"]) @ w.get("head", w["embedding"]).T


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_run_c_also_with_an_exact_basis(tmp_path, tied):
    wanted = torch.from_numpy(forward(write(tmp_path / "model.bin", tied), [1, 5, 10, 3, 0, 7, 7])).float()
    model, ids = read_model(tmp_path / "model.bin"), torch.tensor([[1, 5, 10, 3, 0, 7, 7]])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits[0], wanted, atol=1e-4, rtol=0)
        text = model.generate(ids[:, :1], max_new_tokens=8, do_sample=False)
        model.convert(basis="exact48", tile=4, rank=48, row_axis="batch")
        torch.testing.assert_close(model(ids).logits[0], wanted, atol=1e-4, rtol=0)
        assert torch.equal(model.generate(ids[:, :1], max_new_tokens=8, do_sample=False), text)


def test_files_that_are_none_are_named(tmp_path):
    file = tmp_path / "model.bin"
    with pytest.raises(SettingError, match=r"model.bin' cannot be read \(No such file"):
        read_model(file)
    write(file, tied=True)
    whole = file.read_bytes()
    file.write_bytes(whole[:-4])
    with pytest.raises(SettingError, match=rf"has {len(whole) - 4} bytes, and its header asks for {len(whole)}; copy"):
        read_model(file)
    for width, vocabulary in ((16, 0), (17, 9), (-16, 9)):
        file.write_bytes(struct.pack("<7i", width, 24, 2, 4, 2, vocabulary, 12))
        with pytest.raises(SettingError, match=r"is no model of llama2\.c: its header is"):
            read_model(file)
    for content in (b"", b"x" * 10):
        file.write_bytes(content)
        with pytest.raises(SettingError, match=r"is no model of llama2\.c"):
            read_model(file)


PIECES = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256)), *" abcä"]
MERGED = {" a": -1.0, "ab": -2.0, "bc": -0.5, " abc": -3.0, "cc": -2.0}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokens.bin"
    tokens = [*((piece, 0.0) for piece in PIECES), *MERGED.items()]
    own = [(score, piece.encode()) for piece, score in tokens]
    file.write_bytes(struct.pack("<i", 7) + b"".join(struct.pack("<fi", s, len(t)) + t for s, t in own))
    return Tokenizer(file)


def test_the_best_pair_is_joined_first(tokenizer):
    names = [*PIECES, *MERGED]
    assert tokenizer.vocab_size == len(names)
    assert [names[i] for i in tokenizer.encode("abc")] == ["\n<s>\n", " abc"]  # bc, then " a", then both
    assert [names[i] for i in tokenizer.encode("bccc")] == ["\n<s>\n", " ", "bc", "cc"]
    assert [names[i] for i in tokenizer.encode("ß")] == ["\n<s>\n", " ", "<0xC3>", "<0x9F>"]
    assert tokenizer.encode("") == [1]
    assert tokenizer.decode([*tokenizer.encode("ab"), 2, *tokenizer.encode("c")]) == "ab"


@given(text=st.text())
@settings(deadline=None, derandomize=True, max_examples=12)
def test_decoding_gives_the_text_again(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_damaged_tokenizer_is_named(tokenizer, tmp_path):
    file = tmp_path / "tokens.bin"
    file.write_bytes(struct.pack("<i", 1) + struct.pack("<fi", 0.0, 1) + b"a" + struct.pack("<fi", 0.0, 9))
    with pytest.raises(SettingError, match=r"tokens.bin' is damaged after 1 tokens; copy it again"):
        Tokenizer(file)
