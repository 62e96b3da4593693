"""What a trained model keeps when its linear layers become STL, without training: top-1 by basis, rank and data.

    python train.py linear=dense && python scripts/bench_conversion.py --run outputs/digits/…

Three ways, by `stl.convert(from_dense=True)`: "encoded" for i.i.d. inputs, without data; "calibrated" on training
images (encoded weights); and with "basis", encoders and decoders as well. The class head, which sees one row a sample,
stays dense. Beside --out, a JSON file rewritten after every row, stands a table (.md).
"""

import argparse
import copy
import statistics
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from benchmarking import machine, run_main
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
TILE, BATCH = 4, 64
COLUMNS = ["basis", "r", "MACs, linear", *(f"top-1, {way}" for way in WAYS), *(f"error, {way}" for way in WAYS)]


def top1(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    """Percent of the images."""
    with torch.no_grad():
        right = [(model(images).argmax(1) == labels).sum().item() for images, labels in batches]
    return 100 * sum(right) / sum(len(labels) for _, labels in batches)


def convert_once(
    model: nn.Module,
    name: str,
    rank: int,
    images: list[Tensor],
    held_out: list[tuple[Tensor, Tensor]],
    calibrate: bool = False,
    calibrate_basis: bool = False,
) -> dict[str, Any]:
    """A row: what a converted copy of the model costs and does; `error` is ‖stl(x) − dense(x)‖²/‖dense(x)‖² on held-out
    rows of the calibration data, the mean over layers."""
    model = copy.deepcopy(model)
    data = images if calibrate else None
    report = convert(
        model,
        tile=TILE,
        rank=rank,
        basis=name,
        from_dense=True,
        exclude="head",
        calibration=data,
        calibrate_basis=calibrate_basis,
    )
    layers = [layer for layer in report.calibrated.values() if isinstance(layer, LayerCalibration)]
    flops = count_flops(model, tuple(images[0].shape[1:]))
    row: dict[str, Any] = {"basis": name, "rank": rank, "exact": get_basis(name, TILE, rank).exact}
    row |= {"top1": top1(model, held_out), "flop_factor": flops.to_dict()["flop_factor"]}
    if layers:
        row["error"] = statistics.mean(layer.error_after for layer in layers)
        row["error_uncalibrated"] = statistics.mean(layer.error_before for layer in layers)
    return row


def markdown(result: dict[str, Any]) -> str:
    """The table, a line for every basis and rank."""
    lines: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in result["rows"]:
        lines.setdefault((row["basis"], row["rank"]), {})[row["way"]] = row
    cells = []
    for (name, rank), ways in lines.items():
        first = next(iter(ways.values()))
        errors = {way: ways[way].get("error") for way in WAYS if way in ways}
        if "calibrated" in ways:
            errors["encoded"] = ways["calibrated"].get("error_uncalibrated")
        cells.append(
            [
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
        f"images; {result['images']} training images for calibration. MACs as a fraction of the dense model's linear "
        "layers; errors are relative and squared, means over the layers; those of “encoded” are on the activations "
        "that calibrated layers see."
    )
    return (
        f"# A trained model converted\n\n{head}\n\n{table(COLUMNS, cells)}\n\n<sub>{origin(result['machine'])}</sub>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a training run with linear=dense")
    parser.add_argument("--bases", nargs="+", default=["als", "products", "frame"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 24, 32, 40, 44, 47, 48])
    parser.add_argument("--images", type=int, default=512, help="training images for calibration")
    parser.add_argument("--out", type=Path, default=Path("results/conversion.json"))
    arguments = parser.parse_args()
    if arguments.images < 1:
        raise SettingError(f"--images {arguments.images} must be a positive number")
    if unknown := [name for name in arguments.bases if name not in list_bases(TILE)]:
        raise SettingError(f"--bases {' '.join(unknown)}: choose among {', '.join(list_bases(TILE))}")
    model, data, facts = dense_run(arguments.run)
    data.batch_size = BATCH
    images = [batch for batch, _ in islice(batches_of(data, "train"), -(-arguments.images // BATCH))]
    held_out = list(batches_of(data, "val"))
    result: dict[str, Any] = {"machine": machine(), "run": facts, "images": sum(map(len, images))}
    result |= {"held_out": sum(len(labels) for _, labels in held_out), "dense_top1": top1(model, held_out), "rows": []}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.bases:
        for rank in sorted(set(arguments.ranks) & set(available_ranks(name, TILE))):
            for way, options in WAYS.items():
                row = {"way": way} | convert_once(model, name, rank, images, held_out, **options)
                result["rows"].append(row)
                write_json(arguments.out, result)
                arguments.out.with_suffix(".md").write_text(markdown(result))
                print(f"{name} r={rank} {way}: top-1 {row['top1']:.1f}", flush=True)


if __name__ == "__main__":
    run_main(main)
