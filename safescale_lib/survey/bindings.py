"""Binding a function to its place in the survey.

    @technique("vfm.vit.adversarial_attack.patch", paper="fu2022patchfool")
    def patch_fool(...): ...

The decorator only takes a note, so that importing a chapter reads neither taxonomy nor bibliography; `bindings()`
checks every note against both.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

from safescale_lib.survey.papers import citation_keys
from safescale_lib.survey.taxonomy import Level, chapters, close_to, node, nodes

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Technique:
    """A function's place: the taxonomy's key, the paper's citation key, and where the function is defined."""

    key: str
    paper: str
    module: str
    name: str

    @property
    def function(self) -> Callable[..., Any]:
        """The function itself, imported from where it is defined."""
        found: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            found = getattr(found, part)
        return found  # type: ignore[no-any-return]

    @property
    def level(self) -> Level:
        """ "leaf" for a technique of the survey, anything else for a baseline its techniques start from."""
        return node(self.key).level


_NOTED: dict[Technique, None] = {}  # a dict keeps the order and forgets repeats, as when a module is reloaded


def technique(key: str, *, paper: str) -> Callable[[F], F]:
    """Bind the decorated function to a node of the taxonomy and to the bibliography; it is returned as it was.

    key: a leaf, or the category or section whose techniques start from this function (a baseline: it never makes
    a leaf count as running). paper: citation key of the source. Decorate several times for several places; the
    attribute `__technique__` holds the topmost. Unknown keys are reported by `bindings()`.
    """
    for name, value in (("key", key), ("paper", paper)):
        if not isinstance(value, str) or not value:
            raise TypeError(f"{name} must be a non-empty string, got {value!r}")

    def bind(function: F) -> F:
        noted = Technique(key, paper, function.__module__, function.__qualname__)
        _NOTED[noted] = None
        function.__technique__ = noted  # type: ignore[attr-defined]
        return function

    return bind


def bindings() -> tuple[Technique, ...]:
    """Every technique of the library, in the survey's order, after importing all chapters that exist.

    A chapter may bind a function of `search` as it stands; its module is then the one that defines it.

    Raises ValueError naming the functions whose key or paper is unknown.
    """
    for package in filter(find_spec, (f"safescale_lib.{chapter.key}" for chapter in chapters())):
        imported = importlib.import_module(package)
        for module in pkgutil.walk_packages(imported.__path__, f"{package}."):
            importlib.import_module(module.name)
    ours = [noted for noted in _NOTED if noted.module.startswith("safescale_lib.")]  # not what a notebook tries out
    check(ours)
    order = {key: position for position, key in enumerate(nodes())}
    return tuple(sorted(ours, key=lambda noted: (order[noted.key], noted.module, noted.name)))


def check(techniques: Iterable[Technique]) -> None:
    """Raise ValueError unless every key is in the taxonomy below its chapters and every paper in a bibliography."""
    wrong = []
    for noted in techniques:
        where = f"{noted.module}.{noted.name}"
        if noted.key not in nodes():
            wrong.append(f"{where}: unknown key {noted.key!r}{close_to(noted.key, nodes())}")
        elif node(noted.key).level == "chapter":
            wrong.append(f"{where}: key {noted.key!r} is a whole chapter; name a section, a category or a leaf")
        if noted.paper not in citation_keys():
            wrong.append(f"{where}: unknown paper {noted.paper!r}{close_to(noted.paper, citation_keys())}")
    if wrong:
        raise ValueError("\n".join(wrong))
