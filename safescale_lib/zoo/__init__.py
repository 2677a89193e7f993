"""Small real models with shipped weights, each a stock `transformers` class with its card and recipe.

from safescale_lib import zoo
vit = zoo.load("vit")                                  # the small one that ships
vit = zoo.load("vit", checkpoint="path/to/a/checkpoint")  # any image classifier in Hub layout
"""

from __future__ import annotations

from os import PathLike
from typing import Any

from safescale_lib.zoo.store import ZooError, card, check, names

__all__ = ["ZooError", "card", "check", "load", "names"]


def load(name: str, checkpoint: str | PathLike[str] | None = None) -> Any:
    """A member, in evaluation mode, float32, on the CPU. A classifier is a callable from pixels to logits.

    name: a member, see `names()`. checkpoint: a directory in Hub layout, or a Hub name, to load in the member's
    place (same kind of model, any size). Raises ValueError for an unknown name, ZooError for files that are
    missing, damaged or swapped, FileNotFoundError for a directory that is not there.
    """
    if name not in names():
        raise ValueError(f"name must be one of {', '.join(names())}; got {name!r}")
    source = check(name) if checkpoint is None else checkpoint
    from safescale_lib.zoo.kinds import kind

    return kind(card(name).get("kind", "classifier")).load(source, local=checkpoint is None)
