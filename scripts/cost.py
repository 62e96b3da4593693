"""What the rows of the paper cost to train: hours, GPU-hours and dollars, from measured images a second.

    python scripts/cost.py results/throughput_h200.json --price 3.50 --loader results/loader_h200.json

The rows, their epochs and their batch are those of configs/experiment/imagenet/; linear layers that were measured
beside theirs come in as well. Training goes over the training images, and every epoch ends with the validation images
at the rate of inference. The result is printed in Markdown.
"""

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from command_line import command_line
from hydra import compose, initialize_config_dir
from tables import origin, table

from models.callbacks import write_json

CONFIGS = Path(__file__).parent.parent / "configs"
IMAGES = {"train": 1_281_167, "val": 50_000}  # of ImageNet-1K

COST = [
    *("model", "linear layers", "GPUs", "images a GPU and step", "measured with", "training images/s"),
    *("scaling efficiency", "hours", "GPU-hours", "$", "loader cores"),
]
LOADER = ["model", "linear layers", "training images/s", "loader images/s", "loader / model", "cores to feed one GPU"]


class Row(NamedTuple):
    """What is to be trained."""

    model: str
    linear: str  # as throughput.py names it
    epochs: int
    batch_size: int  # images a step, over all GPUs


def paper_rows() -> list[Row]:
    """One row for each experiment, smallest models first."""
    rows = []
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        for file in (CONFIGS / "experiment/imagenet").glob("*.yaml"):
            if file.stem == "recipe":
                continue
            cfg = compose("train", overrides=[f"experiment=imagenet/{file.stem}"])
            stl = "tile" in cfg.linear
            linear = f"stl t={cfg.linear.tile} r={cfg.linear.rank}" if stl else "dense"
            rows.append(Row(cfg.model.name, linear, cfg.trainer.max_epochs, cfg.data.batch_size))
    return sorted(rows, key=lambda row: (len(row.model), row))


def with_measured(rows: list[Row], measured: list[dict[str, Any]]) -> list[Row]:
    """The rows, and behind those of each model the further linear layers that were measured with it."""
    result = []
    for index, row in enumerate(rows):
        result.append(row)
        if index + 1 == len(rows) or rows[index + 1].model != row.model:
            own = {other.linear for other in rows if other.model == row.model}
            more = {entry["linear"] for entry in measured if entry["model"] == row.model} - own
            result += [row._replace(linear=linear) for linear in sorted(more)]
    return result


def find(measured: Iterable[dict[str, Any]], row: Row, gpus: int) -> dict[str, Any] | None:
    """The measurement of this row on so many GPUs, with the batch nearest to the recipe's; of several, the fastest."""

    def order(entry: dict[str, Any]) -> tuple[float, float]:
        return abs(math.log(entry["batch_size"] * gpus / row.batch_size)), -entry["training_images_per_second"]

    fits = [
        entry
        for entry in measured
        if (entry["model"], entry["linear"], entry.get("devices", 1)) == (row.model, row.linear, gpus)
    ]
    return min(fits, key=order) if fits else None


def cost(row: Row, gpus: int, measured: list[dict[str, Any]], efficiency: float, price: float) -> dict[str, Any]:
    """The row on so many GPUs. Where one GPU was measured and so many were not, these are as fast as so many times
    `efficiency`; validation, in which GPUs do not wait for each other, is as fast as so many."""
    result: dict[str, Any] = {**row._asdict(), "gpus": gpus}
    one, several = find(measured, row, 1), find(measured, row, gpus)
    if one is None:
        return result
    if several:
        rate, efficiency, source = (
            several["training_images_per_second"],
            several.get("scaling_efficiency", 1.0),
            "measured",
        )
    else:
        rate, source = gpus * efficiency * one["training_images_per_second"], "assumed"
    validation = IMAGES["val"] / (gpus * one["inference_images_per_second"])
    hours = row.epochs * (IMAGES["train"] / rate + validation) / 3600
    return result | {
        "measured_batch_size": (several or one)["batch_size"],
        "training_images_per_second": rate,
        "scaling_efficiency": efficiency,
        "efficiency_source": source,
        "hours": hours,
        "gpu_hours": gpus * hours,
        "dollars": gpus * hours * price,
    }


def full_load(loader: dict[str, Any]) -> dict[str, Any]:
    """The training loader's measurement with the most workers; of several sources, the fastest."""
    rows = [row for row in loader["loader"] if row["split"] == "train"]
    return max(rows, key=lambda row: (row["workers"], row["images_per_second"]))


