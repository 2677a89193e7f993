"""What a search climbs: one number per item that rises as the criterion comes nearer.

An objective is a function (criterion, logits (B, classes), rows (B,)) -> (B,). It knows which way the criterion
points, so the same search serves untargeted and targeted attacks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from safescale_lib.measure.criteria import ClassifiedAs, Criterion, Misclassified

Objective = Callable[[Criterion, torch.Tensor, torch.Tensor], torch.Tensor]


def _class_and_sign(criterion: Criterion, rows: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The class the goal is about, and +1 to leave it or -1 to reach it."""
    if isinstance(criterion, Misclassified):
        return criterion.labels[rows], 1.0
    if isinstance(criterion, ClassifiedAs):
        return criterion.targets[rows], -1.0
    raise TypeError(f"criterion must be Misclassified or ClassifiedAs for this objective, got {type(criterion).__name__}")


def cross_entropy(criterion: Criterion, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the true class (to raise) or, negated, of the target class [madry2018pgd]."""
    classes, sign = _class_and_sign(criterion, rows)
    return sign * F.cross_entropy(logits, classes, reduction="none")


def margin(criterion: Criterion, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Best other logit minus the true one (or the target's lead): above 0 means reached [carlini2017cw].

    Unlike cross-entropy its gradient does not fade where the model is sure of itself.
    """
    classes, sign = _class_and_sign(criterion, rows)
    own = logits.gather(1, classes[:, None])[:, 0]
    best_other = logits.scatter(1, classes[:, None], float("-inf")).amax(dim=1)
    return sign * (best_other - own)
