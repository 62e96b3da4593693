import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from stl.cp.table import read_table

ROOT = Path(__file__).parent.parent.parent
spec = importlib.util.spec_from_file_location("find_bases", ROOT / "scripts" / "find_bases.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

QUICK = ["--tile", "2", "--rank", "5", "6", "7", "--cycles", "2", "--rounds", "3", "--chains", "4", "--sweeps", "10"]


@pytest.fixture
def find(monkeypatch, tmp_path):
    """Runs the program with a table and a state of its own; returns the table's file."""
    threads = torch.get_num_threads()

    def run(*words, name: str = "found") -> Path:
        files = ["--table", tmp_path / f"{name}.json", "--state", tmp_path / f"{name}.pt"]
        monkeypatch.setattr(sys, "argv", ["find_bases.py", *map(str, [*files, *words])])
        script.main()
        return tmp_path / f"{name}.json"

    yield run
    torch.set_num_threads(threads)


def rows(path: Path) -> list[dict]:
    """The table without the date."""
    found = json.loads(path.read_text())["bases"]
    for row in found:
        row["provenance"].pop("date", None)
    return found


def refused(find, capsys, *words) -> str:
    with pytest.raises(SystemExit) as caught:
        find(*words)
    message = str(caught.value.code)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_the_same_command_gives_the_same_table(find, capsys):
    first = find(*QUICK, name="first")
    assert rows(first) == rows(find(*QUICK, name="second"))
    assert [entry.basis.rank for entry in read_table(first).values()] == [5, 6, 7]
    assert "the search is complete" in capsys.readouterr().out
    provenance = rows(first)[0]["provenance"]
    assert provenance["command"].startswith("python scripts/find_bases.py --tile 2 --rank 7 6 5 --seed 0 --cycles 2 ")
    assert provenance["hops"] == 3 * 4 * provenance["found_in_cycle"]
    assert provenance["start_sha256"] is None
    assert rows(first)[2]["provenance"] == {"published": "strassen"}


def test_an_interrupted_search_gives_the_same_table(find, capsys):
    whole, parts = find(*QUICK, name="whole"), None
    for _ in range(8):
        parts = find(*QUICK, "--stop-after", 5, name="parts")
        if "complete" in capsys.readouterr().out.splitlines()[-1]:
            break
    assert rows(parts) == rows(whole)


def test_a_search_stopped_in_the_middle_of_a_round_does_the_round_again(find, monkeypatch, capsys):
    whole = find(*QUICK, name="whole")
    step, calls = script.Search.step, []

    def interrupted(search):
        calls.append(search.done)
        result = step(search)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(script.Search, "step", interrupted)
        with pytest.raises(SystemExit, match="stopped; the same command goes on"):
            find(*QUICK, name="parts")
    assert rows(find(*QUICK, name="parts")) == rows(whole)


def test_a_table_keeps_what_is_better_and_what_is_of_another_size(find):
    quick = ["--tile", 2, "--cycles", 1, "--rounds", 0, "--chains", 1, "--state", "{}"]
    path = find(*QUICK)
    before = rows(path)
    path.with_suffix(".pt").unlink()
    find(*quick[:-2], "--rank", 5, 4, "--sweeps", 1)
    after = rows(path)
    assert after[1:] == before
    assert after[0]["rank"] == 4


def test_a_table_can_be_what_a_search_starts_from_and_adds_to(find):
    path = find("--tile", 2, "--rank", 6, "--cycles", 1, "--rounds", 5, "--chains", 8, "--sweeps", 40)
    error = rows(path)[0]["error"]
    path.with_suffix(".pt").unlink()
    more = ["--tile", 2, "--rank", 6, "--cycles", 1, "--rounds", 1, "--chains", 8, "--sweeps", 40, "--start", path]
    find(*more, "--stop-after", 2)
    find(*more)  # the table may have changed since, the search goes on with what it read
    assert rows(path)[0]["error"] <= error
    if rows(path)[0]["error"] < error:
        assert len(rows(path)[0]["provenance"]["start_sha256"]) == 64


def test_wrong_settings_are_one_line(find, capsys, tmp_path):
    said = {
        ("--tile", 4, "--rank", 0): "rank=0 must lie between 1 and t³ = 64",
        ("--tile", 4, "--rank", 65): "rank=65 must lie between 1 and t³ = 64",
        ("--tile", 0, "--rank", 1): "tile=0 must be a positive whole number",
        ("--tile", 5): "--tile 5 has no list of ranks",
        ("--rank", 5): "--rank 5 needs one --tile",
        ("--tile", 2, 3, "--rank", 5): "--rank 5 needs one --tile",
        ("--chains", 0): "chains=0 must be at least 1",
        ("--stop-after", -1): "--stop-after -1 must be at least 0",
        ("--threads", 0): "--threads 0 must be at least 1",
        ("--device", "toaster"): "--device toaster cannot be used",
        ("--start", tmp_path / "none.json"): "none.json' cannot be read",
    }
    for words, text in said.items():
        assert text in refused(find, capsys, *words)
    assert not list(tmp_path.iterdir())


def test_a_state_or_table_of_something_else_is_refused_and_left(find, capsys, tmp_path):
    find(*QUICK, "--stop-after", 1)
    assert "seed was 0, is 1; remove it, or give another --state" in refused(find, capsys, *QUICK, "--seed", 1)
    for content in (b"", b"nothing of the kind"):
        (tmp_path / "found.pt").write_bytes(content)
        assert "is no state of a search" in refused(find, capsys, *QUICK)
    for content in ({"weights": 1}, {"settings": 1}):
        torch.save(content, tmp_path / "found.pt")
        assert "is no state of a search" in refused(find, capsys, *QUICK)
    (tmp_path / "found.pt").unlink()
    (tmp_path / "found.json").write_text("{}")
    assert 'has no list "bases"' in refused(find, capsys, *QUICK)
    assert (tmp_path / "found.json").read_text() == "{}"


def test_a_search_that_goes_on_without_its_table_is_refused(find, capsys):
    find(*QUICK).unlink()
    said = refused(find, capsys, *QUICK)
    assert "does not hold (tile 2 rank 5, tile 2 rank 6, tile 2 rank 7); give the --table of that search" in said


def test_what_ships_is_what_the_program_searches_for():
    shipped = read_table(ROOT / "stl" / "bases" / "als.json")
    assert set(script.sizes_of(None, None)) == set(shipped)
