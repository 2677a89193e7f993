"""What need not be worked out twice, kept so that a run repeats exactly.

A value may depend, in its last bit, on what else was worked out with it. So a job of `side_by_side` recalls what was noted
before the jobs began and what it noted itself; when all have ended, their notes are put together in the order of the jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
MOST = 200_000  # notes; then all are forgotten

_COMMON: dict[Hashable, Any] = {}
_OWN: ContextVar[tuple[dict[Hashable, Any], ...]] = ContextVar("_OWN", default=())


def recalled(key: Hashable) -> Any:
    """What was noted under a key, or None."""
    return next((notes[key] for notes in (*reversed(_OWN.get()), _COMMON) if key in notes), None)


def note(values: dict[Hashable, Any]) -> None:
    """Keep some values for this job and those who come after it."""
    notes = (_COMMON, *_OWN.get())[-1]
    if len(notes) + len(values) > MOST:
        notes.clear()
    notes.update(values)


def beside() -> bool:
    """Whether this code is part of a job of `side_by_side`, so that dividing it once more gains nothing."""
    return bool(_OWN.get())


def apart(jobs: Sequence[Callable[[], T]]) -> tuple[list[Callable[[], T]], Callable[[], None]]:
    """The jobs, each with notes of its own and in a copy of the caller's context, and what puts the notes together."""
    fresh: list[dict[Hashable, Any]] = [{} for _ in jobs]

    def run(job: Callable[[], T], own: dict[Hashable, Any]) -> T:
        _OWN.set((*_OWN.get(), own))
        return job()

    def together() -> None:
        for own in fresh:
            note(own)

    return [partial(copy_context().run, run, job, own) for job, own in zip(jobs, fresh, strict=True)], together
