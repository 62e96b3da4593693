import importlib.util
import json
import sys
from pathlib import Path

import pytest

from stl import get_basis, list_bases
from stl.basis import available_ranks
from stl.cp.discretise import is_exact_over_rationals

ROOT = Path(__file__).parent.parent.parent
spec = importlib.util.spec_from_file_location("plot_bases", ROOT / "scripts" / "plot_bases.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

SHIPPED = json.loads((ROOT / "results" / "bases.json").read_text())


def plot(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["plot_bases.py", *map(str, words)])
    script.main()


def test_every_registered_basis_has_a_row_and_one_plot_shows_them(monkeypatch, tmp_path, capsys):
    plot(monkeypatch, "--tile", 2, "--out", tmp_path / "new")
    rows = json.loads((tmp_path / "new" / "bases.json").read_text())
    wanted = [(name, 2, rank) for name in list_bases(2) for rank in available_ranks(name, 2)]
    assert [(row["basis"], row["tile"], row["rank"]) for row in rows] == wanted
    assert (tmp_path / "new" / "bases.png").read_bytes().startswith(b"\x89PNG")
    assert f"{len(rows)} bases: " in capsys.readouterr().out


def test_a_row_says_error_s_and_exactness():
    assert script.measure("strassen", 2, 7) == {
        "basis": "strassen",
        "tile": 2,
        "rank": 7,
        "error": 0.0,
        "amplification": 4.0,
        "exact": True,
    }
    row, basis = script.measure("als", 4, 24), get_basis("als", 4, 24)
    assert not row["exact"]
    assert row["error"] == pytest.approx(basis.error, rel=1e-5)
    assert row["error"] == float(f"{row['error']:.6g}")  # no digits that machines differ in
    assert row["amplification"] == pytest.approx(basis.amplification, rel=1e-5)


def test_the_plot_has_a_point_for_every_row_and_a_star_for_every_exact_one(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(script.plt, "close", figures.append)
    rows = [row for row in SHIPPED if row["tile"] in (2, 3)]
    script.plot(rows, tmp_path / "bases.png")
    monkeypatch.undo()
    for axes, key in ((figures[0].axes[0], "error"), (figures[0].axes[2], "amplification")):
        lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        stars = [point for line in axes.lines if line.get_marker() == "*" for point in line.get_xydata().tolist()]
        own = [row for row in rows if row["tile"] == 2]
        for name in list_bases(2):
            wanted = [[row["rank"], row[key]] for row in own if row["basis"] == name]
            assert lines[name].get_xydata().tolist() == wanted
        assert sorted(stars) == sorted([row["rank"], row[key]] for row in own if row["exact"])
        assert lines["products"].get_linestyle() == "--"
    script.plt.close(figures[0])


def test_what_is_in_results_is_what_is_registered():
    wanted = {(name, t, rank) for t in (2, 3, 4) for name in list_bases(t) for rank in available_ranks(name, t)}
    assert {(row["basis"], row["tile"], row["rank"]) for row in SHIPPED} == wanted
    for row in SHIPPED[:: len(SHIPPED) // 20] + [row for row in SHIPPED if row["basis"] in ("als", "group")][::4]:
        now = script.measure(row["basis"], row["tile"], row["rank"])
        assert now["exact"] == row["exact"]
        for key in ("error", "amplification"):
            assert now[key] == pytest.approx(row[key], rel=1e-4)
    assert (ROOT / "results" / "bases.png").stat().st_size < 200_000


def test_every_basis_said_to_be_exact_is_exact_over_the_rationals():
    exact = [(row["basis"], row["tile"], row["rank"]) for row in SHIPPED if row["exact"]]
    assert {("als", 3, 23), ("exact48", 4, 48), ("strassen", 4, 49), ("als", 2, 7)} <= set(exact)
    for size in exact:
        assert is_exact_over_rationals(get_basis(*size)), size


@pytest.mark.parametrize("tile", [0, -1, 9])
def test_a_tile_that_is_not_drawn_is_one_line(monkeypatch, tmp_path, tile):
    with pytest.raises(SystemExit, match=f"^error: --tile {tile} is not drawn; give whole numbers from 1 to 8"):
        plot(monkeypatch, f"--tile={tile}", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()
