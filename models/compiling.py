"""torch.compile of a whole model, with CUDA graphs where they are asked for."""

import torch
from torch import nn

from models.barriers import read_back_behind_barriers
from stl import SettingError

# "reduce-overhead" replays the passes as CUDA graphs: small models otherwise wait for the CPU to launch their kernels.
MODES = ("default", "reduce-overhead")


def compile_model(model: nn.Module, mode: str | None) -> None:
    """Compile the forward pass in place, with one of `MODES`; None leaves the model as it is.

    Raises SettingError for another mode.
    """
    if mode is None:
        return
    if mode not in MODES:
        raise SettingError(f"compile={mode} is unknown; choose one of {', '.join(MODES)}, or null")
    read_back_behind_barriers()
    torch._dynamo.config.optimize_ddp = False  # one graph each way, where DDP would have one for each of its buckets
    model.compile(mode=mode)


def overwrites_gradients(mode: str | None) -> bool:
    """Whether gradients stand in memory that the next pass writes to, as those of a CUDA graph do."""
    return mode == "reduce-overhead"
