"""Training of image classifiers."""

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from models.task import Task


class ClassificationTask(Task):
    """Cross-entropy training and top-1/top-5 validation on (images, labels) batches.

    Args:
        augment: (images, labels) → (images, soft targets), applied to training batches on their device.
        **settings: the further arguments of `Task`.
    """

    takes, headline, unit = "images", "top1", "images"

    def __init__(
        self,
        model: nn.Module,
        *,
        num_classes: int,
        label_smoothing: float = 0.0,
        augment: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        self.label_smoothing = label_smoothing
        self._augment = augment
        self.top1 = MulticlassAccuracy(num_classes, top_k=1, average="micro")
        self.top5 = MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro")

    @classmethod
    def configured(cls, cfg: Any, model: nn.Module, data: Any, **settings: Any) -> "ClassificationTask":
        return cls(
            model,
            num_classes=data.num_classes,
            label_smoothing=cfg.label_smoothing,
            augment=instantiate(cfg.augment, num_classes=data.num_classes) if cfg.augment else None,
            **settings,
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, targets = batch if self._augment is None else self._augment(*batch)
        return F.cross_entropy(self(images), targets, label_smoothing=self.label_smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        images, labels = batch
        logits = self(images)
        self.top1(logits, labels)
        self.top5(logits, labels)
        loss = F.cross_entropy(logits, labels)
        self.log("val_loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
        self.log("top1", self.top1, prog_bar=True, batch_size=len(images))
        self.log("top5", self.top5, batch_size=len(images))

    def figures(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Accuracies in percent."""
        return {
            "top1": 100 * float(metrics["top1"]),
            "top5": 100 * float(metrics["top5"]),
            "val_loss": float(metrics["val_loss"]),
        }
