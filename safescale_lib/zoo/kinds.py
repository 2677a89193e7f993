"""The kinds of model in the zoo. A kind is a module with six functions and a tag; a recipe names its kind.

Members of one kind share how they are built, trained, stored, read and measured, and differ in numbers only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, cast

import torch

KINDS = {
    "classifier": "safescale_lib.zoo.classifier",
    "segmenter": "safescale_lib.zoo.segmenter",
    "denoiser": "safescale_lib.zoo.denoiser",
    "chat": "safescale_lib.zoo.chat",
}
"""Module of each kind, by name."""


@dataclass(frozen=True)
class Run:
    """One training: seed of everything random, where, where to resume from (None: nowhere), bar or no bar."""

    seed: int = 0
    device: str = "cpu"
    state: Path | None = None
    progress: bool = True


@dataclass(frozen=True)
class Training:
    """The numbers of a recipe. steps of `batch` fresh scenes each; lr: peak learning rate of AdamW.

    eps, inner_steps: radius (in pixel units) and steps of the attack inside adversarial training; 0 for none.
    ramp: share of the training over which eps grows from zero. start: member whose weights it begins from.
    data: name of the corpus, where a kind has several.
    threads: of the CPU; sums differ in their last bit between 1 and 2, and training amplifies that.
    """

    steps: int
    batch: int = 128
    lr: float = 1.5e-3
    label_smoothing: float = 0.0
    eps: float = 0.0
    inner_steps: int = 0
    ramp: float = 0.0
    start: str | None = None
    data: str = ""
    threads: int = 1

    def batch_seed(self, run: Run, step: int) -> int:
        """Seed of the scenes of one step. Seeds below a million are for evaluation and the notebooks."""
        return (run.seed + 1) * 1_000_000 + step

    def eps_at(self, step: int) -> float:
        """The attack's radius at one step: eps, after growing from zero over the ramp."""
        grown = (step + 1) / (self.ramp * self.steps) if self.ramp else 1.0
        return self.eps * min(1.0, grown)


class Kind(Protocol):
    """What the module of a kind holds."""

    PIPELINE_TAG: str
    """The Hub's word for what the model does, as in the head of its README."""

    def build(self, options: Mapping[str, Any], seed: int) -> torch.nn.Module:
        """A fresh model with random weights; options: the recipe's, such as widths."""
        ...

    def loss(self, model: Any, training: Training, run: Run) -> Callable[[int], torch.Tensor]:
        """Step number -> scalar loss, everything random in it drawn from (run.seed, step)."""
        ...

    def save(self, model: Any, directory: Path) -> None:
        """Write the model in Hub layout, half-precision safetensors."""
        ...

    def load(self, checkpoint: str | PathLike[str], *, local: bool = False) -> Any:
        """Read a directory in Hub layout or, unless local, a Hub name: float32, on the CPU, evaluation mode."""
        ...

    def metrics(self, model: Any) -> list[dict[str, Any]]:
        """Test metrics with 95 % intervals as rows of a card (metric, value, low, high, n), the headline first."""
        ...

    def describe(self, model: Any) -> str:
        """The architecture in one line."""
        ...


def kind(name: str) -> Kind:
    """The module of a kind; ValueError for an unknown name."""
    if name not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {name!r}")
    return cast(Kind, import_module(KINDS[name]))
