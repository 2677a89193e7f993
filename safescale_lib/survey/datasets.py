"""The datasets and benchmarks that each family's papers are measured on."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files


@dataclass(frozen=True)
class Dataset:
    """A dataset or benchmark. family: key of its chapter in the taxonomy. task: what it serves. year: of first publication."""

    family: str
    name: str
    task: str
    year: int
    note: str


@lru_cache(maxsize=1)
def datasets() -> tuple[Dataset, ...]:
    """Every dataset and benchmark, family by family in the survey's order. One used by two families stands in both."""
    text = files("safescale_lib.survey").joinpath("data/datasets_benchmarks.csv").read_text(encoding="utf-8")
    return tuple(Dataset(**{**row, "year": int(row["year"])}) for row in csv.DictReader(text.splitlines()))  # type: ignore[arg-type]
