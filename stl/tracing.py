"""What a module computes, as a graph of the STL layers in it, and what else it computes."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from stl.linear import STLLinear
from stl.mlp import STLMLP
from stl.unchanged import unchanged

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
DEVICES = ("cpu", "cuda")


def trace(module: nn.Module, training: bool, leaves: set[nn.Module]) -> fx.Graph | None:
    """What `module(x)` computes in this mode, other arguments left at their defaults; None where no graph says it,
    as where it also changes something. The module stays as it is.

    Calls in it are those of STL layers and MLPs, of `leaves`, and of PyTorch's own modules but for norms, dropout and
    identities, which are functions in it or vanish.
    """
    inner = [child for child in module.modules() if child is not module]
    if any(is_changed(child) for child in inner) or "forward" in vars(module):
        return None
    graphs = []
    for autocast in (False, True):
        try:
            with _mode(module, training, autocast), unchanged(module), _no_chance():
                graphs.append(_Tracer(leaves).trace(module))
        except Exception:  # whatever a model's code may raise when it is traced
            return None
    # A graph knows no contexts: where the code depends on autocast, it is wrong.
    return graphs[0] if str(graphs[0]) == str(graphs[1]) else None


def is_changed(module: nn.Module) -> bool:
    """Whether calling it does more than its class says."""
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS)


class _Proxy(fx.Proxy):
    """`x += y` writes into the tensor that x and other names stand for; torch.fx would make x another one."""

    def __iadd__(self, other: Any) -> Any:
        raise TypeError("a graph does not say what an augmented assignment writes into")

    __isub__ = __imul__ = __imatmul__ = __itruediv__ = __ifloordiv__ = __imod__ = __ipow__ = __iadd__
    __iand__ = __ior__ = __ixor__ = __ilshift__ = __irshift__ = __iadd__


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[nn.Module]) -> None:
        super().__init__()
        self.leaves, self.contexts = leaves, _contexts()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.Dropout | nn.Identity):
            return False
        known = isinstance(module, STLLinear | STLMLP) or module in self.leaves
        return known or super().is_leaf_module(module, qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list]:
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self.contexts:
            raise TypeError("a graph does not say that gradients or autocast are off")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and all(a is not own for own in (*self.root.parameters(), *self.root.buffers())):
            raise TypeError("a tensor that is made on the way would become a constant")
        return super().create_arg(a)


def _contexts() -> tuple[Any, ...]:
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in DEVICES]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


@contextmanager
def _no_chance() -> Iterator[None]:
    """Raises TypeError where Python or torch draw random numbers on the CPU, which a graph would have as constants; the
    numbers are not used up."""
    pythons, torchs = random.getstate(), torch.get_rng_state()
    try:
        yield
    finally:
        drawn = random.getstate() != pythons or not torch.equal(torch.get_rng_state(), torchs)
        random.setstate(pythons)
        torch.set_rng_state(torchs)
    if drawn:
        raise TypeError("a graph does not say what is left to chance")


@contextmanager
def _mode(module: nn.Module, training: bool, autocast: bool) -> Iterator[None]:
    """The module in this mode, with gradients, and autocast on or off on all devices."""
    modes = {child: child.training for child in module.modules()}
    before = {device: torch.is_autocast_enabled(device) for device in DEVICES}
    try:
        for child in modes:
            child.training = training
        for device in DEVICES:
            torch.set_autocast_enabled(device, autocast)
        with torch.enable_grad():
            yield
    finally:
        for child, mode in modes.items():
            child.training = mode
        for device, enabled in before.items():
            torch.set_autocast_enabled(device, enabled)
