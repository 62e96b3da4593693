"""How fast an MLP and an attention block are, dense and STL, in inference and in training, and the memory they take.

    python scripts/bench_blocks.py --out results/blocks_h200.json
    python scripts/bench_blocks.py --mlp 8,2048,4096,11008 --attention --passes training --ranks 16 24
    python scripts/bench_blocks.py --device cpu --dtype float32 --mlp 8,128,256,512 --attention 8,197,256,4

An MLP is samples,tokens,width,hidden: linear, GELU, linear. An attention block is samples,tokens,width,heads:
LayerNorm, queries, keys and values, softmax attention, projection, residual. STL comes by each backend; with the
kernels also fused: the two layers of an MLP; norm and addition with the layers beside them, but not in compiled
training. 2:4 is PyTorch's sparse kernels (cuSPARSELt) on the same weights masked, each layer by the algorithm that a
search finds for its input: on a GPU in 16 bits, and in inference only, since a compressed weight has no backward pass
here. A block whose sizes they do not take has a row that says why, and no speed. On a GPU all come as they are and
under torch.compile. Each is checked, output and in training gradients, against the same block in higher precision by
the reference, before it is timed. The file is rewritten after every pass of a block.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
    measure,
    one_pass,
    parse_sizes,
    prune,
    refusal,
    run_main,
    set_backend,
    tried,
    work,
)
from command_line import command_line
from torch import Tensor, nn

from models.callbacks import write_json
from models.semi_structured import DTYPES
from models.t2t_vit import Attention, Linear, Mlp
from stl import SettingError, STLLinear, count_flops, fuse_blocks

MLPS = ["256,200,256,512", "256,200,384,1152", "256,200,768,3072", "8,2048,2048,5632", "8,2048,4096,11008"]
ATTENTIONS = ["256,197,256,4", "256,197,384,6", "256,197,768,12"]
PASSES = ("inference", "training")


class AttentionBlock(nn.Module):
    """x + attention(norm(x)), (samples, tokens, width) → the same."""

    def __init__(self, width: int, heads: int, linear: Linear) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width, heads, linear, drop=0.0, attn_drop=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


@dataclass(frozen=True)
class Block:
    kind: str  # "mlp" or "attention"
    samples: int
    tokens: int
    width: int
    inner: int  # hidden features of an MLP, heads of an attention block

    @classmethod
    def parse(cls, kind: str, text: str) -> "Block":
        inner = {"mlp": "hidden", "attention": "heads"}[kind]
        block = cls(kind, *parse_sizes(f"--{kind}", text, f"samples,tokens,width,{inner}"))
        if kind == "attention" and block.width % block.inner:
            raise SettingError(f"--attention {text}: width must be a multiple of heads")
        return block

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of input and output."""
        return self.samples, self.tokens, self.width

    def build(self, linear: Linear) -> nn.Module:
        if self.kind == "mlp":
            return nn.Sequential(Mlp(self.width, self.inner, linear, drop=0.0))
        return AttentionBlock(self.width, self.inner, linear)

    def facts(self) -> dict[str, Any]:
        """What the rows of the file say of it."""
        sizes = {"samples": self.samples, "tokens": self.tokens, "width": self.width}
        return {"block": self.kind, **sizes, "hidden" if self.kind == "mlp" else "heads": self.inner}


def variants(name: str, module: nn.Module, backends: list[str]) -> Iterator[tuple[str, nn.Module, dict[str, Any]]]:
    """The STL block by each backend, with what its rows say of it; by the kernels also fused: the reference computes
    layer by layer what is fused."""
    for backend in backends:
        plain, fused = (copy.deepcopy(module) for _ in range(2))
        set_backend(plain, backend)
        yield f"{name}, {backend}", plain, {"backend": backend, "fused": False}
        if backend != "torch" and fuse_blocks(fused):
            set_backend(fused, backend)
            yield f"{name}, {backend}, fused", fused, {"backend": backend, "fused": True}


def has_sparse_kernels(device: str, dtype: torch.dtype) -> bool:
    return device == "cuda" and dtype in DTYPES


