"""What is read of a folder of text, and what one that is not right gets."""

import bz2
import gzip
import json
import lzma
import os
import sys
from pathlib import Path

import pytest

from data.text_files import FileDocuments
from stl.errors import SettingError


def documents(root: Path, **settings) -> list[str]:
    return list(FileDocuments(str(root), **settings))


def complaint(root: Path, **settings) -> str:
    with pytest.raises(SettingError) as caught:
        documents(root, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "c.txt").write_text("last\n")
    (tmp_path / "b" / "x.jsonl").write_text('{"text": "one", "id": 1}\n\n{"id": 2, "text": "zwölf\\n"}')
    (tmp_path / "a.txt").write_text("first\n\nof all")
    for other in (".hidden.txt", ".git/x.txt", "notes.md", "data.json"):
        (tmp_path / other).write_text("not read")
    assert documents(tmp_path) == ["first\n\nof all", "one", "zwölf\n", "last\n"]
    assert documents(tmp_path / "b" / "x.jsonl") == ["one", "zwölf\n"]


@pytest.mark.parametrize(("ending", "opened"), [(".gz", gzip.open), (".xz", lzma.open), (".bz2", bz2.open)])
def test_compressed_files_are_the_same_and_damaged_ones_are_named(tmp_path, ending, opened):
    text, lines = tmp_path / f"a.txt{ending}", tmp_path / f"b.jsonl{ending}"
    with opened(text, "wt") as file:
        file.write("plain")
    with opened(lines, "wt") as file:
        file.writelines(json.dumps({"text": f"line {i * i * i}"}) + "\n" for i in range(100))
    assert documents(tmp_path) == ["plain", *(f"line {i * i * i}" for i in range(100))]
    lines.write_bytes(lines.read_bytes()[:-20])
    assert f"{lines} cannot be read (" in complaint(tmp_path)
    lines.write_bytes(b"nothing of the kind")
    assert f"{lines} cannot be read (" in complaint(tmp_path)


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(zstandard.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert documents(tmp_path) == ["one", "two"]
    file.write_bytes(b"nothing of the kind")
    assert f"{file} cannot be read (" in complaint(tmp_path)


def test_without_zstandard_the_file_and_the_remedy_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").touch()
    message = complaint(tmp_path)
    assert message.startswith(f"{tmp_path}/a.txt.zst needs the package zstandard (")
    assert message.endswith("): pip install -r requirements-llm.txt")


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_a_separator_cuts_plain_text_wherever_it_is_read(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("data.text_files._CHUNK", chunk)
    (tmp_path / "a.txt").write_text("ä<|end|>bc<|end|><|end|>dö<")
    assert documents(tmp_path, separator="<|end|>") == ["ä", "bc", "", "dö<"]


def test_what_makes_documents_others_is_in_their_identity_and_where_they_are_is_not(tmp_path):
    file = tmp_path / "one" / "a.txt"
    file.parent.mkdir()
    file.write_text("text")
    first = FileDocuments(str(tmp_path / "one")).identity
    assert FileDocuments(str(tmp_path / "one"), separator="x").identity != first
    assert FileDocuments(str(tmp_path / "one"), key="body").identity != first
    (tmp_path / "one").rename(tmp_path / "two")
    assert FileDocuments(str(tmp_path / "two")).identity == first
    file = tmp_path / "two" / "a.txt"
    os.utime(file, (0, 0))
    assert FileDocuments(str(tmp_path / "two")).identity != first
    json.dumps(first)


EXPECTED = "expected a file or a folder with *.txt or *.jsonl, or these with .gz, .xz, .bz2, .zst; set it to another"


def test_a_root_without_text(tmp_path):
    gone, empty, images = tmp_path / "gone", tmp_path / "empty", tmp_path / "images"
    empty.mkdir()
    images.mkdir()
    (images / "a.png").touch()
    assert complaint(gone, setting="val_root").startswith(f"data.val_root={str(gone)!r} does not exist: {EXPECTED}")
    assert f"data.root={str(empty)!r} is empty: expected" in complaint(empty)
    assert f"data.root={str(images)!r} holds no text file: expected" in complaint(images)
    assert "is neither a folder nor a text file: expected" in complaint(images / "a.png")
    with pytest.raises(SettingError, match=r"data.root='' is not possible"):
        FileDocuments("")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "a.jsonl, line 3, cannot be read (not JSON: Expecting property name"),
        (b"\xff\xfe\xfa", "a.jsonl, line 3, cannot be read (not JSON: "),
        (
            '{"body": "x", "id": 0}',
            "data.key='text' is not in {}/a.jsonl, line 3, (its keys are body, id); set data.key",
        ),
        ('["x"]', "data.key='text' is not in {}/a.jsonl, line 3, (it is no JSON object); set data.key"),
        ('{"text": 7}', "data.key='text' holds 7 in {}/a.jsonl, line 3, and no text; set data.key"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    assert message.format(tmp_path) in complaint(tmp_path)


@pytest.mark.parametrize("separator", [None, "x"])
def test_text_that_is_not_utf8(tmp_path, separator):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert f"{tmp_path}/a.txt cannot be read (not UTF-8: " in complaint(tmp_path, separator=separator)
