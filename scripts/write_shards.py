"""WebDataset shards out of an image folder, or an index of shards that there are; train with `data=imagenet_wds`.

    python scripts/write_shards.py datasets/imagenet datasets/imagenet-shards
    python scripts/write_shards.py datasets/imagenet datasets/imagenet-shards-256 --resize 256 --workers 16
    python scripts/write_shards.py datasets/theirs --index-train 'https://host/train-{0000..1023}.tar' \\
        --index-val 'https://host/val-{00..63}.tar'

The image files go into tar files as they are, the training images in a random order. A stopped program goes on when it
is started again. index.json, the last thing written, names the shards, their sizes and the classes.
"""

import io
import json
import os
import random
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from command_line import command_line
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from webdataset.shardlists import expand_urls

from data.image_folder import ImageFolder
from data.streams import reason_of, stream_samples
from stl.errors import SettingError

JPEG_QUALITY = 90


class Item(NamedTuple):
    """An image and its place in the tree: the path below train/ or val/, without suffix, and without dots in its name,
    the first of which would end the key."""

    key: str
    file: Path
    label: int


def read_tree(source: Path) -> tuple[dict[str, list[Item]], list[str]]:
    """The images of each split, and the class names; raises SettingError if the tree is not as expected."""
    folder: Any = ImageFolder(root=str(source))
    splits = {"train": folder.train_set(), "val": folder.val_set()}
    items = {
        split: [Item(key_of(Path(file).relative_to(images.root)), Path(file), label) for file, label in images.samples]
        for split, images in splits.items()
    }
    for part in items.values():
        key, count = Counter(item.key for item in part).most_common(1)[0]
        if count > 1:
            same = ", ".join(str(item.file) for item in part if item.key == key)
            raise SettingError(f"several images would have the key {key!r}: {same}; rename all but one")
    return items, splits["train"].classes


def key_of(path: Path) -> str:
    return f"{path.parent.as_posix()}/{path.name.rpartition('.')[0].replace('.', '_')}"


def encoded(file: Path, resize: int | None) -> tuple[str, bytes]:
    """(suffix, content) of an image's file; as it is, but where its shorter side is longer than `resize`.

    A file that is no image stays as it is: training will name and skip it.
    """
    suffix, content = file.name.rpartition(".")[2].lower(), file.read_bytes()
    suffix = "jpg" if suffix == "jpeg" else suffix
    if resize is None:
        return suffix, content
    try:
        image = Image.open(io.BytesIO(content)).convert("RGB")
    except Exception:
        return suffix, content
    if min(image.size) <= resize:
        return suffix, content
    width, height = (max(resize, round(side * resize / min(image.size))) for side in image.size)
    smaller = io.BytesIO()
    image.resize((width, height), Image.Resampling.BICUBIC).save(smaller, "jpeg", quality=JPEG_QUALITY)
    return "jpg", smaller.getvalue()


