"""Labels are the numbers of the images here, so that a list of labels is an order."""

import inspect
import io
import json
import logging
import pickle
import shutil
import tarfile
import threading
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate, islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import timm.data
import torch
from delivery import delivered
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint

import data.shards
import data.streams
import models.t2t_vit  # noqa: F401  registers the published models
from data.datamodule import BatchDataModule, ImageDataModule
from data.order import derived_seed, seeded
from data.shards import Shards
from data.streams import location, read_shard, stream_samples
from stl.errors import SettingError

CONFIGS = Path(__file__).parents[2] / "configs"
UNEVEN = (1, 9, 4, 10)

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings(
        "ignore:You're resuming from a checkpoint that ended before"
    ),  # these data are resumable
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(data.streams, "PAUSES", (0.0, 0.0, 0.0))


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (12, 14, 3), dtype=np.uint8))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write(root: Path, train=UNEVEN, val=(5, 2), spoilt=()) -> Path:
    """Shards of so many images each, and their index; spoilt images are no images."""
    root.mkdir(parents=True, exist_ok=True)
    index = {"name": "numbers", "classes": list(range(max(sum(train), sum(val))))}
    for split, sizes in (("train", train), ("val", val)):
        names = [f"{split}-{i:03d}.tar" for i in range(len(sizes))]
        for name, (begin, end) in zip(names, pairwise(accumulate(sizes, initial=0)), strict=True):
            with tarfile.open(root / name, "w") as tar:
                for number in range(begin, end):
                    file = io.BytesIO()
                    picture(number).save(file, "png")
                    add(tar, f"{split}/{number}.cls", str(number).encode())
                    add(tar, f"{split}/{number}.png", b"no" if f"{split}/{number}" in spoilt else file.getvalue())
        index[split] = {"shards": names, "samples": sizes}
    (root / "index.json").write_text(json.dumps(index))
    return root


@pytest.fixture
def root(tmp_path) -> Path:
    return write(tmp_path / "shards")


def ready(root, device: int = 0, devices: int = 1, position=None, **settings) -> Shards:
    source = Shards(root=str(root), **{"image_size": 8, "batch_size": 4, "shuffle": 5, **settings})
    source.trainer = SimpleNamespace(global_rank=device, world_size=devices)
    source.setup()
    if position:
        source._position = dict(zip(("epoch", "batches"), position, strict=True))
    return source


def epochs(loader, *numbers: int) -> list[list]:
    """The batches of each of these epochs, as Lightning asks for them."""
    found = []
    for number in numbers:
        loader.sampler.set_epoch(number)
        found.append([(images.clone(), labels.tolist()) for images, labels in loader])
    return found


def same(one: list, other: list) -> bool:
    return len(one) == len(other) and all(
        a[1] == b[1] and torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True)
    )


def labels_of(batches) -> list[int]:
    return [label for _, labels in batches for label in labels]


def warnings(caplog) -> list[str]:
    return [
        r.getMessage()
        for r in caplog.records
        if r.name in ("data.shards", "data.streams") and r.levelno == logging.WARNING
    ]


# --- settings ----------------------------------------------------------------------------------------------------


def test_the_yaml_shows_every_argument_and_gives_batches_of_the_promised_form(root):
    config = OmegaConf.load(CONFIGS / "data" / "imagenet_wds.yaml")
    classes = BatchDataModule, ImageDataModule, Shards
    parameters = {name for kind in classes for name in inspect.signature(kind).parameters}
    assert set(config) == parameters - {"loading", "seed"} | {"_target_"}
    source = instantiate(config, root=str(root), image_size=16, batch_size=4, num_workers=0)
    assert (source.name, source.num_classes, source.image_size) == ("numbers", 24, 16)
    source.setup()
    for train, dtype in ((source.train_dataloader(), torch.uint8), (delivered(source)["train"], torch.float32)):
        batches = list(train)
        assert [images.shape for images, _ in batches] == [(4, 3, 16, 16)] * 6
        assert all(images.dtype == dtype and labels.dtype == torch.int64 for images, labels in batches)
    assert [labels.tolist() for _, labels in source.val_dataloader()] == [[0, 1, 2], [3, 4, 5, 6]]


