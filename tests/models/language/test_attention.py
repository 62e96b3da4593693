"""Attention without a mask where a compiled pass needs none, and the same logits where it needs one."""

import pytest
import torch
from llamas import WAYS, ids, llama

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def without_gradients():
    torch.compiler.reset()
    with torch.no_grad():
        yield


def compiled(model, **inputs) -> tuple[torch.Tensor, list[dict]]:
    """Logits, and the arguments by name of every attention in the graph."""
    calls = []

    def look(graph, inputs):
        calls.extend(dict(node.kwargs) for node in graph.graph.nodes if "dot_product" in str(node.target))
        return graph

    return torch.compile(model, backend=look)(**inputs).logits, calls


PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
CASES = {
    "plain": ({"use_cache": False}, False),
    "prefill": ({"use_cache": True}, False),
    "padding": ({"use_cache": False, "attention_mask": PADDING}, True),
    "packed": ({"use_cache": False, "position_ids": PACKED.expand(2, -1)}, True),
}


@pytest.mark.parametrize("way", [None, *WAYS])
@pytest.mark.parametrize("case", CASES)
def test_a_mask_is_built_only_where_causality_does_not_say_it_all(case, way):
    inputs, masked = CASES[case]
    model = llama(WAYS[way] if way else None)
    inputs = {"input_ids": ids(2, 7), **inputs}
    logits, calls = compiled(model, **inputs)
    assert len(calls) == model.config.num_hidden_layers
    for call in calls:
        assert (call["attn_mask"] is not None) == masked
        assert call["is_causal"] is not masked
    torch.testing.assert_close(logits, model(**inputs).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_another_implementation_may_be_asked_for(implementation):
    model = llama()
    wanted = model(ids(2, 7)).logits
    model.set_attn_implementation(implementation)
    torch.testing.assert_close(model(ids(2, 7)).logits, wanted, rtol=0, atol=1e-5)  # eager: a softmax in float32


def test_a_folder_says_nothing_of_it(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    assert "stl_sdpa" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == model.config._attn_implementation == "stl_sdpa"
    assert type(model).from_pretrained(tmp_path, attn_implementation="eager").config._attn_implementation == "eager"
