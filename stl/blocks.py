"""Residual blocks by kernels: a norm is computed as the layer behind it encodes, x is added as the last one decodes."""

import copy
import inspect
import operator
from collections.abc import Callable
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from stl.linear import STLLinear
from stl.mlp import STLMLP
from stl.mlps import fuse_mlps
from stl.normalisation import Norm
from stl.tracing import trace

NORMS = (F.layer_norm, F.rms_norm)
READS = (getattr, operator.getitem)


class STLBlock(nn.Module):
    """What `fuse_blocks` adds to the class of a block; the block keeps its children, parameters and attributes.

    Called with x alone, it computes by a rewritten graph where kernels compute its layers; by its own forward
    otherwise, so that without kernels nothing changes, and where it is compiled with gradients enabled. A copy is fused
    as well; what comes out of a file is not.
    """

    plain: type[nn.Module]  # its class before
    passes: dict[bool, Callable[[nn.Module, Tensor], Tensor]]  # in training or not
    fused: dict[bool, tuple[str, ...]]  # the layers in each that are fused with what stands around them

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self._is_fused_for(args[0]):
            return self.passes[self.training](self, args[0])
        return super().forward(*args, **kwargs)

    def _is_fused_for(self, x: Any) -> bool:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return False
        if torch.is_grad_enabled() and torch.compiler.is_dynamo_compiling():
            return False  # a compiler's norms and additions are, with their gradients, as fast as kernels or faster
        layers = [self.get_submodule(name) for name in self.fused[self.training]]
        return any(layer.uses_kernels(x) for layer in layers)  # type: ignore[operator]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.plain,), self.__getstate__()  # no module has the class that pickle would look for


def _blank(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def fuse_blocks(model: nn.Module) -> list[str]:
    """`fuse_mlps`, and let kernels compute residual blocks, x + f(norm(x)), in fewer passes over memory, in place.

    What a module computes is read off its traced graph, whatever its class, separately in training and in evaluation.
    Where the last step of f is an STL layer or MLP, its decode adds x; steps that change nothing, as dropout of
    probability 0, or DropPath in evaluation, are none. Where a LayerNorm or RMSNorm feeds one STL layer or MLP only,
    which may stand inside an attention module, it is computed as that encodes, up to
    `stl.kernels.MOST_NORMALISED_TILES` tiles wide, 2048 features at t = 4, half of that with gradients enabled, but not
    before narrow layers. Behind LayerScale, and behind dropout and DropPath in training, the addition stays; compiled
    with gradients enabled, all norms and additions do. A module that cannot be traced, or changes itself, stays as it
    is, and so does one that takes any keywords, as transformers' do: such models call their blocks with more than x,
    for which there is no graph, and their norms are their own classes.

    Returns the names of the MLPs and the blocks; state dicts stay as they were. With kernels a block's mode is that of
    all that stands in it, probabilities and other attributes are those of this moment, and hooks that modules in it get
    later are not called.
    """
    found = fuse_mlps(model)
    leaves: set[nn.Module] = set()
    for name, module in reversed(list(model.named_modules())):  # the inner ones first
        if isinstance(module, STLBlock):
            leaves.add(module)
        if isinstance(module, STLBlock | STLLinear | STLMLP) or not any(map(_is_layer, module.modules())):
            continue
        graphs = {training: trace(module, training, leaves) for training in (False, True)}
        rewriters = {training: _Rewriter(module, graph) for training, graph in graphs.items() if graph is not None}
        if len(rewriters) < 2:
            leaves.add(module)
        elif any(rewriter.fused for rewriter in rewriters.values()) and not _takes_any_keywords(module):
            _fuse(module, rewriters)
            leaves.add(module)
            found.append(name)
    return [name for name, _ in model.named_modules() if name in found]


def _takes_any_keywords(module: nn.Module) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(module.forward).parameters.values())


def _is_layer(module: nn.Module) -> bool:
    return type(module) in (STLLinear, STLMLP)


def _fuse(module: nn.Module, rewriters: dict[bool, "_Rewriter"]) -> None:
    members = {
        "plain": type(module),
        "passes": {training: rewriter.function() for training, rewriter in rewriters.items()},
        "fused": {training: tuple(rewriter.fused) for training, rewriter in rewriters.items()},
    }
    module.__class__ = type(f"STL{type(module).__name__}", (STLBlock, type(module)), members)


