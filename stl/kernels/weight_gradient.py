"""The gradient of an encoded weight: r products of two tall and narrow matrices, summed over every row of tiles."""

from math import ceil

import torch
from torch import Tensor

# A GEMM divides its output, not the sum, among a GPU's multiprocessors. Where that leaves most of them idle and there
# are rows enough, the sum is taken in parts; measured on one H200 with K·M from 37·48 to 1024·1024.
PARTS, ROWS_OF_A_PART, BLOCK, FEW_BLOCKS = 8, 4096, 64, 64


def weight_gradient(channels: Tensor, gradient: Tensor) -> Tensor:
    """channels (r, P, K) and the gradient (r, P, M) of channels @ weight → that of weight (r, K, M)."""
    (rank, P, K), M = channels.shape, gradient.shape[2]
    blocks = rank * ceil(K / BLOCK) * ceil(M / BLOCK)
    if P % PARTS or P < PARTS * ROWS_OF_A_PART or blocks > FEW_BLOCKS:
        return torch.bmm(channels.mT, gradient)
    shares = torch.bmm(channels.reshape(-1, P // PARTS, K).mT, gradient.reshape(-1, P // PARTS, M))
    return shares.view(rank, PARTS, K, M).sum(1, dtype=torch.float32).to(gradient.dtype)
