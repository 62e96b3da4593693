"""Batches of text for language models: documents, tokenised once and packed into blocks of one length."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.datamodule import BatchDataModule, at_least, require
from data.documents import Documents, fingerprint, is_held_out
from data.packing import Blocks, TrainingBlocks, open_side, pack
from data.tokenizer import BPETokenizer, ByteTokenizer, HubTokenizer, Tokenizer, is_learned, learn_bpe
from stl.errors import SettingError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def amount(setting: str, value: Any) -> int | None:
    """A number above 0: 5000000, or 5M; K, M and B are thousand, million and 10⁹. None stays. Raises SettingError."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", str(value))
    number = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    require(number > 0, setting, value, "a positive number such as 5000000 or 5M, or null for all")
    return number


def whole(batch: Any) -> Any:
    """A batch that is one when it leaves the data set."""
    return batch


class TextDataModule(BatchDataModule):
    """Batches (input_ids, labels), both int64 (B, length), where a label is the token behind its input.

    When this is constructed, the documents are tokenised and packed into two files, once: of several processes one does
    it while the others wait, and where the files are there nobody does. Each epoch takes the blocks of the training
    text in another order; those that fill no whole optimizer batch are left out of it, other ones each time.

    Args:
        train: the training text.
        val: the held-out text; None holds out `val_share` of the training documents.
        name: what tables call it; None means the name of the training text.
        length: tokens of a sequence.
        tokenizer: "bytes"; "bpe", a byte-level BPE that is learned from the training text; or a folder or a name on the
            Hugging Face hub, for `transformers.AutoTokenizer`.
        bpe_vocab_size: tokens of a BPE, the 256 bytes and the end of text among them.
        bpe_characters: of the training text from which a BPE is learned; None means all.
        val_share: part of the documents, chosen by a hash of their text, that training and BPE never see.
        drop_duplicates: leave out of `val` the documents that are in the training text too.
        tokens, val_tokens: how much of each text is taken, from its beginning; None means all. "100M" is 10⁸.
        packed: folder for packed text and tokenizers; each combination of settings has a folder in it.
        **loading: the further arguments of `BatchDataModule`.

    `vocab_size` is that of the tokenizer, and `counts` has the "documents", "dropped", "bytes" (of UTF-8) and "tokens"
    of "train" and "val".

    Raises:
        SettingError: a setting is out of range, the documents cannot be read, a tokenizer cannot be loaded, a packed
            file is damaged, or there is less text than one block; when a loader is made, if there are fewer blocks than
            devices.
    """

    unit = "sequences"
    input_dtype = torch.int64
    collate = staticmethod(whole)

    def __init__(
        self,
        *,
        train: Documents,
        val: Documents | None = None,
        name: str | None = None,
        length: int = 1024,
        tokenizer: str = "bytes",
        bpe_vocab_size: int = 32768,
        bpe_characters: int | str | None = None,
        val_share: float = 0.01,
        drop_duplicates: bool = True,
        tokens: int | str | None = None,
        val_tokens: int | str | None = None,
        packed: str = "datasets/packed",
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        require(at_least(length, 1), "length", length, "a positive number of tokens")
        require(bool(tokenizer), "tokenizer", tokenizer, "bytes, bpe, a folder or a name on the Hugging Face hub")
        require(at_least(bpe_vocab_size, 257), "bpe_vocab_size", bpe_vocab_size, "257 (bytes and end of text) or more")
        possible = isinstance(val_share, float) and 0 < val_share < 1
        require(possible, "val_share", val_share, "a number between 0 and 1")
        require(bool(packed), "packed", packed, "the folder for packed text")
        limits = [amount("bpe_characters", bpe_characters), amount("tokens", tokens), amount("val_tokens", val_tokens)]
        self.name = name or train.name
        self.length = length
        self.input_shape = (length,)
        root = Path(os.path.abspath(os.path.expanduser(packed)))
        held_out = val_share if val is None else 0.0
        self.tokenizer = _tokenizer(tokenizer, bpe_vocab_size, limits[0], train, held_out, root)
        self.vocab_size, self.vocabulary = self.tokenizer.vocab_size, self.tokenizer.vocabulary
        folder, self.counts = pack(
            train,
            val,
            self.tokenizer,
            root,
            val_share=val_share,
            drop_duplicates=drop_duplicates,
            tokens=limits[1],
            val_tokens=limits[2],
        )
        self._train = TrainingBlocks(open_side(folder, self.counts, "train", self.vocab_size), length)
        self._val = Blocks(open_side(folder, self.counts, "val", self.vocab_size), length)
        for blocks, text in ((self._train, "the training text"), (self._val, "the held-out text")):
            if not len(blocks):
                raise SettingError(
                    f"data.length={length} is not possible: {text} has {len(blocks.ids)} tokens, fewer than the "
                    f"{length + 1} of one block; set data.length lower or take more text"
                )

    @property
    def for_model(self) -> dict[str, Any]:
        own = {"tokens": self.vocab_size, "vocabulary": self.vocabulary}
        return {**own, "length": self.length, "sample": self.sample}

    def keep(self, folder: Path) -> None:
        """The files of a learned tokenizer, which from other text would be another."""
        if isinstance(self.tokenizer, BPETokenizer):
            self.tokenizer.save(folder)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "vocabulary": self.vocabulary}

    def sample(self, sequences: int) -> Tensor:
        """Token ids (sequences, length) from places all over the training text, always the same; at most all blocks."""
        places = torch.linspace(0, len(self._train) - 1, min(sequences, len(self._train))).round().long()
        return Blocks.__getitems__(self._train, places.tolist())[0]

    def train_set(self) -> TrainingBlocks:
        return self._train

    def val_set(self) -> Blocks:
        return self._val

    def train_dataloader(self) -> Any:
        self._check_enough(self.train_data, "training", self._place()[1])
        return super().train_dataloader()

    def seeded_train_data(self) -> TrainingBlocks:
        return self.train_data  # whose blocks have no randomness

    def _reading(self) -> dict[str, Any]:
        checksum = self.counts["train"]["crc32"]
        return {**super()._reading(), "data.length": self.length, "the checksum of the training tokens": checksum}


def _tokenizer(
    name: str, vocab_size: int, characters: int | None, train: Documents, held_out: float, root: Path
) -> Tokenizer:
    if name == "bytes":
        return ByteTokenizer()
    if name != "bpe":
        folder = Path(os.path.expanduser(name))
        return BPETokenizer(folder) if is_learned(folder) else HubTokenizer(name)
    recipe = {"train": train.identity, "held_out": held_out}
    return BPETokenizer(learn_bpe(_without(train, held_out), vocab_size, characters, recipe, root))


def _without(documents: Documents, held_out: float) -> Iterator[str]:
    """Those that are not of the held-out share."""
    for text in documents:
        if not is_held_out(fingerprint(text), held_out):
            yield text
