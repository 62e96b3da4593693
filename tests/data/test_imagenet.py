"""ImageNet from miniature archives in the layout of ILSVRC 2012."""

import hashlib
import io
import logging
import multiprocessing
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import imagenet as reader

from data import imagenet, locks
from data.imagenet import ARCHIVES, ImageNet, unpack
from stl.errors import SettingError

CONFIGS = Path(__file__).parents[2] / "configs"
# ILSVRC ids count from 1 in an order that is not the sorted one; the last two synsets are parents, not classes.
SYNSETS = [("n03", "c, cc", 0), ("n01", "a", 0), ("n02", "b, bb", 0), ("n10", "parent", 2), ("n11", "parent", 2)]
VAL_IDS = [3, 1, 2, 1, 3, 2]  # n02 n03 n01 n03 n02 n01


def jpeg(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 20), (shade, shade, shade)).save(file, "JPEG")
    return file.getvalue()


def tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def tarred(folder: Path, members: dict[str, bytes]) -> bytes:
    path = folder / "inner.tar"
    tar(path, members)
    content = path.read_bytes()
    path.unlink()
    return content


def register(monkeypatch, root: Path) -> None:
    """Make the miniature archives the original ones, as far as torchvision's check of their md5 goes."""
    for split, file in ARCHIVES.items():
        md5 = hashlib.md5((root / file).read_bytes()).hexdigest()
        monkeypatch.setitem(reader.ARCHIVE_META, split, (file, md5))


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """The three archives: three classes, two training images each, and six validation images in one flat tar."""
    root = tmp_path / "imagenet"
    root.mkdir()
    classes = [wnid for wnid, _, children in SYNSETS if not children]
    inner = {f"{wnid}.tar": tarred(tmp_path, {f"{wnid}_{i}.JPEG": jpeg(10 * i) for i in range(2)}) for wnid in classes}
    tar(root / ARCHIVES["train"], inner)
    tar(
        root / ARCHIVES["val"],
        {f"ILSVRC2012_val_{i + 1:08}.JPEG": jpeg(40 * i) for i in reversed(range(len(VAL_IDS)))},
    )
    fields = [("ILSVRC2012_ID", "i4"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "i4")]
    synsets = np.array([(i + 1, *synset[:2], "gloss", synset[2]) for i, synset in enumerate(SYNSETS)], dtype=fields)
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets.reshape(-1, 1)})
    truth = "".join(f"{number}\n" for number in VAL_IDS).encode()
    data = "ILSVRC2012_devkit_t12/data"
    tar(
        root / ARCHIVES["devkit"],
        {f"{data}/meta.mat": meta.getvalue(), f"{data}/ILSVRC2012_validation_ground_truth.txt": truth},
        "w:gz",
    )
    register(monkeypatch, root)
    return root


def files(root: Path, split: str) -> dict[str, list[str]]:
    return {folder.name: sorted(file.name for file in folder.iterdir()) for folder in sorted((root / split).iterdir())}


def complaint(root: Path) -> str:
    with pytest.raises(SettingError) as caught:
        ImageNet(root=str(root))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_archives_become_the_tree_and_stay(root, caplog):
    caplog.set_level(logging.INFO, "data.imagenet")
    source = ImageNet(root=str(root), image_size=16, batch_size=2)
    assert files(root, "train") == {f"n0{i}": [f"n0{i}_0.JPEG", f"n0{i}_1.JPEG"] for i in (1, 2, 3)}
    val = {
        f"n0{k}": [
            f"ILSVRC2012_val_{i + 1:08}.JPEG" for i, number in enumerate(VAL_IDS) if SYNSETS[number - 1][0] == f"n0{k}"
        ]
        for k in (1, 2, 3)
    }
    assert files(root, "val") == val
    source.setup()
    assert source.train_data.classes == source.val_data.classes == ["n01", "n02", "n03"]
    assert [images.shape for images, _ in source.train_dataloader()] == [(2, 3, 16, 16)] * 3
    assert (source.name, source.num_classes) == ("imagenet", 3)
    assert all((root / file).is_file() for file in ARCHIVES.values())
    assert not list(root.glob("*.part"))
    text = caplog.text
    for words in (
        "unpacking .*ILSVRC2012_img_train.tar, 0.0 GB",
        "unpacking .*img_val.tar",
        "unpacked .*train in ",
        "unpacked .*val in ",
    ):
        assert re.search(words, text)


def test_a_tree_is_used_as_it_is_and_another_number_of_classes_warned_of(root, caplog):
    unpack(root)
    for file in ARCHIVES.values():
        (root / file).unlink()
    stamp = (root / "train").stat().st_mtime_ns
    ImageNet(root=str(root))
    assert (root / "train").stat().st_mtime_ns == stamp
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == [
        f"data.root={str(root)!r} holds 3 classes; ImageNet-1K has 1,000"
    ]


