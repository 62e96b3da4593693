"""Documents as one row of token ids in a file, and the blocks that it is cut into."""

import logging
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data.documents import Documents, fingerprint, is_held_out
from data.made_once import damaged, made_once
from data.progress import Progress
from data.tokenizer import Tokenizer
from stl.errors import SettingError

log = logging.getLogger(__name__)

FORMAT = 1  # of the files; those of another one are packed again
BATCH = 2**21  # characters that are tokenised together
PIECE = 2**20  # characters; longer documents are tokenised in pieces


def pack(
    train: Documents,
    val: Documents | None,
    tokenizer: Tokenizer,
    root: Path,
    *,
    val_share: float,
    drop_duplicates: bool,
    tokens: int | None,
    val_tokens: int | None,
) -> tuple[Path, Any]:
    """The folder with train.bin and val.bin, made now if `root` has none of these settings; and its about.json.

    A file is the tokens of its documents, one after the other, the end of text behind each; in uint16 where the
    vocabulary allows it, else in uint32, in the machine's byte order. Empty documents are left out. Under "train" and
    "val" about.json counts documents, dropped ones, bytes of UTF-8 and tokens, and has the file's CRC-32.

    Args:
        train, val: the two sides; without `val`, the documents of `train` that `is_held_out`.
        root: folder in which the folder is kept.
        drop_duplicates: leave out of `val` what is in `train`, as far as that is read.
        tokens, val_tokens: where a side ends, in the middle of a document if need be; None takes everything.

    Raises:
        SettingError: what reading the documents raises; a side without any; a file that cannot be written.
    """
    recipe = {
        "format": FORMAT,
        "train": train.identity,
        "val": val_share if val is None else val.identity,
        "drop_duplicates": val is not None and drop_duplicates,
        "tokens": tokens,
        "val_tokens": val_tokens,
        "tokenizer": {**tokenizer.identity, "vocab_size": tokenizer.vocab_size, "end": tokenizer.end},
    }

    def make(folder: Path) -> dict[str, Any]:
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        with (
            _Side(folder / "train.bin", dtype, tokenizer, tokens) as training,
            _Side(folder / "val.bin", dtype, tokenizer, val_tokens) as validation,
        ):
            if val is None:
                _fill(train, tokenizer, training, lambda key: validation if is_held_out(key, val_share) else training)
            else:
                next(iter(val), None)  # what cannot be read at all is named before the training text is tokenised
                _fill(train, tokenizer, training, lambda key: training)
                known = set(training.keys) if drop_duplicates else set()
                _fill(val, tokenizer, validation, lambda key: None if key in known else validation)
        about: dict[str, Any] = {"dtype": dtype.name, "train": training.counts, "val": validation.counts}
        _check_sides(train, val, about)
        for side in ("train", "val"):
            counts = [f"{about[side][key]:,}" for key in ("documents", "dropped", "tokens", "bytes")]
            log.info("%s: %s documents, %s dropped, %s tokens of %s bytes", side, *counts)
        return about

    return made_once(root, "tokens", recipe, make)


class _Side:
    """One file while it is written.

    Args:
        limit: tokens at which it is full.
    """

    def __init__(self, path: Path, dtype: np.dtype, tokenizer: Tokenizer, limit: int | None) -> None:
        self._file, self._dtype, self._tokenizer, self.limit = path.open("wb"), dtype, tokenizer, limit
        self.counts = {"documents": 0, "dropped": 0, "bytes": 0, "tokens": 0, "crc32": 0}
        self.keys = array("Q")  # of the documents

    def __enter__(self) -> "_Side":
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()

    @property
    def full(self) -> bool:
        return self.limit is not None and self.counts["tokens"] >= self.limit

    def add(self, key: int, size: int, ids: NDArray[np.int64]) -> None:
        """A document of `size` bytes."""
        if self.full:
            return
        if ids.max() >= self._tokenizer.vocab_size or ids.min() < 0:
            raise SettingError(
                f"data.tokenizer gives tokens from {ids.min()} to {ids.max()}, and its vocabulary has "
                f"{self._tokenizer.vocab_size}; set data.tokenizer to another one"
            )
        if self.limit is not None and len(ids) > (room := self.limit - self.counts["tokens"]):
            size, ids = size * room // len(ids), ids[:room]
        content = ids.astype(self._dtype).tobytes()
        self._file.write(content)
        self.keys.append(key)
        self.counts["documents"] += 1
        self.counts["bytes"] += size
        self.counts["tokens"] += len(ids)
        self.counts["crc32"] = zlib.crc32(content, self.counts["crc32"])


def _fill(documents: Documents, tokenizer: Tokenizer, main: _Side, side_of: Callable[[int], _Side | None]) -> None:
    """Put each document where `side_of` its fingerprint says, None drops it; until `main` is full."""
    progress = Progress(f"tokenising {documents.setting}")
    for texts in _batches(documents):
        keys = [fingerprint(text) for text in texts]
        sides = [side_of(key) for key in keys]
        rows = _encode(tokenizer, [text for text, side in zip(texts, sides, strict=True) if side])
        for text, key, side in zip(texts, keys, sides, strict=True):
            if side is None:
                main.counts["dropped"] += 1
                continue
            side.add(key, len(text.encode()), next(rows))
            if main.full:
                return
        progress(main.counts["documents"], main.counts["tokens"], "tokens", main.limit)


