"""How fast one linear layer is, dense, 2:4 sparse and STL, against each other and against what the machine allows.

    python scripts/bench_ops.py --out results/ops_h200.json
    python scripts/bench_ops.py --backward --shapes 16384,4096,4096
    python scripts/bench_ops.py --device cpu --dtype float32 --shapes 1024,2048,2048 1024,4096,4096 --ranks 16

A shape n,k,m is a layer of k → m features on n rows. Every method is checked before it is timed, against the reference
in higher precision; one that is wrong has no time. Methods take turns, so that a machine that slows down slows all of
them. The file is rewritten after every shape.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from throughput import machine, synchronize
from torch import Tensor

from models.callbacks import write_json
from stl import SettingError, get_basis, stl_linear
from stl.functional import BACKENDS, encode_weight

SHAPES = ["51200,384,1152", "51200,768,3072", "16384,2048,5632", "16384,4096,4096", "16384,4096,11008"]
SHAPES += ["16384,8192,8192", "16384,16384,16384"]
EXACT = {48: "exact48", 49: "strassen"}  # ranks at which the basis multiplies exactly; the others are frames
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}  # relative, of the whole output
FIRST = 1024  # rows that are compared with float64
ROUNDS, SECONDS = 5, 0.05  # turns, and how long a method is repeated in each


@dataclass(frozen=True)
class Method:
    """A way of computing the layer, beside what it must give and the work that it cannot avoid."""

    name: str
    run: Callable[[], Tensor]
    wanted: Callable[[], Tensor]  # the same in higher precision
    macs: int
    numbers: int  # read and written, each once


@dataclass(frozen=True)
class Shape:
    n: int
    k: int
    m: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        try:
            n, k, m = (int(size) for size in text.split(","))
            if min(n, k, m) < 1:
                raise ValueError
        except ValueError:
            raise SettingError(f"--shapes {text} must be n,k,m: three positive numbers") from None
        return cls(n, k, m)


def operands(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (n, k), w (m, k) and bias (m,)."""
    make = partial(torch.randn, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    return make(shape.n, shape.k), make(shape.m, shape.k) / shape.k**0.5, make(shape.m)


def product(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """The first rows of the dense layer in float64."""
    return F.linear(x[:FIRST].double(), w.double(), bias.double())


def methods(
    x: Tensor, w: Tensor, bias: Tensor, ranks: list[int], backends: list[str], backward: bool
) -> Iterator[Method]:
    """Dense, dense compiled, 2:4, and STL by each backend and rank."""
    (n, k), m, device, dtype = x.shape, len(w), x.device.type, x.dtype
    gradient = torch.randn_like(x[:, :1]) * torch.randn_like(bias)
    wide = torch.float64 if dtype == torch.float32 else torch.float32

    def layer(function: Callable[..., Tensor], *weights: Tensor) -> Callable[[], Tensor]:
        """The call that is timed: the output, or after the backward pass the gradient of x."""
        leaves = [tensor.detach().clone().requires_grad_(backward) for tensor in (x, *weights)]

        def run() -> Tensor:
            if not backward:
                with torch.no_grad():
                    return function(*leaves)
            return torch.autograd.grad(function(*leaves), leaves, gradient)[0]

        return run

    def exactly(function: Callable[..., Tensor], *weights: Tensor) -> Callable[[], Tensor]:
        """The same in higher precision."""

        def run() -> Tensor:
            leaves = [tensor.to(wide).requires_grad_(backward) for tensor in (x, *weights)]
            y = function(*leaves)
            return torch.autograd.grad(y, leaves[0], gradient.to(wide))[0] if backward else y

        return run

    passes = 3 if backward else 1
    dense = exactly(F.linear, w, bias)
    sizes = n * (k + m) * (2 if backward else 1)
    yield Method("dense", layer(F.linear, w, bias), dense, passes * n * k * m, sizes + passes * k * m)
    if device == "cuda":
        compiled = torch.compile(F.linear, dynamic=False)
        yield Method("dense, compiled", layer(compiled, w, bias), dense, passes * n * k * m, sizes + passes * k * m)
        if not backward:
            yield sparse(x, w, bias)
    for rank in ranks:
        basis = get_basis(EXACT.get(rank, "frame"), 4, rank)
        matrices = [matrix.to(device, dtype) for matrix in (basis.encode_x, basis.decode)]
        weight = encode_weight(w.T.double(), basis.encode_w.to(device)).to(dtype)
        tiles = -(-n // 4)
        macs = tiles * weight.numel() * passes + (tiles * 16 * rank * (weight.shape[1] + weight.shape[2])) * passes
        for backend in backends:
            function = partial(stl_linear, out_features=m, backend=backend)
            wanted = exactly(partial(stl_linear, out_features=m, backend="torch"), weight, *matrices, bias)
            run = layer(function, weight, *matrices, bias)
            yield Method(f"stl r={rank}, {backend}", run, wanted, macs, sizes + passes * weight.numel())


def sparse(x: Tensor, w: Tensor, bias: Tensor) -> Method:
    """2:4 sparsity by cuSPARSELt with the algorithm that its search finds for this shape."""
    groups = w.view(-1, 4)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, 1).indices, True)
    pruned = (groups * kept).view_as(w)
    compressed = torch._cslt_compress(pruned)
    best = torch._cslt_sparse_mm_search(compressed, x.T, bias, transpose_result=True)

    def run() -> Tensor:
        return torch._cslt_sparse_mm(compressed, x.T, bias, alg_id=best, transpose_result=True).T

    def wanted() -> Tensor:
        return F.linear(x.float(), pruned.float(), bias.float())

    return Method(
        "2:4, cuSPARSELt", run, wanted, x.shape[0] * w.numel() // 2, x.numel() + x.shape[0] * len(w) + w.numel()
    )


# --- measuring ---------------------------------------------------------------------------------------------------


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.to(wanted.dtype) - wanted).norm() / wanted.norm()).item()


