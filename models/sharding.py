"""FSDP2: parameters, gradients and optimizer state divided over the devices (PyTorch's `fully_shard`)."""

from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def fsdp2_strategy(devices: int | str, num_nodes: int) -> ModelParallelStrategy:
    """Lightning's strategy over all devices of all nodes, with checkpoints in one file like everywhere else."""
    here = devices if isinstance(devices, int) and devices > 0 else max(1, torch.cuda.device_count())
    return ModelParallelStrategy(
        data_parallel_size=here * num_nodes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None = None, least: int = 100_000_000) -> None:
    """Divide a model in place: as one unit, or, from `least` parameters on, each of its blocks on its own.

    A unit's weights are gathered before it runs and freed behind it, in `dtype` where that is given: half the traffic
    in bfloat16, and the products are autocast's all the same; vectors (norms, biases) are rounded with them. What the
    optimizer steps, and the sums of gradients, stay as they are. Units of blocks keep less in memory at a time; in
    small models their many small messages cost more time than the rest. (10⁸ is also the default of PyTorch's
    size-based policy.)
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False)
    if sum(parameter.numel() for parameter in model.parameters()) >= least:
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.ModuleList) or name.rpartition(".")[2] == "blocks":
                for block in module.children():
                    fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def whole_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state dict with whole tensors; of a divided model on the CPU, and on the first process alone."""
    return get_model_state_dict(model, options=_WHOLE) if isinstance(model, FSDPModule) else model.state_dict()


def load_whole_state_dict(model: nn.Module, state_dict: dict[str, Any]) -> None:
    """The inverse of `whole_state_dict`; every process has the whole tensors."""
    if isinstance(model, FSDPModule):
        set_model_state_dict(model, state_dict, options=_WHOLE)
    else:
        model.load_state_dict(state_dict)
