"""The bases that ship as `basis="als"`."""

import json
import subprocess
import sys
from importlib.resources import files

import pytest
import torch

import stl.cp.table
from stl import SettingError, get_basis, list_bases, stl_matmul
from stl.basis import _build, available_ranks

# The lowest errors at S ≤ 64 that a first search knew; what ships is at most .002 above them.
GOALS = {
    2: {4: 0.449, 5: 0.252, 6: 0.125, 7: 0},
    3: {9: 0.589, 12: 0.445, 15: 0.293, 18: 0.152, 20: 0.077, 21: 0.011, 22: 0.002, 23: 0},
    4: {
        16: 0.653,
        20: 0.581,
        24: 0.495,
        28: 0.408,
        32: 0.319,
        36: 0.239,
        40: 0.159,
        44: 0.066,
        47: 1 / 64,
        48: 0,
        49: 0,
    },
}
PUBLISHED = {(2, 7): "strassen", (4, 48): "exact48", (4, 49): "strassen"}
SIZES = [(tile, rank) for tile, goals in GOALS.items() for rank in goals]
ROWS = {(row["tile"], row["rank"]): row for row in json.loads((files("stl.bases") / "als.json").read_text())["bases"]}


def test_what_ships_is_the_table_of_sizes():
    assert sorted(ROWS) == SIZES
    for tile, goals in GOALS.items():
        assert available_ranks("als", tile) == list(goals)
    assert available_ranks("als", 5) == []
    assert "als" in list_bases(3, 23)
    assert "als" not in list_bases(3, 24)


@pytest.mark.parametrize(("tile", "rank"), SIZES)
def test_stored_error_and_s_are_those_of_the_matrices_and_reach_the_goal(tile, rank):
    basis, row = get_basis("als", tile, rank), ROWS[tile, rank]
    for role in ("encode_x", "encode_w", "decode"):
        assert torch.equal(getattr(basis, role), torch.tensor(row[role], dtype=torch.float64))
    assert basis.error == pytest.approx(row["error"], rel=1e-12, abs=1e-24)
    assert basis.amplification == pytest.approx(row["amplification"], rel=1e-12)
    assert basis.amplification <= 64
    assert basis.error <= GOALS[tile][rank] + 0.002
    assert basis.exact == (GOALS[tile][rank] == 0)
    assert not basis.exact or basis.error < 1e-20
    if (tile, rank) not in PUBLISHED:
        search = {"command", "seed", "found_in_cycle", "starts", "hops", "start_sha256", "date", "torch"}
        assert search <= set(row["provenance"])


@pytest.mark.parametrize(("tile", "rank"), PUBLISHED)
def test_what_was_published_is_not_called_found(tile, rank):
    name = PUBLISHED[tile, rank]
    assert ROWS[tile, rank]["provenance"] == {"published": name}
    for role in ("encode_x", "encode_w", "decode"):
        assert torch.equal(getattr(get_basis("als", tile, rank), role), getattr(get_basis(name, tile, rank), role))


@pytest.mark.parametrize("tile", [2, 3, 4])
def test_more_channels_have_a_smaller_error(tile):
    errors = [get_basis("als", tile, rank).error for rank in GOALS[tile] if rank < 48]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(("tile", "rank"), [(2, 5), (3, 15), (4, 24)])
def test_the_error_is_that_of_a_product_of_random_matrices(tile, rank):
    basis = get_basis("als", tile, rank)
    x, w = torch.randn(2, 240, 240, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = x @ w
    measured = ((stl_matmul(x, w, basis) - exact).square().sum() / exact.square().sum()).item()
    assert measured == pytest.approx(basis.error, rel=0.1)


@pytest.mark.parametrize(("tile", "rank"), [(4, 24), (4, 36), (3, 22)])
def test_a_basis_keeps_its_error_in_bfloat16(tile, rank):
    basis = get_basis("als", tile, rank)
    x, w = torch.randn(2, 240, 240, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = x @ w
    rough = stl_matmul(x.bfloat16(), w.bfloat16(), basis).double()
    measured = ((rough - exact).square().sum() / exact.square().sum()).item()
    assert measured == pytest.approx(basis.error, rel=0.1, abs=3e-3)


def test_a_missing_rank_is_answered_with_what_exists():
    with pytest.raises(SettingError) as caught:
        get_basis("als", tile=4, rank=17)
    for text in (
        "basis='als' has no tile=4 rank=17",
        "tile=2: rank 4-7",
        "tile=4: rank 16, 20, 24",
        "tile=4 rank=17 exists in: causal, frame, ",
    ):
        assert text in str(caught.value)


def test_a_changed_file_is_refused(monkeypatch):
    rows = {(2, 4): ROWS[2, 4] | {"error": 0.3}}
    monkeypatch.setattr(stl.cp.table, "shipped", lambda name: rows)
    _build.cache_clear()
    with pytest.raises(SettingError, match=r"als\.json, tile=2 rank=4: error is said to be 0\.3 and is 0\.44"):
        get_basis("als", 2, 4)
    _build.cache_clear()


def test_importing_stl_loads_no_solver_and_no_table():
    script = (
        "import sys, stl, stl.cp.table\n"
        "print([name for name in sys.modules if name.startswith('stl.cp')], stl.cp.table.shipped.cache_info().currsize)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['stl.cp', 'stl.cp.table'] 0"
