"""Images in WebDataset shards: tar files of `<key>.jpg` and `<key>.cls`, on disk or behind any URL."""

import io
import logging
import math
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice, pairwise
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, default_convert
from webdataset.filters import shuffle as shuffled

from data.datamodule import ImageDataModule, at_least, require
from data.order import derived_seed, seeded
from data.streams import Sample, ShardSet, read_index
from data.transforms import Transform, channel_statistics, eval_transform, train_transform
from stl.errors import SettingError

log = logging.getLogger(__name__)


class BatchOrder(Sampler[tuple[int, int]]):
    """(epoch, batch) of every batch of an epoch, in order.

    Args:
        batches: of a whole epoch.
        epoch, skip: where to begin: batches of that epoch that were taken already.
    """

    def __init__(self, batches: int, epoch: int = 0, skip: int = 0) -> None:
        self.batches, self.epoch, self._begin = batches, epoch, (epoch, skip)

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, (began, skip) = self.epoch, self._begin
        return ((epoch, batch) for batch in range(skip if epoch == began else 0, self.batches))


class ShardBatches(Dataset):
    """One device's batches, each asked for by (epoch, batch), which determines it.

    The device's part of all samples is cut into streams, one for each worker: batch j is the next of stream j mod S.
    A stream stays open between its batches. Whoever asks for another one than the next opens a new stream, which reads
    what comes before that batch without decoding it. So a loader that hands out the batches in turn reads every
    shard once, and an epoch is entered anywhere.

    An item is (images, labels, names of unreadable images): uint8 (B, 3, image_size, image_size) and int64 (B,),
    where B is smaller by the unreadable ones; None and None if there is no other.

    Args:
        shards: the samples of all devices.
        transform: from a PIL image to a tensor.
        classes: labels are below it.
        begin, end: this device's part of the samples.
        batches: into which the part is cut; they differ in size by one image at most.
        streams: S, at least 1.

    Raises:
        SettingError: while reading, if a shard cannot be read or a label is not one.
    """

    full_batches = False

    def __init__(
        self, shards: ShardSet, transform: Transform, classes: int, *, begin: int, end: int, batches: int, streams: int
    ) -> None:
        self.shards, self.transform, self.classes = shards, transform, classes
        self.begin, self.end, self.batches, self.streams = begin, end, batches, streams
        self._stream: Iterator[Any] = iter(())
        self._next: tuple[int, int] | None = None  # what _stream delivers

    def __getitem__(self, key: tuple[int, int]) -> Any:
        if key != self._next:
            self._stream = self._open(*key)
        self._next = None  # an error ends the stream
        batch = next(self._stream)
        self._next = (key[0], key[1] + self.streams)
        return batch

    def _open(self, epoch: int, batch: int) -> Iterator[Any]:
        """This batch and all later ones of its stream."""
        stream, done = batch % self.streams, batch // self.streams
        counts = [len(range(first, self.batches, self.streams)) for first in range(stream + 1)]  # of batches a stream
        behind = sum(counts[:stream])
        size = self.end - self.begin
        cuts = [self.begin + size * i // self.batches for i in range(behind, behind + counts[stream] + 1)]
        samples = self._samples(epoch, stream, cuts[0], cuts[-1])
        for _ in islice(samples, cuts[done] - cuts[0]):
            pass
        for low, high in pairwise(cuts[done:]):
            yield self._batch(epoch, list(islice(samples, high - low)))

    def _samples(self, epoch: int, stream: int, begin: int, end: int) -> Iterator[Sample]:
        return self.shards.read(range(len(self.shards.urls)), begin, end)

    def _batch(self, epoch: int, samples: list[Sample]) -> Any:
        items, unreadable = [], []
        for sample in samples:
            label = self._label(sample)
            try:
                image = Image.open(io.BytesIO(sample.image)).convert("RGB")
            except Exception:  # a broken file raises OSError, SyntaxError, ValueError, struct.error …
                unreadable.append(f"{sample.key} in {sample.url}")
                continue
            items.append((self._transformed(image, sample, epoch), label))
        if not items:
            return None, None, unreadable
        if self.full_batches:
            items = list(islice(cycle(items), len(samples)))
        images, labels = default_collate(items)
        return images, labels, unreadable

    def _label(self, sample: Sample) -> int:
        text = sample.label.decode(errors="replace").strip()
        if not (text.isdecimal() and int(text) < self.classes):
            raise SettingError(
                f"{sample.key} in {sample.url} has the label {text!r}, and index.json names {self.classes} classes, "
                f"0 to {self.classes - 1}; write index.json anew, or repair the shard"
            )
        return int(text)

    def _transformed(self, image: Image.Image, sample: Sample, epoch: int) -> Any:
        return self.transform(image)


class ShuffledBatches(ShardBatches):
    """Each epoch in another order, a function of the seed and the epoch: the shards are permuted, and a stream draws
    each image from a buffer that the next one of its shards then fills up.

    An image's augmentation depends on the seed, the epoch and its key. The place of an unreadable image is taken by a
    second copy of another one of its batch: batches keep their size, and the order does not depend on what is readable.

    Args:
        seed: of the order and the augmentation.
        device: its number; each draws otherwise.
        buffer: images of a stream.
    """

    full_batches = True

    def __init__(self, *args: Any, seed: int, device: int, buffer: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seed, self.device, self.buffer = seed, device, buffer

    def _samples(self, epoch: int, stream: int, begin: int, end: int) -> Iterator[Sample]:
        order = list(range(len(self.shards.urls)))
        random.Random(derived_seed(self.seed, epoch)).shuffle(order)
        draw = random.Random(derived_seed(self.seed, epoch, self.device, stream))
        return shuffled(self.buffer, rng=draw)(self.shards.read(order, begin, end))

    def _transformed(self, image: Image.Image, sample: Sample, epoch: int) -> Any:
        with seeded(derived_seed(self.seed, epoch, zlib.crc32(sample.key.encode()))):
            return super()._transformed(image, sample, epoch)


class Unreadable:
    """Counts the distinct images that could not be decoded, over splits, epochs and workers of this process."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.names: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        """Log those that are new; raise `SettingError` if the limit is exceeded."""
        for name in names:
            if name in self.names:
                continue
            if len(self.names) == self.limit:
                raise SettingError(
                    f"data.max_unreadable={self.limit} unreadable images are skipped, and one more was met: "
                    f"{name}; repair the shard, or set data.max_unreadable to a larger number"
                )
            self.names.add(name)
            log.warning("skipped an unreadable image (%d so far): %s", len(self.names), name)


class _Loader(DataLoader):
    """Yields (images, labels), after counting what was unreadable. Errors of workers come out as one line."""

    def __init__(self, *args: Any, unreadable: Unreadable, **options: Any) -> None:
        super().__init__(*args, **options)
        self.unreadable = unreadable

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        try:
            for images, labels, unreadable in super().__iter__():
                self.unreadable.add(unreadable)
                if images is None:
                    raise SettingError(
                        "data: a batch holds no readable image; repair the shards of the images "
                        "named in the log, or set data.batch_size or data.eval_batch_size higher"
                    )
                yield images, labels
        except SettingError as error:
            if self._iterator is not None:  # the traceback would keep the workers until they have to be killed
                self._iterator._shutdown_workers()  # type: ignore[attr-defined]
                self._iterator = None
            message = str(error).strip().splitlines()[-1]  # a worker puts its traceback before it
            raise SettingError(message.removeprefix(f"{SettingError.__module__}.SettingError: ")) from None


class Shards(ImageDataModule):
    """WebDataset shards with an `index.json`, both as `scripts/write_shards.py` writes them.

    Training goes through D · S streams for D devices with S workers each, all of equal length whatever the number and
    sizes of the shards; images that fill no whole optimizer batch are left out of the epoch, other ones each time.
    Evaluation takes every image once. An epoch that was stopped in its middle goes on only with the same number of
    devices and workers.

    A shard that cannot be read is tried again, then ends the run. An unreadable image is logged once; in training a
    copy of another image of its batch takes its place, in evaluation its batch is smaller by one.

    Args:
        root: what holds index.json and the shards: a folder, the front of a URL, or a pattern of a URL in which {}
            stands for the file, as "pipe:aws s3 cp s3://bucket/imagenet/{} -".
        name: what tables call the data set; None means the name in index.json.
        image_size: side of the images, in pixels.
        scale, auto_augment, interpolation, crop_pct, mean, std: see `data.transforms`.
        shuffle: images that each worker holds, undecoded, to draw the next from.
        max_unreadable: how many unreadable images are skipped before the run stops.
        **loading: the further arguments of `ImageDataModule`.

    Raises:
        SettingError: at construction, if a setting or index.json is wrong; when a loader is made, if there are fewer
            images than a batch or devices need; while loading, if a shard cannot be read, one unreadable image more
            than allowed is met, or a batch has no readable image.
    """

    loader_class = _Loader
    collate = staticmethod(default_convert)  # batches are whole when they leave the data set

    def __init__(
        self,
        *,
        root: str,
        name: str | None = None,
        image_size: int = 224,
        scale: Sequence[float] = (0.08, 1.0),
        auto_augment: str | None = None,
        interpolation: str = "bicubic",
        crop_pct: float = 0.9,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        shuffle: int = 2000,
        max_unreadable: int = 10,
        **loading: Any,
    ) -> None:
        super().__init__(image_size=image_size, **loading)
        require(bool(root), "root", root, "the folder or URL that holds index.json and the shards")
        require(at_least(shuffle, 1), "shuffle", shuffle, "a positive number of images; 1 shuffles only the shards")
        require(at_least(max_unreadable, 0), "max_unreadable", max_unreadable, "0 or more images")
        self.mean, self.std = channel_statistics(mean, std)
        self._train_transform = train_transform(
            image_size, scale=scale, auto_augment=auto_augment, interpolation=interpolation, mean=mean
        )
        self._eval_transform = eval_transform(image_size, crop_pct=crop_pct)
        self.shuffle = shuffle
        self.unreadable = Unreadable(max_unreadable)
        self._index = read_index(root)
        self.name = name or self._index.name
        self.num_classes = self._index.classes

    def train_set(self) -> ShardSet:
        return self._index.train

    def val_set(self) -> ShardSet:
        return self._index.val

    def train_dataloader(self) -> Any:
        device, devices = self._place()
        share, accumulated = self.split(devices)
        batches = len(self.train_data) // self.batch_size * accumulated
        if not batches:
            raise SettingError(
                f"data.batch_size={self.batch_size} is more than the {len(self.train_data)} training images of "
                "data.root; set it to at most that"
            )
        part = batches * share
        dataset = ShuffledBatches(
            self.train_data,
            self._train_transform,
            self.num_classes,
            begin=device * part,
            end=(device + 1) * part,
            batches=batches,
            streams=self._streams,
            seed=self.seed,
            device=device,
            buffer=self.shuffle,
        )
        order = BatchOrder(batches, self._position["epoch"], self._position["batches"])
        return self._loader(dataset, sampler=order)

    def val_dataloader(self) -> Any:
        device, devices = self._place()
        images = len(self.val_data)
        if images < devices:
            raise SettingError(
                f"data.root has {images} validation images, fewer than trainer.devices={devices}; use fewer devices"
            )
        batch_size = self.eval_batch_size or self.split(devices)[0]
        # The same number on each device, or one would wait for the others; and not one of them empty.
        batches = min(math.ceil(math.ceil(images / devices) / batch_size), images // devices)
        dataset = ShardBatches(
            self.val_data,
            self._eval_transform,
            self.num_classes,
            begin=images * device // devices,
            end=images * (device + 1) // devices,
            batches=batches,
            streams=self._streams,
        )
        return self._loader(dataset, sampler=BatchOrder(batches))

    @property
    def _streams(self) -> int:
        return max(1, self.num_workers)

    def _loader(self, dataset: Any, **options: Any) -> Any:
        return super()._loader(dataset, batch_size=None, unreadable=self.unreadable, **options)

    def _reading(self) -> dict[str, Any]:
        return {
            **super()._reading(),
            "data.num_workers": self.num_workers,
            "data.shuffle": self.shuffle,
            "the checksum of index.json": self._index.checksum,
        }
