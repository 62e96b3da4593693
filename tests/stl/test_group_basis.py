"""The bases that ship as `basis="group"`, and the group algebra below them."""

import json
import math
from importlib.resources import files

import pytest
import torch

import stl.bases.group
from stl import SettingError, get_basis, list_bases
from stl.bases.group import MAPS, abelian_groups, differences, elements, group_basis, read_row, real_rank, transforms
from stl.basis import available_ranks, least_squares_encode_w

ROWS = {(row["tile"], row["rank"]): row for row in json.loads((files("stl.bases") / "group.json").read_text())["bases"]}
GROUPS = [(), (2,), (3,), (4,), (2, 2), (5,), (2, 3), (4, 2), (3, 3), (8, 2), (2, 2, 2, 2)]


def maps(tile: int, orders: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randint(math.prod(orders), (2, tile**2), generator=generator)
    weights = torch.randn(2, tile**2, generator=generator, dtype=torch.float64)
    return places[0], weights[0], places[1], weights[1]


@pytest.mark.parametrize("orders", GROUPS)
def test_the_transforms_multiply_in_the_group_algebra(orders):
    size = math.prod(orders)
    u, v = torch.randn(2, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.zeros(size, dtype=torch.float64)
    numbers = {tuple(element): number for number, element in enumerate(elements(orders).tolist())}
    for g, a in numbers.items():
        for h, b in numbers.items():
            wanted[numbers[tuple((x + y) % n for x, y, n in zip(g, h, orders, strict=True))]] += u[a] * v[b]
    x, w, z = transforms(orders)
    assert x.shape == w.shape == z.shape == (real_rank(orders), size)
    torch.testing.assert_close(z.T @ ((x @ u) * (w @ v)), wanted)


@pytest.mark.parametrize(
    ("orders", "rank"),
    [((), 1), ((2,), 2), ((2, 2, 2, 2), 16), ((3,), 4), ((4,), 5), ((4, 2), 10), ((5,), 7), ((4, 4), 22), ((2, 3), 8)],
)
def test_only_elementary_2_groups_cost_as_many_products_as_they_have_elements(orders, rank):
    assert real_rank(orders) == rank
    assert (rank == math.prod(orders)) == all(order == 2 for order in orders)


def test_every_abelian_group_is_listed_once():
    sizes = [math.prod(orders) for orders in abelian_groups(64)]
    # Groups of large order have too many products, all but Z2^m; of orders 1 to 16 all are there.
    assert [sizes.count(size) for size in range(1, 17)] == [1, 1, 1, 2, 1, 1, 1, 3, 2, 1, 1, 2, 1, 1, 1, 5]
    assert len(set(abelian_groups(64))) == len(sizes)
    assert all(real_rank(orders) <= 27 for orders in abelian_groups(27))


@pytest.mark.parametrize("tile", [2, 4])
def test_hadamard_is_the_case_of_plain_index_maps(tile):
    bits = (2,) * (2 * (tile.bit_length() - 1))
    entries, ones = torch.arange(tile**2), torch.ones(tile**2, dtype=torch.float64)
    ours, theirs = group_basis(bits, tile, (entries, ones, entries, ones)), get_basis("hadamard", tile, tile**2)
    order = (theirs.encode_x @ ours.encode_x.T).argmax(1)
    for role in ("encode_x", "encode_w", "decode"):
        torch.testing.assert_close(getattr(ours, role)[order], getattr(theirs, role), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("orders", "tile"), [((2, 2, 2, 2), 4), ((2, 2, 2), 3), ((2,), 2)])
def test_w_is_the_least_squares_one(orders, tile):
    basis = group_basis(orders, tile, maps(tile, orders))
    torch.testing.assert_close(basis.encode_w, least_squares_encode_w(basis.encode_x, basis.decode))


@pytest.mark.parametrize("orders", [(3, 3), (4, 2), (5,)])
def test_no_step_of_w_in_the_group_algebra_lowers_the_error(orders):
    basis, (_, to_w, _) = group_basis(orders, 3, maps(3, orders)), transforms(orders)
    generator = torch.Generator().manual_seed(1)
    for scale in (1e-3, 1e-1):
        step = scale * torch.randn(math.prod(orders), 9, generator=generator, dtype=torch.float64)
        other = type(basis)("other", 3, basis.rank, basis.encode_x, basis.encode_w + to_w @ step, basis.decode)
        assert other.error > basis.error


@pytest.mark.parametrize("tile", [2, 3, 4])
def test_the_ranks_are_the_real_ranks_of_the_abelian_groups(tile):
    assert available_ranks("group", tile) == sorted({real_rank(orders) for orders in abelian_groups(tile**3)})
    assert {rank for size, rank in ROWS if size == tile} == set(available_ranks("group", tile))


def test_a_missing_rank_is_answered_with_what_exists():
    assert "group" not in list_bases(4, 18)
    with pytest.raises(SettingError, match=r"basis='group' has no tile=4 rank=18; it has tile=2: rank 1-2, 4-5, 7-8; "):
        get_basis("group", 4, 18)
    with pytest.raises(SettingError, match="rank=0 must be a positive whole number"):
        get_basis("group", 4, 0)
    with pytest.raises(SettingError, match="has no tile=4 rank=65"):
        get_basis("group", 4, 65)


@pytest.mark.parametrize(("tile", "rank"), sorted(ROWS))
def test_stored_error_and_s_are_those_of_the_matrices(tile, rank):
    basis, row = get_basis("group", tile, rank), ROWS[tile, rank]
    assert basis.error == pytest.approx(row["error"], rel=1e-9, abs=1e-20)
    assert basis.amplification == pytest.approx(row["amplification"], rel=1e-9)
    assert basis.amplification <= 64
    assert {"command", "seed", "chains", "steps", "limit", "date", "torch"} == set(row["provenance"])


def test_what_is_known_of_errors():
    # The first search of Z2^4 knew .706; signs alone end at .75, the error of hadamard.
    assert get_basis("group", 4, 16).error < 0.706
    assert get_basis("group", 4, 32).error < get_basis("products", 4, 32).error
    for tile in (2, 4):
        assert get_basis("group", tile, tile**3).error == 0
        assert ROWS[tile, tile**3]["group"] == [2] * (3 * (tile.bit_length() - 1))  # the triple product property


def test_a_changed_file_is_refused(monkeypatch):
    good = ROWS[2, 4]
    read_row(good, "here")
    changes = {
        "here: rank=0 must lie between 1 and t³ = 8": {"rank": 0},
        "here: rank=9 must lie between 1 and t³ = 8": {"rank": 9},
        "here, tile=2 rank=4: group=[2, '2'] is not a list of orders above 1": {"group": [2, "2"]},
        "here, tile=2 rank=4: group=[4] has real rank 5": {"group": [4]},
        "here, tile=2 rank=4: places_x has 3 numbers, not tile² = 4": {"places_x": [0, 1, 2]},
        "here, tile=2 rank=4: places_y is not a list of whole numbers": {"places_y": [0, 1, 2, 1.5]},
        "here, tile=2 rank=4: places_y has elements beyond 0 to 3": {"places_y": [0, 1, 2, 4]},
        "here, tile=2 rank=4: weights_x is not a list of finite numbers": {"weights_x": None},
        "here, tile=2 rank=4: weights_y is not a list of finite numbers": {"weights_y": [float("nan")] * 4},
        "here, tile=2 rank=4: error is said to be 0.25 and is 0.4": {"error": 0.25},
        "here, tile=2 rank=4: amplification is said to be 2.0 and is ": {"amplification": 2.0},
    }
    for said, change in changes.items():
        with pytest.raises(SettingError) as caught:
            read_row(good | change, "here")
        assert str(caught.value).startswith(said)
        assert "\n" not in str(caught.value)
    rows = {(2, 4): good | {"group": [4]}}
    for module in (stl.bases.group, stl.cp.table):
        monkeypatch.setattr(module, "shipped", lambda name: rows)
    stl.basis._build.cache_clear()
    with pytest.raises(SettingError, match=r"stl/bases/group\.json, tile=2 rank=4: group=\[4\]"):
        get_basis("group", 2, 4)
    stl.basis._build.cache_clear()


def test_differences_are_those_of_the_elements():
    all_, table = elements((4, 3)), differences((4, 3))
    assert table.shape == (12, 12)
    assert torch.equal(all_[table], (all_[:, None] - all_[None]) % torch.tensor([4, 3]))
    assert set(MAPS) <= set(ROWS[4, 16])
