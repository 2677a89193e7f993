"""The results ledger: the outcomes that stand in the committed notebooks, read back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safescale_lib.measure import OUTCOME_MIME

FIELDS = ("technique", "metric", "value", "low", "high", "n", "control", "utility", "against", "cost", "seed")
"""What every outcome carries at least."""


@dataclass(frozen=True)
class Entry:
    """One outcome and where it stands: the notebook's file name and the id of the cell that displays it."""

    notebook: str
    cell: str
    outcome: Mapping[str, Any]

    @property
    def technique(self) -> str:
        """Key of the technique the outcome reports on."""
        return str(self.outcome["technique"])


def outcomes(path: Path) -> tuple[Entry, ...]:
    """Every outcome in the outputs of one notebook, in order; an output holds an outcome or a list of them.

    Raises FileNotFoundError if there is no such notebook, ValueError if it or an outcome in it is malformed.
    """
    path = Path(path)
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} must be a Jupyter notebook of format 4: {error!r}") from error
    found = []
    for position, cell in enumerate(cells):
        identity = str(cell.get("id", position))
        for output in cell.get("outputs", ()):
            payload = output.get("data", {}).get(OUTCOME_MIME, [])
            found += [Entry(path.name, identity, _checked(one, f"{path.name}, cell {identity}")) for one in _each(payload)]
    return tuple(found)


def _each(payload: Any) -> Iterator[Any]:
    yield from payload if isinstance(payload, list) else [payload]


def _checked(outcome: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(outcome, dict):
        raise ValueError(f"{where}: an outcome must be a JSON object, got {type(outcome).__name__}")
    missing = [field for field in FIELDS if field not in outcome]
    if missing:
        raise ValueError(f"{where}: an outcome lacks {', '.join(missing)}")
    return MappingProxyType(outcome)
