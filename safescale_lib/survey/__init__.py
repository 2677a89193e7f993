"""The survey as data: its taxonomy, its papers, and how much of it runs in this book.

`technique` binds a function to its place in the taxonomy; `coverage` counts what is bound and was run; `cards` says
what every leaf is; `scorecard` holds all that was measured.
"""

from safescale_lib.measure import OUTCOME_MIME
from safescale_lib.survey.bindings import Technique, bindings, technique
from safescale_lib.survey.cards import (
    AXES,
    SIDES,
    THREATS,
    Axis,
    Card,
    Tags,
    Traits,
    Value,
    card,
    cards,
    nearest_running,
    traits,
)
from safescale_lib.survey.coverage import Coverage, NodeCoverage, coverage
from safescale_lib.survey.datasets import Dataset, datasets
from safescale_lib.survey.ledger import Entry, outcomes
from safescale_lib.survey.papers import Paper, citation_keys, paper, papers
from safescale_lib.survey.scorecard import scorecard
from safescale_lib.survey.statistics import THREAT_TITLES, Printed, printed
from safescale_lib.survey.taxonomy import Node, chapters, leaves, node, nodes

__all__ = [
    "AXES",
    "OUTCOME_MIME",
    "SIDES",
    "THREATS",
    "THREAT_TITLES",
    "Axis",
    "Card",
    "Coverage",
    "Dataset",
    "Entry",
    "Node",
    "NodeCoverage",
    "Paper",
    "Printed",
    "Tags",
    "Technique",
    "Traits",
    "Value",
    "bindings",
    "card",
    "cards",
    "chapters",
    "citation_keys",
    "coverage",
    "datasets",
    "leaves",
    "nearest_running",
    "node",
    "nodes",
    "outcomes",
    "paper",
    "papers",
    "printed",
    "scorecard",
    "technique",
    "traits",
]