class _Rewriter:
    """Puts `_compute` in the place of the layers of a graph, with the norms before and the additions behind them.

    Only neighbours become one: nothing that writes in place can then stand in between.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.module, self.graph = module, graph
        self.fused: list[str] = []
        if not any(map(_is_residual, graph.nodes)):
            return
        for node in list(graph.nodes):
            if node.target is F.dropout:
                self._leave_out(node)
            elif node.target in NORMS:
                self._spare_its_shape(node)
        for node in list(graph.nodes):
            if node.op == "call_module" and _is_layer(module.get_submodule(str(node.target))):
                self._fuse(node)

    def function(self) -> Callable[[nn.Module, Tensor], Tensor]:
        """(module, x) → what the graph computes."""
        code = self.graph.python_code("self")
        namespace = dict(code.globals)
        exec(code.src, namespace)
        return namespace["forward"]

    def _leave_out(self, node: fx.Node) -> None:
        """A dropout that changes nothing."""
        call = _call(node)
        if call["p"] == 0 or not call["training"]:
            node.replace_all_uses_with(call["input"])
            self.graph.erase_node(node)

    def _spare_its_shape(self, node: fx.Node) -> None:
        """That of a norm is its input's."""
        for user in list(node.users):
            if user.target is getattr and user.args[1:] == ("shape",):
                user.replace_input_with(node, _call(node)["input"])

    def _fuse(self, node: fx.Node) -> None:
        layer = self.module.get_submodule(str(node.target))
        if len(node.args) != 1 or node.kwargs:
            return
        before, after = node.prev, node.next
        while before.target in READS or before.op == "get_attr":
            before = before.prev
        norm = self._norm(before, layer) if before is node.args[0] and len(before.users) == 1 else None
        residual = self._residual(node, after) if list(node.users) == [after] else None
        if norm is None and residual is None:
            return
        self.fused.append(str(node.target))
        replaced = node if residual is None else after
        x, *parameters = (node.args[0], None, None, None, None) if norm is None else norm
        with self.graph.inserting_before(replaced):
            owner = self.graph.get_attr(str(node.target))
            replaced.replace_all_uses_with(self.graph.call_function(_compute, (owner, x, residual, *parameters)))
        for done in dict.fromkeys((replaced, node, *([] if norm is None else [before]))):
            self.graph.erase_node(done)

    def _norm(self, node: fx.Node, layer: nn.Module) -> tuple[Any, ...] | None:
        """x and the numbers of a `Norm` of all features that the layer takes."""
        if node.target not in NORMS:
            return None
        call, first = _call(node), layer.layers[0] if isinstance(layer, STLMLP) else layer
        if call["weight"] is None or tuple(call["normalized_shape"]) != (first.in_features,):
            return None
        return call["input"], call["weight"], call.get("bias"), call["eps"], node.target is F.layer_norm

    def _residual(self, node: fx.Node, addition: fx.Node) -> fx.Node | None:
        """What is added to what this node gives."""
        others = [term for term in _terms(addition) if term is not node]
        return others[0] if len(others) == 1 else None


def _terms(node: fx.Node) -> list[fx.Node]:
    """The two of an addition."""
    if node.target not in (operator.add, torch.add) or node.kwargs or len(node.all_input_nodes) != len(node.args):
        return []
    return node.all_input_nodes


def _is_residual(node: fx.Node) -> bool:
    """Whether something is added there to what is computed from it."""
    return len(_terms(node)) == 2 and any(_is_from(*pair) for pair in permutations(_terms(node)))


def _is_from(node: fx.Node, source: fx.Node) -> bool:
    seen, ahead = set(), [node]
    while ahead:
        step = ahead.pop()
        if step is source:
            return True
        ahead += [before for before in step.all_input_nodes if before not in seen]
        seen.update(ahead)
    return False


def _call(node: fx.Node) -> dict[str, Any]:
    """The arguments of a function of PyTorch by their names."""
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    bound.apply_defaults()
    return bound.arguments


def _compute(
    layer: STLLinear | STLMLP,
    x: Tensor,
    residual: Any,
    gain: Tensor | None,
    shift: Tensor | None,
    eps: float | None,
    centre: bool,
) -> Tensor:
    """layer(norm(x)) + residual, which may have another shape: a graph does not say; it is then added behind."""
    norm = None if gain is None else Norm(gain, shift, eps, centre)
    alike = isinstance(residual, Tensor) and residual.shape == (*x.shape[:-1], layer.out_features)
    added = residual if alike and residual.is_floating_point() else None
    y = layer(x, added, norm)
    return y if residual is added else y + residual
