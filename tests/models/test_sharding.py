"""FSDP2 in a process group of one process: what becomes a unit, and that state dicts stay whole."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from models.build import build_model
from models.sharding import fsdp2_strategy, load_whole_state_dict, shard, whole_state_dict


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def tiny():
    return build_model("t2t_vit_tiny", num_classes=10, img_size=32).eval()


@pytest.mark.parametrize(("least", "units"), [(10**8, [""]), (1, ["", "blocks.0", "blocks.1", "blocks.2"])])
def test_small_models_are_one_unit_and_large_ones_a_unit_a_block(mesh, least, units):
    model = tiny()
    expected = model(torch.ones(1, 3, 32, 32))
    shard(model, mesh, least=least)
    assert sorted(name for name, module in model.named_modules() if isinstance(module, FSDPModule)) == units
    torch.testing.assert_close(model(torch.ones(1, 3, 32, 32)), expected)


def test_weights_are_gathered_in_bfloat16_and_trained_in_float32(mesh):
    model, seen = torch.nn.Linear(8, 4), []
    plain = copy.deepcopy(model)
    shard(model, mesh, torch.bfloat16)
    model.register_forward_hook(lambda module, *_: seen.append(module.weight.dtype))
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = model(x), plain(x)
    assert torch.equal(got, wanted)
    got.sum().backward()
    wanted.sum().backward()
    assert seen == [torch.bfloat16]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)


def test_state_dicts_are_those_of_the_undivided_model(mesh):
    plain, divided = tiny(), tiny()
    shard(divided, mesh)
    load_whole_state_dict(divided, plain.state_dict())
    whole = whole_state_dict(divided)
    assert list(whole) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(whole[name], value)
        assert type(whole[name]) is torch.Tensor


def test_all_devices_of_all_nodes_divide_the_model():
    assert fsdp2_strategy(4, 2)._data_parallel_size == 8
    assert fsdp2_strategy("auto", 1)._data_parallel_size == max(1, torch.cuda.device_count())
