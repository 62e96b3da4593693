import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stl import get_basis
from stl.cp.als import (
    RIDGE_MAX,
    balance,
    contract,
    cyclic_tensor,
    error_and_amplification,
    from_basis,
    minimise,
    sweep,
    to_basis,
    unit_rows,
)

few = settings(deadline=None, derandomize=True, max_examples=25)


def draw(seed: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def objective(factors: list[torch.Tensor], ridge: torch.Tensor) -> torch.Tensor:
    """‖T − T̂‖² + λ·Σ_q |u_q|²·|v_q|²·|w_q|² of every start, from the tensors themselves."""
    tile = round(factors[0].shape[-1] ** 0.5)
    residual = torch.einsum("bqi,bqj,bqk->bijk", *factors) - cyclic_tensor(tile)
    a, b, c = (f.square().sum(-1) for f in factors)
    return residual.square().sum((1, 2, 3)) + ridge * (a * b * c).sum(-1)


@pytest.mark.parametrize("tile", [1, 2, 3])
def test_cyclic_tensor_is_the_trace_of_three_factors_and_turns_with_them(tile):
    a, b, c = draw(0, tile, tile)
    tensor = cyclic_tensor(tile)
    value = torch.einsum("abc,a,b,c->", tensor, a.flatten(), b.flatten(), c.flatten())
    torch.testing.assert_close(value, (a @ b @ c).trace())
    assert torch.equal(tensor, tensor.permute(1, 2, 0))
    torch.testing.assert_close(contract(a.flatten(), b.flatten()) @ c.flatten(), value)


@given(tile=st.integers(1, 3), rank=st.integers(1, 12), log_ridge=st.floats(-6, 1), seed=st.integers(0, 2**31))
@few
def test_a_sweep_never_increases_error_plus_ridge_times_s(tile, rank, log_ridge, seed):
    factors = draw(seed, 3, rank, tile**2)
    ridge = 10.0**log_ridge * torch.tensor([1.0, 0.1, 10.0], dtype=torch.float64)
    before = objective(factors, ridge)
    for _ in range(5):
        factors = sweep(factors, ridge)
        after = objective(factors, ridge)
        assert (after <= before + 1e-9).all()
        before = after


@given(rank=st.integers(1, 6), ridge=st.floats(1e-4, 1.0), seed=st.integers(0, 2**31))
@few
def test_the_penalty_on_s_is_the_ridge_weighted_by_the_diagonal(rank, ridge, seed):
    """For two fixed factors of any length: the solution with λ·diag(UUᵀ∘VVᵀ) is the minimum of the penalised error."""
    u, v, _ = (f[0] for f in draw(seed, 1, rank, 4))
    normal = (u @ u.T) * (v @ v.T)
    w = torch.linalg.solve(normal + ridge * normal.diag().diag(), contract(u, v)).requires_grad_()
    penalised = objective([u[None], v[None], w[None]], torch.tensor(ridge, dtype=torch.float64)).sum()
    (slope,) = torch.autograd.grad(penalised, w)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-8)


def test_the_last_factor_of_a_sweep_is_that_solution():
    ridge = torch.tensor([0.03], dtype=torch.float64)
    u, v, w = (f[0] for f in sweep(draw(1, 1, 5, 9), ridge))
    normal = (u @ u.T) * (v @ v.T)
    torch.testing.assert_close(normal.diag(), torch.ones(5, dtype=torch.float64))
    wanted = torch.linalg.solve(normal + ridge * torch.eye(5, dtype=torch.float64), contract(u, v))
    torch.testing.assert_close(w, wanted)


def test_scaling_the_factors_of_a_column_changes_nothing():
    factors = draw(2, 2, 4, 4)
    long = [factors[0] * 1e40, factors[1] * 1e-60, factors[2] * 1e20]
    for changed in (long, balance(long)):
        for ours, theirs in zip(error_and_amplification(changed), error_and_amplification(factors), strict=True):
            torch.testing.assert_close(ours, theirs)
    for f in balance(long):
        torch.testing.assert_close(f.norm(dim=-1), balance(factors)[0].norm(dim=-1))
    ridge = torch.full((2,), 0.01, dtype=torch.float64)
    for ours, theirs in zip(sweep(long, ridge), sweep(factors, ridge), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_column_of_zeros_stays_finite():
    factors = draw(3, 1, 4, 4)
    for f in factors:
        f[:, 2] = 0
    best, errors = minimise(factors, 1e-3, 20, 64)
    assert errors.isfinite().all()
    assert all(f.isfinite().all() for f in (*best, *balance(best), *map(unit_rows, factors)))


@pytest.mark.parametrize(("name", "tile", "rank"), [("strassen", 2, 7), ("frame", 3, 11), ("exact48", 4, 48)])
def test_error_and_s_are_those_of_the_basis(name, tile, rank):
    basis = get_basis(name, tile, rank)
    factors = from_basis(basis)
    error, amplification = error_and_amplification([f[None] for f in factors])
    assert error.item() == pytest.approx(basis.error, rel=1e-12, abs=1e-28)
    assert amplification.item() == pytest.approx(basis.amplification, rel=1e-12)
    back = to_basis(factors)
    for role in ("encode_x", "encode_w", "decode"):
        assert torch.equal(getattr(back, role), getattr(basis, role))


def test_random_starts_find_strassens_rank_to_rounding():
    factors, errors = minimise(draw(4, 16, 7, 4), 1e-3, 1500, 64)
    best = to_basis([f[errors.argmin()] for f in factors])
    assert best.exact
    assert best.error < 1e-20
    assert best.amplification < 10


@pytest.mark.parametrize("limit", [4.0, 16.0, 64.0])
def test_s_ends_at_its_limit_where_the_error_wants_more(limit):
    factors, errors = minimise(draw(5, 8, 4, 4), 1e-3, 600, limit)
    _, amplification = error_and_amplification(factors)
    assert (amplification <= limit).all()
    assert amplification[errors.argmin()] > 0.7 * limit


def test_a_start_beyond_the_limit_has_no_error_until_it_is_within():
    far = [100 * f for f in draw(6, 2, 4, 4)]
    kept, errors = minimise(far, 1e-3, 0, 64)
    assert errors.isinf().all()
    assert all(torch.equal(a, b) for a, b in zip(kept, far, strict=True))
    assert minimise(far, RIDGE_MAX, 50, 64)[1].isfinite().all()


def test_the_best_met_is_never_worse_than_the_start():
    exact = [f[None] for f in from_basis(get_basis("exact48", 4, 48))]
    kept, errors = minimise(exact, 1e-3, 20, 64)
    assert errors.item() == 0
    assert all(torch.equal(a, b) for a, b in zip(kept, exact, strict=True))


def test_a_start_ends_in_the_same_place_alone_and_in_a_batch():
    batch = draw(7, 5, 6, 4)
    together, _ = minimise(batch, 1e-2, 30, 64)
    alone, _ = minimise([f[3:4] for f in batch], 1e-2, 30, 64)
    for ours, theirs in zip(alone, together, strict=True):
        torch.testing.assert_close(ours[0], theirs[3], rtol=1e-6, atol=1e-8)
