"""What a model gets of a data source: its batches behind the loader, the transfer and Lightning's hooks."""

from typing import Any

import pytorch_lightning as pl

from data.datamodule import ImageDataModule


class Recorder(pl.LightningModule):
    """Keeps the batches of training and evaluation."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.batches: dict[str, list[Any]] = {"train": [], "val": []}

    def training_step(self, batch, _):
        self.batches["train"].append(batch)

    def validation_step(self, batch, _):
        self.batches["val"].append(batch)

    def configure_optimizers(self):
        return None


def delivered(source: ImageDataModule, precision: Any = "32-true") -> dict[str, list[Any]]:
    """The (images, labels) of one epoch, under "train" and "val"."""
    recorder = Recorder()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision=precision,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recorder, datamodule=source)
    return recorder.batches
