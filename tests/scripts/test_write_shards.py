import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.image_folder import ImageFolder
from data.shards import Shards

ROOT = Path(__file__).parent.parent.parent
spec = importlib.util.spec_from_file_location("write_shards", ROOT / "scripts" / "write_shards.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two classes; 5 training images each, one of them a PNG, and 2 for validation; 24 × 20 pixels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
                image.save(folder / f"{name}.{i}{'.png' if i == 4 else '.JPEG'}")
    return tmp_path / "pets"


def run(monkeypatch, *words) -> None:
    monkeypatch.setattr(sys, "argv", ["write_shards.py", *map(str, words)])
    script.main()


def error(monkeypatch, *words) -> str:
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_and_index(tree, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    run(monkeypatch, tree, out, "--per-shard", 4)
    index = json.loads((out / "index.json").read_text())
    assert index == {
        "name": "pets",
        "classes": ["cat", "dog"],
        "train": {"shards": [f"train-{i:06d}.tar" for i in range(3)], "samples": [3, 3, 4]},
        "val": {"shards": ["val-000000.tar"], "samples": [4]},
    }
    shards = [list(members(out / name)) for name in index["train"]["shards"]]
    assert [len(names) for names in shards] == [6, 6, 8]
    found = {name: data for shard in out.glob("train-*.tar") for name, data in members(shard).items()}
    for label, name in enumerate(("cat", "dog")):
        for i in range(5):
            files = ("png", "png") if i == 4 else ("jpg", "JPEG")
            assert (
                found[f"{name}/{name}_{i}.{files[0]}"]
                == (tree / "train" / name / f"{name}.{i}.{files[1]}").read_bytes()
            )
            assert found[f"{name}/{name}_{i}.cls"] == str(label).encode()
    assert len(found) == 20
    assert list(members(out / "val-000000.tar"))[::2] == [
        "cat/cat_0.jpg",
        "cat/cat_1.jpg",
        "dog/dog_0.jpg",
        "dog/dog_1.jpg",
    ]
    assert "training images 10 in 3 shards, validation images 4 in 1 shards, 2 classes" in capsys.readouterr().out


def test_the_seed_shuffles_the_training_images_and_nothing_else_counts(tree, tmp_path, monkeypatch):
    for name, words in {"a": (), "b": ("--workers", 1), "c": ("--seed", 1)}.items():
        run(monkeypatch, tree, tmp_path / name, *words)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    orders = [[name for name in members(tmp_path / folder / "train-000000.tar") if ".cls" in name] for folder in "ac"]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) not in orders
    assert members(tmp_path / "a" / "val-000000.tar") == members(tmp_path / "c" / "val-000000.tar")
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


def test_the_data_source_reads_what_was_written(tree, tmp_path, monkeypatch):
    run(monkeypatch, tree, tmp_path / "out", "--per-shard", 3)
    sources = [Shards(root=str(tmp_path / "out"), batch_size=4), ImageFolder(root=str(tree), batch_size=4)]
    for source in sources:
        source.setup()
    assert (sources[0].name, sources[0].num_classes) == ("pets", 2)
    shards, folder = (list(source.val_dataloader()) for source in sources)
    assert all(torch.equal(ours[0], theirs[0]) for ours, theirs in zip(shards, folder, strict=True))
    assert [labels.tolist() for _, labels in shards] == [labels.tolist() for _, labels in folder]
    assert len(list(sources[0].train_dataloader())) == 2


def test_it_goes_on_where_it_was_stopped(tree, tmp_path, monkeypatch):
    run(monkeypatch, tree, tmp_path / "whole", "--per-shard", 2)
    out, write, done = tmp_path / "out", script.write_shard, []

    def write_some(path, items, resize):
        if path.name == "train-000003.tar" and not path.with_suffix(".tmp").exists():
            path.with_suffix(".tmp").write_bytes(b"half")
            raise OSError("no space left")
        write(path, items, resize)
        done.append(path.name)

    words = (tree, out, "--per-shard", 2, "--workers", 1)
    monkeypatch.setattr(script, "write_shard", write_some)
    assert error(monkeypatch, *words) == "error: no space left"
    assert sorted(path.name for path in out.glob("*.tar")) == done
    assert 3 <= len(done) < 7  # of 5 and 2 shards; those that waited were not begun any more
    assert not (out / "index.json").exists()
    run(monkeypatch, *words)
    assert len(done) == len(set(done)) == 7
    assert contents(out) == contents(tmp_path / "whole")


def test_a_file_that_cannot_be_read_leaves_no_shard(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "encoded", lambda file, resize: file.with_suffix(".gone").read_bytes())
    assert "No such file or directory" in error(monkeypatch, tree, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_resize(tree, tmp_path, monkeypatch):
    broken = tree / "val" / "cat" / "cat.0.JPEG"
    broken.write_bytes(b"no image")
    Image.new("RGB", (40, 8)).save(tree / "val" / "cat" / "cat.1.JPEG")
    Image.new("L", (30, 90)).save(tree / "val" / "dog" / "dog.0.JPEG")
    Image.new("RGBA", (11, 12)).save(tree / "val" / "dog" / "z.png")
    run(monkeypatch, tree, tmp_path / "out", "--resize", 10)
    files = {name: data for name, data in members(tmp_path / "out" / "val-000000.tar").items() if ".cls" not in name}
    assert files.pop("cat/cat_0.jpg") == b"no image"
    assert files["cat/cat_1.jpg"] == (tree / "val" / "cat" / "cat.1.JPEG").read_bytes()
    images = {name: Image.open(io.BytesIO(data)) for name, data in files.items()}
    assert {name: (image.size, image.mode, image.format) for name, image in images.items()} == {
        "cat/cat_1.jpg": ((40, 8), "RGB", "JPEG"),
        "dog/dog_0.jpg": ((10, 30), "RGB", "JPEG"),
        "dog/dog_1.jpg": ((12, 10), "RGB", "JPEG"),
        "dog/z.jpg": ((10, 11), "RGB", "JPEG"),
    }


def test_a_folder_with_anything_else(tree, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(monkeypatch, tree, out)
    before = contents(out)
    assert error(monkeypatch, tree, out, "--seed", 3, "--resize", 5) == (
        f"error: {str(out)!r} holds shards that were begun otherwise: seed was 0, is 3; resize was None, is 5; "
        "make them agree to go on, or give another folder"
    )
    (tree / "train" / "cat" / "cat.0.JPEG").unlink()
    assert "the checksum of the file names was " in error(monkeypatch, tree, out)
    assert contents(out) == before
    assert error(monkeypatch, tree, tree) == (
        f"error: {str(tree)!r} is not empty, and not by this program; give another folder"
    )


def test_two_images_with_one_key(tree, tmp_path, monkeypatch):
    (tree / "train" / "cat" / "cat_1.png").write_bytes(b"")
    message = error(monkeypatch, tree, tmp_path / "out")
    assert message.startswith("error: several images would have the key 'cat/cat_1': ")
    assert "cat.1.JPEG" in message


def test_no_tree(tmp_path, monkeypatch):
    assert error(monkeypatch, tmp_path / "gone", tmp_path / "out").startswith(
        f"error: data.root={str(tmp_path / 'gone')!r} does not exist: expected <root>/train/<class>/*.jpg"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["a"], "expected SRC and OUT, or OUT alone with --index-train and --index-val"),
        (["a", "b", "--index-train", "x", "--index-val", "y"], "expected SRC and OUT, or OUT alone"),
        (["a", "--index-train", "x"], "--index-train and --index-val belong together"),
        (["a", "b", "--per-shard", "0"], "--per-shard must be at least 1"),
    ],
)
def test_words_that_make_no_sense(words, complaint, monkeypatch, capsys):
    error(monkeypatch, *words)
    assert complaint in capsys.readouterr().err


# --- shards that there are ---------------------------------------------------------------------------------------


def test_an_index_of_shards_beside_it(tree, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(monkeypatch, tree, out, "--per-shard", 4)
    written = json.loads((out / "index.json").read_text())
    (out / "index.json").unlink()
    run(
        monkeypatch, out, "--index-train", f"{out}/train-{{000000..000002}}.tar", "--index-val", f"{out}/val-000000.tar"
    )
    assert json.loads((out / "index.json").read_text()) == {**written, "name": "out", "classes": ["0", "1"]}


def test_an_index_of_shards_elsewhere(tree, tmp_path, monkeypatch):
    run(monkeypatch, tree, tmp_path / "theirs")
    train, val = tmp_path / "theirs" / "train-000000.tar", tmp_path / "theirs" / "val-000000.tar"
    run(monkeypatch, tmp_path / "ours", "--index-train", f"pipe:cat {train}", train, "--index-val", val)
    index = json.loads((tmp_path / "ours" / "index.json").read_text())
    assert index["train"] == {"shards": [f"pipe:cat {train}", str(train)], "samples": [10, 10]}
    assert index["val"] == {"shards": [str(val)], "samples": [4]}
    source = Shards(root=str(tmp_path / "ours"), batch_size=20)
    source.setup()
    assert [labels.bincount().tolist() for _, labels in source.train_dataloader()] == [[10, 10]]


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("pipe:exit 3", "cannot be read, at image 1: its command ended with exit code 3"),
        ("nowhere.tar", "cannot be read, at image 1: No such file or directory"),
        ("pipe:head -c 10240 /dev/zero", "holds no <key>.jpg with a <key>.cls beside it"),
    ],
)
def test_a_shard_that_cannot_be_indexed(tmp_path, monkeypatch, url, complaint):
    assert error(monkeypatch, tmp_path / "out", "--index-train", url, "--index-val", url) == (
        f"error: the shard {url} {complaint}"
    )
    assert not (tmp_path / "out").exists()
