"""Dense LLaMA weights from wherever they are."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoConfig, LlamaConfig

from models.checkpoint import UNSHAPED, check_vocabulary, load_checkpoint
from models.language.llama import STLLlamaConfig, STLLlamaForCausalLM
from models.language.llama2c import read_model
from stl import SettingError

# What two configurations must share for one's weights to be the other's.
SIZES: tuple[str, ...] = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", *UNSHAPED)
SIZES += ("attention_bias", "mlp_bias")


def read_weights(
    source: str,
    config: STLLlamaConfig | None = None,
    vocabulary: str | None = None,
    setting: str = "model.weights",
) -> STLLlamaForCausalLM:
    """The dense model, float32, of a checkpoint of train.py (.ckpt), a file of llama2.c (.bin), a folder, or the hub.

    Args:
        config: of what sizes it must be, and whether `merged`; None takes any.
        vocabulary: that of the data, which a checkpoint must share if it says its own.
        setting: of which `source` is the value, for messages.

    Raises SettingError where there is none, or it is of other sizes or tokens, or not dense.
    """
    if source.endswith(".ckpt"):
        model = _of_task(source, config, vocabulary, setting)
    else:
        model = read_model(source) if source.endswith(".bin") else _from_hub(source, setting)
        _check_sizes(f"{setting}={source!r}", model.config, config)
    if config is not None and config.merged:
        model.merge()
    elif config is not None:
        model.split()
    return model


def _check_sizes(what: str, own: Any, config: STLLlamaConfig | None) -> None:
    for key in SIZES if config is not None else ():
        if (theirs := getattr(own, key)) != (ours := getattr(config, key)):
            raise SettingError(f"{what} has {key}={theirs}, model.{key} is {ours}; make them agree")


def _from_hub(source: str, setting: str) -> STLLlamaForCausalLM:
    try:
        own = AutoConfig.from_pretrained(source)
        config = _dense(own)
        if config is not None:
            return STLLlamaForCausalLM.from_pretrained(source, config=config, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error.__cause__, HFValidationError):
            reason = "there is no such folder, and no such name can be on the hub"
        raise SettingError(
            f"{setting}={source!r} cannot be loaded ({reason}); give a .ckpt or .bin file, a folder or a name on "
            "the Hugging Face hub"
        ) from error
    kind = "a LLaMA with STL layers" if isinstance(own, STLLlamaConfig) else f"a {type(own).__name__}"
    raise SettingError(f"{setting}={source!r} is {kind}; a dense LLaMA is needed")


def _dense(own: object) -> STLLlamaConfig | None:
    """A configuration as one of ours, where it is of a dense LLaMA."""
    if isinstance(own, STLLlamaConfig):
        return own if own.stl is None else None
    if type(own) is not LlamaConfig:
        return None
    return STLLlamaConfig(**{key: value for key, value in own.to_dict().items() if key != "model_type"})


def _of_task(source: str, config: STLLlamaConfig | None, vocabulary: str | None, setting: str) -> STLLlamaForCausalLM:
    """The model in a checkpoint of train.py."""
    checkpoint, file = load_checkpoint(Path(source))
    setting = f"{setting}={str(file)!r}"
    kind = checkpoint["config"]["linear"]["_target_"]
    if kind != "torch.nn.Linear":
        raise SettingError(f"{setting} has linear layers of {kind}; give one of linear=dense")
    check_vocabulary(checkpoint, file, vocabulary)
    state = checkpoint["state_dict"].items()
    weights = {key.removeprefix("model."): value for key, value in state if key.startswith("model.")}
    if (embedding := weights.get("model.embed_tokens.weight")) is None:
        raise SettingError(f"{setting} is of no language model; give one of task=models.language.task.LanguageTask")
    settings = checkpoint["config"]["model"].items()
    sizes = {key: value for key, value in settings if key in STLLlamaConfig.__dataclass_fields__}
    own = STLLlamaConfig(**{**sizes, "vocab_size": len(embedding)})
    _check_sizes(setting, own, config)
    model = STLLlamaForCausalLM(STLLlamaConfig.from_dict((config or own).to_dict() | {"merged": own.merged}))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise SettingError(f"{setting} does not fit: {reason}") from error
    return model
