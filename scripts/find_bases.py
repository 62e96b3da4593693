"""Search for bases: low-rank approximations of the matrix-multiplication tensor with S within a limit.

    python scripts/find_bases.py                                          # the sizes that ship, from nothing
    python scripts/find_bases.py --tile 4 --rank 24 28 --rounds 300 --table outputs/bases/mine.json
    python scripts/find_bases.py --tile 4 --rank 24 --start stl/bases/als.json --table stl/bases/als.json

Every basis found replaces that of its tile and rank in the table if its error is lower. The same settings give the same
bases on the same machine, whatever --table holds. A stopped search goes on with the same command from --state; a round
is seconds. stl/cp/search.py says how it searches.
"""

import argparse
import hashlib
import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from command_line import command_line
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from stl.basis import Basis
from stl.cp.search import Search, Settings, is_better, published
from stl.cp.table import check_size, entry_of, read_table, write_table
from stl.errors import SettingError

# What ships, larger ranks first: their columns are starts for the smaller ones.
SIZES = {
    2: (7, 6, 5, 4),
    3: (23, 22, 21, 20, 18, 15, 12, 9),
    4: (49, 48, 47, 44, 40, 36, 32, 28, 24, 20, 16),
}
NOT_A_STATE = (RuntimeError, OSError, EOFError, LookupError, TypeError, AttributeError, ValueError, pickle.PickleError)
NUMBERS = ("seed", "cycles", "rounds", "chains", "sweeps", "limit")
ABOUT = (
    "Bases of low error with S within a limit, by scripts/find_bases.py: CP decompositions of the t×t×t "
    "matrix-multiplication tensor by alternating least squares, and published schemes that it began with and found "
    "nothing better than, whose provenance names their family. error = |T - T^|^2/t^3; amplification = S."
)


def sizes_of(tiles: list[int] | None, ranks: list[int] | None) -> tuple[tuple[int, int], ...]:
    """The (tile, rank) to search; raises SettingError if one is out of range, or a tile has no ranks of its own."""
    if ranks and (tiles is None or len(tiles) != 1):
        raise SettingError(f"--rank {' '.join(map(str, ranks))} needs one --tile")
    sizes = []
    for tile in tiles or SIZES:
        if not ranks and tile not in SIZES:
            raise SettingError(
                f"--tile {tile} has no list of ranks, only {', '.join(map(str, SIZES))} have; give --rank"
            )
        for rank in sorted(set(ranks or SIZES[tile]), reverse=True):
            check_size(tile, rank)
            sizes.append((tile, rank))
    return tuple(dict.fromkeys(sizes))


def load_state(search: Search, path: Path) -> None:
    """Raises SettingError if it cannot be read or belongs to another search."""
    if not path.exists():
        return
    try:
        search.load_state_dict(torch.load(path, weights_only=True))
    except SettingError as error:
        raise SettingError(f"{str(path)!r} holds another search: {error}; remove it, or give another --state") from None
    except NOT_A_STATE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SettingError(
            f"{str(path)!r} is no state of a search ({reason}); remove it, or give another --state"
        ) from None


