"""When an attack has succeeded. A criterion looks at the model's answer to what the attack returned.

The attack never decides for itself: a search asks its criterion on the way, to know when it may stop, and the
returned inputs are asked again at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Criterion(Protocol):
    """Decides success for the items of a batch.

    `rows` (B,) int64 says which items of the whole input the outputs belong to, so that a search may work on
    any subset.
    """

    def __len__(self) -> int: ...
    def met(self, outputs: Any, rows: torch.Tensor) -> torch.Tensor:
        """(B,) bool: is the attacker's goal reached for each output?"""
        ...

    def correct(self, outputs: Any, rows: torch.Tensor) -> torch.Tensor:
        """(B,) bool: is the model right? Items it gets wrong without an attack are skipped."""
        ...


class Verdicts:
    """What every attack's result says about its N items, from the two masks it holds."""

    success: torch.Tensor
    """(N,) bool, the criterion's verdict on what the attack returned."""
    skipped: torch.Tensor
    """(N,) bool, items that met the criterion, or were wrong, without an attack."""

    @property
    def attempted(self) -> torch.Tensor:
        """(N,) bool: items that needed an attack. The attack success rate is over these."""
        return ~self.skipped

    @property
    def survived(self) -> torch.Tensor:
        """(N,) bool: items that neither needed an attack nor fell to it. For a classifier their mean is the robust accuracy."""
        return ~(self.success | self.skipped)


def check_labels(name: str, labels: torch.Tensor) -> None:
    """Raise unless labels is a non-empty (N,) int64 tensor without negative entries."""
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"{name} must be an int64 tensor, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"{name} must have shape (N,) with N >= 1, got {tuple(labels.shape)}")
    if labels.min() < 0:
        raise ValueError(f"{name} must not be negative, got {int(labels.min())}")


@dataclass(frozen=True, eq=False)
class Misclassified:
    """The top logit is any class but the true one. labels: (N,) int64."""

    labels: torch.Tensor

    def __post_init__(self) -> None:
        check_labels("labels", self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def met(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return ~self.correct(outputs, rows)

    def correct(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return outputs.argmax(dim=-1) == self.labels[rows]


@dataclass(frozen=True, eq=False)
class ClassifiedAs:
    """The top logit is the attacker's target. targets, labels: (N,) int64, and never equal."""

    targets: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self) -> None:
        check_labels("targets", self.targets)
        check_labels("labels", self.labels)
        if self.targets.shape != self.labels.shape:
            raise ValueError(f"targets and labels must have one length, got {len(self.targets)} and {len(self.labels)}")
        if (self.targets == self.labels).any():
            raise ValueError("targets must differ from labels in every row: such an item would be won without an attack")

    def __len__(self) -> int:
        return len(self.labels)

    def met(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return outputs.argmax(dim=-1) == self.targets[rows]

    def correct(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return outputs.argmax(dim=-1) == self.labels[rows]
