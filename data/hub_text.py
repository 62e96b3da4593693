"""Text data sets of the Hugging Face hub, SlimPajama among them, read as a stream."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.datamodule import require
from data.text import TextDataModule
from stl.errors import SettingError
from stl.optional import optional

log = logging.getLogger(__name__)

PAUSES = (1.0, 4.0, 16.0, 64.0)  # seconds before a stream that broke off without a new document is opened again
REMEMBERED = 1000  # documents between two places that a stream can go on from


class HubDocuments:
    """One split of a data set, in its order, through `datasets.load_dataset(…, streaming=True)`.

    A stream that breaks off is opened again and goes on behind the last document; `datasets` retries single requests
    itself. What a name on the hub stands for may change: only a `revision` pins it.

    Args:
        dataset: name on the hub, or a folder that `datasets` reads.
        split: of the data set.
        subset: the name of its configuration, where it has several.
        revision: commit, tag or branch on the hub.
        key: the column that holds the text.
        setting: of which configuration `split` is the value.

    Raises:
        SettingError: while reading, if there is no such data set, split or column, or the stream breaks off after all
            of `PAUSES` again.
    """

    def __init__(
        self,
        dataset: str,
        split: str,
        *,
        subset: str | None = None,
        revision: str | None = None,
        key: str = "text",
        setting: str = "split",
    ) -> None:
        require(bool(dataset), "dataset", dataset, "a name on the Hugging Face hub, or a folder")
        require(bool(split), setting, split, "a split of the data set, such as train")
        require(bool(key), "key", key, "the column that holds the text")
        self.setting = f"data.dataset={dataset!r} data.{setting}={split!r}"
        self.name = dataset.rstrip("/").rpartition("/")[2].lower()
        self.identity: dict[str, Any] = {
            "dataset": dataset,
            "split": split,
            "subset": subset,
            "revision": revision,
            "key": key,
        }
        if (folder := Path(dataset)).is_dir():  # what is in it may change as well
            files = {str(file.relative_to(folder)): file.stat() for file in sorted(folder.rglob("*")) if file.is_file()}
            self.identity["files"] = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}

    def __iter__(self) -> Iterator[str]:
        place: Any = None  # a state of the stream, and how many documents were done then
        done, failures = 0, 0
        while True:
            try:
                stream = self._open()
                if place:
                    stream.load_state_dict(place[0])
                seen = place[1] if place else 0
                for entry in stream:
                    seen += 1
                    if seen <= done:  # between that state and the break
                        continue
                    done, failures = done + 1, 0
                    if done % REMEMBERED == 0:
                        place = stream.state_dict(), done
                    yield self._text(entry)
                if seen < done:
                    raise SettingError(
                        f"{self.setting} ended after {seen} documents when it was opened again, {done} had been read; "
                        "it has changed meanwhile: pin data.revision, and start again"
                    )
                return
            except SettingError:
                raise
            except Exception as error:  # OSError, httpx's, aiohttp's, zstandard's …
                reason = " ".join(str(error).split()) or type(error).__name__
                if failures == len(PAUSES):
                    otherwise = "set data.tokens to fewer" if done else "give text of this machine, data=text"
                    raise SettingError(
                        f"{self.setting} cannot be read on after {done} documents and {1 + failures} attempts: "
                        f"{reason}; repair the connection and start again, or {otherwise}"
                    ) from error
                pause = PAUSES[failures]
                failures += 1
                what = f"{self.setting} broke off after {done} documents"
                log.warning("%s, next attempt in %g s: %s", what, pause, reason)
                time.sleep(pause)

    def _open(self) -> Any:
        datasets = optional("datasets", self.setting)
        what = self.identity
        try:
            return datasets.load_dataset(
                what["dataset"], what["subset"], split=what["split"], revision=what["revision"], streaming=True
            )
        except (FileNotFoundError, ValueError) as error:  # there is none; no further attempt will find one
            raise SettingError(
                f"{self.setting} cannot be opened ({' '.join(str(error).split())}); set data.dataset, data.subset and "
                "the split to what the hub has"
            ) from error

    def _text(self, entry: dict[str, Any]) -> str:
        key = self.identity["key"]
        if not isinstance(entry.get(key), str):
            raise SettingError(
                f"data.key={key!r} is no column of text in {self.setting}, which has {', '.join(entry)}; set data.key "
                "to the one that holds the text"
            )
        return entry[key]


class HubText(TextDataModule):
    """A text data set of the hub; see `HubDocuments` for how it is read, `TextDataModule` for what becomes of it.

    Args:
        dataset, subset, revision, key: see `HubDocuments`.
        split: the training text.
        val_split: the held-out text; None holds out `val_share` of the training documents.
        **settings: those of `TextDataModule`.

    Raises:
        SettingError: all that `HubDocuments` and `TextDataModule` raise.
    """

    def __init__(
        self,
        *,
        dataset: str,
        subset: str | None = None,
        revision: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        key: str = "text",
        **settings: Any,
    ) -> None:
        of: dict[str, Any] = {"subset": subset, "revision": revision, "key": key}
        train = HubDocuments(dataset, split, **of)
        val = None if val_split is None else HubDocuments(dataset, val_split, setting="val_split", **of)
        super().__init__(train=train, val=val, **settings)
