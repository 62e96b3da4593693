"""What language models cost a token, dense, 2:4 sparse and with STL layers, counted analytically.

    python scripts/flops_llm.py                                # writes results/flops_llm.{md,json}
    python scripts/flops_llm.py --models llama_small --length 512 --ranks 16 20 24 --batches 1 2 3 4 --out .

With --batches also what tiles over the batch cost in batches of so many sequences, merged: t of them cost what tiles
over tokens cost, and fewer as much as t. Attention products are counted in full, masked or not; 2:4 as sparse kernels
compute it; merged, one layer stands where several read the same x, which STL encodes once. Nothing is computed, and no
weights are held.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_llm import WAYS, build, configuration
from benchmarking import run_main
from command_line import command_line
from tables import table
from torch import nn

from models.callbacks import write_json
from models.sparse24 import Sparse24Linear
from stl import STLLinear, count_flops

COLUMNS = ["model", "linear layers", "params M", "linear MMACs", "total MMACs", "core ×", "linear ×", "total ×"]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--models", nargs="+", default=["llama_tinyllama", "llama_small"], help="of configs/model/")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 24, 32], help="of STL, t = 4")
    parser.add_argument("--batches", type=int, nargs="+", default=[], help="sequences of a batch, for tiles over it")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder")
    arguments = parser.parse_args()
    kinds: dict[str, tuple[Any, bool, int]] = {"dense": (nn.Linear, False, 1), "2:4": (Sparse24Linear, False, 1)}
    for rank in arguments.ranks:
        over_tokens, over_batch = (partial(STLLinear, tile=4, rank=rank, **WAYS[way]) for way in ("tokens", "batch"))
        name = f"stl t=4 r={rank}"
        kinds |= {name: (over_tokens, False, 1), f"{name}, merged": (over_tokens, True, 1)}
        kinds |= {f"{name} over a batch of {size}, merged": (over_batch, True, size) for size in arguments.batches}
    lines, counted = [], []
    for name in arguments.models:
        for label, (linear, merged, batch) in kinds.items():
            model = build(configuration(name), linear, "meta", torch.float32, merged)
            report = count_flops(model, (batch, arguments.length), torch.int64)
            tokens = batch * arguments.length
            linear_macs, total = report.linear / tokens, report.total / tokens
            millions = [f"{number / 1e6:.1f}" for number in (report.params, linear_macs, total)]
            factor = report.flop_factor
            lines.append([name, label, *millions, *(f"{factor[key]:.2f}" for key in ("core", "linear", "total"))])
            print(*lines[-1], flush=True)
            short = {key: value for key, value in report.to_dict().items() if key != "layers"}
            counted.append({"model": name, "linear": label, **short})
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "flops_llm.json", counted)
    note = f"One token of sequences of {arguments.length}; 1 MAC = 2 FLOPs; × is dense MACs / MACs.\n"
    (arguments.out / "flops_llm.md").write_text(f"{table(COLUMNS, lines)}\n\n{note}")


if __name__ == "__main__":
    run_main(main)
