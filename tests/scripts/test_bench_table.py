"""scripts/bench_table.py: tables and plot of files written by hand."""

import json
import re
import sys
from pathlib import Path

import bench_table
import matplotlib.image
import pytest

MACHINE = {
    "gpu": "GPU X",
    "driver": "580",
    "cpu": None,
    "date": "2026-01-02T00:00:00",
    "git_commit": "0123456789abcdef",
}
MACHINE |= {"versions": {"python": "3", "torch": "2"}, "dtype": "bfloat16"}


def row(method, seconds=None, bound=None, **more):
    times = {} if seconds is None else {"seconds": seconds}
    return {"method": method, "bound_seconds": bound or 1e-3, "error": 0.1, **times, **more}


OPS = {
    "machine": MACHINE,
    "pass": "forward",
    "rows": [
        {**sizes, **entry}
        for sizes, entries in (
            ({"n": 8, "k": 4, "m": 16}, [row("dense", 4e-3, 2e-3), row("stl r=16, auto", 2e-3, 1e-3, rank=16)]),
            ({"n": 8, "k": 8, "m": 8}, [row("dense", 6e-3, 3e-3), row("2:4, cuSPARSELt", 5e-3, 3e-3)]),
            ({"n": 8, "k": 8, "m": 8}, [row("stl r=16, auto", rank=16), row("stl r=24, auto", 3e-3, 2e-3, rank=24)]),
        )
        for entry in entries
    ],
}
MLP = {"block": "mlp", "samples": 2, "tokens": 5, "width": 8, "hidden": 12}
MIB = 2**20
BLOCKS = {
    "machine": MACHINE,
    "rows": [
        MLP | {"pass": which} | entry
        for which in ("inference", "training")
        for entry in (
            row("dense", 4e-3, peak_bytes=10 * MIB),
            row("dense, compiled", 2e-3, peak_bytes=9 * MIB),
            row("stl r=16, triton", 1e-3, 5e-4, rank=16, peak_bytes=13 * MIB, encoded_bytes=4 * MIB),
        )
    ],
}


def model(linear, rate=None, **more):
    rates = {} if rate is None else {"inference_images_per_second": rate, "training_images_per_second": rate / 10}
    return {"model": "t2t_vit_7", "linear": linear, "backend": "auto", "fused": None, **rates, **more}


STL = "stl t=4 r=16"
MODELS = {
    "machine": MACHINE | {"precision": "bf16 autocast"},
    "models": [
        model("dense", 40000.0),
        model("dense", 99999.0, devices=2),
        model(STL, 50000.0, backend="triton"),
        model(STL, backend="triton", fused="blocks"),
        model("dense", 100.0) | {"model": "t2t_vit_14"},
    ],
}


def run(monkeypatch, tmp_path, capsys, *results, words=()):
    monkeypatch.chdir(tmp_path)
    names = [f"file{index}.json" for index in range(len(results))]
    for name, result in zip(names, results, strict=True):
        Path(name).write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["bench_table.py", *names, *words])
    bench_table.main()
    return capsys.readouterr().out


def test_layers(monkeypatch, tmp_path, capsys):
    table, source = run(monkeypatch, tmp_path, capsys, OPS).strip().split("\n\n")
    assert table.splitlines() == [
        "| linear layer, forward: n, k, m | dense | stl r=16, auto | 2:4, cuSPARSELt | stl r=24, auto |",
        "|---|---|---|---|---|",
        "| 8, 4, 16 | 4 ms | 2.00 (4.00) | not run | not run |",
        "| 8, 8, 8 | 6 ms | wrong | 1.20 (2.00) | 2.00 (3.00) |",
    ]
    assert source == (
        "<sub>[file0.json](file0.json) by `scripts/bench_ops.py`, bfloat16; GPU X, driver 580, 2026-01-02, "
        "commit 0123456789ab, python 3, torch 2.</sub>"
    )


def test_below_layers_stands_what_one_pass_after_the_other_allows(monkeypatch, tmp_path, capsys):
    """By hand: n = k = m = 8 in tiles of 4, r = 16, bf16, one byte a second, products for nothing."""
    sizes, encoded = {"n": 8, "k": 8, "m": 8}, 2 * 2 * 16 * 2
    stl = row("stl r=16, triton", 1280.0, tile=4, rank=16, encoded_bytes=encoded)
    ops = {"machine": MACHINE, "pass": "forward", "rows": [sizes | row("dense", 2048.0), sizes | stl]}
    ops |= {"ceilings": {"bytes_per_second": 1.0, "flops_per_second": 1e12}}
    # bytes: x 128 and its encoding 128; that, the weight 128 and their product 128; that and y 128: 896 in all
    text = run(monkeypatch, tmp_path, capsys, ops)
    assert "| one pass after the other, at most | stl r=16, triton |\n|---|---|\n| 8, 8, 8 | 2.29 (70%) |" in text
    assert "one pass" not in run(monkeypatch, tmp_path, capsys, ops | {"eager": True})
    ops["ceilings"]["flops_per_second"] = 2 * 2 * 2 * 2 * 16 / 640  # the GEMMs take 640 seconds
    assert "| 8, 8, 8 | 1.78 (90%) |" in run(monkeypatch, tmp_path, capsys, ops)


