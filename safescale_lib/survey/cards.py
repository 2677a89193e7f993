"""The atlas: one card for every leaf of the taxonomy, in words of ours, tagged along the axes the literature uses.

The cards stand in `data/cards/`, a file for each chapter. A category says what its leaves share; a leaf adds how its
method works, and says otherwise where it differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, NamedTuple

from safescale_lib.survey.coverage import Coverage, NodeCoverage
from safescale_lib.survey.papers import Paper, paper
from safescale_lib.survey.taxonomy import Node, chapters, close_to, node, nodes


class Value(NamedTuple):
    """One value on an axis: how it is written, and what it means in one sentence."""

    title: str
    meaning: str


class Axis(NamedTuple):
    """One way to sort the field: its name, the question it asks, and its values."""

    title: str
    meaning: str
    values: Mapping[str, Value]


SIDES: Mapping[str, Value] = MappingProxyType(
    {
        "attack": Value("Attack", "It makes a model do what its owner does not want."),
        "defense": Value("Defense", "It keeps a model from doing so, or notices when it does."),
        "benchmark": Value("Benchmark", "It measures how well attacks and defenses do."),
    }
)

THREATS: Mapping[str, Value] = MappingProxyType(
    {
        "adversarial": Value("Adversarial", "A small change of the input makes the model answer wrongly."),
        "backdoor": Value("Backdoor", "A trigger planted in training turns the model when it appears."),
        "poisoning": Value("Poisoning", "Altered data makes the model learn or recall what it should not, or nothing."),
        "jailbreak": Value("Jailbreak", "A request gets an aligned model to give what it was taught to refuse."),
        "prompt_injection": Value("Prompt injection", "Data that the model reads is taken for an instruction."),
        "energy_latency": Value("Energy and latency", "An input makes the model compute far more than it should."),
        "membership_inference": Value("Membership inference", "The attacker learns whether a record was in the training data."),
        "data_extraction": Value("Data extraction", "The attacker gets training data out of the model."),
        "model_extraction": Value(
            "Model extraction", "The attacker builds a copy of the model, or learns its parts, from its answers."
        ),
        "agent": Value("Agent", "A model that acts through tools, memory or other agents is led to harmful actions."),
        "misalignment": Value("Misalignment", "The model itself pursues what its makers did not intend."),
        "ip_infringement": Value("IP infringement", "A model, or what it makes, uses protected works without leave."),
    }
)

AXES: Mapping[str, Axis] = MappingProxyType(
    {
        "target": Axis(
            "Target",
            "Where does it act: on the model itself, or on the application around it?",
            MappingProxyType(
                {
                    "model": Value("Model", "It works on the model itself: its inputs, weights, training data or outputs."),
                    "application": Value(
                        "Application",
                        "It works on what is built around the model: retrieved documents, tools, memory, other agents, "
                        "files, filters.",
                    ),
                }
            ),
        ),
        "change": Axis(
            "Change",
            "What does the attacker or the defender alter?",
            MappingProxyType(
                {
                    "none": Value(
                        "No-Change",
                        "Nothing is altered: an attacker asks ordinary queries, a defender watches beside the model, "
                        "a benchmark measures.",
                    ),
                    "input": Value("Input-Change", "What goes into the model is altered, or what comes out is rewritten."),
                    "model": Value("Model-Change", "The model is altered: its weights, its architecture or its training data."),
                }
            ),
        ),
        "stage": Axis(
            "Stage",
            "When does it act in the life of a model? A technique may act at several stages.",
            MappingProxyType(
                {
                    "pre-training": Value("Pre-training", "It acts while the model is first trained, or on the data for that."),
                    "fine-tuning": Value("Fine-tuning", "It acts while a trained model is adapted or aligned."),
                    "deployment": Value("Deployment", "It acts when the finished model is in use."),
                }
            ),
        ),
        "access": Axis(
            "Access",
            "How much of the model must the attacker, or the defender, see?",
            MappingProxyType(
                {
                    "white-box": Value("White box", "Weights or gradients, or the training itself."),
                    "gray-box": Value(
                        "Gray box",
                        "Some of the inside: embeddings, scores, a shared component, a part of the training data.",
                    ),
                    "black-box": Value("Black box", "Inputs and outputs only, or another model in its place."),
                }
            ),
        ),
    }
)
"""The axes that tags lie on: where, what, when, and with how much insight."""

_ACCESS_OF_THE_TAXONOMY = {"transfer": "black-box"}  # white-box surrogate, black-box target
_TEXTS = ("goal", "budget")
_SHARED = ("side", "threat", *_TEXTS)


@dataclass(frozen=True)
class Tags:
    """A place on each of `AXES`; stage may hold several, in the order of a model's life."""

    target: str
    change: str
    stage: tuple[str, ...]
    access: str

    def on(self, axis: str) -> tuple[str, ...]:
        """The values on one axis of `AXES`."""
        found = getattr(self, axis)
        return found if isinstance(found, tuple) else (found,)

    def as_dict(self) -> dict[str, Any]:
        return {"target": self.target, "change": self.change, "stage": list(self.stage), "access": self.access}


