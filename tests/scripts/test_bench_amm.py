"""scripts/bench_amm.py: every rival against its error in closed form, and what each is allowed to cost."""

import json
import math
import shutil
import sys

import amm_matrices
import amm_report
import amm_rivals as rivals
import bench_amm
import benchmarking
import pytest
import torch
from amm_rivals import Weight
from running import QUICK, ROOT, run
from torch.utils.flop_counter import FlopCounterMode

from stl import get_basis, stl_matmul
from stl.basis import available_ranks


def gaussian(n=64, k=96, m=80, samples=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, n // samples, k, dtype=torch.float64, generator=generator)
    return x, torch.randn(k, m, dtype=torch.float64, generator=generator)


def squared(way, x, w):
    """The relative squared error in float64."""
    exact = x @ w
    return ((way.product(x) - exact).norm() / exact.norm()).item() ** 2


def macs(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops() // 2


# --- what they cost ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(64, 96, 80, 1), (52, 30, 21, 4)])
def test_macs_are_what_pytorch_counts(sizes):
    x, w = gaussian(*sizes)
    rows, (k, m) = x[..., 0].numel(), w.shape
    budget = rows * k * m * 2 // 3
    for way in (
        rivals.dense(x, w),
        rivals.low_rank(x, Weight(w), budget),
        rivals.sketched(x, w, budget, 0),
    ):
        assert way.macs == macs(way.product, x)
    largest, sampled = rivals.largest_columns(x, w, budget), rivals.sampled_columns(x, w, budget, 0)
    assert largest.macs == macs(largest.product, x) + rows * k  # the norms of the columns
    assert sampled.macs == macs(sampled.product, x) + rows * k + sampled.facts["kept"] * m
    for basis in (get_basis("hadamard", 4, 16), get_basis("strassen", 2, 7)):
        way = rivals.stl(x, w, basis)
        weight = (
            math.ceil(k / basis.tile) * math.ceil(m / basis.tile) * basis.tile**2 * basis.rank
        )  # encoded beforehand
        assert way.macs == macs(way.product, x) - weight
    assert rivals.pruned_2_of_4(x, w).macs == rows * math.ceil(k / 4) * 2 * m
    assert rivals.pruned(x, w, budget).macs == rows * (budget // rows)


def test_nothing_costs_more_than_it_is_allowed_and_rivals_use_what_they_are():
    x, w = gaussian(samples=4)
    rows, (k, m) = 64, w.shape
    chosen = [
        get_basis("als", 4, 24),
        get_basis("als", 2, 5),
        get_basis("strassen", 4, 49),
        get_basis("random", 8, 512),
    ]
    ways = list(bench_amm.approximations(x, w, chosen, 0))
    unit = {"pruned": rows, "largest columns": rows * m, "sampled columns": (rows + 1) * m}
    for budget, way in ways:
        assert budget - unit.get(way.method, rows * (k + m)) < way.macs <= budget
    found = {way.facts["basis"]: way for _, way in ways if way.method == "stl"}
    assert set(found) == {"als", "strassen"}  # dearer than dense, the exact one stays and the random one does not
    assert found["strassen"].macs > ways[0][1].macs
    budgets = {budget for budget, way in ways if way.method == "pruned"}
    # als at t=4 is dearer than at t=2 and foreseen to be worse: a row, but no budget of its own
    assert budgets == {rivals.stl(x, w, chosen[1]).macs, rows * k * m // 2}
    assert {way.facts["tile"] for _, way in ways if way.facts.get("compared")} == {2}
    assert rivals.stl(x, w, chosen[1]).macs < rivals.stl(x, w, chosen[0]).macs < ways[0][1].macs


def test_too_small_a_budget_gives_no_rival():
    x, w = gaussian()
    weight = Weight(w)
    assert rivals.pruned(x, w, 63) is None
    assert rivals.low_rank(x, weight, 64 * 176 - 1) is None
    assert rivals.sketched(x, w, 64 * 176 - 1, 0) is None
    assert rivals.largest_columns(x, w, 64 * 96 + 64 * 80 - 1) is None
    assert rivals.sampled_columns(x, w, 64 * 96 + 65 * 80 - 1, 0) is None
    assert rivals.low_rank_and_stl(x, weight, 1000 + 64 * 176 - 1, [(get_basis("als", 2, 4), 1000)]) is None
    assert rivals.low_rank_and_stl(x, weight, 1000 + 64 * 176, [(get_basis("als", 2, 4), 1000)]).facts["kept"] == 1


# --- how wrong they are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tile", "rank"), [("strassen", 2, 7), ("exact48", 4, 48), ("products", 3, 27)])
def test_exact_bases_are_exact(name, tile, rank):
    x, w = gaussian(52, 30, 21, 4)
    assert squared(rivals.stl(x, w, get_basis(name, tile, rank)), x, w) < 1e-20


@pytest.mark.parametrize(("name", "tile", "rank"), [("als", 4, 32), ("hadamard", 4, 16), ("products", 2, 5)])
def test_an_error_is_foreseen_for_gaussian_matrices(name, tile, rank):
    way = rivals.stl(*gaussian(256, 256, 256), get_basis(name, tile, rank))
    assert squared(way, *gaussian(256, 256, 256)) == pytest.approx(way.facts["predicted"] ** 2, rel=0.05)


def test_low_rank_misses_the_tail_of_the_spectrum():
    _, w = gaussian()
    x = torch.linalg.qr(gaussian(96, 96, 1)[0]).Q  # orthonormal: the error is that of W
    weight = Weight(w)
    way = rivals.low_rank(x, weight, 96 * (96 + 80) * 20)
    singular = torch.linalg.svdvals(w).square()
    assert way.facts["kept"] == 20
    assert squared(way, x, w) == pytest.approx((singular[20:].sum() / singular.sum()).item(), rel=1e-9)
    assert squared(rivals.low_rank(x, weight, 10**9), x, w) < 1e-20


def test_pruned_weights_miss_the_least_squares_of_a_gaussian():
    x, w = gaussian(64, 512, 512)
    half = rivals.dense(x, w).macs // 2
    q = math.sqrt(2) * torch.special.erfinv(torch.tensor(0.5, dtype=torch.float64)).item()  # median of |w|
    below = 0.5 - 2 * q * math.exp(-(q**2) / 2) / math.sqrt(2 * math.pi)  # ∫ w² below it
    assert squared(rivals.pruned(x, w, half), x, w) == pytest.approx(below, rel=0.03)
    # The least and the second of four squares: E = ∫ P(y₁ > y) + P(y₂ > y) dy, with P(w² > y) = p.
    y = torch.linspace(0, 60, 600_001, dtype=torch.float64)
    p = torch.special.erfc((y / 2).sqrt())
    two_least = torch.trapezoid(2 * p**4 + 4 * (1 - p) * p**3, y).item() / 4
    assert two_least == pytest.approx(0.132, abs=5e-4)
    assert squared(rivals.pruned_2_of_4(x, w), x, w) == pytest.approx(two_least, rel=0.03)


def test_2_of_4_keeps_two_of_every_four_inputs_of_an_output():
    x = torch.eye(6, dtype=torch.float64)[None]
    w = torch.tensor([[1.0, -5.0], [2.0, 0.1], [-3.0, 4.0], [0.5, 0.2], [7.0, 0.0], [6.0, 1.0]], dtype=torch.float64)
    wanted = torch.tensor([[0.0, -5.0], [2.0, 0.0], [-3.0, 4.0], [0.0, 0.0], [7.0, 0.0], [6.0, 1.0]]).double()
    assert torch.equal(rivals.pruned_2_of_4(x, w).product(x)[0], wanted)


def test_columns():
    x, w = gaussian(96, 96, 80)
    x = torch.linalg.qr(x).Q * torch.linspace(1, 3, 96)  # orthogonal columns: what is missed adds up
    parts = ((x[0].norm(dim=0) * w.norm(dim=1)).square()).sort(descending=True).values
    way = rivals.largest_columns(x, w, 96 * 96 + 96 * 80 * 30)
    assert way.facts["kept"] == 30
    assert squared(way, x, w) == pytest.approx((parts[30:].sum() / parts.sum()).item(), rel=1e-9)
    assert squared(rivals.largest_columns(x, w, 10**9), x, w) < 1e-20


def test_random_methods_have_the_variance_of_their_papers_and_no_bias():
    x, w = gaussian(32, 24, 28)
    x = x * torch.linspace(1, 4, 24)
    exact = x @ w
    norms = (x[0].norm(dim=0) * w.norm(dim=1)).sum().item()
    for rival, variance in (
        (rivals.sampled_columns, norms**2 - exact.square().sum().item()),
        (rivals.sketched, (x.norm() * w.norm()).item() ** 2 + exact.square().sum().item()),
    ):
        ways = [rival(x, w, 32 * 24 * 28 // 2, seed) for seed in range(600)]
        assert len({way.facts["kept"] for way in ways}) == 1
        wanted = variance / ways[0].facts["kept"] / exact.square().sum().item()
        errors = torch.tensor([squared(way, x, w) for way in ways])
        assert errors.mean().item() == pytest.approx(wanted, rel=0.1)
        mean = torch.stack([way.product(x) for way in ways]).mean(0)
        assert ((mean - exact).norm() / exact.norm()).item() ** 2 < 3 * wanted / len(ways)
        assert torch.equal(ways[0].product(x), rival(x, w, 32 * 24 * 28 // 2, 0).product(x))


def test_low_rank_and_stl_take_the_best_split():
    x, w = gaussian(256, 256, 256)
    w = w * torch.logspace(0, -1, 256, dtype=torch.float64)
    weight, budget = Weight(w), rivals.dense(x, w).macs * 9 // 10
    choices = [(basis, rivals.stl(x, w, basis).macs) for basis in (get_basis("als", 4, r) for r in (16, 24, 32))]
    ways = [rivals.low_rank_and_stl(x, weight, budget, [choice]) for choice in choices]
    singular = torch.linalg.svdvals(w).square()
    for way, (basis, _) in zip(ways, choices, strict=True):
        tail = (singular[way.facts["kept"] :].sum() / singular.sum()).item()
        assert squared(way, x, w) == pytest.approx(tail * basis.error, rel=0.05)
    best = rivals.low_rank_and_stl(x, weight, budget, choices)
    assert squared(best, x, w) == min(squared(way, x, w) for way in ways)
    exact = get_basis("products", 2, 8)
    assert squared(rivals.low_rank_and_stl(x, weight, 10**12, [(exact, 0)]), x, w) < 1e-20


# --- precision ---------------------------------------------------------------------------------------------------


def test_bfloat16_is_rounded_as_by_the_cpu_and_noise_grows_with_s():
    x, w = gaussian(64, 64, 64)
    short = x.bfloat16(), w.bfloat16()
    with bench_amm.BFloat16Products():
        product = short[0] @ short[1]
        y = stl_matmul(*short, get_basis("strassen", 4, 49))
    assert product.dtype == y.dtype == torch.bfloat16
    torch.testing.assert_close(product, short[0] @ short[1], rtol=2**-7, atol=0.02)
    torch.testing.assert_close(product, (short[0].float() @ short[1].float()).bfloat16(), rtol=0, atol=0)
    float32, plain = bench_amm.errors(rivals.dense(x, w), x, x @ w)
    noisy = bench_amm.errors(rivals.stl(x, w, get_basis("strassen", 4, 49)), x, x @ w)[1]  # S = 16
    assert float32 < 1e-6
    assert 2**-10 < plain < 2**-8
    assert 2 < noisy / plain < 6


# --- matrices ----------------------------------------------------------------------------------------------------


def test_drawn_matrices_have_their_spectra_and_come_again():
    kinds = amm_matrices.drawn(40)
    harmonic = 1 / torch.arange(1, 41, dtype=torch.float64)
    for kind, decaying in zip(kinds, [(False, False), (False, True), (True, True)], strict=True):
        pair = kind.draw(1)
        assert all(torch.equal(one, two) for one, two in zip(pair, kind.draw(1), strict=True))
        assert not torch.equal(pair[1], kind.draw(2)[1])
        for matrix, decays in zip((pair[0][0], pair[1]), decaying, strict=True):
            assert torch.allclose(torch.linalg.svdvals(matrix), harmonic) == decays


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder, "linear=dense", *QUICK)
    return folder


def test_recorded_matrices_are_those_of_the_model(trained):
    kinds, facts = amm_matrices.recorded(trained, ["blocks.1.mlp.fc1", "head"], 2)
    weights = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert [kind.name for kind in kinds] == ["blocks.1.mlp.fc1", "head"]
    (x, w), (other, _) = kinds[0].draw(0), kinds[0].draw(1)
    assert x.shape == other.shape == (16, 65, 96)
    assert not torch.equal(x, other)
    assert torch.equal(w, weights["model.blocks.1.mlp.fc1.weight"].double().T)
    norm = {name: weights[f"model.blocks.1.norm2.{name}"] for name in ("weight", "bias")}
    normed = ((x - norm["bias"]) / norm["weight"]).float()  # fc1 reads what norm2 gives
    torch.testing.assert_close(normed.mean(-1), torch.zeros(16, 65), atol=1e-4, rtol=0)
    assert facts["model"] == "t2t_vit_tiny"
    assert facts["images"] == 16


def test_what_a_run_lacks_is_one_line(trained, tmp_path):
    with pytest.raises(amm_matrices.SettingError, match=r"--layers blocks.9: no dense linear layers .*; it has .*head"):
        amm_matrices.recorded(trained, ["blocks.9"], 1)
    with pytest.raises(amm_matrices.SettingError, match=r"--seeds 23 needs 368 held-out images; digits has only 360"):
        amm_matrices.recorded(trained, ["head"], 23)
    with pytest.raises(amm_matrices.SettingError, match=r"no summary.json; give the folder of a run"):
        amm_matrices.recorded(tmp_path, ["head"], 1)
    shutil.copy(trained / "summary.json", tmp_path)
    with pytest.raises(amm_matrices.SettingError, match=r"last.ckpt' does not exist"):
        amm_matrices.recorded(tmp_path, ["head"], 1)


# --- the program -------------------------------------------------------------------------------------------------


def program(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bench_amm.py", *map(str, words)])
    benchmarking.run_main(bench_amm.main)


def test_files_of_a_run(tmp_path, monkeypatch, capsys):
    few = [get_basis(*spec) for spec in (("als", 2, 4), ("strassen", 2, 7), ("als", 2, 6))]
    monkeypatch.setattr(bench_amm, "bases", lambda: few)
    out = tmp_path / "new" / "amm.json"
    program(monkeypatch, "--size", 96, "--seeds", 2, "--out", out)
    assert "no --run: weights and activations of a trained model are left out" in capsys.readouterr().out
    written = json.loads(out.read_text())
    assert [kind["name"] for kind in written["matrices"]] == [kind.name for kind in amm_matrices.drawn(1)]
    rows = written["matrices"][0]["rows"]
    methods = {"dense", "2:4", "stl", *amm_report.RIVALS}
    assert {row["method"] for row in rows} == methods
    exact = next(row for row in rows if row.get("basis") == "strassen" and row["method"] == "stl")
    assert exact["error_float32"] < 1e-5 < exact["error_bfloat16"]
    assert exact["std_bfloat16"] > 0
    assert exact["macs"] == 48 * 48 * (48 + 4 + 4) * 7
    table = out.with_suffix(".md").read_text()
    assert "| 2, 4 |" in table
    assert "At half the MACs 2:4 has error" in table
    assert 5000 < out.with_suffix(".png").stat().st_size < 200_000
    out.with_suffix(".md").unlink()
    out.with_suffix(".png").unlink()
    program(monkeypatch, "--render", "--out", out)
    assert out.with_suffix(".md").read_text() == table
    assert json.loads(out.read_text()) == written
    assert out.with_suffix(".png").exists()


def test_the_report_that_ships_is_of_the_bases_that_ship():
    path = ROOT / "results" / "amm.json"
    result = json.loads(path.read_text())
    rows = [row for kind in result["matrices"] for row in kind["rows"] if row["method"] == "stl"]
    bases = {(row["basis"], row["tile"], row["rank"]): row["predicted"] for row in rows if row["basis"] == "als"}
    assert len(bases) == sum(len(available_ranks("als", tile)) for tile in bench_amm.TILES)
    for spec, predicted in bases.items():
        assert predicted == pytest.approx(get_basis(*spec).error ** 0.5, rel=1e-4, abs=1e-9)
    assert path.with_suffix(".md").read_text() == amm_report.markdown(result, path)


def test_errors_in_bfloat16_are_in_the_table():
    def row(method, error, **facts):
        return {"method": method, "error_bfloat16": error, "std_bfloat16": None, "mac_fraction": 0.5} | facts

    stl = {"tile": 2, "rank": 4, "macs": 8, "budget": 8, "error_float32": 0.25, "compared": True}
    rows = [row("dense", 0.003), row("2:4", 0.31), row("stl", 0.26, **stl), row("pruned", 0.42, budget=8)]
    said = amm_report.in_bfloat16(rows)
    assert "the dense product has error 0.003 and 2:4 0.310:" in said
    assert "| 2, 4 | 0.500 | 0.260 | – | 0.420 | – | – | – | – |" in said


def test_tables_have_the_best_basis_of_a_rank_where_it_has_rivals():
    def row(tile, rank, basis, fraction, error):
        facts = {"method": "stl", "tile": tile, "rank": rank, "basis": basis, "macs": 1000 * fraction}
        return {**facts, "mac_fraction": fraction, "error_float32": error, "compared": rank == 33}

    rows = [
        row(2, 4, "worse", 0.5, 0.7),
        row(2, 4, "best", 0.5, 0.6),
        row(4, 33, "beaten", 0.6, 0.65),
        row(2, 6, "dear", 0.8, 0.3),
        row(8, 343, "dearer than dense", 1.3, 0.0),
    ]
    assert [r["basis"] for r in amm_report.best_of_each_rank(rows)] == ["best", "beaten", "dear"]
    assert [r["basis"] for r in amm_report.unbeaten(amm_report.best_of_each_rank(rows))] == ["best", "dear"]
    assert [r["basis"] for r in amm_report.compared(rows)] == ["beaten"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "0"], "--size 0 must be a positive number"),
        (["--seeds", "-1"], "--seeds -1 must be a positive number"),
        (["--render", "--out", "none.json"], "--render: none.json holds no measurements; leave it out to measure"),
        (["--out", "amm.png"], "--out amm.png must end in .json; the plot and the table stand beside it"),
    ],
)
def test_bad_input_is_one_line(words, message, monkeypatch):
    with pytest.raises(SystemExit, match=f"^error: {message}$"):
        program(monkeypatch, *words)


def test_every_family_is_measured_at_every_tile_it_has():
    from stl import list_bases

    found = {(basis.name, basis.tile) for basis in bench_amm.bases()}
    assert found == {(name, tile) for tile in bench_amm.TILES for name in list_bases(tile)}
