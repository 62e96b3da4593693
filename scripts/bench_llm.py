"""How fast whole language models are, dense, 2:4 sparse and with STL, in prefill and in decoding.

    python scripts/bench_llm.py --out results/llm_h200.json          # TinyLlama-1.1B's shapes, 16,384 tokens
    python scripts/bench_llm.py --models llama_small --ranks 16 24 32 40 --out results/llm/speed.json  # for the table
    python scripts/bench_llm.py --models llama_small --tile 2 --ranks 4 --out results/llm/speed.json  # more rows of it

Prefill computes the logits of --batch sequences of --length tokens at once, with a cache, as a CUDA graph, on a GPU
also compiled. Decoding feeds as many sequences --steps tokens, one after the other, from an empty cache, by the CPU's
launches as generation does, and on a GPU also as a CUDA graph of all steps: what is left without these. Weights are
random: they change no time. All ways come with projections apart, as transformers has them, and merged: one layer where
several read the same x. Each is held against itself in higher precision before it is timed. By the kernels STL comes as
it is and fused: MLPs, and norms where projections are merged; it is compiled only so. 2:4 is PyTorch's sparse kernels,
on a GPU in 16 bits, each layer with the algorithm that cuSPARSELt's search finds.

All that is measured of one model in one phase takes turns, and is written when these end. What else the file has, of
the same machine and code, stays in it, with its bounds: the file's ceilings are those of the last run, and rows of two
calls did not take turns.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from benchmarking import (
    SPARSE,
    Method,
    add_options,
    backends_of,
    begin,
    compile_fixed,
    compress_for,
    describe,
    earlier,
    measure,
    refusal,
    repeatable,
    run_main,
    set_backend,
    tried,
    weights,
)
from command_line import command_line
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from study import CONFIGS
from torch import Tensor, nn

from models.callbacks import write_json
from models.semi_structured import DTYPES
from models.sparse24 import Sparse24Linear
from stl import SettingError, STLLinear, count_flops, get_basis

PROJECTIONS = ("apart", "merged")  # of what reads the same x
SAME = ("gpu", "driver", "versions", "git_commit", "device", "dtype")  # what rows of one file have in common
PLACE = ("model", "phase", "batch", "tokens", "method")  # what tells them apart
WAYS: dict[str, dict[str, Any]] = {  # of keeping a model causal: basis and row axis
    "tokens": {"basis": "causal", "row_axis": "tokens"},
    "batch": {"basis": "shuffle", "row_axis": "batch"},
}


def configuration(model: str) -> Any:
    """One of configs/model/. Raises SettingError where it is of images."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=[f"model={model}"]).model
    if "vocab_size" not in config:
        raise SettingError(f"--models {model} is no language model; give some of configs/model/ as llama_small")
    return config


def build(config: Any, linear: Callable[..., nn.Module], device: str, dtype: torch.dtype, merged: bool = False) -> Any:
    """The model, drawn anew, where it is measured: a CPU takes half a minute to draw a billion weights."""
    torch.manual_seed(0)
    given = {"linear": linear, "tokens": config.vocab_size or 4096, "length": 1, "sample": None, "merged": merged}
    with torch.device(device):
        return instantiate(config, **given).to(dtype).eval()


def variants(
    arguments: argparse.Namespace,
    config: Any,
    dtype: torch.dtype,
    merged: bool,
    run: Callable[[Any], object],
    ways: tuple[bool, ...],
) -> Iterator[tuple[str, bool, Any, Any, dict]]:
    """Name, whether it is to be compiled (each of `ways`), the model that is timed, the one that it is held against,
    and what rows say of it. `run` is a pass, for which 2:4 searches its algorithms."""
    from models.language.fused import fuse_llama  # needs transformers

    make = partial(build, config, device=arguments.device, dtype=dtype, merged=merged)
    dense = make(nn.Linear)
    for compiled in ways:
        yield "dense", compiled, dense, dense, {"linear": "dense"}
    if arguments.device == "cuda" and dtype in DTYPES:
        pruned = make(Sparse24Linear)
        sparse = copy.deepcopy(pruned)
        refused = refusal(partial(compress_for, sparse, dtype, partial(run, sparse)))
        facts: dict[str, Any] = {"linear": "sparse24", "refused": refused}
        for compiled in ways:
            yield SPARSE, compiled, sparse, pruned, facts
    for way in arguments.ways:
        for rank in arguments.ranks:
            reference = make(partial(STLLinear, tile=arguments.tile, rank=rank, **WAYS[way]))
            set_backend(reference, "torch")
            for backend in backends_of(arguments):
                for fused in (False, True)[: 1 if backend == "torch" else 2]:
                    timed = copy.deepcopy(reference)
                    if fused:
                        fuse_llama(timed)
                    set_backend(timed, backend)
                    timed.load_state_dict(reference.state_dict(), assign=True)  # one copy in memory is enough
                    name = f"stl t={arguments.tile} r={rank} over {way}, {backend}{', fused' * fused}"
                    facts = {"linear": "stl", "tile": arguments.tile, "rank": rank, "way": way}
                    facts |= {"backend": backend, "fused": fused}
                    for compiled in ways if fused or backend == "torch" else ways[:1]:
                        yield name, compiled, timed, reference, facts


