"""Blocks of a merged LLaMA by kernels: what they compute, and where they leave it to transformers' forward."""

import pytest
import torch
from agreement import DEVICE
from llamas import WAYS, ids, llama, logits
from torch.utils.flop_counter import FlopCounterMode

from stl import STLMLP, STLLinear

pytest.importorskip("transformers")
pytest.importorskip("triton")

from models.language.fused import FusedLayer, fuse_llama


@pytest.fixture(autouse=True)
def without_gradients():
    torch.compiler.reset()
    with torch.no_grad():
        yield


def fused(way: str, backend: str = "triton"):
    model = llama(WAYS[way], merged=True).float().to(DEVICE)
    assert fuse_llama(model) == [f"model.layers.{i}{part}" for i in range(2) for part in ("", ".mlp")]
    for module in model.modules():
        if isinstance(module, STLLinear | STLMLP):
            module.backend = backend
    return model


def operators(model, x: torch.Tensor) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        logits(model, x)
    return {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("way", WAYS)
def test_the_logits_stay_and_no_norm_is_a_pass_of_its_own(way):
    model, x = fused(way), ids(3, 9).to(DEVICE)
    wanted = logits(llama(WAYS[way], merged=True).float().to(DEVICE), x)
    torch.testing.assert_close(logits(model, x), wanted, rtol=1e-3, atol=1e-3)
    calls = []
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    assert "stl.norm_encode_gemm" in operators(model, x)
    assert calls == []


@pytest.mark.parametrize("way", WAYS)
def test_it_streams(way):
    model, x, cache, got = fused(way), ids(3, 13).to(DEVICE), None, []
    for part in x.split([4, 3, 1, 5], 1):
        output = model(part, past_key_values=cache)
        cache = output.past_key_values
        got.append(output.logits)
    torch.testing.assert_close(torch.cat(got, 1), logits(model, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_without_kernels_it_is_what_it_was_to_the_bit(way):
    x = ids(3, 9).to(DEVICE)
    assert torch.equal(logits(fused(way, "torch"), x), logits(llama(WAYS[way], merged=True).float().to(DEVICE), x))


def test_compiles_without_graph_breaks():
    model, x = fused("tokens"), ids(2, 7).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, x), logits(model, x), rtol=1e-3, atol=1e-3)


def test_blocks_of_other_layers_are_left_alone():
    for model in (llama(merged=True), llama(WAYS["tokens"]), llama({**WAYS["tokens"], "groups": ["mlp"]}, merged=True)):
        fuse_llama(model)
        assert not any(isinstance(module, FusedLayer) for module in model.modules())
