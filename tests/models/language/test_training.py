"""Language models as train.py trains them: every experiment, going on after an interruption, and wrong settings."""

import csv
import json
import re
import shutil
import sys
from math import exp
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from llamas import SIZES
from running import CONFIGS, QUICK, TIMES, evaluate, run
from texts import stories

import eval as evaluation
from stl import SettingError

EXPERIMENTS = sorted(path.stem for path in CONFIGS.glob("experiment/llm/*_*.yaml"))


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """A small LLaMA on small texts."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("text")
    (folder / "all.txt").write_text("|".join(stories(0, 90)))
    sizes = {"max_position_embeddings": 64, **SIZES, "num_hidden_layers": 1}
    return [
        *QUICK,
        f"data.root={folder}",
        "data.separator='|'",
        "data.val_share=0.1",
        "data.tokenizer=bytes",
        "data.length=18",
        f"data.packed={folder / 'packed'}",
        "data.num_workers=0",
        "data.device_batch_size=4",
        "trainer.precision=32-true",
        "logger=csv",
        *(f"model.{key}={value}" for key, value in sizes.items()),
    ]


@pytest.fixture(scope="module")
def dense(words, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    run(folder, "experiment=llm/small_dense", *words, "trainer.limit_train_batches=6", "trainer.max_epochs=2")
    return folder


@pytest.fixture(scope="module")
def pretrained(dense, tmp_path_factory) -> Path:
    """The same, untied, in a folder of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=257, rms_norm_eps=1e-5, **{**SIZES, "num_hidden_layers": 1})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_takes_one_step_from_trained_weights(experiment, words, dense, pretrained, tmp_path):
    own = [f"model.weights={dense / 'checkpoints' / 'last.ckpt'}"]
    if experiment.startswith("tinyllama"):
        own = ["data=text", f"model.weights={pretrained}", "model.vocab_size=257"]
    kind = experiment.split("_")[1]
    if kind != "dense":
        own += ["model.linear_groups=[attention]"]
    if not experiment.endswith(("dense", "exact")):
        own += ["model.calibration=8"]
    summary = run(tmp_path, f"experiment=llm/{experiment}", *words, *own)
    assert summary["linear"]["type"] == kind
    assert summary["perplexity"] == pytest.approx(exp(summary["val_loss"]))
    rows = json.loads((tmp_path / "flops.json").read_text())["layers"]
    assert summary["macs"]["total"] == sum(row["macs"] for row in rows)
    assert sum(row["kind"] == kind for row in rows) == {"dense": 8}.get(kind, 4)
    assert summary["flop_factor"]["core"] == (64 / summary["linear"]["rank"] if kind == "stl" else 1)


def test_the_configured_sizes_of_tinyllama_are_those_of_its_own_file():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("train", ["experiment=llm/tinyllama_dense"])
    assert cfg.data._target_ == "data.hub_text.HubText"
    model = {key: cfg.model[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    assert model == {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22}
    assert (cfg.model.num_attention_heads, cfg.model.num_key_value_heads) == (32, 4)
    assert (cfg.model.max_position_embeddings, cfg.model.rms_norm_eps) == (2048, 1e-5)
    assert cfg.model.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_the_run_folder_holds_what_scripts_rely_on(dense):
    summary = json.loads((dense / "summary.json").read_text())
    keys = {
        "dataset",
        "model",
        "linear",
        "perplexity",
        "val_loss",
        "params",
        "macs",
        "dense_macs",
        "flop_factor",
        "epochs",
    }
    assert keys < set(summary)
    assert summary["tokens_per_second"] > 0
    assert summary["versions"]["transformers"]
    assert {"top1", "images_per_second"}.isdisjoint(summary)
    rows = list(csv.DictReader((dense / "metrics.csv").open()))
    assert {"epoch", "step", "train_loss", "val_loss", "perplexity"} <= set(rows[0])
    losses = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("kind", "merged"), [("stl", True), ("sparse24", False)])
def test_a_run_that_was_stopped_ends_as_it_would_have_without_the_dense_weights(kind, merged, words, dense, tmp_path):
    weights = shutil.copy(dense / "checkpoints" / "last.ckpt", tmp_path / "dense.ckpt")
    own = ["trainer.max_epochs=2", "trainer.limit_train_batches=4", "callbacks.checkpoint.every_steps=3"]
    own += [f"model.weights={weights}", "model.calibration=8", "model.linear_groups=[mlp]"]
    own += ["callbacks.checkpoint.keep=9", f"experiment=llm/small_{kind}", f"model.merged={merged}"]
    whole = run(tmp_path / "whole", *words, *own)
    names = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").glob("0*.ckpt"))
    middle = tmp_path / "stopped" / "checkpoints" / names[len(names) // 2]
    middle.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / "checkpoints" / middle.name, middle)
    weights.unlink()
    again = run(tmp_path / "stopped", *words, *own)
    assert {k: v for k, v in again.items() if k not in TIMES} == {k: v for k, v in whole.items() if k not in TIMES}
    one, other = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "stopped")
    )
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_checkpoint_is_evaluated(words, dense, capsys):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("eval", [f"ckpt={dense / 'checkpoints' / 'last.ckpt'}", "latency.repeats=1", "accelerator=cpu"])
    figures, target = evaluation.evaluate(cfg)
    assert set(figures["latency_ms"]) == {"1", "32"}
    assert figures["perplexity"] == exp(figures["val_loss"])
    evaluation.show(figures, target)
    assert re.search(rf"perplexity +│ {figures['perplexity']:.3f}", capsys.readouterr().out)


