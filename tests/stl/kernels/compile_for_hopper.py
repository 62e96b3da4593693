"""Compile every kernel that the operators launch, forward and backward, for an H200; no GPU is needed for that.

For each basis TILE,RANK,NAME,DTYPE[,TILES] of the command line it is named, then a line for each kernel: its name, the
bytes of shared memory that a block takes, those that a thread spills, where a warp group multiplies how many uniform
registers are read that nothing sets, and how many maxima lose NaN. TILES: in a row of tiles; without it as many as a
program takes at once in layers that are wide.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from stl import get_basis, kernels
from stl.kernels import linear, mlp, norm  # noqa: F401  they register the operators

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z][\w.]*)\s*(?P<operands>.*);")
SEEN: set[str] = set()  # what was compiled for this basis
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}


def compile_only(kernel: JITFunction, *arguments, grid, warmup, **options) -> None:
    """In the place of a launch: what Triton would compile for these arguments."""
    bound = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    settings = {name: bound.pop(name) for name in ("num_warps", "num_stages") if name in bound}
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = bound[name]
        if isinstance(value, Tensor):
            signature[name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif isinstance(value, int) and name not in options and value != 1:
            signature[name] = "i32"
        else:
            signature[name], constants[index,] = "constexpr", value
        if signature[name] != "constexpr" and (isinstance(value, Tensor) or (value % 16 == 0 and value == int(value))):
            attributes[index,] = [["tt.divisibility", 16]] if signature[name] != "fp32" else []
    if (key := str((kernel.__name__, signature, constants, attributes, settings))) in SEEN:
        return
    SEEN.add(key)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=settings)
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = compiled.asm["ptx"]
        unset_there = len(unset(file.name)) if "wgmma" in code else 0  # half a second each
        losing = len(re.findall(r"\bmax\.(?!NaN)\w*f32|\bmin\.(?!NaN)\w*f32", code))  # of NaN and y, y
        facts = compiled.metadata.shared, spilled(file.name), unset_there, losing
        print(kernel.__name__, *facts, flush=True)


def spilled(binary: str) -> int:
    """Bytes of local memory that a thread takes."""
    return int(re.search(r"STACK:(\d+)", read("cuobjdump", "-res-usage", binary))[1])


def unset(binary: str) -> set[int]:
    """Uniform registers that are read and set nowhere: ptxas 12.8 has computed addresses of shared memory from such.

    One that is set on another path only, or too late, is not found, nor the upper half of a pair.
    """
    read_, set_ = set(), set()
    for instruction in INSTRUCTION.finditer(read("nvdisasm", "-c", binary)):
        first, *others = instruction["operands"].split(",")
        if target := re.fullmatch(r"\s*UR(\d+)\s*", first):
            wide = ".64" in instruction["name"] or ".WIDE" in instruction["name"]
            set_ |= {int(target[1]) + i for i in range(1 + wide)}
        else:
            others.append(first)
        read_ |= {int(number) for operand in others for number in re.findall(r"\bUR(\d+)", operand)}
    return read_ - set_


def read(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def main(tile: int, rank: int, name: str, dtype: torch.dtype, columns: int) -> None:
    basis = get_basis(name, tile, rank)
    encoder, decoder = (matrix.to(dtype).requires_grad_() for matrix in (basis.encode_x, basis.decode))
    width = columns * tile
    x, bias = (torch.ones(*size, width, dtype=dtype).requires_grad_() for size in ((2, 16), ()))
    weight = torch.ones(rank, columns, columns, dtype=dtype).requires_grad_()
    layer = (weight, encoder, decoder, bias)
    for up, residual in ((None, None), (layer, x.detach().float())):  # as under autocast
        mlp.mlp(x, layer, up, layer, "gelu", "tokens", width, width, None, residual).sum().backward()
    with torch.no_grad():
        mlp.mlp(x, layer, None, layer, "relu", "tokens", width, width, None, None)
    for gradients, columns in enumerate(kernels.MOST_NORMALISED_TILES[tile]):
        # In float32, as under autocast.
        x, gain, shift = (torch.ones(*size, columns * tile).requires_grad_() for size in ((2, 16), (), ()))
        weight = torch.ones(rank, columns, 16, dtype=dtype)
        channels = torch.ops.stl.norm_encode_gemm(x, gain, shift, weight, encoder, 1e-6, True, False)
        if gradients:
            channels.sum().backward()


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET", "0") == "0"
    JITFunction.run = compile_only
    for basis in sys.argv[1:]:
        print("basis", basis)
        SEEN.clear()
        tile, rank, name, dtype, *columns = basis.split(",")
        most = 128 * max(1, 16 // int(tile) ** 2)
        main(int(tile), int(rank), name, getattr(torch, dtype), int(columns[0]) if columns else most)
