"""Notes: what a job recalls must not depend on how fast the job beside it is."""

from __future__ import annotations

from threading import Barrier

import pytest

from safescale_lib.zoo import memory
from safescale_lib.zoo.training import side_by_side


@pytest.fixture(autouse=True)
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_COMMON", {})


def test_a_job_recalls_what_was_noted_before_and_what_it_noted_itself() -> None:
    memory.note({"old": "before"})
    meet = Barrier(2)

    def job(name: str) -> tuple[object, ...]:
        assert memory.beside()
        memory.note({"same": name, name: name})
        meet.wait(5)  # both have noted
        return tuple(memory.recalled(key) for key in ("old", "same", "a", "b"))

    assert side_by_side(lambda: job("a"), lambda: job("b")) == [("before", "a", "a", None), ("before", "b", None, "b")]
    assert not memory.beside()
    assert [memory.recalled(key) for key in ("a", "b", "same")] == ["a", "b", "b"]  # in the order of the jobs


def test_jobs_within_a_job_note_for_that_job() -> None:
    def outer() -> object:
        side_by_side(lambda: memory.note({"inner": 1}))
        return memory.recalled("inner")

    def neighbour() -> object:
        return memory.recalled("inner")

    assert side_by_side(outer, outer) == [1, 1]
    assert side_by_side(neighbour) == [1]


def test_what_a_failed_job_noted_is_forgotten() -> None:
    def failing() -> None:
        memory.note({"half": 1})
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        side_by_side(failing)
    assert memory.recalled("half") is None


def test_notes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MOST", 4)
    for i in range(6):
        memory.note({i: i})
    assert [memory.recalled(i) for i in range(6)] == [None, None, None, None, 4, 5]