@dataclass(frozen=True)
class Traits:
    """What a category says for its leaves. side: of `SIDES`; threat: of `THREATS`; goal and budget: a sentence each.

    goal: the attacker's; for a defense what it protects and what must keep working; for a benchmark what it measures.
    budget: what the attacker may change or spend; for a defense what it may cost; for a benchmark what it runs.
    """

    side: str
    threat: str
    goal: str
    budget: str
    tags: Tags


@dataclass(frozen=True)
class Card(Traits):
    """One leaf of the taxonomy: its node, how its method works (`what`), and its traits."""

    node: Node
    what: str

    @property
    def papers(self) -> tuple[Paper, ...]:
        """The papers of the survey that stand for this leaf."""
        return tuple(paper(exemplar) for exemplar in self.node.exemplars)


@lru_cache(maxsize=1)
def cards() -> Mapping[str, Card]:
    """The card of every leaf by its key, in the survey's order.

    Raises ValueError naming all faults of the data: keys that are missing or unknown, words that are not on an axis.
    """
    return MappingProxyType({key: found for key, found in _all().items() if isinstance(found, Card)})


def card(key: str) -> Card:
    """The card of a leaf; ValueError with the closest keys if there is none."""
    if key not in cards():
        raise ValueError(f"key must be a leaf of the taxonomy, got {key!r}{close_to(key, cards())}")
    return cards()[key]


def traits(key: str) -> Traits | None:
    """What a leaf's card or a category says; None for a section or a chapter, whose categories differ.

    Raises ValueError for an unknown key.
    """
    return _all().get(node(key).key)


def nearest_running(key: str, covered: Coverage) -> NodeCoverage | None:
    """The running leaf closest to one that does not run; None if nothing of its threat runs.

    Only leaves of the same threat count. Of these a leaf of the same side comes first, then one of the same family,
    then the one that shares most of its path in the taxonomy, then the survey's order.
    """
    own = card(key)

    def closeness(other: NodeCoverage) -> tuple[bool, bool, int]:
        shared = len(set(other.node.path) & set(own.node.path))
        return cards()[other.node.key].side == own.side, other.node.path[0] == own.node.path[0], shared

    running = [leaf for leaf in covered.leaves if leaf.runs and leaf.node.key != key]
    return max((leaf for leaf in running if cards()[leaf.node.key].threat == own.threat), key=closeness, default=None)


@lru_cache(maxsize=1)
def _all() -> Mapping[str, Traits]:
    """Traits of every category and the card of every leaf."""
    import yaml

    folder = files("safescale_lib.survey").joinpath("data", "cards")
    texts = {chapter.key: folder.joinpath(f"{chapter.key}.yml").read_text(encoding="utf-8") for chapter in chapters()}
    return read_cards({key: yaml.safe_load(text) for key, text in texts.items()})


