"""Dense LLaMA weights from wherever they are."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, LlamaConfig

from models.checkpoint import load_checkpoint
from models.language.llama import STLLlamaConfig, STLLlamaForCausalLM
from models.language.llama2c import read_model
from stl import SettingError

# What two configurations must share for one's weights to be the other's.
SIZES: tuple[str, ...] = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES += ("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "tie_word_embeddings")
SIZES += ("attention_bias", "mlp_bias")


def read_weights(source: str, config: STLLlamaConfig | None = None) -> STLLlamaForCausalLM:
    """The dense model, float32, of a checkpoint of train.py (.ckpt), a file of llama2.c (.bin), a folder, or the hub.

    Args:
        config: of what sizes it must be; needed for a .ckpt, which does not say.

    Raises SettingError where there is none, or it is of other sizes, or not dense.
    """
    if source.endswith(".bin"):
        model = read_model(source)
    elif source.endswith(".ckpt"):
        if config is None:
            raise SettingError(f"weights={source!r} say nothing of the model's sizes; give its configuration as well")
        model = STLLlamaForCausalLM(config)
        try:
            model.load_state_dict(_of_task(source))
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise SettingError(f"model.weights={source!r} does not fit: {reason}") from error
        return model
    else:
        model = _from_hub(source)
    for key in SIZES if config is not None else ():
        if (theirs := getattr(model.config, key)) != (ours := getattr(config, key)):
            raise SettingError(f"model.weights={source!r} has {key}={theirs}, model.{key} is {ours}; make them agree")
    return model


def _from_hub(source: str) -> STLLlamaForCausalLM:
    try:
        own = AutoConfig.from_pretrained(source)
        if type(own) is not LlamaConfig:
            raise SettingError(f"model.weights={source!r} is a {type(own).__name__}; a dense LLaMA is needed")
        settings = {key: value for key, value in own.to_dict().items() if key != "model_type"}
        config = STLLlamaConfig(**settings)
        return STLLlamaForCausalLM.from_pretrained(source, config=config, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise SettingError(
            f"model.weights={source!r} cannot be loaded ({reason}); give a .ckpt or .bin file, a folder or a name on "
            "the Hugging Face hub"
        ) from error


def _of_task(source: str) -> dict[str, Tensor]:
    """The state dict of the model in a checkpoint of train.py."""
    checkpoint, file = load_checkpoint(Path(source))
    kind = checkpoint["config"]["linear"]["_target_"]
    if kind != "torch.nn.Linear":
        raise SettingError(f"model.weights={str(file)!r} has linear layers of {kind}; give one of linear=dense")
    state = checkpoint["state_dict"].items()
    return {key.removeprefix("model."): value for key, value in state if key.startswith("model.")}
