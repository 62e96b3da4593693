"""The files of packed text: what stands in them, that they are made once and whole, and that damage is noticed."""

import json
import multiprocessing
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import Texts, module, stories

from data import packing
from data.documents import fingerprint, is_held_out
from data.packing import Blocks, TrainingBlocks, _pieces
from data.tokenizer import ByteTokenizer
from stl.errors import SettingError


def ids(packed: Path, side: str, dtype: str = "uint16") -> list[int]:
    (file,) = packed.glob(f"tokens-*/{side}.bin")
    return np.fromfile(file, dtype).tolist()


def joined(texts: list[str]) -> list[int]:
    return [i for text in texts for i in [*text.encode(), 256]]


def held_out(text: str, share: float = 0.3) -> bool:
    return is_held_out(fingerprint(text), share)


def test_documents_stand_one_after_the_other_with_the_end_of_text_behind_each(tmp_path):
    source = module(tmp_path, train=Texts(["one ä", "", " \n", "two\n"]), val=Texts(["three", "one ä "]), length=3)
    assert ids(tmp_path, "train") == joined(["one ä", "two\n"])
    assert ids(tmp_path, "val") == joined(["three"])
    counts = {"documents": 2, "dropped": 0, "bytes": 10, "tokens": 12}
    assert counts.items() <= source.counts["train"].items()
    assert {"documents": 1, "dropped": 1, "bytes": 5, "tokens": 6}.items() <= source.counts["val"].items()
    about = json.loads(next(tmp_path.glob("tokens-*/about.json")).read_text())
    assert about == source.counts
    assert about["recipe"]["train"] == {"texts": ["one ä", "", " \n", "two\n"]}
    assert about["recipe"]["tokenizer"] == {"kind": "bytes", "vocab_size": 257, "end": 256}


def test_duplicates_stay_where_they_are_wanted(tmp_path):
    texts = stories(0, 9)
    module(tmp_path, train=Texts(texts), val=Texts(texts[5:]), drop_duplicates=False)
    assert ids(tmp_path, "val") == joined(texts[5:])


def test_a_share_is_set_aside_by_the_text_alone(tmp_path):
    texts = stories(0, 200)
    module(tmp_path / "a", train=Texts(texts + texts), val=None, val_share=0.3)
    kept, aside = [t for t in texts if not held_out(t)], [t for t in texts if held_out(t)]
    assert 40 < len(aside) < 80
    assert ids(tmp_path / "a", "train") == joined(kept + kept)
    assert ids(tmp_path / "a", "val") == joined(aside + aside)