def cost_cells(entry: dict[str, Any]) -> tuple[str, ...]:
    names = (entry["model"], entry["linear"])
    if "hours" not in entry:
        return (*names, "not run", *["–"] * (len(COST) - 3))
    gpus = entry["gpus"]
    return (
        *names,
        str(gpus),
        f"{entry['batch_size'] / gpus:g}",
        str(entry["measured_batch_size"]),
        f"{entry['training_images_per_second']:,.0f}",
        f"{entry['scaling_efficiency']:.2f} {entry['efficiency_source']}" if gpus > 1 else "–",
        f"{entry['hours']:,.1f}",
        f"{entry['gpu_hours']:,.1f}",
        f"{entry['dollars']:,.0f}",
        f"{entry['loader_cores']:,}" if "loader_cores" in entry else "–",
    )


def loader_cells(measured: dict[str, Any], load: dict[str, Any]) -> tuple[str, ...]:
    model, loaded = measured["training_images_per_second"], load["images_per_second"]
    cores = math.ceil(model / load["images_per_second_per_core"])
    rates = (f"{model:,.0f}", f"{loaded:,.0f}", f"{loaded / model:.2f}")
    return measured["model"], measured["linear"], *rates, str(cores)


def report(entries: list[dict[str, Any]], results: dict[str, Any], loader: dict[str, Any] | None, price: float) -> str:
    """The tables and what they rest on, in Markdown."""
    epochs = " or ".join(str(number) for number in sorted({entry["epochs"] for entry in entries}))
    parts = [table(COST, dict.fromkeys(cost_cells(entry) for entry in entries))]  # "not run" once, not for every count
    notes = [
        f"{epochs} epochs of {IMAGES['train']:,} images, each with {IMAGES['val']:,} validation images; "
        f"${price:g} a GPU-hour; throughput: {origin(results['machine'])}.",
        "The measured step waits for no loader, and leaves out mixup, erasing and the average of the weights.",
    ]
    for assumed in {entry["scaling_efficiency"] for entry in entries if entry.get("efficiency_source") == "assumed"}:
        ideal = " (ideal scaling)" if assumed == 1 else ""
        notes.append(f"A scaling efficiency of {assumed:g}{ideal} is assumed where it says so, and was not measured.")
    if any(entry.get("measured_batch_size", 0) * entry["gpus"] > entry["batch_size"] for entry in entries):
        notes.append(
            "Rates measured with more images a GPU than the recipe's step leaves for it are upper bounds, and the "
            "hours lower bounds: small batches keep a GPU less busy. Larger steps would be another recipe."
        )
    if loader:
        load = full_load(loader)
        single = [row for row in results["models"] if row.get("devices", 1) == 1]
        parts.append(table(LOADER, (loader_cells(row, load) for row in single)))
        made = (loader.get("images") or {}).get("made")
        notes.append(
            f"Loader: {load['source']}{f' {made}' if made else ''}, {load['workers']} workers, "
            f"{load['images_per_second_per_core']:,.0f} images/s a core; {origin(loader['machine'])}."
        )
    return "\n\n".join([*parts, "\n".join(notes)])


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("throughput", type=Path, help="what throughput.py wrote")
    parser.add_argument("--price", type=float, required=True, help="dollars a GPU-hour")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8, 64], help="of a run")
    parser.add_argument("--efficiency", type=float, default=1.0, help="of scaling, where it was not measured")
    parser.add_argument("--loader", type=Path, help="what bench_loader.py wrote")
    parser.add_argument("--out", type=Path, help="file for the same numbers in JSON")
    arguments = parser.parse_args()
    if arguments.price < 0 or not 0 < arguments.efficiency <= 1 or min(arguments.gpus) < 1:
        sys.exit("error: --price must be 0 or more dollars, --efficiency above 0 and at most 1, --gpus 1 or more")
    try:
        results = json.loads(arguments.throughput.read_text())
        loader = json.loads(arguments.loader.read_text()) if arguments.loader else None
        right = [row for row in results["models"] if "training_images_per_second" in row]  # the others are wrong
        each = full_load(loader)["images_per_second_per_core"] if loader is not None else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"there is no {error} in it" if isinstance(error, KeyError) else error
        sys.exit(f"error: {what}; give a file that throughput.py or, with --loader, bench_loader.py wrote")
    results["models"] = right
    entries = []
    for row in with_measured(paper_rows(), results["models"]):
        for gpus in arguments.gpus:
            entry = cost(row, gpus, results["models"], arguments.efficiency, arguments.price)
            if each and "hours" in entry:
                entry["loader_cores"] = math.ceil(entry["training_images_per_second"] / each)
            entries.append(entry)
    print(report(entries, results, loader, arguments.price))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        sources = {"throughput": results["machine"], "loader": loader and loader["machine"]}
        write_json(arguments.out, {"price": arguments.price, "images": IMAGES, "machines": sources, "rows": entries})


if __name__ == "__main__":
    main()
