"""Batches of text: their form, order and division, going on in the middle of an epoch, and wrong settings."""

import inspect
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from delivery import Recorder, delivered
from hydra.utils import instantiate
from omegaconf import OmegaConf
from texts import Texts, module, stories

from data.datamodule import BatchDataModule
from data.hub_text import HubText
from data.text import TextDataModule, amount
from data.text_files import TextFiles
from stl.errors import SettingError

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def ready(packed, **settings) -> TextDataModule:
    source = module(packed, **settings)
    source.setup()
    return source


def inputs_of(source: TextDataModule, *, epoch: int = 0, batches: int = 0) -> list:
    source._position = {"epoch": epoch, "batches": batches}
    return [inputs.tolist() for inputs, _ in source.train_dataloader()]


def on(source: TextDataModule, device: int, devices: int) -> TextDataModule:
    source.trainer = SimpleNamespace(global_rank=device, world_size=devices)
    return source


def test_the_yaml_gives_batches_of_the_promised_form(tmp_path):
    for name, texts in {"train": stories(0, 60), "val": stories(60, 90)}.items():
        (tmp_path / f"{name}.txt").write_text("|".join(texts))
    source = instantiate(
        OmegaConf.load(CONFIGS / "text.yaml"),
        root=str(tmp_path / "train.txt"),
        val_root=str(tmp_path / "val.txt"),
        separator="|",
        tokenizer="bytes",
        length=32,
        batch_size=8,
        packed=str(tmp_path / "packed"),
    )
    assert type(source) is TextFiles
    assert (source.name, source.vocab_size, source.length) == ("train", 257, 32)
    assert source.counts["train"]["documents"] == 60
    batches = delivered(source)
    for inputs, labels in batches["train"] + batches["val"]:
        assert inputs.dtype == labels.dtype == torch.int64
        assert inputs.shape == labels.shape == (len(inputs), 32)
        assert torch.equal(inputs[:, 1:], labels[:, :-1])
    assert {len(inputs) for inputs, _ in batches["train"]} == {8}
    held_out = torch.cat([inputs.flatten() for inputs, _ in batches["val"]]).tolist()
    assert source.tokenizer.decode(held_out) == "".join(stories(60, 90))[: len(held_out) - held_out.count(256)]


@pytest.mark.parametrize(("file", "source"), [("text", TextFiles), ("slimpajama", HubText)])
def test_yaml_shows_every_argument(file, source):
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{file}.yaml"))
    classes = BatchDataModule, TextDataModule, source
    parameters = {name for kind in classes for name in inspect.signature(kind).parameters}
    assert config.pop("_target_") == f"{source.__module__}.{source.__name__}"
    assert set(config) == parameters - {"loading", "settings", "seed", "train", "val"}


def test_the_order_is_a_function_of_seed_and_epoch(tmp_path):
    first = inputs_of(ready(tmp_path))
    assert first == inputs_of(ready(tmp_path))
    for other in (inputs_of(ready(tmp_path), epoch=1), inputs_of(ready(tmp_path, seed=1))):
        assert other != first
        assert len(other) == len(first)
    blocks = [tuple(block) for batch in first for block in batch]
    assert len(set(blocks)) == len(blocks)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_entered_anywhere_and_goes_on_as_it_would_have(tmp_path, workers):
    whole = inputs_of(ready(tmp_path), epoch=2)
    for done in (1, len(whole) - 1):
        assert inputs_of(ready(tmp_path, num_workers=workers), epoch=2, batches=done) == whole[done:]


def test_devices_divide_each_step_of_one_device(tmp_path):
    whole = inputs_of(ready(tmp_path, batch_size=8))
    parts = [inputs_of(on(ready(tmp_path, batch_size=8, device_batch_size=2), device, 2)) for device in range(2)]
    for step, expected in enumerate(whole):
        taken = [block for part in parts for batch in part[2 * step : 2 * step + 2] for block in batch]
        assert sorted(taken) == sorted(expected)
    held_out = [inputs.tolist() for device in range(2) for inputs, _ in on(ready(tmp_path), device, 2).val_dataloader()]
    expected = [inputs.tolist() for inputs, _ in ready(tmp_path).val_dataloader()]
    assert sorted(chain(*held_out)) == sorted(chain(*expected))


def test_more_devices_than_blocks(tmp_path):
    source = on(ready(tmp_path, batch_size=1000, length=200), 0, 1000)
    for loader in (source.train_dataloader, source.val_dataloader):
        with pytest.raises(SettingError, match=r"trainer.devices=1000 are more than the \d+ \w+ sequences"):
            loader()


class Learner(Recorder):
    """Takes an optimizer step each batch, and writes a checkpoint after the first three."""

    def __init__(self, file: Path | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.file = file

    def training_step(self, batch, index):
        super().training_step(batch, index)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.weight**2)
        optimizer.step()

    def on_train_batch_end(self, outputs, batch, index):
        if self.file and self.current_epoch == 0 and index == 2:
            self.trainer.save_checkpoint(self.file)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(source: TextDataModule, learner: Learner, checkpoint: Path | None = None) -> list:
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        limit_val_batches=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    source.trainer = trainer
    if checkpoint:
        source.load_state_dict(torch.load(checkpoint, weights_only=True)["TextDataModule"])
    trainer.fit(learner, source, ckpt_path=checkpoint, weights_only=True)
    return [inputs.tolist() for inputs, _ in learner.batches["train"]]


def test_a_run_that_was_stopped_takes_the_rest_of_the_epoch_and_then_the_next(tmp_path):
    file = tmp_path / "middle.ckpt"
    whole = fit(module(tmp_path), Learner(file))
    state = torch.load(file, weights_only=True)["TextDataModule"]
    assert (state["epoch"], state["batches"], state["vocabulary"]) == (0, 3, "bytes")
    assert fit(module(tmp_path), Learner(), file) == whole[3:]
    for settings, what in (
        ({"length": 8}, "data.length was 16, is 8"),
        ({"tokens": 1500}, "the checksum of the train"),
    ):
        with pytest.raises(SettingError, match=f"its sequences are divided otherwise now: .*{what}"):
            fit(module(tmp_path, **settings), Learner(), file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "data.length=0 is not possible: set data.length to a positive number of tokens"),
        ({"batch_size": 0}, "data.batch_size=0 is not possible: set data.batch_size to a positive number of sequences"),
        ({"tokenizer": ""}, "data.tokenizer='' is not possible: set data.tokenizer to bytes, bpe, a folder"),
        ({"bpe_vocab_size": 256}, "data.bpe_vocab_size=256 is not possible"),
        ({"val_share": 1.0}, "data.val_share=1.0 is not possible"),
        ({"tokens": "100 M"}, "data.tokens='100 M' is not possible: set data.tokens to a positive number such as"),
        ({"val_tokens": 0}, "data.val_tokens=0 is not possible"),
        ({"packed": ""}, "data.packed='' is not possible"),
    ],
)
def test_out_of_range(tmp_path, settings, message):
    train = Texts(stories(0, 60))
    with pytest.raises(SettingError) as caught:
        module(tmp_path, train=train, **settings)
    assert str(caught.value).startswith(message)
    assert not train.reads


def test_amounts():
    values = {"5000000": 5_000_000, 7: 7, "5M": 5_000_000, "1.5K": 1500, "0.3B": 300_000_000, "1.001M": 1_001_000}
    assert {value: amount("tokens", value) for value in values} == values
    assert amount("tokens", None) is None
