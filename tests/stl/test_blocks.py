"""What `fuse_blocks` recognises, and that a fused block stays what it was, by kernels as well: on the GPU where there
is one, else in Triton's interpreter."""

import copy
import pickle
import random
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from agreement import DEVICE, gaussian
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import models  # noqa: F401  timm knows them from here on
from models.t2t_vit import Block
from models.tokens_to_token import TokenTransformer
from stl import STLBlock, STLLinear, convert, count_flops, fuse_blocks

stl = partial(STLLinear, tile=4, rank=16)
ALL, NORMS = ("attn.qkv", "attn.proj", "mlp"), ("attn.qkv", "mlp")


def timm_block(**settings) -> nn.Module:
    block = TimmBlock(8, 2, 2.0, qkv_bias=True, **settings)
    convert(block, tile=4, rank=16)
    return block


def t2t_block(drop: float = 0.0, attn_drop: float = 0.0, drop_path: float = 0.0) -> nn.Module:
    return Block(8, 2, 16, stl, drop, attn_drop, drop_path)


# with the layers that are fused in training, and in evaluation
BLOCKS = {
    "timm": (timm_block, ALL, ALL),
    "timm, drop path": (lambda: timm_block(drop_path=0.5), NORMS, ALL),
    "timm, layer scale": (lambda: timm_block(init_values=0.1), NORMS, NORMS),
    "timm, norms of queries and keys": (lambda: timm_block(qk_norm=True), ALL, ALL),
    "t2t": (t2t_block, ALL, ALL),
    "t2t, drop path": (lambda: t2t_block(drop_path=0.5), NORMS, ALL),
    "t2t, dropout of attention": (lambda: t2t_block(attn_drop=0.5), ALL, ALL),
    "t2t, dropout": (
        lambda: t2t_block(drop=0.5),
        ("attn.qkv", "mlp.fc1"),
        ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
    ),
    "token transformer": (lambda: TokenTransformer(8, 6, stl), ("mlp",), ("mlp",)),
}


CASES = [(name, layers[0] != layers[1]) for name, (_, *layers) in BLOCKS.items()]
CASES += [(name, not training) for name, training in CASES if training] + [("timm", True)]


