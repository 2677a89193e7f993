"""Judging a detector: its ROC curve, and how much it catches at a fixed false-positive rate.

A detector's score is larger for more suspicious inputs. Its threshold is set on clean inputs that are
held out from those it is judged on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from safescale_lib.measure.intervals import Interval, _flat, rate


@dataclass(frozen=True)
class Roc:
    """fpr, tpr: 1-D arrays of equal length, both rising from 0 to 1; auc: area under the curve in [0, 1]."""

    fpr: np.ndarray
    tpr: np.ndarray
    auc: float


def roc(clean: ArrayLike, attacked: ArrayLike) -> Roc:
    """ROC curve of a detector from its scores on clean and on attacked inputs; ties count half."""
    from sklearn.metrics import roc_auc_score, roc_curve

    negative, positive = _finite("clean", clean), _finite("attacked", attacked)
    truth = np.r_[np.zeros(negative.size), np.ones(positive.size)]
    scores = np.r_[negative, positive]
    fpr, tpr, _ = roc_curve(truth, scores)
    return Roc(fpr, tpr, float(roc_auc_score(truth, scores)))


def auc(clean: ArrayLike, attacked: ArrayLike, *, seed: int = 0, resamples: int = 1000) -> Interval:
    """Area under the ROC curve with a 95 % percentile bootstrap interval over both groups [efron1993bootstrap].

    It is the chance that an attacked input scores higher than a clean one; ties count half. n counts both groups.
    """
    negative, positive = _finite("clean", clean), _finite("attacked", attacked)
    dice = np.random.default_rng(seed)

    def area(a: np.ndarray, b: np.ndarray) -> float:
        a = np.sort(a)
        return float((np.searchsorted(a, b, "left") + np.searchsorted(a, b, "right")).mean() / (2 * a.size))

    drawn = [area(dice.choice(negative, negative.size), dice.choice(positive, positive.size)) for _ in range(resamples)]
    value = area(negative, positive)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, min(float(low), value), max(float(high), value), negative.size + positive.size)


def threshold_at_fpr(clean: ArrayLike, fpr: float) -> float:
    """The smallest observed threshold that flags at most a share fpr of the clean scores (flag: score > threshold)."""
    scores = np.sort(_finite("clean", clean))
    if not 0 <= fpr < 1:
        raise ValueError(f"fpr must lie in [0, 1), got {fpr}")
    allowed = min(int(np.floor(fpr * scores.size + 1e-9)), scores.size - 1)  # how many clean items may be flagged
    return float(scores[scores.size - 1 - allowed])


def tpr_at_fpr(clean_held_out: ArrayLike, attacked: ArrayLike, *, fpr: float) -> Interval:
    """Share of attacked inputs flagged when the threshold is set on held-out clean scores at this fpr."""
    return rate(_finite("attacked", attacked) > threshold_at_fpr(clean_held_out, fpr))


def _finite(name: str, scores: ArrayLike) -> np.ndarray:
    array = _flat(name, scores).astype(float)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must hold finite scores")
    return array
