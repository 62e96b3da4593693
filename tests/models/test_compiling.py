"""The setting compile: which modes there are, and that accumulated gradients are safe from CUDA graphs."""

import pytest
import torch
from running import QUICK, TIMES, run
from torch import nn

from models.compiling import compile_model
from stl import SettingError


@pytest.fixture
def compiled(monkeypatch) -> list[tuple[nn.Module, str]]:
    """What was compiled, and how; without the minute that a compiler takes."""
    calls: list[tuple[nn.Module, str]] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, mode: calls.append((module, mode)))
    return calls


def test_a_mode_or_none(compiled):
    model = nn.Linear(2, 2)
    compile_model(model, None)
    compile_model(model, "reduce-overhead")
    assert compiled == [(model, "reduce-overhead")]


@pytest.mark.parametrize("mode", ["fast", True, False])
def test_an_unknown_mode_gets_one_line(mode):
    with pytest.raises(SettingError, match=f"compile={mode} is unknown; choose one of default, reduce-overhead, or"):
        compile_model(nn.Linear(2, 2), mode)


def test_accumulated_gradients_stand_in_tensors_of_their_own(compiled, tmp_path, monkeypatch):
    gradients: list[list[torch.Tensor]] = []  # of each step; kept, so that no tensor takes the place of another
    step = torch.optim.AdamW.step

    def watched(self, *rest, **options):
        result = step(self, *rest, **options)
        gradients.append([p.grad for group in self.param_groups for p in group["params"]])
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    words = [*QUICK, "trainer.limit_train_batches=6", "data.device_batch_size=4", "callbacks.checkpoint=null"]
    plain = run(tmp_path / "plain", *words)
    assert not any(first is last for first, last in zip(gradients[0], gradients[-1], strict=True))
    gradients.clear()
    graphs = run(tmp_path / "graphs", *words, "compile=reduce-overhead")
    assert all(first is last for first, last in zip(gradients[0], gradients[-1], strict=True))
    assert {key: graphs[key] for key in graphs if key not in {*TIMES, "overrides"}} == {
        key: plain[key] for key in plain if key not in {*TIMES, "overrides"}
    }
    assert [mode for _, mode in compiled] == ["reduce-overhead"] * len(compiled)
    assert compiled
