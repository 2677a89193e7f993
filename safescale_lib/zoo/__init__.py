"""Small real models with shipped weights, each a stock `transformers` class with its card and recipe.

from safescale_lib import zoo
vit = zoo.load("vit")                                  # the small one that ships
vit = zoo.load("vit", checkpoint="path/to/a/checkpoint")  # any image classifier in Hub layout
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from safescale_lib.zoo.store import ZooError, card, check, names

if TYPE_CHECKING:
    from safescale_lib.zoo.adapter import PixelClassifier

__all__ = ["ZooError", "card", "check", "load", "names"]


def load(name: str, checkpoint: str | PathLike[str] | None = None) -> PixelClassifier:
    """A member as a callable from pixels to logits, in evaluation mode, float32, on the CPU.

    name: a member, see `names()`. checkpoint: a directory in Hub layout, or a Hub name, to load in the member's
    place (same kind of model, any size). Raises ValueError for an unknown name, ZooError for files that are
    missing, damaged or swapped, FileNotFoundError for a directory that is not there.
    """
    from safescale_lib.zoo.adapter import load_classifier

    if checkpoint is None:
        return load_classifier(check(name), local=True)
    if name not in names():
        raise ValueError(f"name must be one of {', '.join(names())}; got {name!r}")
    return load_classifier(checkpoint)
