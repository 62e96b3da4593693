"""MixingLinear: it begins as a dense layer, and the matrix over tokens that its kernel is."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.dense_mixer import WINDOWS, MixingLinear


def mixing_matrix(layer: MixingLinear, tokens: int, channel: int) -> Tensor:
    """(tokens, tokens): what each token takes of each in one channel, entry by entry."""
    size = layer.kernel_size
    matrix = torch.eye(tokens, dtype=torch.float64)
    for to in range(tokens):
        for tap in range(size):
            if layer.window == "blocks":
                of, kernel = to - to % size + tap, channel * size + to % size
            else:
                of, kernel = to + tap - (size - 1) // 2, channel
            if 0 <= of < tokens:
                matrix[to, of] += layer.kernel[kernel, 0, tap].item()
    return matrix


@given(st.integers(1, 7), st.integers(1, 11), st.integers(1, 5), st.sampled_from(WINDOWS))
@settings(deadline=None, derandomize=True, max_examples=50)
def test_it_mixes_the_tokens_of_a_window_and_then_is_dense(k, tokens, size, window):
    torch.manual_seed(0)
    layer = MixingLinear(k, 4, kernel_size=size, window=window).double()
    x = torch.randn(2, tokens, k, dtype=torch.float64)
    dense = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), dense, rtol=0, atol=0)  # the kernel starts at zero
    torch.nn.init.normal_(layer.kernel)
    mixed = torch.stack([x[..., channel] @ mixing_matrix(layer, tokens, channel).T for channel in range(k)], -1)
    torch.testing.assert_close(layer(x), F.linear(mixed, layer.weight, layer.bias))


@pytest.mark.parametrize("window", WINDOWS)
def test_rows_of_a_2d_input_are_samples_of_one_token(window):
    torch.manual_seed(0)
    layer, x = MixingLinear(6, 4, window=window), torch.randn(5, 6)
    torch.nn.init.normal_(layer.kernel)
    torch.testing.assert_close(layer(x), layer(x.unsqueeze(1)).squeeze(1))
    torch.testing.assert_close(layer(x)[2], layer(x[2]))


def test_the_kernel_learns_from_the_first_step_on():
    layer = MixingLinear(6, 4)
    layer(torch.randn(2, 8, 6)).square().sum().backward()
    assert layer.kernel.grad.ne(0).all()
