import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from stl import STLMLP, SettingError, STLLinear, STLNormLinear, Streaming, convert, fuse_blocks, fuse_mlps, kernels

few = settings(deadline=None, derandomize=True, max_examples=12)

WIDTH = 8
CAUSAL = [("causal", 2, 4), ("causal", 3, 10), ("causal", 4, 16), ("causal", 4, 24), ("products", 4, 40)]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Block(nn.Module):
    """Causal attention with a cache of keys and values, and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 11), nn.GELU(), nn.Linear(11, WIDTH))

    def forward(self, x: Tensor, cache: dict) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, WIDTH).unbind(2)
        if self in cache:
            k, v = (torch.cat([old, new], 1) for old, new in zip(cache[self], (k, v), strict=True))
        cache[self] = k, v
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v, mask))
        return x + self.mlp(self.norms[1](x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor, cache: dict | None = None) -> Tensor:
        cache = {} if cache is None else cache
        for block in self.blocks:
            x = block(x, cache)
        return self.head(x)


def model(choice: tuple[str, int, int] = ("causal", 4, 16), row_axis: str = "tokens", **options) -> nn.Module:
    name, tile, rank = choice
    torch.manual_seed(0)
    made = Model().double().eval()
    convert(made, basis=name, tile=tile, rank=rank, row_axis=row_axis, causal=True, **options)
    return made


def causal(k: int = 7, m: int = 5, **options) -> STLLinear:
    torch.manual_seed(0)
    return STLLinear(k, m, **{"basis": "causal", "tile": 4, "rank": 16, "dtype": torch.float64} | options)


def in_parts(made: nn.Module, *parts: Tensor) -> Tensor:
    with Streaming(made):
        return torch.cat([made(part) for part in parts], -2)


def with_cache(made: nn.Module, x: Tensor, parts: int | list[int]) -> Tensor:
    cache: dict = {}
    with Streaming(made):
        return torch.cat([made(part, cache) for part in x.split(parts, 1)], 1)


def layer_at_once(layer: STLLinear, x: Tensor) -> Tensor:
    with Streaming(layer):
        return layer(x)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@given(
    choice=st.sampled_from(CAUSAL), parts=st.lists(st.integers(1, 6), min_size=1, max_size=7), batch=st.integers(1, 3)
)
@few
def test_a_model_in_parts_gives_what_it_gives_at_once(choice, parts, batch):
    made, x = model(choice), gaussian(batch, sum(parts), WIDTH)
    assert_close(with_cache(made, x, parts), made(x))
    assert all(layer.stream is None for layer in made.modules() if isinstance(layer, STLLinear))


@given(parts=st.lists(st.integers(0, 5), min_size=1, max_size=5), lead=st.sampled_from([(2,), (2, 3)]))
@few
def test_a_layer_with_a_residual_and_more_axes(parts, lead):
    layer, n = causal(), sum(parts)
    x, residual = gaussian(*lead, n, 7), gaussian(*lead, n, 5, seed=1)
    with Streaming(layer) as stream:
        got = [layer(*part) for part in zip(x.split(parts, -2), residual.split(parts, -2), strict=True)]
        assert stream.seen == n
    assert all(part.is_contiguous() for part in got)
    assert_close(torch.cat(got, -2), layer(x, residual))


@pytest.mark.parametrize("batch", [1, 3, 4, 6])
def test_over_the_batch_nothing_is_remembered(batch):
    made, x = model(("hadamard", 4, 16), "batch"), gaussian(batch, 6, WIDTH)
    assert_close(with_cache(made, x, 1), made(x))


def test_over_the_batch_fewer_samples_than_a_tile_are_as_with_zeros_beside_them():
    layer, x = causal(basis="hadamard", row_axis="batch"), gaussian(3, 6, 7)
    assert_close(layer(x), layer(torch.cat([x, x.new_zeros(1, 6, 7)]))[:3])


@pytest.mark.parametrize(("choice", "exact"), [(("hadamard", 4, 16), False), (("strassen", 2, 7), True)])
def test_over_the_batch_sequences_disturb_each_other_unless_the_product_is_exact(choice, exact):
    made, x = model(choice, "batch", from_dense=exact), gaussian(3, 6, WIDTH)
    alone = torch.cat([with_cache(made, sequence[None], 1) for sequence in x])
    assert torch.allclose(alone, made(x), rtol=0, atol=1e-12) == exact


def test_sequences_are_chosen_and_repeated_as_by_a_beam_search():
    made, x, chosen = model(), gaussian(2, 9, WIDTH), torch.tensor([1, 1, 0])
    cache: dict = {}
    with Streaming(made) as stream:
        stream.reorder(chosen)  # of nothing yet
        made(x[:, :6], cache)
        stream.reorder(chosen)
        cache = {block: tuple(held[chosen] for held in pair) for block, pair in cache.items()}
        got = made(x[chosen, 6:], cache)
    assert_close(got, made(x)[chosen, 6:])


def test_an_error_that_leaves_it_leaves_nothing_behind():
    layer, x = causal(), gaussian(2, 6, 7)
    wanted = layer(x)
    with pytest.raises(SettingError, match="got"):
        in_parts(layer, x[:, :3], x[:1])
    assert layer.stream is None
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
    assert torch.equal(layer(x), wanted)
    assert torch.equal(in_parts(layer, x), wanted)


def test_several_take_turns_and_each_goes_on_where_it_was():
    layer, x, other = causal(), gaussian(2, 7, 7), gaussian(3, 6, 7, seed=1)
    outer, inner = Streaming(layer), Streaming(layer)
    parts = []
    with outer:
        first = layer(x[:, :3])
        for part in other.split(2, 1):
            with inner:
                parts.append(layer(part))
        assert outer.seen == 3
    assert layer.stream is None
    with outer:
        assert_close(torch.cat([first, layer(x[:, 3:])], 1), in_parts(layer, x))
    assert_close(torch.cat(parts, 1), layer(other))


def test_a_copy_goes_on_for_itself_with_the_same_model():
    layer, x, other = causal(), gaussian(2, 9, 7), gaussian(2, 4, 7, seed=1)
    with Streaming(layer) as stream:
        first = layer(x[:, :5])
        with copy.deepcopy(stream) as twin:
            assert_close(torch.cat([first, layer(other)], 1), layer_at_once(layer, torch.cat([x[:, :5], other], 1)))
        assert (stream.seen, twin.seen) == (5, 9)
        assert_close(layer(x[:, 5:]), layer_at_once(layer, x)[:, 5:])


def test_reset_begins_with_other_sequences():
    layer, x = causal(), gaussian(3, 5, 7)
    with Streaming(layer) as stream:
        layer(gaussian(2, 6, 7))
        stream.reset()
        got = torch.cat([layer(part) for part in x.split(2, 1)], 1)
    assert_close(got, layer(x))


def mlp(**options) -> STLMLP:
    torch.manual_seed(0)
    options = {"basis": "causal", "tile": 4, "rank": 16} | options
    first, up, second = (STLLinear(k, m, **options) for k, m in ((7, 9), (7, 9), (9, 7)))
    return STLMLP(first, "silu", second, up=up)


def test_by_kernels_an_mlp_streams_as_one_and_a_norm_with_its_layer():
    normed = STLNormLinear(nn.LayerNorm(7), STLLinear(7, 5, basis="causal", tile=4, rank=16))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made, x = nn.Sequential(mlp(), normed).to(device), gaussian(2, 6, 7, dtype=torch.float32).to(device)
    for layer in (made[0], normed, normed.linear):
        layer.backend = "triton"
    parts = x.split([3, 2, 1], 1)
    with FlopCounterMode(display=False) as counter:
        got = in_parts(made, *parts)
    called = set(map(str, counter.get_flop_counts()["Global"]))
    assert {"stl.hidden_gemm", "stl.norm_encode_gemm"} <= called
    torch.testing.assert_close(got, made(x), rtol=0, atol=1e-5)


class Residual(nn.Module):
    """x + an MLP of a norm of x."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(7), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


