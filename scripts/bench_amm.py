"""STL as black-box approximate matrix multiplication: how far from X·W at how many multiply-accumulates (MACs).

    python scripts/bench_amm.py                                             # drawn matrices
    python train.py linear=dense && python scripts/bench_amm.py --run outputs/digits/…    # and those of a trained model

One product with a weight W that is known beforehand: preparing W (encoding, pruning, decomposing it) is free, all work
on X counts, encode and decode included. Bases of every family at t = 2, 3, 4, 8 stand beside rivals at the same MACs.
The error is ‖Y − X·W‖/‖X·W‖ against float64, Frobenius, with float32 and with bfloat16 operands; its mean and standard
deviation are over the pairs (X, W), one a seed, and random methods draw anew for each. The predicted error √basis.error
is that of Gaussian matrices in exact arithmetic. Beside --out, a JSON file, stand a plot (.png) and a table (.md), as
--render makes them again from that file without measuring.
"""

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import amm_rivals as rivals
import torch
from amm_matrices import Kind, drawn, recorded
from amm_report import markdown, plot
from amm_rivals import Approximation, Weight
from benchmarking import machine, relative_error, run_main
from command_line import command_line
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.callbacks import write_json
from stl import Basis, SettingError, get_basis, list_bases
from stl.basis import available_ranks

