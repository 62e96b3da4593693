"""The search for bases over a list of sizes, in rounds; between two rounds it can be saved and gone on from.

A *job* is one (tile, rank) in one *cycle*. Its first round descends from many starts and keeps the best as chains;
every further round hops from each chain to a new basin and keeps what is better; the last one polishes the best chain.
What the jobs before it found is among the starts: a larger rank with columns dropped, a smaller one with columns added,
Kronecker products of tile 2 for tile 4. An exact basis ends with entries 0, 1 and −1 where that succeeds. The
random numbers of a round depend on seed, job and round alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor

from stl.basis import Basis, get_basis, list_bases
from stl.cp.als import Factors, from_basis, minimise, to_basis
from stl.cp.discretise import discretise
from stl.cp.starts import hop, start_batch
from stl.cp.table import ROLES, check_size
from stl.errors import SettingError

RIDGE = 1e-3  # at the beginning of a descent; a large one (0.1) leads to plain scalar products
POLISH = 10  # times the sweeps of a hop; and a start gets twice those of a hop
DECIMALS = 9  # of the factors of an inexact basis: short to write, and the error changes by less than 1e-8
EXACT = 1e-12  # the error below which a decomposition is on its way to an exact one, and hopping ends
TAKEOVER = 5  # rounds after which the best eighth of the chains replaces the worst


@dataclass(frozen=True)
class Settings:
    """What a search depends on: the same settings give the same bases on the same machine.

    `sizes` are (tile, rank) in the order in which they are searched, `limit` is the one on S, and `start` names the
    file of the bases given as further starts, if any, with the digest it had. Raises SettingError for a setting out of
    range.
    """

    sizes: tuple[tuple[int, int], ...]
    seed: int = 0
    cycles: int = 2
    rounds: int = 100
    chains: int = 32
    sweeps: int = 200
    limit: float = 64.0
    start: str | None = None
    start_sha256: str | None = None

    def __post_init__(self) -> None:
        if not self.sizes:
            raise SettingError("there is nothing to search: give a tile and a rank")
        for tile, rank in self.sizes:
            check_size(tile, rank)
        for name, low in (("seed", 0), ("cycles", 1), ("rounds", 0), ("chains", 1), ("sweeps", 1)):
            if getattr(self, name) < low:
                raise SettingError(f"{name}={getattr(self, name)} must be at least {low}")
        if not self.limit >= 1:
            raise SettingError(f"limit={self.limit} must be at least 1: plain multiplication has S = 1")

    @property
    def total(self) -> int:
        """Rounds of the whole search: per job, the starts, the hops and the polish."""
        return self.cycles * len(self.sizes) * (self.rounds + 2)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"sizes": [list(size) for size in self.sizes]}


@dataclass
class Search:
    """A search between two rounds: `done` of `settings.total` rounds, the chains of the job, and the best so far.

    `known` are bases given as further starts. `found` holds, by (tile, rank), the best factors of shape (rank, t²).
    """

    settings: Settings
    known: Sequence[Basis] = ()
    device: str = "cpu"
    done: int = 0
    chains: Factors = field(default_factory=list)
    errors: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    found: dict[tuple[int, int], Basis] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.done == self.settings.total

    @property
    def place(self) -> tuple[int, tuple[int, int], int]:
        """(cycle, (tile, rank), round in the job) of the next round."""
        job, step = divmod(self.done, self.settings.rounds + 2)
        cycle, index = divmod(job, len(self.settings.sizes))
        return cycle, self.settings.sizes[index], step

    def step(self) -> Basis | None:
        """One round; at the end of a job the job's basis."""
        cycle, size, step = self.place
        tile, rank = size
        seeds = (self.settings.seed, cycle, tile, rank, step)
        generator = Generator().manual_seed(hash_of(seeds))
        self.done += 1
        if step == 0:
            self._start(tile, rank, generator)
        elif step <= self.settings.rounds:
            if self.errors.min() > EXACT:
                self._hop(generator)
            if step % TAKEOVER == 0:
                self._take_over()
        else:
            return self._finish(size)
        return None

    def _descend(self, factors: Factors, sweeps: int) -> tuple[Factors, Tensor]:
        moved = [f.to(self.device) for f in factors]
        best, errors = minimise(moved, RIDGE, sweeps, self.settings.limit)
        return [f.cpu() for f in best], errors.cpu()

    def _start(self, tile: int, rank: int, generator: Generator) -> None:
        count = 2 * self.settings.chains
        starts = start_batch(tile, rank, count, self._starting_points(tile), generator)
        factors, errors = self._descend(starts, 2 * self.settings.sweeps)
        order = errors.argsort(stable=True)[: self.settings.chains]
        self.chains, self.errors = [f[order] for f in factors], errors[order]

    def _starting_points(self, tile: int) -> list[Factors]:
        bases = [*exact_bases(tile), *self.known, *self.found.values()]
        here = [basis for basis in bases if basis.tile == tile]
        halves = [basis for basis in bases if basis.tile**2 == tile and tile > 1]
        here += [outer.kron(inner) for outer in halves for inner in halves]
        return [from_basis(basis) for basis in here]

    def _hop(self, generator: Generator) -> None:
        factors, errors = self._descend(hop(self.chains, generator), self.settings.sweeps)
        better = errors < self.errors
        self.errors = torch.where(better, errors, self.errors)
        pairs = zip(factors, self.chains, strict=True)
        self.chains = [torch.where(better[:, None, None], new, old) for new, old in pairs]

    def _take_over(self) -> None:
        order, count = self.errors.argsort(stable=True), self.settings.chains // 8
        for values in (*self.chains, self.errors):
            values[order[len(order) - count :]] = values[order[:count]]

    def _finish(self, size: tuple[int, int]) -> Basis:
        best = int(self.errors.argmin())
        single = [f[best : best + 1] for f in self.chains]
        polished, errors = self._descend(single, POLISH * self.settings.sweeps)
        if errors[0] <= self.errors[best]:
            single = polished
        basis = shorten(to_basis([f[0] for f in single]))
        if is_better(basis, self.found.get(size), self.settings.limit):
            self.found[size] = basis
        self.chains, self.errors = [], torch.empty(0, dtype=torch.float64)
        return self.found.get(size, basis)

    def state_dict(self) -> dict[str, Any]:
        """All of it, in types that `torch.load(weights_only=True)` reads."""
        found = {size: [b.encode_x, b.encode_w, b.decode] for size, b in self.found.items()}
        known = [[b.tile, b.rank, b.encode_x, b.encode_w, b.decode] for b in self.known]
        return {
            "settings": self.settings.to_dict(),
            "known": known,
            "done": self.done,
            "chains": self.chains,
            "errors": self.errors,
            "found": found,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, with the known bases it has.

        Raises SettingError, which names both sides, if it was begun with other settings.
        """
        theirs, ours = state["settings"], self.settings.to_dict()
        ours["start_sha256"] = theirs.get("start_sha256")  # that file may be the table that the search adds to
        changed = [f"{key} was {theirs.get(key)}, is {now}" for key, now in ours.items() if theirs.get(key) != now]
        if changed:
            raise SettingError(f"the search was begun otherwise: {'; '.join(changed)}")
        self.settings = replace(self.settings, start_sha256=ours["start_sha256"])
        self.done, self.chains, self.errors = state["done"], state["chains"], state["errors"]
        self.known = [Basis("known", *values) for values in state["known"]]
        self.found = {(t, r): Basis("als", t, r, *matrices) for (t, r), matrices in state["found"].items()}


def hash_of(numbers: tuple[int, ...]) -> int:
    """One seed out of several, the same on every machine (FNV-1a over the numbers)."""
    value = 0xCBF29CE484222325
    for number in numbers:
        value = (value ^ number) * 0x100000001B3 % 2**64
    return value >> 1


def exact_bases(tile: int) -> list[Basis]:
    """The exact bases of this tile size that were published, each a start for the ranks around it."""
    families = [("strassen", 7), ("strassen", 49), ("exact48", 48)]
    return [get_basis(name, tile, rank) for name, rank in families if name in list_bases(tile, rank)]


def published(basis: Basis) -> str | None:
    """The family of the exact basis that this one is, matrix by matrix; None for what a search found."""
    for known in exact_bases(basis.tile):
        if known.rank == basis.rank and all(torch.equal(getattr(known, role), getattr(basis, role)) for role in ROLES):
            return known.name
    return None


def shorten(basis: Basis) -> Basis:
    """The same basis with few decimals; an exact one with entries 0, 1 and −1, or as it is where that fails."""
    if basis.exact:
        return discretise(basis) or basis
    short = (m.round(decimals=DECIMALS) + 0.0 for m in (basis.encode_x, basis.encode_w, basis.decode))
    return Basis(basis.name, basis.tile, basis.rank, *short)


def is_better(basis: Basis, than: Basis | None, limit: float) -> bool:
    """Whether it has S ≤ `limit` and a smaller error; of two exact ones, the one whose float64 error is 0 wins."""
    if not basis.amplification <= limit:
        return False
    if than is None or than.amplification > limit:
        return True
    return basis.error < than.error and (basis.error == 0 or not than.exact)