@pytest.mark.parametrize("parts", [[7, 1, 1, 1, 1, 1, 1], [3, 10], [8, 5]])
def test_blocks_whose_parts_are_computed_by_kernels_in_turn(parts, monkeypatch):
    """As "auto" does with a long prompt and short steps: what is remembered is the same either way."""
    monkeypatch.setattr(kernels, "use_triton", lambda backend, x, *_: x.shape[-2] >= 6)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made, x = nn.Sequential(Residual(), Residual()), gaussian(2, 13, 7, dtype=torch.float32).to(device)
    assert fuse_blocks(made) == ["0", "1"]
    made.to(device)
    torch.testing.assert_close(in_parts(made, *x.split(parts, 1)), made(x), rtol=0, atol=1e-5)


def test_layers_of_an_mlp_are_called_as_modules_in_a_stream_as_well():
    made, x, calls = mlp(dtype=torch.float64), gaussian(2, 6, 7), []
    for layer in made.layers:
        layer.register_forward_hook(lambda layer, given, y: calls.append(layer) or 2 * y)
    wanted, at_once = made(x), len(calls)
    with Streaming(made):
        got = made(x)
    assert len(calls) == 2 * at_once == 6
    assert_close(got, wanted)


@given(parts=st.lists(st.integers(0, 6), min_size=1, max_size=6), lead=st.sampled_from([(2,), (2, 3)]))
@few
def test_an_mlp_with_a_residual_and_more_axes(parts, lead):
    made, n = mlp(dtype=torch.float64), sum(parts)
    x, residual = gaussian(*lead, n, 7), gaussian(*lead, n, 7, seed=1)
    with Streaming(made) as stream:
        got = [made(*part) for part in zip(x.split(parts, -2), residual.split(parts, -2), strict=True)]
        assert stream.seen == n
    assert_close(torch.cat(got, -2), made(x, residual))


