"""LLaMA with merged projections: the dense one's numbers, and one encode where several layers read the same x."""

import copy

import pytest
import torch
from llamas import WAYS, assert_causal, assert_close, ids, llama, logits, stl_layers
from torch.utils.flop_counter import FlopCounterMode

from models.sparse24 import Sparse24Linear
from stl import STLMLP, SettingError, count_flops, fuse_mlps

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_model_gives_the_same_logits(bias):
    model, x = llama(attention_bias=bias, mlp_bias=bias), ids(2, 7)
    wanted = logits(model, x)
    for _ in range(2):  # the second time there is nothing to do
        model.merge()
        assert_close(logits(model, x), wanted)
    assert sum("_proj.weight" in name for name in model.state_dict()) == 2 * 4


def test_weights_stay_frozen_and_training():
    model = llama().requires_grad_(False)
    model.merge()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    model = llama().train()
    model.merge()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("way", WAYS)
def test_converted_it_is_the_model_that_was_converted_without_merging(way):
    merged, apart, x = llama(), llama(), ids(3, 9)
    merged.merge()
    for model in (merged, apart):
        model.convert(**WAYS[way])
    assert_close(logits(merged, x), logits(apart, x))
    assert (len(stl_layers(merged)), len(stl_layers(apart))) == (2 * 4, 2 * 7)
    fewer, more = (count_flops(model, x.shape, torch.int64) for model in (merged, apart))
    assert fewer.linear < more.linear
    assert fewer.dense_macs == more.dense_macs


@pytest.mark.parametrize("way", WAYS)
def test_it_is_causal_and_streams(way):
    model, x, cache, got = llama(WAYS[way], merged=True), ids(3, 13), None, []
    assert_causal(model, x)
    for part in x.split([6, 1, 5, 1], 1):
        output = model(part, past_key_values=cache)
        cache = output.past_key_values
        got.append(output.logits)
    assert_close(torch.cat(got, 1), logits(model, x))


@pytest.mark.parametrize("way", [None, *WAYS])
def test_a_folder_keeps_it(way, tmp_path):
    model, x = llama(WAYS[way] if way else None, merged=True), ids(2, 7)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.merged
    assert_close(logits(again, x), logits(model, x))


@pytest.mark.parametrize("way", WAYS)
def test_its_mlps_are_found_for_the_kernels_and_counted_alike(way):
    model, x = llama(WAYS[way], merged=True), ids(3, 10)
    wanted, report = logits(model, x), count_flops(model, x.shape, torch.int64)
    assert len(fuse_mlps(model)) == 2
    assert isinstance(model.model.layers[0].mlp, STLMLP)
    assert_close(logits(model, x), wanted)
    assert vars(count_flops(model, x.shape, torch.int64)) == vars(report)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits(model, x)
    assert 2 * report.total == counter.get_total_flops()


@pytest.mark.parametrize("way", [None, *WAYS])
def test_compiles_without_graph_breaks(way):
    model, x = llama(WAYS[way] if way else None, merged=True), ids(2, 7)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(logits(compiled, x), logits(model, x))


@pytest.mark.parametrize("bias", [True, False])
def test_what_is_merged_is_split_again(bias):
    model = llama(attention_bias=bias, mlp_bias=bias)
    whole = copy.deepcopy(model)
    whole.merge()
    whole.split()
    assert not whole.config.merged
    assert {name: type(module) for name, module in whole.named_modules()} == {
        name: type(module) for name, module in model.named_modules()
    }
    mine, theirs = whole.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("merged", [True, False])
def test_what_is_converted_stays_as_it_is(merged):
    model = llama(WAYS["tokens"], merged=merged)
    with pytest.raises(SettingError, match=r"is converted already, stl=.*; merge or split the dense one"):
        (model.split if merged else model.merge)()
    assert model.config.merged == merged


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda attention: setattr(attention, "v_proj", Sparse24Linear(24, 12, False)), r"^v_proj is Sparse24Linear"),
        (lambda attention: attention.k_proj.register_forward_hook(lambda *_: None), r"^k_proj is Linear.*hooks; only"),
        (lambda attention: attention.q_proj.requires_grad_(False), r"^some of q_proj, k_proj, v_proj are frozen"),
    ],
)
def test_layers_that_cannot_be_one_are_named_and_nothing_changes(change, said):
    model = llama()
    change(model.model.layers[1].self_attn)
    names = list(model.state_dict())
    with pytest.raises(SettingError, match=said):
        model.merge()
    assert list(model.state_dict()) == names
    assert not model.config.merged
