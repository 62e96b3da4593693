"""Small LLaMAs, and what holds for them."""

from typing import Any

import torch
from torch import Tensor

from stl import STLLinear

SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WAYS = {  # of keeping a converted model causal
    "tokens": {"basis": "causal", "tile": 4, "rank": 16},
    "products": {"basis": "products", "tile": 2, "rank": 6},
    "batch": {"basis": "hadamard", "tile": 4, "rank": 16, "row_axis": "batch"},
}


def llama(stl: dict[str, Any] | None = None, seed: int = 0, **sizes: Any):
    """In float64, with weights that are not small; with `stl` trained ones, encoded, and then tiles that mix.

    Encoding undoes the mixing where it can, and `products` has none: encoders and decoders move, as in training.
    """
    from models.language.llama import STLLlamaConfig, STLLlamaForCausalLM

    torch.manual_seed(seed)
    config = STLLlamaConfig(
        **{**SIZES, "vocab_size": 40, "max_position_embeddings": 64, "eos_token_id": None, **sizes},
        initializer_range=0.3,
    )
    model = STLLlamaForCausalLM(config).double().eval()
    if stl is not None:
        model.convert(**stl)
        for layer in stl_layers(model):
            for matrix in (layer.encoder, layer.decoder):
                matrix.data += 0.3 * torch.randn_like(matrix)
    return model


def stl_layers(model) -> list[STLLinear]:
    return [layer for layer in model.modules() if isinstance(layer, STLLinear)]


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 40, shape, generator=torch.Generator().manual_seed(seed))


def logits(model, x: Tensor, **options) -> Tensor:
    return model(x, use_cache=False, **options).logits


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def assert_causal(model, x: Tensor, **options) -> None:
    """Changing token i changes no logit before i, to the bit, and that of i."""
    before = logits(model, x, **options)
    for i in range(x.shape[1]):
        changed = x.clone()
        changed[:, i] = (changed[:, i] - 2) % 37 + 3
        after = logits(model, changed, **options)
        assert torch.equal(after[:, :i], before[:, :i])
        assert not torch.equal(after[:, i], before[:, i])