@pytest.fixture
def changed(words, tmp_path) -> tuple[list[str], Path, dict]:
    """A run with a tokenizer learned from text that was then exchanged: its command line, folder and summary."""
    text, held_out = tmp_path / "text.txt", tmp_path / "val.txt"
    text.write_text("|".join(stories(0, 60)))
    held_out.write_text("|".join(stories(60, 90)))
    own = ["experiment=llm/small_dense", *words, f"data.root={text}", f"data.val_root={held_out}"]
    own += ["data.tokenizer=bpe", "data.bpe_vocab_size=270", "trainer.limit_val_batches=1.0"]
    summary = run(tmp_path / "run", *own)
    text.write_text("|".join(story.replace("so it goes", "quite another") for story in stories(0, 60)))
    return own, tmp_path / "run", summary


def test_a_tokenizer_learned_from_other_text_is_refused(changed, tmp_path):
    own, folder, _ = changed
    last = folder / "checkpoints" / "last.ckpt"
    message = r"has another vocabulary \(270 tokens, sha256 \w+\) than data.tokenizer \(270 tokens, sha256 \w+\); set"
    for word in (f"model.weights={last}", f"distillation.teacher={last}", f"ckpt_path={last}"):
        with pytest.raises(Exception, match=message):
            run(tmp_path / "other", *own, word)
    with pytest.raises(SettingError, match=message):
        run(folder, *own, "trainer.max_epochs=2")
    assert not (tmp_path / "other").exists()
    run(tmp_path / "other", *own, f"model.weights={last}", f"data.tokenizer={folder / 'tokenizer'}")


