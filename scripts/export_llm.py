"""Write the language model of a run as a folder that transformers reads, with its tokenizer where that has files.

    python scripts/export_llm.py outputs/llm/small_stl/… --out folder

    import models.language.llama  # STL layers; AutoModelForCausalLM then knows them
    AutoModelForCausalLM.from_pretrained("folder"), AutoTokenizer.from_pretrained("folder")

2:4 layers become dense ones with the zeros in them.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarking import run_main
from omegaconf import OmegaConf
from torch import nn

from data.text import TextDataModule
from models.checkpoint import load_checkpoint
from models.configured import restore
from models.sparse24 import Sparse24Linear
from stl import SettingError


def trained(run: Path) -> tuple[Any, TextDataModule]:
    """The model of the newest checkpoint in a run's folder, in evaluation mode, and its data.

    Raises SettingError where there is none, or the run trained no language model.
    """
    checkpoint, path = load_checkpoint(run / "checkpoints" / "last.ckpt")
    task, data, _ = restore(checkpoint, path, OmegaConf.create(checkpoint["config"]))
    if not isinstance(data, TextDataModule):
        raise SettingError(f"{run} trained no language model; give the folder of a run that did")
    return task.model.eval(), data


def densify(model: nn.Module) -> None:
    """A dense layer with its zeros in the place of every 2:4 layer, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, Sparse24Linear):
            dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            dense.load_state_dict({"weight": layer.pruned(), **({} if layer.bias is None else {"bias": layer.bias})})
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run that train.py ended")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    model, data = trained(arguments.run)
    densify(model)
    model.save_pretrained(arguments.out)
    save = getattr(data.tokenizer, "save", None)
    if save is not None:
        save(arguments.out)
    print(f"written to {arguments.out}{'' if save else ', without a tokenizer: bytes have no file'}")


if __name__ == "__main__":
    run_main(main)
