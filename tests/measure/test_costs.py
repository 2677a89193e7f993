"""Costs add up, never change, and go to JSON."""

import json
import time
from dataclasses import FrozenInstanceError

import pytest

from safescale_lib.measure.costs import Cost, Meter


def test_costs_add():
    assert Cost(1, 2, 3, 0.5) + Cost(10, 20, 30, 0.25) == Cost(11, 22, 33, 0.75)
    assert Cost() + Cost(4) == Cost(forwards=4)


def test_a_cost_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Cost().forwards = 3


def test_as_dict_has_the_four_names_and_goes_to_json():
    spent = Cost(1, 2, 3, 1.23456).as_dict()
    assert json.loads(json.dumps(spent)) == {"forwards": 1, "backwards": 2, "queries": 3, "seconds": 1.23}


def test_a_meter_reports_what_was_spent_so_far():
    meter = Meter()
    assert (meter.cost.forwards, meter.cost.backwards, meter.cost.queries) == (0, 0, 0)
    meter.forwards += 5
    first = meter.cost
    meter.backwards += 2
    time.sleep(0.02)
    second = meter.cost
    assert (first.forwards, first.backwards) == (5, 0)
    assert (second.forwards, second.backwards) == (5, 2)
    assert 0.02 <= second.seconds - first.seconds < 5


def test_a_meter_takes_over_what_another_counted():
    outer, inner = Meter(), Meter()
    outer.forwards, inner.forwards, inner.backwards, inner.queries = 1, 10, 20, 30
    outer.take(inner)
    assert (outer.cost.forwards, outer.cost.backwards, outer.cost.queries) == (11, 20, 30)
