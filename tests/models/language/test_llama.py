"""LLaMA with STL layers: causal, the same in parts as at once, and the same from a folder as before."""

import copy
import json

import pytest
import torch
from llamas import WAYS, assert_causal, assert_close, ids, llama, logits, stl_layers
from torch.utils.flop_counter import FlopCounterMode

from stl import STLMLP, SettingError, convert, count_flops, fuse_blocks, fuse_mlps

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("without_gradients")

LENGTHS = range(1, 14)  # to 3t + 1


@pytest.mark.parametrize("way", WAYS)
def test_the_tiles_of_these_models_mix(way):
    """Else the tests below could not fail."""
    for layer in stl_layers(llama(WAYS[way])):
        x = torch.randn(4, 4, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        changed = x.clone()
        changed[0, 0] += 1
        moved = (layer(changed) - layer(x)).abs().amax(-1) > 1e-3
        neighbours = moved[0] if layer.row_axis == "tokens" else moved[:, 0]
        assert neighbours[: layer.tile].all()


@pytest.mark.parametrize("way", WAYS)
def test_no_logit_depends_on_a_later_token(way):
    model = llama(WAYS[way])
    for n in LENGTHS:
        assert_causal(model, ids(3, n))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_nor_where_sequences_are_padded_or_packed(way, implementation):
    model = llama(WAYS[way])
    model.set_attn_implementation(implementation)
    for length in range(1, 14):
        x = ids(2, length)
        padded = torch.ones_like(x)
        padded[0, : min(3, length - 1)] = 0
        hidden, positions = padded == 0, (padded.cumsum(1) - 1).clamp_min(0)
        before = logits(model, x, attention_mask=padded, position_ids=positions)
        assert before.isfinite().all()
        for i in range(length):
            changed = x.clone()
            changed[:, i] = 2
            after = logits(model, changed, attention_mask=padded, position_ids=positions)
            assert torch.equal(after[:, :i], before[:, :i])
            assert not torch.equal(after[~hidden[:, i], i], before[~hidden[:, i], i])
        packed = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2])[:length].expand(2, -1)
        assert_causal(model, x, position_ids=packed)


def second_document_moves(way: str, begins: int, **options) -> bool:
    """Whether its logits change where the first of two packed documents does."""
    model, x = llama(WAYS[way]), ids(2, 11)
    changed = x.clone()
    changed[:, :begins] = (x[:, :begins] - 2) % 37 + 3
    starts = torch.cat([torch.arange(begins), torch.arange(11 - begins)]).expand(2, -1)
    return not torch.equal(*(model(own, position_ids=starts, **options).logits[:, begins:] for own in (x, changed)))


def test_packed_documents_are_kept_apart_without_a_cache_where_they_share_no_tile():
    assert not second_document_moves("batch", 5, use_cache=False)
    assert not second_document_moves("tokens", 4, use_cache=False)
    assert second_document_moves("tokens", 5, use_cache=False)  # in the tile of the first one's last token
    assert second_document_moves("batch", 5)  # with a cache, transformers takes them for one text


@pytest.mark.parametrize("parts", [[1] * 13, [6, 1, 1, 4, 1]])
@pytest.mark.parametrize("way", WAYS)
def test_with_a_cache_it_gives_in_parts_what_it_gives_at_once(way, parts):
    model, x, cache, got = llama(WAYS[way]), ids(3, 13), None, []
    for part in x.split(parts, 1):
        output = model(part, past_key_values=cache)
        cache = output.past_key_values
        got.append(output.logits)
    assert_close(torch.cat(got, 1), logits(model, x))
    assert all(layer.stream is None for layer in stl_layers(model))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_it_generates_the_same_with_a_cache_and_without(way, batch, options):
    model, options = llama(WAYS[way]), {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, **options}
    got, wanted = (model.generate(ids(batch, 3), use_cache=use_cache, **options) for use_cache in (True, False))
    assert got.shape == (batch, 12)
    if way != "batch" or not options.get("num_beams"):
        assert torch.equal(got, wanted)  # beams change places, and tiles over the batch mix their neighbours


