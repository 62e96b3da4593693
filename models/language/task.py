"""Training of language models: the next token, validated by perplexity."""

from collections.abc import Mapping
from math import exp
from typing import Any

import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor, nn
from torchmetrics import MeanMetric

from models.language.distillation import Distillation
from models.task import Task
from stl import SettingError


class LanguageTask(Task):
    """Cross-entropy of the next token on (token ids, next ids) batches, both int64 (B, length).

    Args:
        distillation: what a dense model's logits add to the loss of training; None adds nothing.
        **settings: the further arguments of `Task`.
    """

    takes, headline, unit = "sequences", "perplexity", "tokens"
    packages = ("transformers",)

    def __init__(self, model: nn.Module, *, distillation: Distillation | None = None, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._distillation = distillation
        self.nll = MeanMetric()  # nats a token, of a whole validation

    @classmethod
    def configured(cls, cfg: Any, model: nn.Module, data: Any, **settings: Any) -> "LanguageTask":
        for setting in ("label_smoothing", "augment"):
            if cfg[setting]:
                raise SettingError(f"{setting}={cfg[setting]} is for images; leave it as it is in configs/train.yaml")
        student = {"student": model.config, "vocabulary": data.vocabulary}
        distillation = instantiate(cfg.distillation)(**student) if cfg.distillation.teacher else None
        return cls(model, distillation=distillation, **settings)

    @staticmethod
    def amount(batch: tuple[Tensor, Tensor]) -> int:
        return batch[0].numel()

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, length, vocabulary)."""
        return self.model(ids, use_cache=False).logits

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, targets = batch
        logits = self(ids)
        loss = cross_entropy(logits, targets)
        return loss if self._distillation is None else self._distillation(loss, logits, ids)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        ids, targets = batch
        self.nll.update(cross_entropy(self(ids), targets), targets.numel())

    def on_validation_epoch_end(self) -> None:
        loss = self.nll.compute()
        self.nll.reset()
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)  # the same on all devices
        self.log("perplexity", loss.exp(), prog_bar=True, sync_dist=True)

    def figures(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Perplexity: e to the loss, which is in nats a token."""
        loss = float(metrics["val_loss"])
        return {"perplexity": exp(loss), "val_loss": loss}


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over all tokens, in float32, in nats: logits (B, n, vocabulary), targets (B, n)."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
