"""Images a second of models on this machine's GPUs, compiled, in bf16: inference, training step, peak memory.

    python scripts/throughput.py --out results/throughput_h200.json
    python scripts/throughput.py --models all --rank 24
    python scripts/throughput.py --models t2t_vit_7 --devices 2 --strategy ddp fsdp2   # on one GPU, then on two

Images are random and on the GPU: bench_loader.py measures what brings them there. The file is rewritten after every
row, and models that it has are not measured again: a stopped program goes on.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import product
from math import prod
from multiprocessing import set_forkserver_preload
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmarking import (
    REFUSALS,
    SPARSE,
    bound_seconds,
    compress_for,
    earlier,
    machine,
    prune,
    reason,
    relative_error,
    run_main,
    set_backend,
    synchronize,
    takes,
    work,
)
from command_line import command_line
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from models.build import build_model
from models.callbacks import write_json
from models.compiling import MODES, compile_model
from models.sharding import shard
from models.t2t_vit import VARIANTS
from stl import SettingError, STLLinear, fuse_blocks, fuse_mlps

CHECKED = 8  # images whose gradients are
ALLOWED = 2  # times the error of the same model in bf16 by plain PyTorch
STRATEGIES = ("ddp", "fsdp2")
FUSE = {"mlps": fuse_mlps, "blocks": fuse_blocks}  # as train.py does, and that with norms and additions
SAME = ("gpu", "driver", "versions", "git_commit", "compile")  # what rows of one file have in common


@dataclass(frozen=True)
class Case:
    """What one row of the file measures."""

    model: str
    linear: str  # a key of `linears()`
    batch_size: int  # images on each device
    devices: int = 1
    strategy: str | None = None  # with several devices, one of STRATEGIES
    backend: str = "auto"  # of the STL layers
    fused: str | None = None  # what the kernels fuse, one of FUSE


@dataclass(frozen=True)
class How:
    """How every row is measured."""

    repeats: int = 7  # blocks, behind one that warms up
    calls: int = 10  # in a block
    image_size: int = 224
    compile_mode: str | None = "reduce-overhead"
    device: str = "cuda"  # "cpu" is there for the tests
    ceilings: dict[str, float] | None = None  # of this machine; with them rows on one device have their bounds


def linears(ranks: list[int]) -> dict[str, Callable[..., nn.Module]]:
    """The linear layers by the names they have in tables."""
    return {
        "dense": nn.Linear,
        SPARSE: nn.Linear,  # then pruned
        **{f"stl t=4 r={rank}": partial(STLLinear, tile=4, rank=rank, basis="frame") for rank in ranks},
    }


def build(case: Case, linear: Callable[..., nn.Module], how: How) -> Callable[[], Any]:
    """What makes the model of a case."""
    make = partial(build_model, case.model, num_classes=1000, img_size=how.image_size, linear=linear)
    return partial(pruned, make) if case.linear == SPARSE else make


def pruned(make: Callable[[], Any]) -> Any:
    """The dense model that is made, with 2:4 layers where cuSPARSELt takes their sizes."""
    model = make()
    prune(model, partial(takes, dtype=torch.bfloat16))
    return model


def measure(case: Case, make: Callable[[], Any], how: How) -> dict[str, float]:
    """Images a second over all devices of a whole training step (AdamW included); the step's peak memory in GiB on the
    first device; on one device also images a second of inference, with ceilings both bounds, and errors: a model that
    is wrong has no rates. 2:4 has inference only, and the names of what stays dense; where the sparse kernels refuse
    it, the reason alone. Each device has a process of its own."""
    with TemporaryDirectory() as folder:
        set_forkserver_preload(["timm", "models.build"])  # the imports, once for all rows
        torch.multiprocessing.start_processes(
            _process, (case, make, how, Path(folder)), nprocs=case.devices, start_method="forkserver"
        )
        return json.loads((Path(folder) / "rates.json").read_text())


def _process(rank: int, case: Case, make: Callable[[], Any], how: How, folder: Path) -> None:
    device = torch.device(f"cuda:{rank}" if how.device == "cuda" else how.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if case.devices > 1:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/rendezvous",  # needs no free port
            rank=rank,
            world_size=case.devices,
            device_id=device if device.type == "cuda" else None,
        )
    rates = _rates(case, make, how, device)
    if rank == 0:
        write_json(folder / "rates.json", rates)
    if case.devices > 1:
        dist.destroy_process_group()


def _rates(case: Case, make: Callable[[], Any], how: How, device: torch.device) -> dict[str, Any]:
    model = make().to(device)
    try:
        return _checked_rates(case, model, how, device)
    except REFUSALS as error:
        if case.linear != SPARSE:
            raise
        return {"refused": reason(error)}


def _checked_rates(case: Case, model: Any, how: How, device: torch.device) -> dict[str, Any]:
    images = torch.randn(case.batch_size, 3, how.image_size, how.image_size, device=device)
    reference = copy.deepcopy(model)
    rates: dict[str, Any] = {}
    if case.devices == 1 and how.ceilings:
        rates |= bounds(reference, images.shape, passes(case), how.ceilings)
    arrange(model, case)
    if case.linear == SPARSE:
        rates["left_dense"] = [name for name, layer in model.named_modules() if type(layer) is nn.Linear]
        infer = partial(logits, model, images, torch.bfloat16)
        compress_for(model, torch.bfloat16, infer)
    elif case.devices == 1:
        rates |= errors("gradient_error", gradients, model, reference, images[:CHECKED])  # while it is not compiled
    compiled = parallel(model, case.strategy, how.compile_mode, device)
    if case.devices == 1:
        rates |= errors("error", logits, compiled, reference, images)  # of what is timed, with as many images
        if not is_right(rates):
            return rates
        model.eval()
        infer = partial(logits, compiled, images, torch.bfloat16)
        rates["inference_images_per_second"] = case.batch_size / seconds_a_call(infer, how, device)
        model.train()
    del reference  # takes no part in the peak
    return rates | (_training_rates(case, model, compiled, images, how) if "training" in passes(case) else {})


def _training_rates(case: Case, model: Any, compiled: nn.Module, images: torch.Tensor, how: How) -> dict[str, float]:
    device = images.device
    labels = torch.randint(model.num_classes, (case.batch_size,), device=device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def train() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    train()  # the optimizer has its state from here on
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    rates = {"training_images_per_second": case.devices * case.batch_size / seconds_a_call(train, how, device)}
    if device.type == "cuda":
        rates["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return rates


def passes(case: Case) -> tuple[str, ...]:
    """What is measured of a model: of a compressed one, which has no gradients, inference."""
    return ("inference",) if case.linear == SPARSE else ("inference", "training")


def bounds(model: Any, shape: Sequence[int], names: Sequence[str], top: dict[str, float]) -> dict[str, float]:
    """The most images a second that the ceilings allow each of these passes on images of this shape: with the MACs
    counted, and images, logits and weights moved in bf16, as `work` has it."""
    activations = prod(shape) + shape[0] * model.num_classes
    least = {name: work(model, shape, activations, name == "training") for name in names}
    return {
        f"{name}_bound_images_per_second": shape[0] / bound_seconds(*least[name], torch.bfloat16, top) for name in names
    }


def arrange(model: nn.Module, case: Case) -> None:
    """Fuse and compute what the case says, in place."""
    if case.fused is not None:
        FUSE[case.fused](model)
    set_backend(model, case.backend)


Computation = Callable[[nn.Module, torch.Tensor, torch.dtype | None], torch.Tensor]


def logits(model: nn.Module, images: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """(images, classes), under autocast to this dtype."""
    with torch.inference_mode(), torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        return model(images)


def gradients(model: nn.Module, images: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Those of all weights, one behind the other, for the mean square of the logits."""
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        loss = model(images).float().square().mean()
    weights = [weight for _, weight in sorted(model.named_parameters()) if weight.requires_grad]
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, weights)])


