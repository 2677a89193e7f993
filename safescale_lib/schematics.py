"""The ten attack types, each as one small drawing of the same scheme: what the attacker changes, reads and gains.

Five boxes stand for any large model in use: training data and input go into a model, an answer comes out, and around it
are the documents, tools and memories of an application. An attack marks the boxes it touches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from safescale_lib.figures import COLOURS, Shown, show, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BOXES: Mapping[str, tuple[str, float, float]] = MappingProxyType(
    {
        "data": ("training data", 0.5, 37),
        "model": ("model", 34.75, 37),
        "answer": ("answer", 69, 37),
        "input": ("input", 34.75, 2),
        "around": ("application", 69, 2),
    }
)
"""Name on the box and its lower left corner, in percent of the drawing's width."""

_WIDE, _HIGH = 30.5, 23
_GAIN = (0.5, 2)
_TABS = {"changes": "changed", "asks": "asked", "reads": "read"}  # a mark and the word on its tab


@dataclass(frozen=True)
class Scheme:
    """One attack type. title: its name. gain: what the attacker has at the end. caption: what to see.

    changes, asks, reads: per box that the attacker alters, queries or looks at, what is done there, in at most two short lines.
    notes: what happens in boxes nobody touches. Raises ValueError for an unknown box, one named twice, or none touched.
    """

    title: str
    gain: str
    caption: str
    changes: Mapping[str, str] = field(default_factory=dict)
    asks: Mapping[str, str] = field(default_factory=dict)
    reads: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = [*self.changes, *self.asks, *self.reads, *self.notes]
        unknown = sorted(set(named) - set(BOXES))
        if unknown:
            raise ValueError(f"changes, asks, reads and notes must name boxes of {', '.join(BOXES)}; got {', '.join(unknown)}")
        if len(named) != len(set(named)):
            raise ValueError(f"changes, asks, reads and notes must not name a box twice, got {named}")
        if len(named) == len(self.notes):
            raise ValueError("changes, asks and reads must not all be empty: an attacker touches something")

    @property
    def alt(self) -> str:
        """The drawing in words."""

        def told(verb: str, marks: Mapping[str, str]) -> str:
            return "".join(f" The attacker {verb} the {BOXES[box][0]}: {_flat(text)}." for box, text in marks.items())

        beside = "".join(f" Written in the {BOXES[box][0]} box: {_flat(text)}." for box, text in self.notes.items())
        return (
            "Five boxes: training data and input lead to a model, which gives an answer and exchanges with the application "
            f"around it.{told('changes', self.changes)}{told('queries', self.asks)}{told('reads', self.reads)}{beside} "
            f"Gain: {_flat(self.gain)}."
        ).replace("?.", "?")


def _flat(text: str) -> str:
    return " ".join(text.split())


ATTACKS: Mapping[str, Scheme] = MappingProxyType(
    {
        "adversarial": Scheme(
            "Adversarial attack",
            "a wrong answer\nto an input that\nlooks the same",
            "Adversarial attack: a small change of the input, found by search, makes the answer wrong.",
            changes={"input": "a small, well\nchosen change"},
            reads={"model": "its gradient, or\nonly its answers"},
            notes={"answer": "wrong"},
        ),
        "backdoor": Scheme(
            "Backdoor attack",
            "a key that opens\nthe model later",
            "Backdoor attack: poisoned training data teach the model to obey a trigger. Without the trigger nothing is seen.",
            changes={"data": "trigger with the\ntarget's label", "input": "carries the\ntrigger"},
            notes={"answer": "the attacker's\ntarget"},
        ),
        "poisoning": Scheme(
            "Data poisoning",
            "a model that fails\nwhere the attacker\nchooses",
            "Data poisoning: spoiled training data make the trained model fail on ordinary inputs.",
            changes={"data": "wrong labels, or\nspoiled items"},
            notes={"answer": "wrong for some,\nor for all"},
        ),
        "jailbreak": Scheme(
            "Jailbreak",
            "what the model\nwas trained\nto refuse",
            "Jailbreak: the user asks for something refused, in a form that the training to refuse does not cover.",
            changes={"input": "the same wish in\nanother form"},
            notes={"answer": "no longer\na refusal"},
        ),
        "prompt_injection": Scheme(
            "Prompt injection",
            "the model works\nfor a stranger",
            "Prompt injection: an instruction hidden in what the model reads is taken for an instruction of its user.",
            changes={"around": "an instruction\nin a document"},
            notes={"input": "an honest\nrequest", "answer": "follows the\ndocument"},
        ),
        "energy_latency": Scheme(
            "Energy-latency attack",
            "time and money\nof the victim",
            "Energy-latency attack: the answer may stay right, but the input makes the model work as long as it can.",
            changes={"input": "keeps the model\nbusy"},
            notes={"model": "works longer", "answer": "late"},
        ),
        "membership_inference": Scheme(
            "Membership inference",
            "was this item in\nthe training data?",
            "Membership inference: a model is often surer of what it was trained on. Its answer gives that away.",
            asks={"input": "the item\nin question"},
            reads={"answer": "how sure is\nthe model?"},
            notes={"data": "the secret:\nwho is in it"},
        ),
        "data_extraction": Scheme(
            "Data extraction",
            "training items\nthemselves",
            "Data extraction: answers, or shared gradients, are turned back into the training data they came from.",
            asks={"input": "a prompt that\ninvites reciting"},
            reads={"answer": "memorised text\nor pictures"},
            notes={"data": "the secret"},
        ),
        "model_extraction": Scheme(
            "Model extraction",
            "a copy of\nthe model",
            "Model extraction: the answers to many queries train a second model that behaves like the first.",
            asks={"input": "many queries"},
            reads={"answer": "labels for the\ncopy's training"},
            notes={"model": "the secret"},
        ),
        "agent": Scheme(
            "Attack on an agent",
            "actions nobody\nasked for",
            "Attack on an agent: what it reads, remembers or is told by other agents steers what it does.",
            changes={"around": "tools, memory,\nother agents"},
            notes={"input": "an honest task", "answer": "an action in\nthe world"},
        ),
    }
)
"""The ten attack types of the survey by the name of their threat."""