@pytest.mark.parametrize("batch", [1, 50, 10**6])
def test_budgets_end_the_text_exactly_there(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(packing, "BATCH", batch)
    texts = stories(0, 40)
    source = module(tmp_path, train=Texts(texts), val=Texts(texts[30:]), tokens="0.1K", val_tokens=55)
    assert ids(tmp_path, "train") == joined(texts)[:100]
    assert ids(tmp_path, "val") == joined(texts[30:])[:55]  # training never came to them
    assert source.counts["train"]["bytes"] == pytest.approx(100, abs=10)
    assert source.counts["val"]["dropped"] == 0


def test_long_documents_are_tokenised_in_pieces_that_make_them_up_again(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "PIECE", 10)
    text = "some words, and_a_very_long_one ä ö ü\n\nlines   and spaces"
    pieces = list(_pieces(text))
    assert pieces == ["some", " words,", " and_a_ver", "y_long_one", " ä ö ü\n", "\nlines  ", " and", " spaces"]
    module(tmp_path, train=Texts([text]), val=Texts(stories(0, 2)))
    assert ids(tmp_path, "train") == joined([text])


def test_halves_of_surrogate_pairs_do_no_harm(tmp_path):
    module(tmp_path, train=Texts(["a \ud800 b" + "c" * 20]))
    assert ids(tmp_path, "train") == joined(["a ? b" + "c" * 20])


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_the_numbers_are_as_wide_as_the_vocabulary_needs(tmp_path, monkeypatch, vocabulary, dtype):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", vocabulary)
    monkeypatch.setattr(ByteTokenizer, "end", vocabulary - 1)
    source = module(tmp_path, train=Texts(["x" * 30]))
    assert ids(tmp_path, "train", dtype) == [*b"x" * 30, vocabulary - 1]
    assert source.counts["dtype"] == dtype


def test_it_is_made_once_for_each_combination_of_settings(tmp_path):
    train = Texts(stories(0, 60))
    for settings in ({}, {}, {"length": 8, "batch_size": 2, "seed": 3}):
        module(tmp_path, train=train, **settings)
    assert train.reads == 1
    for number, settings in enumerate(({"tokens": 300}, {"val": None}, {"val": None, "val_share": 0.5}), 2):
        module(tmp_path, train=train, **settings)
        assert train.reads == number
    assert len(list(tmp_path.glob("tokens-*/"))) == 4


class Broken(Texts):
    def __iter__(self):
        yield from self.texts
        raise self.error


@pytest.mark.parametrize("error", [SettingError("data.root is broken"), KeyboardInterrupt()])
def test_it_is_whole_or_not_there(tmp_path, error):
    train = Broken(stories(0, 60))
    train.error = error
    with pytest.raises(type(error)):
        module(tmp_path, train=train)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    module(tmp_path, train=Texts(train.texts))
    (made,) = tmp_path.glob("tokens-*/")
    shutil.copytree(made, f"{str(made).rstrip('/')}.part")  # a killed process left it
    shutil.rmtree(made)
    module(tmp_path, train=Texts(train.texts))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [made.name]


def _make(packed, queue) -> None:
    train = Texts(stories(0, 60))
    queue.put((module(packed, train=train).counts["train"]["crc32"], train.reads))


def test_of_several_processes_one_packs_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_make, args=(tmp_path, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    results = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    assert len({checksum for checksum, _ in results}) == 1
    assert sorted(reads for _, reads in results) == [0, 0, 0, 1]


def test_damage_is_noticed(tmp_path):
    module(tmp_path)
    (file,) = tmp_path.glob("tokens-*/train.bin")
    about = file.parent / "about.json"
    content, facts = file.read_bytes(), json.loads(about.read_text())

    def complaint() -> str:
        with pytest.raises(SettingError) as caught:
            module(tmp_path)
        message = str(caught.value)
        assert "\n" not in message
        assert message.endswith(f"; remove {file.parent}, and it is made again")
        return message

    file.write_bytes(content[:-2])
    assert f"{file} is damaged: it has {len(content) - 2} bytes, and" in complaint()
    file.write_bytes(content[:50] + b"x" + content[51:])
    assert "its content is not what was written" in complaint()
    file.unlink()
    assert "train.bin is damaged: FileNotFoundError" in complaint()
    file.write_bytes(content)
    about.write_text(json.dumps({**facts, "dtype": "uint8"}))
    assert "its uint8 does not hold a vocabulary of 257" in complaint()
    about.write_text(json.dumps({**facts, "recipe": {"format": 0}}))
    assert "about.json is damaged: it is of other settings" in complaint()
    about.write_text(json.dumps(facts)[:100])
    assert "about.json is damaged: it is not readable" in complaint()
    about.write_text(json.dumps(facts))
    module(tmp_path)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingError, match=r"data.packed='.*file/packed' cannot be written to .*set data.packed to an"):
        module(tmp_path / "file" / "packed")


def test_a_token_outside_the_vocabulary(tmp_path, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "vocab_size", 100)
    with pytest.raises(SettingError, match=r"data.tokenizer gives tokens from 32 to 256, and its vocabulary has 100"):
        module(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": Texts(["", " "])}, "data.texts leaves no document to train on"),
        ({"val": Texts([" "], "val")}, "data.val holds no text, only empty documents"),
        ({"val": Texts(stories(0, 3), "val")}, "data.val holds nothing but 3 documents that the training text has"),
        ({"val": None, "val_share": 1e-9}, "data.val_share leaves none of 60 documents in data.texts for validation"),
        ({"length": 5000}, "data.length=5000 is not possible: the training text has .* fewer than the 5001 of one"),
        ({"length": 700}, "data.length=700 is not possible: the held-out text has"),
    ],
)
def test_too_little_text(tmp_path, settings, message):
    with pytest.raises(SettingError, match=message):
        module(tmp_path, **settings)


@given(tokens=st.integers(0, 60), length=st.integers(1, 20))
def test_blocks_give_every_token_as_a_label_once(tokens, length):
    blocks = Blocks(np.arange(tokens, dtype=np.uint16), length)
    assert len(blocks) == (tokens - 1) // length if tokens else len(blocks) == 0
    if not len(blocks):
        return
    inputs, labels = blocks.__getitems__(list(range(len(blocks))))
    assert inputs.shape == labels.shape == (len(blocks), length)
    assert inputs.flatten().tolist() == list(range(len(blocks) * length))
    assert (labels - inputs == 1).all()


@pytest.mark.parametrize("kind", [Blocks, TrainingBlocks])
def test_blocks_travel_to_a_worker_without_their_content(tmp_path, kind):
    source = module(tmp_path, train=Texts(["x" * 100_000]))
    blocks = kind(source._train.ids, 16)
    pickled = pickle.dumps(blocks)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert type(again) is kind
    assert again.length == 16
    assert again.ids.tolist() == blocks.ids.tolist()
    assert pickle.loads(pickle.dumps(Blocks(np.arange(5), 2))).ids.tolist() == [0, 1, 2, 3, 4]
