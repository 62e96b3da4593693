"""LLaMA (Touvron et al., arXiv 2302.13971) as transformers has it, with STL layers as a part of its configuration."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from models.language.attention import adapt_masks
from models.language.cache import streaming
from models.language.groups import REPLACED, check_groups, patterns
from models.language.merged import merge_projections, split_projections
from stl import ConversionReport, SettingError, STLLinear, convert


class STLLlamaConfig(LlamaConfig):
    """LLaMA's configuration, `merged`: whether layers that read the same x are one (`models.language.merged`), and
    `stl`: the arguments of `STLLlamaForCausalLM.convert`, or None where all is dense."""

    model_type = "stl_llama"
    merged: bool = False
    stl: dict | None = None


class STLLlamaForCausalLM(LlamaForCausalLM):
    """LLaMA with STL layers where `config.stl` says so; without, it is transformers' own, and loads its weights.

    `save_pretrained` and `from_pretrained` keep it as it is. With a causal basis over tokens it streams: what its
    layers remember of unfinished tiles goes with the cache of keys and values, a DynamicCache that becomes an
    `STLCache`, so that `generate`, beam search and any caller with a cache get what one pass over all tokens gives, up
    to rounding; the cache's own methods choose and repeat sequences. With `row_axis="batch"` the sequences of a batch
    stand beside each other in tiles, repeated where there are too few, and get that only where they keep their places
    while a cache is used. Beam search moves them: unless the basis is exact, it gives other beams with a cache than
    without.

    Raises:
        SettingError: an unknown group, or one without layers of its own; all that `stl.convert` raises, as for a basis
        that is not causal with tiles over tokens. With a cache: one that is no DynamicCache, or whose tokens these
        layers have not all seen.
    """

    config_class = STLLlamaConfig

    def __init__(self, config: STLLlamaConfig) -> None:
        super().__init__(config)
        adapt_masks(self.model)
        if config.merged:
            merge_projections(self)
        if config.stl is not None:
            self._swap(**config.stl)

    @classmethod
    def from_pretrained(
        cls, *arguments: Any, output_loading_info: bool = False, ignore_mismatched_sizes: bool = False, **named: Any
    ) -> Any:
        """As that of `LlamaForCausalLM`. Raises SettingError, with both sides, where weights are of other sizes, where
        config.json has other STL layers than were saved, and where weights are missing."""
        read: Any = super().from_pretrained
        model, info = read(*arguments, output_loading_info=True, ignore_mismatched_sizes=True, **named)
        if info["mismatched_keys"] and not ignore_mismatched_sizes:
            key, theirs, ours = min(info["mismatched_keys"], key=str)
            raise SettingError(
                f"{key}: the folder has {tuple(theirs)}, the model {tuple(ours)}; make config.json agree"
            )
        model._check_layers(set(info["missing_keys"]))
        return (model, info) if output_loading_info else model

    def _check_layers(self, missing: set[str]) -> None:
        """Raises SettingError where STL layers are not those whose weights were read; of `missing` there were none."""
        for name, layer in self.named_modules():
            if isinstance(layer, STLLinear) and f"{name}.spec" not in missing:
                layer.check_spec(name)
            elif isinstance(layer, STLLinear):
                missing.remove(f"{name}.spec")
                layer.reset_spec()
        if missing:
            wants = "is of a model with it" if self.config.stl is None else f"has stl={self.config.stl}"
            raise SettingError(f"the folder has no {min(missing)}, and config.json {wants}; make it agree")

    def merge(self) -> None:
        """Make one layer of those that read the same x, in place, where that is not done yet.

        Raises SettingError for a converted model, whose layers have encoders of their own, and all that
        `merge_projections` raises.
        """
        self._change(True, merge_projections)

    def split(self) -> None:
        """`merge` undone, with the same errors."""
        self._change(False, split_projections)

    def _change(self, merged: bool, change: Callable[[nn.Module], None]) -> None:
        if self.config.stl is not None:
            raise SettingError(f"the model is converted already, stl={self.config.stl}; merge or split the dense one")
        if self.config.merged != merged:
            change(self)
            self.config.merged = merged

    def convert(
        self, *, from_dense: bool = True, calibration: Any = None, calibrate_basis: bool = False, **stl: Any
    ) -> ConversionReport:
        """Swap dense layers, in place; `config.stl` becomes `stl`.

        Args:
            from_dense, calibration, calibrate_basis: as in `stl.convert`; batches are token ids (B, n), int64.
            **stl: `groups`, some of `models.language.groups.GROUPS`, its `REPLACED` by default; `tile`, `rank`,
                `basis`, `row_axis`, `train_basis`, `start` and `train_weight` as in `stl.convert`, and `fill`, which is
                "copies" here.
        """
        if self.config.stl is not None:
            raise SettingError(f"the model is converted already, stl={self.config.stl}; convert a dense one")
        if "groups" in stl:
            stl["groups"] = list(stl["groups"])  # not a generator, which could be read only once
        report = self._swap(**stl, from_dense=from_dense, calibration=calibration, calibrate_basis=calibrate_basis)
        self.config.stl = stl
        return report

    def _swap(self, *, groups: Sequence[str] = REPLACED, fill: str = "copies", **settings: Any) -> ConversionReport:
        check_groups(groups, self.config.tie_word_embeddings)
        return convert(self, include=patterns(groups), causal=True, fill=fill, **settings)

    @can_return_tuple  # of the output as it is in the end
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As that of `LlamaForCausalLM`, with its arguments."""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        with self._stream(past_key_values):
            head = self.lm_head
            whole = isinstance(head, STLLinear) and head.row_axis == "tokens"  # its tiles are cut from all tokens
            output = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=0 if whole else logits_to_keep,
                **kwargs,
            )
        if whole and output.logits is not None:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            output.logits = output.logits[:, kept]
        return output

    def _stream(self, cache: Cache | None) -> Any:
        """What the layers remember beside this cache; nothing to enter where they remember nothing."""
        if cache is None or not any(_remembers(layer) for layer in self.modules()):
            return nullcontext()
        return streaming(cache, self)


def _remembers(module: nn.Module) -> bool:
    return isinstance(module, STLLinear) and module.row_axis == "tokens"


AutoConfig.register(STLLlamaConfig.model_type, STLLlamaConfig)
AutoModelForCausalLM.register(STLLlamaConfig, STLLlamaForCausalLM)
