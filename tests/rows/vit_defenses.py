"""Adversarial defenses of the ViT: training with a masked attacker, patch-stable features, purification, detection."""

from __future__ import annotations

from functools import lru_cache, partial

import torch

from safescale_lib import zoo
from safescale_lib.search.models import Model
from safescale_lib.search.pixels import PixelAttack
from safescale_lib.vfm import vit as techniques
from safescale_lib.world.scenes import scenes
from safescale_lib.zoo.denoiser import Denoiser
from tests.rows.common import EPS, DefenseRow, Setting, classification, seeded

TIME = 100


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    fresh = scenes(32, split="train", seed=step)
    return fresh.images, fresh.labels


def _pgd(setting: Setting) -> PixelAttack:
    return techniques.pgd(setting.model, setting.images, setting.criterion, eps=EPS, steps=10, generator=seeded())


def _restarted(defended: Model, setting: Setting) -> PixelAttack:
    return techniques.pgd(defended, setting.images, setting.criterion, eps=EPS, steps=20, restarts=2, generator=seeded(1))


def _worst_patch(defended: Model, setting: Setting) -> PixelAttack:
    """The attacker takes the patch that the defended model itself minds most, and knows of no limit inside it."""
    return techniques.patch_fool(
        defended, setting.images, setting.criterion, steps=15, by="gradient", attention_weight=0.0, generator=seeded()
    )


def _one_patch(attacked: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    touched = (attacked != images).any(1).unfold(1, 8, 8).unfold(2, 8, 8).any(-1).any(-1)  # (N, 4, 4)
    return touched.sum((1, 2)) <= 1


@lru_cache
def _denoiser() -> Denoiser:
    return zoo.load("denoiser")  # type: ignore[no-any-return]


def _through_the_noise(defended: Model, setting: Setting) -> PixelAttack:
    """Gradients through the whole purification, fresh noise at each step; judged under the defender's own noise."""
    noise = seeded(5)

    def white(x: torch.Tensor) -> torch.Tensor:
        return setting.model(techniques.purify(_denoiser(), x, time=TIME, noise=torch.randn(x.shape, generator=noise)))  # type: ignore[no-any-return]

    return techniques.surrogate_pgd(
        defended, white, setting.images, setting.criterion, eps=EPS, steps=10, step_size=2 / 255, generator=seeded()
    )


DEFENSES = {
    "ARD + PRM, 60 steps": DefenseRow(
        "ard_prm", lambda model: techniques.ard_prm(model, _batch, eps=EPS, steps=60, progress=False), _restarted, _pgd,
        stands=True,
    ),
    "RSPC, 40 steps": DefenseRow(
        "rspc", lambda model: techniques.rspc(model, _batch, patches=2, steps=40, progress=False), _worst_patch,
        lambda setting: _worst_patch(setting.model, setting), stands=True, within=_one_patch,
    ),
    "DiffPure": DefenseRow(
        "diffpure", lambda model: techniques.diffpure(model, _denoiser(), time=TIME, draws=3, seed=999), _through_the_noise,
        _pgd, stands=True, setting=partial(classification, "vit", 48),
    ),
}  # fmt: skip

FUNCTIONS = ("vitguard",)
"""A detector changes the call: its checks stand in `tests/vfm/test_vit_adversarial_defense.py`."""
