"""T2T-ViT: a Tokens-to-Token module and a deep-narrow transformer, with any linear layer.

Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet", ICCV 2021. The dense models
take the official checkpoints: the names of their parameters are the official ones.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, resample_abs_pos_embed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.rival import RivalLinear
from models.tokens_to_token import TOKEN_LAYERS, Linear, Size, TokensToToken, soft_split_strides
from stl import SettingError, STLLinear

LINEAR_GROUPS = ("backbone", "t2t", "head")
TOKEN_ORDERS = ("raster", "block", "random")


class Attention(nn.Module):
    """Multi-head softmax attention, (batch, tokens, dim) → the same."""

    def __init__(self, dim: int, heads: int, linear: Linear, drop: float, attn_drop: float) -> None:
        super().__init__()
        self.heads, self.attn_drop = heads, attn_drop
        self.qkv = linear(dim, 3 * dim, bias=False)
        self.proj = linear(dim, dim)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(-2)))


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden: int, linear: Linear, drop: float) -> None:
        super().__init__()
        self.fc1 = linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self, dim: int, heads: int, hidden: int, linear: Linear, drop: float, attn_drop: float, drop_path: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads, linear, drop, attn_drop)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, hidden, linear, drop)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class T2TViT(nn.Module):
    """T2T-ViT with a choice of linear layer.

    Args:
        img_size: side, or (height, width), from 32 to 384 pixels.
        linear: what makes a linear layer, called like `torch.nn.Linear(in_features, out_features, bias=True)`;
            `functools.partial(STLLinear, tile=4, rank=16)` makes them STL.
        linear_groups: which layers `linear` makes, of "backbone", "t2t" and "head"; the others are dense.
        strides: of the three soft splits; None follows the image, see `soft_split_strides`.
        token_order: in which order patch tokens pass the backbone, which STL layers with inexact bases see: "raster"
            makes a tile of four tokens a piece of a row, "block" a 2×2 square, and "random", one shuffle for all
            images, leaves no neighbours together. Class tokens go last, so that the patches' tiles stay aligned.
        class_tokens: how many; their mean is what the head sees. In STL layers one shares its tile with zeros, and four
            fill a tile of 4. With 0 the head sees the mean of the patches.
        t2t_drop_rate: dropout inside the T2T module; None is the official 0.1 for "performer", 0 for "transformer".

    Raises SettingError for an unknown group or order, a negative number of class tokens, or an image size out of range.
    """

    _order: Tensor | None
    _raster: Tensor | None

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        *,
        tokens: str = "performer",
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        token_dim: int = 64,
        linear: Linear = nn.Linear,
        linear_groups: Sequence[str] = LINEAR_GROUPS,
        strides: Sequence[int] | None = None,
        token_order: str = "raster",
        class_tokens: int = 1,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        t2t_drop_rate: float | None = None,
    ) -> None:
        super().__init__()
        _check(img_size, tokens, linear_groups, strides, token_order, class_tokens)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        image: Size = (height, width)
        makers = {group: linear if group in linear_groups else nn.Linear for group in LINEAR_GROUPS}
        self.img_size = image
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.class_tokens = class_tokens
        self.grad_checkpointing = False
        self._head = makers["head"]

        first, second, third = strides or soft_split_strides(image)
        self.tokens_to_token = TokensToToken(
            image, (first, second, third), tokens, in_chans, token_dim, embed_dim, makers["t2t"], t2t_drop_rate
        )
        self.grid_size = self.tokens_to_token.grids[-1]
        order = token_permutation(self.grid_size, token_order)
        self.register_buffer("_order", order, persistent=False)
        self.register_buffer("_raster", None if order is None else order.argsort(), persistent=False)

        positions = sinusoidal_positions(1 + self.grid_size[0] * self.grid_size[1], embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, class_tokens, embed_dim))
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                int(embed_dim * mlp_ratio),
                makers["backbone"],
                drop_rate,
                attn_drop_rate,
                drop_path_rate * index / max(depth - 1, 1),
            )
            for index in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = self._make_head()
        trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_weights)

    def _make_head(self) -> nn.Module:
        return self._head(self.embed_dim, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return {"cls_token"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks' activations again in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for this many classes (none for 0); class tokens, or none, are the only pooling there is."""
        if global_pool not in (None, "", "token"):
            raise SettingError(f"global_pool={global_pool!r} is unknown; T2T-ViT pools by its class tokens ('token')")
        self.num_classes = num_classes
        self.head = self._make_head().to(self.cls_token)
        self.head.apply(_init_weights)

    def forward_features(self, x: Tensor) -> Tensor:
        """(batch, channels, H, W) → (batch, class_tokens + rows·columns, dim): patches, in raster order, come last."""
        if x.ndim != 4 or x.shape[-2:] != self.img_size:
            height, width = self.img_size
            raise SettingError(
                f"images have shape {tuple(x.shape)}; this model takes (batch, channels, {height}, {width})"
            )
        x = self.tokens_to_token(x) + self.pos_embed[:, 1:]
        if self._order is not None:
            x = x[:, self._order]
        class_tokens = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        x = self.pos_drop(torch.cat([x, class_tokens], 1))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing and self.training else block(x)
        x = self.norm(x)
        patches, class_tokens = x.tensor_split([x.shape[1] - self.class_tokens], 1)
        return torch.cat([class_tokens, patches if self._raster is None else patches[:, self._raster]], 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The tokens of `forward_features` → the features that are pooled from them, or (batch, num_classes) logits."""
        x = x[:, : self.class_tokens or None].mean(1)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def load_official_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint of the official code (whole file or its state dict), the averaged weights if it has any.

        Positions are resampled where the image size differs. Raises SettingError where the weights do not fit.
        """
        try:
            self.load_state_dict(filter_official_state_dict(state_dict, self))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise SettingError(f"the official checkpoint does not fit this model: {reason}") from error


def filter_official_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The official checkpoint's weights under this model's names and at its number of positions."""
    assert isinstance(model, T2TViT)
    weights = state_dict.get("state_dict_ema") or state_dict.get("state_dict") or state_dict
    weights = {name.removeprefix("module."): value for name, value in weights.items()}
    if weights["pos_embed"].shape != model.pos_embed.shape:
        weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], list(model.grid_size), num_prefix_tokens=1)
    return weights


def sinusoidal_positions(positions: int, dim: int) -> Tensor:
    """(1, positions, dim): sines at even and cosines at odd features (Vaswani et al., 2017, section 3.5)."""
    feature = torch.arange(dim, dtype=torch.float64)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] / 10000 ** (2 * (feature // 2) / dim)
    return torch.where(feature % 2 == 0, angle.sin(), angle.cos()).float().unsqueeze(0)


def token_permutation(grid: tuple[int, int], order: str) -> Tensor | None:
    """Raster index of the token at each place of the order, (rows·columns,); None for the raster order itself."""
    if order == "raster":
        return None
    rows, columns = grid
    if order == "random":
        return torch.randperm(rows * columns, generator=torch.Generator().manual_seed(0))
    cells = [(r, c) for r in range(rows) for c in range(columns)]
    cells.sort(key=lambda cell: (cell[0] // 2, cell[1] // 2, cell))
    return torch.tensor([r * columns + c for r, c in cells])


def _check(
    img_size: int | Sequence[int],
    tokens: str,
    groups: Sequence[str],
    strides: Sequence[int] | None,
    order: str,
    class_tokens: int,
) -> None:
    sides = [img_size] if isinstance(img_size, int) else list(img_size)
    if len(sides) > 2 or not all(32 <= side <= 384 for side in sides):
        raise SettingError(f"img_size={img_size} must be one side, or height and width, from 32 to 384 pixels")
    if tokens not in TOKEN_LAYERS:
        raise SettingError(f"tokens={tokens!r} is unknown; choose one of {', '.join(TOKEN_LAYERS)}")
    if strides is not None and (len(strides) != 3 or min(strides) < 1):
        raise SettingError(f"strides={list(strides)} must be three positive numbers, one a soft split, or null")
    if order not in TOKEN_ORDERS:
        raise SettingError(f"token_order={order!r} is unknown; choose one of {', '.join(TOKEN_ORDERS)}")
    if class_tokens < 0:
        raise SettingError(f"class_tokens={class_tokens} must be 0, for the mean of the patches, or more")
    if unknown := [group for group in groups if group not in LINEAR_GROUPS]:
        raise SettingError(f"linear_groups has {unknown[0]!r}; choose from {', '.join(LINEAR_GROUPS)}")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, STLLinear | RivalLinear):
        module.reset_parameters(std=0.02)


_NARROW = {"embed_dim": 256, "num_heads": 4, "mlp_ratio": 2.0}
_14 = {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0}
_19 = {"embed_dim": 448, "depth": 19, "num_heads": 7, "mlp_ratio": 3.0}
_24 = {"embed_dim": 512, "depth": 24, "num_heads": 8, "mlp_ratio": 3.0}
VARIANTS: dict[str, dict[str, Any]] = {
    "t2t_vit_tiny": {"embed_dim": 96, "depth": 3, "num_heads": 3, "mlp_ratio": 2.0, "token_dim": 32, "img_size": 32},
    "t2t_vit_7": {**_NARROW, "depth": 7},
    "t2t_vit_10": {**_NARROW, "depth": 10},
    "t2t_vit_12": {**_NARROW, "depth": 12},
    "t2t_vit_14": _14,
    "t2t_vit_19": _19,
    "t2t_vit_24": _24,
    "t2t_vit_t_14": {**_14, "tokens": "transformer"},
    "t2t_vit_t_19": {**_19, "tokens": "transformer"},
    "t2t_vit_t_24": {**_24, "tokens": "transformer"},
}

# The published checkpoints, by their published top-1.
_RELEASE = "https://github.com/yitu-opensource/T2T-ViT/releases/download/main/"
_PUBLISHED = {
    "t2t_vit_7": "71.7_T2T_ViT_7.pth.tar",
    "t2t_vit_10": "75.2_T2T_ViT_10.pth.tar",
    "t2t_vit_12": "76.5_T2T_ViT_12.pth.tar",
    "t2t_vit_14": "81.5_T2T_ViT_14.pth.tar",
    "t2t_vit_19": "81.9_T2T_ViT_19.pth.tar",
    "t2t_vit_24": "82.3_T2T_ViT_24.pth.tar",
    "t2t_vit_t_14": "81.7_T2T_ViTt_14.pth.tar",
    "t2t_vit_t_19": "82.4_T2T_ViTt_19.pth.tar",
    "t2t_vit_t_24": "82.6_T2T_ViTt_24.pth.tar",
}


def _default_cfg(name: str) -> dict[str, Any]:
    side = VARIANTS[name].get("img_size", 224)
    return {
        "url": _RELEASE + _PUBLISHED[name] if name in _PUBLISHED else "",
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs({name: _default_cfg(name) for name in VARIANTS})


def _register(name: str, architecture: dict[str, Any]) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(
            T2TViT, name, pretrained, pretrained_filter_fn=filter_official_state_dict, **{**architecture, **kwargs}
        )

    create.__name__ = name
    register_model(create)


for _name, _architecture in VARIANTS.items():
    _register(_name, _architecture)
