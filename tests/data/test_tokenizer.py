"""Tokenizers: what they give is the text again, and a BPE is learned once and always the same."""

import json
import shutil
import sys
from itertools import chain
from pathlib import Path

import pytest
from texts import Texts, module, stories

from data.documents import fingerprint, is_held_out
from data.tokenizer import END, ByteTokenizer, HubTokenizer
from stl.errors import SettingError
from stl.optional import optional

TEXTS = ["", "so it goes", " naïve\n\n  — \t語 <|endoftext|> end\x00"]


def learned(packed: Path) -> Path:
    (folder,) = packed.glob("tokenizer-*/")
    return folder


def test_bytes():
    tokenizer = ByteTokenizer()
    rows = [list(row) for row in tokenizer.encode(TEXTS)]
    assert rows == [list(text.encode()) for text in TEXTS]
    assert [tokenizer.decode([*map(int, row), 256]) for row in rows] == TEXTS
    assert (tokenizer.vocab_size, tokenizer.end) == (257, 256)


def test_a_bpe_is_learned_once_and_always_the_same(tmp_path, caplog):
    pytest.importorskip("tokenizers")
    train = Texts(stories(0, 60))
    for packed in (tmp_path / "a", tmp_path / "b"):
        source = module(packed, train=train, tokenizer="bpe", bpe_vocab_size=300)
    assert train.reads == 4  # to learn and to pack, twice
    first, second = ((learned(tmp_path / name) / "tokenizer.json").read_bytes() for name in "ab")
    assert first == second
    module(tmp_path / "b", train=train, tokenizer="bpe", bpe_vocab_size=300, val=Texts(stories(70, 90)))
    assert train.reads == 5  # another held-out text is packed with the same tokenizer
    assert source.vocab_size == 300
    rows = source.tokenizer.encode(TEXTS)
    assert [source.tokenizer.decode([*row, source.tokenizer.end]) for row in rows] == TEXTS
    assert source.tokenizer.end not in chain(*rows)
    assert source.counts["train"]["tokens"] < 0.7 * source.counts["train"]["bytes"]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_bpe_never_sees_what_is_held_out_and_stops_at_its_characters(tmp_path):
    pytest.importorskip("tokenizers")
    texts = stories(0, 60)
    own = [text for text in texts if not is_held_out(fingerprint(text), 0.3)]
    settings = {"tokenizer": "bpe", "bpe_vocab_size": 290, "val_share": 0.3}
    module(tmp_path / "a", train=Texts(texts), val=None, **settings)
    module(tmp_path / "b", train=Texts(own), **settings)
    module(tmp_path / "c", train=Texts(["".join(own)[:900], "x"]), **settings)
    module(tmp_path / "d", train=Texts(["".join(own)]), **settings, bpe_characters=900)
    a, b, c, d = (json.loads((learned(tmp_path / name) / "tokenizer.json").read_text())["model"] for name in "abcd")
    assert a == b
    assert c == d
    assert c != a


def test_a_text_with_few_words_gives_a_smaller_vocabulary(tmp_path, caplog):
    pytest.importorskip("tokenizers")
    source = module(tmp_path, train=Texts([f"aa {END} " * 20]), tokenizer="bpe", bpe_vocab_size=1000, length=4)
    assert 257 < source.vocab_size < 270
    assert f"data.bpe_vocab_size=1000: the text gives no more than {source.vocab_size} tokens" in caplog.text


def test_a_damaged_tokenizer_is_named(tmp_path):
    pytest.importorskip("tokenizers")
    module(tmp_path, tokenizer="bpe", bpe_vocab_size=270)
    file = learned(tmp_path) / "tokenizer.json"
    file.write_text(file.read_text()[:500])
    with pytest.raises(SettingError, match=r"tokenizer.json is damaged: .*; remove .*, and it is made again"):
        module(tmp_path, tokenizer="bpe", bpe_vocab_size=270)


