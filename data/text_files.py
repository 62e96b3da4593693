"""Text in files: plain text and JSON lines, as they are or compressed."""

import bz2
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from data.datamodule import require
from data.text import TextDataModule
from stl.errors import SettingError
from stl.optional import optional

_OPENERS: dict[str, Callable[[Path], Any]] = {
    "": partial(open, mode="rb"),
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": lambda path: BufferedReader(optional("zstandard", str(path)).open(path, "rb")),  # it knows no lines itself
}
_EXPECTED = "*.txt or *.jsonl, or these with " + ", ".join(filter(None, _OPENERS))
_CHUNK = 2**22  # bytes


class FileDocuments:
    """The documents of one file, or of all text files below a folder, in the order of their paths.

    A `.jsonl` file has one JSON object a line, whose text stands under `key`. A `.txt` file is one document, or is cut
    into documents by `separator`. Everything is UTF-8. Hidden files and other endings are passed over.

    Files of the same names, sizes and times are taken for the same documents, wherever they are.

    Args:
        root: folder or file.
        setting: of which configuration `root` is the value.

    Raises:
        SettingError: there is no such file; while reading, if one is damaged, or is not of this form.
    """

    def __init__(self, root: str, *, key: str = "text", separator: str | None = None, setting: str = "root") -> None:
        require(bool(root), setting, root, "a file or a folder of text")
        require(bool(key), "key", key, "the name under which JSON lines hold the text")
        require(separator is None or bool(separator), "separator", separator, "what stands between documents, or null")
        path = Path(os.path.abspath(os.path.expanduser(root)))
        self.setting = f"data.{setting}={str(path)!r}"
        self.name = path.name.split(".")[0] if path.is_file() else path.name
        self.key, self.separator = key, separator
        self._files = self._find(path)
        stats = {name: file.stat() for name, file in self._files.items()}
        self.identity = {
            "files": {name: [stat.st_size, int(stat.st_mtime)] for name, stat in stats.items()},
            "key": key,
            "separator": separator,
        }

    def _find(self, path: Path) -> dict[str, Path]:
        if not path.exists():
            raise self._wrong(f"does not exist: expected a file or a folder with {_EXPECTED}")
        if path.is_file():
            if _ending(path) is None:
                raise self._wrong(f"is neither a folder nor a text file: expected {_EXPECTED}")
            return {path.name: path}
        found = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
        texts = {
            name.as_posix(): found[name]
            for name in sorted(found)
            if _ending(name) is not None and not any(part.startswith(".") for part in name.parts)
        }
        if not texts:
            raise self._wrong(f"{'holds no text file' if found else 'is empty'}: expected {_EXPECTED}")
        return texts

    def _wrong(self, what: str) -> SettingError:
        return SettingError(f"{self.setting} {what}; set it to another file or folder")

    def __iter__(self) -> Iterator[str]:
        for path in self._files.values():
            kind, packing = _ending(path) or ("", "")
            try:
                with _OPENERS[packing](path) as file:
                    yield from self._lines(path, file) if kind == ".jsonl" else self._cut(path, file)
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:  # gzip's own is an OSError
                raise self._damaged(path, str(error) or type(error).__name__) from error
            except Exception as error:
                if type(error).__name__ == "ZstdError":  # of a package that may not be there
                    raise self._damaged(path, str(error)) from error
                raise

    def _damaged(self, place: Path | str, reason: str) -> SettingError:
        reason = " ".join(reason.split())
        return SettingError(f"{self.setting}: {place} cannot be read ({reason}); repair or remove it")

    def _lines(self, path: Path, file: IO[bytes]) -> Iterator[str]:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}, line {number},"
            try:
                entry = json.loads(line)
            except ValueError as error:  # also one that is not UTF-8
                raise self._damaged(place, f"not JSON: {error}") from None
            if not isinstance(entry, dict) or self.key not in entry:
                has = f"its keys are {', '.join(entry)}" if isinstance(entry, dict) else "it is no JSON object"
                raise SettingError(
                    f"data.key={self.key!r} is not in {place} ({has}); set data.key to the one that holds the text"
                )
            if not isinstance(entry[self.key], str):
                raise SettingError(
                    f"data.key={self.key!r} holds {entry[self.key]!r:.40} in {place} and no text; set data.key to the "
                    "one that holds it"
                )
            yield entry[self.key]

    def _cut(self, path: Path, file: IO[bytes]) -> Iterator[str]:
        try:
            if self.separator is None:
                yield file.read().decode()
                return
            rest = b""
            separator = self.separator.encode()
            while chunk := file.read(_CHUNK):
                *whole, rest = (rest + chunk).split(separator)
                yield from (document.decode() for document in whole)
            yield rest.decode()
        except UnicodeDecodeError as error:
            raise self._damaged(path, f"not UTF-8: {error}") from None


def _ending(path: Path) -> tuple[str, str] | None:
    """(".txt" or ".jsonl", the ending of its compression or ""), or None for other files."""
    packing = path.suffix if path.suffix in _OPENERS else ""
    kind = Path(path.name.removesuffix(packing)).suffix
    return (kind, packing) if kind in (".txt", ".jsonl") else None


class TextFiles(TextDataModule):
    """Text of your own; see `FileDocuments` for what is read, and `TextDataModule` for what becomes of it.

    Args:
        root: file or folder of the training text.
        val_root: that of the held-out text; None holds out `val_share` of the training documents.
        key: under which JSON lines hold the text.
        separator: what stands between the documents of a .txt file; None makes each file one document.
        **settings: those of `TextDataModule`.

    Raises:
        SettingError: there is no such text, or it is not of this form; all that `TextDataModule` raises.
    """

    def __init__(
        self,
        *,
        root: str,
        val_root: str | None = None,
        key: str = "text",
        separator: str | None = None,
        **settings: Any,
    ) -> None:
        train = FileDocuments(root, key=key, separator=separator)
        val = None if val_root is None else FileDocuments(val_root, key=key, separator=separator, setting="val_root")
        super().__init__(train=train, val=val, **settings)
