"""Where a search starts, and the hops by which it goes on. All factors are in the cyclic form of als.py."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from stl.bases.frame import tight_frame
from stl.cp.als import Factors, balance

ABOVE, BELOW = 24, 4  # how many columns too many, or too few, a known decomposition may have to start from


def gaussian(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def uniform(generator: Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand(1, generator=generator, dtype=torch.float64).item()


def pick(generator: Generator, count: int) -> int:
    return int(torch.randint(count, (1,), generator=generator))


def random_start(tile: int, rank: int, generator: Generator) -> Factors:
    return [gaussian(generator, rank, tile**2) / tile for _ in range(3)]


def hadamard_start(tile: int, rank: int, generator: Generator) -> Factors:
    """Rows of an orthonormal transform, or sums and differences of two, plus noise.

    The transform is Walsh–Hadamard over tokens ⊗ features where t is a power of two, the cosine transform otherwise.
    """
    rows = tight_frame(tile, tile**2)
    noise = 10 ** uniform(generator, -2, -0.5)
    summands = 1 + pick(generator, 2)
    factors = []
    for _ in range(3):
        total = noise * gaussian(generator, rank, tile**2) / tile
        for _ in range(summands):
            order = torch.cat([torch.randperm(tile**2, generator=generator) for _ in range(-(-rank // tile**2))])
            signs = torch.randint(0, 2, (rank, 1), generator=generator, dtype=torch.float64) * 2 - 1
            total = total + signs * rows[order[:rank]] / summands**0.5
        factors.append(total)
    return factors


def known_start(known: Factors, rank: int, generator: Generator) -> Factors:
    """A decomposition of another rank with random columns dropped, or random ones appended, plus noise or none."""
    size = len(known[0])
    kept = torch.randperm(size, generator=generator)[:rank].sort().values
    noise = 10 ** uniform(generator, -3, -0.5) if pick(generator, 2) else 0.0
    factors = []
    for f in balance(known):
        fresh = gaussian(generator, max(0, rank - size), f.shape[1]) * 0.3 / f.shape[1] ** 0.5
        rows = torch.cat([f[kept], fresh])
        factors.append(rows + noise * gaussian(generator, *rows.shape) / f.shape[1] ** 0.5)
    return factors


def start_batch(tile: int, rank: int, count: int, known: Sequence[Factors], generator: Generator) -> Factors:
    """`count` starts side by side, each factor (count, rank, t²): half from known decompositions, where there are any
    of a rank near enough, a quarter random, a quarter from Hadamard rows. A known one of this rank comes as it is too.
    """
    same = [f for f in known if len(f[0]) == rank]
    near = [f for f in known if rank - BELOW <= len(f[0]) <= rank + ABOVE]
    starts = same[:count]
    for i in range(len(starts), count):
        if near and i % 2:
            starts.append(known_start(near[pick(generator, len(near))], rank, generator))
        else:
            starts.append((random_start if i % 4 else hadamard_start)(tile, rank, generator))
    return [torch.stack([start[role] for start in starts]) for role in range(3)]


def hop(factors: Factors, generator: Generator) -> Factors:
    """A basin hop of every start of the batch: a few columns replaced by random ones, a few dropped (replaced by
    short random ones, which grow anew from what is missing), or all perturbed.

    Basin hopping: Wales, Doye, J. Phys. Chem. A 101 (1997).
    """
    moved = balance(factors)
    count, rank, size = factors[0].shape
    for i in range(count):
        kind = pick(generator, 3)
        if kind == 2:
            scale = 10 ** uniform(generator, -1.5, 0)
            for f in moved:
                f[i] += (scale * gaussian(generator, rank, size) / size**0.5).to(f)
            continue
        columns = torch.randperm(rank, generator=generator)[: 1 + pick(generator, min(4, rank))]
        for f in moved:
            fresh = gaussian(generator, len(columns), size) * (1.0 if kind else 0.01)
            f[i, columns.to(f.device)] = fresh.to(f)
    return moved
