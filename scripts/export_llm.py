"""Write the language model of a run as a folder that transformers reads, with its tokenizer where that has files.

    python scripts/export_llm.py outputs/llm/small_stl/… --out folder

    import models.language.llama  # only where layers are STL; AutoModelForCausalLM then knows them
    AutoModelForCausalLM.from_pretrained("folder"), AutoTokenizer.from_pretrained("folder")

Layers of 2:4, low rank and Monarch become dense ones that multiply with the same. Text begins and ends with the tokens
of data.tokenizer.
"""

from pathlib import Path
from typing import Any

import torch
from benchmarking import run_main
from command_line import command_line
from omegaconf import OmegaConf
from torch import nn

from data.text import TextDataModule
from data.tokenizer import Tokenizer
from models.checkpoint import load_checkpoint
from models.configured import restore
from models.low_rank import LowRankLinear
from models.monarch import MonarchLinear
from models.rival import RivalLinear
from models.sparse24 import Sparse24Linear
from stl import SettingError, encode_weights


def trained(run: Path) -> tuple[Any, TextDataModule]:
    """The model of the newest checkpoint in a run's folder, in evaluation mode, and its data.

    Raises SettingError where there is none, or the run trained no language model.
    """
    checkpoint, path = load_checkpoint(run / "checkpoints" / "last.ckpt")
    task, data, _ = restore(checkpoint, path, OmegaConf.create(checkpoint["config"]))
    if not isinstance(data, TextDataModule):
        raise SettingError(f"{run} trained no language model; give the folder of a run that did")
    return task.model.eval(), data


@torch.no_grad()
def densify(model: nn.Module) -> None:
    """A dense layer of the same matrix in the place of every rival, in place.

    Raises SettingError for a rival that is no matrix.
    """
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, RivalLinear):
            continue
        if not isinstance(layer, Sparse24Linear | LowRankLinear | MonarchLinear):
            raise SettingError(f"linear={layer.kind} is no layer that transformers knows; export a run of another kind")
        dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
            layer.bias = None
        dense.weight.copy_(layer(torch.eye(layer.in_features)).mT)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, dense)


def exportable(model: Any, tokenizer: Tokenizer) -> Any:
    """The model, as transformers' own where no layer is STL, which begins and ends text as the tokenizer does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    densify(model)
    if encode_weights(model):
        model.config.stl = model.config.stl | {"train_weight": "encoded"}
    if model.config.stl is None:
        model.split()
        ours = ("model_type", "merged", "stl")
        own = {key: value for key, value in model.config.to_dict().items() if key not in ours}
        plain = LlamaForCausalLM(LlamaConfig(**own))
        plain.load_state_dict(model.state_dict())
        model = plain.eval()
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.begin, tokenizer.end
    return model


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("run", type=Path, help="folder of a run that train.py ended")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    model, data = trained(arguments.run)
    exportable(model, data.tokenizer).save_pretrained(arguments.out)
    save = getattr(data.tokenizer, "save", None)
    if save is not None:
        save(arguments.out)
    print(f"written to {arguments.out}{'' if save else ', without a tokenizer: bytes have no file'}")


if __name__ == "__main__":
    run_main(main)
