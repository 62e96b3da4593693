"""What a text is made of, and how documents are told apart and put on one side or the other."""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, Protocol


class Documents(Protocol):
    """Texts in an order that is always the same, each time that one iterates.

    Iterating raises SettingError, in one line, where they cannot be read.
    """

    setting: str  # what messages name: "data.root='…'"
    name: str
    identity: dict[str, Any]  # in JSON's types; another one where the documents may be others

    def __iter__(self) -> Iterator[str]: ...


def fingerprint(document: str) -> int:
    """64 bits of a document's text, whatever white space stands around it."""
    return int.from_bytes(blake2b(document.strip().encode(errors="replace"), digest_size=8).digest())


def is_held_out(key: int, share: float) -> bool:
    """Whether a document with this fingerprint is one of the `share` that is for validation.

    It depends on the text alone: copies of a document are on one side, and more documents move none.
    """
    return key < share * 2**64
