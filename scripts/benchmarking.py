"""What the benchmarks share: several ways of computing one thing, each checked before it is timed, taking turns.

A way that is wrong has no time. Turns, so that a machine that slows down slows all of them; CUDA graphs, so that none
is measured by what the CPU needs to launch it; beside each the bound that the bandwidth and the arithmetic of this
machine, measured in the same run, set to it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT as Compressed

from models.barriers import read_back_behind_barriers
from models.callbacks import git_commit
from models.semi_structured import SemiStructuredLinear, compress
from models.sparse24 import Sparse24Linear
from stl import SettingError, STLLinear, count_flops
from stl.kernels import BACKENDS

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # relative, of each whole tensor
OF_A_ROW = 5  # times that is how far a row may be off, beside a usual one: a row that was left out is off by all of it
ROUNDS, SECONDS = 5, 0.05  # turns, and how long a method is repeated in each
SPARSE = "2:4"  # how tables call what the sparse kernels compute
REFUSALS = (SettingError, RuntimeError)  # sizes that the sparse kernels do not take; what their prototype lacks
YARDSTICKS = {"ratio": "dense", "ratio_compiled": "dense, compiled"}  # names of methods that others are compared with


@dataclass(frozen=True)
class Method:
    """A way of computing something, beside what it must give and the work that it cannot avoid."""

    name: str
    run: Callable[[], tuple[Tensor, ...]]
    wanted: Callable[[], tuple[Tensor, ...]]  # the same in higher precision
    macs: int
    numbers: int  # read and written, each once
    facts: dict[str, Any] = field(default_factory=dict)  # what its row says of it beside the name
    graph: bool = True  # on a GPU timed as a CUDA graph
    refused: str | None = None  # why it is not computed here: all that its row says beside what was asked


def one_pass(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    gradient: Tensor | None,
    unchecked: Sequence[Tensor] = (),
) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is timed: (function(*inputs),), and where its gradient is given, behind it those of the leaves.

    The gradients of `unchecked` leaves are computed as well, and not returned.
    """

    def run() -> tuple[Tensor, ...]:
        if gradient is None:
            with torch.no_grad():
                return (function(*inputs),)
        y = function(*inputs)
        return y.detach(), *torch.autograd.grad(y, [*leaves, *unchecked], gradient)[: len(leaves)]

    return run


def set_backend(model: nn.Module, backend: str) -> None:
    """Let this backend compute every STL layer of the model, and so every MLP of them."""
    for module in model.modules():
        if isinstance(module, STLLinear):
            module.backend = backend


# --- 2:4 ---------------------------------------------------------------------------------------------------------


