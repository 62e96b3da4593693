"""The search for the index maps of the family `group`: simulated annealing over maps with signs, then real weights.

Side by side in the batch stand independent chains. Half of them begin at random; the other half at maps p(i) + q(k) for
X and p(i) + r(j) for Y with random p, q, r, which put all products of W_kj at r(j) − q(k), as the subsets of Cohn and
Umans do. A step moves one entry of X or Y to a random element with a random sign (Kirkpatrick, Gelatt, Vecchi,
"Optimization by simulated annealing", Science 220, 1983). Afterwards the signs of all chains become real weights, by
alternating least squares with the maps held: each of the three is linear, and its normal matrix diagonal. The error
often has no minimum there, only an infimum that S grows towards without bound: the best within the limit is kept.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from stl.bases.group import TINY, Maps, differences, encode, fit_w, group_basis, scalar_products
from stl.basis import Basis
from stl.errors import SettingError

HOT, COLD = 0.25, 0.03  # temperatures of the first and the last step, in scalar products of the t³
WEIGHING = 300  # rounds of least squares
NOISE = 0.3  # on signs, where weights begin
LOOK_EVERY = 2  # rounds between two looks at S
SLACK = 1e-4  # relative, of the limit on S: for what rounding the weights changes
DRAWS = 64  # structured maps drawn for every one that a chain starts from
DECIMALS = 6  # of the weights
GAIN = 1e-9  # in scalar products: what is less is rounding


@dataclass(frozen=True)
class Settings:
    """What a search depends on; `limit` is the one on S. Raises SettingError for a setting out of range."""

    seed: int = 0
    chains: int = 128
    steps: int = 3000
    limit: float = 64.0

    def __post_init__(self) -> None:
        for name, low in (("seed", 0), ("chains", 1), ("steps", 0), ("limit", 1)):
            if not getattr(self, name) >= low:
                raise SettingError(f"{name}={getattr(self, name)} must be at least {low}")


class Chains:
    """Index maps of tile t over one group, side by side."""

    def __init__(self, orders: tuple[int, ...], tile: int) -> None:
        self.orders, self.tile, self.table = orders, tile, differences(orders)
        self.x, self.w, self.y = scalar_products(tile)

    def start(self, chains: int, generator: Generator) -> Maps:
        """Random maps with random signs in every other chain; in the rest structured ones, first the best of many."""
        size, shape = len(self.table), (chains, self.tile**2)
        maps = (*_signed(size, shape, generator), *_signed(size, shape, generator))
        drawn = DRAWS * (chains // 2)
        p, minus_q, minus_r = torch.randint(size, (3, drawn, self.tile), generator=generator)
        places_x, places_y = (self.table[p[:, :, None], other[:, None]].flatten(1) for other in (minus_q, minus_r))
        ones = torch.ones(places_x.shape, dtype=torch.float64)
        structured = places_x, ones, places_y, ones
        kept = torch.arange(chains // 2)  # the best of all drawn is often a trap: a few chains begin there
        few = -(-len(kept) // 8)
        kept[:few] = self.served(structured).argsort(descending=True, stable=True)[:few]
        for values, ours in zip(maps, structured, strict=True):
            values[1::2] = ours[kept]
        return maps

    def served(self, maps: Maps) -> Tensor:
        """t³·(1 − error) of every chain: how much of the t³ scalar products it computes."""
        _, sums, norm = fit_w(self.orders, self.tile, maps)
        return (sums.square().sum(2) / norm.clamp_min(TINY)).sum(1)

    def anneal(self, maps: Maps, steps: int, generator: Generator) -> Maps:
        """The best maps that every chain met."""
        chains, entries = maps[0].shape
        now = self.served(maps)
        best, best_served, every = maps, now, torch.arange(chains)
        for step in range(steps):
            temperature = HOT * (COLD / HOT) ** (step / steps)
            entry = torch.randint(entries, (chains,), generator=generator)
            of_x = torch.randint(0, 2, (chains,), generator=generator) == 1
            place, sign = _signed(len(self.table), (chains,), generator)
            a, b, c, d = (values.clone() for values in maps)
            tried = a, b, c, d
            for values, own, new in zip(tried, (of_x, of_x, ~of_x, ~of_x), (place, sign, place, sign), strict=True):
                values[every[own], entry[own]] = new[own]
            served = self.served(tried)
            chance = torch.rand(chains, generator=generator, dtype=torch.float64)
            taken = chance < ((served - now) / temperature).exp()
            maps, now = _where(taken, tried, maps), torch.where(taken, served, now)
            better = now > best_served + GAIN
            best, best_served = _where(better, maps, best), torch.where(better, now, best_served)
        return best

    def amplification(self, maps: Maps) -> Tensor:
        """S of every chain."""
        x, w, y = (matrix.square().sum(2) for matrix in encode(self.orders, self.tile, maps))
        return (x * w * y).sum(1) / self.tile**3

    def weigh(self, maps: Maps, limit: float, generator: Generator) -> Maps:
        """Real weights in place of the signs: of every chain the best met with S ≤ limit, or else as it came.

        Symmetric maps are saddle points, which a little noise leaves.
        """
        best, best_served = maps, torch.where(self.amplification(maps) <= limit, self.served(maps), -torch.inf)
        places_x, weights_x, places_y, weights_y = maps
        noise = NOISE * torch.randn(2, *weights_x.shape, generator=generator, dtype=torch.float64)
        maps = places_x, weights_x + noise[0], places_y, weights_y + noise[1]
        for step in range(WEIGHING):
            maps = self._weigh_y(self._weigh_x(maps))
            if step % LOOK_EVERY == 0:
                served = torch.where(self.amplification(maps) <= limit, self.served(maps), -torch.inf)
                better = served > best_served + GAIN
                best, best_served = _where(better, maps, best), torch.where(better, served, best_served)
        return best

    def _weigh_x(self, maps: Maps) -> Maps:
        places_x, weights_x, places_y, weights_y = maps
        weight_w, square_w = self._fit_w(maps)
        target = torch.zeros_like(weights_x).index_add_(1, self.x, weight_w * weights_y[:, self.y])
        norm = (square_w * weights_y.square()[:, :, None]).sum(1)
        return places_x, unit_peak(target / norm.clamp_min(TINY)), places_y, weights_y

    def _weigh_y(self, maps: Maps) -> Maps:
        places_x, weights_x, places_y, weights_y = maps
        weight_w, square_w = self._fit_w(maps)
        target = torch.zeros_like(weights_y).index_add_(1, self.y, weight_w * weights_x[:, self.x])
        norm = (square_w * weights_x.square()[:, None]).sum(2)
        return places_x, weights_x, places_y, unit_peak(target / norm.clamp_min(TINY))

    def _fit_w(self, maps: Maps) -> tuple[Tensor, Tensor]:
        """The least-squares W: its weight in each of the t³ scalar products, its squared length at each [Y, X]."""
        apart, sums, norm = fit_w(self.orders, self.tile, maps)
        in_w = sums / norm.clamp_min(TINY)[:, :, None]
        at = apart[:, self.y, self.x] * self.tile**2 + self.w
        return in_w.flatten(1).gather(1, at), in_w.square().sum(2).gather(1, apart.flatten(1)).view_as(apart)


def _signed(size: int, shape: tuple[int, ...], generator: Generator) -> tuple[Tensor, Tensor]:
    """Random places among `size` elements, and random signs."""
    signs = torch.randint(0, 2, shape, generator=generator).double() * 2 - 1
    return torch.randint(size, shape, generator=generator), signs


def unit_peak(weights: Tensor) -> Tensor:
    """Scaled to a largest magnitude of 1 in every chain; W takes the scale up."""
    return weights / weights.abs().amax(1, keepdim=True).clamp_min(TINY)


def _where(chosen: Tensor, ours: Maps, theirs: Maps) -> Maps:
    a, b, c, d = (torch.where(chosen[:, None], new, old) for new, old in zip(ours, theirs, strict=True))
    return a, b, c, d


def search(orders: tuple[int, ...], tile: int, settings: Settings) -> tuple[Basis, Maps] | None:
    """The basis of the smallest error with S ≤ limit that the chains ended in, and its maps, each of shape (t²,).

    None if no chain ended within the limit.
    """
    generator = Generator().manual_seed(settings.seed)
    chains = Chains(orders, tile)
    signed = chains.anneal(chains.start(settings.chains, generator), settings.steps, generator)
    a, b, c, d = chains.weigh(signed, settings.limit * (1 - SLACK), generator)
    ended = a, b.round(decimals=DECIMALS), c, d.round(decimals=DECIMALS)
    served = torch.where(chains.amplification(ended) <= settings.limit, chains.served(ended), -torch.inf)
    best = int(served.argmax())
    a, b, c, d = (values[best] for values in ended)
    return (group_basis(orders, tile, (a, b, c, d)), (a, b, c, d)) if served[best] > -torch.inf else None
