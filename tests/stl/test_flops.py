import json
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import cycle, pairwise
from math import ceil, prod

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stl import FlopReport, SettingError, STLLinear, convert, count_flops
from stl.flops import whole_samples

few = settings(deadline=None, derandomize=True, max_examples=25)

BASES = [("strassen", 2, 7), ("frame", 4, 24), ("hadamard", 8, 64)]


def make_layer(
    k: int, m: int, choice: tuple[str, int, int] = ("hadamard", 4, 16), row_axis: str = "tokens"
) -> STLLinear:
    name, tile, rank = choice
    return STLLinear(k, m, basis=name, tile=tile, rank=rank, row_axis=row_axis)


@contextmanager
def fastpath(enabled: bool) -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def measure(model: nn.Module, x: Tensor) -> dict[str, int]:
    """MACs of every module that is called, with its children, by name, as PyTorch's counter measures them."""
    counter = FlopCounterMode(display=False)
    with fastpath(False), sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:
        model.eval()(x)
    flops, root = counter.get_flop_counts(), type(model).__name__
    uncalled = {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    uncalled |= {m for m in model.modules() if isinstance(m, nn.ModuleList)}
    names = {name: f"{root}.{name}" if name else root for name, m in model.named_modules() if m not in uncalled}
    return {name: sum(flops.get(key, {}).values()) // 2 for name, key in names.items()}


def assert_counted_as_measured(model: nn.Module, report: FlopReport, x: Tensor) -> None:
    measured = measure(model, x)
    for name in measured:
        rows = [row for row in report.layers if not name or row.name == name or row.name.startswith(f"{name}.")]
        assert sum(row.macs for row in rows) == measured[name], name
    assert report.total == measured[""] > 0
    assert report.linear == sum(row.macs for row in report.layers if row.kind != "product")


@pytest.mark.parametrize("choice", BASES)
@given(shape=st.lists(st.integers(1, 9), max_size=3), k=st.integers(1, 20), m=st.integers(1, 20), batch=st.booleans())
@few
def test_a_layer_costs_what_the_formulas_say_and_the_counter_measures(choice, shape, k, m, batch):
    _, t, r = choice
    layer = make_layer(k, m, choice, "batch" if batch else "tokens")
    # The rows that share a tile: along axis 0, or along axis -2 where there is a token axis; else every row is alone.
    axis = (shape[:1] if batch else shape[1:][-1:]) or [1]
    n_tiles = ceil(axis[0] / t) * prod(shape) // axis[0]
    k_tiles, m_tiles = ceil(k / t), ceil(m / t)

    report = count_flops(layer, (*shape, k))

    (row,) = report.layers
    assert (row.kind, row.tile, row.rank) == ("stl", t, r)
    assert (row.rows, row.in_features, row.out_features) == (prod(shape), k, m)
    assert row.core == n_tiles * k_tiles * m_tiles * r
    assert row.encode == n_tiles * k_tiles * t**2 * r
    assert row.decode == n_tiles * m_tiles * t**2 * r
    assert row.macs == report.total == report.linear == row.core + row.encode + row.decode
    assert row.dense_macs == prod(shape) * k * m
    assert row.params == report.params == r * k_tiles * m_tiles + 2 * r * t**2 + m
    assert_counted_as_measured(layer, report, torch.zeros(*shape, k))


@given(shape=st.lists(st.integers(1, 9), max_size=3), k=st.integers(1, 20), m=st.integers(1, 20), bias=st.booleans())
@few
def test_a_dense_layer_costs_n_times_k_times_m(shape, k, m, bias):
    linear = nn.Linear(k, m, bias)
    report = count_flops(linear, (*shape, k))
    (row,) = report.layers
    assert (row.kind, row.macs, row.dense_macs, row.core) == ("dense", *[prod(shape) * k * m] * 3)
    assert (row.encode, row.decode, row.params) == (0, 0, k * m + bias * m)
    assert report.flop_factor == {"core": 1.0, "linear": 1.0, "total": 1.0}
    assert_counted_as_measured(linear, report, torch.zeros(*shape, k))


@pytest.mark.parametrize(("choice", "row_axis"), list(zip([None, *BASES], cycle(["tokens", "batch"]), strict=False)))
def test_every_module_of_a_model_is_counted_as_measured(case, choice, row_axis):
    model, x = case.build(), case.batch()
    if choice is not None:
        name, tile, rank = choice
        convert(model, basis=name, tile=tile, rank=rank, row_axis=row_axis)
    assert_counted_as_measured(model, count_flops(model, x.shape), x)


@pytest.mark.parametrize(
    ("name", "linear", "total"),
    [  # patch embedding and, in deit, attention over 197 tokens come on top of the linear layers
        ("deit_tiny_patch16_224", 12 * 12 * 197 * 192**2 + 192 * 1000, 196 * 768 * 192 + 12 * 2 * 197**2 * 192),
        ("mixer_s32_224", 8 * (2 * 512 * 49 * 256 + 2 * 49 * 512 * 2048) + 512 * 1000, 49 * 3072 * 512),
    ],
)
def test_published_models_at_their_size(name, linear, total):
    model = timm.create_model(name)
    dense = count_flops(model, (3, 224, 224))
    assert dense.linear == linear
    assert dense.total == linear + total
    convert(model, tile=4, rank=24, basis="frame")
    report = count_flops(model, (3, 224, 224))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert_counted_as_measured(model, report, torch.zeros(1, 3, 224, 224))
    assert report.dense_macs == {"total": dense.total, "linear": dense.linear}
    assert report.flop_factor["core"] == pytest.approx(64 / 24)


def test_dense_macs_of_a_converted_model_are_those_of_the_model_before(case):
    model, shape = case.build(), case.batch().shape
    dense = count_flops(model, shape)
    convert(model, basis="frame", tile=4, rank=24)
    report = count_flops(model, shape)
    assert report.dense_macs == dense.dense_macs == {"total": dense.total, "linear": dense.linear}
    assert report.macs["linear"] == report.linear == sum(report.macs[part] for part in ("core", "encode", "decode"))
    assert report.macs["total"] == report.total
    assert report.total - report.linear == dense.total - dense.linear
    factor = report.flop_factor
    assert factor["core"] == pytest.approx(4**3 / 24)
    assert factor["linear"] == pytest.approx(dense.linear / report.linear)
    assert factor["total"] == pytest.approx(dense.total / report.total)
    assert report.params == sum(parameter.numel() for parameter in model.parameters())


@given(
    dims=st.lists(st.integers(1, 33), min_size=2, max_size=5),
    rows=st.integers(1, 9),
    tile=st.integers(2, 4),
    data=st.data(),
)
@few
def test_core_factor_is_t_cubed_over_r_whatever_the_padding(dims, rows, tile, data):
    rank = data.draw(st.integers(1, tile**3))
    model = nn.Sequential(*[make_layer(k, m, ("products", tile, rank)) for k, m in pairwise(dims)])
    report = count_flops(model, (2, rows, dims[0]))
    assert report.flop_factor["core"] == pytest.approx(float(Fraction(tile**3, rank)))
    assert report.macs["core"] == sum(row.core for row in report.layers)


def test_a_mixed_model_keeps_dense_and_stl_layers_apart():
    model = nn.Sequential(make_layer(8, 8), nn.Linear(8, 8), nn.Conv1d(4, 2, 1))
    report = count_flops(model, (1, 4, 8))
    assert [(row.name, row.kind) for row in report.layers] == [("0", "stl"), ("1", "dense"), ("2", "product")]
    assert report.linear == report.layers[0].macs + report.layers[1].macs
    assert report.total == report.linear + 4 * 2 * 8
    assert report.flop_factor["core"] == 4


class Factors(nn.Module):
    """A linear layer of a kind that the count does not know, made of two that it knows."""

    kind = "factors"

    def __init__(self, in_features: int, rank: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.inner, self.outer = nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x))

    def macs(self, shape: tuple[int, ...]) -> int:
        return prod(shape[:-1]) * self.inner.out_features * (self.in_features + self.out_features)


def test_a_layer_of_another_kind_has_the_one_row_that_it_asks_for():
    model = nn.Sequential(Factors(8, 2, 6), make_layer(6, 6), nn.Linear(6, 4), nn.Conv1d(5, 1, 1))
    report = count_flops(model, (3, 5, 8))
    assert [(row.name, row.kind) for row in report.layers] == [
        ("0", "factors"),
        ("1", "stl"),
        ("2", "dense"),
        ("3", "product"),
    ]
    row = report.layers[0]
    assert (row.rows, row.in_features, row.out_features, row.params) == (15, 8, 6, 2 * 8 + 2 * 6 + 6)
    assert row.macs == row.core == 15 * 2 * (8 + 6)
    assert row.dense_macs == 15 * 8 * 6
    assert report.dense_macs["linear"] == 15 * (8 * 6 + 6 * 6 + 6 * 4)
    assert report.flop_factor["linear"] == pytest.approx(report.dense_macs["linear"] / report.linear)
    assert report.flop_factor["core"] == 4  # of the STL layer alone
    assert report.linear == sum(report.macs[part] for part in ("core", "encode", "decode"))
    measured = measure(model, torch.zeros(3, 5, 8))
    assert (row.macs, report.total) == (measured["0"], measured[""])
    assert count_flops(model[0], (5, 8)).flop_factor == {
        "core": 1.0,
        "linear": pytest.approx(48 / 28),
        "total": pytest.approx(48 / 28),
    }


def test_a_layer_used_twice_is_paid_twice_and_owned_once():
    layer = make_layer(8, 8)
    report = count_flops(nn.Sequential(layer, nn.ReLU(), layer), (4, 8))
    assert len(report.layers) == 2
    assert report.total == 2 * count_flops(layer, (4, 8)).total
    assert report.params == count_flops(layer, (4, 8)).params


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_attention_of_pytorch_has_a_row_for_every_projection(bias, need_weights):
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, bias=bias, kdim=5, vdim=7, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x[..., :6], key=x[..., :5], value=x[..., :7], need_weights=need_weights)[0]

    model = Cross()
    report = count_flops(model, (2, 4, 8))
    rows = {row.name: row for row in report.layers}
    assert {name: row.macs for name, row in rows.items()} == {
        "attention.q_proj": 8 * 6 * 6,
        "attention.k_proj": 8 * 5 * 6,
        "attention.v_proj": 8 * 7 * 6,
        "attention.out_proj": 8 * 6 * 6,
        "attention": 2 * 2 * 4 * 4 * 6,
    }
    assert sum(row.params for row in rows.values()) == report.params
    assert_counted_as_measured(model, report, torch.zeros(2, 4, 8))


