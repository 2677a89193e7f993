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


def dlr(criterion: Criterion, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Difference of logits ratio: the margin over a gap inside the answer itself [croce2020autoattack, eq. 6 and 7].

    Scaling all logits changes nothing, so a model cannot hide its gradient by being very sure of itself. For
    `Misclassified` the divisor is z_(1) - z_(3); for `ClassifiedAs` it is z_(1) - (z_(3) + z_(4)) / 2, and what rises
    is the target's lead over the true class. Raises ValueError for fewer than 3 (4) classes.
    """
    targeted = isinstance(criterion, ClassifiedAs)
    if logits.shape[-1] < 3 + targeted:
        raise ValueError(f"dlr needs logits of at least {3 + targeted} classes, got {logits.shape[-1]}")
    ranked = logits.topk(3 + targeted, dim=1).values  # (B, 3 or 4), largest first
    if isinstance(criterion, ClassifiedAs):
        own, goal = (logits.gather(1, classes[rows, None])[:, 0] for classes in (criterion.labels, criterion.targets))
        lead, scale = goal - own, ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2
    else:
        lead, scale = margin(criterion, logits, rows), ranked[:, 0] - ranked[:, 2]
    return lead / scale.clamp(min=1e-12)


def towards(targets: torch.Tensor, objective: Objective = dlr) -> Objective:
    """An objective that aims at one class per item, targets (N,) int64, though any wrong class would count.

    A search that tries several targets in turn finds ways out that the best wrong class of the moment hides.
    """

    def aimed(criterion: Criterion, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if not isinstance(criterion, Misclassified):
            raise TypeError(f"criterion must be Misclassified to be aimed, got {type(criterion).__name__}")
        return objective(ClassifiedAs(targets, criterion.labels), logits, rows)

    return aimed
