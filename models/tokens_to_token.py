"""The Tokens-to-Token module: overlapping soft splits with a narrow attention layer between them.

Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", ICCV 2021, section 3.1.
Names of parameters are those of the official checkpoints.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Linear = Callable[..., nn.Module]
Size = tuple[int, int]

KERNELS = (7, 3, 3)
PADDINGS = (2, 1, 1)


def soft_split_strides(image: Size) -> tuple[int, int, int]:
    """Strides of the three soft splits: 4, 2, 2 as published; the last ones 1 where fewer than 8×8 tokens remain."""
    side = min(image)
    return 4, 2 if side >= 64 else 1, 2 if side >= 128 else 1


def soft_split_grids(image: Size, strides: tuple[int, int, int]) -> list[Size]:
    """The (rows, columns) of tokens after each soft split."""
    grids, (rows, columns) = [], image
    for kernel, stride, padding in zip(KERNELS, strides, PADDINGS, strict=True):
        rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (rows, columns))
        grids.append((rows, columns))
    return grids


class TokenPerformer(nn.Module):
    """One attention layer with linear cost: Performer (Choromanski et al., 2021) with frozen orthogonal features.

    (batch, tokens, dim) → (batch, tokens, token_dim), with the values as the skip connection since the width changes.
    The kernel runs in float32 at least: its epsilon of 1e-8 is zero in float16.
    """

    epsilon = 1e-8

    def __init__(self, dim: int, token_dim: int, linear: Linear, drop: float = 0.1) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.kqv = linear(dim, 3 * token_dim)
        self.proj = linear(token_dim, token_dim)
        self.dp = nn.Dropout(drop)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = nn.Sequential(
            linear(token_dim, token_dim), nn.GELU(), linear(token_dim, token_dim), nn.Dropout(drop)
        )
        features = token_dim // 2
        self.w = nn.Parameter(
            nn.init.orthogonal_(torch.empty(features, token_dim)) * math.sqrt(features), requires_grad=False
        )

    def features(self, x: Tensor) -> Tensor:
        """exp(w·x − |x|²/2)/√m, the positive random features of the softmax kernel: (…, token_dim) → (…, m)."""
        w = self.w.to(x.dtype)
        return torch.exp(x @ w.T - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(len(w))

    def attention(self, x: Tensor) -> Tensor:
        key, query, value = self.kqv(x).chunk(3, -1)
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(value.dtype, torch.float32)
            key, query = self.features(key.to(wide)), self.features(query.to(wide))
            normaliser = query @ key.sum(1).unsqueeze(-1) + self.epsilon
            y = query @ (key.mT @ value.to(wide)) / normaliser
        return value + self.dp(self.proj(y.to(value.dtype)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TokenAttention(nn.Module):
    """Softmax attention with one head; scaled by the input's width, as the official models are."""

    def __init__(self, dim: int, token_dim: int, linear: Linear, drop: float) -> None:
        super().__init__()
        self.scale = dim**-0.5
        self.qkv = linear(dim, 3 * token_dim, bias=False)
        self.proj = linear(token_dim, token_dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unsqueeze(1).chunk(3, -1)
        y = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return (value + self.proj_drop(self.proj(y))).squeeze(1)


class TokenTransformer(nn.Module):
    """One softmax attention layer in the place of `TokenPerformer`, for the `_t` variants."""

    def __init__(self, dim: int, token_dim: int, linear: Linear, drop: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = TokenAttention(dim, token_dim, linear, drop)
        self.norm2 = nn.LayerNorm(token_dim)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", linear(token_dim, token_dim))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", linear(token_dim, token_dim))
        self.mlp.add_module("drop", nn.Dropout(drop))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


TOKEN_LAYERS: dict[str, Callable[..., nn.Module]] = {"performer": TokenPerformer, "transformer": TokenTransformer}


class TokensToToken(nn.Module):
    """Image (batch, channels, H, W) → tokens (batch, rows·columns, embed_dim) of the last soft split, raster order."""

    def __init__(
        self,
        image: Size,
        strides: tuple[int, int, int],
        tokens: str,
        channels: int,
        token_dim: int,
        embed_dim: int,
        linear: Linear,
        drop: float | None,
    ) -> None:
        super().__init__()
        self.grids = soft_split_grids(image, strides)
        splits = [nn.Unfold(k, stride=s, padding=p) for k, s, p in zip(KERNELS, strides, PADDINGS, strict=True)]
        self.soft_split0, self.soft_split1, self.soft_split2 = splits
        layer = TOKEN_LAYERS[tokens]
        dropout = {} if drop is None else {"drop": drop}
        self.attention1 = layer(channels * KERNELS[0] ** 2, token_dim, linear, **dropout)
        self.attention2 = layer(token_dim * KERNELS[1] ** 2, token_dim, linear, **dropout)
        self.project = linear(token_dim * KERNELS[2] ** 2, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention1(self.soft_split0(x).mT)
        x = self.attention2(self.soft_split1(x.mT.unflatten(-1, self.grids[0])).mT)
        return self.project(self.soft_split2(x.mT.unflatten(-1, self.grids[1])).mT)