class Bench:
    """One block's input, and the methods that compute one of PASSES with it."""

    def __init__(self, block: Block, which: str, device: str, dtype: torch.dtype) -> None:
        make = partial(torch.randn, *block.shape, device=device, generator=torch.Generator(device).manual_seed(0))
        self.block, self.device, self.dtype, self.training = block, device, dtype, which == "training"
        self.wide = torch.float64 if dtype == torch.float32 else torch.float32
        # Attention averages, and its result is small: beside an input of size 1 the residual would hide its errors.
        size = 0.01 if block.kind == "attention" else 1.0
        self.x, self.gradient = (size * make()).to(dtype), make().to(dtype)

    def methods(self, ranks: list[int], backends: list[str]) -> Iterator[Method]:
        """Dense, 2:4 where there are kernels for it, and STL of each rank; on a GPU each as it is and compiled."""
        dense = self.build(nn.Linear)
        yield from self.of("dense", dense, dense, {})
        if has_sparse_kernels(self.device, self.dtype) and not self.training:
            yield from self.sparse()
        for rank in ranks:
            reference = self.build(partial(STLLinear, tile=4, rank=rank, basis="frame"))
            set_backend(reference, "torch")
            for name, module, facts in variants(f"stl r={rank}", reference, backends):
                yield from self.of(name, module, reference, {"rank": rank, **facts})

    def sparse(self) -> Iterator[Method]:
        """2:4, compressed and held against the masked block; what the kernels refuse, as refused."""
        reference = self.build(nn.Linear)
        prune(reference)
        compressed = copy.deepcopy(reference)
        refused = refusal(partial(compress_for, compressed, self.dtype, self.run(compressed, self.dtype)))
        for compiled in (False, True)[: 2 if self.device == "cuda" else 1]:
            method = self.method(SPARSE, compressed, reference, {}, compiled)
            yield tried(method) if refused is None else replace(method, refused=refused)

    def build(self, linear: Linear) -> nn.Module:
        torch.manual_seed(0)
        return self.block.build(linear).to(self.device, self.dtype)

    def of(self, name: str, module: nn.Module, reference: nn.Module, facts: dict[str, Any]) -> Iterator[Method]:
        """This module as it is and, on a GPU, compiled, held against the reference."""
        if "rank" in facts:
            facts = facts | {"encoded_bytes": self.encoded_bytes(reference)}
        for compiled in (False, True)[: 2 if self.device == "cuda" else 1]:
            yield self.method(name, module, reference, facts, compiled)

    def method(
        self, name: str, module: nn.Module, reference: nn.Module, facts: dict[str, Any], compiled: bool
    ) -> Method:
        def wanted() -> tuple[Tensor, ...]:
            return self.run(copy.deepcopy(reference).to(self.wide), self.wide)()

        function = compile_fixed(module) if compiled else None
        name = f"{name}, compiled" if compiled else name
        return Method(name, self.run(module, self.dtype, function), wanted, *self.work(reference), facts)

    def run(
        self, module: nn.Module, dtype: torch.dtype, function: Callable[..., Tensor] | None = None
    ) -> Callable[[], tuple[Tensor, ...]]:
        """The pass through this module, which is in this dtype, or through `function`, which computes the module.

        The gradients of LayerNorm's own weights are not checked: they are sums over all rows, on a CPU in bf16, whose
        errors are not those of the layers before and behind it, and what these give it shows in the gradient of x.
        """
        weights = {name: list(child.parameters()) for name, child in module.named_children()}
        unchecked = weights.pop("norm", [])
        layers = [weight for of_child in weights.values() for weight in of_child]
        x = self.x.detach().to(dtype).requires_grad_(self.training)
        gradient = self.gradient.to(x) if self.training else None
        return one_pass(module if function is None else function, [x], [x, *layers], gradient, unchecked)

    def work(self, module: nn.Module) -> tuple[int, int]:
        """MACs of the pass, and the numbers that must be read or written: input, output and weights; in training also
        the gradients of all three, and the weights again."""
        return work(module, self.block.shape, (4 if self.training else 2) * self.x.numel(), self.training)

    def encoded_bytes(self, module: nn.Module) -> int:
        """What the encodes of the block's layers give, all together."""
        layers = [layer for layer in count_flops(module, self.block.shape).layers if layer.kind == "stl"]
        return sum(layer.encode // layer.tile**2 for layer in layers) * self.dtype.itemsize


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument(
        "--mlp", nargs="*", default=MLPS, metavar="SAMPLES,TOKENS,WIDTH,HIDDEN", help="MLPs; none where it stands alone"
    )
    parser.add_argument(
        "--attention",
        nargs="*",
        default=ATTENTIONS,
        metavar="SAMPLES,TOKENS,WIDTH,HEADS",
        help="attention blocks; none where it stands alone",
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=PASSES, help="what is measured")
    add_options(parser, [16], "results/blocks.json")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    blocks = [Block.parse(kind, text) for kind in ("mlp", "attention") for text in getattr(arguments, kind)]
    result = begin(arguments)
    for block in blocks:
        for which in arguments.passes:
            facts = {**block.facts(), "pass": which}
            candidates = Bench(block, which, arguments.device, dtype).methods(arguments.ranks, backends_of(arguments))
            for row in measure(facts, candidates, result["ceilings"]):
                result["rows"].append(row)
                sizes = ",".join(str(size) for size in (*block.shape, block.inner))
                print(describe(f"{block.kind:9} {sizes:18} {which:9}", row), flush=True)
            write_json(arguments.out, result)


if __name__ == "__main__":
    run_main(main)
