"""A whole model, layer by layer in the order in which it runs them."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from stl.calibration.layer import LayerCalibration, fit_layer
from stl.calibration.sample import Tiles
from stl.errors import SettingError
from stl.linear import STLLinear


@torch.no_grad()
def calibrate(
    model: nn.Module,
    layers: dict[str, tuple[STLLinear, nn.Linear]],
    calibration: Iterable[Any],
    calibrate_basis: bool = False,
) -> dict[str, LayerCalibration | str]:
    """Fit the weights of `layers`, name: (STL layer inside `model`, the dense layer that it replaces), in place.

    With `calibrate_basis` their encoders and decoders as well. All of it wherever that lowers the held-out error by
    more than its standard error.

    Layers are fitted in the order in which the model first runs them, each to its dense layer's output **on the input
    that it will see**, that of the model with all earlier layers calibrated. The other choice, the dense layer's output
    on the dense model's input, would make a layer undo the errors of earlier ones: its weight then depends on them, is
    no longer a copy of the dense one where the basis is exact, and has more to learn from the same rows.

    The batches are kept, and run through the model once for every layer and once more, in evaluation mode, without
    gradients. Of a layer's input at most `MAX_TILES` rows of tiles are kept, drawn with a fixed seed.

    Returns:
        For each name what was done, or why its weight stayed uncalibrated.

    Raises:
        SettingError: calibration that is empty, no series of batches or holds NaN; an input of a layer that is not
        finite; a model without values. Layers fitted by then keep their new weights.
    """
    device = _device(model)
    batches = _batches(calibration, device)
    training = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        for module, mode in training.items():
            stack.callback(setattr, module, "training", mode)
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # it would run around the layers
        model.eval()
        shapes = _run_order(model, layers, batches)
        done: dict[str, LayerCalibration | str] = dict.fromkeys(layers, "it saw no calibration data")
        for name, shape in shapes.items():
            layer, dense = layers[name]
            tiles = Tiles(layer, len(batches))
            _run(model, batches, {name: layer}, tiles.add)
            done[name] = fit_layer(name, layer, dense.weight, tiles, shape, calibrate_basis)
    return done


def _device(model: nn.Module) -> torch.device:
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        raise SettingError(
            "calibration needs a model with values; this one is on the meta device: load its weights first"
        )
    return tensors[0].device


def _batches(calibration: Iterable[Any], device: torch.device) -> list[Tensor | dict[str, Any]]:
    """The batches as the model takes them, on its device."""
    if isinstance(calibration, Tensor | dict | str) or not isinstance(calibration, Iterable):
        raise SettingError(
            f"calibration is a {type(calibration).__name__}; it must be a series of batches: put a single one in a list"
        )
    batches: list[Tensor | dict[str, Any]] = []
    for number, batch in enumerate(calibration):
        content = batch[0] if isinstance(batch, tuple | list) and batch else batch  # (inputs, labels)
        if not isinstance(content, Tensor | dict):
            raise SettingError(
                f"calibration batch {number} is a {type(content).__name__}; a batch is a tensor, a tuple that starts "
                "with one, or a dict of keyword arguments"
            )
        tensors = {"": content} if isinstance(content, Tensor) else content
        for key, value in tensors.items():
            if isinstance(value, Tensor) and value.is_floating_point() and value.isnan().any():
                where = f" in {key!r}" if key else ""
                raise SettingError(f"calibration batch {number} holds NaN{where}; remove or repair its samples")
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in tensors.items()}
        batches.append(moved[""] if isinstance(content, Tensor) else moved)
    if not batches:
        raise SettingError("calibration holds no batches; pass at least one, or leave it out to convert without data")
    return batches


Hook = Callable[[str, int, Tensor], None]  # name of the layer, number of the batch, input


def _run(model: nn.Module, batches: list, layers: dict[str, STLLinear], hook: Hook) -> None:
    """Run the batches through the model and call `hook` at every call of one of the layers."""
    number = 0

    def watch(name: str, layer: STLLinear) -> None:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["x"]
            if not x.isfinite().all():
                raise SettingError(
                    f"calibration batch {number} gives layer {name!r} NaN or infinite inputs; check that batch, or "
                    "calibrate in float32"
                )
            hook(name, number, x)

        stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)

    with ExitStack() as stack:
        for name, layer in layers.items():
            watch(name, layer)
        for number, batch in enumerate(batches):  # noqa: B007  # read by the hooks
            model(**batch) if isinstance(batch, dict) else model(batch)


def _run_order(
    model: nn.Module, layers: dict[str, tuple[STLLinear, nn.Linear]], batches: list
) -> dict[str, torch.Size]:
    """The shape of the first input of every layer that gets any, in the order in which they get it."""
    shapes: dict[str, torch.Size] = {}

    def note(name: str, number: int, x: Tensor) -> None:
        if x.numel():
            shapes.setdefault(name, x.shape)

    _run(model, batches, {name: layer for name, (layer, _) in layers.items()}, note)
    return shapes