def write_shard(path: Path, items: Sequence[Item], resize: int | None) -> None:
    """A tar file of <key>.<suffix> and <key>.cls, without times and owners; under its name only when it is whole."""
    temporary = path.with_suffix(".tmp")
    with tarfile.open(temporary, "w") as tar:
        for key, file, label in items:
            suffix, content = encoded(file, resize)
            for name, data in ((f"{key}.{suffix}", content), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def in_parallel(tasks: Sequence[tuple[int, Callable[[], Any]]], workers: int, what: str) -> list[Any]:
    """The results of all tasks, of which each has so many images, under a progress bar."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, ThreadPoolExecutor(workers) as pool:
        bar = progress.add_task(what, total=sum(size for size, _ in tasks))
        futures = {pool.submit(task): size for size, task in tasks}
        try:
            for future in as_completed(futures):
                future.result()
                progress.advance(bar, futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # else all the tasks that wait would still be done
            raise
    return [future.result() for future in futures]


def claim(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder one of these settings' shards; raises SettingError if it holds anything else."""
    note = out / "settings.json"
    out.mkdir(parents=True, exist_ok=True)
    if note.exists():
        theirs = json.loads(note.read_text())
        if changed := [
            f"{key} was {theirs.get(key)}, is {now}" for key, now in settings.items() if theirs.get(key) != now
        ]:
            raise SettingError(
                f"{str(out)!r} holds shards that were begun otherwise: {'; '.join(changed)}; "
                "make them agree to go on, or give another folder"
            )
    elif any(out.iterdir()):
        raise SettingError(f"{str(out)!r} is not empty, and not by this program; give another folder")
    else:
        write_json(note, settings)


def cut(items: Sequence[Item], most: int) -> Iterator[Sequence[Item]]:
    """Parts of nearly equal size, of `most` items at most."""
    parts = -(-len(items) // most)
    for begin, end in pairwise(len(items) * i // parts for i in range(parts + 1)):
        yield items[begin:end]


def write(source: Path, out: Path, per_shard: int, seed: int, resize: int | None, workers: int) -> dict[str, Any]:
    """All the shards that are not there yet; returns what goes into index.json."""
    items, classes = read_tree(source)
    names = zlib.crc32(repr([(item.key, item.label) for part in items.values() for item in part]).encode())
    claim(out, {"per_shard": per_shard, "seed": seed, "resize": resize, "the checksum of the file names": names})
    random.Random(seed).shuffle(items["train"])
    index: dict[str, Any] = {"name": source.resolve().name, "classes": classes}
    tasks = []
    for split in items:
        shards = {f"{split}-{i:06d}.tar": part for i, part in enumerate(cut(items[split], per_shard))}
        index[split] = {"shards": list(shards), "samples": [len(part) for part in shards.values()]}
        for name, part in shards.items():
            if not (out / name).exists():
                tasks.append((len(part), partial(write_shard, out / name, part, resize)))
    in_parallel(tasks, workers, "images written")
    return index


def count(url: str) -> tuple[int, int]:
    """(samples, largest label) of a shard, which is read once."""
    samples, largest = 0, -1
    try:
        for sample in stream_samples(url):
            samples, largest = samples + 1, max(largest, int(sample.label))
    except Exception as error:
        raise SettingError(f"the shard {url} cannot be read, at image {samples + 1}: {reason_of(error)}") from None
    if not samples:
        raise SettingError(f"the shard {url} holds no <key>.jpg with a <key>.cls beside it")
    return samples, largest


def index_shards(out: Path, train: list[str], val: list[str], workers: int) -> dict[str, Any]:
    """What goes into index.json for these URLs, in brace notation or one by one. The classes are numbers."""
    index: dict[str, Any] = {"name": out.resolve().name, "classes": []}
    largest = -1
    for split, patterns in (("train", train), ("val", val)):
        urls = [url for pattern in patterns for url in expand_urls(pattern)]
        counts = in_parallel([(1, partial(count, url)) for url in urls], workers, f"{split} shards read")
        names = []
        for url in urls:
            if urlparse(url).scheme:
                names.append(url)
            else:  # shards beside index.json can be moved together with it
                path = Path(url).resolve()
                names.append(path.name if path.parent == out.resolve() else str(path))
        index[split] = {"shards": names, "samples": [samples for samples, _ in counts]}
        largest = max(largest, *(label for _, label in counts))
    index["classes"] = [str(label) for label in range(largest + 1)]
    out.mkdir(parents=True, exist_ok=True)
    return index


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="[SRC] OUT", help="SRC has train/ and val/")
    parser.add_argument("--per-shard", type=int, default=1000, help="images of a shard, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the training images")
    parser.add_argument("--resize", type=int, help="pixels of the shorter side at most; larger images are encoded anew")
    parser.add_argument("--workers", type=int, default=4, help="shards that are written, or read, at a time")
    parser.add_argument("--index-train", nargs="+", metavar="URL", help="training shards that there are")
    parser.add_argument("--index-val", nargs="+", metavar="URL", help="validation shards that there are")
    given = parser.parse_args()
    if bool(given.index_train) != bool(given.index_val):
        parser.error("--index-train and --index-val belong together")
    if len(given.folders) != (1 if given.index_train else 2):
        parser.error("expected SRC and OUT, or OUT alone with --index-train and --index-val")
    for name in ("per_shard", "workers", "resize"):
        if (value := getattr(given, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    out = given.folders[-1]
    try:
        if given.index_train:
            index = index_shards(out, given.index_train, given.index_val, given.workers)
        else:
            index = write(given.folders[0], out, given.per_shard, given.seed, given.resize, given.workers)
        write_json(out / "index.json", index)
    except (SettingError, OSError) as error:
        sys.exit(f"error: {error}")
    sizes = (
        f"{sum(index[split]['samples']):,} in {len(index[split]['shards']):,} shards" for split in ("train", "val")
    )
    print(
        f"{out / 'index.json'}: training images {', validation images '.join(sizes)}, {len(index['classes'])} classes"
    )


if __name__ == "__main__":
    main()
