"""Outcomes carry the whole evidence; a comparison holds beyond chance only; a claim can fail."""

import json
import math
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safescale_lib.measure import OUTCOME_MIME
from safescale_lib.measure.costs import Cost
from safescale_lib.measure.intervals import Interval, paired_test, rate
from safescale_lib.measure.outcomes import Comparison, Outcome, Outcomes, claim, robust_accuracy, table

quick = settings(max_examples=60, deadline=None, derandomize=True)
REQUIRED = {"technique", "metric", "value", "low", "high", "n", "control", "utility", "against", "cost", "seed"}


def outcome(value=0.5, low=0.4, high=0.6, n=100, **more):
    return Outcome(
        **{"technique": "a.b", "method": "PGD-20", "metric": "ASR", "measured": Interval(value, low, high, n)} | more
    )


def of(items, **more):
    """An outcome whose rate is that of its items."""
    return outcome(measured=rate(items), items=np.asarray(items), **more)


class Text(HTMLParser):
    """Well-formed HTML as text; every tag must close."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


# --- one outcome --------------------------------------------------------------------------------------------------


def test_json_carries_what_the_design_asks_for():
    full = outcome(control=0.0, utility=0.98765432, against="x.y", cost=Cost(3, 2, 1, 0.123), seed=7)
    carried = json.loads(json.dumps(full._repr_mimebundle_()[OUTCOME_MIME], allow_nan=False))
    assert set(carried) >= REQUIRED
    assert carried == {
        "technique": "a.b",
        "method": "PGD-20",
        "metric": "ASR",
        "value": 0.5,
        "low": 0.4,
        "high": 0.6,
        "n": 100,
        "control": 0.0,
        "utility": 0.987654,
        "against": "x.y",
        "cost": {"forwards": 3, "backwards": 2, "queries": 1, "seconds": 0.12},
        "seed": 7,
        "trained": False,
    }
    bare = outcome().as_json()
    assert set(bare) >= REQUIRED
    assert bare["control"] is bare["utility"] is bare["against"] is bare["seed"] is None


def test_json_takes_the_numbers_of_numpy_and_torch():
    mixed = outcome(
        np.float32(0.5), np.float32(0.25), np.float64(0.75), np.int64(9), control=torch.tensor(0.5), seed=np.int64(1)
    )
    carried = json.loads(json.dumps(mixed.as_json()))
    assert (carried["value"], carried["low"], carried["high"], carried["n"]) == (0.5, 0.25, 0.75, 9)
    assert (carried["control"], carried["seed"]) == (0.5, 1)


def test_card_shows_every_fact_but_the_seconds():
    cost = Cost(12_345, 678, 0, 98.76)
    bundle = outcome(control=0.01, utility=0.97, against="vfm.defense", cost=cost, seed=42)._repr_mimebundle_()
    text = " ".join(Text(bundle["text/html"]).words)
    for fact in (
        "0.500",
        "0.400 to 0.600",
        "100",
        "0.010",
        "0.970",
        "vfm.defense",
        "12,345 forwards",
        "678 backwards",
        "42",
        "a.b",
    ):
        assert fact in text
    for absent in ("98.76", "seconds", "queries"):
        assert absent not in text
    assert bundle["text/plain"] == "ASR 0.500 [0.400, 0.600] (n = 100), PGD-20"
    assert "without the attack" not in outcome()._repr_mimebundle_()["text/html"]


def test_html_is_escaped_everywhere():
    nasty = '<script>"x"</script>&'
    shown = (
        outcome(method=nasty, metric=nasty, technique=nasty, against=nasty),
        Outcomes(nasty, [outcome(method=nasty, metric=nasty)]),
        table(nasty, [nasty], [[nasty]]),
        claim(nasty, True, evidence=nasty),
    )
    for thing in shown:
        found = Text(thing._repr_mimebundle_()["text/html"])
        assert "script" not in found.tags
        assert nasty in "".join(found.words)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"technique": ""}, "technique must not be empty"),
        ({"method": ""}, "method must not be empty"),
        ({"metric": ""}, "metric must not be empty"),
        ({"value": 0.7}, "measured must hold low <= value <= high"),
        ({"value": 0.3}, "measured must hold"),
        ({"value": math.nan}, "measured must hold"),
        ({"low": math.nan}, "measured must hold"),
        ({"value": math.inf, "high": math.inf}, "measured must hold"),
        ({"n": 0}, "n >= 1"),
        ({"control": math.nan}, "control must be finite"),
        ({"utility": math.inf}, "utility must be finite"),
        ({"items": np.ones(99, bool)}, "items must hold n = 100 entries, got 99"),
    ],
)
def test_an_outcome_that_says_nothing_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        outcome(**wrong)


def test_robust_accuracy_counts_all_items():
    survived = torch.tensor([True] * 30 + [False] * 70)
    found = robust_accuracy(
        SimpleNamespace(survived=survived, cost=Cost(5)), technique="t", method="m", clean=0.9, against="d", seed=3
    )
    assert found.measured == rate(survived.numpy())
    assert (found.value, found.metric) == (0.3, "robust accuracy")
    assert (found.control, found.utility, found.against, found.cost, found.seed) == (0.9, 0.9, "d", Cost(5), 3)
    assert np.array_equal(found.items, survived.numpy())


# --- comparisons --------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_same_items_are_compared_in_pairs(pairs):
    first, second = (np.array(side) for side in zip(*pairs, strict=True))
    p, beyond = paired_test(first, second), paired_test(first, second) < 0.05
    below, above = of(first) < of(second), of(first) > of(second)
    assert bool(below) == (first.mean() < second.mean() and beyond)
    assert bool(above) == (first.mean() > second.mean() and beyond)
    assert f"n = {len(first)} pairs" in below.evidence
    assert (f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001") in below.evidence


def test_pairs_see_what_intervals_cannot():
    weak, strong = np.arange(100) < 50, np.arange(100) < 40  # ten items lost, none won
    assert of(strong) < of(weak)
    assert of(weak) > of(strong)
    assert not of(strong) > of(weak)  # beyond chance, but the other way
    assert not of(weak) < of(strong)
    assert not outcome(measured=rate(strong)) < outcome(measured=rate(weak))  # the intervals overlap


@quick
@given(*[st.lists(st.floats(0, 1), min_size=3, max_size=3).map(sorted)] * 2)
def test_other_items_need_intervals_that_do_not_meet(a, b):
    first, second = outcome(a[1], a[0], a[2]), outcome(b[1], b[0], b[2], n=50)
    assert bool(first < second) == (a[2] < b[0])
    assert bool(first > second) == (a[0] > b[2])
    assert (first < second).evidence == f"{first.measured} < {second.measured}, n = 100 and 50"


def test_against_a_number_the_whole_interval_must_clear_it():
    o = outcome(0.5, 0.4, 0.6)
    assert o > 0.39
    assert o < 0.61
    assert not o > 0.4
    assert not o < 0.6
    assert not o > 0.45
    assert 0.39 < o  # noqa: SIM300 - a number on the left, too
    assert (o > 0.39).evidence == "0.500 [0.400, 0.600] > 0.39, n = 100"


# --- claims -------------------------------------------------------------------------------------------------------


def test_a_claim_that_holds_shows_its_numbers():
    made = claim("it works", outcome() > 0.1, outcome() < 0.9)
    assert str(made) == "holds: it works (0.500 [0.400, 0.600] > 0.1, n = 100; 0.500 [0.400, 0.600] < 0.9, n = 100)"
    assert made._repr_mimebundle_()["text/plain"] == str(made)
    assert "it works" in "".join(Text(made._repr_mimebundle_()["text/html"]).words)


def test_a_claim_that_fails_raises_with_the_numbers():
    with pytest.raises(AssertionError, match=r"does not hold: it works \(0\.500 \[0\.400, 0\.600\] > 0\.55, n = 100\)"):
        claim("it works", outcome() > 0.55)
    with pytest.raises(AssertionError, match="7 of 9"):
        claim("all arrive", False, evidence="7 of 9")
    with pytest.raises(AssertionError, match="half"):
        claim("half", outcome() > 0.1, outcome() > 0.9)


def test_a_claim_needs_something_that_can_fail():
    with pytest.raises(ValueError, match="checks must not be empty"):
        claim("the sky is blue")
    for plain in (True, np.True_):
        with pytest.raises(ValueError, match="evidence must say the numbers"):
            claim("it works", outcome() > 0.1, plain)
        assert claim("it works", plain, evidence="9 of 9").evidence == "9 of 9"


@pytest.mark.parametrize("always_true", [outcome(), 0.7, "yes", [False], torch.tensor([0.3])])
def test_a_claim_refuses_what_is_no_check(always_true):
    with pytest.raises(TypeError, match="checks must be comparisons or booleans"):
        claim("it works", always_true, evidence="none")


def test_evidence_in_words_stands_beside_comparisons():
    assert claim("s", Comparison(True, "1 < 2"), True, evidence="also 3").evidence == "1 < 2; also 3"


# --- tables -------------------------------------------------------------------------------------------------------


def test_table_keeps_its_shape():
    made = table("Numbers", ["name", "n"], [["one", 1], ["three", 333]])
    assert str(made).splitlines() == ["Numbers", "name   n", "one    1", "three  333"]
    tags = Text(made._repr_mimebundle_()["text/html"]).tags
    counts = {tag: tags.count(tag) for tag in ("caption", "thead", "tbody", "tr", "th", "td")}
    assert counts == {"caption": 1, "thead": 1, "tbody": 1, "tr": 3, "th": 4, "td": 2}
    for row in (["one"], ["one", 1, 2]):
        with pytest.raises(ValueError, match="rows must have 2 cells"):
            table("Numbers", ["name", "n"], [row])


def test_outcomes_are_one_table_and_one_list():
    both = [outcome(control=0.25), outcome(0.1, 0.0, 0.2, 7, method="FGSM", utility=0.9)]
    made = Outcomes("Two attacks", both)
    assert (len(made), made[1], list(made)) == (2, both[1], both)
    bundle = made._repr_mimebundle_()
    assert json.loads(json.dumps(bundle[OUTCOME_MIME])) == [o.as_json() for o in both]
    lines = bundle["text/plain"].splitlines()
    assert lines[0] == "Two attacks"
    assert lines[2].split() == ["PGD-20", "ASR", "0.500", "[0.400,", "0.600]", "100", "0.250", "-"]
    assert lines[3].split() == ["FGSM", "ASR", "0.100", "[0.000,", "0.200]", "7", "-", "0.900"]
    for caption, outcomes in (("", both), ("Two", [])):
        with pytest.raises(ValueError, match="caption and outcomes must not be empty"):
            Outcomes(caption, outcomes)
