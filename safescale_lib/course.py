"""Pieces of a course that a notebook shows: quizzes, sliders over pictures made in advance, and the exercise's heading.

All of them are plain HTML: they work in JupyterLab, on the site, without JavaScript and without a kernel. The site's script
adds to them what needs a script. A quiz also carries itself as JSON in the cell's output, so that a course can read it.
"""

from __future__ import annotations

import math
import random
import re
import struct
from base64 import b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from safescale_lib.measure.intervals import Interval
    from safescale_lib.measure.outcomes import Outcome

QUIZ_MIME = "application/vnd.safescale.quiz+json"
"""Under this MIME type a quiz stands as JSON in a notebook's outputs."""

SLIDER_BYTES = 400_000  # of HTML a slider may put into a page


def _name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"name must be kebab-case (a-z, 0-9 and hyphens), got {name!r}")
    return name


def _text(label: str, text: str) -> str:
    if not text.strip():
        raise ValueError(f"{label} must not be empty")
    return text.strip()


def _html(text: str) -> str:
    """A sentence as HTML; backticks mark code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


# ------------------------------------------------------------------------------------------------------------- quiz


class Measured(NamedTuple):
    """A number as an answer: its text, and the value with its bounds behind it. Made by `percent` and `decimal`."""

    text: str
    value: float
    low: float
    high: float


def percent(number: Outcome | Interval | float, digits: int = 0) -> Measured:
    """A share in [0, 1] as an answer in percent: an outcome, an interval or a plain number."""
    value, low, high = _bounds(number)
    return Measured(f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%", value, low, high)


def decimal(number: Outcome | Interval | float, digits: int = 2) -> Measured:
    """A number as an answer with that many decimals: an outcome, an interval or a plain number."""
    value, low, high = _bounds(number)
    return Measured(f"{value:.{digits}f}", value, low, high)


def _bounds(number: Any) -> tuple[float, float, float]:
    interval = getattr(number, "measured", number)  # an Outcome holds an Interval
    value, low, high = interval[:3] if isinstance(interval, tuple) else (interval, interval, interval)
    if not all(map(math.isfinite, (value, low, high))):
        raise ValueError(f"number must be finite, got {number!r}")
    return float(value), float(low), float(high)


@dataclass(frozen=True)
class Choice:
    """One answer and what a reader who picks it is told. answer: words, or a number from `percent` or `decimal`."""

    answer: str | Measured
    feedback: str

    def __post_init__(self) -> None:
        _text("answer", self.text)
        _text("feedback", self.feedback)

    @property
    def text(self) -> str:
        return self.answer.text if isinstance(self.answer, Measured) else self.answer

    def as_json(self) -> dict[str, Any]:
        """Text and feedback, and the number where the answer is one."""
        number = {"value": round(self.answer.value, 6)} if isinstance(self.answer, Measured) else {}
        return {"text": self.text.strip(), "feedback": self.feedback.strip(), **number}


class Question:
    """A question with one right answer and at least one wrong one.

    Raises ValueError if two answers read the same, or if a wrong number lies inside the interval of the right one: then
    the measurement does not tell them apart, and a reader who picks it is not wrong.
    """

    def __init__(self, text: str, *, right: Choice, wrong: Sequence[Choice]) -> None:
        if not isinstance(right, Choice) or not all(isinstance(choice, Choice) for choice in wrong):
            raise TypeError("right must be one Choice and wrong a sequence of Choice")
        if not wrong:
            raise ValueError("wrong must hold at least one choice")
        self.text, self.right, self.wrong = _text("text", text), right, tuple(wrong)
        seen: set[str] = set()
        for choice in (right, *wrong):
            plain = " ".join(choice.text.replace("\N{NO-BREAK SPACE}", " ").split()).casefold()
            if plain in seen:
                raise ValueError(f"two choices read {choice.text!r} in the question {text!r}")
            seen.add(plain)
            if isinstance(right.answer, Measured) and isinstance(choice.answer, Measured) and choice is not right:
                low, high = right.answer.low, right.answer.high
                if low <= choice.answer.value <= high:
                    raise ValueError(f"wrong choice {choice.text!r} lies in the right one's interval [{low:.3f}, {high:.3f}]")


@dataclass(frozen=True)
class Quiz:
    """Questions with the order of their choices; made by `quiz`. Shows itself as a page, a text and JSON."""

    name: str
    title: str
    questions: tuple[tuple[str, tuple[tuple[bool, Choice], ...]], ...]  # text, and (right?, choice) in the order shown

    def as_json(self) -> dict[str, Any]:
        """What the MIME type carries: name, title and every question with its choices in the order shown."""
        asked = [
            {"text": text, "choices": [{"right": right, **choice.as_json()} for right, choice in choices]}
            for text, choices in self.questions
        ]
        return {"name": self.name, "title": self.title, "questions": asked}

    def __str__(self) -> str:
        lines = [self.title]
        for number, (text, choices) in enumerate(self.questions, 1):
            lines += ["", f"{number}. {text}"]
            lines += [f"   {letter}) {choice.text}" for letter, (_, choice) in zip("abcdefgh", choices, strict=False)]
        answers = ("abcdefgh"[[right for right, _ in choices].index(True)] for _, choices in self.questions)
        return "\n".join([*lines, "", "Answers: " + ", ".join(f"{n}{letter}" for n, letter in enumerate(answers, 1))])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        asked = "".join(
            f"<fieldset><legend>{number}. {_html(text)}</legend>{''.join(map(_choice, choices))}</fieldset>"
            for number, (text, choices) in enumerate(self.questions, 1)
        )
        html = (
            f'<div class="safescale-quiz"><p class="safescale-title">{_html(self.title)}</p>'
            f"<p>Open the answer you would give; it says whether it is right, and why.</p>{asked}</div>"
        )
        return {"text/plain": str(self), "text/html": html, QUIZ_MIME: self.as_json()}


def _choice(pair: tuple[bool, Choice]) -> str:
    right, choice = pair
    verdict = "Right." if right else "Not quite."
    return (
        f'<details class="{"safescale-right" if right else "safescale-wrong"}"><summary>{_html(choice.text.strip())}</summary>'
        f"<p><strong>{verdict}</strong> {_html(choice.feedback.strip())}</p></details>"
    )


def quiz(name: str, *questions: Question, title: str = "Check yourself", seed: int = 0) -> Quiz:
    """Questions whose choices unfold into feedback.

    name: kebab-case, unique in the notebook. seed: with the name it fixes the order of the choices; the right ones are
    spread over the places. Raises ValueError without questions, or if a question is asked twice.
    """
    if not questions:
        raise ValueError("questions must not be empty")
    if len({question.text for question in questions}) != len(questions):
        raise ValueError("questions must differ from one another")
    dice = random.Random(f"{seed}/{_name(name)}")
    places = list(range(len(questions)))
    dice.shuffle(places)
    asked = []
    for question, place in zip(questions, places, strict=True):
        choices = [(False, choice) for choice in question.wrong]
        dice.shuffle(choices)
        choices.insert(place % (len(choices) + 1), (True, question.right))
        asked.append((question.text, tuple(choices)))
    return Quiz(name, _text("title", title), tuple(asked))


# ----------------------------------------------------------------------------------------------------------- slider


@dataclass(frozen=True)
class Slider:
    """Pictures over the values of one quantity; made by `slider`. Without the site's script all of them stand side by side."""

    name: str
    label: str
    values: tuple[str, ...]
    frames: tuple[bytes, ...]  # PNG
    texts: tuple[str, ...]
    caption: str
    alts: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.label} {value}: {text}" for value, text in zip(self.values, self.texts, strict=True)]
        return "\n".join([self.caption, *lines])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        width, height = _size(self.frames[0])
        shown = "".join(
            f'<div class="safescale-frame" data-value="{escape(value)}">'
            f'<img src="data:image/png;base64,{b64encode(png).decode()}" alt="{escape(alt)}" width="{width}" height="{height}">'
            f"<p><strong>{escape(self.label)} {escape(value)}.</strong> <span>{_html(text)}</span></p></div>"
            for value, png, text, alt in zip(self.values, self.frames, self.texts, self.alts, strict=True)
        )
        html = (
            f'<div class="safescale-slider" data-name="{self.name}" data-label="{escape(self.label)}">'
            f'<p class="safescale-title">{_html(self.caption)}</p><div class="safescale-frames">{shown}</div></div>'
        )
        return {"text/plain": str(self), "text/html": html}