def row(threat: str) -> tuple[str, str, str, str]:
    """One attack type as a row of a table: its title, what it changes, what it asks or reads, what it gains."""
    scheme = _scheme(threat)

    def boxes(*marks: Mapping[str, str]) -> str:
        return ", ".join(BOXES[box][0] for group in marks for box in group) or "nothing"

    return scheme.title, boxes(scheme.changes), boxes(scheme.asks, scheme.reads), _flat(scheme.gain)


def _scheme(threat: str) -> Scheme:
    if threat not in ATTACKS:
        raise ValueError(f"threat must be one of {', '.join(ATTACKS)}; got {threat!r}")
    return ATTACKS[threat]


def draw(scheme: Scheme) -> Figure:
    """The scheme as a figure that stays readable on a phone. Thick orange: changed; dashed blue: asked or read."""
    import matplotlib.pyplot as plt

    with style():
        figure, axis = plt.subplots(figsize=(4.25, 2.9), layout="constrained")
        axis.set(xlim=(0, 100), ylim=(0, 63))
        axis.axis("off")
        for start, end in (((30.5, 48), (35, 48)), ((64.75, 48), (69.2, 48)), ((50, 28), (50, 36.5))):
            axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1.4})
        axis.annotate("", (69, 23.5), (64.9, 38), arrowprops={"arrowstyle": "<|-|>", "color": "black", "lw": 1.4})
        for box in BOXES:
            _box(axis, scheme, box)
        left, low = _GAIN
        axis.text(left, low + _HIGH - 1, "gain", fontsize=11, fontweight="bold", va="top")
        axis.text(left, low + _HIGH - 6.5, scheme.gain, fontsize=10, va="top", linespacing=1.15)
    return figure


def _box(axis: Axes, scheme: Scheme, box: str) -> None:
    """One box with its name, its mark and what is said of it."""
    from matplotlib.patches import FancyBboxPatch

    name, left, low = BOXES[box]
    mark = next((kind for kind in _TABS if box in getattr(scheme, kind)), "")
    text = next((marks[box] for marks in (scheme.changes, scheme.asks, scheme.reads, scheme.notes) if box in marks), "")
    looked_at = {"edgecolor": COLOURS[0], "facecolor": "#e6f1f8", "linewidth": 2.2, "linestyle": "--"}
    looks: dict[str, Any] = {
        "changes": {"edgecolor": COLOURS[1], "facecolor": "#fdeadb", "linewidth": 3.0},
        "": {"edgecolor": "#666666", "facecolor": "white", "linewidth": 1.0},
    }.get(mark, looked_at)
    axis.add_patch(FancyBboxPatch((left, low), _WIDE, _HIGH, boxstyle="round,pad=0,rounding_size=1.6", **looks))
    middle = left + _WIDE / 2
    if text or mark:
        axis.text(middle, low + _HIGH - 3.6, name, fontsize=11, fontweight="bold", ha="center", va="top")
        axis.text(middle, low + 2, text, fontsize=10, ha="center", va="bottom", linespacing=1.1)
    else:
        axis.text(middle, low + _HIGH / 2, name, fontsize=11, color="#444444", ha="center", va="center")
    if mark:
        tab = {"boxstyle": "round,pad=0.15", "facecolor": looks["edgecolor"], "edgecolor": "none"}
        axis.text(middle, low + _HIGH, _TABS[mark], fontsize=9, color="white", ha="center", va="center", bbox=tab)


def picture(threat: str, prefix: str = "fig-intro") -> Shown:
    """The drawing of one attack type with its caption and alt text, for a notebook. threat: a key of `ATTACKS`.

    prefix: of the figure's label, which must be unique in the book. Raises ValueError for an unknown threat.
    """
    scheme = _scheme(threat)
    return show(draw(scheme), f"{prefix}-{threat.replace('_', '-')}", caption=scheme.caption, alt=scheme.alt)
