"""The sum of what the programs of a launch left behind, a share each, always in the same order."""

from math import ceil, prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from stl.kernels import INTERPRETED

ROWS, COLUMNS, WARPS = 256, 8, 8  # of a block of shares; 8 numbers are a sector of memory


@triton.jit
def _add_up(
    shares, total, count, size, BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """A program takes COLUMNS numbers of all shares."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(BLOCKS):
        row = block * ROWS + tl.arange(0, ROWS)[:, None]
        sums += tl.load(shares + row.to(tl.int64) * size + column, mask=(row < count) & (column < size), other=0.0)
    result = tl.sum(sums, 0, keep_dims=True)
    tl.store(total + column, result.to(total.dtype.element_ty), mask=column < size)


def add_up(shares: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 shares (programs, …), contiguous → their sum (…) in this precision.

    One launch, where `shares.sum(0).to(dtype)` takes three: of a small model's training they were a tenth.
    """
    count, *shape = shares.shape
    size = prod(shape)
    total = shares.new_empty(shape, dtype=dtype)
    if not count or not size:
        return total.zero_()
    columns = triton.next_power_of_2(size) if INTERPRETED else COLUMNS  # the interpreter pays for each program
    with torch.cuda.device_of(shares):
        _add_up[(ceil(size / columns),)](
            shares, total, count, size,
            BLOCKS=triton.next_power_of_2(ceil(count / ROWS)), ROWS=ROWS, COLUMNS=columns, num_warps=WARPS,
        )  # fmt: skip
    return total