def slider(
    name: str,
    *,
    label: str,
    values: Sequence[object],
    frames: Sequence[bytes | Figure],
    texts: Sequence[str],
    caption: str,
    alt: str | Sequence[str],
) -> Slider:
    """Pictures made now, moved through later: on the site by a slider, without a script as a list.

    name: kebab-case, unique in the notebook. label: the quantity with its unit. values: two or more, in order.
    frames: for each value a figure (it is closed) or the bytes of a PNG, all of one size. texts: for each value, what is
    seen there. alt: for each value, or one text that the value is added to. Raises ValueError if they do not pair up,
    if pictures differ in size, or if together they make more than 400 kB of HTML.
    """
    shown = tuple(str(value) for value in values)
    if len(shown) < 2 or len(set(shown)) != len(shown):
        raise ValueError(f"values must hold two or more different values, got {list(shown)}")
    alts = tuple(f"{alt} {label} {value}." for value in shown) if isinstance(alt, str) else tuple(alt)
    for what, group in (("frames", frames), ("texts", texts), ("alt", alts)):
        if len(group) != len(shown):
            raise ValueError(f"{what} must hold one entry for each of {len(shown)} values, got {len(group)}")
    for what, words in (("label", [label]), ("caption", [caption]), ("texts", texts), ("alt", [alt, *alts])):
        for text in words:
            _text(what, text if isinstance(text, str) else " ".join(text))
    pictures = tuple(frame if isinstance(frame, bytes) else _png(frame) for frame in frames)
    if len({_size(picture) for picture in pictures}) > 1:
        raise ValueError(f"frames must have one size, got {[_size(picture) for picture in pictures]}")
    made = Slider(_name(name), label.strip(), shown, pictures, tuple(texts), caption.strip(), alts)
    size = len(made._repr_mimebundle_()["text/html"])
    if size > SLIDER_BYTES:
        raise ValueError(f"frames make {size:,} bytes of HTML, more than {SLIDER_BYTES:,}: use fewer, or smaller pictures")
    return made