def test_over_the_batch_it_generates_with_a_static_cache():
    model, options = llama(WAYS["batch"]), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    static = model.generate(ids(3, 5), cache_implementation="static", **options)
    assert torch.equal(static, model.generate(ids(3, 5), use_cache=False, **options))


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
def test_over_the_batch_sequences_stand_again_where_there_are_too_few(batch, tmp_path):
    """In every layer by itself: of the first of two blocks the projections are those of copies."""
    llama(WAYS["batch"]).save_pretrained(tmp_path)
    model, seen = type(llama()).from_pretrained(tmp_path), {}
    assert {layer.fill for layer in stl_layers(model)} == {"copies"}
    layer = model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda _, given, output: seen.update(x=given[0], y=output))
    logits(model, ids(batch, 6))
    again = torch.arange(4 * -(-batch // 4)) % batch
    assert seen["x"].shape[0] == batch
    assert_close(seen["y"], layer(seen["x"][again])[:batch])


def test_left_padded_sequences_generate_the_same_with_a_cache_and_without():
    model, x = llama(WAYS["tokens"]), ids(2, 5)
    mask = torch.ones_like(x)
    mask[0, :2] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(x, **options), model.generate(x, use_cache=False, **options))


def test_an_exact_basis_over_the_batch_is_the_dense_model_for_any_number_of_sequences():
    dense = llama()
    model = copy.deepcopy(dense)
    model.convert(basis="exact48", tile=4, rank=48, row_axis="batch")
    for batch in (1, 3, 4, 5):
        assert_close(logits(model, ids(batch, 7)), logits(dense, ids(batch, 7)))
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids(2, 3), **options), dense.generate(ids(2, 3), **options))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("more", [{}, {"train_weight": "dense"}])
def test_a_folder_keeps_it(way, more, tmp_path):
    model, x = llama({**WAYS[way], **more, "groups": ["mlp"]}), ids(2, 7)
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    for kind in (type(model), transformers.AutoModelForCausalLM):
        again = kind.from_pretrained(tmp_path)
        assert again.config.stl == {**WAYS[way], **more, "groups": ["mlp"]}
        assert_close(logits(again, x), logits(model, x))
    assert_causal(again, ids(2, 5))


@pytest.mark.parametrize(
    ("own", "changed", "message"),
    [
        (
            {},
            {"basis": "products"},
            r"^model.layers.0.self_attn.q_proj: the checkpoint has .* basis=causal .*, the model .*=pr",
        ),
        (
            {},
            {"rank": 24},
            r"^model.layers.0.*: the folder has \(.*16.*\), the model \(.*24.*\); make config.json agree$",
        ),
        (
            {},
            {"train_weight": "dense"},
            r"^the folder has no model.*\.dense_weight, and config.json has stl={.*}; make it",
        ),
        (
            {"train_weight": "dense"},
            {"train_weight": "encoded"},
            r"^the folder has no model.*\.weight, and config.json h",
        ),
        (
            {"train_weight": "dense"},
            {"groups": ["mlp"]},
            r"^the folder has no model.layers.0.self_attn.k_proj.weight, and",
        ),
    ],
)
def test_a_folder_whose_configuration_was_changed_is_refused(own, changed, message, tmp_path):
    model = llama(WAYS["tokens"] | own)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["stl"] |= changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match=message):
        type(model).from_pretrained(tmp_path)


def test_a_folder_without_the_settings_of_layers_is_read(tmp_path):
    model = llama(WAYS["tokens"])
    kept = {name: value for name, value in model.state_dict().items() if not name.endswith(".spec")}
    model.save_pretrained(tmp_path, state_dict=kept)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert {name.rpartition(".")[2] for name in info["missing_keys"]} == {"spec"}
    assert_close(logits(again, ids(2, 7)), logits(model, ids(2, 7)))
    copy.deepcopy(model).load_state_dict(again.state_dict())


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [7, 10, 14])
def test_padding_carries_nothing_of_later_tokens_where_a_cache_is_longer(implementation, length):
    model = llama(WAYS["batch"])
    model.set_attn_implementation(implementation)
    x = ids(3, 7)
    padded = torch.ones_like(x)
    padded[0, :3] = 0

    def computed(x: torch.Tensor) -> torch.Tensor:
        cache = transformers.StaticCache(config=model.config, max_cache_len=length)
        return model(x, attention_mask=padded, past_key_values=cache, use_cache=True).logits

    before = computed(x)
    for i in range(3, 7):
        changed = x.clone()
        changed[0, i] = 2
        assert torch.equal(computed(changed)[:, :i], before[:, :i])


@pytest.mark.parametrize(
    ("groups", "swapped"),
    [(["attention"], 8), (["mlp"], 6), (["attention", "mlp"], 14), (["attention", "mlp", "head"], 15)],
)
def test_groups_are_switched_one_by_one(groups, swapped):
    report = llama().convert(**WAYS["tokens"], groups=groups)
    assert len(report.swapped) == swapped
    assert ("lm_head" in report.swapped) == ("head" in groups)


def test_groups_may_be_a_generator():
    model = llama()
    report = model.convert(**WAYS["tokens"], groups=(group for group in ("mlp",)))
    assert len(report.swapped) == 6
    assert model.config.stl["groups"] == ["mlp"]


def test_a_head_of_stl_cuts_its_tiles_from_all_tokens():
    model, x = llama({**WAYS["tokens"], "groups": ["head"]}), ids(2, 7)
    whole = logits(model, x)
    assert_close(logits(model, x, logits_to_keep=2), whole[:, -2:])
    assert_close(logits(model, x, logits_to_keep=torch.tensor([1, 4])), whole[:, [1, 4]])
    assert_close(model(x, logits_to_keep=2, return_dict=False)[0], whole[:, -2:])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(x, **options), model.generate(x, use_cache=False, **options))