def errors(
    name: str, compute: Computation, model: nn.Module, reference: nn.Module, images: torch.Tensor
) -> dict[str, float]:
    """Relative errors in bf16 against the reference in float32, without dropout: the model's, under this name, and what
    the reference itself has, under plain_ and this name. The reference is by plain PyTorch and not compiled."""
    set_backend(reference, "torch")
    wanted = compute(reference.eval(), images, None)
    plain = compute(reference, images, torch.bfloat16)
    got = compute(model.eval(), images, torch.bfloat16)
    model.train()
    return {name: relative_error([got], [wanted]), f"plain_{name}": relative_error([plain], [wanted])}


def is_right(row: dict[str, Any]) -> bool:
    """Whether its errors, both or that of inference, are about those of plain bf16; not where one is NaN."""
    names = ["error", *(["gradient_error"] if "gradient_error" in row else [])]
    return all(row[name] <= ALLOWED * row[f"plain_{name}"] for name in names)


def parallel(model: nn.Module, strategy: str | None, compile_mode: str | None, device: torch.device) -> nn.Module:
    """The model, compiled, as one of several processes trains it: arranged as train.py arranges it."""
    compile_model(model, compile_mode)
    if strategy == "fsdp2":
        gathered = torch.bfloat16 if device.type == "cuda" else None
        shard(model, init_device_mesh(device.type, (dist.get_world_size(),)), gathered)
    if strategy == "ddp":
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    return model


def seconds_a_call(run: Callable[[], object], how: How, device: torch.device) -> float:
    """Median seconds of a call, over blocks of `how.calls` calls that follow each other as in training, so that the
    CPU may run ahead of a GPU; of several processes, which begin a block together, the slowest counts."""
    times = []
    for _ in range(1 + how.repeats):
        if dist.is_initialized():
            dist.barrier()
        synchronize(device)
        began = time.perf_counter()
        for _ in range(how.calls):
            run()
        synchronize(device)
        times.append((time.perf_counter() - began) / how.calls)
    slowest = torch.tensor(times[1:], device=device)
    if dist.is_initialized():
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def read_rows(path: Path, here: dict[str, Any]) -> dict[Case, dict[str, Any]]:
    """The rows of a file that this machine and this code wrote; raises SettingError where another did."""
    rows = (earlier(path, here, SAME) or {"models": []})["models"]
    return {Case(**{key: row[key] for key in Case.__dataclass_fields__ if key in row}): row for row in rows}


