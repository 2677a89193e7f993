"""How sure a measured number is: confidence intervals and paired tests, all by SciPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Interval(NamedTuple):
    """A value with the bounds of its confidence interval and the number of items n behind it."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _flat(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"{name} must be a non-empty 1-D sequence, got shape {array.shape}")
    return array


def rate(hits: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """Share of True in a 1-D boolean array, with Wilson's interval [wilson1927]."""
    array = _flat("hits", hits)
    if array.dtype != bool:
        raise TypeError(f"hits must be boolean, got {array.dtype}")
    k, n = int(array.sum()), array.size
    low, high = stats.binomtest(k, n).proportion_ci(confidence, method="wilson")
    return Interval(k / n, float(low), float(high), n)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    *,
    seed: int = 0,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> Interval:
    """A statistic of a 1-D sample with its percentile bootstrap interval [efron1993bootstrap].

    statistic takes (values, axis) like NumPy's reductions. A constant sample gets a zero-width interval.
    """
    array = _flat("values", values).astype(float)
    value = float(statistic(array, axis=-1))
    if np.ptp(array) == 0:
        return Interval(value, value, value, array.size)
    result = stats.bootstrap(
        (array,),
        statistic,
        n_resamples=resamples,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=max(1, 10_000_000 // array.size),
    )
    low, high = result.confidence_interval
    return Interval(value, float(low), float(high), array.size)


def paired_test(first: ArrayLike, second: ArrayLike) -> float:
    """McNemar's exact two-sided p-value that two boolean outcomes on the same items have equal rates.

    Only the items on which the two disagree carry evidence [mcnemar1947].
    """
    a, b = _flat("first", first), _flat("second", second)
    if a.shape != b.shape:
        raise ValueError(f"first and second must pair up, got {a.size} and {b.size} items")
    if a.dtype != bool or b.dtype != bool:
        raise TypeError(f"first and second must be boolean, got {a.dtype} and {b.dtype}")
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)
