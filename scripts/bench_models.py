"""How fast whole models are with STL in all linear layers against dense and 2:4, compiled, in inference and training.

    python scripts/bench_models.py --out results/models_h200.json
    python scripts/bench_models.py --models t2t_vit_14 --ranks 16 24 --backends triton

Measured as throughput.py measures, which see: images a second of inference and of a whole training step, in bf16 with
CUDA graphs. STL comes by each backend; with the kernels also with its blocks fused, in training with its MLPs, since
compiled blocks leave the rest to the compiler there. Each model is checked, logits and gradients, against its reference
in float32 before it is timed. Beside each rate stands its bound: the images a second that the counted MACs and the
numbers that must be moved, in bf16, leave to the bandwidth and the arithmetic measured in the same run. What the file
has is not measured again, and keeps its bounds: the file's ceilings are those of the last run that measured.

2:4 is the dense model pruned by magnitude, on a GPU and in inference only: its layers' weights are compressed in bf16,
which autocast could not do, and run under the same autocast as all others; cuSPARSELt searches the algorithm of each
layer. It is held against the masked model in float32. Layers whose sizes the kernels do not take, such as a head of
1000 classes, stay dense, and the row names them.
"""

from pathlib import Path

import torch
from benchmarking import SPARSE, backends_of, ceilings, check_device, machine, run_main
from command_line import command_line
from throughput import Case, How, measure_all

from models.build import check_name
from models.compiling import MODES
from stl import SettingError, get_basis
from stl.kernels import BACKENDS, use_triton

MODELS = ["t2t_vit_7", "t2t_vit_14", "deit_small_patch16_224", "deit_base_patch16_224"]


def group(model: str, ranks: list[int], backends: list[str], batch_size: int, device: str) -> list[Case]:
    """The dense model, and what is compared with it; 2:4 where there are kernels for it."""
    cases = [Case(model, linear, batch_size) for linear in ("dense", SPARSE)[: 2 if device == "cuda" else 1]]
    for rank in ranks:
        for backend in backends:
            for fused in (None, "blocks")[: 1 if backend == "torch" else 2]:  # the reference computes layer by layer
                cases.append(Case(model, f"stl t=4 r={rank}", batch_size, backend=backend, fused=fused))
    return cases


def check(models: list[str], ranks: list[int], backends: list[str], device: str) -> None:
    """Raises SettingError where one of them cannot be: here, since each model is measured in a process of its own."""
    check_device(device)
    for model in models:
        check_name(model)
    for rank in ranks:
        get_basis("frame", 4, rank)
        for backend in backends:
            use_triton(backend, torch.empty(0, device=device), 4, rank)


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names that timm knows, ours among them")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16], help="of STL, t = 4")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="as a machine with the device has them")
    parser.add_argument("--batch-size", type=int, default=256, help="images at once")
    parser.add_argument("--image-size", type=int, default=How.image_size, help="side in pixels")
    parser.add_argument("--repeats", type=int, default=How.repeats, help="blocks of 10 steps")
    parser.add_argument(
        "--compile", choices=[*MODES, "none"], default=How.compile_mode, help="as train.py's setting compile"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where it is measured")
    parser.add_argument(
        "--out", type=Path, default=Path("results/models.json"), help="JSON to write, and to go on with"
    )
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        raise SettingError(f"--batch-size {arguments.batch_size} must be 1 or more")
    backends = backends_of(arguments)
    check(arguments.models, arguments.ranks, backends, arguments.device)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    mode = None if arguments.compile == "none" else arguments.compile
    top = ceilings(arguments.device, torch.bfloat16)
    how = How(
        arguments.repeats, image_size=arguments.image_size, compile_mode=mode, device=arguments.device, ceilings=top
    )
    cases = [
        group(model, arguments.ranks, backends, arguments.batch_size, arguments.device) for model in arguments.models
    ]
    facts = {"precision": "bf16 autocast", "compile": mode, "image_size": how.image_size, "device": arguments.device}
    measure_all(cases, arguments.ranks, how, arguments.out, machine() | facts)


if __name__ == "__main__":
    run_main(main)
