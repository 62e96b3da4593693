"""What models cost, dense and with STL layers, counted analytically: parameters, GMACs and the three FLOP factors.

python scripts/flops.py                                   # the published T2T-ViTs; writes results/flops.{md,json}
python scripts/flops.py deit_small_patch16_224 --layers   # any timm model, a row a layer
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import timm
from command_line import command_line
from torch import nn

from models.build import build_model
from models.callbacks import write_json
from models.t2t_vit import VARIANTS
from stl import FlopReport, SettingError, STLLinear, count_flops

HEADER = ("model", "linear layers", "params M", "linear GMACs", "total GMACs", "core ×", "linear ×", "total ×")


def count(name: str, size: int | None, linear: Any) -> FlopReport:
    own = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    side = size or (own.input_size[-1] if own else 224)
    model = build_model(name, num_classes=1000, img_size=side, linear=linear)
    return count_flops(model, (3, side, side))


def row(name: str, label: str, report: FlopReport) -> str:
    factor = report.flop_factor
    cells = [name, label, f"{report.params / 1e6:.3f}", f"{report.linear / 1e9:.3f}", f"{report.total / 1e9:.3f}"]
    cells += [f"{factor[key]:.2f}" for key in ("core", "linear", "total")]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("models", nargs="*", help="names that timm knows; by default the published T2T-ViTs")
    parser.add_argument("--image-size", type=int, help="side in pixels; by default the model's own")
    parser.add_argument("--tile", type=int, default=4, help="tile size")
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 24, 32, 48], help="tensor ranks")
    parser.add_argument("--basis", default="frame", help="one of those in stl/bases/")
    parser.add_argument("--layers", action="store_true", help="print a row for every layer as well")
    parser.add_argument("--out", type=Path, help="folder for flops.md and flops.json")
    arguments = parser.parse_args()
    out = arguments.out or (None if arguments.models else Path("results"))
    names = arguments.models or [name for name in VARIANTS if name != "t2t_vit_tiny"]
    choices: dict[str, Any] = {"dense": nn.Linear}
    for rank in arguments.rank:
        settings = {"tile": arguments.tile, "rank": rank, "basis": arguments.basis}
        choices[f"stl t={arguments.tile} r={rank}"] = partial(STLLinear, **settings)
    lines = [f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}"]
    print(*lines, sep="\n")
    counted = []
    for name in names:
        for label, linear in choices.items():
            report = count(name, arguments.image_size, linear)
            lines.append(row(name, label, report))
            print(lines[-1], flush=True)
            if arguments.layers:
                print(report)
            short = {key: value for key, value in report.to_dict().items() if key != "layers"}
            counted.append({"model": name, "linear": label, **short})
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "flops.json", counted)
        (out / "flops.md").write_text("\n".join(lines) + "\n\nOne image; 1 MAC = 2 FLOPs; × is dense MACs / MACs.\n")


if __name__ == "__main__":
    try:
        main()
    except SettingError as error:
        sys.exit(f"error: {error}")
