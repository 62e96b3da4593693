"""Small models of every kind that `convert` and `count_flops` promise to handle."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torchvision.models import VisionTransformer


@dataclass(frozen=True)
class Case:
    """A kind of model: how it is made, the shape of one sample, its batch axis, how many layers `convert` swaps."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    swapped: int
    batch_axis: int = 0

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.make().double().eval()
        with torch.no_grad():  # no zeros anywhere, which would hide a difference
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        return model

    def batch(self, size: int = 3) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(size, *self.shape, generator=generator, dtype=torch.float64)
        return x if self.batch_axis == 0 else x.transpose(0, 1)


class EncoderDecoder(nn.Module):
    """PyTorch's transformer, whose decoder is fed all tokens but the first."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(12, 2, 1, 1, 18, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.transformer(x, x[:, 1:])


def encoder(batch_first: bool = True, norm_first: bool = False) -> nn.TransformerEncoder:
    block = nn.TransformerEncoderLayer(12, 2, 18, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
    return nn.TransformerEncoder(block, num_layers=2, enable_nested_tensor=batch_first and not norm_first)


CASES = {
    "deit": Case(
        lambda: timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=5),
        shape=(3, 32, 32),
        swapped=9,
    ),
    "mixer": Case(lambda: MlpMixer(5, img_size=12, patch_size=4, num_blocks=2, embed_dim=22), (3, 12, 12), swapped=9),
    "torchvision vit": Case(lambda: VisionTransformer(16, 4, 2, 2, 12, 18, num_classes=5), (3, 16, 16), swapped=7),
    "encoder": Case(encoder, (5, 12), swapped=6),
    "encoder, tokens first": Case(lambda: encoder(batch_first=False), (5, 12), swapped=6, batch_axis=1),
    "encoder, norm first": Case(lambda: encoder(norm_first=True), (5, 12), swapped=6),
    "encoder and decoder": Case(EncoderDecoder, (5, 12), swapped=7),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    """Every kind of model in turn; some of them with parametrize("case", [names], indirect=True)."""
    return CASES[request.param]