def repeatable(run: Callable[[], Tensor], device: str) -> Callable[[], object]:
    """The call as a CUDA graph, so that no method is measured by what the CPU needs to launch it; on a CPU, itself."""
    if device == "cpu":
        return run
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> Tensor:
        graph.replay()
        return kept  # holds the graph's memory

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


def measure(
    shape: Shape, candidates: Iterable[Method], top: dict[str, float], exact: Tensor | None
) -> list[dict[str, Any]]:
    """The rows of one shape: the error of each method against itself in higher precision, and against `exact`, the
    dense product; where the former is small, seconds, the ratio to the dense layer and the most that this could be."""
    rows: list[dict[str, Any]] = []
    runs = {}
    for method in candidates:
        got = method.run()
        device, dtype = got.device.type, got.dtype
        error = relative_error(got, method.wanted())
        row = {**vars(shape), "method": method.name, "macs": method.macs, "error": error}
        if exact is not None:
            row["product_error"] = relative_error(got[:FIRST], exact)
        row["bound_seconds"] = max(
            method.numbers * dtype.itemsize / top["bytes_per_second"], 2 * method.macs / top["flops_per_second"]
        )
        rows.append(row)
        if error <= TOLERANCE[dtype]:  # false for NaN as well
            runs[method.name] = repeatable(method.run, device)
    seconds = take_turns(runs, device)
    for row in rows:
        if row["method"] in seconds:
            row["seconds"] = seconds[row["method"]]
            row["ratio"] = seconds["dense"] / row["seconds"]
            row["bound_ratio"] = seconds["dense"] / row["bound_seconds"]
    return rows


def describe(row: dict[str, Any]) -> str:
    head = f"{row['n']:6} {row['k']:6} {row['m']:6}  {row['method']:22} error {row['error']:.1e}"
    if "product_error" in row:
        head += f", of the product {row['product_error']:.1e}"
    if "seconds" not in row:
        return f"{head}  WRONG, not timed"
    return f"{head}  {row['seconds'] * 1e3:9.3f} ms  {row['ratio']:5.2f}× dense (bound {row['bound_ratio']:.2f}×)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="N,K,M")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 24, 32, 48, 49])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["auto"])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--backward", action="store_true", help="forward and backward pass, all gradients")
    parser.add_argument("--out", type=Path, default=Path("results/ops.json"))
    arguments = parser.parse_args()
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: there is no GPU; --device cpu measures the CPU")
    shapes = [Shape.parse(text) for text in arguments.shapes]
    result: dict[str, Any] = {
        "machine": machine() | {"device": device, "dtype": arguments.dtype, "threads": torch.get_num_threads()},
        "pass": "forward and backward" if arguments.backward else "forward",
        "ceilings": ceilings(device, dtype),
        "rows": [],
    }
    for shape in shapes:
        inputs = operands(shape, device, dtype)
        candidates = methods(*inputs, arguments.ranks, arguments.backends, arguments.backward)
        exact = None if arguments.backward else product(*inputs)
        for row in measure(shape, candidates, result["ceilings"], exact):
            result["rows"].append(row)
            print(describe(row), flush=True)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out, result)


if __name__ == "__main__":
    try:
        main()
    except SettingError as error:
        sys.exit(f"error: {error}")