@pytest.mark.parametrize("choice", [{}, {"basis": "exact48", "rank": 48}, {"basis": "als", "rank": 32}])
def test_what_would_let_tokens_see_later_ones_is_refused(choice):
    reason = "tokens of a tile would see later ones; use basis='causal'.* or row_axis='batch'"
    with pytest.raises(SettingError, match=reason):
        llama().convert(**choice)
    with pytest.raises(SettingError, match=reason):  # also by the function that takes any model
        convert(llama(), **choice)
    with pytest.raises(SettingError, match=reason):
        type(llama())(type(llama().config)(**{**llama().config.to_dict(), "stl": choice}))


def test_a_copied_cache_goes_on_for_itself():
    model, prompt = llama(WAYS["tokens"]), ids(2, 6)
    cache = model(prompt).past_key_values
    for seed in (1, 2):
        more = ids(2, 3, seed=seed)
        got = model(more, past_key_values=copy.deepcopy(cache)).logits
        assert_close(got, logits(model, torch.cat([prompt, more], 1))[:, 6:])


@pytest.mark.parametrize("way", ["tokens", "products"])
@pytest.mark.parametrize(
    ("choose", "chosen"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0, 1])), [1, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_a_cache_chooses_sequences_by_its_own_methods(choose, chosen, way, own):
    """One that the model makes, and one that it gets."""
    model, x = llama(WAYS[way]), ids(3, 11)
    cache = model(x[:, :7], past_key_values=None if own else transformers.DynamicCache()).past_key_values
    choose(cache)
    assert_close(model(x[chosen, 7:], past_key_values=cache).logits, logits(model, x[chosen])[:, 7:])


def test_a_cache_that_is_emptied_begins_anew():
    model, x = llama(WAYS["tokens"]), ids(2, 6)
    cache = model(x).past_key_values
    cache.reset()
    cache.batch_repeat_interleave(3)  # nothing
    model(x[:, :5], past_key_values=cache)
    assert_close(model(x[:, 5:], past_key_values=cache).logits, logits(model, x)[:, 5:])


def test_caches_that_cannot_be_right_are_refused():
    model, x = llama(WAYS["tokens"]), ids(2, 6)
    cache = model(x).past_key_values
    foreign = llama()(x).past_key_values
    another = llama(WAYS["tokens"])
    of_another = another(x).past_key_values
    cache.crop(-1)
    for wrong, held in ((cache, 5), (foreign, 6), (of_another, 6)):
        with pytest.raises(SettingError, match=rf"past_key_values holds {held} tokens, and the STL layers have seen"):
            model(x, past_key_values=wrong)
    more = torch.cat([x, x], 1)
    assert_close(another(x, past_key_values=of_another).logits, logits(another, more)[:, 6:])  # it still is another's
    static = transformers.StaticCache(config=model.config, max_cache_len=20)
    with pytest.raises(SettingError, match="is a StaticCache, and STL layers over tokens go with a Dyn"):
        model(x, past_key_values=static)
    with pytest.raises(SettingError, match="the model is converted already"):
        model.convert(**WAYS["tokens"])


@pytest.mark.parametrize("way", [None, *WAYS])
def test_macs_are_those_of_the_reference(way):
    model, x = llama(None if way is None else WAYS[way]), ids(3, 10)
    report = count_flops(model, x.shape, torch.int64)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        logits(model, x)
    assert 2 * report.total == counter.get_total_flops()
    assert report.dense_macs["linear"] == 30 * (2 * (24 * 24 * 2 + 24 * 12 * 2 + 3 * 24 * 36) + 24 * 40)
    fuse_mlps(model)
    assert vars(count_flops(model, x.shape, torch.int64)) == vars(report)


def test_its_mlps_are_found_for_the_kernels():
    model, x = llama(WAYS["tokens"]), ids(2, 7)
    wanted = logits(model, x)
    assert len(fuse_mlps(model)) == 2
    assert isinstance(model.model.layers[0].mlp, STLMLP)
    assert_close(logits(model, x), wanted)
    cache = model(x[:, :5]).past_key_values
    assert_close(model(x[:, 5:], past_key_values=cache).logits, wanted[:, 5:])


def test_of_its_blocks_nothing_else_is_fused():
    assert fuse_blocks(llama(WAYS["tokens"])) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_training_keeps_it_causal():
    model = llama(WAYS["tokens"]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.3)
    with torch.enable_grad():
        for seed in range(3):
            optimizer.zero_grad()
            model(ids(2, 9, seed=seed), labels=ids(2, 9, seed=seed)).loss.backward()
            optimizer.step()
    assert_causal(model.eval(), ids(2, 13))


@pytest.mark.parametrize("groups", [[], ["attn"]])
def test_unknown_groups_are_named(groups):
    with pytest.raises(SettingError, match=r"must be some of attention, mlp, head"):
        llama().convert(groups=groups)
    with pytest.raises(SettingError, match="the head shares its weight with the embeddings; leave head out"):
        llama(tie_word_embeddings=True).convert(**WAYS["tokens"], groups=["head"])
