"""Masks: how well one fits the truth, and when an attack on a segmenter has succeeded.

A segmenter's answer depends on the prompt. The criteria here hold it: to the search the model is the image encoder, its outputs
are embeddings, and each criterion decodes them at its own points.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F


class Decoder(Protocol):
    """The part of a segmenter that turns embeddings (B, C, h, w) and points (B, 2) into mask logits (B, S, S)."""

    def decode(self, embeddings: torch.Tensor, points: torch.Tensor) -> torch.Tensor: ...


def iou(masks: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Intersection over union of bool masks (..., S, S), in [0, 1]; two empty masks agree: 1."""
    if masks.dtype != torch.bool or truth.dtype != torch.bool:
        raise TypeError(f"masks and truth must be bool, got {masks.dtype} and {truth.dtype}")
    if masks.shape != truth.shape:
        raise ValueError(f"masks and truth must have one shape, got {tuple(masks.shape)} and {tuple(truth.shape)}")
    both, either = ((x.flatten(-2).sum(-1)) for x in (masks & truth, masks | truth))
    return torch.where(either == 0, 1.0, both / either.clamp(min=1))


def mask_error(logits: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """(B,) binary cross-entropy plus dice loss of mask logits (B, S, S): what a segmenter is trained to lower.

    The cross-entropy looks at pixels, the dice loss, 1 - 2 |A n B| / (|A| + |B|), at the mask as a whole: small objects count
    as much as large ones.
    """
    target = truth.to(logits.dtype)
    pixelwise = F.binary_cross_entropy_with_logits(logits, target, reduction="none").flatten(1).mean(1)
    soft = logits.sigmoid()
    overlap, total = (soft * target).flatten(1).sum(1), (soft + target).flatten(1).sum(1)
    return pixelwise + 1 - (2 * overlap + 1) / (total + 1)


def _check(points: torch.Tensor, truth: torch.Tensor) -> None:
    if not isinstance(truth, torch.Tensor) or truth.dtype != torch.bool:
        raise TypeError(f"truth must be a bool tensor, got {getattr(truth, 'dtype', type(truth).__name__)}")
    if truth.ndim != 3 or len(truth) == 0:
        raise ValueError(f"truth must have shape (N, S, S) with N >= 1, got {tuple(truth.shape)}")
    if not isinstance(points, torch.Tensor) or not points.is_floating_point():
        raise TypeError(f"points must be a float tensor, got {getattr(points, 'dtype', type(points).__name__)}")
    if points.shape != (len(truth), 2):
        raise ValueError(f"points must have shape ({len(truth)}, 2), one prompt for each mask, got {tuple(points.shape)}")


@dataclass(frozen=True, eq=False)
class MaskLost:
    """The mask at the prompt no longer fits the object: its IoU with the truth is below a threshold.

    segmenter: decodes the embeddings. points: (N, 2) x and y in pixels. truth: (N, S, S) bool. threshold: in (0, 1]; an
    item is right while its IoU reaches it.
    """

    segmenter: Decoder = field(repr=False)
    points: torch.Tensor
    truth: torch.Tensor
    threshold: float = 0.5

    def __post_init__(self) -> None:
        _check(self.points, self.truth)
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], got {self.threshold}")

    def __len__(self) -> int:
        return len(self.truth)

    def masks(self, embeddings: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(B, S, S) bool: the masks at the prompts of these items."""
        return self.segmenter.decode(embeddings, self.points[rows]) > 0

    def fit(self, embeddings: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """(B,) IoU of these items' masks with the truth."""
        return iou(self.masks(embeddings, rows), self.truth[rows])

    def met(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return ~self.correct(outputs, rows)

    def correct(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return self.fit(outputs, rows) >= self.threshold


@dataclass(frozen=True, eq=False)
class MaskRemoved(MaskLost):
    """The stricter goal: nearly nothing is left of the mask. An item is right while its IoU reaches `threshold`.

    left: largest share of the true object's area that the answer may still cover, in [0, 1).
    """

    left: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.left < 1:
            raise ValueError(f"left must lie in [0, 1), got {self.left}")

    def met(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        area, full = (x.flatten(1).sum(1) for x in (self.masks(outputs, rows), self.truth[rows]))
        return area <= self.left * full


@dataclass(frozen=True, eq=False)
class MaskMoved(MaskLost):
    """The mask at the prompt is the attacker's: its IoU with `target` reaches the threshold.

    target: (N, S, S) bool, such as the true mask shifted. An item is right while its mask fits the truth and not the target.
    """

    target: torch.Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.points, self.target)
        if self.target.shape != self.truth.shape:
            raise ValueError(f"target must have the shape of truth, got {tuple(self.target.shape)}")

    def met(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return iou(self.masks(outputs, rows), self.target[rows]) >= self.threshold

    def correct(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return super().correct(outputs, rows) & ~self.met(outputs, rows)
