"""Images a second that the ImageNet recipe's loader delivers, by number of workers, and where one core's time goes.

    python scripts/bench_loader.py --data-root datasets/imagenet --out results/loader.json
    python scripts/bench_loader.py --data-root datasets/small --synthesise 4000   # as large as ImageNet's
    python scripts/bench_loader.py --shards datasets/imagenet-shards              # without the second part

Batches are uint8, as workers hand them over; normalising them is the GPU's work. Nothing consumes them, and images that
were read before come from memory: it is the cores that are measured, not the disk. The file is rewritten after every
row. scripts/cost.py compares it with what models take.
"""

import io
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import PIL
import timm
import torch
import torchvision
from benchmarking import machine
from command_line import command_line
from omegaconf import OmegaConf
from PIL import Image, features
from torch.utils.data import ConcatDataset
from torchvision.io import ImageReadMode, decode_jpeg

from data.datamodule import ImageDataModule
from data.image_folder import ImageFolder
from data.order import seeded
from models.callbacks import write_json
from stl import SettingError

RECIPE = Path(__file__).parent.parent / "configs/experiment/imagenet/recipe.yaml"
BATCH_SIZE = 16  # small, so that a small folder keeps all workers busy
EPOCH = 200_000  # images, at least
TYPICAL_SIZE, QUALITY = (500, 375), 90  # of ImageNet's photographs, nearly


# --- the loader --------------------------------------------------------------------------------------------------


def open_source(kind: str, root: str) -> Any:
    """An `ImageFolder` or `Shards`, with the pipeline of the recipe."""
    recipe = OmegaConf.load(RECIPE).data
    settings: dict[str, Any] = {key: recipe[key] for key in ("image_size", "crop_pct", "auto_augment", "interpolation")}
    settings |= {"root": root, "batch_size": BATCH_SIZE}
    if kind == "image folder":
        source: ImageDataModule = ImageFolder(**settings)
    else:
        from data.shards import Shards  # needs webdataset, which an image folder does not

        source = Shards(**settings)
    source.setup()
    return source


def loader_rate(loader: Any, workers: int, seconds: float) -> float:
    """Images a second, epoch after epoch, once all workers are at work."""
    batches = chain.from_iterable(repeat(loader))
    for _ in islice(batches, 4 * max(1, workers)):  # twice what the workers prepare before they are first asked
        pass
    images, began = 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds or not images:
        images += len(next(batches)[0])
    return images / passed


def long(images: Any) -> ConcatDataset:
    """The images over and over, for workers idle where an epoch ends, which in a small folder is often."""
    return ConcatDataset([images] * math.ceil(EPOCH / len(images)))


def loader_rows(kind: str, root: str, counts: Sequence[int], seconds: float) -> Iterator[dict[str, Any]]:
    """The training and the evaluation loader with each number of workers."""
    source = open_source(kind, root)
    if kind == "image folder":
        source.train_data, source.val_data = long(source.train_data), long(source.val_data)
    for workers in counts:
        source.num_workers = workers
        for split in ("train", "val"):
            rate = loader_rate(getattr(source, f"{split}_dataloader")(), workers, seconds)
            yield {
                "source": kind,
                "split": split,
                "workers": workers,
                "images_per_second": rate,
                "images_per_second_per_core": rate / max(1, workers),
            }


def worker_counts(cores: int) -> list[int]:
    """1, 2, 4, 8 … and all cores."""
    return sorted({2**power for power in range(cores.bit_length())} | {cores})


# --- one core ----------------------------------------------------------------------------------------------------


def decode_pil(content: bytes, scale: Callable[[tuple[int, int]], tuple[int, int]] | None = None) -> Image.Image:
    """PIL's decoder; libjpeg leaves out work, by halves, while the result is no smaller than `scale` of the size."""
    image = Image.open(io.BytesIO(content))
    if scale:
        image.draft("RGB", scale(image.size))
    return image.convert("RGB")


