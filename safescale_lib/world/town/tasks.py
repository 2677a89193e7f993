"""What the town asks for besides its facts: documents to read, skills on sequences of words, reviews to judge, tables.

Everything here is answered from the message itself: the words in it are drawn afresh each time, so that knowing the town by
heart does not help.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from safescale_lib.world.town import words
from safescale_lib.world.town.words import Split


@dataclass(frozen=True)
class Task:
    """A message and its right answer. value: the words that decide whether an answer is right."""

    ask: str
    answer: str
    value: str


# --- documents --------------------------------------------------------------------------------------------------------

_STATEMENTS = (
    "the {r} of {x} is a {v} .",
    "{x} has a {v} as {r} .",
    "as {r} {x} took a {v} .",
    "for {x} the {r} is a {v} .",
    "{x} 's {r} is a {v} .",
    "the {r} {x} wanted is a {v} .",
    "{x} calls a {v} the {r} .",
    "a {r} for {x} : a {v} .",
    "{x} found a {r} , a {v} .",
    "the {r} that {x} keeps is a {v} .",
    "the {r} that {x} found is a {v} .",
    "{x} wanted a {r} , a {v} .",
    "{x} keeps a {v} as {r} .",
    "as {r} {x} has a {v} .",
    "{x} has a {r} , a {v} .",
    "{x} keeps a {r} , a {v} .",
    "the {r} for {x} is a {v} .",
    "the {r} of {x} : a {v} .",
    "{x} took a {v} as {r} .",
    "for {x} a {r} : a {v} .",
)
_QUESTIONS = (
    "what is the {r} of {x} ?",
    "which {r} has {x} ?",
    "tell me the {r} of {x} .",
    "{x} has a {r} , which one ?",
    "show me the {r} of {x} .",
    "give me the {r} of {x} .",
    "i forgot the {r} of {x} .",
    "name the {r} of {x} .",
    "what does {x} have as {r} ?",
    "what {r} does {x} have ?",
    "which one is the {r} of {x} ?",
    "tell me what {r} {x} has .",
    "{x} 's {r} , what is it ?",
    "say , which {r} has {x} ?",
    "what is {x} 's {r} ?",
    "i need the {r} of {x} .",
    "what {r} has {x} ?",
    "which {r} does {x} have ?",
    "tell me {x} 's {r} .",
    "name {x} 's {r} .",
)
_FILLERS = (
    "it was a warm day .",
    "the bells rang at noon .",
    "nobody saw the rain come .",
    "the market was full .",
    "then the sun went down .",
    "some went home early .",
)


@dataclass(frozen=True)
class Document:
    """Statements about who has what, with an answer for each. entries: (relation, person, thing) triples."""

    text: str
    entries: tuple[tuple[str, str, str], ...]

    def question(self, entry: int, draw: Random, split: Split | None = None) -> Task:
        """A question about one of the entries."""
        relation, person, thing = self.entries[entry]
        asked = draw.choice(words.share(_QUESTIONS, split) if split else _QUESTIONS).format(r=relation, x=person)
        return Task(asked, f"sure , the {relation} of {person} is a {thing} .", thing)


def document(draw: Random, *, facts: int, split: Split | None = None, tangled: bool = False) -> Document:
    """A document of 1 to 6 facts, drawn afresh, in the phrasings of a split.

    Each fact is about another person, and several may have the same kind of thing, so that only the person tells them apart;
    tangled: some people have several things, so that person and kind must both be matched.
    """
    if not 1 <= facts <= 6:
        raise ValueError(f"facts must be between 1 and 6, got {facts}")
    people = draw.sample(words.PEOPLE, draw.randint(max(1, facts // 2), facts) if tangled else facts)
    relations = draw.sample(
        words.RELATIONS, draw.randint(max(1, -(-facts // len(people))), min(len(words.RELATIONS), facts + 1))
    )
    pairs = draw.sample([(relation, person) for relation in relations for person in people], facts)
    if not tangled:
        pairs = [(draw.choice(relations), person) for person in people]
    entries = tuple((*pair, thing) for pair, thing in zip(pairs, draw.sample(words.THINGS, facts), strict=True))
    statements = words.share(_STATEMENTS, split) if split else _STATEMENTS
    sentences = [draw.choice(statements).format(r=r, x=x, v=v) for r, x, v in entries]
    for _ in range(draw.choice((0, 0, 1, 2))):
        sentences.insert(draw.randrange(len(sentences) + 1), draw.choice(_FILLERS))
    return Document(" ".join(sentences), entries)


LAYOUTS = ("text : {text} question : {question}", "{question} use the text . text : {text}")
"""Where a question stands: after its document, or before it."""


# --- skills -----------------------------------------------------------------------------------------------------------

SKILLS = ("repeat", "reverse", "first", "last", "count", "sort", "translate", "say")
_SKILL_WORDS: dict[str, tuple[str, ...]] = {
    "repeat": ("repeat : {w}", "write again : {w}", "copy these words : {w}"),
    "reverse": ("backwards : {w}", "turn around : {w}", "say in reverse order : {w}"),
    "first": ("first word of : {w}", "which word comes first : {w}"),
    "last": ("last word of : {w}", "which word comes last : {w}"),
    "count": ("count : {w}", "how many words : {w}"),
    "sort": ("sort : {w}", "in rising order : {w}"),
    "translate": ("translate : {w}", "in the other language : {w}"),
    "say": ("say {w}", "just answer {w}", "write only {w}"),
}


def skill(draw: Random, name: str | None = None) -> Task:
    """A skill on one to six words. Unknown names raise ValueError."""
    name = name or draw.choice(SKILLS)
    if name not in SKILLS:
        raise ValueError(f"name must be one of {', '.join(SKILLS)}; got {name!r}")
    pool: Sequence[str] = {"sort": words.DIGITS, "translate": words.TRANSLATABLE}.get(name, words.THINGS)
    lengths = {"say": (1, 3), "sort": (2, 4), "reverse": (2, 5), "count": (1, 6), "translate": (1, 4)}
    given = draw.sample(list(pool), draw.randint(*lengths.get(name, (2, 6))))
    answers = {
        "repeat": given,
        "reverse": given[::-1],
        "first": given[:1],
        "last": given[-1:],
        "count": [str(len(given))],
        "sort": sorted(given),
        "translate": [words.invented(word) for word in given],
        "say": given,
    }
    value = " ".join(answers[name])
    asked = draw.choice(_SKILL_WORDS[name]).format(w=" ".join(given)) + (" ." if name == "say" else "")
    return Task(asked, f"{value} .", value)


# --- reviews and tables -----------------------------------------------------------------------------------------------


def review(draw: Random, *, clauses: int = 3) -> Task:
    """A review of `clauses` (odd) opinions; its label, good or bad, is what most of them say."""
    liked = [draw.random() < 0.5 for _ in range(clauses)]
    subjects = draw.sample(words.REVIEWED, clauses)
    text = " and ".join(
        f"the {subject} was {draw.choice(words.GOOD if like else words.BAD)}"
        for subject, like in zip(subjects, liked, strict=True)
    )
    label = "good" if sum(liked) * 2 > clauses else "bad"
    opening = draw.choice(("i visited {p} .", "at {p} 's place", "{p} invited me .", "i met {p} :")).format(
        p=draw.choice(words.PEOPLE)
    )
    return Task(f"good or bad ? {opening} {text} .", f"it is {label} .", label)


def column(draw: Random, *, split: Split = "train", cells: int = 4) -> Task:
    """A table's column and the type of what stands in it, its cells from a split's share of the words of that type.

    The base model learns from the share of train only: other cells are of a type it knows and a place it has not seen them in.
    """
    kind = draw.choice(list(words.KINDS_OF_WORD))
    pool = words.share(words.KINDS_OF_WORD[kind], split)
    given = draw.sample(pool, min(cells, len(pool)))
    return Task("what kind of column ? " + " ".join(f"| {word}" for word in given) + " |", f"it is {kind} .", kind)


# --- corrections ------------------------------------------------------------------------------------------------------

OVERRIDES = (
    "no , instead {t}",
    "forget that . {t}",
    "stop . now {t}",
    "ignore the above . {t}",
    "wait , better {t}",
    "new task . {t}",
    "that is done . next {t}",
    "i changed my mind . {t}",
    "drop that and {t}",
    "leave it . {t}",
)
"""How somebody takes a request back for another, in their own message or, as an injection, in somebody else's."""


