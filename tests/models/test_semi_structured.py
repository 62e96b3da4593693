"""2:4 layers by PyTorch's sparse kernels, and what these do not take."""

from itertools import pairwise

import pytest
import torch
from sparse_kernels import FOUND, emulate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from models.semi_structured import SemiStructuredLinear, compress
from models.sparse24 import Sparse24Linear
from stl import SettingError, count_flops

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")


def model(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Sparse24Linear(k, m) for k, m in pairwise(sizes)), nn.Linear(sizes[-1], 3))


def test_without_a_gpu_it_is_one_line_and_nothing_changes():
    made = model(64, 128)
    with pytest.raises(SettingError, match=r"^layer '0' is on cpu: kernels for 2:4 sparsity need a GPU of compute cap"):
        compress(made)
    assert isinstance(made[0], Sparse24Linear)


def compressed(x: torch.Tensor, *sizes: int) -> nn.Sequential:
    """A model whose layers are compressed, and searched for this input."""
    made = model(*sizes).to(x)
    for name in compress(made):
        layer = made.get_submodule(name)
        assert isinstance(layer, SemiStructuredLinear)
        layer.search(x.new_zeros(*x.shape[:-1], layer.in_features))
    return made


@pytest.mark.parametrize("shape", [(64,), (0, 64), (3, 64), (8, 64), (5, 9, 64)])
def test_layers_take_what_dense_ones_do(shape, monkeypatch):
    emulate(monkeypatch)
    x = torch.randn(shape)
    made = compressed(x, 64, 128, 32)
    assert made[0].algorithm == made[1].algorithm == FOUND
    torch.testing.assert_close(made(x), model(64, 128, 32)(x))
    with torch.autocast("cpu", torch.bfloat16):
        halved = compressed(x.bfloat16(), 64, 128, 32)(x)
    torch.testing.assert_close(halved.float(), made(x), atol=0.02, rtol=0.02)


def test_compiled_and_exported_it_is_one_graph_for_every_batch(monkeypatch):
    emulate(monkeypatch)
    x = torch.randn(5, 9, 64)
    made = compressed(x, 64, 128, 32)
    torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))
    exported = torch.export.export(made, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(x[:3]), made(x[:3]))
    torch.library.opcheck(
        torch.ops.models.semi_structured_linear.default,
        (torch.randn(9, 64), made[0].packed, made[0].bias.data, 128, list(FOUND)),
    )


def test_what_it_does_not_take_is_one_line(monkeypatch):
    emulate(monkeypatch)
    made = compressed(torch.randn(8, 64).bfloat16(), 64, 128)[0]
    with pytest.raises(SettingError, match=r"^the compressed weight is in torch.bfloat16; x or bias in torch.float32 "):
        made(torch.randn(8, 64))
    for wrong in (torch.randn(0, 48), torch.tensor(1.0)):
        with pytest.raises(SettingError, match=r"^x has shape \(.*\), but in_features=64 must be the last size$"):
            made(wrong.bfloat16())
    with pytest.raises(SettingError, match=r"^the model is a 2:4 layer itself"):
        compress(Sparse24Linear(64, 128))


def test_casts_leave_the_weight_alone(monkeypatch):
    emulate(monkeypatch)
    x = torch.randn(8, 64).bfloat16()
    made = compressed(x, 64, 128)
    wanted = made(x)
    with pytest.raises(SettingError, match=r"x or bias in torch\.float16 must be"):
        made.half()(x)
    torch.testing.assert_close(made.float().bfloat16()(x), wanted)
    with pytest.raises(
        SettingError, match=r"checkpoint's compressed weight is in torch.bfloat16, the model's in torch"
    ):
        compressed(x.half(), 64, 128).load_state_dict(made.state_dict())


def test_a_layer_under_two_names_stays_one(monkeypatch):
    emulate(monkeypatch)
    layer = Sparse24Linear(64, 64)
    made = nn.Sequential(layer, nn.Sequential(layer))
    assert compress(made) == ["0"]
    assert made[0] is made[1][0]
    assert isinstance(made[0], SemiStructuredLinear)


def test_it_is_counted_as_before(monkeypatch):
    emulate(monkeypatch)
    made, before = compressed(torch.randn(8, 64), 64, 128, 32), model(64, 128, 32)
    macs = count_flops(made, (9, 64)).linear
    assert macs == count_flops(before, (9, 64)).linear
    with FlopCounterMode(display=False) as counter:
        made(torch.randn(9, 64))
    assert counter.get_total_flops() == 2 * macs


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_compressed_computes_the_same(compiled):
    made, x = model(128, 256, 64).cuda().half(), torch.randn(5, 9, 128, device="cuda").half()
    wanted = made(x)
    assert compress(made) == ["0", "1"]
    with torch.no_grad():
        y = (torch.compile(made, fullgraph=True) if compiled else made)(x)
    torch.testing.assert_close(y, wanted, atol=2e-2, rtol=2e-2)


@needs_gpu
def test_the_layout_of_the_input_does_not_matter():
    made, x = model(128, 256).cuda().half(), torch.randn(5, 128, 9, device="cuda").half().mT
    wanted = made(x)
    compress(made)
    torch.testing.assert_close(made(x), wanted, atol=2e-2, rtol=2e-2)


@needs_gpu
@pytest.mark.parametrize(
    ("sizes", "dtype", "message"),
    [
        ((64, 128), torch.float32, r"layer '0' is in torch.float32: kernels for 2:4 sparsity need float16 or bfloat16"),
        ((128, 30), torch.float16, r"layer '0' cannot be compressed \(.*multiple of .*\); leave it dense"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(sizes, dtype, message):
    with pytest.raises(SettingError, match=message):
        compress(model(*sizes).cuda().to(dtype))
