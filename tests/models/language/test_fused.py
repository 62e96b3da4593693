"""Blocks of a merged LLaMA by kernels: what they compute, and where they leave it to transformers' forward."""

import pytest
import torch
from agreement import DEVICE
from llamas import WAYS, ids, llama, logits

from stl import STLMLP, Norm, STLLinear, count_flops

pytest.importorskip("transformers")
pytest.importorskip("triton")

from transformers.models.llama.modeling_llama import LlamaRMSNorm

from models.language.fused import FusedLayer, fuse_llama

pytestmark = pytest.mark.usefixtures("without_gradients")


def fused(way: str, backend: str = "triton"):
    model = llama(WAYS[way], merged=True).float().to(DEVICE)
    assert fuse_llama(model) == [f"model.layers.{i}{part}" for i in range(2) for part in ("", ".mlp")]
    for module in model.modules():
        if isinstance(module, STLLinear | STLMLP):
            module.backend = backend
    return model


@pytest.mark.parametrize("way", WAYS)
def test_the_logits_stay_and_no_norm_is_a_pass_of_its_own(way, monkeypatch):
    model, x, calls = fused(way), ids(4, 9).to(DEVICE), []  # what is fused needs whole tiles
    wanted = logits(llama(WAYS[way], merged=True).float().to(DEVICE), x)
    apply = Norm.apply
    monkeypatch.setattr(Norm, "apply", lambda norm, x: calls.append("norm") or apply(norm, x))
    for name, module in model.named_modules():
        if isinstance(module, LlamaRMSNorm):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    torch.testing.assert_close(logits(model, x), wanted, rtol=1e-3, atol=1e-3)
    assert calls == ["model.norm"]  # before the dense head


@pytest.mark.parametrize("way", WAYS)
def test_it_is_counted_as_what_it_was(way):
    wanted = count_flops(llama(WAYS[way], merged=True).float(), (4, 8), torch.int64)
    for backend in ("torch", "triton"):
        assert vars(count_flops(fused(way, backend), (4, 8), torch.int64)) == vars(wanted)


def test_arguments_by_place_are_those_of_transformers():
    layer, x = fused("tokens").model.layers[0], torch.randn(2, 5, 24, device=DEVICE)
    rotation = torch.ones(1, 5, 6, device=DEVICE), torch.zeros(1, 5, 6, device=DEVICE)
    got, wanted = layer(x, None, position_embeddings=rotation), layer(x, position_embeddings=rotation)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


class Doubled(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden_states)


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.input_layernorm.register_forward_hook(lambda *given: 2 * given[-1]),
        lambda block: setattr(block.post_attention_layernorm, "__class__", Doubled),
        lambda block: block.self_attn.register_forward_pre_hook(lambda *_: None),
    ],
    ids=["a hook of a norm", "another norm", "a hook of the attention"],
)
def test_blocks_that_do_more_are_left_alone(change):
    model = llama(WAYS["tokens"], merged=True)
    change(model.model.layers[0])
    fuse_llama(model)
    assert [type(block) is FusedLayer for block in model.model.layers] == [False, True]


@pytest.mark.parametrize("way", WAYS)
def test_it_streams(way):
    model, x, cache, got = fused(way), ids(2, 8).to(DEVICE), None, []
    for part in x.split([3, 4, 1], 1):  # into a tile, over its end, to the end of the next
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
