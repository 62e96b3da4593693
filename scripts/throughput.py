"""Images a second of models on this machine's GPU, compiled, in bf16: inference, training step, peak memory.

    python scripts/throughput.py --out results/throughput_h200.json
    python scripts/throughput.py --models t2t_vit_7 --data-root datasets/imagenet   # the loader as well

The file is rewritten after every row, and rows that it has are not measured again: a stopped program goes on.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from data.image_folder import ImageFolder
from models.build import build_model
from models.callbacks import git_commit, write_json
from stl import STLLinear


def seconds_a_call(run: Callable[[], None], warmup: int, repeats: int) -> float:
    """Median seconds of a call on the GPU, by events."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def measure(name: str, linear: Any, batch_size: int, repeats: int) -> dict[str, float]:
    """Images a second of inference and of a whole training step (AdamW included), and the step's peak memory in GiB."""
    torch._dynamo.reset()
    model = build_model(name, num_classes=1000, img_size=224, linear=linear).cuda()
    images = torch.randn(batch_size, 3, 224, 224, device="cuda")
    labels = torch.randint(1000, (batch_size,), device="cuda")
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    compiled = torch.compile(model)

    def infer() -> None:
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
            compiled(images)

    def train() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    inference = batch_size / seconds_a_call(infer, 5, repeats)
    model.train()
    train()
    torch.cuda.reset_peak_memory_stats()
    training = batch_size / seconds_a_call(train, 5, repeats)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"inference_images_per_second": inference, "training_images_per_second": training, "peak_memory_gib": peak}


def loader_rates(root: str, workers: int, batches: int) -> Iterator[tuple[str, float]]:
    """Images a second that the recipe's training loader, and the evaluation loader, deliver, epoch after epoch."""
    source = ImageFolder(
        root=root,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation="random",
        batch_size=16,  # small, so that a small folder keeps all workers busy
        num_workers=workers,
    )
    source.setup()
    for split, loader in (("train", source.train_dataloader()), ("val", source.val_dataloader())):
        stream = chain.from_iterable(repeat(loader))
        next(stream)  # waits for the workers to start
        began = time.perf_counter()
        seen = sum(len(images) for images, _ in islice(stream, batches))
        yield split, seen / (time.perf_counter() - began)


def machine() -> dict[str, Any]:
    """What a reader needs to know of where the numbers come from."""
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver.stdout.split()[0],
        "cpu_cores": os.cpu_count(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
        "precision": "bf16 autocast, torch.compile",
        "image_size": 224,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["t2t_vit_7", "t2t_vit_14"])
    parser.add_argument("--rank", type=int, nargs="+", default=[16, 24])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--data-root", help="an image folder, to measure the loader on")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("results/throughput.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this measures a GPU and finds none")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    choices: dict[str, Any] = {"dense": nn.Linear}
    choices |= {f"stl t=4 r={rank}": partial(STLLinear, tile=4, rank=rank, basis="frame") for rank in arguments.rank}
    result: dict[str, Any] = {"machine": machine(), "loader": {}, "models": []}
    if arguments.out.exists():
        earlier = json.loads(arguments.out.read_text())
        if earlier["machine"]["gpu"] != result["machine"]["gpu"]:
            sys.exit(f"error: {arguments.out} is of a {earlier['machine']['gpu']}; give --out another file")
        result = earlier
    done = {(row["model"], row["linear"], row["batch_size"]) for row in result["models"]}
    if arguments.data_root:
        for split, rate in loader_rates(arguments.data_root, arguments.workers, batches=600):
            result["loader"][f"{split}_images_per_second"] = rate
            print(f"loader, {split}, {arguments.workers} workers: {rate:.0f} images/s", flush=True)
        write_json(arguments.out, result)
    for name in arguments.models:
        for label, linear in choices.items():
            if (name, label, arguments.batch_size) in done:
                continue
            row: dict[str, Any] = {"model": name, "linear": label, "batch_size": arguments.batch_size}
            row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
            row |= measure(name, linear, arguments.batch_size, arguments.repeats)
            result["models"].append(row)
            write_json(arguments.out, result)
            print(
                f"{name:12} {label:14} inference {row['inference_images_per_second']:8.0f} images/s   training "
                f"{row['training_images_per_second']:7.0f} images/s   {row['peak_memory_gib']:.1f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