def _png(figure: Figure) -> bytes:
    """A figure as a PNG of its own size (cropping would make a different one of every frame)."""
    import matplotlib.pyplot as plt
    from PIL import Image

    drawn = BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    plt.close(figure)
    packed = BytesIO()
    Image.open(drawn).convert("RGB").save(packed, format="png", optimize=True)  # a quarter smaller than with an alpha channel
    return packed.getvalue()


def _size(png: bytes) -> tuple[int, int]:
    """Width and height of a PNG, from its header."""
    if png[:8] != b"\x89PNG\r\n\x1a\n" or png[12:16] != b"IHDR":
        raise ValueError("frames must be figures or the bytes of a PNG")
    width, height = struct.unpack(">II", png[16:24])
    return int(width), int(height)


# --------------------------------------------------------------------------------------------------------- exercise

DIFFICULTIES = ("easy", "medium", "hard")
_EXERCISE = re.compile(r"### Exercise (?P<number>\d+\.\d+): (?P<title>.+?) \((?P<said>[^()]*)\)")


class Exercise(NamedTuple):
    """What an exercise's heading says. measure: it asks for a measurement and a verdict instead of a function."""

    number: str
    title: str
    difficulty: str
    minutes: int
    measure: bool = False

    def heading(self) -> str:
        """The heading as a notebook writes it."""
        said = f"{self.difficulty}, {self.minutes} minutes" + (", measure" if self.measure else "")
        return f"### Exercise {self.number}: {self.title} ({said})"


def exercise(heading: str) -> Exercise:
    """Read `### Exercise 2.1: title (easy, 10 minutes)`; `(hard, 30 minutes, measure)` marks one without a stub.

    Raises ValueError that says what is missing.
    """
    form = "'### Exercise 2.1: title (easy|medium|hard, N minutes[, measure])'"
    found = _EXERCISE.fullmatch(heading.strip())
    if not found:
        raise ValueError(f"heading must read {form}, got {heading!r}")
    difficulty, *rest = found["said"].split(", ")
    minutes = re.fullmatch(r"([1-9]\d*) minutes", rest[0]) if rest else None
    if difficulty not in DIFFICULTIES or not minutes or rest[1:] not in ([], ["measure"]):
        raise ValueError(f"heading must read {form}, got {heading!r}")
    return Exercise(found["number"], found["title"], difficulty, int(minutes[1]), rest[1:] == ["measure"])


def quizzes(outputs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The quizzes in a cell's outputs, as JSON."""
    return [output["data"][QUIZ_MIME] for output in outputs if QUIZ_MIME in output.get("data", {})]