def test_transformers_reads_a_learned_bpe_from_its_folder(tmp_path):
    pytest.importorskip("transformers")
    source = module(tmp_path, tokenizer="bpe", bpe_vocab_size=300)
    other = HubTokenizer(str(learned(tmp_path)))
    assert (other.vocab_size, other.end) == (source.vocab_size, source.tokenizer.end)
    assert other.encode(TEXTS) == source.tokenizer.encode(TEXTS)
    assert [other.decode([*row, other.end]) for row in other.encode(TEXTS)] == TEXTS
    again = module(tmp_path, tokenizer=str(learned(tmp_path)))
    assert again.counts["train"]["crc32"] == source.counts["train"]["crc32"]
    moved = shutil.copytree(learned(tmp_path), tmp_path / "elsewhere")
    assert HubTokenizer(str(moved)).identity == other.identity


def test_a_vocabulary_is_the_same_where_ids_are(tmp_path):
    pytest.importorskip("transformers")
    source = module(tmp_path / "a", tokenizer="bpe", bpe_vocab_size=300)
    hub = HubTokenizer(str(learned(tmp_path / "a")))
    assert hub.vocabulary == source.vocabulary == source.tokenizer.vocabulary
    assert hub.begin == hub.end == source.tokenizer.begin == source.tokenizer.end == 0
    other = module(tmp_path / "b", train=Texts(["zyx wvu " * 99] * 9), tokenizer="bpe", bpe_vocab_size=300)
    assert other.vocabulary != source.vocabulary
    assert module(tmp_path / "c").vocabulary == "bytes"
    config = json.loads((learned(tmp_path / "a") / "tokenizer_config.json").read_text())
    moved = shutil.copytree(learned(tmp_path / "a"), tmp_path / "begins")
    (moved / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "a"}))
    begins = HubTokenizer(str(moved))
    assert (begins.begin, begins.end) == (source.tokenizer.encode(["a"])[0][0], 0)


def test_a_kept_bpe_gives_the_text_that_is_packed(tmp_path):
    pytest.importorskip("tokenizers")
    train = Texts(stories(0, 60))
    source = module(tmp_path, train=train, tokenizer="bpe", bpe_vocab_size=300)
    source.keep(tmp_path / "run" / "tokenizer")
    reads = train.reads
    again = module(tmp_path, train=train, tokenizer=str(tmp_path / "run" / "tokenizer"))
    assert again.vocabulary == source.vocabulary
    assert train.reads == reads
    module(tmp_path).keep(tmp_path / "bytes")  # has no files
    assert not (tmp_path / "bytes").exists()


def test_a_tokenizer_that_is_none(tmp_path):
    allowed = "set data.tokenizer to bytes, bpe, a folder or a name on the Hugging Face hub"
    with pytest.raises(SettingError, match=f"data.tokenizer='/nowhere/at/all' does not exist; {allowed}"):
        HubTokenizer("/nowhere/at/all")
    pytest.importorskip("transformers")
    with pytest.raises(SettingError, match=f"cannot be loaded .*; {allowed}"):
        HubTokenizer(str(tmp_path))
    module(tmp_path, tokenizer="bpe", bpe_vocab_size=270)
    config = learned(tmp_path) / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(SettingError, match=r"has no end-of-text \(eos\) token"):
        HubTokenizer(str(config.parent))


@pytest.mark.parametrize(("package", "tokenizer"), [("tokenizers", "bpe"), ("transformers", "gpt2")])
def test_without_its_package(tmp_path, monkeypatch, package, tokenizer):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingError) as caught:
        module(tmp_path, tokenizer=tokenizer)
    assert str(caught.value).startswith(f"data.tokenizer={tokenizer!r} needs the package {package} (")
    assert str(caught.value).endswith("): pip install -r requirements-llm.txt")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_same_name_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "a_folder_of_data").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SettingError, match=r"needs the package a_folder_of_data \(it is not installed\)"):
        optional("a_folder_of_data", "data.dataset='x'")