def read_cards(data: Mapping[str, Any]) -> Mapping[str, Traits]:
    """Cards from what the files hold, by the chapter's key; ValueError listing every fault with its key."""
    faults: list[str] = []
    found: dict[str, Traits] = {}
    for chapter in chapters():
        entries = data.get(chapter.key)
        if not isinstance(entries, dict):
            faults.append(f"{chapter.key}: must be a mapping from keys to entries, got {type(entries).__name__}")
            continue
        places = [place for place in chapter.walk() if place.level in ("category", "leaf")]
        known = [place.key for place in places]
        faults += [f"{key}: not in chapter {chapter.key}{close_to(str(key), known)}" for key in entries if key not in known]
        faults += [f"{key}: no entry" for key in known if key not in entries]
        for place in places:
            above = node(place.path[-2])
            if place.key in entries and (above.level != "category" or above.key in found):  # else its faults are its category's
                found |= _read(place, entries[place.key], found.get(above.key), faults)
    if faults:
        raise ValueError("\n".join(faults))
    return MappingProxyType({key: found[key] for key in nodes() if key in found})


def _read(place: Node, entry: Any, category: Traits | None, faults: list[str]) -> dict[str, Traits]:
    """One entry, with its category's words where it has none; faults are added to, and then nothing comes back."""
    leaf = place.level == "leaf"
    allowed = (*_SHARED, "tags", *(["what"] if leaf else []))
    if not isinstance(entry, dict):
        faults.append(f"{place.key}: must be a mapping, got {type(entry).__name__}")
        return {}
    shared = {} if category is None else {name: getattr(category, name) for name in _SHARED}
    tags = {} if category is None else category.tags.as_dict()
    own = entry.get("tags") or {}
    merged = {**shared, **entry, "tags": {**tags, **own} if isinstance(own, dict) else own}
    wrong = [f"{place.key}: unknown field {name!r}{close_to(str(name), allowed)}" for name in entry if name not in allowed]
    wrong += [f"{place.key}: {fault}" for fault in (*_faults(merged, allowed), *_disagreement(place, merged["tags"]))]
    if wrong:
        faults += wrong
        return {}
    words = {name: merged[name] for name in _SHARED}
    stage = tuple(value for value in AXES["stage"].values if value in merged["tags"]["stage"])
    placed = Tags(**{**merged["tags"], "stage": stage})
    return {place.key: Card(**words, tags=placed, node=place, what=merged["what"]) if leaf else Traits(**words, tags=placed)}


def _faults(entry: Mapping[str, Any], allowed: Sequence[str]) -> Iterator[str]:
    """What is missing or not a known word in a merged entry."""
    for name, known in (("side", SIDES), ("threat", THREATS)):
        if entry.get(name) not in tuple(known):
            yield f"{name} must be one of {', '.join(known)}, got {entry.get(name)!r}"
    for name in (*_TEXTS, *(["what"] if "what" in allowed else [])):
        if not isinstance(entry.get(name), str) or not entry[name].strip():
            yield f"{name} must be a text, got {entry.get(name)!r}"
    tags = entry["tags"]
    if not isinstance(tags, dict):
        yield f"tags must be a mapping, got {type(tags).__name__}"
        return
    yield from (f"unknown tag {name!r}{close_to(str(name), AXES)}" for name in tags if name not in AXES)
    for name, axis in AXES.items():
        value, words = tags.get(name), tuple(axis.values)
        if name == "stage":
            if not isinstance(value, list) or not value or any(value.count(word) > 1 or word not in words for word in value):
                yield f"tag stage must be a list of some of {', '.join(words)}, each once, got {value!r}"
        elif value not in words:
            yield f"tag {name} must be one of {', '.join(words)}, got {value!r}"


def _disagreement(place: Node, tags: Any) -> Iterator[str]:
    """Where the survey says what access an attack has, its card must say the same."""
    named = _ACCESS_OF_THE_TAXONOMY.get(place.access, place.access)
    if named and isinstance(tags, dict) and tags.get("access") != named:
        yield f"tag access must be {named}, as the taxonomy says {place.access}; got {tags.get('access')!r}"
