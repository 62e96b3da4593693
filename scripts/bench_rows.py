"""How fast the models of a table's rows are, each alone on one GPU: a training step, inference, peak memory.

    python scripts/bench_rows.py --table vit --only 'final/*' --set data.root=/path/to/tiny-imagenet-200

Measured as throughput.py measures, with the batch of the row's recipe and its MLPs fused, as train.py trains it. Rows
that differ only in how they learn are one model and measured once. The result, results/<table>/speed.json, is what
`reproduce.py --build` puts into the table; what it has is not measured again.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarking import check_device, earlier, machine, run_main
from command_line import command_line
from hydra import compose, initialize_config_dir
from study import CONFIGS, SPEED, Row, chosen, model_settings, read_study
from throughput import SAME, Case, How, describe, measure
from torch import nn
from trained import build

from models.callbacks import write_json
from models.compiling import MODES


def configuration(words: list[str]) -> Any:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", overrides=words)


def model(words: list[str]) -> nn.Module:
    return build(configuration(words))[0]


def measure_row(row: Row, machine_words: list[str], how: How) -> dict[str, Any]:
    words = [*row.runs[0].overrides, *machine_words]
    config = configuration(words)
    # named by the first row of its model
    case = Case(config.model.name, row.folder, config.data.batch_size, fused="mlps")
    rates = measure(case, partial(model, words), replace(how, image_size=config.data.image_size))
    return {**vars(case), "settings": model_settings(row.runs[0].overrides), **rates}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--table", required=True, help="one of configs/table/, or a file like those")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION/ROW", help="patterns of rows")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of this machine, such as data.root")
    parser.add_argument("--repeats", type=int, default=How.repeats, help="blocks of 10 steps")
    parser.add_argument(
        "--compile", choices=[*MODES, "none"], default=How.compile_mode, help="as train.py's setting compile"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where it is measured")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the tables")
    arguments = parser.parse_args()
    study = read_study(arguments.table)
    asked = [row for section in chosen(study, arguments.only) for row in section.rows]
    check_device(arguments.device)
    out = arguments.results / study.name / SPEED
    mode = None if arguments.compile == "none" else arguments.compile
    here = machine() | {"precision": "bf16 autocast", "compile": mode, "device": arguments.device}
    how = How(arguments.repeats, compile_mode=mode, device=arguments.device)
    rows: list[dict[str, Any]] = (earlier(out, here, SAME) or {"models": []})["models"]
    out.parent.mkdir(parents=True, exist_ok=True)
    for row in asked:
        if model_settings(row.runs[0].overrides) in [done["settings"] for done in rows]:
            continue
        rows.append(measure_row(row, arguments.set, how))
        write_json(out, {"machine": here, "models": rows})
        print(describe(rows[-1]), flush=True)


if __name__ == "__main__":
    run_main(main)
