import io

import pytest
import torch

from stl import Basis, SettingError, get_basis
from stl.cp.search import DECIMALS, Search, Settings, hash_of, is_better, shorten

QUICK = Settings(sizes=((2, 7), (2, 5), (4, 16)), cycles=2, rounds=5, chains=8, sweeps=10)


def finish(search: Search) -> Search:
    while not search.finished:
        search.step()
    return search


def saved(search: Search) -> dict:
    """What comes back of its state out of a file."""
    file = io.BytesIO()
    torch.save(search.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_bases(ours: Search, theirs: Search) -> None:
    assert ours.found.keys() == theirs.found.keys()
    for size, basis in ours.found.items():
        for role in ("encode_x", "encode_w", "decode"):
            assert torch.equal(getattr(basis, role), getattr(theirs.found[size], role))


@pytest.fixture(scope="module")
def uninterrupted() -> Search:
    return finish(Search(QUICK))


def test_the_same_seed_gives_the_same_bases_to_the_bit_and_another_others(uninterrupted):
    torch.manual_seed(5)
    assert_same_bases(finish(Search(QUICK)), uninterrupted)
    other = finish(Search(Settings(**{**vars(QUICK), "sizes": ((2, 5),), "seed": 1})))
    assert not torch.equal(other.found[2, 5].encode_x, uninterrupted.found[2, 5].encode_x)


@pytest.mark.parametrize("rounds", [1, 10])
def test_an_interrupted_search_ends_where_it_would_have_ended(rounds, uninterrupted):
    search = Search(QUICK)
    while not search.finished:
        for _ in range(min(rounds, QUICK.total - search.done)):
            search.step()
        state = saved(search)
        search = Search(QUICK)
        search.load_state_dict(state)
    assert_same_bases(search, uninterrupted)


def test_bases_are_within_the_limit_and_short_unless_they_are_exact(uninterrupted):
    assert uninterrupted.found.keys() == set(QUICK.sizes)
    for (tile, rank), basis in uninterrupted.found.items():
        assert (basis.tile, basis.rank) == (tile, rank)
        assert basis.amplification <= QUICK.limit
        assert basis.exact == (rank == 7)
        assert basis.exact or torch.equal(basis.decode, basis.decode.round(decimals=DECIMALS))


def test_rounds_improve_on_the_starts():
    settings = Settings(sizes=((3, 12),), cycles=1, rounds=12, chains=8, sweeps=30)
    search, errors = Search(settings), []
    for _ in range(settings.total - 1):
        search.step()
        errors.append(search.errors.min().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_what_is_known_and_found_is_a_start(uninterrupted):
    known = get_basis("products", 4, 60)
    search = Search(QUICK, [known])
    search.found = dict(uninterrupted.found)
    ranks = [len(f[0]) for f in search._starting_points(4)]
    assert {48, 49, 60, 16, 7 * 5, 5 * 5} <= set(ranks)
    assert {len(f[0]) for f in search._starting_points(2)} == {7, 5}
    assert search._starting_points(3) == []


def test_bases_given_as_starts_stay_with_a_state():
    settings = Settings(sizes=((2, 6),), cycles=1, rounds=1, chains=2, sweeps=5, start="theirs.json")
    begun = Search(settings, [get_basis("products", 2, 6)])
    begun.step()
    resumed = Search(settings, [])
    resumed.load_state_dict(saved(begun))
    assert_same_bases(finish(resumed), finish(begun))
    assert [basis.rank for basis in resumed.known] == [6]


def test_a_state_of_another_search_is_refused_with_both_sides():
    state = saved(Search(QUICK))
    other = Search(Settings(**{**vars(QUICK), "seed": 3, "limit": 8.0}))
    with pytest.raises(SettingError, match=r"begun otherwise: seed was 0, is 3; limit was 64\.0, is 8\.0$"):
        other.load_state_dict(state)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"sizes": ()}, "nothing to search"),
        ({"sizes": ((4, 0),)}, "rank=0 must lie between 1 and t³ = 64"),
        ({"sizes": ((4, 65),)}, "rank=65 must lie between 1 and t³ = 64"),
        ({"sizes": ((0, 4),)}, "tile=0 must be a positive whole number"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"rounds": -1}, "rounds=-1 must be at least 0"),
        ({"chains": 0}, "chains=0 must be at least 1"),
        ({"sweeps": 0}, "sweeps=0 must be at least 1"),
        ({"cycles": 0}, "cycles=0 must be at least 1"),
        ({"limit": 0.5}, r"limit=0\.5 must be at least 1"),
        ({"limit": float("nan")}, "limit=nan must be at least 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(changed, said):
    with pytest.raises(SettingError, match=said):
        Settings(**{**vars(QUICK), **changed})


def test_which_of_two_bases_is_better():
    near, far = get_basis("products", 2, 7), get_basis("products", 2, 5)
    strassen, plain = get_basis("strassen", 2, 7), get_basis("products", 2, 8)
    assert is_better(near, None, 64)
    assert is_better(near, far, 64)
    assert not is_better(far, near, 64)
    assert not is_better(near, near, 64)
    assert is_better(strassen, near, 4)
    assert not is_better(strassen, near, 3.9)
    assert is_better(near, strassen, 3.9)  # the limit comes first
    assert not is_better(plain, strassen, 64)
    rough = Basis("rough", 2, 7, strassen.encode_x * (1 + 1e-13), strassen.encode_w, strassen.decode)
    rougher = Basis("rougher", 2, 7, strassen.encode_x * (1 + 1e-12), strassen.encode_w, strassen.decode)
    assert rough.exact
    assert is_better(strassen, rough, 64)
    assert not is_better(rough, rougher, 64)


def test_an_exact_basis_gets_signs_and_an_inexact_one_few_decimals(monkeypatch):
    third = Basis("third", 1, 1, *(torch.full((1, 1), value, dtype=torch.float64) for value in (3, 1 / 3, 1)))
    signs = shorten(third)
    assert [signs.encode_x.item(), signs.encode_w.item(), signs.decode.item()] == [1, 1, 1]
    with monkeypatch.context() as patch:
        patch.setattr("stl.cp.search.discretise", lambda basis: None)
        assert shorten(third) is third
    inexact = Basis("inexact", 1, 1, *(torch.full((1, 1), value, dtype=torch.float64) for value in (2, 1 / 3, 1)))
    assert shorten(inexact).encode_w.item() == 0.333333333


def test_seeds_differ_wherever_a_number_does():
    seeds = {
        hash_of((seed, cycle, 4, rank, step))
        for seed in range(3)
        for cycle in range(3)
        for rank in range(9)
        for step in range(9)
    }
    assert len(seeds) == 3 * 3 * 9 * 9
    assert all(0 <= seed < 2**63 for seed in seeds)