def test_a_checkpoint_is_evaluated_with_the_tokenizer_of_its_run(changed):
    _, folder, summary = changed
    last = folder / "checkpoints" / "last.ckpt"
    assert evaluate(last)["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(SettingError, match="has another vocabulary"):
        evaluate(last)


def test_distillation_learns_from_the_teachers_logits(words, dense, tmp_path):
    from models.language.distillation import Distillation
    from models.language.llama import STLLlamaConfig

    teacher = str(dense / "checkpoints" / "last.ckpt")
    words = [*words, "experiment=llm/small_stl", f"model.weights={teacher}", "model.calibration=0", "linear.rank=20"]
    without, with_ = run(tmp_path / "a", *words), run(tmp_path / "b", *words, f"distillation.teacher={teacher}")
    assert with_["val_loss"] != without["val_loss"]

    sizes = {**SIZES, "num_hidden_layers": 1, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    student = STLLlamaConfig(vocab_size=257, max_position_embeddings=64, **sizes)
    distil = Distillation(teacher, student=student, weight=0.25, temperature=2.0)
    ids, logits = torch.randint(256, (2, 5)), torch.randn(2, 5, 257)
    share, wanted = (logits / 2).softmax(-1), (distil._teacher(ids).logits / 2).softmax(-1)
    divergence = (wanted * (wanted.log() - share.log())).sum(-1).mean()
    torch.testing.assert_close(distil(torch.tensor(3.0), logits, ids), 0.75 * 3 + 0.25 * 4 * divergence)
    for wrong in ({"weight": 0}, {"temperature": 0.0}):
        with pytest.raises(SettingError, match=r"^distillation\.\w+=0.* must be"):
            Distillation(teacher, student=student, **wrong)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (["linear.basis=frame"], "tokens of a tile would see later ones; use basis='causal'"),
        (["model.linear_groups=[mpl]"], r"groups=\['mpl'\] must be some of attention, mlp, head"),
        (["model.calibration=8"], "model.calibration=8 needs trained weights; set model.weights as well"),
        (
            ["experiment=llm/small_dense", "model.weights={dense}", "model.calibration=8"],
            "fits nothing where all layers",
        ),
        (["model.vocab_size=100"], "model.vocab_size=100 is below the 257 tokens of data.tokenizer"),
        (["data.length=65"], "data.length=65 is above model.max_position_embeddings=64"),
        (["+model.width=3"], "model.width is no setting of transformers' LlamaConfig; remove it"),
        (["model.hidden_size=a"], "model: .*hidden_size"),
        (["model.merged=maybe"], "model.merged='maybe' must be true or false"),
        (["model.weights=a/b", "model.calibration=-3"], "model.calibration=-3 must be a whole number of sequences"),
        (["linear=low_rank"], r"^linear.basis.*: no setting of LowRankLinear; remove it with ~linear.basis"),
        (["model.weights=5"], "model.weights=5 must be a path, or a name on the Hugging Face hub"),
        (
            [
                "experiment=llm/small_sparse24",
                "model.weights={dense}",
                "model.calibration=8",
                "model.calibrate_basis=true",
            ],
            "model.calibrate_basis=True is for STL layers; set it to false",
        ),
        (["model.weights=/nowhere.ckpt"], "^model.weights='/nowhere.ckpt' does not exist; give the path of a .ckpt"),
        (["distillation.teacher=/no.bin"], "^distillation.teacher='/no.bin' does not exist; give the path of a .ckpt"),
        (
            ["model.weights=/nowhere"],
            r"^model.weights='/nowhere' cannot be loaded \(there is no such folder, and .*\); g",
        ),
        (
            ["distillation.teacher=/nowhere"],
            r"^distillation.teacher='/nowhere' cannot be loaded \(there is no such fol",
        ),
        (
            ["model.weights={dense}", "model.intermediate_size=40"],
            r"last.ckpt' has intermediate_size=36, model.intermediate_size is 40; make them agree",
        ),
        (["model.weights={dense}", "+model.hidden_act=gelu"], "has hidden_act=silu, model.hidden_act is gelu"),
        (["distillation.teacher={dense}", "model.num_attention_heads=2"], "has num_attention_heads=4"),
        (["model.weights={pretrained}"], "has tie_word_embeddings=False, model.tie_word_embeddings is True; make"),
        (
            ["experiment=llm/small_dense", "model.weights={dense}", "linear=low_rank"],
            "linear=LowRankLinear cannot begin with model.weights",
        ),
        (
            [
                "experiment=llm/small_sparse24",
                "model.weights={dense}",
                "model.calibration=8",
                "linear.pruning=magnitude",
            ],
            "model.calibration=8 fits nothing with linear.pruning=magnitude; set it to 0",
        ),
        (
            ["experiment=llm/small_sparse24", "model.weights={dense}"],
            "linear.pruning=wanda needs data; set model.calibration=64, or linear.pruning=magnitude",
        ),
        (["experiment=llm/small_sparse24"], "linear.pruning=wanda needs trained weights; set model.weights as well"),
        (["label_smoothing=0.1"], "label_smoothing=0.1 is for images"),
        (
            ["task=models.classification.ClassificationTask"],
            "ClassificationTask learns from images, and data=.* gives sequences; set a task, data and a model",
        ),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(own, message, words, dense, pretrained, tmp_path):
    places = {"dense": dense / "checkpoints" / "last.ckpt", "pretrained": pretrained}
    own = [word.format(**places) for word in own]
    if not own[0].startswith("experiment="):
        own = ["experiment=llm/small_stl", *own]
    if not any("calibration" in word for word in own):
        own = ["model.calibration=0", *own]
    with pytest.raises(Exception) as caught:  # noqa: PT011  # Hydra wraps what is raised while it builds
        run(tmp_path / "run", *words, *own)
    error = caught.value if isinstance(caught.value, SettingError) else caught.value.__cause__
    assert isinstance(error, SettingError)
    assert re.search(message, str(error))
    assert "\n" not in str(error)
    assert not (tmp_path / "run").exists()


def test_without_transformers_it_is_one_line(words, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = r"model.name='llama_small' needs the package transformers .*: pip install -r requirements-llm.txt"
    with pytest.raises(Exception, match=message):
        run(tmp_path / "run", "experiment=llm/small_dense", *words)
