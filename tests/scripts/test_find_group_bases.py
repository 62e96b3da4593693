import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
spec = importlib.util.spec_from_file_location("find_group_bases", ROOT / "scripts" / "find_group_bases.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

QUICK = ["--tile", 2, "--chains", 8, "--steps", 20]


@pytest.fixture
def find(monkeypatch, tmp_path):
    threads = torch.get_num_threads()
    monkeypatch.setattr("stl.cp.index_maps.WEIGHING", 20)  # quick

    def run(*words, name: str = "found") -> list[dict]:
        table = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", ["find_group_bases.py", "--table", *map(str, [table, *words])])
        script.main()
        return json.loads(table.read_text())["bases"]

    yield run
    torch.set_num_threads(threads)


def test_every_real_rank_of_the_tile_is_found_the_same_each_time(find, capsys):
    rows = find(*QUICK)
    assert [row["rank"] for row in rows] == [1, 2, 4, 5, 7, 8]
    assert rows[-1]["group"] == [2, 2, 2]
    assert rows[-1]["error"] == 0
    assert rows == find(*QUICK, name="again")
    assert rows[2]["provenance"]["command"] == (
        "python scripts/find_group_bases.py --tile 2 --rank 4 --seed 0 --chains 8 --steps 20 --limit 64.0"
    )
    assert "tile 2 rank 8: Z2×Z2×Z2 of order 8, error 0.0000 S 1.00, products 0.0000" in capsys.readouterr().out


def test_a_row_is_found_again_by_its_own_command(find):
    row = find(*QUICK)[3]
    assert find(*row["provenance"]["command"].split()[2:], name="alone") == [row]


def test_a_table_keeps_what_is_better(find):
    good = find(*QUICK)
    assert find("--tile", 2, "--rank", 7, "--chains", 1, "--steps", 0) == good
    assert find("--tile", 2, "--rank", 7, "--chains", 1, "--steps", 0, name="alone") != [good[4]]


def test_the_lower_error_is_better_and_of_equal_ones_the_lower_s():
    def row(error, amplification):
        return {"error": error, "amplification": amplification}

    own = row(0.5, 4.0)
    assert script.is_better(own, None, 64)
    assert not script.is_better(own, own, 64)
    assert script.is_better(own, row(0.51, 1.0), 64)
    assert not script.is_better(own, row(0.49, 60.0), 64)
    assert script.is_better(own, row(0.5 - 1e-12, 4.1), 64)
    assert not script.is_better(own, row(0.5 + 1e-12, 3.9), 64)
    assert not script.is_better(own, row(0.5 + 1e-12, 4.0 + 1e-12), 64)
    assert script.is_better(own, row(0.1, 65.0), 64)  # the limit comes first


def test_wrong_settings_are_one_line_and_nothing_is_written(find, tmp_path):
    said = {
        ("--tile", 2, "--rank", 0): "rank=0 must lie between 1 and t³ = 8",
        ("--tile", 2, "--rank", 9): "rank=9 must lie between 1 and t³ = 8",
        (
            "--tile",
            2,
            "--rank",
            3,
        ): "--rank 3 is the real rank of no abelian group; for --tile 2 there are 1, 2, 4, 5, 7, 8",
        ("--tile", 0): "tile=0 must be a positive whole number",
        ("--chains", 0): "chains=0 must be at least 1",
        ("--limit", 0): "limit=0.0 must be at least 1",
    }
    for words, text in said.items():
        with pytest.raises(SystemExit, match=r"^error: [^\n]*$") as caught:
            find(*words)
        assert text in str(caught.value.code)
    assert not list(tmp_path.iterdir())


def test_a_table_of_something_else_is_refused_and_left(find, tmp_path):
    table = tmp_path / "found.json"
    for content, text in (("{}", 'has no list "bases"'), ('{"bases": [{"tile": 2}]}', "basis 0: rank=None is missing")):
        table.write_text(content)
        with pytest.raises(SystemExit, match=r"^error: [^\n]*$") as caught:
            find(*QUICK)
        assert text in str(caught.value.code)
        assert table.read_text() == content