TILES = (2, 3, 4, 8)
MANY = 12  # a family with more ranks of a tile than these is measured at those next to RANKS
RANKS = {2: range(4, 9), 3: range(9, 27, 3), 4: range(16, 64, 8), 8: (64, 128, 192, 256, 343)}
LAYERS = ["blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
DTYPES = (torch.float32, torch.bfloat16)


class BFloat16Products(TorchDispatchMode):
    """Matrix products of bfloat16 as tensor cores compute them: summed in float32 and rounded once.

    The CPU's own give the same up to the order of the sum, and are many times slower where it has no such arithmetic.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) and args[0].dtype == torch.bfloat16:
            return func(*(factor.float() for factor in args)).bfloat16()
        return func(*args, **(kwargs or {}))


def bases() -> list[Basis]:
    """Every family at every tile of TILES, at all its ranks or a spread of them."""
    chosen = []
    for tile in TILES:
        for name in list_bases(tile):
            ranks = available_ranks(name, tile)
            if len(ranks) > MANY:
                ranks = sorted({min(ranks, key=lambda rank: abs(rank - near)) for near in RANKS[tile]})
            chosen += [get_basis(name, tile, rank) for rank in ranks]
    return chosen


def approximations(x: Tensor, w: Tensor, chosen: list[Basis], seed: int) -> Iterator[tuple[int, Approximation]]:
    """All ways of computing X·W, each beside the MACs that it was allowed.

    Of STL those that cost less than the dense product, and the exact ones. Rivals that can cost any number of MACs are
    allowed those of each STL product that no cheaper one is foreseen to match, and half of the dense ones.
    """
    exactly = rivals.dense(x, w)
    yield exactly.macs, exactly
    half = rivals.pruned_2_of_4(x, w)
    yield half.macs, half
    stl = [(basis, rivals.stl(x, w, basis)) for basis in chosen]
    stl = [(basis, way) for basis, way in stl if way.macs < exactly.macs or basis.exact]
    choices = unmatched([(basis, way) for basis, way in stl if way.macs < exactly.macs])
    budgets = {macs for _, macs in choices}
    for _, way in stl:
        yield way.macs, replace(way, facts=way.facts | {"compared": way.macs in budgets})
    weight = Weight(w)
    for budget in sorted(budgets | {exactly.macs // 2}):
        for rival in (
            rivals.pruned(x, w, budget),
            rivals.low_rank(x, weight, budget),
            rivals.low_rank_and_stl(x, weight, budget, choices),
            rivals.largest_columns(x, w, budget),
            rivals.sampled_columns(x, w, budget, seed),
            rivals.sketched(x, w, budget, seed),
        ):
            if rival is not None:
                yield budget, rival


def unmatched(stl: list[tuple[Basis, Approximation]]) -> list[tuple[Basis, int]]:
    """Those that no cheaper one is foreseen to match, and their MACs."""
    kept: list[tuple[Basis, int]] = []
    least = float("inf")
    for basis, way in sorted(stl, key=lambda pair: (pair[1].macs, pair[1].facts["predicted"])):
        if way.facts["predicted"] < least - 1e-6:  # exact to rounding is as good as exact
            kept.append((basis, way.macs))
            least = way.facts["predicted"]
    return kept


def errors(way: Approximation, x: Tensor, exact: Tensor) -> list[float]:
    """The relative error in each of DTYPES."""
    with BFloat16Products():
        return [relative_error([way.product(x.to(dtype))], [exact]) for dtype in DTYPES]


def measure(kind: Kind, chosen: list[Basis], seeds: int) -> dict[str, Any]:
    """The sizes of one kind of matrices, and a row for each way and budget."""
    rows: dict[tuple, dict[str, Any]] = {}
    measured: dict[tuple, list[list[float]]] = {}
    for seed in range(seeds):
        x, w = kind.draw(seed)
        exact, (k, m), n = x @ w, w.shape, x[..., 0].numel()
        for budget, way in approximations(x, w, chosen, seed):
            # A rival may choose otherwise for another pair, as the basis beside a low rank: the row has the first.
            same = (way.facts["tile"], way.facts["rank"], way.facts["basis"]) if way.method == "stl" else ()
            key = (way.method, budget, same)
            costs = {"macs": way.macs, "budget": budget, "mac_fraction": way.macs / (n * k * m)}
            rows.setdefault(key, {"method": way.method, **way.facts, **costs})
            measured.setdefault(key, []).append(errors(way, x, exact))
    for key, row in rows.items():
        for dtype, values in zip(DTYPES, zip(*measured[key], strict=True), strict=True):
            name = str(dtype).removeprefix("torch.")
            row[f"error_{name}"] = statistics.mean(values)
            row[f"std_{name}"] = statistics.stdev(values) if seeds > 1 else None
    rounded = [{key: short(value) for key, value in row.items()} for row in rows.values()]
    return {"name": kind.name, "n": n, "k": k, "m": m, "rows": rounded}


def short(value: Any) -> Any:
    """Five digits of a fraction."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


def render(result: dict[str, Any], path: Path) -> None:
    """The table and the plot beside the JSON file `path`."""
    path.with_suffix(".md").write_text(markdown(result, path))
    plot(result["matrices"], path.with_suffix(".png"))


def read_result(path: Path) -> dict[str, Any]:
    """Raises SettingError where the file holds no measurements."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        result = None
    if not isinstance(result, dict) or not result.get("matrices"):
        raise SettingError(f"--render: {path} holds no measurements; leave it out to measure")
    return result


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--size", type=int, default=1024, help="rows and columns of the drawn matrices")
    parser.add_argument("--seeds", type=int, default=3, help="pairs of matrices of each kind")
    parser.add_argument("--run", type=Path, help="folder of a training run with linear=dense")
    parser.add_argument("--layers", nargs="+", default=LAYERS, help="linear layers of that model")
    parser.add_argument("--out", type=Path, default=Path("results/amm.json"), help="JSON to write")
    parser.add_argument("--render", action="store_true", help="only the plot and the table of what --out holds")
    arguments = parser.parse_args()
    for option in ("size", "seeds"):
        if getattr(arguments, option) < 1:
            raise SettingError(f"--{option} {getattr(arguments, option)} must be a positive number")
    if arguments.out.suffix != ".json":
        raise SettingError(f"--out {arguments.out} must end in .json; the plot and the table stand beside it")
    if arguments.render:
        render(read_result(arguments.out), arguments.out)
        return
    kinds, facts = drawn(arguments.size), None
    if arguments.run:
        real, facts = recorded(arguments.run, arguments.layers, arguments.seeds)
        kinds += real
    else:
        print("no --run: weights and activations of a trained model are left out", flush=True)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    chosen = bases()
    result: dict[str, Any] = {"machine": machine(), "seeds": arguments.seeds, "run": facts, "matrices": []}
    for kind in kinds:
        began = time.perf_counter()
        result["matrices"].append(measure(kind, chosen, arguments.seeds))
        write_json(arguments.out, result)
        render(result, arguments.out)
        rows = len(result["matrices"][-1]["rows"])
        print(f"{kind.name}: {rows} rows, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    run_main(main)
