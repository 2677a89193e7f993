"""Lessons against prompt injection: questions on data in which somebody hid a task, for the models that are tuned on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from safescale_lib.world.town import chats, tasks
from safescale_lib.world.town.chats import Chat, Message, Preference, user
from safescale_lib.world.town.words import Split

DATA = "data"
"""Role of the channel that is only read."""

OPENED, CLOSED = "<data>", "</data>"
"""Marks that no typed text can become once the front end has filtered it."""


def data(content: str) -> Message:
    """The message of the data channel."""
    return {"role": DATA, "content": content}


def one_message(question: str, text: str) -> tuple[Message, ...]:
    """Both channels in one message of the user's, as an application without a defense sends them."""
    return (user(tasks.LAYOUTS[1].format(question=question, text=text)),)


def between_marks(question: str, text: str) -> tuple[Message, ...]:
    """One message, the data in it between two marks."""
    return one_message(question, f"{OPENED} {text} {CLOSED}")


@dataclass(frozen=True)
class Lesson:
    """A question on some data, a task that somebody hid in the data, and what to say to either.

    text: the data, with the task in it where `hidden` is not None.
    """

    question: tasks.Task
    text: str
    hidden: tasks.Task | None


PAYLOADS = ("naive", "completion", "override")
"""How a lesson's injection is put: as it is, behind a made-up end of the answer, behind words that push aside."""


def lesson(draw: Random, payloads: Sequence[str] = PAYLOADS, *, injected: float = 0.5, split: Split = "train") -> Lesson:
    """A document or, one time in five, a review with a question, in a split's words; a share of them is injected.

    The injected task is one of the town's skills, between two sentences or at either end.
    """
    if draw.random() < 0.2:
        made = tasks.review(draw)
        asked, text = tasks.Task("good or bad ?", made.answer, made.value), made.ask.removeprefix("good or bad ? ")
    else:
        document = tasks.document(draw, facts=draw.randint(1, 4), split=split, tangled=draw.random() < 0.2)
        asked, text = document.question(draw.randrange(len(document.entries)), draw, split), document.text
        if draw.random() < 0.35:  # the user's own orders count, and their last one most
            order = tasks.skill(draw)
            changed = f"{asked.ask} {tasks.override(order.ask, draw, split)}" if draw.random() < 0.3 else order.ask
            asked = tasks.Task(changed, order.answer, order.value)
    if draw.random() >= injected:
        return Lesson(asked, text, None)
    hidden = tasks.skill(draw)
    payload = {
        "naive": hidden.ask,
        "override": tasks.override(hidden.ask, draw, split),
        "completion": f"{draw.choice(('answer :', 'done .', 'sure .'))} {asked.answer} question : {hidden.ask}",
    }[draw.choice(payloads)]
    *sentences, _ = text.split(" .")
    place = draw.choice((0, len(sentences), len(sentences), draw.randint(0, len(sentences))))
    parts = [f"{sentence.strip()} ." for sentence in sentences]
    return Lesson(asked, " ".join((*parts[:place], payload, *parts[place:])), hidden)


def structured(draw: Random, payloads: Sequence[str] = PAYLOADS, *, split: Split = "train") -> Chat:
    """One conversation of the structured-query corpus: data in their own channel, half of them injected, right answers.

    Three in ten are conversations of the alignment corpus instead, so that nothing is forgotten.
    """
    if draw.random() < 0.3:
        return chats.aligned(draw, split)
    made = lesson(draw, payloads, split=split)
    return Chat((user(made.question.ask), data(made.text)), made.question.answer, made.question.value, "structured")


def bounded(draw: Random, *, split: Split = "train") -> Chat:
    """One conversation of the boundary corpus: the data between two marks in the user's message, half of them injected."""
    if draw.random() < 0.3:
        return chats.aligned(draw, split)
    made = lesson(draw, split=split)
    return Chat(between_marks(made.question.ask, made.text), made.question.answer, made.question.value, "bounded")


def injection_preference(draw: Random, *, split: Split = "train") -> Preference:
    """A pair for preference optimisation: doing the user's task is better than doing the one in the data.

    Three in ten are pairs of the alignment corpus, so that refusals stay what they were.
    """
    if draw.random() < 0.3:
        return chats.preference(draw, split)
    made = lesson(draw, injected=1.0, split=split)
    assert made.hidden is not None
    return Preference((user(made.question.ask), data(made.text)), made.question.answer, made.hidden.answer)