def spread(folder: Any, most: int) -> list[Path]:
    """So many files of an image folder's split, or all, out of all classes alike."""
    count = min(most, len(folder))
    return [Path(folder.samples[index * len(folder) // count][0]) for index in range(count)]


def reseed(seed: int) -> None:
    """What it costs that each image's augmentation is a function of its seed."""
    with seeded(seed):
        pass


def stage_rows(folder: Any, images: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Each way of decoding, then each step of the training transform on what the step before it made."""
    files = [file.read_bytes() for file in spread(folder, images)]
    jpegs = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    side = OmegaConf.load(RECIPE).data.image_size

    def row(stage: str, step: Callable[[Any], Any], inputs: list[Any]) -> dict[str, Any]:
        return {"stage": stage, "images_per_second": stage_rate(step, inputs, seconds)}

    yield row("decode: PIL", decode_pil, files)
    yield row(f"decode: PIL, draft of {side} or more", lambda file: decode_pil(file, lambda _: (side, side)), files)
    yield row(
        "decode: PIL, draft of half the size",
        lambda file: decode_pil(file, lambda size: (size[0] // 2, size[1] // 2)),
        files,
    )
    yield row("decode: torchvision", lambda jpeg: decode_jpeg(jpeg, ImageReadMode.RGB), jpegs)
    yield row("the image's own seed", reseed, list(range(len(files))))
    values: list[Any] = [decode_pil(file) for file in files]
    for step in folder.transform.transforms:
        yield row(f"transform: {type(step).__name__}", step, values)
        values = [step(value) for value in values]
    if torch.cuda.is_available():

        def on_gpu(batch: list[torch.Tensor]) -> None:
            decode_jpeg(batch, ImageReadMode.RGB, device="cuda")
            torch.cuda.synchronize()

        rate = stage_rate(on_gpu, [jpegs], seconds)
        yield {"stage": "decode: nvJPEG on the GPU", "images_per_second": rate * len(jpegs)}


def stage_rate(step: Callable[[Any], Any], inputs: list[Any], seconds: float) -> float:
    """Inputs a second of a step on one core."""
    with seeded(0):
        for value in inputs[:8]:
            step(value)
        done, began = 0, time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds or not done:
            for value in inputs:
                step(value)
            done += len(inputs)
    return done / passed


# --- the images --------------------------------------------------------------------------------------------------


@contextmanager
def synthesised(root: str, images: int) -> Iterator[str]:
    """A temporary image folder with training images of `root`, enlarged to ImageNet's typical size; one class."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "train" / "images"
        folder.mkdir(parents=True)
        (Path(temporary) / "val").symlink_to("train")
        for index, file in enumerate(spread(open_source("image folder", root).train_data, images)):
            with Image.open(file) as image:
                enlarged = image.convert("RGB").resize(TYPICAL_SIZE, Image.Resampling.BICUBIC)
            enlarged.save(folder / f"{index:06}.jpg", quality=QUALITY)
        yield temporary


def describe_images(folder: Any) -> dict[str, Any]:
    """Their number, median width and height, and the mean size of a file."""
    files, sizes = spread(folder, 1000), []
    for file in files:
        with Image.open(file) as image:
            sizes.append(image.size)
    width, height = np.median(sizes, axis=0).tolist()
    kilobytes = sum(file.stat().st_size for file in files) / len(files) / 1000
    return {"number": len(folder), "median_width": width, "median_height": height, "mean_kilobytes": kilobytes}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data-root", help="an image folder")
    parser.add_argument("--shards", help="folder or URL of WebDataset shards")
    parser.add_argument(
        "--synthesise",
        type=int,
        metavar="N",
        help="first enlarge up to N images of --data-root to {}×{} and save them at quality {}".format(
            *TYPICAL_SIZE, QUALITY
        ),
    )
    parser.add_argument("--workers", type=int, nargs="+", help="by default 1, 2, 4, 8 … and all cores")
    parser.add_argument("--seconds", type=float, default=15, help="of every measurement of the loader")
    parser.add_argument("--stage-images", type=int, default=200, help="images for the measurements on one core")
    parser.add_argument("--out", type=Path, default=Path("results/loader.json"), help="JSON to write")
    arguments = parser.parse_args()
    if not (arguments.data_root or arguments.shards):
        sys.exit("error: there is nothing to load; give --data-root an image folder, or --shards a folder or URL")
    if arguments.synthesise and not arguments.data_root:
        sys.exit("error: --synthesise enlarges the images of --data-root, and none is given")
    torch.set_num_threads(1)
    here = machine()
    here["versions"] |= {"torchvision": torchvision.__version__, "timm": timm.__version__, "pillow": PIL.__version__}
    here["versions"]["libjpeg-turbo"] = features.version_feature("libjpeg_turbo")
    result: dict[str, Any] = {"machine": here, "images": None, "loader": [], "one_core": []}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    counts = arguments.workers or worker_counts(here["cpu_cores"])

    def keep(part: str, row: dict[str, Any]) -> None:
        result[part].append(row)
        write_json(arguments.out, result)
        name = row.get("stage") or f"{row['source']}, {row['split']}, {row['workers']} workers"
        print(f"{name:50} {row['images_per_second']:9.0f} images/s", flush=True)

    def measure(root: str, made: str | None) -> None:
        images = open_source("image folder", root).train_data
        result["images"] = describe_images(images) | {"made": made}
        for row in loader_rows("image folder", root, counts, arguments.seconds):
            keep("loader", row)
        for row in stage_rows(images, arguments.stage_images, arguments.seconds / 5):
            keep("one_core", row)

    if arguments.shards:
        for row in loader_rows("shards", arguments.shards, counts, arguments.seconds):
            keep("loader", row)
    if arguments.synthesise:
        with synthesised(arguments.data_root, arguments.synthesise) as root:
            measure(root, "upscaled to {}×{}, quality {}".format(*TYPICAL_SIZE, QUALITY))
    elif arguments.data_root:
        measure(arguments.data_root, None)


if __name__ == "__main__":
    try:
        main()
    except (SettingError, OSError) as error:
        sys.exit(f"error: {error}")