def takes(layer: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether cuSPARSELt takes a weight of this layer's sizes."""
    least = Compressed._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return not (layer.out_features % least.sparse_min_rows or layer.in_features % least.sparse_min_cols)


def prune(model: nn.Module, wanted: Callable[[nn.Linear], bool] = lambda layer: True) -> None:
    """Put a 2:4 layer, pruned by magnitude, in the place of each dense layer that is wanted. What is pruned is zero in
    its weight: rounded to another dtype it prunes nothing else."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and wanted(layer):
            sparse = Sparse24Linear(layer.in_features, layer.out_features, layer.bias is not None).to(layer.weight)
            sparse.load_dense(layer.weight, layer.bias)
            sparse.load_dense(sparse.pruned())
            model.set_submodule(name, sparse)


def compress_for(model: nn.Module, dtype: torch.dtype, run: Callable[[], object]) -> None:
    """Compress the 2:4 layers of the model in place, in 16 bits, each with the algorithm that cuSPARSELt's search finds
    for what `run`, a pass through the model, gives it. Raises one of REFUSALS where that cannot be."""
    for module in model.modules():
        if isinstance(module, Sparse24Linear):
            module.to(dtype)
    handles = [model.get_submodule(name).register_forward_pre_hook(_search) for name in compress(model)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def _search(layer: SemiStructuredLinear, args: tuple[Tensor, ...]) -> None:
    layer.search(args[0])


def refusal(run: Callable[[], object]) -> str | None:
    """Why it is refused: it raises one of REFUSALS, or can no more be compiled. None where it runs."""
    try:
        run()
    except (*REFUSALS, FailOnRecompileLimitHit) as error:
        return reason(error)
    return None


def tried(method: Method) -> Method:
    """The method; as refused where running it is."""
    return replace(method, refused=refusal(method.run))


def reason(error: Exception) -> str:
    """What it says, on one line and not at length, with its kind unless it is a SettingError."""
    said = textwrap.shorten(str(error), 300, placeholder=" …")
    return said if isinstance(error, SettingError) else f"{type(error).__name__}: {said}"


# --- bounds ------------------------------------------------------------------------------------------------------


def work(module: nn.Module, shape: Sequence[int], activations: int, training: bool) -> tuple[int, int]:
    """MACs of a pass on an input of this shape, and the numbers that must be read or written: so many activations, and
    the weights, of a 2:4 layer those kept; in training, three passes, the weights three times, with their gradients."""
    passes = 3 if training else 1
    return passes * count_flops(module, shape).total, activations + passes * weights(module)


def weights(module: nn.Module) -> int:
    """How many numbers its parameters are, of a 2:4 layer those kept."""
    dropped = sum(layer.weight.numel() // 2 for layer in module.modules() if isinstance(layer, Sparse24Linear))
    return sum(parameter.numel() for parameter in module.parameters()) - dropped


def bound_seconds(macs: int, numbers: int, dtype: torch.dtype, top: dict[str, float]) -> float:
    """The least that these can take below the `ceilings` of a machine."""
    return max(numbers * dtype.itemsize / top["bytes_per_second"], 2 * macs / top["flops_per_second"])


# --- measuring ---------------------------------------------------------------------------------------------------


def relative_error(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """|got − wanted| / |wanted| of the tensor where it is largest; NaN where any is NaN."""
    errors = [(g.to(w.dtype) - w).norm() / w.norm() for g, w in zip(got, wanted, strict=True)]
    return torch.stack(errors).max().item()


def worst_row(got: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """|got − wanted| of the row (along the last dimension) where it is largest, relative to the root mean square of
    |wanted| over the rows of its tensor; NaN where any is NaN. A few rows that were never computed are lost in the
    `relative_error` of thousands."""
    errors = [
        (g.to(w.dtype) - w).norm(dim=-1).max() / w.norm(dim=-1).square().mean().sqrt()
        for g, w in zip(got, wanted, strict=True)
    ]
    return torch.stack(errors).max().item()


def repeatable(run: Callable[[], object], device: str) -> Callable[[], object]:
    """The call as a CUDA graph; on a CPU, itself."""
    if device == "cpu":
        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    kept = result, run  # a graph holds neither what it writes nor what it reads

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def seconds_a_call(run: Callable[[], object], device: str) -> float:
    """Mean over as many calls as fit into SECONDS."""

    def timed(calls: int) -> float:
        synchronize(torch.device(device))
        began = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(torch.device(device))
        return (time.perf_counter() - began) / calls

    return timed(max(1, round(SECONDS / timed(1))))


def take_turns(runs: dict[str, Callable[[], object]], device: str) -> dict[str, float]:
    """The median seconds of each over ROUNDS turns, behind one that warms up."""
    turns = [{name: seconds_a_call(run, device) for name, run in runs.items()} for _ in range(1 + ROUNDS)]
    return {name: statistics.median(turn[name] for turn in turns[1:]) for name in runs}


def peak_bytes(run: Callable[[], object]) -> int:
    """What the call takes of the GPU's memory at once, above what was taken before: results and all on the way."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second of a copy, read and written, and FLOP/s of a large dense product on this machine."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(8 * size, size, device=device, dtype=dtype)
    target = torch.empty_like(source)
    seconds = take_turns({"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}, device)
    return {
        "bytes_per_second": 2 * source.nbytes / seconds["copy"],
        "flops_per_second": 2 * size**3 / seconds["gemm"],
    }


def compile_fixed(function: Callable[..., Any]) -> Callable[..., Any]:
    """By torch.compile, for shapes that stay as they are."""
    read_back_behind_barriers()
    return torch.compile(function, dynamic=False)


# Every method is a model of its own; behind the limit a compiled one would silently be none.
@torch.compiler.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)  # type: ignore[attr-defined]
def measure(
    facts: dict[str, Any],
    methods: Iterable[Method],
    top: dict[str, float],
    more: Callable[[Tensor], dict[str, Any]] = lambda first: {},
) -> list[dict[str, Any]]:
    """A row for each method: facts; its error against itself in higher precision, of all and of the worst row; on a GPU
    what memory it takes; where the errors are small seconds, the ratio to dense and the most that this could be; and
    `more` of its first result. A method that was refused has the reason instead."""
    torch.compiler.reset()  # what was compiled for other shapes counts against that limit
    rows: list[dict[str, Any]] = []
    runs = {}
    for method in methods:
        print(f"  checking {method.name}", file=sys.stderr, flush=True)  # compiling takes minutes
        row = {**facts, "method": method.name, **method.facts, "macs": method.macs}
        rows.append(row)
        if method.refused is not None:
            row["refused"] = method.refused
            continue
        got = method.run()
        device, dtype = got[0].device.type, got[0].dtype
        wanted = method.wanted()
        error, of_a_row = relative_error(got, wanted), worst_row(got, wanted)
        row |= {"error": error, "row_error": of_a_row, **more(got[0])}
        row["bound_seconds"] = bound_seconds(method.macs, method.numbers, dtype, top)
        del got, wanted
        if error <= TOLERANCE[dtype] and of_a_row <= OF_A_ROW * TOLERANCE[dtype]:  # false for NaN as well
            if device == "cuda":
                row["peak_bytes"] = peak_bytes(method.run)
            runs[method.name] = repeatable(method.run, device) if method.graph else method.run
    seconds = take_turns(runs, device) if runs else {}
    for row in rows:
        if row["method"] in seconds:
            row["seconds"] = seconds[row["method"]]
            row |= {key: seconds[name] / row["seconds"] for key, name in YARDSTICKS.items() if name in seconds}
            if "dense" in seconds:
                row["bound_ratio"] = seconds["dense"] / row["bound_seconds"]
    return rows


def describe(head: str, row: dict[str, Any]) -> str:
    """A row of `measure` on one line."""
    if "refused" in row:
        return f"{head}  {row['method']:32} REFUSED, not timed: {row['refused']}"
    words = [f"{head}  {row['method']:32} error {row['error']:.1e}, of a row {row['row_error']:.1e}"]
    if "product_error" in row:
        words.append(f"of the product {row['product_error']:.1e}")
    if "seconds" not in row:
        return "  ".join([*words, "WRONG, not timed"])
    words.append(f"{row['seconds'] * 1e3:9.3f} ms")
    if "ratio" in row:
        words.append(f"{row['ratio']:5.2f}× dense (bound {row['bound_ratio']:.2f}×)")
    if "ratio_compiled" in row:
        words.append(f"{row['ratio_compiled']:5.2f}× dense compiled")
    if "peak_bytes" in row:
        words.append(f"peak {row['peak_bytes'] / 2**20:.0f} MiB")
    return "  ".join(words)


# --- the machine -------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine() -> dict[str, Any]:
    """What a reader needs to know of where the numbers come from."""
    gpu = driver = None
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return {
        "gpu": gpu,
        "driver": driver,
        "cpu": cpu(),
        "cpu_cores": len(os.sched_getaffinity(0)),  # those that this process may use
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
    }


def earlier(path: Path, here: dict[str, Any], same: Iterable[str]) -> dict[str, Any] | None:
    """The result that a file holds, to go on with; None where there is no file.

    Raises SettingError where it is no result, and where a fact that all its rows share, one of `same`, was another.
    """
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        then = result | result["machine"]
    except (ValueError, KeyError, TypeError):
        raise SettingError(f"{path} is no result of a benchmark; give another file") from None
    changed = [f"{key} was {then.get(key)}, is {here[key]}" for key in same if then.get(key) != here[key]]
    if changed:
        raise SettingError(f"{path} is of another machine or version ({'; '.join(changed)}); give another file")
    return result


def cpu() -> str:
    """The processor's name, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


# --- the command line --------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser, ranks: list[int], out: str) -> None:
    parser.add_argument("--ranks", type=int, nargs="+", default=ranks, help="of STL")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="as a machine with the device has them")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where it is measured")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of inputs and weights"
    )
    parser.add_argument("--out", type=Path, default=Path(out), help="JSON to write")


def check_device(device: str) -> None:
    """Raises SettingError where this machine has no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingError("there is no GPU; --device cpu measures the CPU")


def backends_of(arguments: argparse.Namespace) -> list[str]:
    """Those asked for, or else all that the device has: kernels, unless interpreted, need a GPU."""
    return arguments.backends or (["torch", "triton"] if arguments.device == "cuda" else ["torch"])


def begin(arguments: argparse.Namespace) -> dict[str, Any]:
    """The result with what all its rows share, and no rows yet; raises SettingError where there is no such device."""
    check_device(arguments.device)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    how = {"device": arguments.device, "dtype": arguments.dtype, "threads": torch.get_num_threads()}
    top = ceilings(arguments.device, getattr(torch, arguments.dtype))
    return {"machine": machine() | how, "ceilings": top, "rows": []}


def parse_sizes(option: str, text: str, names: str) -> list[int]:
    """The positive numbers of `text`, as many as `names` has: parse_sizes("--shapes", "4,8", "n,k") = [4, 8].

    Raises SettingError for anything else.
    """
    try:
        sizes = [int(size) for size in text.split(",")]
        if len(sizes) != names.count(",") + 1 or min(sizes) < 1:
            raise ValueError
    except ValueError:
        count = ("one", "two", "three", "four")[names.count(",")]
        raise SettingError(f"{option} {text} must be {names}: {count} positive numbers") from None
    return sizes


def run_main(main: Callable[[], None]) -> None:
    """Run it; what a user did wrong is one line."""
    try:
        main()
    except (SettingError, OSError) as error:
        sys.exit(f"error: {error}")
