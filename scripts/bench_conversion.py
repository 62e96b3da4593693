"""What a trained model keeps when its linear layers become STL, without training: top-1 by basis, rank and data.

    python train.py linear=dense && python scripts/bench_conversion.py --run outputs/digits/… --tiles 2 4

Three ways, by `stl.convert(from_dense=True)`: "encoded" for i.i.d. inputs, without data; "calibrated" on training
images (encoded weights); and with "basis", encoders and decoders as well. The class head, which sees one row a sample,
stays dense. Beside --out, a JSON file rewritten after every row, stands a table (.md). Rows that the file has are not
computed again: a stopped program goes on, and another command of the same run, images and machine adds its rows.
"""

import argparse
import copy
import statistics
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from benchmarking import check_device, earlier, machine, run_main
from command_line import command_line
from tables import origin, table
from torch import Tensor, nn
from trained import batches_of, dense_run

from models.callbacks import write_json
from stl import SettingError, convert, count_flops, get_basis, list_bases
from stl.basis import available_ranks
from stl.calibration import LayerCalibration

WAYS: dict[str, dict[str, bool]] = {
    "encoded": {},
    "calibrated": {"calibrate": True},
    "calibrated, basis": {"calibrate": True, "calibrate_basis": True},
}
BATCH = 64
RANKS = {2: [4, 5, 6, 7], 3: [9, 12, 15, 18, 20, 23], 4: [16, 24, 32, 40, 44, 47, 48]}
COLUMNS = ["t", "basis", "r", "MACs, linear"]
COLUMNS += [*(f"top-1, {way}" for way in WAYS), *(f"error, {way}" for way in WAYS)]
SAME = ("gpu", "versions", "git_commit", "run", "images", "device")  # what rows of one file have in common

Spec = tuple[int, str, int]  # tile, basis, rank


