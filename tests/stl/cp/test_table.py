import json
from importlib.resources import files

import pytest
import torch

from stl import Basis, SettingError, get_basis
from stl.basis import _build
from stl.cp import table as tables
from stl.cp.table import entry_of, read_table, write_table


def table_of(*bases: Basis) -> dict:
    return {(basis.tile, basis.rank): entry_of(basis, {"seed": 3}) for basis in bases}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "table.json"
    write_table(file, table_of(get_basis("random", 2, 5), get_basis("frame", 3, 11)), "about")
    return file


def change(path, **changes) -> None:
    content = json.loads(path.read_text())
    content["bases"][0] |= changes
    path.write_text(json.dumps(content))


def test_a_table_keeps_every_bit(path, tmp_path):
    table = read_table(path)
    assert list(table) == [(2, 5), (3, 11)]
    for entry, basis in zip(table.values(), (get_basis("random", 2, 5), get_basis("frame", 3, 11)), strict=True):
        for role in ("encode_x", "encode_w", "decode"):
            assert torch.equal(getattr(entry.basis, role), getattr(basis, role))
        assert (entry.error, entry.amplification, entry.provenance) == (basis.error, basis.amplification, {"seed": 3})
    write_table(tmp_path / "again.json", dict(reversed(table.items())), "about")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.json", "table.json"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 0}, "basis 0: rank=0 must lie between 1 and t³ = 8"),
        ({"rank": 9}, "basis 0: rank=9 must lie between 1 and t³ = 8"),
        ({"rank": "5"}, "basis 0: rank='5' is missing or wrong"),
        ({"tile": None}, "basis 0: tile=None is missing or wrong"),
        ({"tile": True}, "basis 0: tile=True is missing or wrong"),
        ({"tile": 0}, "basis 0: tile=0 must be a positive whole number"),
        ({"provenance": []}, "basis 0: provenance=[] is missing or wrong"),
        ({"encode_x": [[1.0] * 4] * 4}, "tile=2 rank=5: basis 'als': encode_x has shape (4, 4)"),
        ({"decode": [[1.0] * 3] * 5}, "decode has shape (5, 3); tile=2 rank=5 needs (5, 4)"),
        ({"decode": [[1.0] * 4] * 4 + [[1.0]]}, "decode is not 5 rows of 4 numbers"),
        ({"decode": None}, "decode is not 5 rows of 4 numbers"),
        ({"encode_w": [["a"] * 4] * 5}, "encode_w is not 5 rows of 4 numbers"),
        ({"encode_w": [[float("nan")] * 4] * 5}, "encode_w holds NaN or infinite values"),
        ({"encode_w": [[1e400] * 4] * 5}, "encode_w holds NaN or infinite values"),
        ({"error": 0.1}, "error is said to be 0.1 and is "),
        ({"error": float("nan")}, "error is said to be nan and is "),
        ({"error": None}, "error=None is missing or wrong"),
        ({"amplification": 1.0}, "amplification is said to be 1.0 and is "),
        ({"tile": 3, "rank": 12}, "encode_x has shape (5, 4); tile=3 rank=12 needs (12, 9)"),
    ],
)
def test_a_wrong_row_is_one_line_that_names_the_place(path, changes, said):
    change(path, **changes)
    with pytest.raises(SettingError) as caught:
        read_table(path)
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_size_that_stands_there_twice_is_refused(path):
    content = json.loads(path.read_text())
    content["bases"].append(content["bases"][1])
    path.write_text(json.dumps(content))
    with pytest.raises(SettingError, match="has tile=3 rank=11 twice; remove one"):
        read_table(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no JSON"),
        ("[1, 2]", 'has no list "bases"'),
        ('{"bases": 3}', 'has no list "bases"'),
        ('{"bases": [3]}', "basis 0 is not an object"),
    ],
)
def test_a_file_that_is_no_table_is_refused(path, text, said):
    path.write_text(text)
    with pytest.raises(SettingError, match=said):
        read_table(path)


def test_a_table_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SettingError, match=r"none\.json' cannot be read: No such file or directory"):
        read_table(tmp_path / "none.json")


@pytest.mark.parametrize(("name", "tile", "rank"), [("als", 2, 5), ("exact48", 4, 48), ("group", 2, 4)])
def test_a_damaged_file_that_ships_is_one_line(name, tile, rank, tmp_path, monkeypatch):
    content = json.loads((files("stl.bases") / f"{name}.json").read_text())
    place = next(i for i, row in enumerate(content["bases"]) if (row["tile"], row["rank"]) == (tile, rank))
    own = content["bases"][place]
    lacking = {key: [{k: v for k, v in own.items() if k != key}] for key in own}
    damaged = {key: json.dumps({"bases": rows}) for key, rows in lacking.items()}
    damaged |= {"is no JSON": json.dumps(content)[:-9], "twice; remove one": json.dumps({"bases": [own, own]})}
    damaged |= {'no list "bases"': json.dumps(own), "is not an object": '{"bases": [3]}'}
    monkeypatch.setattr(tables, "files", lambda package: tmp_path)
    for said, text in damaged.items():
        (tmp_path / f"{name}.json").write_text(text)
        _build.cache_clear()
        tables.shipped.cache_clear()
        with pytest.raises(SettingError) as caught:
            get_basis(name, tile, rank)
        assert f"{name}.json" in str(caught.value)
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    _build.cache_clear()
    tables.shipped.cache_clear()
