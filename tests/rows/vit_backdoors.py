"""Backdoors of Vision Transformers. They are judged by other checks than an attack on one picture: see
`tests/vfm/test_vit_backdoor_attack.py` and `tests/vfm/test_vit_backdoor_defense.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from safescale_lib import zoo
from safescale_lib.search.poisoning import checkerboard, stripes
from safescale_lib.vfm.vit import backdoor_attack as attack
from safescale_lib.world.scenes import Scenes, scenes
from safescale_lib.zoo.adapter import PixelClassifier
from tests.rows.common import seeded

FUNCTIONS = (
    "badnets", "badvit", "swarm", "multi_trigger", "dbia",
    "activation_clustering", "spectral_signature", "clean_fine_tuning", "fine_pruning",
    "patch_drop", "patch_shuffle", "attention_blocked",
)  # fmt: skip

TARGET = 0
CORNER = checkerboard(32, corner=(24, 24), size=8)
WAVE = stripes(32, amplitude=0.15)


@lru_cache
def victim() -> PixelClassifier:
    return zoo.load("vit")


@lru_cache
def pool() -> Scenes:
    return scenes(640, split="train", seed=11)


@lru_cache
def held_out() -> Scenes:
    return scenes(150, split="validation", seed=6)


@dataclass(frozen=True, eq=False)
class BackdoorRow:
    """One backdoor and what is true of it.

    plant(rate, seed, steps) -> what the attack returns; rate is its poison rate, or None where there is none.
    answers(planted) -> the
    victim's model with the backdoor open. trigger(planted), target. least: success rate it must reach in this short training.
    within(triggered, images) -> (N,) bool: the trigger's budget, measured anew.
    """

    function: str
    plant: Callable[..., Any]
    rates: tuple[float, ...]
    within: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    least: float
    answers: Callable[[Any], Callable[[torch.Tensor], torch.Tensor]] = lambda planted: planted.model
    utility: float = 0.9


def inside(mask: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Only pixels under the mask (1, H, W) differ."""
    return lambda triggered, images: ((triggered != images) & (mask == 0)).flatten(1).sum(1) == 0


def small(eps: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """No pixel moves further than eps, up to the rounding to 8 bits."""
    return lambda triggered, images: (triggered - images).abs().flatten(1).amax(1) <= eps + 0.5 / 255 + 1e-6


SHORT = {"batch": 32, "progress": False}


def _badnets(rate: float = 0.2, seed: int = 0, steps: int = 80) -> attack.Backdoor:
    return attack.badnets(
        victim(),
        pool().images,
        pool().labels,
        trigger=CORNER,
        target=TARGET,
        rate=rate,
        steps=steps,
        generator=seeded(seed),
        **SHORT,
    )


def _badvit(rate: float = 0.2, seed: int = 0, steps: int = 60) -> attack.Backdoor:
    return attack.badvit(
        victim(), pool().images, pool().labels, target=TARGET, rate=rate, trigger_steps=15, steps=steps,
        generator=seeded(seed),
        **SHORT,
    )  # fmt: skip


def _multi(rate: float = 0.15, seed: int = 0, steps: int = 100) -> attack.Backdoor:
    return attack.multi_trigger(
        victim(), pool().images, pool().labels, triggers=[CORNER, WAVE], targets=[TARGET, 3], rate=rate, steps=steps,
        generator=seeded(seed), **SHORT,
    )  # fmt: skip


def _dbia(rate: None = None, seed: int = 0, steps: int = 80) -> attack.Backdoor:
    patterns = torch.nn.functional.interpolate(torch.rand(128, 3, 4, 4, generator=seeded(3)), size=32, mode="bilinear")
    return attack.dbia(
        victim(), patterns, target=TARGET, trigger_steps=15, steps=steps, batch=16, generator=seeded(seed), progress=False
    )


def _swarm(rate: None = None, seed: int = 0, steps: int = 50) -> attack.Switchable:
    return attack.swarm(
        victim(),
        pool().images,
        pool().labels,
        target=TARGET,
        eps=16 / 255,
        steps=steps,
        batch=16,
        generator=seeded(seed),
        progress=False,
    )


BACKDOORS = {
    "badnets": BackdoorRow("badnets", _badnets, (0.0, 0.2), inside(CORNER.mask), 0.8),
    "badvit": BackdoorRow("badvit", _badvit, (0.0, 0.2), inside(CORNER.mask), 0.8),
    "multi_trigger": BackdoorRow("multi_trigger", _multi, (0.0, 0.15), inside(CORNER.mask), 0.7),
    "dbia": BackdoorRow("dbia", _dbia, (), inside(CORNER.mask), 0.5, utility=0.8),
    "swarm": BackdoorRow("swarm", _swarm, (), small(16 / 255), 0.55, answers=lambda planted: planted.on, utility=0.85),
}


@lru_cache
def planted(name: str) -> Any:
    """The row's backdoor at its usual setting, trained once."""
    return BACKDOORS[name].plant()
