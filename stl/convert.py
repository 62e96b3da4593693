"""Swap the linear layers of any module for STL layers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from stl.attention import STLMultiheadAttention, dense_projections
from stl.basis import get_basis
from stl.calibration import LayerCalibration, calibrate
from stl.errors import SettingError
from stl.functional import ROW_AXES
from stl.linear import STLLinear
from stl.tracing import HOOKS

Patterns = str | Sequence[str] | None


@dataclass
class ConversionReport:
    """What `convert` did: `swapped` and `left` map a layer's name to what it became, or to why it stayed.

    Of trained layers, `calibrated` maps the name of each STL layer ("attn.q_proj" inside an attention module) to its
    errors, effective input rank and MACs before and after calibration, or to why its weight stayed uncalibrated, and
    `assumed` says what stood in for the data where there was none. Both are empty otherwise.
    `streams` says how a model that generates text is to be used with tiles over its tokens, and is empty otherwise.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    calibrated: dict[str, LayerCalibration | str] = field(default_factory=dict)
    assumed: str = ""
    streams: str = ""

    def __str__(self) -> str:
        lines = [f"{len(self.swapped)} linear layers swapped, {len(self.left)} left"]
        lines += [f"  {said}" for said in (self.assumed, self.streams) if said]
        lines += [f"  swapped  {name}: {what}" for name, what in self.swapped.items()]
        lines += [f"  left     {name}: {why}" for name, why in self.left.items()]
        for name, what in self.calibrated.items():
            lines.append(f"  uncalibrated {name}: {what}" if isinstance(what, str) else f"  calibrated {name}: {what}")
        return "\n".join(lines)