def describe(row: dict[str, Any]) -> str:
    words = [f"{row['model']:22} {row['linear']:12} {row['backend']:6} {row['fused'] or '':6}"]
    words[0] += f" × {row['devices']} {row['strategy'] or '':5}"
    if "refused" in row:
        return "   ".join([*words, f"REFUSED, not timed: {row['refused']}"])
    errors_of = [name for name in ("error", "gradient_error") if name in row]
    words += [f"{name.replace('_', ' ')} {row[name]:.1e}" for name in errors_of]
    if not any(f"{name}_images_per_second" in row for name in ("inference", "training")):
        return "   ".join([*words, "WRONG, not timed"])
    for name in ("inference", "training"):
        if f"{name}_images_per_second" in row:
            words.append(f"{name} {row[f'{name}_images_per_second']:.0f} images/s")
        if f"{name}_ratio" in row:
            words.append(f"{row[f'{name}_ratio']:.2f}× dense")
        if f"{name}_bound_images_per_second" in row:
            words.append(f"bound {row[f'{name}_bound_images_per_second']:.0f} images/s")
    if "scaling_efficiency" in row:
        words.append(f"scaling efficiency {row['scaling_efficiency']:.3f}")
    if "peak_memory_gib" in row:
        words.append(f"{row['peak_memory_gib']:.1f} GiB")
    return "   ".join(words)


def compared(row: dict[str, Any], first: dict[str, Any]) -> dict[str, float]:
    """How a row compares with the first of its group: scaling efficiency where that has the same layers on one device,
    ratios where that has others on as many."""
    rates = [f"{name}_images_per_second" for name in ("inference", "training")]
    both = {rate: row[rate] / first[rate] for rate in rates if rate in row and rate in first}
    if row["devices"] != first["devices"]:
        return {"scaling_efficiency": both[rates[1]] / row["devices"]} if rates[1] in both else {}
    if row["linear"] == first["linear"]:
        return {}
    return {rate.replace("images_per_second", "ratio"): ratio for rate, ratio in both.items()}


def measure_all(cases: list[list[Case]], ranks: list[int], how: How, out: Path, here: dict[str, Any]) -> None:
    """Measure what the file lacks. Each group of cases begins with the one that the others are compared with, and where
    one of the group is missing the whole is measured: what is compared are numbers of one call."""
    rows = read_rows(out, here)
    for group in cases:
        if all(case in rows for case in group):
            continue
        first: dict[str, Any] = {}
        for case in group:
            row: dict[str, Any] = {**vars(case), "date": datetime.now(UTC).isoformat(timespec="seconds")}
            row |= measure(case, build(case, linears(ranks)[case.linear], how), how)
            first = first or row
            row |= compared(row, first)
            rows[case] = row
            top = {"ceilings": how.ceilings} if how.ceilings else {}
            write_json(out, {"machine": here, **top, "models": list(rows.values())})
            print(describe(row), flush=True)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--models", nargs="+", default=["t2t_vit_7", "t2t_vit_14"], help="or all: every T2T-ViT")
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 24], help="of STL, t = 4")
    parser.add_argument("--batch-size", type=int, default=256, help="images on each GPU")
    parser.add_argument("--repeats", type=int, default=How.repeats, help="blocks of 10 steps")
    parser.add_argument("--compile", choices=MODES, default=How.compile_mode, help="as train.py's setting compile")
    parser.add_argument("--devices", type=int, default=1, help="GPUs; several are compared with one")
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=["ddp"], help="with several GPUs")
    parser.add_argument(
        "--out", type=Path, default=Path("results/throughput.json"), help="JSON to write, and to go on with"
    )
    arguments = parser.parse_args()
    if torch.cuda.device_count() < arguments.devices:
        raise SettingError(f"this measures {arguments.devices} GPU(s) and finds {torch.cuda.device_count()}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    models = [name for name in VARIANTS if name != "t2t_vit_tiny"] if arguments.models == ["all"] else arguments.models
    how = How(repeats=arguments.repeats, compile_mode=arguments.compile)
    cases = []
    layers = [name for name in linears(arguments.rank) if name != SPARSE]  # bench_models.py measures that
    for model, linear in product(models, layers):
        single = Case(model, linear, arguments.batch_size)
        several = arguments.strategy if arguments.devices > 1 else []
        cases.append([single, *(replace(single, devices=arguments.devices, strategy=name) for name in several)])
    here = machine() | {"precision": "bf16 autocast", "compile": how.compile_mode, "image_size": how.image_size}
    measure_all(cases, arguments.rank, how, arguments.out, here)


if __name__ == "__main__":
    run_main(main)