def save_state(search: Search, path: Path) -> None:
    """Under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(search.state_dict(), temporary)
    os.replace(temporary, path)


def keep(basis: Basis, path: Path, limit: float, provenance: dict) -> bool:
    """Put it into the table if it is better than the one there; returns whether it was."""
    table = read_table(path) if path.exists() else {}
    size = basis.tile, basis.rank
    if not is_better(basis, table[size].basis if size in table else None, limit):
        return False
    write_table(path, table | {size: entry_of(basis, provenance)}, ABOUT)
    return True


def rounds(search: Search, stop_after: int | None, state: Path) -> Iterator[Basis | None]:
    """The rounds of this call, the state saved behind each of them; gives a basis where a job ends."""
    last = search.settings.total if stop_after is None else min(search.settings.total, search.done + stop_after)
    while search.done < last:
        yield search.step()
        save_state(search, state)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--tile", type=int, nargs="+", help=f"tile sizes; default {' '.join(map(str, SIZES))}")
    parser.add_argument("--rank", type=int, nargs="+", help="ranks, of a single tile size; default: those that ship")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="of all that is random")
    parser.add_argument("--cycles", type=int, default=Settings.cycles, help="times that all sizes are searched")
    parser.add_argument("--rounds", type=int, default=Settings.rounds, help="basin hops of a size in a cycle")
    parser.add_argument("--chains", type=int, default=Settings.chains, help="basin hops side by side")
    parser.add_argument("--sweeps", type=int, default=Settings.sweeps, help="of ALS behind a hop")
    parser.add_argument("--limit", type=float, default=Settings.limit, help="on S")
    parser.add_argument("--start", type=Path, help="a table whose bases are starts as well")
    parser.add_argument("--table", type=Path, default=Path("outputs/bases/als.json"), help="where the best are kept")
    parser.add_argument(
        "--state", type=Path, default=Path("outputs/bases/search.pt"), help="what a stopped one goes on from"
    )
    parser.add_argument("--stop-after", type=int, help="rounds of this call at most")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; small matrices gain little from more")
    parser.add_argument("--device", default="cpu", help="where the sweeps run")
    given = parser.parse_args()
    try:
        for name, low in (("threads", 1), ("stop_after", 0)):
            if (value := getattr(given, name)) is not None and value < low:
                raise SettingError(f"--{name.replace('_', '-')} {value} must be at least {low}")
        torch.set_num_threads(given.threads)
        run(given)
    except (SettingError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"stopped; the same command goes on from {given.state}")


def run(given: argparse.Namespace) -> None:
    settings = Settings(sizes_of(given.tile, given.rank), **{name: getattr(given, name) for name in NUMBERS})
    known = []
    if given.start:
        known = [entry.basis for _, entry in sorted(read_table(given.start).items())]
        digest = hashlib.sha256(given.start.read_bytes()).hexdigest()
        settings = replace(settings, start=str(given.start), start_sha256=digest)
    if given.table.exists():
        read_table(given.table)  # a table that cannot be added to is said before the search
    try:
        torch.zeros(1, device=given.device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(f"--device {given.device} cannot be used: {str(error).splitlines()[0]}") from None
    search = Search(settings, known, given.device)
    load_state(search, given.state)
    lost = sorted(set(search.found) - set(read_table(given.table) if given.table.exists() else ()))
    if lost:
        sizes = ", ".join(f"tile {tile} rank {rank}" for tile, rank in lost)
        raise SettingError(
            f"{str(given.state)!r} has found what {str(given.table)!r} does not hold ({sizes}); give the --table of "
            "that search, or remove the state and search again"
        )
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        bar = progress.add_task("", total=settings.total, completed=search.done)
        place = search.place if not search.finished else None
        for basis in rounds(search, given.stop_after, given.state):
            if basis is not None and place is not None:
                better = keep(basis, given.table, settings.limit, provenance_of(search, place[0], basis))
                said = f"tile {basis.tile} rank {basis.rank}: error {basis.error:.6f} S {basis.amplification:.2f}"
                progress.console.print(f"cycle {place[0] + 1}, {said}{' -> ' + str(given.table) if better else ''}")
            place = search.place if not search.finished else None
            best = f"error {search.errors.min():.4f}" if len(search.errors) else ""
            progress.update(bar, completed=search.done, description=f"{place[1] if place else ''} {best}")
    if search.finished:
        print(f"{given.table}: the search is complete")
    else:
        print(f"{search.done} of {settings.total} rounds; the same command goes on")


def provenance_of(search: Search, cycle: int, basis: Basis) -> dict:
    """How a basis was found: everything to find it again; of a published one, the family that it comes from."""
    if family := published(basis):
        return {"published": family}
    settings = search.settings
    return {
        "command": command_of(settings),
        "seed": settings.seed,
        "found_in_cycle": cycle + 1,
        "starts": 2 * settings.chains * (cycle + 1),
        "hops": settings.rounds * settings.chains * (cycle + 1),
        "start_sha256": settings.start_sha256,
        "device": search.device,
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
    }


def command_of(settings: Settings) -> str:
    """The command line that searches so."""
    words = ["python", "scripts/find_bases.py"]
    tiles = {tile: [rank for other, rank in settings.sizes if other == tile] for tile, _ in settings.sizes}
    if tiles != {tile: list(ranks) for tile, ranks in SIZES.items()}:
        words += ["--tile", *map(str, tiles)]
        for tile, ranks in tiles.items():
            if ranks != list(SIZES.get(tile, ())):
                words += ["--rank", *map(str, ranks)]  # there is one tile, where ranks are given
    words += [f"--{name} {getattr(settings, name)}" for name in NUMBERS]
    return " ".join(words + ([f"--start {settings.start}"] if settings.start else []))


if __name__ == "__main__":
    main()