def prefill(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """Logits of all tokens at once."""
    with torch.no_grad():
        return (model(ids, use_cache=True).logits,)


def decode(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """Logits of the last token, after all were given one by one."""
    cache, logits = None, ids
    with torch.no_grad():
        for token in ids.split(1, 1):
            output = model(token, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits
    return (logits,)


def methods(arguments: argparse.Namespace, config: Any, phase: str, dtype: torch.dtype) -> Iterator[Method]:
    """Each way as it is; on a GPU in prefill also compiled, and in decoding as a CUDA graph."""
    run = {"prefill": prefill, "decode": decode}[phase]
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    length = arguments.length if phase == "prefill" else arguments.steps
    ids = torch.arange(arguments.batch * length, device=arguments.device).view(arguments.batch, length) % 997
    at_once, times = (ids, 1) if phase == "prefill" else (ids[:, :1], length)
    ways = (False, True)[: 2 if phase == "prefill" and arguments.device == "cuda" else 1]
    for projections in arguments.projections:
        merged = projections == "merged"
        cases = variants(arguments, config, dtype, merged, lambda model: run(model, at_once), ways)
        for name, compiled, timed, reference, facts in cases:

            def wanted(reference: Any = reference) -> tuple[Tensor, ...]:
                return run(copy.deepcopy(reference).to(wide), ids)

            macs = times * count_flops(reference, at_once.shape, torch.int64).total
            numbers = times * weights(reference)
            facts = {"tokens": ids.numel(), "merged": merged, **facts}
            refused = facts.pop("refused", None)
            name = f"{name}{', merged' * merged}"
            if compiled:
                name, timed = f"{name}, compiled", compile_fixed(timed)
            method = Method(name, partial(run, timed, ids), wanted, macs, numbers, facts, phase == "prefill", refused)
            if (compiled or facts["linear"] == "sparse24") and refused is None:
                method = tried(method)
            yield method
            if phase == "decode" and arguments.device == "cuda" and method.refused is None:
                why_not = refusal(partial(repeatable, method.run, "cuda"))
                yield replace(method, name=f"{name}, as a graph", graph=True, refused=why_not)


def go_on(arguments: argparse.Namespace) -> dict[str, Any]:
    """`begin`, with the rows that the file has. Raises SettingError where these are of another machine or code."""
    result = begin(arguments)
    if known := earlier(arguments.out, result["machine"], SAME):
        result["rows"] = known["rows"]
    return result


def put(rows: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with those measured now, each in the place of an earlier one."""

    def place(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[key] for key in PLACE)

    again = {place(row) for row in measured}
    return [*(row for row in rows if place(row) not in again), *measured]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--models", nargs="+", default=["llama_tinyllama"], help="of configs/model/")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of keeping tiles causal")
    parser.add_argument(
        "--phases", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"], help="what is measured"
    )
    parser.add_argument(
        "--projections", nargs="+", choices=PROJECTIONS, default=list(PROJECTIONS), help="of what reads the same x"
    )
    parser.add_argument("--tile", type=int, default=4, help="of STL")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence in prefill")
    parser.add_argument("--steps", type=int, default=32, help="tokens of a sequence in decoding")
    add_options(parser, [16, 24], "results/llm.json")
    arguments = parser.parse_args()
    for way in arguments.ways:
        for rank in arguments.ranks:
            get_basis(WAYS[way]["basis"], arguments.tile, rank)  # before minutes of what comes first
    result = go_on(arguments)
    for model in arguments.models:
        config = configuration(model)
        for phase in arguments.phases:
            facts = {"model": model, "phase": phase, "batch": arguments.batch}
            ways = methods(arguments, config, phase, getattr(torch, arguments.dtype))
            rows = measure(facts, ways, result["ceilings"])
            for row in rows:
                row["tokens_per_second"] = row["tokens"] / row["seconds"] if "seconds" in row else None
                print(describe(f"{model:16} {phase:8}", row), flush=True)
            result["rows"] = put(result["rows"], rows)
            write_json(arguments.out, result)


if __name__ == "__main__":
    run_main(main)
