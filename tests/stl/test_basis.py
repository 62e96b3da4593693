import hashlib
import pkgutil
import subprocess
import sys
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stl.basis
from stl import Basis, SettingError, STLLinear, bases, get_basis, list_bases, register_basis, stl_matmul
from stl.bases.frame import tight_frame
from stl.basis import available_ranks, least_squares_encode_w, matmul_tensor

few = settings(deadline=None, derandomize=True, max_examples=20)

ROLES = ("encode_x", "encode_w", "decode")
EXACT = [
    *(("strassen", tile, rank) for tile, rank in ((2, 7), (4, 49))),
    *(("als", tile, rank) for tile, rank in ((2, 7), (3, 23), (4, 48), (4, 49))),
    *((name, tile, tile**3) for name in ("group", "products") for tile in (2, 4)),
    ("exact48", 4, 48),
]
# Whatever is registered is tested, at its smallest, middle and largest rank of the small tiles.
SMALL = [
    (name, tile, rank)
    for tile in (2, 3, 4)
    for name in list_bases(tile)
    for ranks in [available_ranks(name, tile)]
    for rank in sorted({ranks[0], ranks[len(ranks) // 2], ranks[-1]})
]


def explicit_tensor(tile: int) -> torch.Tensor:
    tensor = torch.zeros(tile**2, tile**2, tile**2, dtype=torch.float64)
    for i, k, j in product(range(tile), repeat=3):
        tensor[i * tile + k, k * tile + j, i * tile + j] = 1
    return tensor


def digest(basis: Basis) -> str:
    return hashlib.sha256(b"".join(getattr(basis, role).numpy().tobytes() for role in ROLES)).hexdigest()


def matrices(tile: int = 2, rank: int = 3) -> dict[str, torch.Tensor]:
    return {role: torch.ones(rank, tile**2) for role in ROLES}


@pytest.mark.parametrize("tile", [1, 2, 3, 4])
def test_matmul_tensor_is_the_definition(tile):
    assert torch.equal(matmul_tensor(tile), explicit_tensor(tile))


@pytest.mark.parametrize(("name", "tile", "rank"), SMALL)
def test_every_basis_is_three_finite_float64_matrices_of_its_shape(name, tile, rank):
    basis = get_basis(name, tile=tile, rank=rank)
    assert (basis.tile, basis.rank) == (tile, rank)
    assert repr(basis) == f"Basis({basis.name!r}, tile={tile}, rank={rank})"
    for role in ROLES:
        matrix = getattr(basis, role)
        assert (matrix.shape, matrix.dtype, matrix.device.type) == ((rank, tile**2), torch.float64, "cpu")
        assert matrix.isfinite().all()


@pytest.mark.parametrize(("name", "tile", "rank"), SMALL)
def test_error_amplification_and_exactness_follow_from_the_explicit_tensor(name, tile, rank):
    basis = get_basis(name, tile, rank)
    computed = torch.einsum("qa,qb,qc->abc", basis.encode_x, basis.encode_w, basis.decode)
    residual = computed - explicit_tensor(tile)
    rows = [getattr(basis, role).norm(dim=1) ** 2 for role in ROLES]
    assert basis.error == pytest.approx(residual.square().sum().item() / tile**3, rel=1e-9, abs=1e-20)
    assert basis.amplification == pytest.approx(sum(a * b * c for a, b, c in zip(*rows, strict=True)).item() / tile**3)
    assert basis.exact == (residual.abs().max().item() < 1e-9)


@pytest.mark.parametrize(
    ("name", "tile", "rank", "amplification"),
    [("strassen", 2, 7, 4), ("strassen", 4, 49, 16), ("strassen", 8, 343, 64), ("exact48", 4, 48, 8)],
)
def test_exact_bases_have_no_error_and_the_published_amplification(name, tile, rank, amplification):
    basis = get_basis(name, tile, rank)
    assert basis.exact
    assert basis.error < 1e-24
    assert basis.amplification == pytest.approx(amplification, rel=1e-12)


@pytest.mark.parametrize(("name", "tile", "rank"), EXACT)
def test_exact_bases_are_exact_over_the_rationals(name, tile, rank):
    basis = get_basis(name, tile, rank)
    sparse = [
        [[(i, Fraction(value)) for i, value in enumerate(row) if value] for row in getattr(basis, role).tolist()]
        for role in ROLES
    ]
    tensor: dict[tuple[int, int, int], Fraction] = {}
    for rows in zip(*sparse, strict=True):
        for (a, x), (b, w), (c, y) in product(*rows):
            tensor[a, b, c] = tensor.get((a, b, c), Fraction(0)) + x * w * y
    wanted = {(i * tile + k, k * tile + j, i * tile + j): 1 for i, k, j in product(range(tile), repeat=3)}
    assert {place: value for place, value in tensor.items() if value} == wanted


@pytest.mark.parametrize("tile", [2, 3, 4])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_products_leave_out_the_share_they_do_not_compute(tile, share):
    rank = max(1, round(share * tile**3))
    basis = get_basis("products", tile, rank)
    assert basis.error == pytest.approx(1 - rank / tile**3, abs=1e-12)
    assert basis.exact == (rank == tile**3)
    served = basis.decode.sum(0)  # how many products every output entry gets
    assert served.max() - served.min() <= 1


@pytest.mark.parametrize("tile", [1, 2, 4, 8])
def test_hadamard_is_orthonormal_and_has_error_1_minus_1_over_t(tile):
    basis = get_basis("hadamard", tile, tile**2)
    eye = torch.eye(tile**2, dtype=torch.float64)
    for matrix in (basis.encode_x, basis.decode):
        torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-14)
        assert matrix.abs().unique().numel() == 1
    assert basis.error == pytest.approx(1 - 1 / tile, abs=1e-12)


@pytest.mark.parametrize("tile", [2, 4, 8])
def test_frame_of_rank_t_squared_is_hadamard(tile):
    frame, hadamard = get_basis("frame", tile, tile**2), get_basis("hadamard", tile, tile**2)
    for role in ROLES:
        torch.testing.assert_close(getattr(frame, role), getattr(hadamard, role), rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("tile", "rank"),
    # rank t² + 1 is where alternating projections stall
    [(2, 5), (2, 8), (3, 9), (3, 11), (3, 20), (4, 17), (4, 22), (4, 24), (4, 33), (4, 64), (5, 26), (6, 37), (8, 96)],
)
def test_frame_is_tight_with_rows_of_norm_one_and_decodes_with_its_dual(tile, rank):
    basis = get_basis("frame", tile, rank)
    eye = torch.eye(tile**2, dtype=torch.float64)
    torch.testing.assert_close(basis.encode_x.norm(dim=1), torch.ones(rank, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(basis.encode_x.T @ basis.encode_x, eye * rank / tile**2, rtol=0, atol=1e-10)
    torch.testing.assert_close(basis.decode.T @ basis.encode_x, eye, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("tile", "rank"), [(3, 11), (4, 17), (4, 22), (4, 24), (4, 40), (6, 37), (8, 100)])
def test_rounding_does_not_decide_which_frame_comes_out(tile, rank, monkeypatch):
    """Another processor or number of threads rounds otherwise; the frame must be the same."""
    torch.manual_seed(0)
    svd = torch.linalg.svd
    wanted = tight_frame(tile, rank)
    monkeypatch.setattr(torch.linalg, "svd", lambda a, **kw: svd(a + 1e-15 * torch.randn_like(a), **kw))
    torch.testing.assert_close(tight_frame(tile, rank), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("tile", "rank"), [(2, 5), (3, 9), (3, 20), (4, 16), (4, 24), (4, 41), (4, 63), (8, 96)])
def test_shuffle_reaches_a_product_with_every_channel_and_serves_all_entries_evenly(tile, rank):
    basis = get_basis("shuffle", tile, rank)
    assert basis.error == pytest.approx(1 - rank / tile**3, abs=1e-12)
    assert basis.amplification == pytest.approx(rank / tile**3)
    for matrix in (basis.encode_x, basis.decode):
        torch.testing.assert_close(matrix.norm(dim=1), torch.ones(rank, dtype=torch.float64), rtol=0, atol=1e-12)
        singular = torch.linalg.svdvals(matrix).square()
        assert rank // tile**2 - 1e-9 <= singular.min()
        assert singular.max() <= -(-rank // tile**2) + 1e-9


@pytest.mark.parametrize("rank", [16, 20, 24, 40])
def test_shuffle_and_a_dense_weight_leave_tokens_apart(rank):
    basis = get_basis("shuffle", 4, rank)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    other = x.clone()
    other[2] += 1
    moved = (stl_matmul(other, w, basis) - stl_matmul(x, w, basis)).abs().amax(1)
    assert moved[2] > 0.1
    assert moved[torch.arange(8) != 2].max() < 1e-12


@pytest.mark.parametrize("rank", [1, 9, 16, 17, 40, 64])
def test_random_is_orthonormal_in_rows_or_columns(rank):
    basis = get_basis("random", 4, rank)
    for matrix in (basis.encode_x, basis.decode):
        gram = matrix @ matrix.T if rank <= 16 else matrix.T @ matrix
        eye = torch.eye(len(gram), dtype=torch.float64)
        torch.testing.assert_close(gram, gram.diagonal().mean() * eye, rtol=0, atol=1e-12)
    assert not torch.equal(basis.encode_x, basis.decode)


@given(tile=st.integers(1, 3), rank=st.integers(1, 30), repeat=st.booleans(), seed=st.integers(0, 2**31))
@few
def test_least_squares_encode_w_is_the_minimiser(tile, rank, repeat, seed):
    generator = torch.Generator().manual_seed(seed)
    encode_x, decode, *steps = torch.randn(8, rank, tile**2, generator=generator, dtype=torch.float64)
    if repeat:  # equal channels make the normal equations singular
        encode_x[-1], decode[-1] = encode_x[0], decode[0]
    best = least_squares_encode_w(encode_x, decode)
    error = Basis("best", tile, rank, encode_x, best, decode).error
    assert error <= 1 + 1e-9  # encode_w = 0 would have 1
    for step, scale in product(steps, (1e-3, -1e-3, 1.0)):
        assert Basis("near", tile, rank, encode_x, best + scale * step, decode).error >= error - 1e-9


@pytest.mark.parametrize("name", ["hadamard", "frame", "random"])
def test_families_without_an_encode_w_of_their_own_use_the_least_squares_one(name):
    basis = get_basis(name, 4, 16)
    torch.testing.assert_close(basis.encode_w, least_squares_encode_w(basis.encode_x, basis.decode))


@given(outer=st.sampled_from(SMALL[:12]), inner=st.sampled_from(SMALL[:12]), seed=st.integers(0, 2**31))
@few
def test_kron_applies_the_outer_basis_to_tiles_of_tiles(outer, inner, seed):
    outer, inner = get_basis(*outer), get_basis(*inner)
    both, tile, t = outer.kron(inner), outer.tile * inner.tile, inner.tile
    assert (both.tile, both.rank) == (tile, outer.rank * inner.rank)
    assert both.amplification == pytest.approx(outer.amplification * inner.amplification)
    assert both.exact == (outer.exact and inner.exact)
    x = torch.randn(tile, tile, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    blocks = x.view(outer.tile, t, outer.tile, t).transpose(1, 2).reshape(outer.tile**2, t**2)
    for role in ROLES:
        wanted = getattr(outer, role) @ blocks @ getattr(inner, role).T
        torch.testing.assert_close(getattr(both, role) @ x.flatten(), wanted.flatten())


def test_kron_takes_a_name_or_joins_the_two():
    strassen = get_basis("strassen", 2, 7)
    assert strassen.kron(strassen, name="squared").name == "squared"
    assert strassen.kron(get_basis("hadamard", 2, 4)).name == "strassenxhadamard"
    assert strassen.kron(strassen).kron(strassen).kron(strassen).name == "strassenxstrassenxstrass"  # cut to what fits


@pytest.mark.parametrize(("name", "tile", "rank"), SMALL)
def test_the_same_arguments_give_the_same_matrices(name, tile, rank):
    before = digest(get_basis(name, tile, rank))
    torch.manual_seed(7)
    stl.basis._build.cache_clear()
    assert digest(get_basis(name, tile, rank)) == before


def test_a_fresh_process_gives_the_same_matrices():
    script = (
        "import torch; torch.set_num_threads(1)\n"
        "from hashlib import sha256\n"
        "from stl import get_basis\n"
        f"for choice in {SMALL!r}:\n"
        "    b = get_basis(*choice)\n"
        "    parts = [m.numpy().tobytes() for m in (b.encode_x, b.encode_w, b.decode)]\n"
        "    print(sha256(b''.join(parts)).hexdigest())\n"
    )
    root = Path(stl.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [digest(get_basis(*choice)) for choice in SMALL]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (torch.ones(3, 5), "(3, 5)"),
        (torch.ones(4, 4), "(4, 4)"),
        (torch.ones(3, 2, 2), "(3, 2, 2)"),
        (torch.full((3, 4), float("nan")), "NaN"),
        (torch.full((3, 4), float("inf")), "NaN or infinite"),
    ],
)
def test_a_matrix_of_another_shape_or_not_finite_is_refused(role, bad, said):
    with pytest.raises(SettingError) as caught:
        Basis("mine", 2, 3, **matrices() | {role: bad})
    message = str(caught.value)
    assert "'mine'" in message
    assert role in message
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["two words", "naïve", "x" * 25])
def test_a_name_that_a_checkpoint_cannot_hold_is_refused(name):
    with pytest.raises(SettingError, match="at most 24 ASCII characters without spaces"):
        Basis(name, 2, 3, **matrices())


def test_a_basis_keeps_copies_in_float64():
    given_matrices = matrices()
    own = Basis("mine", 2, 3, **given_matrices)
    double = Basis("mine", 2, 3, **{role: getattr(own, role) for role in ROLES})
    given_matrices["encode_x"].zero_()
    own.encode_x.zero_()
    assert double.encode_x.dtype == torch.float64
    assert double.encode_x.eq(1).all()


def test_an_unknown_family_is_answered_with_those_that_exist():
    with pytest.raises(SettingError) as caught:
        get_basis("strasen", tile=2, rank=7)
    assert str(caught.value) == f"basis='strasen' is unknown; choose one of {', '.join(list_bases())}"


@pytest.mark.parametrize(
    ("name", "tile", "rank", "said"),
    [
        ("strassen", 4, 16, ["tile=4 rank=16", "tile=2: rank 7", "tile=4: rank 49", "hadamard"]),
        ("hadamard", 3, 9, ["tile=3 rank=9", "tile=4: rank 16", "frame"]),
        ("frame", 4, 15, ["tile=4 rank=15", "tile=4: rank 16-64", "products, random"]),
        ("products", 2, 9, ["tile=2 rank=9", "tile=2: rank 1-8", "exists in: no family"]),
    ],
)
def test_a_missing_rank_is_answered_with_what_exists(name, tile, rank, said):
    with pytest.raises(SettingError) as caught:
        get_basis(name, tile=tile, rank=rank)
    assert f"basis={name!r}" in str(caught.value)
    for text in said:
        assert text in str(caught.value)


@pytest.mark.parametrize("name", ["hadamard", "frame", "random", "products"])
def test_a_mistyped_tile_is_answered_at_once(name):
    with pytest.raises(SettingError, match="has no tile=100001 rank=7000000000000000"):
        get_basis(name, tile=100_001, rank=7_000_000_000_000_000)


@pytest.mark.parametrize("setting", ["tile", "rank"])
@pytest.mark.parametrize("value", [0, -1, 4.0, "4", True, None])
def test_a_size_that_is_not_a_positive_whole_number_is_refused(setting, value):
    with pytest.raises(SettingError, match=f"{setting}={value!r} must be a positive whole number"):
        get_basis("products", **{"tile": 4, "rank": 4} | {setting: value})


def test_list_bases_narrows_by_tile_and_rank():
    assert {"strassen", "exact48", "hadamard", "frame", "products", "random"} <= set(list_bases())
    assert list_bases() == sorted(list_bases())
    assert "hadamard" not in list_bases(tile=3)
    assert "strassen" in list_bases(4, 49)
    assert "strassen" not in list_bases(4, 48)
    for tile, rank in product((2, 3, 4), (4, 7, 49)):
        assert list_bases(tile, rank) == [n for n in list_bases(tile) if rank in available_ranks(n, tile)]


def test_every_file_in_bases_registers_a_family():
    files = {f"{bases.__name__}.{module.name}" for module in pkgutil.iter_modules(bases.__path__)}
    assert {family.build.__module__ for family in stl.basis._families.values()} == files


def test_a_new_family_is_one_registered_function(monkeypatch):
    monkeypatch.setattr(stl.basis, "_families", dict(stl.basis._families))

    @register_basis("scaled", ranks=lambda tile: [tile**3] if tile == 2 else [])
    def scaled(tile: int, rank: int) -> Basis:
        plain = get_basis("products", tile, rank)
        return Basis("scaled", tile, rank, plain.encode_x * 2, plain.encode_w, plain.decode / 2)

    assert "scaled" in list_bases(2, 8)
    assert "scaled" not in list_bases(4)
    assert get_basis("scaled", 2, 8).exact
    assert STLLinear(5, 3, basis="scaled", tile=2, rank=8)(torch.zeros(2, 5)).shape == (2, 3)
    with pytest.raises(SettingError, match="'scaled' is registered twice"):
        register_basis("scaled", ranks=lambda tile: [])(scaled)
