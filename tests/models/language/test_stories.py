"""A model that was trained on text, stories260K of llama2.c: the exact basis over the batch writes what it writes.

Its files are looked for in the folder STL_CHECKPOINTS, or else in shared/checkpoints beside the repository.
"""

import copy
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from models.language.llama2c import Tokenizer, read_model

BESIDE = Path(__file__).resolve().parents[4] / "shared" / "checkpoints"
FOLDER = Path(os.environ.get("STL_CHECKPOINTS") or BESIDE)
MODEL, TOKENS = FOLDER / "stories260K.bin", FOLDER / "tok512.bin"
BEGINNINGS = ["Once upon a time", "Lily had a dog", "Tom saw a big tree", "The sun was hot", "One day, a bird"]

pytestmark = pytest.mark.skipif(not (MODEL.exists() and TOKENS.exists()), reason="no stories260K; set STL_CHECKPOINTS")


@pytest.fixture(scope="module")
def dense():
    return read_model(MODEL)


@pytest.fixture(scope="module")
def exact(dense):
    model = copy.deepcopy(dense)
    model.convert(basis="exact48", tile=4, rank=48, row_axis="batch")
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENS)


@pytest.fixture(scope="module")
def texts(tokenizer):
    """(5, 15)."""
    return torch.tensor([tokenizer.encode(f"{text}. She was happy to see her mom.")[:15] for text in BEGINNINGS])


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_it_has_the_logits_of_the_dense_model(dense, exact, texts, batch):
    with torch.no_grad():
        torch.testing.assert_close(exact(texts[:batch]).logits, dense(texts[:batch]).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5])
def test_it_writes_the_same_stories(dense, exact, texts, tokenizer, batch):
    options = {"max_new_tokens": 100, "do_sample": False, "pad_token_id": 0}
    got, wanted = (model.generate(texts[:batch, :5], **options) for model in (exact, dense))
    assert torch.equal(got, wanted)
    assert got.shape == (batch, 105)
    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day,"
    assert tokenizer.decode(got[0].tolist()).startswith(story)
