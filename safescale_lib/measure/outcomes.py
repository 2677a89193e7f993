"""Outcomes: what a demo reports, and claims: sentences that an outcome can refute.

An outcome shows itself as a card and carries itself as JSON in the notebook's output, so that the committed
notebooks are the results ledger; there is no second copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Protocol

import numpy as np

from safescale_lib.measure import OUTCOME_MIME
from safescale_lib.measure.costs import Cost
from safescale_lib.measure.intervals import Interval, paired_test, rate

SIGNIFICANCE = 0.05


@dataclass(frozen=True, eq=False)
class Outcome:
    """One measured number with all that is needed to judge it.

    technique: key of the taxonomy. method: what ran, in words ("PGD-20, eps 8/255"). metric: the field's term.
    measured: value, 95 % interval and n. control: the same metric without the attack. utility: clean accuracy,
    or its counterpart, of the model concerned. against: key of the defense this attack was adapted to, else None.
    cost: what was spent. seed: of the attack's random draws. items: (n,) bool per item, if the metric is a rate;
    two outcomes on the same items are compared in pairs. trained: the model behind the number was trained in this very
    run, so that the number also depends on the last bits of the machine's sums, beyond what the interval says.
    """

    technique: str
    method: str
    metric: str
    measured: Interval
    control: float | None = None
    utility: float | None = None
    against: str | None = None
    cost: Cost = field(default_factory=Cost)
    seed: int | None = None
    items: np.ndarray | None = field(default=None, repr=False)
    trained: bool = False

    def __post_init__(self) -> None:
        for name in ("technique", "method", "metric"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        value, low, high, n = self.measured
        if not (math.isfinite(value) and low <= value <= high and n >= 1):
            raise ValueError(f"measured must hold low <= value <= high with n >= 1, got {self.measured!r}")
        for name in ("control", "utility"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                raise ValueError(f"{name} must be finite or None, got {number}")
        if self.items is not None and len(self.items) != n:
            raise ValueError(f"items must hold n = {n} entries, got {len(self.items)}")

    @property
    def value(self) -> float:
        return self.measured.value

    def __lt__(self, other: Outcome | float) -> Comparison:
        return _compare(self, other, below=True)

    def __gt__(self, other: Outcome | float) -> Comparison:
        return _compare(self, other, below=False)

    def as_json(self) -> dict[str, Any]:
        """What the MIME type carries; numbers rounded to 6 decimals."""
        value, low, high, n = self.measured
        return {
            "technique": self.technique,
            "method": self.method,
            "metric": self.metric,
            "value": round(float(value), 6),
            "low": round(float(low), 6),
            "high": round(float(high), 6),
            "n": int(n),
            "control": None if self.control is None else round(float(self.control), 6),
            "utility": None if self.utility is None else round(float(self.utility), 6),
            "against": self.against,
            "cost": self.cost.as_dict(),
            "seed": None if self.seed is None else int(self.seed),
            "trained": self.trained,
        }

    def __str__(self) -> str:
        return f"{self.metric} {self.measured} (n = {self.measured.n}), {self.method}"

    def _facts(self) -> list[tuple[str, str]]:
        """Label and text of every line of the card below the number; seconds stay in the JSON, they vary."""
        facts = [("95 % interval", f"{self.measured.low:.3f} to {self.measured.high:.3f}"), ("n", f"{self.measured.n:,}")]
        if self.control is not None:
            facts.append(("without the attack", f"{self.control:.3f}"))
        if self.utility is not None:
            facts.append(("utility (clean accuracy)", f"{self.utility:.3f}"))
        if self.against:
            facts.append(("adapted to", self.against))
        spent = [f"{count:,} {name}" for name, count in self.cost.as_dict().items() if count and name != "seconds"]
        if spent:
            facts.append(("cost per run", ", ".join(spent)))
        if self.seed is not None:
            facts.append(("seed", str(self.seed)))
        if self.trained:
            facts.append(("model", "trained in this run"))
        return [*facts, ("technique", self.technique)]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in self._facts())
        html = (
            f'<div class="safescale-outcome"><p class="safescale-title">{escape(self.method)}</p>'
            f'<p class="safescale-value">{escape(self.metric)} <strong>{self.value:.3f}</strong></p><dl>{rows}</dl></div>'
        )
        return {"text/plain": str(self), "text/html": html, OUTCOME_MIME: self.as_json()}


class _Attacked(Protocol):
    @property
    def survived(self) -> Any: ...
    @property
    def cost(self) -> Cost: ...


def robust_accuracy(
    attack: _Attacked,
    *,
    technique: str,
    method: str,
    clean: float,
    against: str | None = None,
    seed: int | None = None,
    trained: bool = False,
) -> Outcome:
    """Share of all items still classified correctly after an attack, as an outcome.

    attack: a result with `survived` (N,) bool and `cost`. clean: accuracy on the same items without the attack; it is
    the control and the utility at once. trained: see `Outcome`.
    """
    items = np.asarray(attack.survived)
    return Outcome(technique, method, "robust accuracy", rate(items), clean, clean, against, attack.cost, seed, items, trained)


@dataclass(frozen=True)
class Comparison:
    """Whether one number lies below or above another beyond chance, and the evidence in words."""

    holds: bool
    evidence: str

    def __bool__(self) -> bool:
        return self.holds


def _compare(a: Outcome, b: Outcome | float, *, below: bool) -> Comparison:
    """Paired test where both hold the same items, else the intervals must not meet."""
    sign = "<" if below else ">"
    if not isinstance(b, Outcome):
        holds = a.measured.high < b if below else a.measured.low > b
        return Comparison(holds, f"{a.measured} {sign} {b:g}, n = {a.measured.n}")
    ahead = a.value < b.value if below else a.value > b.value
    text = f"{a.measured} {sign} {b.measured}"
    if a.items is not None and b.items is not None and len(a.items) == len(b.items):
        p = paired_test(a.items, b.items)
        return Comparison(ahead and p < SIGNIFICANCE, f"{text}, n = {a.measured.n} pairs, McNemar p {_p_value(p)}")
    apart = a.measured.high < b.measured.low if below else a.measured.low > b.measured.high
    return Comparison(apart, f"{text}, n = {a.measured.n} and {b.measured.n}")


def _p_value(p: float) -> str:
    return f"= {p:.2g}" if p >= 1e-4 else "< 0.0001"


@dataclass(frozen=True)
class Claim:
    """A sentence that was checked; made by `claim`, shows itself with its evidence."""

    sentence: str
    evidence: str

    def __str__(self) -> str:
        return f"holds: {self.sentence} ({self.evidence})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        html = (
            f'<p class="safescale-claim"><span class="safescale-verdict">holds</span> {escape(self.sentence)} '
            f'<span class="safescale-evidence">{escape(self.evidence)}</span></p>'
        )
        return {"text/plain": str(self), "text/html": html}


def claim(sentence: str, *checks: Comparison | bool, evidence: str = "") -> Claim:
    """State a sentence and the checks that carry it; AssertionError with the numbers if one fails.

    checks: comparisons of outcomes (`pgd < fgsm`), or plain booleans together with `evidence` in words.
    """
    if not checks:
        raise ValueError("checks must not be empty: a claim needs something that can fail")
    plain = [check for check in checks if not isinstance(check, Comparison)]
    if not all(isinstance(check, (bool, np.bool_)) for check in plain):  # an outcome or a number would always be true
        raise TypeError(f"checks must be comparisons or booleans, got {plain!r}")
    if plain and not evidence:
        raise ValueError("evidence must say the numbers when a check is a plain boolean")
    words = "; ".join([c.evidence for c in checks if isinstance(c, Comparison)] + ([evidence] if evidence else []))
    if not all(checks):
        raise AssertionError(f"the claim does not hold: {sentence} ({words})")
    return Claim(sentence, words)


class Outcomes(Sequence[Outcome]):
    """Several outcomes as one table, carried as one JSON list. caption: what the table shows."""

    def __init__(self, caption: str, outcomes: Sequence[Outcome]) -> None:
        if not caption or not outcomes:
            raise ValueError("caption and outcomes must not be empty")
        self.caption, self._outcomes = caption, tuple(outcomes)

    def __len__(self) -> int:
        return len(self._outcomes)

    def __getitem__(self, index: Any) -> Any:
        return self._outcomes[index]

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        def number(value: float | None) -> str:
            return "-" if value is None else f"{value:.3f}"

        header = ["method", "metric", "value [95 % interval]", "n", "without the attack", "utility"]
        rows = [[o.method, o.metric, str(o.measured), f"{o.measured.n:,}", number(o.control), number(o.utility)] for o in self]
        if len({o.seed for o in self}) > 1:
            header.insert(1, "seed")
            for row, o in zip(rows, self, strict=True):
                row.insert(1, "-" if o.seed is None else str(o.seed))
        shown = table(self.caption, header, rows)._repr_mimebundle_()
        return {**shown, OUTCOME_MIME: [o.as_json() for o in self]}


@dataclass(frozen=True)
class Table:
    """A captioned table of texts; made by `table`."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.header, *self.rows, strict=True)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in (self.header, *self.rows)]
        return "\n".join([self.caption, *(line.rstrip() for line in lines)])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in self.header)
        body = "".join(
            f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
            for first, *rest in self.rows
        )
        html = (
            f'<div class="safescale-table"><table><caption>{escape(self.caption)}</caption>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
        return {"text/plain": str(self), "text/html": html}


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table that reads well in a notebook, on the site and as plain text. Every row as long as the header."""
    texts = tuple(tuple(str(cell) for cell in row) for row in rows)
    if any(len(row) != len(header) for row in texts):
        raise ValueError(f"rows must have {len(header)} cells each, as the header has")
    return Table(caption, tuple(header), texts)
