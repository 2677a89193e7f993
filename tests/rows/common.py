"""What a row of the technique checks holds. The rows stand in the modules beside this one, the checks in
`tests/test_technique_checks.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from safescale_lib import zoo
from safescale_lib.measure.criteria import Criterion, Misclassified
from safescale_lib.search.ball import Ball
from safescale_lib.search.models import Model
from safescale_lib.search.pixels import PixelAttack, random_noise
from safescale_lib.world.scenes import scenes

N = 96
EPS = 8 / 255


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True, eq=False)
class Setting:
    """Whom an attack is tried on: a victim, images (N, C, H, W) and a criterion with one entry each."""

    model: Model
    images: torch.Tensor
    criterion: Criterion

    def head(self, n: int) -> Setting:
        """The same with the first n images, for a criterion on labels."""
        assert isinstance(self.criterion, Misclassified)
        return Setting(self.model, self.images[:n], Misclassified(self.criterion.labels[:n]))


@lru_cache
def classification(name: str = "vit", n: int = N) -> Setting:
    """A zoo classifier on validation scenes; a fresh model each name, shared by the rows: leave it as found."""
    batch = scenes(n, split="validation", seed=4)
    return Setting(zoo.load(name), batch.images, Misclassified(batch.labels))


def in_ball(attacked: torch.Tensor, images: torch.Tensor, eps: float) -> torch.Tensor:
    """(N,) bool: inside the linf ball of radius eps."""
    return Ball(eps).holds(attacked, images)


def noise_control(setting: Setting, eps: float = EPS, tries: int = 10) -> PixelAttack:
    """Random corners of the linf ball: the control of every gradient attack."""
    return random_noise(setting.model, setting.images, setting.criterion, eps=eps, tries=tries, generator=seeded())


@dataclass(frozen=True, eq=False)
class AttackRow:
    """One attack and what is true of it.

    function: name of the bound function. attack(setting, budget, batch_size=...) -> PixelAttack. budget: the usual one;
    rising: budgets from the one that changes nothing upwards, over which success must not fall. within(attacked, images,
    budget) -> (N,) bool, the budget measured anew. unbounded: (budget, least success rate among attempted) or why a larger
    budget does not always win. beats: name of a simpler attack (same module or another) that it must not fall behind, or
    why there is none. control(setting) -> a random attack of equal budget that it must beat, or why there is none.
    setting() -> the victim. bad: budgets that must be refused by a ValueError matching bad_match.
    """

    function: str
    attack: Callable[..., PixelAttack]
    budget: float
    rising: tuple[float, ...]
    unbounded: tuple[float, float] | str
    beats: str
    control: Callable[[Setting], PixelAttack] | str
    within: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor] = in_ball
    setting: Callable[[], Setting] = classification
    bad: tuple[float, ...] = (-0.1, float("nan"), float("inf"))
    bad_match: str = "eps"


@dataclass(frozen=True, eq=False)
class DefenseRow:
    """One defense and the attack written against it.

    function: name of the bound function. defend(model) -> callable with the model's own call, or a detector-guarded one.
    adaptive(defended, setting) -> the attack adapted to it; plain(setting) -> the same kind of attack on the undefended model.
    stands: under its adaptive attack it keeps more than the undefended model keeps under the plain one, by a paired test;
    False for a defense that must fall, with the lesson in `lesson`. within: the adaptive attack's budget, measured anew.
    """

    function: str
    defend: Callable[[Model], Model]
    adaptive: Callable[[Model, Setting], PixelAttack]
    plain: Callable[[Setting], PixelAttack]
    stands: bool
    lesson: str = ""
    utility_cost: float = 0.05
    within: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = lambda attacked, images: in_ball(attacked, images, EPS)
    setting: Callable[[], Setting] = classification
