"""A pytest plugin beside nbval: what a notebook measures again must lie within the interval it has committed.

nbval runs every cell and compares outputs letter by letter or not at all. Measured numbers want the third way: a cell
fails if one of its outcomes is missing, is new, or has a value outside the committed 95 % interval.

The interval speaks of the items. Where the model was trained in the run itself, the value also depends on the machine: sums
differ in their last bit between processors and numbers of threads, and training amplifies that. Such an outcome says so
(`trained`), and its value may lie outside by as much as TRAINING_SPREAD.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from safescale_lib.measure import OUTCOME_MIME

Identity = tuple[Any, ...]
TRAINING_SPREAD = 0.1


def carried(outputs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Every outcome in a cell's outputs; an output carries one or a list."""
    for output in outputs:
        payload = output.get("data", {}).get(OUTCOME_MIME, [])
        yield from payload if isinstance(payload, list) else [payload]


def identity(outcome: dict[str, Any]) -> Identity:
    return tuple(outcome[key] for key in ("technique", "method", "metric", "against", "seed", "n"))


def differences(committed: list[dict[str, Any]], measured: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the measured outcomes, as sentences; empty if they reproduce the committed ones."""
    old, new = ({identity(o): o for o in group} for group in (committed, measured))
    faults = [f"outcome is gone: {' / '.join(map(str, key))}" for key in old.keys() - new.keys()]
    faults += [f"outcome is not committed: {' / '.join(map(str, key))}" for key in new.keys() - old.keys()]
    for key in old.keys() & new.keys():
        was, now = old[key], new[key]
        slack = TRAINING_SPREAD if was.get("trained") else 1e-6
        if not was["low"] - slack <= now["value"] <= was["high"] + slack:
            faults.append(
                f"{was['method']}: {was['metric']} is {now['value']:.4f}, committed {was['low']:.4f} to {was['high']:.4f}"
            )
    return faults


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    if type(item).__name__ == "IPyNbCell" and outcome.excinfo is None:  # type: ignore[attr-defined]
        faults = differences(list(carried(item.cell.outputs)), list(carried(item.test_outputs or [])))  # type: ignore[attr-defined]
        if faults:
            pytest.fail("; ".join(faults), pytrace=False)