def test_no_warning_for_as_many_classes_as_imagenet(root, caplog, monkeypatch):
    monkeypatch.setattr(imagenet, "CLASSES", 3)
    ImageNet(root=str(root))
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]


def test_interrupted_unpacking_begins_again(root, monkeypatch):
    def interrupted(root: Path, **options) -> None:
        reader.parse_val_archive(root, **options)
        (root / "val.part" / "n01" / "left over.JPEG").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(imagenet, "parse_val_archive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unpack(root)
    assert [(root / name).is_dir() for name in ("train", "val", "val.part")] == [False, False, True]
    (root / "meta.bin").write_bytes(b"half")
    monkeypatch.undo()
    register(monkeypatch, root)
    unpack(root)
    assert sum(map(len, files(root, "val").values())) == len(VAL_IDS)
    assert not (root / "val.part").exists()


def _unpack(root: Path, meta: dict, calls) -> None:
    def counted(root: Path, **options) -> None:
        calls.put(1)
        reader.parse_train_archive(root, **options)

    reader.ARCHIVE_META.update(meta)
    imagenet.parse_train_archive = counted
    unpack(root)
    assert (root / "val").is_dir()


def test_of_several_processes_one_unpacks_and_the_others_wait(root):
    context = multiprocessing.get_context("fork")
    calls = context.Queue()
    processes = [context.Process(target=_unpack, args=(root, dict(reader.ARCHIVE_META), calls)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert calls.get(timeout=10) == 1
    assert calls.empty()


def test_waits_for_the_holder_of_the_lock_and_then_finds_the_work_done(root, monkeypatch):
    holder = locks.FileLock(root / ".unpack.lock")
    holder.acquire()

    def finish(message: str, *values) -> None:  # the holder's work ends when the waiting is announced
        assert (message % values).startswith("another process unpacks")
        for split in ("train", "val"):
            (root / split).mkdir()
        holder.release()

    monkeypatch.setattr(locks.log, "info", finish)
    unpack(root)
    assert not files(root, "train")


@pytest.mark.parametrize("split", ["train", "val", "devkit"])
def test_a_damaged_archive(root, split):
    file = root / ARCHIVES[split]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    message = complaint(root)
    assert message.startswith(f"data.root={str(root)!r} could not be unpacked (The archive {ARCHIVES[split]} is not ")
    assert "corrupted" in message
    assert message.endswith("repair the cause and start again, or set data.root to a folder with train/ and val/")


EXPECTED = (
    "expected train/<class>/*.JPEG and val/<class>/*.JPEG, or the original archives ILSVRC2012_img_train.tar, "
    "ILSVRC2012_img_val.tar, ILSVRC2012_devkit_t12.tar.gz; put them there or set data.root to another folder"
)


def test_an_archive_is_missed_before_the_long_work_begins(root):
    (root / ARCHIVES["devkit"]).unlink()
    assert complaint(root) == (
        f"data.root={str(root)!r} lacks train/ and val/, and to unpack them from {ARCHIVES['devkit']}: {EXPECTED}"
    )
    assert not (root / "train.part").exists()
    (root / "train").mkdir()
    (root / ARCHIVES["val"]).unlink()
    assert complaint(root) == (
        f"data.root={str(root)!r} lacks val/, and to unpack it from {ARCHIVES['val']}, {ARCHIVES['devkit']}: {EXPECTED}"
    )


def test_no_folder(tmp_path):
    gone, file = tmp_path / "gone", tmp_path / "file"
    file.touch()
    assert complaint(gone) == f"data.root={str(gone)!r} does not exist: {EXPECTED}"
    assert complaint(file) == f"data.root={str(file)!r} is not a folder: {EXPECTED}"
    with pytest.raises(SettingError, match=r"data.root='' is not possible"):
        ImageNet(root="")


def test_without_scipy(root, monkeypatch):
    monkeypatch.setattr(imagenet, "find_spec", lambda name: None)
    assert complaint(root) == (
        f"data.root={str(root)!r}: scipy reads the classes in ILSVRC2012_devkit_t12.tar.gz and is not installed; "
        "pip install scipy, or set data.root to a folder with train/ and val/"
    )


def test_the_setting_of_the_project_opens_it(root):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", overrides=["data=imagenet", f"data.root={root}", "data.image_size=16"]).data
    source = instantiate(config)
    assert type(source) is ImageNet
    assert (source.name, source.image_size, source.num_classes) == ("imagenet", 16, 3)