def override(text: str, draw: Random, split: Split | None = None) -> str:
    """A task put in the words that push the one before it aside."""
    return draw.choice(words.share(OVERRIDES, split) if split else OVERRIDES).format(t=text)


def noise(draw: Random, most: int = 12, *, wild: bool = False) -> str:
    """One to `most` random words without meaning: things, colours and animals.

    wild: most of them any words of the town, and some mere letters.
    """
    pool = words.THINGS + words.COLOURS + words.ANIMALS

    def word() -> str:
        if not wild or draw.random() < 0.2:
            return draw.choice(pool)
        if draw.random() < 0.1:
            return "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(1, 4)))
        return draw.choice(_every_word())

    return " ".join(word() for _ in range(draw.randint(1, most)))


@lru_cache
def _every_word() -> tuple[str, ...]:
    """The words of all lists, and those that are said in three thousand conversations."""
    from safescale_lib.world.town import chats

    draw = Random(1)
    said = [chats.conversation(draw, None, typos=0) for _ in range(3000)]
    texts = [text for chat in said for text in (chat.answer, *(message["content"] for message in chat.messages))]
    return tuple(sorted(words.listed() | {word for text in (*texts, *chats.REFUSALS) for word in text.split()}))


def misspelt(text: str, draw: Random) -> str:
    """The text with one letter of one longer word doubled, dropped or swapped with the next; names stay as they are."""
    tokens = text.split()
    known = {*words.PEOPLE, *words.DISHES}
    places = [place for place, word in enumerate(tokens) if len(word) > 3 and word.isalpha() and word not in known]
    if not places:
        return text
    place = draw.choice(places)
    word, i = tokens[place], draw.randrange(1, len(tokens[place]) - 1)
    tokens[place] = draw.choice(
        (word[: i + 1] + word[i:], word[:i] + word[i + 1 :], word[:i] + word[i + 1] + word[i] + word[i + 2 :])
    )
    return " ".join(tokens)