@pytest.mark.parametrize("case", ["deit", "mixer", "torchvision vit"], indirect=True)
def test_an_image_shape_may_leave_out_the_batch_axis(case, caplog):
    model = case.build()
    bare, full = count_flops(model, case.shape), count_flops(model, (1, *case.shape))
    assert bare == full
    assert count_flops(model, list(case.shape)).to_dict() == full.to_dict()
    assert count_flops(model, (3, *case.shape)).dense_macs["total"] == 3 * full.dense_macs["total"]
    assert not caplog.records


def test_to_dict_is_plain_json():
    report = count_flops(nn.Sequential(make_layer(7, 5), nn.Conv1d(3, 2, 1)), (2, 3, 7))
    plain = report.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["unit"] == "MACs"
    assert plain["input_shape"] == [2, 3, 7]
    assert set(plain["macs"]) == {"total", "linear", "core", "encode", "decode"}
    assert set(plain["dense_macs"]) == {"total", "linear"}
    assert set(plain["flop_factor"]) == {"core", "linear", "total"}
    assert [row["name"] for row in plain["layers"]] == ["0", "1"]
    for name in ("macs", "dense_macs", "core", "encode", "decode", "rows", "params"):
        assert all(type(row[name]) is int for row in plain["layers"])


def test_the_printed_report_has_a_line_per_layer_and_the_totals():
    report = count_flops(nn.Sequential(make_layer(7, 5), nn.Linear(5, 900)), (1000, 7))
    head, first, second, last = str(report).splitlines()
    assert head.split()[:3] == ["layer", "kind", "rows"]
    assert first.split()[:5] == ["0", "stl", "1000", "7", "5"]
    assert second.split() == ["1", "dense", "1000", "5", "900", "4,500,000", "4,500,000"]
    assert f"total {report.total:,} MACs" in last


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("case", ["encoder", "deit"], indirect=True)
def test_counting_leaves_no_trace(case, enabled, fails):
    model, x = case.build(), case.batch()
    convert(model)
    model.train()
    list(model.children())[-1].eval()  # a mixture of modes
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes, wanted = [module.training for module in model.modules()], model(x)
    random, grad = torch.get_rng_state(), torch.is_grad_enabled()
    with fastpath(enabled):
        if fails:
            with pytest.raises(SettingError):
                count_flops(model, (2, 2, 2, 2, 2))
        else:
            count_flops(model, x.shape)
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() == grad
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for name, tensor in model.state_dict().items():
        assert not isinstance(tensor, FakeTensor)
        assert torch.equal(tensor, state[name])
    assert torch.equal(model(x), wanted)


