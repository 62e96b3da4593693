import pytest
import torch

from stl import SettingError
from stl.bases.group import group_basis
from stl.cp.index_maps import Chains, Settings, search

QUICK = Settings(chains=8, steps=40)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("orders", "tile"), [((2, 2, 2), 2), ((4,), 2), ((3, 3), 3), ((2, 2, 2, 2), 4), ((), 2)])
def test_what_a_chain_is_said_to_have_is_what_its_basis_has(orders, tile):
    chains = Chains(orders, tile)
    maps = chains.start(6, seeded())
    maps = maps[0], maps[1] * torch.rand(maps[1].shape, generator=seeded(1)).double(), *maps[2:]
    served, amplification = chains.served(maps), chains.amplification(maps)
    for index in range(6):
        basis = group_basis(orders, tile, tuple(values[index] for values in maps))
        assert served[index].item() == pytest.approx((1 - basis.error) * tile**3)
        assert amplification[index].item() == pytest.approx(basis.amplification)


def test_annealing_and_weights_only_ever_gain():
    chains, generator = Chains((2, 2, 2, 2), 4), seeded()
    start = chains.start(16, generator)
    annealed = chains.anneal(start, 100, generator)
    weighed = chains.weigh(annealed, 64, generator)
    served = [chains.served(maps) for maps in (start, annealed, weighed)]
    assert (served[1] >= served[0]).all()
    assert served[1].mean() > served[0].mean()
    assert (served[2] >= served[1]).all()
    assert served[2].max() > served[1].max()
    assert chains.amplification(weighed).max() <= 64


def test_structured_starts_find_the_triple_product_property():
    basis, (_, weights_x, _, weights_y) = search((2, 2, 2), 2, QUICK)
    assert basis.error == 0
    assert weights_x.abs().eq(1).all()
    assert weights_y.abs().eq(1).all()


def test_the_same_settings_give_the_same_maps_and_others_others():
    torch.manual_seed(3)
    first, again, other = (search((3,), 2, settings)[1] for settings in (QUICK, QUICK, Settings(1, 8, 40)))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_limit_on_s_holds():
    for limit in (1.0, 4.0):
        found = search((2, 2), 2, Settings(chains=16, steps=100, limit=limit))
        assert found is not None
        assert found[0].amplification <= limit


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"chains": 0}, "chains=0 must be at least 1"),
        ({"steps": -1}, "steps=-1 must be at least 0"),
        ({"limit": 0.5}, r"limit=0\.5 must be at least 1"),
        ({"limit": float("nan")}, "limit=nan must be at least 1"),
    ],
)
def test_a_setting_out_of_range_is_refused(changed, said):
    with pytest.raises(SettingError, match=said):
        Settings(**changed)