def _batches(documents: Documents) -> Iterator[list[str]]:
    """The documents that are not empty, some at a time."""
    batch: list[str] = []
    size = 0
    for text in documents:
        if not text.strip():
            continue
        batch.append(text.encode(errors="replace").decode())  # JSON may hold halves of surrogate pairs
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, texts: list[str]) -> Iterator[NDArray[np.int64]]:
    """The ids of each text, and the end."""
    cut = [list(_pieces(text)) for text in texts]
    rows = iter(tokenizer.encode([piece for pieces in cut for piece in pieces]) if texts else [])
    for pieces in cut:
        ids = [np.asarray(next(rows), dtype=np.int64) for _ in pieces]
        yield np.concatenate([*ids, np.array([tokenizer.end])])


def _pieces(text: str) -> Iterator[str]:
    """A long text in several, since a tokenizer takes many times its size; cut before white space, where no word is."""
    begin = 0
    while len(text) - begin > PIECE:
        end = begin + PIECE
        space = max(text.rfind(" ", begin + 1, end), text.rfind("\n", begin + 1, end))
        end = space if space > begin else end
        yield text[begin:end]
        begin = end
    yield text[begin:]


def _check_sides(train: Documents, val: Documents | None, about: dict[str, Any]) -> None:
    """Raise SettingError where one has no documents."""
    if not about["train"]["documents"]:
        raise SettingError(
            f"{train.setting} leaves no document to train on, of {about['val']['documents']} that are not empty; set "
            "it to another, data.val_share lower, or say with data.separator where a document ends"
        )
    if about["val"]["documents"]:
        return
    if val is None:
        raise SettingError(
            f"data.val_share leaves none of {about['train']['documents']} documents in {train.setting} for validation; "
            "set it higher, say with data.separator where a document ends, or give the held-out text itself"
        )
    if dropped := about["val"]["dropped"]:
        raise SettingError(
            f"{val.setting} holds nothing but {dropped} documents that the training text has as well; set it to "
            "another, or data.drop_duplicates=false"
        )
    raise SettingError(f"{val.setting} holds no text, only empty documents; set it to another")


def open_side(folder: Path, about: Any, side: str, vocab_size: int) -> NDArray[Any]:
    """The tokens of "train" or "val", mapped from the file that `pack` made.

    Raises:
        SettingError: it is not as about.json says.
    """
    file = folder / f"{side}.bin"
    try:
        dtype, tokens, crc32 = np.dtype(about["dtype"]), about[side]["tokens"], about[side]["crc32"]
        size = file.stat().st_size
    except (OSError, KeyError, TypeError) as error:
        raise damaged(file, f"{type(error).__name__}: {' '.join(str(error).split())}") from None
    if vocab_size - 1 > np.iinfo(dtype).max:
        raise damaged(file, f"its {dtype.name} does not hold a vocabulary of {vocab_size}")
    if size != tokens * dtype.itemsize:
        raise damaged(file, f"it has {size} bytes, and {tokens} tokens of {dtype.name} have {tokens * dtype.itemsize}")
    ids = np.memmap(file, dtype, mode="r")
    if _crc32(ids) != crc32:
        raise damaged(file, "its content is not what was written")
    return ids


def _crc32(ids: NDArray[Any], step: int = 2**24) -> int:
    checksum = 0
    for begin in range(0, len(ids), step):
        checksum = zlib.crc32(ids[begin : begin + step].data, checksum)
    return checksum


class Blocks(Dataset):
    """Block i is the `length` tokens from i · length on, and as labels those from i · length + 1 on.

    Taken a batch at a time: (input_ids, labels), both int64 (B, length). What fills no whole block is left out.
    Documents end anywhere in a block, and a block begins anywhere in a document.

    Args:
        ids: a row of tokens.
        length: of a block.
    """

    def __init__(self, ids: NDArray[Any], length: int) -> None:
        self.ids, self.length = ids, length

    def __len__(self) -> int:
        return max(0, len(self.ids) - 1) // self.length

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """What a DataLoader calls for a whole batch."""
        span = self.length + 1
        rows = np.stack([self.ids[i * self.length : i * self.length + span] for i in indices])
        blocks = torch.from_numpy(rows.astype(np.int64))
        return blocks[:, :-1], blocks[:, 1:]

    def __reduce__(self) -> Any:  # a mapped file would travel to a worker with all that is in it
        if isinstance(self.ids, np.memmap):
            return _reopened, (type(self), self.ids.filename, self.ids.dtype, self.length)
        return super().__reduce__()


def _reopened(kind: Callable[..., Any], file: str, dtype: np.dtype, length: int) -> Any:
    return kind(np.memmap(file, dtype, mode="r"), length)


class TrainingBlocks(Blocks):
    """The same, asked for by (index, seed), as `EpochOrder` does; nothing of a block is random."""

    def __getitems__(self, keys: list[Any]) -> tuple[Tensor, Tensor]:
        return super().__getitems__([index for index, _ in keys])
