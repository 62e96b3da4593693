"""Read WebDataset shards, tar files on disk or behind any URL, as streams that are tried again when they break off."""

import json
import logging
import os
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple
from urllib.parse import urlparse

from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from webdataset.gopen import gopen, set_options
from webdataset.tariterators import group_by_keys, tar_file_expander

from stl.errors import SettingError

log = logging.getLogger(__name__)

PAUSES = (1.0, 4.0, 16.0)  # seconds before a stream that broke off is opened again


class Sample(NamedTuple):
    """An image as it stands in a shard, not yet decoded."""

    key: str
    url: str  # of the shard
    image: bytes
    label: bytes  # a number in text


def stream_samples(url: str) -> Iterator[Sample]:
    """The samples of a tar file, in its order; groups of files without an image or a label are passed over.

    Raises whatever opening and reading may raise. A tar file cut off between two members just ends early.
    """
    stream = gopen(url)
    try:
        broken = None
        try:
            for files in group_by_keys(tar_file_expander([{"url": url, "stream": stream}])):
                suffix = next((end[1:] for end in IMG_EXTENSIONS if end[1:] in files), None)
                if suffix and "cls" in files:
                    yield Sample(files["__key__"], url, files[suffix], files["cls"])
        except Exception as error:
            broken = error
        while stream.read(2**20):  # where a command failed, its exit code says more than what it left of the tar file
            pass
        stream.close()
        if broken:
            raise broken
    finally:
        set_options(stream, ignore_errors=True)  # a command that is cut off here may well complain
        stream.close()


def read_shard(url: str, samples: int) -> Iterator[Sample]:
    """The first `samples` samples. A stream that breaks off is opened again, and goes on behind the last one delivered.

    Raises SettingError when that has failed, after all of `PAUSES`.
    """
    done = 0
    for pause in (*PAUSES, None):
        try:
            for sample in islice(stream_samples(url), done, samples):
                done += 1
                yield sample
            if done == samples:
                return
            reason = f"it ends after {done} of the {samples} images that index.json names"
        except Exception as error:  # OSError, tarfile's, zlib's, ValueError …
            reason = reason_of(error)
        if pause is None:
            raise SettingError(
                f"the shard {url} cannot be read, after {1 + len(PAUSES)} attempts: {reason}; "
                "repair it or the connection, or set data.root to another folder or URL"
            )
        log.warning("a shard broke off after %d images, next attempt in %g s: %s: %s", done, pause, url, reason)
        time.sleep(pause)


def reason_of(error: Exception) -> str:
    """One line, without the objects that WebDataset adds to its messages."""
    text = getattr(error, "strerror", None) or (str(error.args[0]) if error.args else type(error).__name__)
    if code := re.search(r"exit (-?\d+) \(read\)", text):
        return f"its command ended with exit code {code[1]}"
    return " ".join(text.split(" @ ")[0].split())


class ShardSet(Dataset):
    """The samples of all shards, one after the other.

    Args:
        urls: of the shards.
        samples: how many each holds.
    """

    def __init__(self, urls: Sequence[str], samples: Sequence[int]) -> None:
        self.urls, self.samples = list(urls), list(samples)

    def __len__(self) -> int:
        return sum(self.samples)

    def read(self, order: Iterable[int], begin: int, end: int) -> Iterator[Sample]:
        """Samples `begin` to `end` of the row that the shards make in this order; opens no shard without any."""
        for shard in order:
            samples = self.samples[shard]
            if begin < samples and end > 0:
                yield from islice(read_shard(self.urls[shard], samples), max(begin, 0), min(end, samples))
            begin, end = begin - samples, end - samples


class Index(NamedTuple):
    """What index.json says."""

    name: str
    classes: int
    train: ShardSet
    val: ShardSet
    checksum: int  # of the training shards' names and sizes, wherever they are


def location(root: str, name: str) -> str:
    """Where a file of `root` is: `root` is a folder, the front of a URL, or a pattern in which {} stands for the name.

    A name that is a URL or an absolute path itself stays as it is.
    """
    if urlparse(name).scheme or os.path.isabs(name):
        return name
    if "{}" in root:
        return root.replace("{}", name)
    return f"{os.path.expanduser(root).rstrip('/')}/{name}"


def read_index(root: str) -> Index:
    """`index.json` of `root`: {"name": …, "classes": [names], "train": {"shards": [names], "samples": [counts]},
    "val": {…}}. Raises SettingError if it cannot be read or is not of this form."""
    where = location(root, "index.json")
    try:
        with gopen(where) as stream:
            content = json.load(stream)
    except Exception as error:
        raise SettingError(
            f"data.root={root!r} holds no readable index.json ({where}: {reason_of(error)}); scripts/write_shards.py "
            "writes shards with one, and one for shards that there are"
        ) from None
    try:
        train, val = (
            ShardSet(
                [location(root, name) for name, _ in zip(part["shards"], part["samples"], strict=True)],
                [int(samples) for samples in part["samples"]],
            )
            for part in (content["train"], content["val"])
        )
        checksum = zlib.crc32(json.dumps(content["train"]).encode())
        index = Index(str(content["name"]), len(content["classes"]), train, val, checksum)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SettingError(
            f"data.root={root!r}: its index.json is not one that scripts/write_shards.py writes "
            f"({type(error).__name__}: {reason_of(error)}); write it anew"
        ) from None
    if not (len(index.train) and len(index.val) and index.classes):
        raise SettingError(f"data.root={root!r}: its index.json names no training images, validation images or classes")
    return index
