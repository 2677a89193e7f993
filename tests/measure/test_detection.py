"""Detectors: the area under the curve is a probability; a threshold keeps its promise on the scores it was set on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from safescale_lib.measure.detection import auc, roc, threshold_at_fpr, tpr_at_fpr
from safescale_lib.measure.intervals import rate

quick = settings(max_examples=60, deadline=None, derandomize=True)
# Few distinct values, so that ties are the rule; or any floats.
scores = st.lists(st.integers(-3, 3).map(float) | st.floats(-1e6, 1e6), min_size=1, max_size=40)


@quick
@given(scores, scores)
def test_auc_is_the_chance_that_an_attacked_score_beats_a_clean_one(clean, attacked):
    wins = sum((a > c) + 0.5 * (a == c) for a in attacked for c in clean)
    curve = roc(clean, attacked)
    assert curve.auc == pytest.approx(wins / (len(clean) * len(attacked)))
    assert curve.auc == pytest.approx(stats.mannwhitneyu(attacked, clean).statistic / (len(clean) * len(attacked)))
    assert curve.auc == pytest.approx(np.trapezoid(curve.tpr, curve.fpr))


@quick
@given(scores, scores)
def test_curve_rises_from_corner_to_corner_through_points_that_exist(clean, attacked):
    curve = roc(clean, attacked)
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)
    assert (np.diff(curve.fpr) >= 0).all()
    assert (np.diff(curve.tpr) >= 0).all()
    possible = {(np.mean(np.array(clean) >= t), np.mean(np.array(attacked) >= t)) for t in clean + attacked} | {(0, 0)}
    for point in zip(curve.fpr, curve.tpr, strict=True):
        assert any(np.allclose(point, p) for p in possible)


fprs = st.floats(0, 1, exclude_max=True) | st.sampled_from([0.01, 0.05, 0.1, 0.3, 1 / 3, 0.5, 1 - 1e-12])


@quick
@given(scores, fprs)
def test_threshold_is_the_smallest_that_keeps_the_promise(clean, fpr):
    threshold, n = threshold_at_fpr(clean, fpr), len(clean)

    def flagged(t):
        return sum(score > t for score in clean)

    assert flagged(threshold) <= fpr * n + 1e-9  # 3 of 10 is allowed at 0.3 even though 0.3 * 10 rounds
    assert threshold == min(t for t in clean if flagged(t) <= fpr * n + 1e-9)


def test_threshold_known_values():
    clean = np.arange(1.0, 101.0)[np.random.default_rng(0).permutation(100)]
    assert [threshold_at_fpr(clean, fpr) for fpr in (0, 0.01, 0.05, 0.5)] == [100, 99, 95, 50]
    assert threshold_at_fpr([1.0] * 10, 0.5) == 1.0  # ties: flags none rather than all


def test_tpr_counts_attacked_scores_above_the_threshold():
    clean = np.arange(100.0)
    attacked = np.r_[np.full(30, 94.0), np.full(70, 94.5)]  # the threshold at 5 % is 94
    found = tpr_at_fpr(clean, attacked, fpr=0.05)
    assert found == rate(attacked > 94)
    assert (found.value, found.n) == (0.7, 100)


def test_a_blind_detector_catches_what_it_flags_anyway():
    rng = np.random.default_rng(3)
    found = tpr_at_fpr(rng.normal(size=20_000), rng.normal(size=20_000), fpr=0.1)
    assert found.value == pytest.approx(0.1, abs=0.01)
    sharp = tpr_at_fpr(rng.normal(size=20_000), rng.normal(2, 1, size=20_000), fpr=0.1)
    assert sharp.value == pytest.approx(stats.norm.sf(stats.norm.isf(0.1) - 2), abs=0.02)


@pytest.mark.parametrize("fpr", [-0.1, 1.0, 2, float("nan")])
def test_fpr_outside_its_range(fpr):
    with pytest.raises(ValueError, match="fpr must lie in"):
        threshold_at_fpr([1.0, 2.0], fpr)


@pytest.mark.parametrize("bad", [[], [[1.0]], [1.0, float("nan")], [float("inf")]])
def test_bad_scores_are_named(bad):
    for call, name in (
        (lambda: roc(bad, [1.0]), "clean"),
        (lambda: roc([1.0], bad), "attacked"),
        (lambda: threshold_at_fpr(bad, 0.1), "clean"),
        (lambda: tpr_at_fpr([1.0], bad, fpr=0.1), "attacked"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must"):
            call()


@quick
@given(scores, scores)
def test_auc_with_its_interval_agrees_with_the_curve(clean, attacked):
    found = auc(clean, attacked, resamples=50)
    assert found.value == pytest.approx(roc(clean, attacked).auc)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.n == len(clean) + len(attacked)


def test_the_interval_of_an_auc_covers_the_truth_about_as_often_as_it_says():
    dice, hits = np.random.default_rng(0), 0
    truth = stats.norm.cdf(1 / np.sqrt(2))  # of two unit normals one apart
    for seed in range(100):
        found = auc(dice.normal(size=60), dice.normal(1, size=60), seed=seed, resamples=300)
        hits += found.low <= truth <= found.high
    assert 88 <= hits <= 99


def test_auc_of_a_useless_and_of_a_perfect_score():
    assert auc([1.0] * 20, [1.0] * 20)[:3] == (0.5, 0.5, 0.5)
    assert auc([0.0, 1.0], [2.0, 3.0])[:3] == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="attacked must hold finite"):
        auc([0.0], [np.nan])
