"""How fast one linear layer is, dense, 2:4 sparse and STL, against each other and against what the machine allows.

    python scripts/bench_ops.py --out results/ops_h200.json
    python scripts/bench_ops.py --backward --shapes 16384,4096,4096
    python scripts/bench_ops.py --tile 8 --ranks 64 --out results/ops_t8_h200.json
    python scripts/bench_ops.py --eager --shapes 256,1024,1024 4096,1024,1024  # what backend="auto" goes by
    python scripts/bench_ops.py --device cpu --dtype float32 --shapes 1024,2048,2048 1024,4096,4096 --ranks 16

A shape n,k,m is a layer of k → m features on n rows. On a GPU a method is timed as a CUDA graph; with --eager as it is
called, one call after the other, each with what it costs the CPU. Every method is checked before it is timed, against
the reference in higher precision, with --backward all its gradients as well. The file is rewritten after every shape.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from benchmarking import (
    Method,
    add_options,
    backends_of,
    begin,
    compile_fixed,
    compress_for,
    describe,
    measure,
    one_pass,
    parse_sizes,
    refusal,
    relative_error,
    run_main,
)
from command_line import command_line
from torch import Tensor, nn

from models.callbacks import write_json
from models.sparse24 import Sparse24Linear
from stl import Basis, get_basis, stl_linear
from stl.functional import encode_weight

SHAPES = ["51200,384,1152", "51200,768,3072", "16384,2048,5632", "16384,4096,4096", "16384,4096,11008"]
SHAPES += ["16384,8192,8192", "16384,16384,16384"]
EXACT = {(2, 7): "strassen", (4, 48): "exact48", (4, 49): "strassen"}  # by tile and rank; the others: frames
FIRST = 1024  # rows that are compared with float64


@dataclass(frozen=True)
class Shape:
    n: int
    k: int
    m: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        return cls(*parse_sizes("--shapes", text, "n,k,m"))


def operands(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (n, k), w (m, k) and bias (m,)."""
    make = partial(torch.randn, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
    return make(shape.n, shape.k), make(shape.m, shape.k) / shape.k**0.5, make(shape.m)


def basis_of(tile: int, rank: int) -> Basis:
    return get_basis(EXACT.get((tile, rank), "frame"), tile, rank)


def encoded(w: Tensor, tile: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The weight (r, K, M) of the dense w (m, k), with its encoder and decoder (r, t²)."""
    basis = basis_of(tile, rank)
    weight = encode_weight(w.T.double(), basis.encode_w.to(w.device)).to(w.dtype)
    return weight, basis.encode_x.to(w), basis.decode.to(w)


def product(x: Tensor, w: Tensor, bias: Tensor) -> Tensor:
    """The first rows of the dense layer in float64."""
    return F.linear(x[:FIRST].double(), w.double(), bias.double())


def methods(
    x: Tensor, w: Tensor, bias: Tensor, ranks: list[int], backends: list[str], backward: bool, tile: int = 4
) -> Iterator[Method]:
    """Dense; on a GPU dense compiled, and 2:4, which has no backward pass; STL by each backend and rank."""
    (n, k), m, device, dtype = x.shape, len(w), x.device.type, x.dtype
    gradient = torch.randn_like(x[:, :1]) * torch.randn_like(bias)
    wide = torch.float64 if dtype == torch.float32 else torch.float32

    def layer(function: Callable[..., Tensor], *weights: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [tensor.detach().clone().requires_grad_(backward) for tensor in (x, *weights)]
        return one_pass(function, leaves, leaves, gradient if backward else None)

    def exactly(function: Callable[..., Tensor], *weights: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """The same in higher precision, in memory only while it is computed."""

        def run() -> tuple[Tensor, ...]:
            leaves = [tensor.to(wide).requires_grad_(backward) for tensor in (x, *weights)]
            return one_pass(function, leaves, leaves, gradient.to(wide) if backward else None)()

        return run

    passes = 3 if backward else 1
    dense = exactly(F.linear, w, bias)
    sizes = n * (k + m) * (2 if backward else 1)
    yield Method("dense", layer(F.linear, w, bias), dense, passes * n * k * m, sizes + passes * k * m)
    if device == "cuda":
        compiled = compile_fixed(F.linear)
        yield Method("dense, compiled", layer(compiled, w, bias), dense, passes * n * k * m, sizes + passes * k * m)
        if not backward:
            yield sparse(x, w, bias)
    for rank in ranks:
        weight, *matrices = encoded(w, tile, rank)
        tiles = -(-n // tile)
        macs = tiles * passes * (weight.numel() + tile**2 * rank * (weight.shape[1] + weight.shape[2]))
        for backend in backends:
            function = partial(stl_linear, out_features=m, backend=backend)
            wanted = exactly(partial(stl_linear, out_features=m, backend="torch"), weight, *matrices, bias)
            run = layer(function, weight, *matrices, bias)
            numbers = sizes + passes * weight.numel()
            facts = {
                "tile": tile,
                "rank": rank,
                "backend": backend,
                "encoded_bytes": tiles * weight.shape[1] * rank * dtype.itemsize,
            }
            yield Method(f"stl r={rank}, {backend}", run, wanted, macs, numbers, facts)


def sparse(x: Tensor, w: Tensor, bias: Tensor) -> Method:
    """2:4 sparsity by cuSPARSELt with the algorithm that its search finds for this shape; where it takes no such, as
    refused."""
    layer = Sparse24Linear(x.shape[1], len(w)).to(x)
    layer.load_dense(w, bias)
    pruned, computed = layer.pruned().detach(), nn.Sequential(layer)
    run = one_pass(computed, [x], [], None)

    def wanted() -> tuple[Tensor, ...]:
        return (F.linear(x.float(), pruned.float(), bias.float()),)

    macs, numbers = x.shape[0] * w.numel() // 2, x.numel() + x.shape[0] * len(w) + w.numel() // 2
    refused = refusal(partial(compress_for, computed, x.dtype, run))
    return Method("2:4, cuSPARSELt", run, wanted, macs, numbers, refused=refused)


def product_error(exact: Tensor, y: Tensor) -> dict[str, Any]:
    """How far the first rows are from the dense product."""
    return {"product_error": relative_error([y[:FIRST]], [exact])}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="N,K,M", help="rows, features in, features out")
    parser.add_argument("--tile", type=int, default=4, help="tile size of STL")
    parser.add_argument("--backward", action="store_true", help="forward and backward pass, all gradients")
    parser.add_argument("--eager", action="store_true", help="on a GPU as called, not as a CUDA graph")
    add_options(parser, [16, 24, 32, 48, 49], "results/ops.json")
    arguments = parser.parse_args()
    shapes = [Shape.parse(text) for text in arguments.shapes]
    for rank in arguments.ranks:
        basis_of(arguments.tile, rank)  # before anything is measured
    result = begin(arguments) | {"pass": "forward and backward" if arguments.backward else "forward"}
    result["eager"] = arguments.eager
    for shape in shapes:
        inputs = operands(shape, arguments.device, getattr(torch, arguments.dtype))
        backends = backends_of(arguments)
        candidates = methods(*inputs, arguments.ranks, backends, arguments.backward, arguments.tile)
        candidates = (replace(method, graph=not arguments.eager) for method in candidates)
        more = partial(product_error, product(*inputs))
        for row in measure(vars(shape), candidates, result["ceilings"], more):
            result["rows"].append(row)
            print(describe(f"{shape.n:6} {shape.k:6} {shape.m:6}", row), flush=True)
        write_json(arguments.out, result)


if __name__ == "__main__":
    run_main(main)