def top1(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Percent of the images."""
    with torch.no_grad():
        right = [(model(images).argmax(1) == labels).sum().item() for images, labels in batches]
    return 100 * sum(right) / sum(len(labels) for _, labels in batches)


def convert_once(
    model: nn.Module,
    spec: Spec,
    images: list[Tensor],
    held_out: list[tuple[Tensor, Tensor]],
    calibrate: bool = False,
    calibrate_basis: bool = False,
) -> dict[str, Any]:
    """A row: what a converted copy of the model costs and does; `error` is ‖stl(x) − dense(x)‖²/‖dense(x)‖² on held-out
    rows of the calibration data, the mean over layers."""
    tile, name, rank = spec
    model = copy.deepcopy(model)
    data = images if calibrate else None
    report = convert(
        model,
        tile=tile,
        rank=rank,
        basis=name,
        from_dense=True,
        exclude="head",
        calibration=data,
        calibrate_basis=calibrate_basis,
    )
    layers = [layer for layer in report.calibrated.values() if isinstance(layer, LayerCalibration)]
    flops = count_flops(model, tuple(images[0].shape[1:]))
    row: dict[str, Any] = {"tile": tile, "basis": name, "rank": rank, "exact": get_basis(name, tile, rank).exact}
    row |= {"top1": top1(model, held_out), "flop_factor": flops.to_dict()["flop_factor"]}
    if layers:
        row["error"] = statistics.mean(layer.error_after for layer in layers)
        row["error_uncalibrated"] = statistics.mean(layer.error_before for layer in layers)
    return row


def markdown(result: dict[str, Any]) -> str:
    """The table, a line for every tile, basis and rank."""
    lines: dict[Spec, dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        lines.setdefault((row["tile"], row["basis"], row["rank"]), {})[row["way"]] = row
    cells = []
    for (tile, name, rank), ways in sorted(lines.items()):
        first = next(iter(ways.values()))
        errors = {way: ways[way].get("error") for way in WAYS if way in ways}
        if "calibrated" in ways:
            errors["encoded"] = ways["calibrated"].get("error_uncalibrated")
        cells.append(
            [
                str(tile),
                f"{name}{' (exact)' if first['exact'] else ''}",
                str(rank),
                f"{1 / first['flop_factor']['linear']:.2f}",
                *(f"{ways[way]['top1']:.1f}" if way in ways else "–" for way in WAYS),
                *("–" if (error := errors.get(way)) is None else f"{error:.3f}" for way in WAYS),
            ]
        )
    run = result["run"]
    head = (
        f"{run['model']} on {run['dataset']}, dense top-1 {result['dense_top1']:.1f} on {result['held_out']} held-out "
        f"images, which conversion never sees; {result['images']} training images for calibration. MACs as a fraction "
        "of the dense model's linear layers. Errors are relative and squared, means over the layers, on held-out rows "
        "of the calibration data: the same rows choose ridge and number of steps, and whether a fitted basis is kept, "
        "so that on other images they are higher. Those of “encoded” are on the activations that calibrated layers see."
    )
    commands = ", ".join(f"`{command}`" for command in result["commands"])
    source = f"{commands}, RUN being one of `train.py {' '.join(run['overrides'])}` ({run['epochs']} epochs)"
    foot = f"<sub>{source}; {result['device']}; {origin(result['machine'])}</sub>"
    return f"# A trained model converted\n\n{head}\n\n{table(COLUMNS, cells)}\n\n{foot}\n"


def specs_of(arguments: argparse.Namespace) -> list[Spec]:
    """What there is of --bases and --ranks at --tiles; raises SettingError where that is nothing."""
    known = sorted({name for tile in arguments.tiles if tile > 0 for name in list_bases(tile)})
    if unknown := [name for name in arguments.bases if name not in known]:
        raise SettingError(f"--bases {' '.join(unknown)}: choose among {', '.join(known) or 'those of another tile'}")
    found = []
    for tile in dict.fromkeys(arguments.tiles):
        if arguments.ranks is None and tile not in RANKS:
            raise SettingError(f"--tiles {tile} has no list of ranks, only {', '.join(map(str, RANKS))}; give --ranks")
        for name in dict.fromkeys(arguments.bases):
            ranks = set(arguments.ranks or RANKS[tile]) & set(available_ranks(name, tile))
            found += [(tile, name, rank) for rank in sorted(ranks)]
    if not found:
        tiles, names = " ".join(map(str, arguments.tiles)), " ".join(arguments.bases)
        raise SettingError(f"--bases {names} have none of the ranks asked for at --tiles {tiles}; give other --ranks")
    return found


def command_of(arguments: argparse.Namespace) -> str:
    """The command line, but for the places of files."""
    words = ["python scripts/bench_conversion.py --run RUN"]
    for name in ("tiles", "bases", "ranks"):
        if values := getattr(arguments, name):
            words += [f"--{name}", *map(str, values)]
    return " ".join([*words, f"--images {arguments.images} --device {arguments.device}"])


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a training run with linear=dense")
    parser.add_argument("--tiles", type=int, nargs="+", default=[4], help="tile sizes")
    parser.add_argument("--bases", nargs="+", default=["als", "products", "frame"], help="some of those in stl/bases/")
    parser.add_argument("--ranks", type=int, nargs="+", help="those that a basis has; default: some for each tile")
    parser.add_argument("--images", type=int, default=512, help="training images for calibration")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs")
    parser.add_argument("--out", type=Path, default=Path("outputs/conversion.json"), help="JSON to write")
    arguments = parser.parse_args()
    if arguments.images < 1:
        raise SettingError(f"--images {arguments.images} must be a positive number")
    check_device(arguments.device)
    specs, device = specs_of(arguments), arguments.device
    model, data, run = dense_run(arguments.run)
    data.batch_size, model = BATCH, model.to(device)
    images = [batch.to(device) for batch, _ in islice(batches_of(data, "train"), -(-arguments.images // BATCH))]
    held_out = [(batch.to(device), labels.to(device)) for batch, labels in batches_of(data, "val")]
    facts: dict[str, Any] = {"machine": machine(), "device": device, "run": run, "images": sum(map(len, images))}
    facts |= {"held_out": sum(len(labels) for _, labels in held_out), "dense_top1": top1(model, held_out)}
    known = earlier(arguments.out, facts | facts["machine"], SAME)
    result = known or facts | {"commands": [], "rows": []}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if (command := command_of(arguments)) not in result["commands"]:
        result["commands"].append(command)
    there = {(row["tile"], row["basis"], row["rank"], row["way"]) for row in result["rows"]}
    todo = [(spec, way) for spec in specs for way in WAYS if (*spec, way) not in there]
    print(f"{len(todo)} rows to compute, {len(specs) * len(WAYS) - len(todo)} in {arguments.out}", flush=True)
    for number, (spec, way) in enumerate(todo, 1):
        began = time.perf_counter()
        row = {"way": way} | convert_once(model, spec, images, held_out, **WAYS[way])
        result["rows"].append(row)
        write_json(arguments.out, result)
        arguments.out.with_suffix(".md").write_text(markdown(result))
        tile, name, rank = spec
        done = f"{number}/{len(todo)} t={tile} {name} r={rank} {way}: top-1 {row['top1']:.1f}"
        print(f"{done}, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    run_main(main)
