"""Evaluate a checkpoint: `python eval.py ckpt=outputs/…/checkpoints/last.ckpt` prints and writes its figures."""

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.table import Table
from torch import nn

from models.callbacks import describe_device, write_json
from models.checkpoint import load_checkpoint
from models.configured import restore
from models.quiet import quiet
from stl import SettingError, count_flops
from stl.flops import whole_samples
from train import describe, one_line_errors


@torch.inference_mode()
def latency(model: nn.Module, shape: Sequence[int], dtype: torch.dtype, repeats: int) -> float:
    """Median milliseconds of a forward pass over random images (B, 3, H, W), or one token repeated (B, length)."""
    like = next(model.parameters())
    make = torch.randn if dtype.is_floating_point else torch.zeros
    inputs = make(shape, device=like.device, dtype=dtype)
    seconds = []
    for _ in range(3 + repeats):
        if like.is_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        model(inputs)
        if like.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds[3:])


def evaluate(cfg: DictConfig) -> tuple[dict[str, Any], Path]:
    """The figures of a checkpoint, and the file they are written to: eval.json in the run's folder."""
    quiet()
    if OmegaConf.is_missing(cfg, "ckpt"):
        raise SettingError("ckpt is not set; give a checkpoint: python eval.py ckpt=outputs/…/checkpoints/last.ckpt")
    if cfg.num_threads:
        torch.set_num_threads(cfg.num_threads)
    checkpoint, path = load_checkpoint(cfg.ckpt)
    trained = OmegaConf.create(checkpoint["config"])
    if cfg.get("data"):
        trained.data = cfg.data
    if cfg.batch_size:
        trained.data.eval_batch_size = cfg.batch_size
    task, data, averaged = restore(checkpoint, path, trained, cfg.averaged)
    samples = whole_samples(task.model)
    flops = count_flops(task.model, (samples, *data.input_shape), data.input_dtype).to_dict()
    try:
        trainer = pl.Trainer(
            accelerator=cfg.accelerator, devices=1, precision=cfg.precision, logger=False, enable_model_summary=False
        )
    except (ValueError, MisconfigurationException) as error:
        raise SettingError(str(error)) from error
    metrics = trainer.validate(task, data, verbose=False)[0]
    task.to(trainer.strategy.root_device).eval()
    with trainer.precision_plugin.forward_context():
        latencies = {
            str(size): latency(task.model, (size, *data.input_shape), data.input_dtype, cfg.latency.repeats)
            for size in cfg.latency.batch_sizes
        }
    figures = {
        "checkpoint": str(path),
        **{key: value for key, value in describe(trained, data).items() if key != "overrides"},
        **task.figures(metrics),
        **{key: flops[key] for key in ("params", "macs", "dense_macs", "flop_factor")},
        "latency_ms": latencies,
        "device": describe_device(task.device),
        "precision": cfg.precision,
        "averaged_weights": averaged,
    }
    # checkpoints/ lies in the run folder; a checkpoint that was moved gets the file beside it.
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    target = folder / "eval.json"
    write_json(target, figures)
    return figures, target


def show(figures: dict[str, Any], target: Path) -> None:
    table = Table("figure", "value", title=f"{figures['model']} on {figures['dataset']}")
    linear = ", ".join(f"{key} {value}" for key, value in figures["linear"].items() if value is not None)
    table.add_row("linear layers", linear)
    if "top1" in figures:
        table.add_row("top-1 / top-5", f"{figures['top1']:.2f} % / {figures['top5']:.2f} %")
    else:
        table.add_row("perplexity", f"{figures['perplexity']:.3f}")
    table.add_row("validation loss", f"{figures['val_loss']:.4f}")
    table.add_row("parameters", f"{figures['params']:,}")
    for key, label in (("linear", "MACs, linear"), ("total", "MACs, total")):
        table.add_row(label, f"{figures['macs'][key]:,} (dense {figures['dense_macs'][key]:,})")
    for key, value in figures["flop_factor"].items():
        table.add_row(f"FLOP factor, {key}", f"{value:.2f}")
    for size, milliseconds in figures["latency_ms"].items():
        table.add_row(f"latency, batch {size}", f"{milliseconds:.2f} ms, {figures['precision']}, {figures['device']}")
    console = Console()
    console.print(table)
    console.print(f"written to {target}", soft_wrap=True)


@hydra.main(version_base="1.3", config_path="configs", config_name="eval")
def main(cfg: DictConfig) -> None:
    one_line_errors(lambda: show(*evaluate(cfg)))


if __name__ == "__main__":
    main()
