"""scripts/export_llm.py and lm_eval_tasks.py: what a run learned, in a folder, and handed to the harness."""

import json
import sys
from types import ModuleType, SimpleNamespace

import benchmarking
import export_llm
import lm_eval_tasks
import pytest
import torch
from llamas import SIZES
from running import QUICK, run
from texts import stories

from models.low_rank import LowRankLinear
from models.monarch import MonarchLinear
from models.sparse24 import Sparse24Linear
from stl import SettingError


def call(monkeypatch, program, *words) -> None:
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, words)])
    program.main()


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("text")
    (folder / "all.txt").write_text("|".join(stories(0, 60)))
    data = [f"data.root={folder}", "data.separator='|'", "data.val_share=0.1", "data.length=9", "data.num_workers=0"]
    data += [f"data.packed={folder / 'packed'}", "trainer.precision=32-true", "logger=csv"]
    return [*QUICK, *data, *(f"model.{key}={value}" for key, value in {**SIZES, "num_hidden_layers": 1}.items())]


@pytest.mark.parametrize(
    "own",
    [
        ["experiment=llm/small_stl", "model.calibration=0", "data.tokenizer=bpe", "data.bpe_vocab_size=280"],
        ["experiment=llm/small_dense", "data.tokenizer=bpe", "data.bpe_vocab_size=280"],
        ["experiment=llm/small_sparse24", "model.calibration=0", "linear.pruning=magnitude", "data.tokenizer=bytes"],
        ["experiment=llm/small_dense", "linear=low_rank", "data.tokenizer=bytes", "model.merged=true"],
        ["experiment=llm/small_dense", "linear=monarch", "data.tokenizer=bytes"],
    ],
    ids=["stl", "dense", "sparse24", "low_rank", "monarch"],
)
def test_a_folder_gives_what_the_run_learned(own, words, tmp_path, monkeypatch, capsys):
    import transformers

    run(tmp_path / "run", *words, *own)
    call(monkeypatch, export_llm, tmp_path / "run", "--out", tmp_path / "folder")
    model, data = export_llm.trained(tmp_path / "run")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    ids = data.sample(2)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)
    for config in (again.config, again.generation_config):
        assert [config.bos_token_id, config.eos_token_id] == [data.tokenizer.end] * 2
    assert type(again) is (type(model) if own[0].endswith("stl") else transformers.LlamaForCausalLM)
    assert ("without a tokenizer" in capsys.readouterr().out) == ("data.tokenizer=bytes" in own)
    if "data.tokenizer=bpe" in own:
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "folder")
        assert tokenizer("so it goes")["input_ids"] == data.tokenizer.encode(["so it goes"])[0]
        assert tokenizer.eos_token_id == again.config.eos_token_id
        harness(monkeypatch, tmp_path, type(again))


def test_a_dense_folder_is_one_to_begin_with(words, tmp_path, monkeypatch):
    words = [*words, "experiment=llm/small_dense", "data.tokenizer=bytes"]
    run(tmp_path / "run", *words)
    call(monkeypatch, export_llm, tmp_path / "run", "--out", tmp_path / "folder")
    run(tmp_path / "again", *words, f"model.weights={tmp_path / 'folder'}", "optimizer.lr=1e-12")
    one, other = (export_llm.trained(tmp_path / name)[0].state_dict() for name in ("run", "again"))
    torch.testing.assert_close(other, one)


@pytest.mark.parametrize("kind", [Sparse24Linear, LowRankLinear, MonarchLinear])
def test_layers_that_are_a_matrix_become_it_with_their_bias(kind):
    torch.manual_seed(0)
    model = torch.nn.Sequential(kind(11, 7))
    torch.nn.init.normal_(model[0].bias)
    x = torch.randn(5, 11)
    wanted = model(x)
    export_llm.densify(model)
    assert type(model[0]) is torch.nn.Linear
    torch.testing.assert_close(model(x), wanted)


def test_layers_that_are_no_matrix_are_refused(words, tmp_path, monkeypatch):
    run(tmp_path / "run", *words, "experiment=llm/small_dense", "linear=dense_mixer", "data.tokenizer=bytes")
    with pytest.raises(SettingError, match=r"^linear=dense_mixer is no layer that transformers knows; export a run"):
        call(monkeypatch, export_llm, tmp_path / "run", "--out", tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def harness(monkeypatch, tmp_path, kind) -> None:
    """A stand-in for lm-evaluation-harness gets the model, and its results are kept."""
    wrapped = SimpleNamespace(__file__="here", HFLM=lambda **given: given)

    def simple_evaluate(model, tasks, limit):
        assert isinstance(model["pretrained"], kind)
        assert (model["batch_size"], tasks, limit) == (16, ["one", "two"], 5)
        return {"results": {"one": {"acc": 0.5}}}

    package = ModuleType("lm_eval")
    package.__file__, package.__path__, package.simple_evaluate = "here", [], simple_evaluate
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.models", SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", wrapped)
    out = tmp_path / "scores.json"
    call(
        monkeypatch,
        lm_eval_tasks,
        tmp_path / "folder",
        "--tasks",
        "one",
        "two",
        "--limit=5",
        "--device=cpu",
        f"--out={out}",
    )
    assert json.loads(out.read_text())["results"] == {"one": {"acc": 0.5}}


def test_what_is_missing_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(SettingError, match=r"has no config.json; give a folder of scripts/export_llm.py"):
        call(monkeypatch, lm_eval_tasks, tmp_path, "--tasks", "one")
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SettingError, match=r"lm_eval_tasks.py needs the package lm_eval \(.*\): pip install lm-eval$"):
        call(monkeypatch, lm_eval_tasks, tmp_path, "--tasks", "one")
    monkeypatch.setattr(sys, "argv", ["export_llm.py", str(tmp_path), "--out=x"])
    with pytest.raises(SystemExit, match=r"^error: checkpoint '.*last.ckpt' does not exist"):
        benchmarking.run_main(export_llm.main)
