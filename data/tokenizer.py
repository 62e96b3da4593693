"""From text to token ids and back: bytes, a byte-level BPE learned from the training text, or any from the hub."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data.made_once import Recipe, damaged, made_once
from data.progress import Progress
from stl.errors import SettingError
from stl.optional import optional

log = logging.getLogger(__name__)

END = "<|endoftext|>"  # of a BPE that is learned here
FILES = ("tokenizer.json", "tokenizer_config.json")  # of it
CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}  # in the second file


class Tokenizer(Protocol):
    vocab_size: int  # ids are below it
    vocabulary: str  # in a few words, the same where every id stands for the same text
    begin: int  # the id that generating begins with, where nothing is given to go on from
    end: int  # the id that stands behind every document
    identity: dict[str, Any]  # in JSON's types; another one where a text may get other ids

    def encode(self, texts: list[str]) -> list[Any]:
        """The ids of each text, sequences of numbers; nothing is added, and what looks like a special token is text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of these ids, without ends of text."""
        ...


class ByteTokenizer:
    """UTF-8: 256 bytes and the end of a text."""

    vocab_size, begin, end = 257, 256, 256
    vocabulary = "bytes"

    def __init__(self) -> None:
        self.identity: dict[str, Any] = {"kind": "bytes"}

    def encode(self, texts: list[str]) -> list[Any]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i != self.end).decode(errors="replace")


class HubTokenizer:
    """A tokenizer of `transformers`, by its name on the Hugging Face hub, or its folder.

    Raises SettingError where it cannot be loaded or has no end-of-text token.
    """

    def __init__(self, name: str) -> None:
        setting = f"data.tokenizer={name!r}"
        allowed = "set data.tokenizer to bytes, bpe, a folder or a name on the Hugging Face hub"
        path = os.path.expanduser(name)
        if path.startswith(("/", ".")) and not os.path.isdir(path):
            raise SettingError(f"{setting} does not exist; {allowed}")
        transformers = optional("transformers", setting)
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(path)
        except Exception as error:  # OSError, ValueError, ImportError, json's, tokenizers' own Exception …
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SettingError(f"{setting} cannot be loaded ({reason}); {allowed}") from error
        if self._tokenizer.eos_token_id is None:
            raise SettingError(f"{setting} has no end-of-text (eos) token, which separates documents; use another one")
        vocabulary = self._tokenizer.get_vocab()
        self.vocab_size = max(vocabulary.values()) + 1
        self.end = self._tokenizer.eos_token_id
        self.begin = self.end if self._tokenizer.bos_token_id is None else self._tokenizer.bos_token_id
        self.vocabulary = _vocabulary(vocabulary, self.end)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        content = backend.to_str() if backend else json.dumps(sorted(vocabulary.items()))
        self.identity = {"kind": "transformers", "sha256": hashlib.sha256(content.encode()).hexdigest()}

    def encode(self, texts: list[str]) -> list[Any]:
        options = {"add_special_tokens": False, "split_special_tokens": True, "return_attention_mask": False}
        return self._tokenizer(texts, **options, verbose=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Its files, as `transformers.AutoTokenizer` reads them."""
        self._tokenizer.save_pretrained(folder)


class BPETokenizer:
    """A byte-level BPE that `learn_bpe` or `save` left in a folder. Raises SettingError where the file is damaged."""

    def __init__(self, folder: Path) -> None:
        tokenizers = optional("tokenizers", "data.tokenizer='bpe'")
        self._folder, file = folder, folder / FILES[0]
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # it raises nothing more special
            raise damaged(file, " ".join(str(error).split())) from None
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.begin = self.end = self._tokenizer.token_to_id(END)
        self.vocabulary = _vocabulary(self._tokenizer.get_vocab(), self.end)
        self.identity = {"kind": "bpe", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}

    def encode(self, texts: list[str]) -> list[Any]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def save(self, folder: Path) -> None:
        """Its files, as `transformers.AutoTokenizer` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(self._folder / name, folder / name)


def is_learned(folder: Path) -> bool:
    """Whether the folder is one for `BPETokenizer`."""
    try:
        return json.loads((folder / FILES[1]).read_text()) == CONFIG
    except (OSError, ValueError):
        return False


def _vocabulary(ids: dict[str, int], end: int) -> str:
    content = json.dumps([end, sorted(ids.items())])
    return f"{len(ids)} tokens, sha256 {hashlib.sha256(content.encode()).hexdigest()[:16]}"


def learn_bpe(documents: Iterable[str], vocab_size: int, characters: int | None, recipe: Recipe, root: Path) -> Path:
    """The folder of a byte-level BPE, learned now if `root` has none of this recipe.

    `transformers.AutoTokenizer` reads it too. Where the text has too few words for `vocab_size`, the vocabulary is
    smaller, which is warned of.

    Args:
        documents: to learn from.
        vocab_size: the most tokens, the 256 bytes and the end of text among them.
        characters: of the documents that are read; None reads all.
        recipe: what the documents depend on.
        root: folder in which it is kept, under a name of its own.
    """
    tokenizers = optional("tokenizers", "data.tokenizer='bpe'")

    def make(folder: Path) -> dict[str, Any]:
        texts = Progress("reading text for the tokenizer").over(documents, characters)
        tokenizer = _learn(tokenizers, texts, vocab_size)
        if (size := tokenizer.get_vocab_size()) < vocab_size:
            log.warning("data.bpe_vocab_size=%d: the text gives no more than %d tokens", vocab_size, size)
        tokenizer.save(str(folder / FILES[0]))
        (folder / FILES[1]).write_text(json.dumps(CONFIG, indent=2) + "\n")
        return {"tokens": size}

    return made_once(root, "tokenizer", {"vocab_size": vocab_size, "characters": characters, **recipe}, make)[0]


def _learn(tokenizers: Any, texts: Iterator[str], vocab_size: int) -> Any:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Without halves of surrogate pairs, which JSON may hold; and no merges of pieces may spell the end of text.
    clean = (text.encode(errors="replace").decode().replace(END, " ") for text in texts)
    tokenizer.train_from_iterator(clean, trainer)
    return tokenizer
