import pytest
import torch
from torch import Tensor, nn

from stl import SettingError, STLLinear, STLMultiheadAttention

WIDTH, HEADS, BATCH, QUERIES, KEYS = 6, 2, 3, 5, 7
EXACT = {"basis": "strassen", "tile": 2, "rank": 7}
INEXACT = {"basis": "hadamard", "tile": 2, "rank": 4}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(settings: dict = EXACT, **arguments) -> tuple[nn.MultiheadAttention, STLMultiheadAttention]:
    torch.manual_seed(0)
    dense = nn.MultiheadAttention(WIDTH, HEADS, **{"batch_first": True, "dtype": torch.float64} | arguments)
    with torch.no_grad():
        for parameter in dense.parameters():  # the biases too, which PyTorch starts at zero
            parameter.normal_()
    return dense, STLMultiheadAttention(dense, from_dense=True, **settings)


def inputs(
    kdim: int = WIDTH, vdim: int = WIDTH, batch_first: bool = True, batched: bool = True, same: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    if same:
        x = gaussian(BATCH, QUERIES, WIDTH)
        query = key = value = x if batch_first else x.transpose(0, 1)
    else:
        shapes = ((QUERIES, WIDTH), (KEYS, kdim), (KEYS, vdim))
        query, key, value = (gaussian(BATCH, *shape, seed=i) for i, shape in enumerate(shapes))
        if not batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    return (query, key, value) if batched else (query[0], key[0], value[0])


def check(dense: nn.Module, stl: nn.Module, *args, **kwargs) -> None:
    """The same outputs, weights and gradients."""
    args = [x.clone().requires_grad_() for x in args]
    (y, weights), (wanted, wanted_weights) = stl(*args, **kwargs), dense(*args, **kwargs)
    torch.testing.assert_close(y, wanted)
    assert (weights is None) == (wanted_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, wanted_weights)
    torch.testing.assert_close(*(torch.autograd.grad(z.square().sum(), args) for z in (y, wanted)))


padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
padding[0, 5:] = padding[2, 1:3] = True  # every query keeps a key, here and below
causal = torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1)
per_head = gaussian(BATCH * HEADS, QUERIES, KEYS, seed=8) > 1
per_head[..., 0] = False
MASKS = {
    "none": {},
    "padding bool": {"key_padding_mask": padding},
    "padding float": {"key_padding_mask": gaussian(BATCH, KEYS, seed=7)},
    "2-D bool": {"attn_mask": causal},
    "2-D float": {"attn_mask": gaussian(QUERIES, KEYS, seed=9)},
    "3-D bool": {"attn_mask": per_head},
    "3-D float": {"attn_mask": gaussian(BATCH * HEADS, QUERIES, KEYS, seed=9)},
    "2-D bool and padding bool": {"attn_mask": causal, "key_padding_mask": padding},
    "3-D float and padding float": {
        "attn_mask": gaussian(BATCH * HEADS, QUERIES, KEYS, seed=9),
        "key_padding_mask": gaussian(BATCH, KEYS, seed=7),
    },
    "causal hint": {"attn_mask": causal, "is_causal": True},
}
WEIGHTS = [
    {"need_weights": False},
    {"need_weights": True},
    {"need_weights": True, "average_attn_weights": False},
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_weights_are_those_of_the_dense_module(mask, weights):
    check(*pair(), *inputs(), **MASKS[mask], **weights)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    "sizes",
    [{"same": True}, {}, {"kdim": 5, "vdim": 9}, {"kdim": 5}, {"batched": False}, {"kdim": 5, "batched": False}],
)
def test_layouts_and_sizes_are_those_of_the_dense_module(sizes, batch_first, bias, weights):
    widths = {name: sizes[name] for name in ("kdim", "vdim") if name in sizes}
    dense, stl = pair(bias=bias, batch_first=batch_first, **widths)
    check(dense, stl, *inputs(batch_first=batch_first, **sizes), **weights)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept_and_dropout_acts_in_training_only(training):
    dense, _ = pair(dropout=0.5)
    stl = STLMultiheadAttention(dense.train(training), from_dense=True, **EXACT)
    assert stl.training == training
    for weights in WEIGHTS:
        runs = [stl(*inputs(), **weights)[0] for _ in range(2)]
        assert torch.equal(*runs) != training


def test_unbatched_masks_are_those_of_the_dense_module():
    masks = {"key_padding_mask": gaussian(KEYS, seed=7), "attn_mask": gaussian(HEADS, QUERIES, KEYS, seed=9)}
    for weights in WEIGHTS:
        check(*pair(), *inputs(batched=False), **masks, **weights)


def test_every_projection_is_an_stl_layer_with_the_given_settings():
    _, stl = pair(INEXACT | {"train_basis": False, "row_axis": "batch"}, kdim=5, vdim=9)
    layers = dict(stl.named_children())
    assert {name: layer.in_features for name, layer in layers.items()} == {
        "q_proj": WIDTH,
        "k_proj": 5,
        "v_proj": 9,
        "out_proj": WIDTH,
    }
    for layer in layers.values():
        assert isinstance(layer, STLLinear)
        assert (layer.basis, layer.tile, layer.rank, layer.row_axis) == ("hadamard", 2, 4, "batch")
        assert not layer.train_basis


@pytest.mark.parametrize("kdim", [WIDTH, 5])
def test_frozen_projections_stay_frozen(kdim):
    dense, _ = pair(kdim=kdim)
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_(name in ("in_proj_bias", "out_proj.weight"))
    stl = STLMultiheadAttention(dense, from_dense=False, **INEXACT)
    biases = {f"{role}_proj.bias" for role in "qkv"}
    trained = {name for name, parameter in stl.named_parameters() if parameter.requires_grad}
    assert trained == biases | {f"out_proj.{name}" for name in ("weight", "encoder", "decoder")}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
def test_tiles_are_cut_along_the_same_axis_in_both_layouts(row_axis, batch_first):
    _, stl = pair(INEXACT | {"row_axis": row_axis}, batch_first=batch_first)
    _, reference = pair(INEXACT | {"row_axis": row_axis}, batch_first=True)
    y = stl(*inputs(batch_first=batch_first))[0]
    torch.testing.assert_close(y if batch_first else y.transpose(0, 1), reference(*inputs())[0])


@pytest.mark.parametrize("batch_first", [True, False])
def test_samples_do_not_see_each_other(batch_first):
    _, stl = pair(INEXACT, batch_first=batch_first)
    x, axis = inputs(batch_first=batch_first), 0 if batch_first else 1
    together = stl(*x, need_weights=False)[0]
    for sample in range(BATCH):
        alone = stl(*(part.narrow(axis, sample, 1) for part in x), need_weights=False)[0]
        torch.testing.assert_close(alone, together.narrow(axis, sample, 1), rtol=0, atol=1e-12)


def test_a_causal_hint_without_its_mask_is_refused_as_in_pytorch():
    dense, stl = pair()
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        dense(*inputs(), is_causal=True)
    with pytest.raises(SettingError, match=r"is_causal=True .* attn_mask"):
        stl(*inputs(), is_causal=True)
