"""LLaMA as a configuration describes it: sizes, kind of linear layers, and the weights that it begins with."""

import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.language.groups import REPLACED, check_groups, patterns
from models.sparse24 import Sparse24Linear, input_norms
from stl import SettingError, STLLinear
from stl.optional import optional

if TYPE_CHECKING:
    from models.language.llama import STLLlamaForCausalLM


def build_llama(
    name: str,
    *,
    tokens: int,
    length: int,
    sample: Callable[[int], Tensor],
    linear: Callable[..., nn.Module] = nn.Linear,
    linear_groups: Sequence[str] = REPLACED,
    vocabulary: str | None = None,
    weights: str | None = None,
    calibration: int = 0,
    calibrate_basis: bool = False,
    restored: bool = False,
    **sizes: Any,
) -> "STLLlamaForCausalLM":
    """A LLaMA, float32, with `linear` in the place of the linear layers of `linear_groups`.

    Args:
        name: what tables call it.
        tokens, length: of the data: how many different tokens there are, and how many stand in a sequence.
        sample: makes token ids (B, length) of training text, for a number B of sequences.
        linear_groups: some of `models.language.groups.GROUPS`.
        vocabulary: of the data; `weights` of a checkpoint must have the same.
        weights: of a dense model to begin with: a checkpoint of train.py (.ckpt), a model of llama2.c (.bin), a folder
            or a name on the Hugging Face hub. None draws all weights. STL layers encode them, 2:4 layers prune them.
        calibration: sequences on which what replaces the dense layers is fitted to them: STL layers to their outputs
            (`stl.calibration`), the masks of 2:4 layers with pruning=wanda to the sizes of their inputs; on a GPU where
            there is one. 0 does not.
        calibrate_basis: fit encoders and decoders as well.
        restored: all its weights come from elsewhere afterwards; nothing is read or fitted.
        **sizes: of `STLLlamaConfig`; a `vocab_size` of None is that of the data.

    Raises:
        SettingError: transformers is not installed; the data have more tokens than the model, or longer sequences;
            weights that cannot be read, or are of other sizes or tokens; settings of the linear layers that do not go
            together.
    """
    optional("transformers", f"model.name={name!r}")
    from huggingface_hub.errors import StrictDataclassError

    from models.language.llama import STLLlamaConfig, STLLlamaForCausalLM
    from models.language.pretrained import read_weights

    if unknown := set(sizes) - set(STLLlamaConfig.__dataclass_fields__):
        raise SettingError(f"model.{min(unknown)} is no setting of transformers' LlamaConfig; remove it")
    try:
        config = STLLlamaConfig(**{**sizes, "vocab_size": sizes.get("vocab_size") or tokens})
    except (ValueError, StrictDataclassError) as error:
        raise SettingError(f"model: {' '.join(str(error).split())}") from error
    _check_heads(config)
    if tokens > config.vocab_size:
        raise SettingError(f"model.vocab_size={config.vocab_size} is below the {tokens} tokens of data.tokenizer")
    if length > config.max_position_embeddings:
        raise SettingError(
            f"data.length={length} is above model.max_position_embeddings={config.max_position_embeddings}"
        )
    for setting, switch in {"merged": config.merged, "calibrate_basis": calibrate_basis}.items():
        if not isinstance(switch, bool):
            raise SettingError(f"model.{setting}={switch!r} must be true or false")
    if isinstance(calibration, bool) or not (isinstance(calibration, int) and calibration >= 0):
        raise SettingError(f"model.calibration={calibration!r} must be a whole number of sequences, 0 or more")
    if restored:
        weights, calibration, calibrate_basis = None, 0, False
    keywords = dict(linear.keywords) if isinstance(linear, partial) else {}
    kind = linear.func if isinstance(linear, partial) else linear
    for setting, value in {"calibration": calibration, "calibrate_basis": calibrate_basis}.items():
        if value and weights is None:
            raise SettingError(f"model.{setting}={value} needs trained weights; set model.weights as well")
        if value and kind is nn.Linear:
            raise SettingError(f"model.{setting}={value} fits nothing where all layers are dense; leave it out")
    if kind is Sparse24Linear and calibrate_basis:
        raise SettingError("model.calibrate_basis=True is for STL layers; set it to false")
    if kind is Sparse24Linear and weights and not calibration and keywords.get("pruning") == "wanda":
        raise SettingError("linear.pruning=wanda needs data; set model.calibration=64, or linear.pruning=magnitude")
    if kind is Sparse24Linear and calibration and keywords.get("pruning") != "wanda":
        raise SettingError(f"model.calibration={calibration} fits nothing with linear.pruning=magnitude; set it to 0")
    check_groups(linear_groups, config.tie_word_embeddings)
    model = STLLlamaForCausalLM(config) if weights is None else read_weights(weights, config, vocabulary)
    batches = list(sample(calibration).split(8)) if calibration else None
    if batches is not None and torch.cuda.is_available():  # the model goes there later anyway, and this takes its time
        nn.Module.to(model, f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    if kind is STLLinear:
        model.convert(
            groups=list(linear_groups),
            from_dense=weights is not None,
            calibration=batches,
            calibrate_basis=calibrate_basis,
            **keywords,
        )
    elif kind is not nn.Linear:
        if kind is Sparse24Linear and keywords.get("pruning") == "wanda" and weights is None and not restored:
            raise SettingError("linear.pruning=wanda needs trained weights; set model.weights as well")
        _swap(model, patterns(linear_groups), linear, weights is not None, batches)
    return model.train() if batches is None else model.cpu().train()


def _check_heads(config: Any) -> None:
    """Raises SettingError where heads cannot be cut as the sizes say, which transformers finds out as it computes."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise SettingError(f"model.num_key_value_heads={groups} must divide model.num_attention_heads={heads}")
    if config.head_dim % 2:
        raise SettingError(
            f"model.hidden_size={config.hidden_size} with {heads} heads leaves each {config.head_dim} features; "
            "rotary positions need an even number"
        )


def _swap(
    model: nn.Module, include: list[str], linear: Callable[..., nn.Module], trained: bool, batches: list[Tensor] | None
) -> None:
    """Rivals in the place of linear layers, in place, drawn as they were or with their weights."""
    dense = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and any(fnmatchcase(name, pattern) for pattern in include)
    }
    norms = {} if batches is None else input_norms(model, dense, batches)
    for name, layer in dense.items():
        rival = linear(layer.in_features, layer.out_features, layer.bias is not None).to(layer.weight.device)
        if layer.weight.is_meta:
            pass  # to be counted only
        elif not trained:
            rival.reset_parameters(std=layer.weight.std(correction=0).item())  # type: ignore[operator]
        elif isinstance(rival, Sparse24Linear):
            rival.load_dense(layer.weight, layer.bias, norms.get(name))
        else:
            raise SettingError(f"linear={type(rival).__name__} cannot begin with model.weights; set them to null")
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, rival)
