"""How much of the survey runs, computed from the bindings and the committed notebooks, never typed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safescale_lib.survey.bindings import Technique, bindings, check
from safescale_lib.survey.ledger import Entry, outcomes
from safescale_lib.survey.taxonomy import Node, close_to, node, nodes


class Count(NamedTuple):
    """Of `leaves` leaves, `bound` have a function and `runs` have a function and an outcome."""

    runs: int
    bound: int
    leaves: int

    def __str__(self) -> str:
        return f"{self.runs} of {self.leaves}"


@dataclass(frozen=True)
class NodeCoverage:
    """What the book holds at one node itself: the functions bound to its key and the outcomes that carry it."""

    node: Node
    functions: tuple[Technique, ...]
    outcomes: tuple[Entry, ...]

    @property
    def runs(self) -> bool:
        """Is a function bound here, and does an outcome of it stand in a committed notebook?"""
        return bool(self.functions and self.outcomes)


@dataclass(frozen=True)
class Coverage:
    """Coverage of every node of the taxonomy, by key, in the survey's order."""

    nodes: Mapping[str, NodeCoverage]

    @property
    def leaves(self) -> tuple[NodeCoverage, ...]:
        """The survey's techniques."""
        return tuple(entry for entry in self.nodes.values() if entry.node.level == "leaf")

    @property
    def baselines(self) -> tuple[NodeCoverage, ...]:
        """Categories and sections with functions or outcomes of their own: what the techniques below start from."""
        return tuple(
            entry for entry in self.nodes.values() if entry.node.level != "leaf" and (entry.functions or entry.outcomes)
        )

    def count(self, key: str | None = None) -> Count:
        """How many leaves run below a chapter, section or category; of the whole survey without a key."""
        below = self.leaves if key is None else tuple(self.nodes[leaf.key] for leaf in node(key).leaves())
        return Count(sum(leaf.runs for leaf in below), sum(bool(leaf.functions) for leaf in below), len(below))


def coverage(notebooks: Path | None = None, *, techniques: Iterable[Technique] | None = None) -> Coverage:
    """What runs: a technique is bound to a leaf's key and an outcome with that key stands in a notebook.

    notebooks: folder of the committed notebooks; by default the one beside the package. techniques: what is
    bound; by default all of the library, for which every chapter is imported.
    Raises FileNotFoundError without such a folder, ValueError for a binding or an outcome with an unknown key.
    """
    functions: defaultdict[str, list[Technique]] = defaultdict(list)
    bound_here = bindings() if techniques is None else tuple(techniques)
    check(bound_here)
    for bound in bound_here:
        functions[bound.key].append(bound)
    entries: defaultdict[str, list[Entry]] = defaultdict(list)
    for path in sorted(notebook_folder(notebooks).glob("*.ipynb")):
        for entry in outcomes(path):
            if entry.technique not in nodes():
                hint = close_to(entry.technique, nodes())
                raise ValueError(f"{entry.notebook}, cell {entry.cell}: unknown technique {entry.technique!r}{hint}")
            entries[entry.technique].append(entry)
    return Coverage({key: NodeCoverage(at, tuple(functions[key]), tuple(entries[key])) for key, at in nodes().items()})


def notebook_folder(notebooks: Path | None) -> Path:
    """The folder named, or the one beside the package; FileNotFoundError if there is none."""
    folder = Path(__file__).resolve().parents[2] / "notebooks" if notebooks is None else Path(notebooks)
    if not folder.is_dir():
        hint = "; the package is not run from a clone of the repository, so name the folder" if notebooks is None else ""
        raise FileNotFoundError(f"notebooks must be a folder, found none named {folder.name!r}{hint}")
    return folder
