"""Compiled kernels wait before they read back what they have stored."""

import inspect
import re

import pytest
import throughput
import torch
import torch._inductor.scheduler
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.codegen.triton import TritonKernel
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from models.build import build_model
from models.compiling import compile_model

H200 = DeviceProperties("cuda", 0, 132, 90, 9, 65536, 2048, 1024, 32)
READ_BACK = re.compile(r"tl\.store\((\w+) [^\n]*\n(.*)= tl\.load\(\1 ", re.DOTALL)


@pytest.fixture(autouse=True)
def unchanged(monkeypatch):
    """The compiler, as PyTorch has it, whatever this process has compiled."""
    monkeypatch.setattr(
        TritonKernel, "_handle_pdl_before_access", inspect.unwrap(TritonKernel._handle_pdl_before_access)
    )
    with torch.compiler.config.patch(cache_key_tag=""):
        yield


def residual(token: Tensor, image: Tensor, position: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The first half of a vision transformer's first block behind its attention, (16, 197, 192)."""
    tokens = torch.cat((token.expand(len(image), -1, -1), image.flatten(2).mT), 1) + position + x
    return F.layer_norm(tokens, (192,), weight).bfloat16(), tokens


@pytest.fixture
def generated(monkeypatch):
    """What makes the code that the compiler has for `residual` on a GPU, which need not be there."""
    monkeypatch.setattr(DeviceProperties, "create", classmethod(lambda cls, device: H200))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: H200)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch._inductor.scheduler, "has_triton", lambda *device: True)
    monkeypatch.setattr("torch.utils._triton.triton_hash_with_backend", lambda: "")

    def generate() -> str:
        with FakeTensorMode() as fake, torch.device("cuda"):
            image = torch.empty(16, 192, 14, 14, dtype=torch.bfloat16)
            shapes = [(1, 1, 192), image.shape, (1, 197, 192), (16, 197, 192), (192,)]
            given = [image if shape == image.shape else torch.empty(shape) for shape in shapes]
            graph = GraphLowering(make_fx(residual, select_decomp_table())(*given))
            with V.set_graph_handler(graph), V.set_fake_mode(fake), V.set_debug_handler(DebugContext()):
                graph.run(*given)
                return graph.codegen()[0].value

    return generate


@pytest.mark.parametrize("dependent", [False, True], ids=["alone", "launched early"])
def test_a_kernel_waits_before_it_reads_back_what_it_has_stored(generated, dependent):
    with torch._inductor.config.patch({"triton.enable_pdl": dependent}):
        read_back = READ_BACK.search(generated())
        assert read_back is not None
        theirs = "tl.debug_barrier()" in read_back[2]
        compile_model(nn.Identity(), "default")
        code = generated()
        assert READ_BACK.search(code)[2].count("tl.debug_barrier()") == 1
        assert code.count("tl.debug_barrier()") == 1
        assert ("gdc_wait()" in code) == dependent
        tag = torch.compiler.config.cache_key_tag
        assert bool(tag) != theirs
        compile_model(nn.Identity(), "default")
        assert (generated(), torch.compiler.config.cache_key_tag) == (code, tag)


def test_a_compiler_that_is_another_gets_one_line(monkeypatch):
    monkeypatch.setattr(TritonKernel, "load", lambda kernel, name, index: None)
    monkeypatch.delattr(TritonKernel, "_handle_pdl_before_access")
    with pytest.warns(UserWarning, match=r"^PyTorch .* may lack barriers in compiled kernels: see its issue 190517$"):
        compile_model(nn.Identity(), "default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")
def test_a_model_that_reads_back_is_right_in_every_call():
    torch.manual_seed(0)
    model = build_model("deit_tiny_patch16_224", num_classes=1000, img_size=224).cuda().eval()
    images = torch.randn(16, 3, 224, 224, device="cuda")
    wanted = throughput.logits(model, images, None)
    compile_model(model, "default")
    for _ in range(12):
        got = throughput.logits(model, images, torch.bfloat16)
        assert nn.functional.mse_loss(got.float(), wanted) < 1e-3 * wanted.square().mean()