class Cached(nn.Module):
    """Keeps a tensor from one forward pass to the next, as timm's LeViT and rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.cache = nn.Linear(4, 4), {}

    def forward(self, x: Tensor) -> Tensor:
        if x.shape not in self.cache:
            self.cache[x.shape] = torch.ones(x.shape)
        return self.linear(x) + self.cache[x.shape]


def test_what_a_model_caches_stays_real():
    model = Cached()
    count_flops(model, (2, 4))
    assert model.cache == {}
    assert not isinstance(model(torch.zeros(2, 4)), FakeTensor)


class Queried(nn.Module):
    """Feeds a layer with an expanded parameter, as timm's CaiT does; the bare counter of PyTorch fails on it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.linear = nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.query.expand(len(x), -1, -1))


def test_a_layer_may_be_fed_with_a_parameter():
    assert count_flops(Queried(), (2, 3, 4)).total == 2 * 4 * 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_is_computed(device):
    model = nn.Sequential(nn.Linear(1000, 100), make_layer(100, 8)).to(device)
    report = count_flops(model, (10**9, 4, 1000))  # terabytes
    assert report.dense_macs["total"] == 4 * 10**9 * (1000 * 100 + 100 * 8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_model_is_followed(dtype):
    assert count_flops(nn.Sequential(make_layer(8, 4), nn.Linear(4, 4)).to(dtype), (3, 8)).total > 0


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("model", "shape", "said"),
    [
        (nn.Sequential(nn.Linear(8, 4)), (2, 7), ["Sequential does not take", "(2, 7)"]),
        (nn.Sequential(nn.Linear(8, 4)), (2, 3, 7), ["(2, 3, 7)"]),
        (
            nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(1), nn.Linear(8, 4)),
            (3, 9, 9),
            ["(3, 9, 9)", "; as a batch of one: "],
        ),
        (nn.Sequential(make_layer(8, 4)), (2, 7), ["(2, 7)", "in_features=8"]),
        (nn.Linear(8, 4), 224, ["input_shape=224 must be all sizes of the input"]),
        (Silent(), (1,), ["Silent does not take", "NotImplementedError"]),
        (nn.Sequential(nn.LazyLinear(4)), (2, 7), ["Sequential holds lazy layers", "run one batch first"]),
    ],
)
def test_an_input_that_the_model_does_not_take_is_named_in_one_line(model, shape, said):
    with pytest.raises(SettingError) as caught:
        count_flops(model, shape)
    for text in said:
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_lazy_model_is_counted_once_it_has_sizes():
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(SettingError):
        count_flops(model, (2, 7))
    model(torch.zeros(2, 7))
    assert count_flops(model, (2, 7)).total == 2 * 7 * 4


def test_tiles_over_the_batch_cost_a_sample_what_tiles_over_tokens_do():
    costs = {}
    for row_axis in ("tokens", "batch"):
        model = nn.Sequential(make_layer(8, 16, row_axis=row_axis), make_layer(16, 8, BASES[0], row_axis=row_axis))
        samples = whole_samples(model)
        costs[row_axis] = count_flops(model, (samples, 8, 8)).total / samples
        assert samples == (4 if row_axis == "batch" else 1)
    assert costs["batch"] == costs["tokens"]
