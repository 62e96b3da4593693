"""Attention without a mask where a compiled pass needs none, and the same logits where it needs one."""

from itertools import product

import pytest
import torch
from llamas import WAYS, ids, llama

pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("without_gradients")


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


@pytest.mark.parametrize(
    ("case", "way"),
    [*product(CASES, [None]), *product(["plain"], WAYS), ("prefill", "tokens"), ("packed", "tokens")],
)
def test_attention_gets_a_mask_only_where_causality_does_not_say_it_all(case, way):
    inputs, masked = CASES[case]
    model = llama(WAYS[way] if way else None, num_hidden_layers=1)
    inputs = {"input_ids": ids(2, 7), **inputs}
    logits, calls = compiled(model, **inputs)
    assert len(calls) == model.config.num_hidden_layers
    for call in calls:
        assert (call["attn_mask"] is not None) == masked
        assert call["is_causal"] is not masked
    torch.testing.assert_close(logits, model(**inputs).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_an_implementation_that_is_asked_for(case, implementation):
    """Compiled as well: only sdpa may go without a mask."""
    model, inputs = llama(), {"input_ids": ids(2, 7), **CASES[case][0]}
    wanted = model(**inputs).logits[1]  # without padding
    model.set_attn_implementation(implementation)
    got = compiled(model, **inputs)[0][1]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)  # eager: a softmax in float32


def test_a_mask_of_four_axes_and_a_mask_given_by_place_are_kept():
    model, x = llama(), ids(2, 7)
    wanted = model(x, attention_mask=PADDING).logits
    mask = torch.ones(7, 7, dtype=torch.bool).tril() & PADDING.bool()[:, None, None, :]
    torch.testing.assert_close(compiled(model, input_ids=x, attention_mask=mask)[0][1], wanted[1], rtol=0, atol=1e-10)
    hidden = model.model(x, PADDING).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), wanted, rtol=0, atol=1e-10)


def test_a_cache_that_holds_tokens_keeps_its_mask():
    model, x = llama(), ids(2, 7)
    first = model(x[:, :4], use_cache=True)
    logits, calls = compiled(model, input_ids=x[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    assert [call["attn_mask"] is not None for call in calls] == [True] * model.config.num_hidden_layers
    torch.testing.assert_close(logits, model(x).logits[:, 4:], rtol=0, atol=1e-10)


def test_what_else_is_handed_through_knows_nothing_of_it():
    """The loss function gets what the model gets beside its own arguments."""
    model, given = llama(), {}
    model.loss_function = lambda logits, labels, vocab_size, **rest: given.update(rest) or logits.sum()
    model(ids(2, 7), labels=ids(2, 7))
    assert not given
    assert model.config._attn_implementation == "sdpa"


def test_continuous_batching_gives_the_tokens_of_generate():
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, prompt = llama().float(), ids(1, 5)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    wanted = model.generate(prompt, generation_config=config)[0, 5:].tolist()
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # else as much as half of the memory takes
    (got,) = model.generate_batch(prompt.tolist(), config, small).values()
    assert got.generated_tokens == wanted
