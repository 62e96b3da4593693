"""The pass that finds MLPs of STL layers in models, whatever their classes, and puts an `STLMLP` in their place."""

import inspect
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from stl.linear import STLLinear
from stl.mlp import STLMLP, fit
from stl.tracing import is_changed, trace


def fuse_mlps(model: nn.Module) -> list[str]:
    """Put an `STLMLP` in the place of every module of the model that computes one, in place.

    What a module computes is read off its traced graph, in training and in evaluation: first → activation → second, or
    second(activation(first(x))·up(x)), of STL layers with GELU (exact or tanh), ReLU or SiLU, dropout before the output
    only; first and up may be the halves of one layer, as in Phi-3, if they are whole tiles. Left alone is what has
    hooks or a patched forward, parameters or buffers of its own, a forward of more than one argument or one that
    changes the module, or layers of different backends. Returns the names of what was replaced; state dicts stay as
    they were, other attributes of the modules are gone.
    """
    replaced = []
    for name, module in list(model.named_modules()):
        parent = model.get_submodule(name.rpartition(".")[0])
        if name and not isinstance(module, STLMLP | STLLinear) and (fused := _fused(module)) is not None:
            setattr(parent, name.rpartition(".")[2], fused.train(module.training))
            replaced.append(name)
    return replaced


def _fused(module: nn.Module) -> STLMLP | None:
    """An MLP that computes what this module computes; None where it computes something else."""
    layers = [child for child in module.modules() if type(child) is STLLinear]
    if len(layers) not in (2, 3) or is_changed(module) or len(inspect.signature(module.forward).parameters) != 1:
        return None
    found = {}
    for training in (False, True):
        graph = trace(module, training, set())
        found[training] = None if graph is None else _Reader(module, graph).read()
    evaluated, trained = found[False], found[True]
    if evaluated is None or trained is None or evaluated != trained._replace(dropout=0.0):
        return None
    first, *others, second = (getattr(module, name) for name in trained.names)
    up = others[0] if others else None
    if not fit(first, up, second, trained.halves) or len({layer.backend for layer in layers}) > 1:
        return None
    fused = STLMLP(first, trained.activation, second, trained.names, trained.dropout, up=up, halves=trained.halves)
    return fused if fused.state_dict().keys() == module.state_dict().keys() else None


class _Found(NamedTuple):
    """What a graph computes: the names of first, up where it is a layer of its own, and second, whether first is gate
    and up in one, and the dropout behind them."""

    activation: str
    names: tuple[str, ...]
    halves: bool
    dropout: float


class _Reader:
    """Reads a graph of `trace` from its output back to its one input."""

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.nodes = module, list(graph.nodes)

    def read(self) -> _Found | None:
        x, *steps, last = self.nodes
        if not (steps and isinstance(last.args[0], fx.Node)):
            return None
        end, dropouts = self._behind_dropouts(last.args[0])
        inner = self._hidden(self._input(end)) if self._is_layer(end) else None
        if inner is None or len(dropouts) > 1:
            return None
        activation, *firsts = inner
        layer, divided = self._whole(*firsts) if len(firsts) == 2 else (None, None)
        if any(len(node.users) != 1 and node is not divided for node in steps):
            return None
        nodes = [*(firsts if layer is None else [layer]), end]
        names = tuple(str(node.target) for node in nodes)
        if not all(map(self._is_layer, nodes)) or "." in "".join(names):
            return None
        if any(node.all_input_nodes != [x] for node in nodes[:-1]):
            return None
        return _Found(activation, names, layer is not None, sum(dropouts))

    def _hidden(self, node: fx.Node) -> tuple[Any, ...] | None:
        """(activation, node of first), or for activation(first)·up (activation, node of first, node of up)."""
        factors = [node]
        if node.target in (operator.mul, torch.mul) and len(node.all_input_nodes) == 2:
            factors = [self._input(node, which) for which in (0, 1)]
            factors.sort(key=lambda factor: _activation_of(self._step(factor), factor.kwargs) is None)  # that first
        activation = _activation_of(self._step(factors[0]), factors[0].kwargs)
        if activation is None or len(factors[0].all_input_nodes) != 1:
            return None
        return activation, self._input(factors[0]), *factors[1:]

    def _whole(self, gate: fx.Node, up: fx.Node) -> tuple[fx.Node, fx.Node] | tuple[None, None]:
        """The layer whose first and second half these two are, and the node that they and no others are taken from."""
        divided = gate.args[0] if gate.target is up.target is operator.getitem else None
        if not isinstance(divided, fx.Node) or set(divided.users) != {gate, up}:
            return None, None
        chunks = divided.target in ("chunk", torch.chunk)
        layer = divided.all_input_nodes[0] if chunks else divided
        if not self._is_layer(layer):
            return None, None
        features = range(self._step(layer).out_features)
        half = len(features) // 2
        if chunks:
            fine = (divided.args[1:], divided.kwargs) in (((2, -1), {}), ((2,), {"dim": -1}))
            fine = fine and (gate.args[1], up.args[1]) == (0, 1)
        else:
            fine = [_taken(features, node.args[1]) for node in (gate, up)] == [features[:half], features[half:]]
        return (layer, divided) if fine else (None, None)

    def _step(self, node: fx.Node) -> Any:
        """The module or function that is called there."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else node.target

    def _is_layer(self, node: fx.Node) -> bool:
        return type(self._step(node)) is STLLinear

    def _input(self, node: fx.Node, which: int = 0) -> fx.Node:
        """What it is given, without what changes nothing."""
        before, dropouts = self._behind_dropouts(node.all_input_nodes[which])
        return node.all_input_nodes[which] if dropouts else before

    def _behind_dropouts(self, node: fx.Node) -> tuple[fx.Node, list[float]]:
        """What they are given, and the probabilities of those that change something."""
        dropouts = []
        while node.target is F.dropout:
            call = inspect.signature(F.dropout).bind(*node.args, **node.kwargs)
            call.apply_defaults()
            if call.arguments["p"] and call.arguments["training"]:
                dropouts.append(call.arguments["p"])
            node = node.all_input_nodes[0]
        return node, dropouts


def _taken(features: range, index: Any) -> range | None:
    """Those that an index of a tensor takes along its last axis; None where it says more, or is computed."""
    last = index[-1] if isinstance(index, tuple) and index[:-1] == (Ellipsis,) else None
    if isinstance(last, slice) and not any(isinstance(of, fx.Node) for of in (last.start, last.stop, last.step)):
        return features[last]
    return None


def _activation_of(step: Any, options: Mapping[str, Any]) -> str | None:
    """The name in ACTIVATIONS of a module or a function; None where it is not among them."""
    approximate = step.approximate if isinstance(step, nn.GELU) else options.get("approximate", "none")
    if isinstance(step, nn.GELU) or step is F.gelu:
        return "gelu" if approximate == "none" else "gelu_tanh"
    if isinstance(step, nn.ReLU) or step in (F.relu, torch.relu):
        return "relu"
    return "silu" if isinstance(step, nn.SiLU) or step is F.silu else None
