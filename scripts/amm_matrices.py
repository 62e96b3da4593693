"""Pairs of matrices X (samples, n, k) and W (k, m) in float64 to multiply: drawn, or recorded from a trained model."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trained import batches_of, dense_run

from stl import SettingError

Pair = tuple[Tensor, Tensor]
IMAGES = 16  # of which the activations are recorded for one pair


@dataclass(frozen=True)
class Kind:
    """Matrices of one origin; `draw(seed)` gives a pair, the same for the same seed."""

    name: str
    draw: Callable[[int], Pair]


def drawn(size: int) -> list[Kind]:
    """Square matrices of this size: Gaussian, and with the singular values 1, 1/2, 1/3 … in W alone or in both."""

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    def gaussian(generator: torch.Generator) -> Tensor:
        return torch.randn(size, size, dtype=torch.float64, generator=generator)

    def decaying(generator: torch.Generator) -> Tensor:
        left, right = (torch.linalg.qr(gaussian(generator)).Q for _ in range(2))
        return left / torch.arange(1, size + 1) @ right.T

    def pairs(of_x: Callable[[torch.Generator], Tensor], of_w: Callable[[torch.Generator], Tensor]) -> Any:
        def draw(seed: int) -> Pair:
            source = generator(seed)
            return of_x(source)[None], of_w(source)

        return draw

    return [
        Kind("Gaussian", pairs(gaussian, gaussian)),
        Kind("W decaying as 1/i", pairs(gaussian, decaying)),
        Kind("X and W decaying as 1/i", pairs(decaying, decaying)),
    ]


def recorded(folder: Path, layers: list[str], pairs: int) -> tuple[list[Kind], dict[str, Any]]:
    """The inputs and weights of these linear layers of a trained model, and what is to be said of the run.

    Pair s holds what the s-th IMAGES held-out images give.

    Raises SettingError where the folder holds no run, its layers are not dense or not these, or there are fewer images.
    """
    model, data, facts = dense_run(folder)
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    if missing := [name for name in layers if name not in found]:
        raise SettingError(
            f"--layers {' '.join(missing)}: no dense linear layers of the model in {folder}; "
            f"it has {', '.join(found) or 'none: train one with linear=dense'}"
        )
    data.eval_batch_size = IMAGES
    batches = [images for images, _ in islice(batches_of(data, "val"), pairs) if len(images) == IMAGES]
    if len(batches) < pairs:
        raise SettingError(
            f"--seeds {pairs} needs {pairs * IMAGES} held-out images; {data.name} has only {len(data.val_data)}"
        )
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name in layers:
        # bound now: the loop's variable is another one when the hook is called
        found[name].register_forward_pre_hook(lambda _, args, kept=inputs[name]: kept.append(args[0].double()))
    with torch.no_grad():
        for images in batches:
            model(images)

    def kind(name: str) -> Kind:
        weight = found[name].weight.detach().double().T
        return Kind(name, lambda seed: (inputs[name][seed], weight))

    return [kind(name) for name in layers], facts | {"images": IMAGES}
