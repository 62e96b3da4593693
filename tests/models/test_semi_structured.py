"""2:4 layers by PyTorch's sparse kernels, and what these do not take."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from models.semi_structured import compress
from models.sparse24 import Sparse24Linear
from stl import SettingError

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")


def model(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Sparse24Linear(k, m) for k, m in pairwise(sizes)), nn.Linear(sizes[-1], 3))


def test_without_a_gpu_it_is_one_line_and_nothing_changes():
    made = model(64, 128)
    with pytest.raises(SettingError, match=r"^layer '0' is on cpu: kernels for 2:4 sparsity need a GPU of compute cap"):
        compress(made)
    assert isinstance(made[0], Sparse24Linear)


@needs_gpu
def test_what_is_compressed_computes_the_same():
    made, x = model(128, 256, 64).cuda().half(), torch.randn(5, 9, 128, device="cuda").half()
    wanted = made(x)
    assert compress(made) == ["0", "1"]
    torch.testing.assert_close(made(x), wanted, atol=2e-2, rtol=2e-2)


@needs_gpu
def test_the_layout_of_the_input_does_not_matter():
    made, x = model(128, 256).cuda().half(), torch.randn(5, 128, 9, device="cuda").half().mT
    wanted = made(x)
    compress(made)
    torch.testing.assert_close(made(x), wanted, atol=2e-2, rtol=2e-2)


@needs_gpu
@pytest.mark.parametrize(
    ("sizes", "dtype", "message"),
    [
        ((64, 128), torch.float32, r"layer '0' is in torch.float32: kernels for 2:4 sparsity need float16 or bfloat16"),
        ((128, 30), torch.float16, r"layer '0' cannot be compressed \(.*multiple of .*\); leave it dense"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(sizes, dtype, message):
    with pytest.raises(SettingError, match=message):
        compress(model(*sizes).cuda().to(dtype))
