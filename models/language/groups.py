"""Which linear layers of LLaMA belong together, by the names that they have."""

from collections.abc import Iterable

from stl import SettingError

GROUPS = {"attention": "model.layers.*.self_attn.*_proj", "mlp": "model.layers.*.mlp.*_proj", "head": "lm_head"}
REPLACED = ("attention", "mlp")  # unless others are asked for


def check_groups(groups: Iterable[str], tied: bool) -> None:
    """Raises SettingError for none, an unknown one, and for the head where it is `tied` to the embeddings."""
    chosen = list(groups)
    if not chosen or not set(chosen) <= set(GROUPS):
        raise SettingError(f"groups={chosen} must be some of {', '.join(GROUPS)}")
    if tied and "head" in chosen:
        raise SettingError(f"groups={chosen}: the head shares its weight with the embeddings; leave head out")


def patterns(groups: Iterable[str]) -> list[str]:
    """Shell-style patterns of the names of their layers."""
    return [GROUPS[group] for group in groups]