def test_layers_of_other_tiles_say_so(monkeypatch, tmp_path, capsys):
    rows = [row | {"tile": 8} if row["method"].startswith("stl") else row for row in OPS["rows"]]
    table = run(monkeypatch, tmp_path, capsys, OPS | {"rows": rows})
    assert table.startswith("| linear layer, forward, t = 8: n, k, m | dense |")


def test_blocks_are_compared_with_the_compiled_block_and_memory_with_the_dense_one(monkeypatch, tmp_path, capsys):
    inference, training, memory, _ = run(monkeypatch, tmp_path, capsys, BLOCKS).strip().split("\n\n")
    for table, which in ((inference, "inference"), (training, "training")):
        assert table.splitlines()[::2] == [
            f"| MLP, {which}: samples, tokens, width, hidden | dense | dense, compiled | stl r=16, triton |",
            "| 2, 5, 8, 12 | 0.50 (2.00) | 2 ms | 2.00 (4.00) |",
        ]
    assert memory.splitlines()[-1] == "| 2, 5, 8, 12 | 10 | 9 | 13 (+3 of 4) |"


def test_models(monkeypatch, tmp_path, capsys):
    inference, training, source = run(monkeypatch, tmp_path, capsys, MODELS).strip().split("\n\n")
    assert inference.splitlines() == [
        "| inference, images a second: model | dense | stl r=16, triton | stl r=16, triton, blocks fused |",
        "|---|---|---|---|",
        "| t2t_vit_7 | 40,000 | 1.25 | wrong |",
        "| t2t_vit_14 | 100 | not run | not run |",
    ]
    assert training.splitlines()[2] == "| t2t_vit_7 | 4,000 | 1.25 | wrong |"
    assert "`scripts/bench_models.py`, bfloat16, bf16 autocast; GPU X" in source


def test_language_models_are_compared_with_the_compiled_model(monkeypatch, tmp_path, capsys):
    facts = {"model": "llama_small", "phase": "prefill", "batch": 2, "tokens": 16}
    stl = row("stl t=4 r=16 over tokens, triton", 1e-3, 5e-4, rank=16)
    rows = [facts | entry for entry in (row("dense", 4e-3), row("dense, compiled", 2e-3), stl)]
    text = run(monkeypatch, tmp_path, capsys, {"machine": MACHINE, "rows": rows})
    table, source = text.strip().split("\n\n")
    assert table.splitlines()[::2] == [
        "| prefill: model, sequences × tokens | dense | dense, compiled | stl r=16 over tokens, triton |",
        "| llama_small, 2 × 8 | 0.50 (2.00) | 2 ms | 2.00 (4.00) |",
    ]
    assert "`scripts/bench_llm.py`" in source


@pytest.mark.parametrize("apart", [True, False])
def test_merged_models_are_compared_with_a_merged_one_where_there_is_no_other(monkeypatch, tmp_path, capsys, apart):
    facts = {"model": "llama_small", "phase": "prefill", "batch": 2, "tokens": 16}
    rows = [row("dense, merged", 8e-3), row("dense, merged, compiled", 4e-3), row("2:4, merged", 2e-3)]
    rows += [row("dense", 2e-3)] if apart else []
    text = run(monkeypatch, tmp_path, capsys, {"machine": MACHINE, "rows": [facts | entry for entry in rows]})
    cells = "0.25 (2.00) | 0.50 (2.00) | 1.00 (2.00) | 2 ms" if apart else "0.50 (4.00) | 4 ms | 2.00 (4.00)"
    assert f"| llama_small, 2 × 8 | {cells} |" in text


def bounded(linear, rate, inference, training, **more):
    bounds = {"inference_bound_images_per_second": inference, "training_bound_images_per_second": training}
    return model(linear, rate, **bounds, **more)


