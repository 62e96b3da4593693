"""Random numbers for tests of kernels, and where they stand."""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gaussian(*shape: int, seed: int) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)
