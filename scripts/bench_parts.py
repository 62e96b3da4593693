"""Where the time of an STL layer goes: its encode, its GEMMs and its decode, each by itself.

    python scripts/bench_parts.py --out results/parts_h200.json
    python scripts/bench_parts.py --shapes 16384,4096,4096 --ranks 16 --backends triton
    python scripts/bench_parts.py --device cpu --dtype float32 --shapes 1024,2048,2048

A shape n,k,m is a layer of k → m features on n rows. Beside its parts stand the whole layer, which computes them one
after the other (but for narrow ones), and the dense one. Each is checked before it is timed, against
the reference in higher precision, on what the part before it gave. What each must read, write and multiply, at the
ceilings that the same run measured, is its bound; every line ends with the share of its time that this is. The file is
rewritten after every shape.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from bench_ops import SHAPES, Shape, basis_of, encoded, operands
from benchmarking import Method, add_options, backends_of, begin, describe, measure, run_main
from command_line import command_line
from torch import Tensor

from models.callbacks import write_json
from stl import SettingError, stl_linear
from stl.functional import from_tiles, to_tiles
from stl.kernels import use_triton

Function = Callable[..., Tensor]
Facts = dict[str, Any]


def encode_by_kernel(x: Tensor, encoder: Tensor, tile: int) -> Tensor:
    from stl.kernels.encode import encode  # needs triton

    return encode(x[None], encoder, tile, -(-x.shape[1] // tile))


def encode_by_reference(x: Tensor, encoder: Tensor, tile: int) -> Tensor:
    tiles = to_tiles(x, tile)
    return (encoder @ tiles.flatten(1)).view(-1, *tiles.shape[1:])


def decode_by_kernel(sums: Tensor, decoder: Tensor, bias: Tensor, n: int) -> Tensor:
    return torch.ops.stl.decode(sums, decoder, bias, None, 1, n, len(bias), False)[0]


def decode_by_reference(sums: Tensor, decoder: Tensor, bias: Tensor, n: int) -> Tensor:
    return from_tiles((decoder.T @ sums.flatten(1)).view(-1, *sums.shape[1:]), n, len(bias)) + bias


ENCODE = {"torch": encode_by_reference, "triton": encode_by_kernel}
DECODE = {"torch": decode_by_reference, "triton": decode_by_kernel}


def methods(
    x: Tensor, w: Tensor, bias: Tensor, ranks: list[int], backends: list[str], tile: int = 4
) -> Iterator[Method]:
    """The dense layer; of each rank and backend STL's parts, and the whole."""
    wide = torch.float64 if x.dtype == torch.float32 else torch.float32

    def method(
        name: str, run: Function, exact: Function, inputs: tuple[Tensor, ...], macs: int, numbers: int, facts: Facts
    ) -> Method:
        def computed() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (run(*inputs),)

        def wanted() -> tuple[Tensor, ...]:
            return (exact(*(tensor.to(wide) for tensor in inputs)),)

        return Method(name, computed, wanted, macs, numbers, facts)

    n, ends = len(x), x.numel() + len(x) * len(w)
    yield method("dense", F.linear, F.linear, (x, w, bias), n * w.numel(), ends + w.numel(), {"part": "whole"})
    for rank in ranks:
        weight, encoder, decoder = encoded(w, tile, rank)
        for backend in backends:
            encode, decode = partial(ENCODE[backend], tile=tile), partial(DECODE[backend], n=n)
            channels = encode(x, encoder)
            sums = torch.bmm(channels, weight)
            before, behind = channels.numel(), sums.numel()
            coded, core, decoded = before * tile**2, before * weight.shape[2], behind * tile**2
            everything = x, weight, encoder, decoder, bias
            whole, reference = (partial(stl_linear, backend=of) for of in (backend, "torch"))
            steps: dict[str, tuple[Function, Function, tuple[Tensor, ...], int, int]] = {
                "encode": (encode, partial(encode_by_reference, tile=tile), (x, encoder), coded, x.numel() + before),
                "GEMMs": (torch.bmm, torch.bmm, (channels, weight), core, before + behind + weight.numel()),
                "decode": (
                    decode,
                    partial(decode_by_reference, n=n),
                    (sums, decoder, bias),
                    decoded,
                    behind + n * len(w),
                ),
                "whole": (whole, reference, everything, coded + core + decoded, ends + weight.numel()),
            }
            for name, step in steps.items():
                facts = {"tile": tile, "rank": rank, "backend": backend, "part": name}
                yield method(f"stl r={rank}, {backend}, {name}", *step, facts)


def share(row: Facts) -> str:
    """Of its time, the least that it can take."""
    return f"  {row['bound_seconds'] / row['seconds']:.0%} of it the bound" if "seconds" in row else ""


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="N,K,M", help="rows, features in, features out")
    parser.add_argument("--tile", type=int, default=4, help="tile size of STL")
    add_options(parser, [16, 24, 32], "results/parts.json")
    arguments = parser.parse_args()
    shapes = [Shape.parse(text) for text in arguments.shapes]
    dtype = getattr(torch, arguments.dtype)
    backends = backends_of(arguments)
    if "auto" in backends:
        raise SettingError("--backends auto chooses for whole layers; parts are torch or triton")
    for rank in arguments.ranks:
        basis_of(arguments.tile, rank)  # before anything is measured
    result = begin(arguments)
    for shape in shapes:
        inputs = operands(shape, arguments.device, dtype)
        for rank, backend in product(arguments.ranks, backends):
            use_triton(backend, inputs[0], arguments.tile, rank)  # its errors, not those of the kernels
        candidates = methods(*inputs, arguments.ranks, backends, arguments.tile)
        for row in measure(vars(shape), candidates, result["ceilings"]):
            result["rows"].append(row)
            print(describe(f"{shape.n:6} {shape.k:6} {shape.m:6}", row) + share(row), flush=True)
        write_json(arguments.out, result)


if __name__ == "__main__":
    run_main(main)
