"""Streams of the hub: going on where they broke off, and what is said when that fails. The hub itself is not asked."""

import json
import sys
from types import SimpleNamespace

import pytest
from texts import stories

from data import hub_text
from data.hub_text import HubDocuments, HubText
from stl.errors import SettingError

TEXTS = stories(0, 50)


class Stream:
    """An IterableDataset as far as we use it, which breaks off at the given counts of what it has ever delivered."""

    def __init__(self, entries: list[dict], breaks: list[int], log: list) -> None:
        self.entries, self.breaks, self.log = entries, breaks, log
        self.place = 0

    def state_dict(self) -> dict:
        return {"place": self.place}

    def load_state_dict(self, state: dict) -> None:
        self.log.append(state["place"])
        self.place = state["place"]

    def __iter__(self):
        while self.place < len(self.entries):
            if self.breaks and self.place == self.breaks[0]:
                self.breaks.pop(0)
                raise ConnectionResetError("the peer\nwent away")
            self.place += 1
            yield self.entries[self.place - 1]


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for `datasets`: what it is asked, where its streams break off and go on, and the pauses between."""
    own = SimpleNamespace(asked=[], breaks=[], went_on=[], pauses=[], texts=TEXTS, errors=[])

    def load_dataset(*names, **options):
        own.asked.append((names, options))
        if own.errors:
            raise own.errors.pop(0)
        return Stream([{"text": text, "meta": {}} for text in own.texts], own.breaks, own.went_on)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, __file__="here"))
    monkeypatch.setattr(hub_text, "REMEMBERED", 10)
    monkeypatch.setattr(hub_text.time, "sleep", own.pauses.append)
    return own


def test_a_split_is_asked_for_as_a_stream(hub):
    assert list(HubDocuments("a/Text", "train", subset="en", revision="abc")) == TEXTS
    assert hub.asked == [(("a/Text", "en"), {"split": "train", "revision": "abc", "streaming": True})]
    assert HubDocuments("a/Text", "train").name == "text"


def test_a_stream_that_breaks_off_goes_on_where_it_was(hub, caplog):
    hub.breaks[:] = [3, 27, 28, 28, 28]
    hub.errors += [OSError("no route to host")] * 2
    assert list(HubDocuments("a/text", "train")) == TEXTS
    assert hub.went_on == [20, 20, 20, 20]
    assert hub.pauses == [1, 4, 1, 1, 1, 4, 16]
    assert "data.dataset='a/text' data.split='train' broke off after 27 documents, next attempt in 1 s" in caplog.text


def test_a_stream_that_never_begins_is_named(hub):
    hub.breaks[:] = [0] * 9
    with pytest.raises(
        SettingError, match=r"after 0 documents and 5 attempts: .*; repair the connection .* or give text"
    ):
        list(HubDocuments("a/text", "train"))


def test_a_stream_that_does_not_go_on_is_named(hub):
    hub.breaks[:] = [12] * 9
    with pytest.raises(SettingError) as caught:
        list(HubDocuments("a/text", "train"))
    assert str(caught.value) == (
        "data.dataset='a/text' data.split='train' cannot be read on after 12 documents and 5 attempts: the peer went "
        "away; repair the connection and start again, or set data.tokens to fewer"
    )
    assert hub.pauses == [1, 4, 16, 64]


def test_a_stream_that_has_become_shorter_is_named(hub, monkeypatch):
    hub.breaks[:] = [27]
    monkeypatch.setattr(hub_text.time, "sleep", lambda seconds: hub.texts.__delitem__(slice(10, None)))
    hub.texts = list(TEXTS)
    with pytest.raises(SettingError, match=r"ended after 20 documents when it was opened again, 27 had been read; it"):
        list(HubDocuments("a/text", "train"))


@pytest.mark.parametrize("error", [FileNotFoundError("none of\nthat name"), ValueError("Bad split: test")])
def test_what_the_hub_does_not_have_is_not_tried_again(hub, error):
    hub.errors.append(error)
    with pytest.raises(SettingError, match=r"data.dataset='a/text' data.split='test' cannot be opened \((none|Bad) "):
        list(HubDocuments("a/text", "test"))
    assert not hub.pauses


def test_a_column_that_is_not_there(hub):
    with pytest.raises(
        SettingError, match=r"data.key='body' is no column of text in .*, which has text, meta; set data.k"
    ):
        list(HubDocuments("a/text", "train", key="body"))
    assert not hub.pauses


def test_a_stream_is_read_as_far_as_the_budget_goes_and_packed_once(hub, tmp_path):
    hub.texts = stories(0, 30)
    settings = {"dataset": "a/Text", "tokens": 200, "val_share": 0.3, "length": 8, "packed": str(tmp_path)}
    source = HubText(**settings)
    assert (source.name, source.counts["train"]["tokens"]) == ("text", 200)
    HubText(**settings)
    assert len(hub.asked) == 1
    HubText(**settings, val_split="validation", drop_duplicates=False)
    splits = ["train", "validation", "train", "validation"]  # the held-out text is looked at before the other is read
    assert [options["split"] for _, options in hub.asked] == splits


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SettingError, match=r"data.split='train' needs the package datasets .*-r requirements-llm.txt$"):
        HubText(dataset="a/text", packed=str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_package_itself_streams_and_goes_on(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub_text, "REMEMBERED", 10)
    monkeypatch.setattr(hub_text.time, "sleep", lambda seconds: None)
    for part in range(3):
        lines = [json.dumps({"text": text, "meta": {"part": part}}) for text in stories(20 * part, 20 * part + 20)]
        (tmp_path / f"train-{part}.jsonl").write_text("\n".join(lines))
    documents = HubDocuments(str(tmp_path), "train")
    assert len(documents.identity["files"]) == len(list(tmp_path.glob("*.jsonl")))
    assert list(documents) == stories(0, 60)

    load, breaks = datasets.load_dataset, [5, 33, 35]

    def breaking(*names, **options):
        stream = load(*names, **options)

        def cut(entry, number):
            if breaks and entry["text"] == stories(0, 60)[breaks[0]]:
                breaks.pop(0)
                raise ConnectionResetError
            return entry

        return stream.map(cut, with_indices=True)

    monkeypatch.setattr(datasets, "load_dataset", breaking)
    assert list(documents) == stories(0, 60)
    assert not breaks
    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SettingError, match=r"cannot be opened \(Bad split: test\. Available splits: \['train'\]\)"):
        list(HubDocuments(str(tmp_path), "test"))
    with pytest.raises(SettingError, match=r"data.dataset='/nowhere' data.split='train' cannot be opened \("):
        list(HubDocuments("/nowhere", "train"))


def test_a_folder_that_has_changed_is_another_text(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    before = HubDocuments(str(tmp_path), "train").identity
    assert HubDocuments(str(tmp_path), "train").identity == before
    (tmp_path / "train.jsonl").write_text('{"text": "another"}\n')
    assert HubDocuments(str(tmp_path), "train").identity != before
