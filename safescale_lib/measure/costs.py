"""What an attack or a defense spends."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Cost:
    """Spending of one run, counted per item: a batch of 32 images through the model is 32 forwards.

    forwards: items evaluated by a model whose inside the attacker sees. backwards: gradients taken, per item.
    queries: items sent to a model seen only through its answers. seconds: wall clock.
    """

    forwards: int = 0
    backwards: int = 0
    queries: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.forwards + other.forwards,
            self.backwards + other.backwards,
            self.queries + other.queries,
            self.seconds + other.seconds,
        )

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "seconds": round(self.seconds, 2)}


class Meter:
    """Counts while an attack runs; `cost` is what was spent so far."""

    def __init__(self) -> None:
        self.forwards = self.backwards = self.queries = 0
        self._start = time.perf_counter()

    def take(self, other: Meter) -> None:
        """Add what another meter counted, but not its seconds: it ran inside this one's."""
        self.forwards, self.backwards = self.forwards + other.forwards, self.backwards + other.backwards
        self.queries += other.queries

    @property
    def cost(self) -> Cost:
        return Cost(self.forwards, self.backwards, self.queries, time.perf_counter() - self._start)
