"""Intervals against closed forms and exact coverage; the paired test against the binomial written out."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from safescale_lib.measure.intervals import Interval, bootstrap, paired_test, rate

quick = settings(max_examples=100, deadline=None, derandomize=True)
booleans = st.lists(st.booleans(), min_size=1, max_size=200)


def hits(k, n):
    return np.arange(n) < k


@quick
@given(booleans, st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_rate_is_wilsons_closed_form(sample, confidence):
    k, n = sum(sample), len(sample)
    z, p = stats.norm.ppf((1 + confidence) / 2), k / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    found = rate(sample, confidence=confidence)
    assert found == pytest.approx((p, centre - half, centre + half, n), abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_rate_known_value():
    assert rate(hits(7, 10)) == pytest.approx((0.7, 0.3968, 0.8922, 10), abs=5e-5)
    assert rate(hits(0, 10))[:2] == (0, 0)
    assert rate(hits(10, 10)).high == 1


@pytest.mark.parametrize("n", [20, 100])
def test_rate_covers_the_truth_as_often_as_it_says(n):
    """Exact, no simulation: sum the binomial probabilities of all k whose interval holds p."""
    intervals = [rate(hits(k, n)) for k in range(n + 1)]
    low, high = np.array([i.low for i in intervals]), np.array([i.high for i in intervals])
    truths = np.linspace(0.05, 0.95, 91)
    coverage = [stats.binom.pmf(np.arange(n + 1), n, p)[(low <= p) & (p <= high)].sum() for p in truths]
    assert abs(np.mean(coverage) - 0.95) < 0.01
    assert min(coverage) > 0.90


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval():
    sample = np.random.default_rng(0).normal(3, 2, size=500)
    value, low, high, n = bootstrap(sample)
    half = 1.96 * sample.std(ddof=1) / math.sqrt(500)
    assert (value, n) == (pytest.approx(sample.mean()), 500)
    assert (value - low, high - value) == (pytest.approx(half, rel=0.1), pytest.approx(half, rel=0.1))
    wide, narrow = bootstrap(sample, confidence=0.99), bootstrap(sample, confidence=0.5)
    assert wide.high - wide.low > high - low > narrow.high - narrow.low


def test_bootstrap_covers_the_truth():
    rng, inside = np.random.default_rng(1), 0
    for _ in range(200):
        found = bootstrap(rng.exponential(1.0, size=80), resamples=200)
        inside += found.low <= 1.0 <= found.high
    assert 0.88 < inside / 200 < 0.99


def test_bootstrap_takes_any_statistic():
    sample = np.random.default_rng(2).normal(size=301)
    found = bootstrap(sample, np.median)
    assert found.value == np.median(sample)
    spread = math.sqrt(math.pi / 2 / 301)  # standard error of a normal sample's median
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.35)


def test_bootstrap_bounds_are_values_the_statistic_can_take():
    """Percentiles of resampled statistics: no resample has a maximum beyond the sample's own."""
    sample = np.random.default_rng(4).exponential(size=60)
    found = bootstrap(sample, np.max)
    assert found.value == found.high == sample.max()
    assert np.sort(sample)[-10] < found.low < sample.max()


def test_bootstrap_is_seeded_and_leaves_the_global_stream_alone():
    sample, before = np.arange(20.0), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert bootstrap(sample, seed=3) == bootstrap(sample, seed=3)
    assert bootstrap(sample, seed=3) != bootstrap(sample, seed=4)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


@quick
@given(st.floats(-1e6, 1e6), st.integers(1, 50))
def test_bootstrap_of_a_constant_has_no_width(value, n):
    found = bootstrap([value] * n)
    assert found.low == found.value == found.high == pytest.approx(value)
    assert found.n == n


@quick
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=120))
def test_paired_test_is_the_exact_sign_test(pairs):
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    b, c = sum(x and not y for x, y in pairs), sum(y and not x for x, y in pairs)
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1)) / 2 ** (b + c)
    assert paired_test(first, second) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)
    assert paired_test(second, first) == pytest.approx(paired_test(first, second))


def test_paired_test_by_hand():
    first = np.array([True] * 9 + [False] * 1 + [True] * 40)
    second = np.array([False] * 9 + [True] * 1 + [True] * 40)
    assert paired_test(first, second) == pytest.approx(2 * (1 + 10) / 1024)
    assert paired_test(first, first) == 1.0  # no disagreement, no evidence


def test_paired_test_errs_no_more_often_than_five_percent():
    rng = np.random.default_rng(5)
    false_alarms = [paired_test(rng.random(60) < 0.4, rng.random(60) < 0.4) < 0.05 for _ in range(400)]
    assert 0 < np.mean(false_alarms) < 0.065


@pytest.mark.parametrize("bad", [[], [[True]], True])
def test_not_a_sequence(bad):
    for call, name in (
        (lambda: rate(np.array(bad, dtype=bool)), "hits"),
        (lambda: bootstrap(np.array(bad, dtype=float)), "values"),
        (lambda: paired_test(np.array(bad, dtype=bool), [True]), "first"),
        (lambda: paired_test([True], np.array(bad, dtype=bool)), "second"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be a non-empty 1-D"):
            call()


def test_counts_are_not_mistaken_for_hits():
    with pytest.raises(TypeError, match="hits must be boolean"):
        rate([0, 1, 1])
    with pytest.raises(TypeError, match="first and second must be boolean"):
        paired_test([0, 1], [True, False])
    with pytest.raises(ValueError, match="first and second must pair up, got 2 and 3"):
        paired_test([True, False], [True, False, True])


def test_interval_in_words():
    assert str(Interval(0.5, 0.25, 0.75, 8)) == "0.500 [0.250, 0.750]"