def results(block: nn.Module, x: Tensor, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of x and of all parameters by their names."""
    for module in block.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    block, x = block.to(DEVICE, dtype), x.to(dtype).requires_grad_()
    torch.manual_seed(1)
    y = block(x)
    parameters = [parameter for _, parameter in sorted(block.named_parameters())]
    return [y, *torch.autograd.grad(y, [x, *parameters], gaussian(*y.shape, seed=3).to(dtype))]


@pytest.mark.parametrize(("name", "training"), CASES)
def test_a_block_is_found_and_stays_what_it_was(name, training):
    torch.manual_seed(0)
    make, *layers = BLOCKS[name]
    model = nn.Sequential(make()).train(training)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    plain, names, report = copy.deepcopy(model), list(model.state_dict()), count_flops(model, (2, 3, 8))
    assert "0" in fuse_blocks(model)
    assert isinstance(model[0], STLBlock)
    assert isinstance(model[0], type(plain[0]))
    assert (model[0].fused[True], model[0].fused[False]) == tuple(layers)
    assert list(model.state_dict()) == names
    assert count_flops(model, (2, 3, 8)) == report
    assert {module.training for module in model.modules()} == {training}
    assert fuse_blocks(model) == []

    x = gaussian(2, 3, 8, seed=0)
    for backend, dtype, tolerance in (("torch", torch.float64, 1e-12), ("triton", torch.float32, 2e-5)):
        wanted = results(plain, x, "torch", dtype)  # in the same dtype: on a GPU others drop other numbers
        for got, exact in zip(results(model, x, backend, dtype), wanted, strict=True):
            assert (got - exact).norm() <= tolerance * exact.norm().clamp(min=1)


def test_under_autocast_what_blocks_hand_on_stays_float32():
    torch.manual_seed(0)
    model = nn.Sequential(timm_block()).to(DEVICE)
    plain, x = copy.deepcopy(model), gaussian(2, 3, 8, seed=0).float()
    fuse_blocks(model)
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "triton"
    with torch.autocast(DEVICE, torch.bfloat16):
        y, wanted = model(x), plain(x)
    assert y.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(y, wanted, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_without_graph_breaks(backend):
    torch.manual_seed(0)
    block, x = timm_block(drop_path=0.5).eval(), gaussian(1, 3, 8, seed=0).float()
    fuse_blocks(block)
    wanted, *_ = results(block, x, backend, torch.float32)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), wanted)


@pytest.mark.parametrize("gradients", [False, True])
def test_norms_are_a_compilers_where_there_are_gradients(gradients):
    compiled = []

    def compiler(graph, inputs):
        compiled.extend(node.target for node in graph.graph.nodes)
        return graph

    block, x = timm_block().to(DEVICE).train(gradients), gaussian(1, 3, 8, seed=0).float()
    fuse_blocks(block)
    block.attn.qkv.backend = block.attn.proj.backend = block.mlp.backend = "triton"
    torch.compiler.reset()
    with torch.set_grad_enabled(gradients):
        y = torch.compile(block, fullgraph=True, backend=compiler)(x)
        with FlopCounterMode(display=False) as counter:
            torch.testing.assert_close(block(x), y)
    alone = counter.get_flop_counts()["Global"]
    assert torch.ops.stl.norm_encode_gemm in alone
    assert (torch.ops.stl.norm_encode_gemm in compiled) != gradients
    assert torch.ops.stl.hidden_gemm in alone.keys() & set(compiled)


def test_every_block_of_a_vision_transformer():
    model = timm.create_model("t2t_vit_tiny", drop_path_rate=0.1).eval()
    convert(model, rank=16)
    x = gaussian(2, 3, 32, 32, seed=0).float().cpu()
    wanted, report, names = model(x), count_flops(model, (3, 32, 32)), list(model.state_dict())
    mlps = ["tokens_to_token.attention1.mlp", "tokens_to_token.attention2.mlp"]
    blocks = [name for index in range(3) for name in (f"blocks.{index}", f"blocks.{index}.mlp")]
    assert fuse_blocks(model) == [*mlps, *blocks]
    assert torch.equal(model(x), wanted)
    assert count_flops(model, (3, 32, 32)) == report
    assert list(model.state_dict()) == names


class Branch(nn.Module):
    """x + layer(norm(x)), and what others make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), stl(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


class Broadcast(Branch):
    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1]
        return first + self.layer(self.norm(first + x))


class NoResidual(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))


class NoAutocast(Branch):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(DEVICE, enabled=False):
            return x + self.layer(self.norm(x))


class NoGradient(Branch):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.norm(x)
        return x + self.layer(y)


class Made(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x + torch.ones(8, device=DEVICE)))


class Depends(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x)) if x.sum() > 0 else x


class TwoInputs(Branch):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.layer(self.norm(y))


class InPlace(Branch):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x.mul_(2)
        return x + self.layer(y) * 2


class Augmented(Branch):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        x += self.layer(self.norm(x))
        return x + y


class Counting(Branch):
    """Changes itself in every way that there is."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.steps, self.sizes, self.seen = way, 0, {"x": [300]}, {1}
        self.register_buffer("count", torch.zeros(()))
        self.mean = torch.zeros(())  # of no state dict

    def forward(self, x: Tensor) -> Tensor:
        match self.way:
            case "attribute":
                self.steps += 1
            case "new attribute":
                self.last = x
            case "buffer":
                self.count += 1
            case "another buffer":
                self.count = self.count + 1
            case "tensor":
                self.mean.copy_(self.count + 1)
            case "list in a dict":
                self.sizes["x"].append(x)
            case "set":
                self.seen.add(2)
            case "inner module":
                self.norm.steps = 1
        return x + self.layer(self.norm(x))

    def state(self) -> str:
        kept = [self.steps, self.sizes, self.seen, self.count.item(), self.mean.item()]
        return f"{kept} {sorted(vars(self))} {sorted(vars(self.norm))}"


class Chance(Branch):
    """Stochastic depth, by the numbers of Python or of torch."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x if self.draw() < 0.5 else x + self.layer(self.norm(x))


