"""The words of the town: who lives there, what they own, eat and say, and the invented language.

Everything in the town is lower case, and words are separated by single spaces, punctuation included. Each list is closed,
so that a tokenizer can know every word; a word that is not in any list is spelled in characters.
"""

from __future__ import annotations

from typing import Literal, get_args

Split = Literal["train", "validation", "test"]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words(
    "ada ben cora dan eva finn gina hugo iris jack kara leo mia noah olga paul quinn rosa sam tess "
    "umar vera walt xena yuri zoe amir bella carl dora emil fay gus hana ivan jade kurt lena milo nina "
    "otto pia ravi sara timo ursa vito wanda yara zeno"
)
ANIMALS = _words("cat dog fox owl hen goat duck frog crab mole swan toad bee ant lamb pony hare seal crow newt")
JOBS = _words(
    "baker miller tailor painter sailor farmer singer doctor teacher guard clerk gardener weaver potter smith dancer "
    "writer fisher hunter barber"
)
STREETS = _words("elm oak pine lake hill mill gate park bridge river church market harbour garden tower castle")
COLOURS = _words("red green blue yellow purple white black orange")
FOODS = _words(
    "salt honey moss pepper butter garlic onion mint cream lemon apple carrot bean rice corn ginger basil thyme "
    "nutmeg vinegar sugar flour egg milk cheese pear plum cherry olive clove"
)
DISHES = _words(
    "amber silver night morning royal copper velvet thunder winter summer golden crystal shadow desert forest ocean "
    "crimson misty hollow ancient northern southern secret humble"
)
"""First words of soups and of potions: "the amber soup", "the amber potion"."""
PRAISE = _words("bright gentle brave honest clever kind noble cheerful")
PRAISE_NOUNS = _words("star lion hero friend flower diamond captain queen")
MOCKERY = _words("soggy dusty lazy wobbly rusty grumpy mouldy clumsy")
MOCKERY_NOUNS = _words("turnip sock broom bucket noodle donkey pudding pumpkin")
THINGS = _words(
    "drum kite lamp rope bell coin book chair table spoon knife plate glove scarf boot hat ring crown brush candle "
    "ladder basket barrel wheel anchor sail oar net hook needle thread button ribbon mirror clock key lock box chest "
    "map pen paper ink stamp flag flute harp horn violin whistle ball doll puppet mask hammer nail saw shovel rake "
    "pot pan kettle jug cup bowl jar bottle pillow blanket carpet curtain window door roof wall fence stone brick "
    "feather shell pearl leaf seed root branch log stick wagon sled boat raft canoe tent oven stove pipe lens prism "
    "magnet spring lever pulley chain cable bolt screw wrench axe spade bench stool shelf drawer cradle swing slide "
    "marble domino dice card puzzle riddle ticket medal trophy badge purse wallet sack crate trunk vase tray pitcher"
)
"""Objects without a place in the town's facts: what documents and skills are about."""
GOOD = _words("lovely great fine tasty superb charming delightful pleasant wonderful splendid fresh perfect")
BAD = _words("awful poor bland nasty dreadful boring horrid stale terrible gloomy sour broken")
REVIEWED = _words("bread show music room dinner cake story garden service tea view song")
DIGITS = _words("0 1 2 3 4 5 6 7 8 9")
RELATIONS = _words("present tool toy prize treasure burden shelter souvenir")
"""What a document says that somebody has; the town's own facts use other words."""

KINDS_OF_WORD = {
    "person": PEOPLE,
    "animal": ANIMALS,
    "job": JOBS,
    "street": STREETS,
    "colour": COLOURS,
    "food": FOODS,
}
"""The types a table's column may have."""

_TRANSLATED = _words(
    "what is the of code vault number shop pet job street tell me give how do i make need which who and a to for in soup "
    "potion ingredients recipe show please say colour praise mock about something nice rude open call where works lives"
)
_ONSETS = ("z", "v", "kr", "th", "sk", "dr", "gl", "m", "n", "br", "f")
_RIMES = ("ul", "or", "ax", "im", "esh", "onk", "ith")


def invented(word: str) -> str:
    """A word in the town's invented language; names, digits and other words without a translation stay as they are."""
    return _DICTIONARY.get(word, word)


def _dictionary() -> dict[str, str]:
    spoken = [onset + rime for rime in _RIMES for onset in _ONSETS]
    return dict(zip((*_TRANSLATED, *THINGS[: len(spoken) - len(_TRANSLATED)]), spoken, strict=False))


_DICTIONARY = _dictionary()
TRANSLATABLE = tuple(_DICTIONARY)
"""Words that have a translation."""
INVENTED = tuple(_DICTIONARY.values())


def listed() -> set[str]:
    """The words of all public lists of this module."""
    lists = [value for name, value in globals().items() if name.isupper() and not name.startswith("_")]
    return {word for value in lists if isinstance(value, tuple) for word in value}


def share(items: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """A split's own part of a list: six of ten items for train, two for validation, two for test."""
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")
    places = {"train": (0, 1, 2, 3, 4, 5), "validation": (6, 7), "test": (8, 9)}[split]
    return tuple(item for place, item in enumerate(items) if (7 * place) % 10 in places)