def test_models_with_bounds_and_2_4(monkeypatch, tmp_path, capsys):
    sparse = {"inference_images_per_second": 30000.0, "inference_bound_images_per_second": 160000.0}
    rows = [
        bounded("dense", 40000.0, 80000.0, 6000.0),
        model("2:4", left_dense=["attention1.kqv", "head"]) | sparse,
        bounded(STL, 50000.0, 200000.0, 24000.0, backend="triton"),
        model("dense", 100.0) | {"model": "t2t_vit_14"},
        model("2:4", refused="no such sizes") | {"model": "t2t_vit_14"},
    ]
    text = run(monkeypatch, tmp_path, capsys, MODELS | {"models": rows, "ceilings": {}})
    inference, note, training, _ = text.strip().split("\n\n")
    assert inference.splitlines() == [
        "| inference, images a second: model | dense | 2:4 | stl r=16, triton |",
        "|---|---|---|---|",
        "| t2t_vit_7 | 40,000 (2.00) | 0.75 (4.00) | 1.25 (5.00) |",
        "| t2t_vit_14 | 100 | refused | not run |",
    ]
    assert note == "2:4 leaves dense what its kernels do not take: t2t_vit_7: attention1.kqv, head."
    assert training.splitlines() == [
        "| training, images a second: model | dense | stl r=16, triton |",
        "|---|---|---|",
        "| t2t_vit_7 | 4,000 (1.50) | 1.25 (6.00) |",
        "| t2t_vit_14 | 10 | not run |",
    ]


def test_blocks_that_are_refused(monkeypatch, tmp_path, capsys):
    refused = {"method": "2:4", "macs": 1, "refused": "no such sizes"}
    rows = [MLP | {"pass": "training"} | entry for entry in (row("dense", 4e-3, peak_bytes=MIB), refused)]
    speed, memory, _ = run(monkeypatch, tmp_path, capsys, BLOCKS | {"rows": rows}).strip().split("\n\n")
    assert speed.splitlines()[-1] == "| 2, 5, 8, 12 | 4 ms | refused |"
    assert memory.splitlines()[-1] == "| 2, 5, 8, 12 | 1 | refused |"


def test_a_wrong_yardstick_leaves_nothing_to_compare_with(monkeypatch, tmp_path, capsys):
    shape = {"n": 8, "k": 4, "m": 4}
    rows = [shape | row("dense"), shape | row("stl r=16, auto", 2e-3, rank=16)]
    text = run(monkeypatch, tmp_path, capsys, OPS | {"rows": rows})
    assert "| 8, 4, 4 | wrong | dense wrong |" in text


def test_the_curves_are_those_of_the_fastest_and_leave_out_what_is_wrong():
    rows = OPS["rows"] + [{"n": 8, "k": 4, "m": 16, **row("stl r=16, triton", 1e-3, 5e-4, rank=16)}]
    (group,) = bench_table._groups(OPS | {"rows": rows})
    assert bench_table.curves(group, 16) == ([(8.0, 4.0)], [(8.0, 8.0)])
    assert bench_table.curves(group, 24) == ([(8.0, 2.0)], [(8.0, 3.0)])


def test_the_plot(monkeypatch, tmp_path, capsys):
    path = tmp_path / "folder" / "speed.png"
    run(monkeypatch, tmp_path, capsys, OPS, BLOCKS, MODELS, words=["--plot", str(path)])
    height, width, _ = matplotlib.image.imread(path).shape
    assert width > 2 * height  # three panels: layers, MLP in inference and in training
    with pytest.raises(SystemExit, match=r"^error: --plot needs rows of bench_ops.py [^\n]*timed$"):
        run(monkeypatch, tmp_path, capsys, MODELS, words=["--plot", str(path)])


@pytest.mark.parametrize("text", [None, "{", "[]", '{"rows": [{"n": 1}]}', '{"rows": []}'])
def test_other_files_are_one_line(text, tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["bench_table.py", str(path)])
    with pytest.raises(SystemExit, match=r"^error: [^\n]*file.json: [^\n]*; give files of bench_ops.py, [^\n]*$"):
        bench_table.main()


# --- what is committed ---------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
TABLES = (ROOT / "results/speed_h200.md").read_text()


@pytest.fixture
def tables(monkeypatch, capsys):
    def of(*files):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["bench_table.py", *map(str, files)])
        bench_table.main()
        return capsys.readouterr().out

    return of


def test_the_tables_beside_the_results_are_what_the_files_say(tables):
    assert tables(*re.findall(r"^<sub>\[([^]]+)\]", TABLES, re.MULTILINE)) == TABLES


def cells(text: str) -> list[tuple[tuple[str, str, str], str]]:
    """What stands in tables, each with its place: the corner of its table, its row and its column."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        (corner, *columns), _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines())
        found += [((corner, row, name), cell) for row, *of in rows for name, cell in zip(columns, of, strict=True)]
    return found


def test_the_tables_in_the_readme_are_of_them(tables):
    known = cells(TABLES + tables("results/ops_cpu.json"))
    corners = {corner for (corner, _, _), _ in known}
    quoted = [(place, cell) for place, cell in cells((ROOT / "README.md").read_text()) if place[0] in corners]
    assert len({corner for (corner, _, _), _ in quoted}) == 4  # MLPs, models in inference and in training, layers
    assert set(quoted) <= set(known)