class Keywords(Branch):
    """As transformers' blocks, which are called with more than x."""

    def forward(self, x: Tensor, mask: Tensor | None = None, **others: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


class Scaled(Branch):
    """Another argument, which the traced graph does not have."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * x + self.layer(self.norm(x))


@pytest.mark.parametrize("kind", [NoResidual, NoAutocast, NoGradient, Made, Depends, TwoInputs, InPlace, Augmented])
def test_whatever_else_is_left_alone(kind):
    model = nn.Sequential(kind())
    assert fuse_blocks(model) == []
    assert type(model[0]) is kind


def test_what_takes_any_keywords_is_left_alone_but_where_it_is_seen_to_get_none():
    assert fuse_blocks(Keywords()) == []
    assert fuse_blocks(nn.Sequential(Keywords())) == [""]


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(()).item(), lambda: torch.rand(2)[0]])
def test_what_leaves_something_to_chance_is_left_alone_and_uses_up_no_numbers(draw):
    model = nn.Sequential(Chance(draw))
    for seed in range(4):  # by chance two traces are alike
        random.seed(seed)
        torch.manual_seed(seed)
        states = random.getstate(), torch.get_rng_state()
        assert fuse_blocks(model) == []
        assert random.getstate() == states[0]
        assert torch.equal(torch.get_rng_state(), states[1])


WAYS = ["attribute", "new attribute", "buffer", "another buffer", "tensor", "list in a dict", "set", "inner module"]


@pytest.mark.parametrize("way", WAYS)
def test_what_changes_itself_is_left_alone_and_unchanged(way):
    model = nn.Sequential(Counting(way).train())
    before, buffer = model[0].state(), model[0].count
    assert fuse_blocks(model) == []
    assert model[0].state() == before
    assert model[0].count is buffer
    assert fuse_blocks(nn.Sequential(Counting("not at all"))) == ["0"]


def test_what_has_hooks_is_left_alone():
    model = nn.Sequential(Branch())
    model[0].norm.register_forward_hook(lambda *_: None)
    assert fuse_blocks(model) == []


@pytest.mark.parametrize("kind", [Branch, Broadcast])
def test_what_is_added_may_be_of_another_shape(kind):
    model = kind()
    plain, x = copy.deepcopy(model), gaussian(2, 5, 8, seed=0)
    assert fuse_blocks(model) == [""]
    for got, wanted in zip(
        results(model, x, "triton", torch.float32), results(plain, x, "torch", torch.float64), strict=True
    ):
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


def test_with_other_arguments_the_block_computes_itself():
    model = Scaled().to(DEVICE)
    plain, x = copy.deepcopy(model), gaussian(2, 5, 8, seed=0).float()
    fuse_blocks(model)
    model.layer.backend = "triton"
    torch.testing.assert_close(model(x), plain(x))
    torch.testing.assert_close(model(x, 3.0), plain(x, 3.0))
    torch.testing.assert_close(model(x=x), plain(x))


def test_a_copy_is_fused_and_a_pickled_block_is_what_it_was():
    model = Branch()
    fuse_blocks(model)
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert type(copied) is type(model)
    assert copied.layer is not model.layer
    assert type(loaded) is Branch
    x = gaussian(2, 5, 8, seed=0).float().cpu()
    assert torch.equal(copied(x), model(x))
    assert torch.equal(loaded(x), model(x))
