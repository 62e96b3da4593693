"""Small texts to pack, without files."""

from collections.abc import Sequence
from typing import Any

from data.text import TextDataModule


class Texts:
    """Documents in memory; counts how often they are read."""

    def __init__(self, texts: Sequence[str], name: str = "texts") -> None:
        self.texts, self.name, self.setting = list(texts), name, f"data.{name}"
        self.identity: dict[str, Any] = {"texts": self.texts}
        self.reads = 0

    def __iter__(self):
        self.reads += 1
        return iter(self.texts)


def stories(first: int, last: int) -> list[str]:
    return [f"story {i}: " + f"so it goes {i * i % 97} " * (i % 7) for i in range(first, last)]


def module(folder, **settings) -> TextDataModule:
    """Of bytes, in blocks of 16, with a held-out text of its own."""
    defaults = {
        "packed": str(folder),
        "train": Texts(stories(0, 60)),
        "val": Texts(stories(60, 70), "val"),
        "length": 16,
        "batch_size": 4,
    }
    return TextDataModule(**(defaults | settings))
