"""The scorecard: every outcome of the committed notebooks in one JSON document, for machines.

It is computed, never stored in the repository: the notebooks are the ledger. `data/scorecard.schema.json` says what
each field means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

from safescale_lib import __version__
from safescale_lib.survey.cards import traits
from safescale_lib.survey.coverage import Coverage, coverage, notebook_folder
from safescale_lib.survey.ledger import Entry, outcomes
from safescale_lib.survey.taxonomy import node, survey

TITLE = "Safety at Scale: the hands-on companion. Scorecard"
SCHEMA = "scorecard.schema.json"


def scorecard(notebooks: Path | None = None, *, covered: Coverage | None = None) -> dict[str, Any]:
    """Every outcome of the notebooks with its place in the survey, in the order of the notebooks and their cells.

    notebooks: folder of the committed notebooks; by default the one beside the package. covered: their coverage, if
    it is at hand; else computed. The same notebooks and library give the same document: it holds no time.
    Raises what `coverage` raises.
    """
    folder = notebook_folder(notebooks)
    covered = coverage(folder) if covered is None else covered
    entries = {path: outcomes(path) for path in sorted(folder.glob("*.ipynb"))}
    return {
        "$schema": SCHEMA,
        "title": TITLE,
        "version": __version__,
        "survey": dict(survey()),
        "notebooks": [
            {"file": path.name, "sha256": sha256(path.read_bytes()).hexdigest(), "outcomes": len(found)}
            for path, found in entries.items()
        ],
        "outcomes": [_placed(entry, covered) for found in entries.values() for entry in found],
    }


def as_text(document: Mapping[str, Any]) -> str:
    """The document as it is published: JSON, two spaces deep, ending in a line break."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


@lru_cache(maxsize=1)
def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the scorecard."""
    loaded: dict[str, Any] = json.loads(schema_text())
    return loaded


def schema_text() -> str:
    """The schema's file as it ships."""
    return files("safescale_lib.survey").joinpath("data", SCHEMA).read_text(encoding="utf-8")


def cell_link(entry: Entry) -> str:
    """Where the site shows the cell of an outcome, from the site's root."""
    return f"notebooks/{Path(entry.notebook).stem}.html#cell-{entry.cell}"


def _placed(entry: Entry, covered: Coverage) -> dict[str, Any]:
    """An outcome's own fields, where it stands and what the atlas says of its technique."""
    place = node(entry.technique)
    found = traits(place.key)
    above = [node(key) for key in place.path]
    return {
        **entry.outcome,
        "notebook": entry.notebook,
        "cell": entry.cell,
        "link": cell_link(entry),
        "title": place.title,
        "level": place.level,
        "chapter": above[0].title,
        "section": f"{above[1].number} {above[1].title}" if len(above) > 1 else None,
        "side": found and found.side,
        "threat": found and found.threat,
        "tags": found and found.tags.as_dict(),
        "functions": [f"{bound.module}.{bound.name}" for bound in covered.nodes[place.key].functions],
    }
