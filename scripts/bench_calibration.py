"""Memory and time that calibrating one large linear layer takes, on a CPU.

    OMP_NUM_THREADS=1 python scripts/bench_calibration.py          # 4096×11008; half an hour

Input rows are a few hundred random directions and a little noise, in four batches of one sample; more than 16384 rows
at t = 4 take no more, for those are what calibration keeps. What `stl.convert` takes is the peak of resident memory of
a process of its own, less the resident memory before it, which holds model, data and PyTorch; a higher peak before it
counts against it. Linux only.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from benchmarking import machine, parse_sizes, run_main
from command_line import command_line
from torch import Tensor, nn

from models.callbacks import write_json
from stl import SettingError, convert
from stl.calibration import LayerCalibration

BATCHES, DIRECTIONS, NOISE = 4, 256, 0.05


def resident(field: str) -> int:
    """Bytes that this process has in memory ("VmRSS") or has had at its peak ("VmHWM")."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def inputs(rows: int, features: int) -> list[Tensor]:
    """BATCHES batches of one sample, of `rows` in all."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(DIRECTIONS, features, generator=generator)
    mixed = torch.randn(rows, DIRECTIONS, generator=generator) @ mix
    mixed += NOISE * DIRECTIONS**0.5 * torch.randn(rows, features, generator=generator)
    return list(mixed.unsqueeze(0).tensor_split(BATCHES, dim=1))


def measure(sizes: list[int], rows: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What one conversion took, and what it did to the layer."""
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Linear(sizes[0], sizes[1])), inputs(rows, sizes[0])
    before, began = resident("VmRSS"), time.perf_counter()
    report = convert(model, from_dense=True, calibration=batches, **settings)
    facts = {"seconds": time.perf_counter() - began, "bytes_before": before, "bytes_peak": resident("VmHWM")}
    facts["bytes_added"] = facts["bytes_peak"] - before
    done = report.calibrated["0"]
    assert isinstance(done, LayerCalibration), done
    return facts | {"layer": asdict(done)}


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it gives in a process of its own, which has nothing of earlier measurements in memory."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--sizes", default="4096,11008", help="features in, out")
    parser.add_argument("--rows", type=int, nargs="+", default=[4096, 16384], help="of input, in all")
    parser.add_argument("--basis", default="als", help="one of those in stl/bases/")
    parser.add_argument("--tile", type=int, default=4, help="tile size")
    parser.add_argument("--rank", type=int, default=32, help="tensor rank")
    parser.add_argument("--out", type=Path, default=Path("results/calibration_memory.json"), help="JSON to write")
    arguments = parser.parse_args()
    settings = {"basis": arguments.basis, "tile": arguments.tile, "rank": arguments.rank}
    sizes = parse_sizes("--sizes", arguments.sizes, "in,out")
    if min(arguments.rows) < BATCHES * arguments.tile:
        raise SettingError(f"--rows {min(arguments.rows)} must be at least {BATCHES} batches of a tile")
    result: dict[str, Any] = {"machine": machine() | {"threads": torch.get_num_threads()}}
    result |= {"in_features": sizes[0], "out_features": sizes[1], **settings, "rows": []}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for rows in arguments.rows:
        row = {"rows": rows} | apart(measure, sizes, rows, settings)
        result["rows"].append(row)
        write_json(arguments.out, result)
        added, before = (row[key] / 2**30 for key in ("bytes_added", "bytes_before"))
        print(f"{rows} rows: {added:.2f} GiB above {before:.2f}, {row['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    run_main(main)