def test_sequences_of_an_mlp_are_chosen():
    made, x = mlp(dtype=torch.float64), gaussian(2, 7, 7)
    with Streaming(made) as stream:
        made(x[:, :6])
        stream.reorder(torch.tensor([1, 0, 1]))
        got = made(x[[1, 0, 1], 6:])
    assert_close(got, made(x)[[1, 0, 1], 6:])


def test_in_an_mlp_of_which_one_layer_streams_that_one_does():
    made, x = mlp(dtype=torch.float64), gaussian(2, 6, 7)
    parts = x.split(3, 1)
    hidden = [torch.nn.functional.silu(made.gate_proj(part)) * made.up_proj(part) for part in parts]
    with Streaming(made.down_proj):
        got = torch.cat([made(part) for part in parts], 1)
    assert_close(got, made.down_proj(torch.cat(hidden, 1)))


def test_a_model_with_fused_mlps():
    made, x = model(), gaussian(2, 7, WIDTH)
    assert fuse_mlps(made) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert_close(with_cache(made, x, 3), made(x))


def test_lone_tokens_and_dense_models_remember_nothing():
    layer, dense, x = causal(), nn.Linear(7, 5).double(), gaussian(5, 7)
    with Streaming(layer) as stream, Streaming(dense):
        got = layer(x), layer(x[:2])
        assert stream.seen == 0
        dense(x)
    assert torch.equal(got[0], layer(x))
    assert torch.equal(got[1], layer(x[:2]))


@pytest.mark.parametrize("choice", [("hadamard", 4, 16), ("strassen", 2, 7)])
def test_a_basis_that_is_not_causal_is_one_line(choice):
    name, tile, rank = choice
    made = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 5))
    convert(made, basis=name, tile=tile, rank=rank)
    with pytest.raises(SettingError) as caught:
        Streaming(made)
    assert str(caught.value) == (
        f"layer '0' has basis={name!r} over tokens, where a token sees later ones of its tile and cannot be computed "
        "before them; convert with basis='causal' or row_axis='batch'"
    )
    assert made[0].stream is None


@pytest.mark.parametrize("row_axis", ["tokens", "batch"])
@pytest.mark.parametrize("make", [lambda: nn.TransformerEncoderLayer(8, 2, 8), lambda: nn.MultiheadAttention(8, 2)])
def test_attention_without_a_cache_is_one_line(make, row_axis):
    made = nn.ModuleDict({"at": make()})
    convert(made, basis="causal", row_axis=row_axis)
    with pytest.raises(SettingError, match=r"^module 'at' is a \w+, which keeps no keys and values of earlier tokens"):
        Streaming(made)


def test_another_batch_is_one_line():
    layer = causal()
    with Streaming(layer):
        layer(gaussian(2, 3, 7))
        with pytest.raises(SettingError, match=r"was streaming sequences of shape \(2,\) and got \(3,\); use reorder"):
            layer(gaussian(3, 1, 7))


def test_a_layer_that_is_called_twice_in_a_pass_is_one_line():
    layer = causal(7, 7)
    made = nn.Sequential(layer, layer)
    with (
        Streaming(made),
        pytest.raises(SettingError, match=r"^layer '0' was called 2 times in one pass; within Streaming\(model\)"),
    ):
        made(gaussian(2, 3, 7))


class LastOnly(nn.Module):
    """Gives the logits of the last token only."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = causal(7, 7), causal(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[:, -1:])


def test_a_layer_that_does_not_see_every_token_is_one_line():
    made = LastOnly()
    with Streaming(made) as stream:
        with pytest.raises(SettingError, match=r"^layer 'head' has seen 1 of 3 tokens; within Streaming\(model\)"):
            made(gaussian(2, 3, 7))
        stream.reset()
        made(gaussian(2, 1, 7))


def test_gradients_pass_through_what_is_remembered():
    layer, x, weights = causal(), gaussian(2, 11, 7), gaussian(2, 11, 5, seed=1)
    with torch.enable_grad():
        wanted = torch.autograd.grad((layer(x) * weights).sum(), [*layer.parameters()])
        got = torch.autograd.grad((in_parts(layer, *x.split([3, 3, 5], 1)) * weights).sum(), [*layer.parameters()])
    for one, other in zip(got, wanted, strict=True):
        assert_close(one, other)