def convert(
    model: nn.Module,
    *,
    tile: int = 4,
    rank: int = 16,
    basis: str = "hadamard",
    include: Patterns = None,
    exclude: Patterns = None,
    from_dense: bool = False,
    row_axis: str = "tokens",
    train_basis: bool = True,
    start: str = "independent",
    train_weight: str = "encoded",
    fill: str = "zeros",
    calibration: Iterable[Any] | None = None,
    calibrate_basis: bool = False,
    causal: bool | None = None,
) -> ConversionReport:
    """Swap the linear layers of `model`, in place, for `STLLinear`; attention modules become `STLMultiheadAttention`.

    Args:
        include, exclude: shell-style patterns of layer names ("blocks.*.mlp.*"), one or several; a layer is swapped
            where it matches some `include` (all, by default) and no `exclude`. All names of a shared layer count.
        from_dense: start from the trained weights, encoded; otherwise from a fresh draw, for training from scratch.
        row_axis, train_basis, start, train_weight, fill: as in `STLLinear`. Layers that PyTorch's transformer feeds
            (tokens, batch, features) get the axis that means the same there.
        calibration: with `from_dense`, a few batches of inputs as the model will see them, in a list or any other
            series: tensors, tuples that start with one (inputs, labels), or dicts of keyword arguments; all are kept in
            memory. The encoded weights are then fitted to what the dense layers make of these inputs, layer by layer
            (`stl.calibration`), wherever that lowers the error on the part of them that is held out by more than its
            standard error. Without, they are encoded for i.i.d. zero-mean inputs, and the report says so.
        calibrate_basis: with `calibration`, fit each layer's encoder and decoder too, also those that are then frozen
            by `train_basis=False`: a lower error for a longer conversion. The layers no longer hold the named basis.
        causal: the model's tokens must not see later ones; by default where it generates text, as `can_generate()` of
            transformers' models says. What would let them is refused: tiles along the tokens with a basis that is not
            causal (`Basis.causal`). Exact ones are not either, but for `products`: later tokens change their rounding.
            What is promised is that no earlier output changes, to the bit, where the numbers are finite, of a model of
            which that was true before: with eager attention a row of padding that may see nothing sees the mean of all
            tokens in transformers' models, and passes it on in its tile (`models.language.llama` has that mended).

    A layer that sees one row a sample, as class heads do, costs r/t² times the dense one: leave it out with `exclude`.
    Models that hand `layer.weight` to a function themselves (some of timm's with a joint query-key-value layer, say)
    fail at once with a complaint about a 3-D weight; exclude those layers too.

    Returns:
        A report of the layers swapped, and of those left with the reason.

    Raises:
        SettingError: no such basis, or one that is not causal where it must be; a pattern that matches no linear layer,
        or a model without any; with `from_dense` a weight that is NaN or infinite; calibration without `from_dense`,
        without batches, with NaN, with `train_weight="dense"`, or of a model on the meta device; `calibrate_basis`
        without calibration. The model is then unchanged, as after whatever error the model itself raises on the
        calibration data. A model that is itself a linear layer cannot be swapped in place: use `STLLinear.from_linear`.
    """
    matrices = get_basis(basis, tile, rank)
    if row_axis not in ROW_AXES:
        raise SettingError(f"row_axis={row_axis!r} is unknown; choose one of {', '.join(ROW_AXES)}")
    generates = causal is None and bool(getattr(model, "can_generate", bool)())
    causal = generates if causal is None else causal
    if causal and row_axis == "tokens" and not matrices.causal:
        raise SettingError(
            f"causal=True with basis={basis!r} and row_axis='tokens': tokens of a tile would see later ones; use "
            "basis='causal', which has ranks tile to tile³, or row_axis='batch'"
        )
    if calibration is not None and not from_dense:
        raise SettingError(
            "calibration with from_dense=False fits nothing: there are no trained weights; pass from_dense=True"
        )
    if calibrate_basis and calibration is None:
        raise SettingError("calibrate_basis=True needs data to fit to; pass calibration=batches as well")
    if calibration is not None and train_weight == "dense":
        raise SettingError(
            "calibration with train_weight='dense' fits encoded weights, which are not trained then; leave one out"
        )
    settings = {
        "tile": tile,
        "rank": rank,
        "basis": basis,
        "train_basis": train_basis,
        "start": start,
        "train_weight": train_weight,
        "fill": fill if row_axis == "batch" else "zeros",  # along the tokens, whatever axis they have
    }
    if isinstance(model, nn.Linear | nn.MultiheadAttention):
        raise SettingError("convert swaps layers inside a model; for a single layer use STLLinear.from_linear(layer)")
    places = list(_places(model))
    if not places:
        raise SettingError(f"{type(model).__name__} holds no torch.nn.Linear; there is nothing to convert")
    include, exclude = _patterns(include), _patterns(exclude)
    _check_patterns("include", include, places)
    _check_patterns("exclude", exclude, places)

    report = ConversionReport()
    if generates and row_axis == "tokens":
        report.streams = "with a cache it computes as at once within stl.Streaming only; or set use_cache=False"
    reasons = _reasons_to_stay(model)
    places_of: dict[nn.Module, list[_Place]] = {}
    for place in places:
        places_of.setdefault(place.layer, []).append(place)
    built: dict[nn.Module, nn.Module] = {}
    for layer, same in places_of.items():
        names = [place.name for place in same]
        if reason := reasons.get(layer):
            report.left |= dict.fromkeys(names, reason)
        elif include and not _match(names, include):
            report.left |= dict.fromkeys(names, "not in include")
        elif _match(names, exclude):
            report.left |= dict.fromkeys(names, "in exclude")
        else:
            if from_dense and not all(weight.is_meta or weight.isfinite().all() for weight in layer.parameters()):
                raise SettingError(f"layer {same[0].name!r} has NaN or infinite weights; there is nothing to convert")
            built[layer] = _build(layer, from_dense, _axis(same[0], row_axis), settings)
            report.swapped |= dict.fromkeys(names, _describe(built[layer]))
    swapped = [place for place in places if place.layer in built]
    for place in swapped:
        setattr(place.parent, place.attribute, built[place.layer])
    if calibration is not None:
        try:
            report.calibrated = _calibrate(model, swapped, built, calibration, calibrate_basis)
        except BaseException:
            for place in swapped:
                setattr(place.parent, place.attribute, place.layer)
            raise
    elif from_dense:
        report.assumed = "no calibration data: the weights are encoded for i.i.d. zero-mean inputs"
    _leave_fused_paths(model)
    return report


@dataclass(frozen=True)
class _Place:
    """Where a layer hangs in the model; a layer that is used twice has two places."""

    name: str
    parent: nn.Module
    attribute: str
    layer: nn.Module


def _places(module: nn.Module, prefix: str = "") -> Iterator[_Place]:
    for attribute, child in module._modules.items():
        if child is None:
            continue
        name = f"{prefix}{attribute}"
        if isinstance(child, nn.Linear | nn.MultiheadAttention):
            yield _Place(name, module, attribute, child)
        elif not isinstance(child, STLLinear | STLMultiheadAttention):
            yield from _places(child, f"{name}.")


