"""scripts/cost.py: the arithmetic, by hand, and what it says of numbers that were not measured."""

import json
import sys
from pathlib import Path

import cost
import pytest

ROOT = Path(__file__).parent.parent.parent
MACHINE = {"gpu": "GPU X", "date": "2026-01-02T00:00:00", "git_commit": "0123456789abcdef", "versions": {"torch": "2"}}
LOADER = {
    "machine": {**MACHINE, "gpu": None, "cpu": "CPU Y"},
    "images": {"made": "upscaled"},
    "loader": [
        {"source": "image folder", "split": split, "workers": workers, "images_per_second": rate}
        | {"images_per_second_per_core": rate / workers}
        for split, workers, rate in (("train", 1, 100), ("train", 4, 320), ("val", 4, 1000))
    ],
}


def measured(linear="dense", batch_size=256, devices=1, training=1000.0, **more) -> dict:
    row = {"model": "t2t_vit_7", "linear": linear, "batch_size": batch_size, "training_images_per_second": training}
    if devices > 1:
        return row | {"devices": devices, "scaling_efficiency": training / devices / 1000, **more}
    return row | {"inference_images_per_second": 5000.0, **more}


ROW = cost.Row("t2t_vit_7", "dense", epochs=310, batch_size=512)
HOURS = 310 * (1_281_167 / 1000 + 50_000 / 5000) / 3600  # on one GPU


@pytest.fixture(scope="module")
def rows() -> list[cost.Row]:
    return cost.paper_rows()


def test_the_rows_are_those_of_the_experiments(rows):
    files = {file.stem for file in (ROOT / "configs/experiment/imagenet").glob("*.yaml")} - {"recipe"}
    assert {f"{row.model}_{row.linear.split()[0]}" for row in rows} == files
    assert len(rows) == len(files)
    assert rows[:2] == [ROW, ROW._replace(linear="stl t=4 r=24")]
    assert [row.model for row in rows[::2]][:4] == ["t2t_vit_7", "t2t_vit_10", "t2t_vit_12", "t2t_vit_14"]


def test_linear_layers_measured_beside_those_of_a_row_follow_it(rows):
    more = cost.with_measured(rows, [measured(), measured("stl t=4 r=16"), {**measured(), "model": "other"}])
    assert more[:4] == [*rows[:2], ROW._replace(linear="stl t=4 r=16"), rows[2]]
    assert len(more) == len(rows) + 1


def test_one_gpu():
    entry = cost.cost(ROW, 1, [measured()], efficiency=0.5, price=3.0)
    assert entry["hours"] == pytest.approx(HOURS)
    assert entry["gpu_hours"] == pytest.approx(HOURS)
    assert entry["dollars"] == pytest.approx(3 * HOURS)
    assert (entry["training_images_per_second"], entry["efficiency_source"]) == (1000, "measured")


def test_several_gpus_with_the_efficiency_that_is_assumed():
    entry = cost.cost(ROW, 8, [measured(), measured(devices=2, training=1900.0)], efficiency=0.5, price=3.0)
    assert entry["hours"] == pytest.approx(310 * (1_281_167 / 4000 + 50_000 / 40_000) / 3600)
    assert entry["gpu_hours"] == pytest.approx(8 * entry["hours"])
    assert (entry["scaling_efficiency"], entry["efficiency_source"]) == (0.5, "assumed")


def test_several_gpus_that_were_measured():
    entry = cost.cost(ROW, 2, [measured(), measured(devices=2, training=1900.0)], efficiency=0.5, price=3.0)
    assert entry["hours"] == pytest.approx(310 * (1_281_167 / 1900 + 50_000 / 10_000) / 3600)
    assert (entry["scaling_efficiency"], entry["efficiency_source"]) == (0.95, "measured")


def test_the_measurement_nearest_to_the_recipes_batch_is_taken():
    many = [measured(batch_size=size, training=1000.0 + size) for size in (64, 256, 512, 1024)]
    assert cost.find(many, ROW, 1)["batch_size"] == 512
    two = [measured(batch_size=size, devices=2, training=rate) for size, rate in ((64, 9), (256, 7), (256, 8))]
    assert cost.find(two, ROW, 2)["training_images_per_second"] == 8
    assert cost.find(many, ROW, 2) is None


def test_a_row_without_a_measurement_has_no_numbers():
    assert cost.cost(ROW._replace(model="t2t_vit_24"), 8, [measured()], 1.0, 3.0) == {
        **ROW._replace(model="t2t_vit_24")._asdict(),
        "gpus": 8,
    }