def test_the_imagenet_recipe_takes_shards_in_place_of_a_folder(root):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        words = ["experiment=imagenet/t2t_vit_7_stl", "data=imagenet_wds", f"data.root={root}"]
        config = compose("train", words).data
    assert config._target_ == "data.shards.Shards"
    assert (config.auto_augment, config.interpolation, config.crop_pct) == ("rand-m9-mstd0.5-inc1", "random", 0.9)
    assert instantiate(config).name == "numbers"


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("root", "", "the folder or URL that holds index.json and the shards"),
        ("shuffle", 0, "a positive number of images; 1 shuffles only the shards"),
        ("max_unreadable", -1, "0 or more images"),
        ("scale", [0.5, 0.1], "two numbers with 0 < smallest <= largest <= 1"),
        ("interpolation", "nearest", "one of bilinear, bicubic, random"),
        ("crop_pct", 0, "a number in (0, 1]"),
        ("mean", [0.5], "three numbers"),
        ("std", [1, 1, 0], "three positive numbers"),
    ],
)
def test_out_of_range(root, setting, value, allowed):
    with pytest.raises(SettingError) as caught:
        Shards(**{"root": str(root), setting: value})
    assert str(caught.value) == f"data.{setting}={value!r} is not possible: set data.{setting} to {allowed}"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "holds no readable index.json (ROOT/index.json: No such file or directory)"),
        ("{", "holds no readable index.json (ROOT/index.json: Expecting property name"),
        ("[]", "its index.json is not one that scripts/write_shards.py writes (TypeError: "),
        (
            '{"name": "x", "classes": [0]}',
            "its index.json is not one that scripts/write_shards.py writes (KeyError: train)",
        ),
        (
            '{"name": "x", "classes": [0], "train": {"shards": ["a"], "samples": []}, "val": 0}',
            "its index.json is not one that scripts/write_shards.py writes (ValueError: ",
        ),
        (
            json.dumps(
                {"name": "x", "classes": [], **{split: {"shards": [], "samples": []} for split in ("train", "val")}}
            ),
            "its index.json names no training images, validation images or classes",
        ),
    ],
)
def test_what_is_wrong_with_the_index(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(SettingError) as caught:
        Shards(root=str(tmp_path))
    assert str(caught.value).startswith(f"data.root={str(tmp_path)!r}")
    assert complaint.replace("ROOT", str(tmp_path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_locations():
    assert location("/a/b/", "x.tar") == "/a/b/x.tar"
    assert location("https://host/a", "x.tar") == "https://host/a/x.tar"
    assert location("pipe:aws s3 cp s3://a/{} -", "x.tar") == "pipe:aws s3 cp s3://a/x.tar -"
    assert location("/a", "https://host/x.tar") == "https://host/x.tar"
    assert location("/a", "/b/x.tar") == "/b/x.tar"
    assert location("~/a", "x.tar") == str(Path.home() / "a" / "x.tar")


# --- order -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("devices", [1, 2])
def test_an_epoch_takes_every_image_once_over_devices_and_workers(root, devices, workers):
    found = []
    for device in range(devices):
        loader = ready(root, device, devices, num_workers=workers, device_batch_size=2).train_dataloader()
        batches = epochs(loader, 0, 1)
        assert [len(epoch) for epoch in batches] == [len(loader)] * 2 == [12 // devices] * 2
        found.append(batches)
    orders = [[label for part in found for label in labels_of(part[epoch])] for epoch in (0, 1)]
    assert all(sorted(order) == list(range(24)) for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_what_fills_no_batch_of_all_devices_is_left_out(root):
    sources = [ready(root, device, 2, batch_size=10, num_workers=2) for device in (0, 1)]
    batches = [epochs(source.train_dataloader(), *range(4)) for source in sources]
    for one, other in zip(*batches, strict=True):
        assert [len(labels) for _, labels in one + other] == [5] * 4
        assert len({*labels_of(one), *labels_of(other)}) == 20
    left = {frozenset(range(24)) - {*labels_of(one), *labels_of(other)} for one, other in zip(*batches, strict=True)}
    assert len(left) > 1  # not the same ones each epoch


def test_more_workers_than_shards_and_than_batches(tmp_path):
    root = write(tmp_path, train=(12,), val=(1, 1))
    loader = ready(root, num_workers=3, batch_size=6).train_dataloader()
    assert sorted(labels_of(epochs(loader, 0)[0])) == list(range(12))


@pytest.mark.parametrize(("devices", "workers"), [(1, 0), (1, 1), (1, 3), (2, 2)])
def test_an_epoch_goes_on_from_every_batch_as_if_it_had_not_stopped(root, devices, workers):
    start = partial(ready, root, devices - 1, devices, num_workers=workers)
    expected = epochs(start().train_dataloader(), 3, 4)
    for batch in range(len(expected[0]) + 1):
        loader = start(position=(3, batch)).train_dataloader()
        assert len(loader) == 6
        first = [(images, labels.tolist()) for images, labels in loader]  # before the trainer has named the epoch
        assert same(first, expected[0][batch:])
        if batch in (1, 6):
            assert same(epochs(loader, 4)[0], expected[1])


def test_going_on_decodes_only_what_is_delivered(root, monkeypatch):
    opened = []
    monkeypatch.setattr(data.shards.Image, "open", lambda file: opened.append(1) or picture(0))
    assert len(list(ready(root, position=(0, 4)).train_dataloader())) == 2
    assert len(opened) == 8


def test_a_batch_does_not_depend_on_what_was_asked_before(root):
    dataset = ready(root, num_workers=2).train_dataloader().dataset
    copy = pickle.loads(pickle.dumps(dataset))
    expected = {batch: dataset[0, batch] for batch in range(6)}
    for batch in (5, 1, 3, 3, 0, 4, 2):
        images, labels, _ = copy[0, batch]
        assert torch.equal(images, expected[batch][0])
        assert torch.equal(labels, expected[batch][1])


def test_an_epoch_that_was_broken_off_leaves_nothing_behind(root):
    expected = epochs(ready(root, num_workers=2).train_dataloader(), 0, 1)
    loader = ready(root, num_workers=2).train_dataloader()
    next(iter(loader))
    assert same(epochs(loader, 1)[0], expected[1])
    assert same(epochs(loader, 1)[0], expected[1])


def test_the_seed_changes_the_order_and_the_workers_do_not_change_the_augmentation(root):
    found = [
        epochs(ready(root, num_workers=workers, seed=seed).train_dataloader(), 0)[0]
        for workers, seed in ((0, 0), (3, 0), (0, 1))
    ]
    pictures = [
        {label: image for images, labels in batches for label, image in zip(labels, images, strict=True)}
        for batches in found
    ]
    assert labels_of(found[0]) != labels_of(found[2])
    assert all(torch.equal(pictures[0][label], pictures[1][label]) for label in range(24))
    assert not all(torch.equal(pictures[0][label], pictures[2][label]) for label in range(24))


def test_augmentation_is_seeded_by_seed_epoch_and_key(root):
    source = ready(root, seed=7)
    images, labels = epochs(source.train_dataloader(), 2)[0][0]
    with seeded(derived_seed(7, 2, zlib.crc32(f"train/{labels[0]}".encode()))):
        assert torch.equal(images[0], source._train_transform(picture(labels[0])))


def test_training_is_timms_pixel_for_pixel(root):
    policy = "rand-m9-mstd0.5-inc1"
    theirs = timm.data.create_transform(32, is_training=True, color_jitter=0.0, auto_augment=policy)
    source = ready(root, image_size=32, auto_augment=policy, interpolation="bilinear")
    for images, labels in delivered(source)["train"]:
        for image, label in zip(images, labels.tolist(), strict=True):
            with seeded(derived_seed(0, 0, zlib.crc32(f"train/{label}".encode()))):
                assert torch.equal(image, theirs(picture(label)))


def test_reading_leaves_the_programs_own_randomness_alone(root):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(ready(root).train_dataloader())
    assert torch.equal(torch.rand(1), expected)


def test_a_buffer_of_one_permutes_the_shards_only(tmp_path):
    order = labels_of(epochs(ready(write(tmp_path, train=(4,) * 6), shuffle=1).train_dataloader(), 1)[0])
    assert [label % 4 for label in order] == [0, 1, 2, 3] * 6
    assert order[::4] != sorted(order[::4])


def test_fewer_images_than_a_batch(root):
    with pytest.raises(SettingError, match=r"^data.batch_size=25 is more than the 24 training images of data.root; "):
        ready(root, batch_size=25).train_dataloader()


# --- checkpoints -------------------------------------------------------------------------------------------------


class Recorder(pl.LightningModule):
    """Keeps the labels that it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch, _):
        images, labels = batch
        self.seen.append((self.current_epoch, labels.tolist()))
        return self.linear(images.mean((2, 3))).square().mean()

    def validation_step(self, batch, _):
        self.linear(batch[0].mean((2, 3)))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_from_a_checkpoint_in_the_middle_of_an_epoch(root, tmp_path, workers):
    def run(source: Shards, **options) -> Recorder:
        model = Recorder()
        saving = ModelCheckpoint(tmp_path, save_top_k=-1, every_n_train_steps=5, filename="{step}")
        trainer = pl.Trainer(
            max_epochs=3,
            accumulate_grad_batches=2,
            callbacks=[saving],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            use_distributed_sampler=False,
        )
        trainer.fit(model, datamodule=source, **options, weights_only=True)
        return model

    settings = {"image_size": 8, "batch_size": 8, "device_batch_size": 4, "shuffle": 5, "num_workers": workers}
    expected = run(Shards(root=str(root), **settings)).seen
    assert len(expected) == 18
    resumed = run(Shards(root=str(root), **settings), ckpt_path=tmp_path / "step=5.ckpt").seen  # of 3 steps an epoch
    assert resumed == expected[10:]


def test_the_middle_of_an_epoch_needs_the_same_streams(root, tmp_path):
    def position(**settings) -> dict:
        return ready(root, **settings)._reading()

    for changed, words in (
        ({"num_workers": 2}, "data.num_workers was 0, is 2"),
        ({"shuffle": 9}, "data.shuffle was 5, is 9"),
    ):
        with pytest.raises(SettingError) as caught:
            ready(root, **changed).load_state_dict({"epoch": 1, "batches": 2, **position()})
        assert words in str(caught.value)
        ready(root, **changed).load_state_dict({"epoch": 1, "batches": 0, **position()})
    moved = shutil.copytree(root, tmp_path / "moved")
    ready(moved).load_state_dict({"epoch": 1, "batches": 2, **position()})
    with pytest.raises(SettingError, match=r"the checksum of index.json was \d+, is \d+"):
        ready(write(tmp_path / "other", train=(12, 12))).load_state_dict({"epoch": 1, "batches": 2, **position()})


# --- evaluation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("devices", "workers", "size"),
    [*((devices, 0, size) for devices in (1, 2, 3) for size in (1, 2, 3, 100)), (1, 2, 2), (2, 2, 2)],
)
def test_evaluation_takes_every_image_once_in_the_same_number_of_batches(root, devices, workers, size):
    start = partial(ready, root, devices=devices, num_workers=workers, batch_size=6, eval_batch_size=size)
    loaders = [start(device).val_dataloader() for device in range(devices)]
    found = [[labels.tolist() for _, labels in loader] for loader in loaders]
    assert sorted(label for batches in found for labels in batches for label in labels) == list(range(7))
    assert len({len(batches) for batches in found}) == 1
    assert [len(loader) for loader in loaders] == [len(batches) for batches in found]
    assert all(0 < len(labels) <= max(size, 2) for batches in found for labels in batches)


def test_evaluation_of_any_number_of_images(tmp_path):
    for images in range(1, 12):
        root = write(tmp_path / str(images), train=(1,), val=(images,))
        for devices in range(1, min(images, 4) + 1):
            for size in (1, 2, 3, 4):
                sources = [ready(root, device, devices, eval_batch_size=size) for device in range(devices)]
                parts = [source.val_dataloader().dataset for source in sources]
                assert len({part.batches for part in parts}) == 1
                cuts = [(part.begin, part.end) for part in parts]
                assert [0, *(end for _, end in cuts)] == [*(begin for begin, _ in cuts), images]
                most = max((part.end - part.begin + part.batches - 1) // part.batches for part in parts)
                assert most <= max(size, 1 + (images % devices > 0))
                assert all(part.end - part.begin >= part.batches > 0 for part in parts)


def test_evaluation_is_timms_for_the_published_models_pixel_for_pixel(root):
    config = timm.get_pretrained_cfg("t2t_vit_7").to_dict()
    theirs = timm.data.create_transform(**timm.data.resolve_data_config(config))
    for images, labels in delivered(ready(root, image_size=224))["val"]:
        assert all(
            torch.equal(image, theirs(picture(label))) for image, label in zip(images, labels.tolist(), strict=True)
        )


def test_evaluation_repeats_itself(root):
    loader = ready(root, num_workers=2).val_dataloader()
    assert same(*([(images.clone(), labels.tolist()) for images, labels in loader] for _ in range(2)))


def test_fewer_validation_images_than_devices(root):
    with pytest.raises(SettingError, match=r"^data.root has 7 validation images, fewer than trainer.devices=8; "):
        ready(root, 0, 8, batch_size=8).val_dataloader()


# --- images that cannot be read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_counted_once_and_batches_stay_full(tmp_path, caplog, workers):
    bad = [3, 4, 20]
    root = write(tmp_path, spoilt=[f"train/{number}" for number in bad])
    start = partial(ready, root, num_workers=workers, max_unreadable=3)
    found = epochs(start().train_dataloader(), 0, 1)
    for epoch in found:
        assert all(images.shape == (4, 3, 8, 8) for images, _ in epoch)
        assert len(labels_of(epoch)) == 24
        assert set(labels_of(epoch)) == set(range(24)) - set(bad)
    shard = {3: "001", 4: "001", 20: "003"}
    assert {line.partition(": ")[2] for line in warnings(caplog)} == {
        f"train/{number} in {root}/train-{shard[number]}.tar" for number in bad
    }
    assert [line.partition(": ")[0] for line in warnings(caplog)] == [
        f"skipped an unreadable image ({i} so far)" for i in (1, 2, 3)
    ]
    for batch in range(0, 6, 1 + workers):
        assert same(epochs(start(position=(0, batch)).train_dataloader(), 0)[0], found[0][batch:])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_makes_a_batch_of_the_evaluation_smaller(tmp_path, workers):
    root = write(tmp_path, spoilt=["val/1", "val/5"])
    loader = ready(root, num_workers=workers).val_dataloader()
    assert [labels.tolist() for _, labels in loader] == [[0, 2], [3, 4, 6]]


@pytest.mark.parametrize("workers", [0, 2])
def test_one_unreadable_image_more_than_allowed(tmp_path, workers):
    root = write(tmp_path, spoilt=["train/0", "val/1"])
    source = ready(root, num_workers=workers, max_unreadable=1)
    list(source.train_dataloader())
    with pytest.raises(SettingError) as caught:
        list(source.val_dataloader())
    assert str(caught.value) == (
        f"data.max_unreadable=1 unreadable images are skipped, and one more was met: val/1 in {root}/val-000.tar; "
        "repair the shard, or set data.max_unreadable to a larger number"
    )


def test_a_batch_without_a_readable_image(tmp_path):
    root = write(tmp_path, spoilt=["val/0", "val/1", "val/2"])
    with pytest.raises(SettingError, match=r"^data: a batch holds no readable image; "):
        list(ready(root).val_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("label", ["24", "-1", "cat"])
def test_a_label_that_is_none(root, label, workers):
    with tarfile.open(root / "val-000.tar", "a") as tar:
        add(tar, "odd.png", b"")
        add(tar, "odd.cls", label.encode())
    index = json.loads((root / "index.json").read_text())
    index["val"]["samples"][0] += 1
    (root / "index.json").write_text(json.dumps(index))
    with pytest.raises(SettingError) as caught:
        list(ready(root, num_workers=workers).val_dataloader())
    assert str(caught.value) == (
        f"odd in {root}/val-000.tar has the label {label!r}, and index.json names 24 classes, 0 to 23; "
        "write index.json anew, or repair the shard"
    )


# --- streams that break off --------------------------------------------------------------------------------------


def unreadable(shard, reason: str) -> str:
    return (
        f"the shard {shard} cannot be read, after 4 attempts: {reason}; "
        "repair it or the connection, or set data.root to another folder or URL"
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("length", [0, 3000, 4400, 2560, 3072])  # in a header, in a file, before and behind a header
def test_a_truncated_shard(root, length, workers):
    shard = root / "val-000.tar"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(SettingError) as caught:
        list(ready(root, num_workers=workers).val_dataloader())
    reasons = ("empty file", "unexpected end of data", "it ends after 1 of the 5 images that index.json names")
    assert str(caught.value) in [unreadable(shard, reason) for reason in reasons]


def test_a_missing_shard(root):
    (root / "val-001.tar").unlink()
    with pytest.raises(SettingError) as caught:
        list(ready(root).val_dataloader())
    assert str(caught.value) == unreadable(root / "val-001.tar", "No such file or directory")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_command_that_fails(root, workers):
    (root / "fetch.sh").write_text(f"case $1 in index.json) cat {root}/$1;; *) head -c 3000 {root}/$1; exit 3;; esac")
    with pytest.raises(SettingError) as caught:
        list(ready(f"pipe:sh {root}/fetch.sh {{}}", num_workers=workers).val_dataloader())
    assert str(caught.value) == unreadable(f"pipe:sh {root}/fetch.sh val-000.tar", "its command ended with exit code 3")


@pytest.mark.parametrize("length", [0, 3000, 4400, 2560, 3072])
def test_a_stream_that_breaks_off_once_goes_on_where_it_was(root, caplog, length):
    expected = epochs(ready(root).train_dataloader(), 0)[0]
    (root / "fetch.sh").write_text(
        f"if [ $1 = index.json ] || [ -e {root}/$1.seen ]; then cat {root}/$1\n"
        f"else touch {root}/$1.seen; head -c {length} {root}/$1; exit 1; fi"
    )
    pattern = f"pipe:sh {root}/fetch.sh {{}}"
    assert same(epochs(ready(pattern).train_dataloader(), 0)[0], expected)
    for i in (1, 2, 3):  # the shard of one image may have been whole
        line = f"next attempt in 0 s: pipe:sh {root}/fetch.sh train-00{i}.tar: its command ended with exit code 1"
        assert line in "".join(warnings(caplog))
    assert len(warnings(caplog)) in (3, 4)


@pytest.mark.parametrize("delivered", [(0, 0, 0), (2, 3, 4), (3, 3, 1), (4, 0, 0)])
def test_every_attempt_goes_on_behind_what_was_delivered(root, monkeypatch, delivered):
    expected = list(stream_samples(str(root / "val-000.tar")))
    lengths = iter((*delivered, 5))

    def breaks_off(url):
        yield from islice(stream_samples(url), next(lengths))
        raise OSError("connection lost")

    monkeypatch.setattr(data.streams, "stream_samples", breaks_off)
    assert list(read_shard(str(root / "val-000.tar"), 5)) == expected
    assert list(lengths) == []


def test_pauses_grow(root, monkeypatch):
    slept = []
    monkeypatch.setattr(data.streams, "PAUSES", (1.0, 4.0, 16.0))
    monkeypatch.setattr(data.streams.time, "sleep", slept.append)
    with pytest.raises(SettingError, match="after 4 attempts"):
        list(read_shard(str(root / "gone.tar"), 5))
    assert slept == [1.0, 4.0, 16.0]


def test_a_stream_that_is_not_read_to_its_end_is_no_error(root, caplog):
    big = root / "big.tar"
    with tarfile.open(big, "w") as tar:
        for number in range(50):
            add(tar, f"{number}.jpg", bytes(100_000))
            add(tar, f"{number}.cls", b"0")
    samples = stream_samples(f"pipe:cat {big}")
    assert next(samples).key == "0"
    samples.close()
    assert len(list(stream_samples(f"pipe:cat {big}"))) == 50


def test_groups_without_an_image_or_a_label_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.jpg", "b.cls", "c.JPEG", "c.json", "c.cls", "d.webp", "d.cls", "e.txt", "e.cls"):
            add(tar, name, b"7")
    assert [sample.key for sample in stream_samples(str(tmp_path / "a.tar"))] == ["c", "d"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset opens http:// with curl")
def test_a_url(root):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(root)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        assert same(
            epochs(ready(url, num_workers=2).train_dataloader(), 0)[0],
            epochs(ready(root, num_workers=2).train_dataloader(), 0)[0],
        )
        (root / "val-000.tar").unlink()
        with pytest.raises(SettingError) as caught:
            list(ready(url).val_dataloader())
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert str(caught.value) == unreadable(f"{url}/val-000.tar", "its command ended with exit code 22")
