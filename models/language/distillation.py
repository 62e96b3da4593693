"""Learning from a dense model's logits, beside the text: Hinton, Vinyals, Dean, arXiv 1503.02531."""

import copy
from math import isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stl import SettingError


class Distillation:
    """(1 − weight)·loss + weight·T²·KL(teacher ‖ student), both softened by the temperature T.

    Args:
        teacher: what `models.language.pretrained.read_weights` reads.
        student: its configuration; the teacher is dense and of the same sizes.
        vocabulary: of the data; a checkpoint must have the same.
        weight: from 0 (excluded) to 1.
        temperature: above 0.

    Raises:
        SettingError: a number is out of range; the teacher cannot be read, or is of other sizes or tokens.
    """

    def __init__(
        self,
        teacher: str,
        *,
        student: Any,
        vocabulary: str | None = None,
        weight: float = 0.5,
        temperature: float = 1.0,
    ) -> None:
        from models.language.pretrained import read_weights  # needs transformers

        if not 0 < weight <= 1:
            raise SettingError(f"distillation.weight={weight} must be a number above 0, at most 1")
        if not (temperature > 0 and isfinite(temperature)):
            raise SettingError(f"distillation.temperature={temperature} must be a positive number")
        self.weight, self.temperature = weight, temperature
        dense = copy.deepcopy(student)
        dense.stl = None
        # Not a child of the task: it is in no checkpoint, and no optimizer sees it.
        self._teacher: nn.Module = read_weights(teacher, dense, vocabulary, "distillation.teacher")
        self._teacher.requires_grad_(False).eval()

    def __call__(self, loss: Tensor, logits: Tensor, ids: Tensor) -> Tensor:
        """The loss to learn from, for the loss of the text, the student's logits (B, n, vocabulary) and ids (B, n)."""
        with torch.no_grad():
            wanted = self._teacher.to(ids.device)(ids, use_cache=False).logits
        wanted, own = ((x.flatten(0, 1).float() / self.temperature).log_softmax(-1) for x in (wanted, logits))
        divergence = F.kl_div(own, wanted, reduction="batchmean", log_target=True)
        return (1 - self.weight) * loss + self.weight * self.temperature**2 * divergence
