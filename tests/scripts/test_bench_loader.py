"""scripts/bench_loader.py on small folders; what it says of speed is not looked at."""

import json
import sys
import types
from pathlib import Path

import bench_loader
import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes of three training images and one validation image, 40 × 30 pixels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 1)):
        for name in "ab":
            folder = tmp_path / "small" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return tmp_path / "small"


def test_rows_of_a_synthesised_folder_are_written_with_what_was_done(root, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out" / "loader.json"
    words = ["--data-root", root, "--synthesise", 4, "--workers", 0, 1, "--seconds", 0.01, "--out", out]
    monkeypatch.setattr(sys, "argv", ["bench_loader.py", *map(str, words)])
    bench_loader.main()
    result = json.loads(out.read_text())
    images = result["images"]
    assert (images["number"], images["median_width"], images["median_height"]) == (4, 500, 375)
    assert images["made"] == "upscaled to 500×375, quality 90"
    rows = [(row["source"], row["split"], row["workers"]) for row in result["loader"]]
    assert rows == [("image folder", split, workers) for workers in (0, 1) for split in ("train", "val")]
    assert [row["stage"] for row in result["one_core"]][:9] == [
        "decode: PIL",
        "decode: PIL, draft of 224 or more",
        "decode: PIL, draft of half the size",
        "decode: torchvision",
        "the image's own seed",
        "transform: RandomResizedCropAndInterpolation",
        "transform: RandomHorizontalFlip",
        "transform: RandAugment",
        "transform: MaybePILToTensor",
    ]
    assert all(row["images_per_second"] > 0 for row in result["loader"] + result["one_core"])
    assert {"cpu", "cpu_cores", "date", "git_commit"} <= set(result["machine"])
    assert {"torch", "torchvision", "timm", "pillow"} <= set(result["machine"]["versions"])
    assert "image folder, train, 1 workers" in capsys.readouterr().out


def test_synthesised_images_have_the_size_and_quality_that_is_recorded(root, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "like.jpg", quality=90)
    with bench_loader.synthesised(str(root), images=100) as temporary:
        files = sorted(Path(temporary).glob("train/*/*.jpg"))
        assert len(files) == 6  # no image twice
        for file in files:
            with Image.open(file) as image, Image.open(tmp_path / "like.jpg") as like:
                assert image.size == (500, 375)
                assert image.quantization == like.quantization
        assert len(bench_loader.open_source("image folder", temporary).val_data) == 6
    assert not Path(temporary).exists()


def test_images_come_from_all_classes_alike(root):
    folder = bench_loader.open_source("image folder", str(root)).train_data
    assert [file.parent.name for file in bench_loader.spread(folder, 4)] == ["a", "a", "b", "b"]


def test_the_loader_is_counted_over_epochs_after_it_warmed_up(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(bench_loader.time, "perf_counter", lambda: next(clock))
    taken = []

    class Loader:
        def __iter__(self):
            for size in (10, 20, 30):
                taken.append(size)
                yield [0] * size, None

    # four batches of warm-up; then three, at seconds 1, 2 and 3: 20, 30 and 10
    assert bench_loader.loader_rate(Loader(), workers=1, seconds=4) == 60 / 4
    assert len(taken) == 7


def test_a_stage_is_counted_in_whole_rounds(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(bench_loader.time, "perf_counter", lambda: next(clock))
    assert bench_loader.stage_rate(lambda value: value, [1, 2, 3], seconds=5) == 4 * 3 / 5


def test_images_in_an_epoch_suffice_for_all_workers(root):
    images = bench_loader.open_source("image folder", str(root)).train_data
    assert len(bench_loader.long(images)) >= bench_loader.EPOCH


def test_the_pipeline_is_the_recipes(root):
    source = bench_loader.open_source("image folder", str(root))
    steps = {type(step).__name__: step for step in source.train_data.transform.transforms}
    assert "RandAugment" in steps
    images, _ = next(iter(source.train_dataloader()))
    assert (images.dtype, images.shape[1:]) == (torch.uint8, (3, 224, 224))


def test_shards_take_the_same_settings(monkeypatch):
    class Shards(types.SimpleNamespace):
        def setup(self):
            pass

    module = types.ModuleType("data.shards")
    module.Shards = Shards
    monkeypatch.setitem(sys.modules, "data.shards", module)
    assert vars(bench_loader.open_source("shards", "somewhere")) == {
        "root": "somewhere",
        "batch_size": 16,
        "image_size": 224,
        "crop_pct": 0.9,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "interpolation": "random",
    }


def test_draft_leaves_out_work_only_where_the_image_stays_large_enough(tmp_path):
    Image.new("RGB", (500, 375)).save(tmp_path / "photograph.jpg")
    content = (tmp_path / "photograph.jpg").read_bytes()
    assert bench_loader.decode_pil(content).size == (500, 375)
    assert bench_loader.decode_pil(content, lambda _: (224, 224)).size == (500, 375)
    assert bench_loader.decode_pil(content, lambda size: (size[0] // 2, size[1] // 2)).size == (250, 188)


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_numbers_of_workers(cores, counts):
    assert bench_loader.worker_counts(cores) == counts


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "error: there is nothing to load"), (["--shards", "x", "--synthesise", "9"], "error: --synthesise enlarges")],
)
def test_errors_of_one_line(words, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_loader.py", *words])
    with pytest.raises(SystemExit, match=message):
        bench_loader.main()
