"""The survey as data: its taxonomy, its papers, and how much of it runs in this book.

`technique` binds a function to its place in the taxonomy; `coverage` counts what is bound and was run.
"""

from safescale_lib.measure import OUTCOME_MIME
from safescale_lib.survey.bindings import Technique, bindings, technique
from safescale_lib.survey.coverage import Coverage, NodeCoverage, coverage
from safescale_lib.survey.ledger import Entry, outcomes
from safescale_lib.survey.papers import Paper, citation_keys, paper, papers
from safescale_lib.survey.taxonomy import Node, chapters, leaves, node, nodes

__all__ = [
    "OUTCOME_MIME",
    "Coverage",
    "Entry",
    "Node",
    "NodeCoverage",
    "Paper",
    "Technique",
    "bindings",
    "chapters",
    "citation_keys",
    "coverage",
    "leaves",
    "node",
    "nodes",
    "outcomes",
    "paper",
    "papers",
    "technique",
]