def _reasons_to_stay(model: nn.Module) -> dict[nn.Module, str]:
    """The layers that cannot be swapped faithfully, with why."""
    owners: dict[int, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(module)
    reasons: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            if type(module) is not nn.MultiheadAttention:
                reasons[module] = f"{type(module).__name__} overrides torch.nn.MultiheadAttention"
            elif module.bias_k is not None or module.add_zero_attn:
                reasons[module] = "bias_k, bias_v and add_zero_attn are not supported"
        elif isinstance(module, nn.Linear):
            if type(module).forward is not nn.Linear.forward:
                reasons[module] = f"{type(module).__name__} overrides torch.nn.Linear.forward"
            elif isinstance(module.weight, nn.UninitializedParameter):
                reasons[module] = "it is lazy and has no sizes yet; run one batch first"
        if isinstance(module, nn.Linear | nn.MultiheadAttention) and module not in reasons:
            shared = {owner for p in module.parameters() for owner in owners[id(p)]} - set(module.modules())
            if shared:
                reasons[module] = f"its weight is shared with a {type(shared.pop()).__name__}"
            elif any(is_parametrized(m) for m in module.modules()):
                reasons[module] = "its weight is parametrized"
            elif any("forward" in vars(m) for m in module.modules()):
                reasons[module] = "its forward was replaced"
            elif any(getattr(m, hooks) for m in module.modules() for hooks in HOOKS):
                reasons[module] = "it has hooks, which would be lost"
    return reasons


def _build(layer: nn.Module, from_dense: bool, row_axis: str, settings: dict) -> nn.Module:
    if isinstance(layer, nn.MultiheadAttention):
        return STLMultiheadAttention(layer, from_dense=from_dense, row_axis=row_axis, **settings)
    assert isinstance(layer, nn.Linear)
    return STLLinear.from_linear(layer, from_dense=from_dense, row_axis=row_axis, **settings)


def _calibrate(
    model: nn.Module,
    swapped: list[_Place],
    built: dict[nn.Module, nn.Module],
    calibration: Iterable[Any],
    calibrate_basis: bool,
) -> dict[str, LayerCalibration | str]:
    """Calibrate what was swapped; a layer used twice is fitted once, and reported under all its names."""
    layers: dict[str, tuple[STLLinear, nn.Linear]] = {}
    first: dict[nn.Module, str] = {}
    aliases: dict[str, str] = {}
    for place in swapped:
        dense = dense_projections(place.layer) if isinstance(place.layer, nn.MultiheadAttention) else {"": place.layer}
        for part, linear in dense.items():
            layer = built[place.layer].get_submodule(part)
            assert isinstance(layer, STLLinear)
            assert isinstance(linear, nn.Linear)
            name = f"{place.name}.{part}" if part else place.name
            aliases[name] = first.setdefault(layer, name)
            layers.setdefault(aliases[name], (layer, linear))
    done = calibrate(model, layers, calibration, calibrate_basis)
    return {name: done[alias] for name, alias in aliases.items()}


def _describe(layer: nn.Module) -> str:
    return str(layer) if isinstance(layer, STLLinear) else f"{type(layer).__name__} of 4 STLLinear"


def _axis(place: _Place, row_axis: str) -> str:
    """The axis of the layer's own input that `row_axis` means for input of shape (batch, tokens, features)."""
    parent = place.parent
    if isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        attention = parent.self_attn
        tokens_first = (
            isinstance(attention, nn.MultiheadAttention | STLMultiheadAttention) and not attention.batch_first
        )
        if tokens_first and isinstance(place.layer, nn.Linear):
            return {"tokens": "batch", "batch": "tokens"}[row_axis]
    return row_axis


def _leave_fused_paths(model: nn.Module) -> None:
    """PyTorch's fused encoder reads the weights of its layers itself: switch it off wherever an STL layer sits."""
    for module in model.modules():
        if any(isinstance(child, STLLinear) for child in module.modules()):
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
            elif isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False


def _patterns(patterns: Patterns) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns or ())


def _match(names: list[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check_patterns(setting: str, patterns: tuple[str, ...], places: list[_Place]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(place.name, pattern) for place in places):
            some = ", ".join([place.name for place in places[:4]] + ["…"] * (len(places) > 4))
            raise SettingError(f"{setting}={pattern!r} matches no linear layer; the model has {some}")
