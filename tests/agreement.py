"""What kernels give against the reference in float64, at random numbers."""

import torch
from torch import Tensor, nn

from stl import get_basis, stl_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gaussian(*shape: int, seed: int) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def results(module: nn.Module, x: Tensor, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """The output, and the gradients of x and of all parameters for one gradient of the output, by their names."""
    module.to(dtype).backend = backend
    x = x.to(dtype).requires_grad_()
    y = module(x)
    parameters = dict(module.named_parameters())
    gradients = torch.autograd.grad(y, [x, *parameters.values()], gaussian(*y.shape, seed=3).to(dtype))
    return {"y": y, **dict(zip(["x", *parameters], gradients, strict=True))}


def assert_the_last_are_as_alone(module: nn.Module, n: int, k: int) -> None:
    """More than 2³¹ entries in bf16, in samples (n, k): by kernels the last four have what four have alone."""
    module.bfloat16().backend = "triton"
    x = torch.randn(2**31 // (n * k) + 4, n, k, dtype=torch.bfloat16, device=DEVICE)
    found = []
    for samples in (x, x[-4:].clone()):
        y = module(samples.requires_grad_())
        (gradient,) = torch.autograd.grad(y.sum(), samples)
        found.append((y[-4:].detach(), gradient[-4:].clone()))
        del y, gradient
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted)


def with_strides(module: nn.Module) -> nn.Module:
    """The module, with vectors of every second number in memory, the others NaN."""
    for parameter in module.parameters():
        if parameter.ndim == 1:
            parameter.data = torch.stack([parameter.data, parameter.data * float("nan")], 1)[:, 0]
    return module


def assert_agree(module: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32, tolerance: float = 5e-6) -> None:
    """A module with a `backend`: all that kernels give in this precision is the reference's to a relative tolerance."""
    exact = results(module, x, torch.float64, "torch")
    for role, got in results(module, x, dtype, "triton").items():
        assert got.shape == exact[role].shape, role
        assert got.dtype == dtype, role
        assert (got.double() - exact[role]).norm() <= tolerance * exact[role].norm(), role


def operands(shape: tuple[int, ...], m: int, name: str, tile: int, rank: int, bias: bool = True) -> list[Tensor]:
    """x of this shape, weight, encoder, decoder and bias, in float64."""
    basis = get_basis(name, tile, rank)
    weight = gaussian(rank, -(-shape[-1] // tile), -(-m // tile), seed=1)
    matrices = [matrix.to(DEVICE, copy=True) for matrix in (basis.encode_x, basis.decode)]  # not those of the basis
    return [gaussian(*shape, seed=0), weight, *matrices, *([gaussian(m, seed=2)] if bias else [])]


def operator_results(arguments: list[Tensor], dtype: torch.dtype, **options) -> list[Tensor]:
    """The output, then the gradients of all arguments for one gradient of the output, in this precision."""
    arguments = [tensor.detach().to(dtype).requires_grad_() for tensor in arguments]
    y = stl_linear(*arguments, **options)
    return [y, *torch.autograd.grad(y, arguments, gaussian(*y.shape, seed=3).to(dtype))]


def assert_operator_agrees(arguments: list[Tensor], dtype: torch.dtype, tolerance: float, **options) -> None:
    wanted = operator_results(arguments, torch.float64, **options)
    for role, got, exact in zip(
        ("y", "x", "weight", "encoder", "decoder", "bias"),
        operator_results(arguments, dtype, **options, backend="triton"),
        wanted,
        strict=False,
    ):
        assert got.shape == exact.shape, role
        assert got.dtype == dtype, role
        assert (got.double() - exact).norm() <= tolerance * exact.norm(), role
