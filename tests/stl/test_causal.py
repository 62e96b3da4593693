import copy
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stl import STLMLP, Basis, SettingError, STLLinear, convert, get_basis, list_bases
from stl.bases.causal import CORRELATION
from stl.basis import available_ranks, least_squares_encode_w

few = settings(deadline=None, derandomize=True, max_examples=15)

ALL = [
    (name, tile, rank)
    for tile in (1, 2, 3, 4)
    for name in list_bases(tile)
    for ranks in [available_ranks(name, tile)]
    for rank in sorted({ranks[0], ranks[len(ranks) // 2], ranks[-1]})
]
CHOICES = [
    ("causal", 2, 4),
    ("causal", 2, 7),
    ("causal", 3, 10),
    ("causal", 4, 16),
    ("causal", 4, 24),
    ("products", 4, 24),
]
# tile, rank → S, singular values of encoder and decoder (least and largest): the figures of stl/bases/README.md
FIGURES = {
    (2, 4): (0.62, (0.74, 1.20), (0.71, 1.22)),
    (2, 6): (0.94, (0.74, 1.70), (0.47, 1.15)),
    (4, 16): (0.36, (0.57, 1.29), (0.61, 1.44)),
    (4, 24): (0.54, (0.57, 1.83), (0.41, 1.36)),
    (4, 32): (0.72, (0.81, 1.83), (0.43, 1.02)),
}


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scrambled(model: nn.Module) -> nn.Module:
    """Random numbers in every parameter, also where a causal basis has zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def layer(choice: tuple[str, int, int], k: int = 7, m: int = 5, **options) -> STLLinear:
    name, tile, rank = choice
    torch.manual_seed(0)
    return STLLinear(k, m, basis=name, tile=tile, rank=rank, **{"dtype": torch.float64} | options)


def is_triangular(made: STLLinear) -> bool:
    """Whether no channel reads a row of the tile behind one that it writes."""
    _, encoder, decoder, _ = made.tensors()
    return rows_met(encoder, decoder, made.tile).triu(1).eq(0).all().item()


def rows_met(encoder: Tensor, decoder: Tensor, tile: int) -> Tensor:
    """How many channels pass row j of the input on to row i of the output, at [i, j]."""
    read, written = (matrix.view(-1, tile, tile).ne(0).any(2).double() for matrix in (encoder, decoder))
    return written.T @ read


def assert_causal(model: nn.Module, n: int, width: int, dtype: torch.dtype = torch.float64) -> None:
    x = gaussian(2, n, width, dtype=dtype)
    with torch.no_grad():
        before = model(x)
        for token in range(n):
            changed = x.clone()
            changed[:, token] = 3 * gaussian(2, width, seed=1 + token, dtype=dtype)
            after = model(changed)
            assert torch.equal(after[:, :token], before[:, :token])
            assert not torch.equal(after[:, token], before[:, token])


class Stack(nn.Module):
    """Norm, activation and residuals around four layers, as in a model without its attention."""

    def __init__(self, choice: tuple[str, int, int], **options) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(6, **options), nn.LayerNorm(6, **options)])
        self.up = nn.ModuleList([layer(choice, 6, 9, **options) for _ in range(2)])
        self.down = nn.ModuleList([layer(choice, 9, 6, **options) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            x = x + down(nn.functional.gelu(up(norm(x))))
        return x


@pytest.mark.parametrize(("name", "tile", "rank"), ALL)
def test_causal_says_whether_a_row_ever_meets_a_later_one(name, tile, rank):
    basis = get_basis(name, tile, rank)
    met = rows_met(basis.encode_x, basis.decode, tile)
    assert basis.causal == all(not met[i, j] for i, j in product(range(tile), repeat=2) if j > i)
    assert basis.causal == (basis.pivots is not None)
    if tile > 1:
        assert basis.causal or name not in ("causal", "products")
        assert not basis.causal or name not in ("als", "exact48", "frame", "hadamard", "random", "strassen")


def test_pivots_of_channels_that_read_or_write_nothing():
    matrix = torch.zeros(2, 4)
    matrix[0, 2] = 1
    assert Basis("mine", 2, 2, matrix, matrix, matrix).pivots.tolist() == [1, 0]
    assert Basis("mine", 2, 2, matrix, matrix, torch.zeros(2, 4)).causal


@pytest.mark.parametrize("tile", [1, 2, 3, 4, 8])
@given(data=st.data())
@few
def test_the_construction_keeps_what_it_promises(tile, data):
    rank = data.draw(st.integers(tile, min(tile**3, 160)))
    basis = get_basis("causal", tile, rank)
    shares = basis.pivots.bincount(minlength=tile)
    assert shares.max() - shares.min() <= 1
    assert rows_met(basis.encode_x, basis.decode, tile).diagonal().gt(0).all()
    torch.testing.assert_close(basis.encode_x.norm(dim=1), torch.ones(rank).double())
    variance = (basis.encode_x.square().sum(1, keepdim=True) * basis.decode.square()).sum(0).view(tile, tile).mean(1)
    torch.testing.assert_close(variance, variance.mean().expand(tile))
    least = 1 - rank / tile**3
    assert least - 1e-12 <= basis.error <= least + (1e-12 if rank % tile == 0 else 0.03)
    if rank < tile**3:
        torch.testing.assert_close(basis.encode_w, least_squares_encode_w(basis.encode_x, basis.decode))
        assert tile == 1 or rows_met(basis.encode_x, basis.decode, tile).tril(-1).gt(0).any()
        low, high = (1 - CORRELATION) / (1 + CORRELATION**2) ** 0.5, (1 + CORRELATION) / (1 + CORRELATION**2) ** 0.5
        singular = torch.linalg.svdvals(basis.encode_x)
        singular = singular[singular > 1e-9] / (-(-rank // tile**2)) ** 0.5
        assert low / 2**0.5 <= singular.min()
        assert singular.max() <= high
    else:
        assert basis.exact


@pytest.mark.parametrize(("tile", "rank"), FIGURES)
def test_the_figures_of_the_documentation(tile, rank):
    basis = get_basis("causal", tile, rank)
    noise, encoder, decoder = FIGURES[tile, rank]
    assert basis.amplification == pytest.approx(noise, abs=0.006)
    for matrix, wanted in ((basis.encode_x, encoder), (basis.decode, decoder)):
        singular = torch.linalg.svdvals(matrix)
        assert (singular.min().item(), singular.max().item()) == pytest.approx(wanted, abs=0.006)


@given(tile=st.integers(1, 3), rank=st.integers(1, 20), seed=st.integers(0, 2**31))
@few
def test_no_causal_basis_has_a_lower_error_than_the_products(tile, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    pivots, rows = torch.randint(tile, (rank, 1), generator=generator), torch.arange(tile).repeat_interleave(tile)
    encode_x, decode = torch.randn(2, rank, tile**2, generator=generator, dtype=torch.float64)
    encode_x, decode = encode_x * (rows <= pivots), decode * (rows >= pivots)
    basis = Basis("mine", tile, rank, encode_x, least_squares_encode_w(encode_x, decode), decode)
    assert basis.causal
    assert basis.error >= 1 - rank / tile**3 - 1e-9


def test_a_fresh_layer_gives_every_row_of_a_tile_the_same_variance():
    for tile, rank in ((2, 4), (4, 16), (4, 22)):
        with torch.no_grad():
            made = layer(("causal", tile, rank), 256, 256, dtype=torch.float32)
            y = made(gaussian(64, 4 * tile, 256, dtype=torch.float32)).unflatten(1, (4, tile))
        for row in range(tile):
            assert y[:, :, row].var().item() == pytest.approx(1 / 3, rel=0.06)


@pytest.mark.parametrize("choice", CHOICES)
def test_no_output_depends_on_a_later_token_to_the_bit(choice):
    for n in range(1, 3 * choice[1] + 2):
        assert_causal(scrambled(layer(choice)), n, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choice", [("causal", 2, 5), ("causal", 4, 16), ("products", 2, 6)])
def test_a_stack_stays_causal_in_training_with_weight_decay(choice, dtype):
    stack = Stack(choice, dtype=dtype)
    optimizer = torch.optim.AdamW(stack.parameters(), lr=0.05, weight_decay=0.3)
    for step in range(4):
        optimizer.zero_grad()
        y = stack(gaussian(3, 9, 6, seed=step, dtype=dtype))
        (y - gaussian(3, 9, 6, seed=9, dtype=dtype)).square().sum().backward()
        for made in (*stack.up, *stack.down):
            for role, outside in zip(("encoder", "decoder"), made.outside, strict=True):
                assert getattr(made, role).grad[outside].eq(0).all()
                assert getattr(made, role).grad[~outside].ne(0).any()
        optimizer.step()
    assert all(is_triangular(made) for made in (*stack.up, *stack.down))
    for n in range(1, 3 * choice[1] + 2):
        assert_causal(stack, n, 6, dtype)


def test_training_may_use_every_row_that_the_pivots_allow():
    made = scrambled(layer(("products", 2, 8)))
    assert rows_met(*made.tensors()[1:3], 2).tolist() == [[4, 0], [8, 4]]


@pytest.mark.parametrize("norm", [True, False])
def test_kernels_keep_to_the_pivots(norm):
    choice = ("causal", 4, 16)
    made = STLMLP(layer(choice, dtype=torch.float32), "gelu", layer(choice, 5, 7, dtype=torch.float32))
    made = scrambled(made if norm else made.layers[0])
    made.backend = "triton"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made, x = made.to(device), gaussian(1, 7, 7, dtype=torch.float32).to(device)
    with torch.no_grad():
        before = made(x)
        x[:, 5] += 3
        after = made(x)
    assert torch.equal(after[:, :5], before[:, :5])
    assert not torch.equal(after[:, 5], before[:, 5])


def test_a_layer_without_the_promise_has_no_mask():
    made = layer(("hadamard", 4, 16))
    assert made.outside is None
    assert made.tensors()[1] is made.encoder


def test_masks_stay_whatever_a_checkpoint_holds():
    made, other = layer(("causal", 4, 16)), layer(("causal", 4, 16), train_basis=False)
    state = made.state_dict()
    state["encoder"] = torch.full_like(made.encoder, float("nan")).masked_fill(~made.outside[0], 2)
    state["outside"] = torch.zeros_like(made.outside)
    other.load_state_dict(state)
    assert is_triangular(other)
    assert_causal(other, 6, 7)


def test_a_layer_built_without_values_gets_its_masks_with_them():
    full = scrambled(layer(("causal", 2, 5)))
    empty, x = layer(("causal", 2, 5), device="meta"), gaussian(2, 5, 7)
    empty.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(empty(x), full(x))
    again = layer(("causal", 2, 5), device="meta").to_empty(device="cpu")
    again.outside.fill_(True)
    again.reset_parameters()
    assert torch.equal(again.outside, full.outside)


def test_a_basis_does_not_depend_on_the_default_device():
    get_basis.__globals__["_build"].cache_clear()
    with torch.device("meta"):
        basis = get_basis("causal", 2, 5)
        assert basis.pivots.device.type == "cpu"
        assert basis.error < 0.5
        made = layer(("causal", 2, 5))
    made.to_empty(device="cpu").reset_parameters()
    assert torch.equal(made.outside, layer(("causal", 2, 5)).outside)


def test_copies_and_casts_keep_their_masks():
    made = scrambled(layer(("causal", 2, 4)))
    for other in (copy.deepcopy(made), copy.deepcopy(made).half().double()):
        assert is_triangular(other)


def test_calibrating_the_basis_keeps_to_the_pivots():
    model = nn.Sequential(nn.Linear(8, 8)).double()
    batches = [gaussian(8, 8, 3, seed=seed) @ gaussian(3, 8, seed=9) for seed in range(8)]
    options = {"tile": 2, "rank": 5, "basis": "causal", "from_dense": True, "calibration": batches}
    done = convert(model, calibrate_basis=True, causal=True, **options).calibrated["0"]
    assert done.error_after < done.error_before
    made = model[0]
    assert not torch.equal(made.encoder, get_basis("causal", 2, 5).encode_x)
    assert made.encoder[made.outside[0]].eq(0).all()
    assert made.decoder[made.outside[1]].eq(0).all()
    assert_causal(model, 5, 8)


@pytest.mark.parametrize("choice", [("hadamard", 4, 16), ("strassen", 2, 7), ("exact48", 4, 48), ("als", 4, 32)])
def test_converting_a_causal_model_refuses_what_would_leak(choice):
    name, tile, rank = choice
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    before = list(model)
    with pytest.raises(SettingError) as caught:
        convert(model, basis=name, tile=tile, rank=rank, causal=True)
    assert str(caught.value) == (
        f"causal=True with basis={name!r} and row_axis='tokens': tokens of a tile would see later ones; use "
        "basis='causal', which has ranks tile to tile³, or row_axis='batch'"
    )
    assert list(model) == before
    convert(model, basis=name, tile=tile, rank=rank, causal=True, row_axis="batch")
    assert_causal(model.double(), 5, 8)


@pytest.mark.parametrize("name", ["causal", "products"])
def test_converting_a_causal_model_with_a_causal_basis(name):
    model = nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 8)).double()
    convert(model, basis=name, tile=4, rank=20, causal=True)
    for n in (1, 4, 13):
        assert_causal(model, n, 8)


def test_the_report_says_how_a_model_that_generates_is_used():
    class Generates(nn.Sequential):
        def can_generate(self) -> bool:
            return True

    said = "stl.Streaming"
    assert said in str(convert(Generates(nn.Linear(8, 8)), basis="causal"))
    assert said not in str(convert(Generates(nn.Linear(8, 8)), row_axis="batch"))
    assert said not in str(convert(nn.Sequential(nn.Linear(8, 8)), basis="causal"))