def run(monkeypatch, tmp_path, *words, models=None):
    (tmp_path / "throughput.json").write_text(json.dumps({"machine": MACHINE, "models": models or [measured()]}))
    (tmp_path / "loader.json").write_text(json.dumps(LOADER))
    monkeypatch.setattr(cost, "paper_rows", lambda: [ROW, ROW._replace(model="t2t_vit_10")])
    monkeypatch.setattr(sys, "argv", ["cost.py", str(tmp_path / "throughput.json"), *map(str, words)])
    cost.main()


def test_the_sheet(tmp_path, monkeypatch, capsys):
    out = tmp_path / "sub" / "cost.json"
    run(monkeypatch, tmp_path, "--price", 2, "--loader", tmp_path / "loader.json", "--out", out)
    text = capsys.readouterr().out
    assert "| t2t_vit_7 | dense | 1 | 512 | 256 | 1,000 | – | 111.2 | 111.2 | 222 | 13 |" in text
    assert "| t2t_vit_7 | dense | 8 | 64 | 256 | 8,000 | 1.00 assumed | 13.9 | 111.2 | 222 | 100 |" in text
    assert "| t2t_vit_7 | dense | 64 | 8 | 256 | 64,000 | 1.00 assumed | 1.7 | 111.2 | 222 | 800 |" in text
    assert text.count("| t2t_vit_10 | dense | not run | – |") == text.count("not run") == 1
    assert "| t2t_vit_7 | dense | 1,000 | 320 | 0.32 | 13 |" in text
    assert "A scaling efficiency of 1 (ideal scaling) is assumed" in text
    assert "310 epochs of 1,281,167 images, each with 50,000 validation images; $2 a GPU-hour" in text
    assert "GPU X, 2026-01-02, commit 0123456789ab, torch 2" in text
    assert "image folder upscaled, 4 workers, 80 images/s a core; CPU Y" in text
    assert "Rates measured with more images a GPU than" in text
    written = json.loads(out.read_text())
    assert [(row["model"], row["gpus"], row.get("loader_cores")) for row in written["rows"]] == [
        *(("t2t_vit_7", gpus, cores) for gpus, cores in ((1, 13), (8, 100), (64, 800))),
        *(("t2t_vit_10", gpus, None) for gpus in (1, 8, 64)),
    ]


def test_nothing_is_assumed_or_warned_of_where_all_was_measured(tmp_path, monkeypatch, capsys):
    models = [measured(batch_size=512), measured(batch_size=256, devices=2, training=1900.0)]
    run(monkeypatch, tmp_path, "--price", 2, "--gpus", 1, 2, models=models)
    text = capsys.readouterr().out
    assert "| t2t_vit_7 | dense | 2 | 256 | 256 | 1,900 | 0.95 measured | " in text
    assert "assumed" not in text
    assert "Rates measured with more" not in text
    assert "loader images/s" not in text


def test_another_efficiency_is_named(tmp_path, monkeypatch, capsys):
    run(monkeypatch, tmp_path, "--price", 2, "--efficiency", 0.9)
    assert "A scaling efficiency of 0.9 is assumed" in capsys.readouterr().out


def test_what_was_measured_and_is_wrong_counts_as_not_run(tmp_path, monkeypatch, capsys):
    wrong = {"model": "t2t_vit_7", "linear": "dense", "batch_size": 256, "error": 1.0}
    run(monkeypatch, tmp_path, "--price", 2, "--loader", tmp_path / "loader.json", models=[wrong])
    assert "| t2t_vit_7 | dense | not run | –" in capsys.readouterr().out


def test_the_price_has_no_default(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, tmp_path)
    assert "--price" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--price", "-1"], ["--price", "1", "--efficiency", "1.5"]])
def test_out_of_range(words, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="error: --price must be 0 or more dollars, --efficiency above 0"):
        run(monkeypatch, tmp_path, *words)


def test_a_missing_file(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"error: .*gone.json.*; give a file that throughput.py"):
        run(monkeypatch, tmp_path, "--price", 1, "--loader", tmp_path / "gone.json")


@pytest.mark.parametrize("loader", ["throughput.json", "other.json"])
def test_a_file_of_another_program(loader, tmp_path, monkeypatch):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit, match=r"error: there is no .loader. in it; give a file that throughput.py"):
        run(monkeypatch, tmp_path, "--price", 1, "--loader", tmp_path / loader)
