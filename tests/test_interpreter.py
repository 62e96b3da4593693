"""The interpreter that tests the kernels."""

import pytest
import torch
import triton
import triton.language as tl
from agreement import DEVICE


@triton.jit
def _copy(x, y, size, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place, mask=place < size, other=0.0), mask=place < size)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
@pytest.mark.parametrize(("read", "written"), [(7, 8), (8, 7)])
def test_a_kernel_that_leaves_its_tensors_fails(read, written):
    memory = torch.zeros(2, 16)
    _copy[(1,)](memory[0, :8], memory[1, :8], 8, BLOCK=16)
    with pytest.raises(Exception, match="leaves the tensors"):
        _copy[(1,)](memory[0, :read], memory[1, :written], 8, BLOCK=16)
