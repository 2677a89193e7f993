"""The papers the survey lists, and the keys of everything the book may cite."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType

from safescale_lib.survey.taxonomy import close_to

BIBLIOGRAPHIES = ("references.bib", "baselines.bib")
"""The survey's papers, and the works we cite besides; no key stands in both."""


@dataclass(frozen=True)
class Paper:
    """One paper of the survey. id is its citation key; section is a string such as "3.10"; what is unknown is "".

    category_source says how sure the category is; role is "background" for a paper that is neither attack nor
    defense; also_in names a further section the survey lists it in.
    """

    id: str
    chapter: str
    family: str
    section: str
    section_title: str
    side: str
    threat: str
    category: str
    short_name: str
    title: str
    first_author: str
    year: int
    venue: str
    category_source: str
    role: str
    also_in: str


@lru_cache(maxsize=1)
def papers() -> Mapping[str, Paper]:
    """Every paper of the survey by its id, in the survey's order."""
    rows = csv.DictReader(_data("papers.csv").splitlines())
    listed = (Paper(**{**row, "year": int(row["year"])}) for row in rows)  # type: ignore[arg-type]
    return MappingProxyType({entry.id: entry for entry in listed})


def paper(id: str) -> Paper:
    """The paper with this id; ValueError with the closest ids if the survey lists none."""
    if id not in papers():
        raise ValueError(f"id must be a paper of the survey, got {id!r}{close_to(id, papers())}")
    return papers()[id]


@lru_cache(maxsize=1)
def citation_keys() -> frozenset[str]:
    """The keys of all bibliography entries, the survey's and ours."""
    return frozenset(key for name in BIBLIOGRAPHIES for key in re.findall(r"^@\w+\{\s*([^,\s]+)", _data(name), re.MULTILINE))


def _data(name: str) -> str:
    return files("safescale_lib.survey").joinpath("data", name).read_text(encoding="utf-8")
