"""The survey's taxonomy: chapter, section, category, leaf, in the survey's order.

A key spells its own path: "vfm.vit.adversarial_attack.patch" is the leaf `patch` of the category
`vfm.vit.adversarial_attack` in the section `vfm.vit` of the chapter `vfm`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any, Literal

Level = Literal["chapter", "section", "category", "leaf"]
_CHILDREN: dict[Level, tuple[str, Level]] = {
    "chapter": ("sections", "section"),
    "section": ("categories", "category"),
    "category": ("subcategories", "leaf"),
}


@dataclass(frozen=True)
class Node:
    """One place in the taxonomy, with everything below it.

    key: dotted path. level: chapter, section, category or leaf; a category without subcategories is a leaf.
    number: "3" for a chapter, "3.10" for a section, "" below. access: "white-box", "black-box", ... where the
    survey says so, else "". exemplars: ids of papers in `papers()`. children: in the survey's order.
    """

    key: str
    level: Level
    title: str
    number: str = ""
    access: str = ""
    exemplars: tuple[str, ...] = ()
    children: tuple[Node, ...] = field(default=(), repr=False)

    @property
    def path(self) -> tuple[str, ...]:
        """Keys from the chapter down to this node."""
        parts = self.key.split(".")
        return tuple(".".join(parts[: end + 1]) for end in range(len(parts)))

    def walk(self) -> Iterator[Node]:
        """This node and all below it, in the survey's order."""
        yield self
        for child in self.children:
            yield from child.walk()

    def leaves(self) -> tuple[Node, ...]:
        """The leaves below this node; the node itself if it is one."""
        return tuple(found for found in self.walk() if found.level == "leaf")


@lru_cache(maxsize=1)
def chapters() -> tuple[Node, ...]:
    """The six chapters of the survey that hold techniques."""
    return tuple(_read(chapter, "chapter") for chapter in _file()["chapters"])


@lru_cache(maxsize=1)
def survey() -> Mapping[str, str]:
    """The survey's `title` and the number of its `arxiv` preprint."""
    meta = _file()["meta"]
    return MappingProxyType({"title": meta["survey"], "arxiv": meta["arxiv"]})


@lru_cache(maxsize=1)
def nodes() -> Mapping[str, Node]:
    """Every node by its key, in the survey's order."""
    return MappingProxyType({found.key: found for chapter in chapters() for found in chapter.walk()})


def leaves() -> tuple[Node, ...]:
    """The leaves of the whole taxonomy, in the survey's order."""
    return tuple(leaf for chapter in chapters() for leaf in chapter.leaves())


def node(key: str) -> Node:
    """The node with this key; ValueError with the closest keys if there is none."""
    if key not in nodes():
        raise ValueError(f"key must be in the taxonomy, got {key!r}{close_to(key, nodes())}")
    return nodes()[key]


def close_to(word: str, known: Iterable[str]) -> str:
    """A hint for an error message: "; did you mean a, b?", or nothing if no known word is close."""
    close = get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(close)}?" if close else ""


@lru_cache(maxsize=1)
def _file() -> Mapping[str, Any]:
    import yaml

    text = files("safescale_lib.survey").joinpath("data/taxonomy.yml").read_text(encoding="utf-8")
    loaded: Mapping[str, Any] = yaml.safe_load(text)
    return loaded


def _read(entry: Mapping[str, Any], level: Level) -> Node:
    below, lower = _CHILDREN.get(level, ("", "leaf"))
    children = tuple(_read(child, lower) for child in entry.get(below) or ())
    return Node(
        key=entry["key"],
        level="leaf" if level == "category" and not children else level,
        title=entry["title"],
        number=str(entry.get("number", "")),
        access=entry.get("access", ""),
        exemplars=tuple(entry.get("exemplars", ())),
        children=children,
    )
