"""The rest of the toolbox: parameter-free, minimal, black-box, universal and physical-style attacks; smoothing."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from safescale_lib.measure.smoothing import expected
from safescale_lib.search.ball import Ball
from safescale_lib.search.models import Model
from safescale_lib.search.patches import add_universal, stick
from safescale_lib.search.pixels import PixelAttack, random_noise, replay
from safescale_lib.search.queries import random_guesses
from safescale_lib.vfm import vit as techniques
from safescale_lib.world.scenes import scenes
from safescale_lib.zoo.training import fit
from tests.rows.common import EPS, AttackRow, DefenseRow, Setting, classification, noise_control, seeded


@lru_cache
def few() -> Setting:
    return classification().head(32)


@lru_cache
def robust() -> Setting:
    return classification("vit-robust").head(48)


def in_l2_ball(attacked: torch.Tensor, images: torch.Tensor, eps: float) -> torch.Tensor:
    return Ball(eps, "l2").holds(attacked, images)


def in_a_square(attacked: torch.Tensor, images: torch.Tensor, size: float) -> torch.Tensor:
    """(N,) bool: every change of an image fits into one square of this side."""
    changed = (attacked != images).any(1)  # (N, H, W)
    spans = []
    for lines in (changed.any(2), changed.any(1)):
        where = torch.arange(lines.shape[1]).expand_as(lines)
        last = torch.where(lines, where, -1).amax(1)
        first = torch.where(lines, where, lines.shape[1]).amin(1)
        spans.append(last - first + 1)
    return (spans[0] <= size) & (spans[1] <= size) & (attacked >= 0).flatten(1).all(1) & (attacked <= 1).flatten(1).all(1)


def run(function: Any, setting: Setting, **settings: Any) -> Any:
    return function(setting.model, setting.images, setting.criterion, **settings)


def _apgd(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
    return run(techniques.apgd, setting, eps=eps, steps=10, generator=seeded(), batch_size=batch_size)  # type: ignore[no-any-return]


def _ensemble(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
    return run(  # type: ignore[no-any-return]
        techniques.auto_ensemble, setting, eps=eps, steps=10, targets=2, queries=20, generator=seeded(), batch_size=batch_size
    )


def _minimal(function: Any, **settings: Any) -> Any:
    def attack(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
        return run(function, setting, eps=eps, batch_size=batch_size, **settings)  # type: ignore[no-any-return]

    return attack


def _square(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
    return run(techniques.square, setting, eps=eps, queries=100, generator=seeded(), batch_size=batch_size)  # type: ignore[no-any-return]


def _jump(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
    return run(techniques.hop_skip_jump, setting, eps=eps, queries=300, generator=seeded(), batch_size=batch_size)  # type: ignore[no-any-return]


def _patch(setting: Setting, size: float, batch_size: int = 256) -> PixelAttack:
    return run(  # type: ignore[no-any-return]
        techniques.adversarial_patch, setting, size=size, steps=30, generator=seeded(), batch_size=batch_size
    )


def _universal(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
    return run(  # type: ignore[no-any-return]
        techniques.universal_perturbation, setting, eps=eps, steps=40, generator=seeded(), batch_size=batch_size
    )


def random_patch(setting: Setting) -> PixelAttack:
    patch = torch.rand(3, 12, 12, generator=seeded(1))
    return stick(setting.model, (patch * 255).round() / 255, setting.images, setting.criterion, generator=seeded())


def random_universal(setting: Setting) -> PixelAttack:
    corner = torch.rand(setting.images.shape[1:], generator=seeded(1)).round() * 2 - 1
    return add_universal(setting.model, 2 * EPS * corner, setting.images, setting.criterion, eps=2 * EPS)


def l2_noise(setting: Setting) -> PixelAttack:
    return random_noise(setting.model, setting.images, setting.criterion, eps=1.0, norm="l2", tries=20, generator=seeded())


ATTACKS = {
    "apgd": AttackRow(
        "apgd", _apgd, EPS, rising=(0, 1 / 255, 4 / 255, 8 / 255, 32 / 255), unbounded=(1.0, 0.99), beats="fgsm",
        control=noise_control,
    ),
    "ensemble": AttackRow(
        "auto_ensemble", _ensemble, 16 / 255, rising=(0, 4 / 255, 8 / 255, 16 / 255), unbounded=(1.0, 0.99),
        beats="it must beat each of its members, which its own test checks",
        control=lambda setting: noise_control(setting, 16 / 255), setting=robust,
    ),
    "Carlini-Wagner": AttackRow(
        "carlini_wagner", _minimal(techniques.carlini_wagner), 1.0, rising=(0, 0.3, 0.6, 1.0), unbounded=(50.0, 0.99),
        beats="its own head start, on distance and not on success: its test checks", control=l2_noise,
        within=in_l2_ball, setting=few,
    ),
    "decoupled direction and norm": AttackRow(
        "decoupled", _minimal(techniques.decoupled, steps=30), 1.0, rising=(0, 0.3, 0.6, 1.0), unbounded=(50.0, 0.99),
        beats="nothing simpler minimises the distance", control=l2_noise, within=in_l2_ball, setting=few,
    ),
    "square": AttackRow(
        "square", _square, EPS, rising=(0, 2 / 255, 8 / 255, 16 / 255), unbounded=(1.0, 0.95),
        beats="the control of equal budget is the only simpler one",
        control=lambda s: run(random_guesses, s, eps=EPS, queries=100, generator=seeded()),
    ),
    "hop-skip-jump": AttackRow(
        "hop_skip_jump", _jump, 4.0, rising=(0, 1.0, 2.0, 4.0), unbounded=(50.0, 0.9),
        beats="nothing simpler works from labels alone",
        control=lambda s: run(random_noise, s, eps=4.0, norm="l2", tries=10, generator=seeded()),
        within=in_l2_ball, setting=few,
    ),
    "adversarial patch": AttackRow(
        "adversarial_patch", _patch, 12, rising=(0, 6, 12, 20),
        unbounded="a patch as large as the image is one image: it has one class, which is right for some",
        beats="the control of equal area is the only simpler one", control=random_patch,
        within=in_a_square, bad=(-1, 1.5, 33), bad_match="size",
    ),
    "universal perturbation": AttackRow(
        "universal_perturbation", _universal, 2 * EPS, rising=(0, EPS, 2 * EPS, 4 * EPS),
        unbounded="one perturbation serves all images: at full contrast it is one image, which is right for some",
        beats="the control of equal budget is the only simpler one", control=random_universal,
    ),
}  # fmt: skip

SIGMA, RADIUS = 0.3, 1.0


def noise_trained(model: Any, steps: int = 100) -> Any:
    """The classifier fine-tuned on noisy scenes for some seconds: smoothing needs a base that knows noise."""
    student = copy.deepcopy(model)

    def loss(step: int) -> torch.Tensor:
        batch = scenes(64, split="train", seed=step)
        noise = SIGMA * torch.randn(batch.images.shape, generator=torch.Generator().manual_seed(step))
        return F.cross_entropy(student(batch.images + noise), batch.labels)

    fit(student, loss, steps=steps, lr=1e-3, warmup=10, progress=False)
    return student.eval()


@lru_cache
def base() -> Any:
    return noise_trained(few().model)


def _pgd_l2(setting: Setting) -> PixelAttack:
    return run(techniques.pgd, setting, eps=RADIUS, norm="l2", steps=20, generator=seeded())  # type: ignore[no-any-return]


def _against_smoothing(defended: Model, setting: Setting) -> PixelAttack:
    soft = Setting(expected(base(), sigma=SIGMA, n=8), setting.images, setting.criterion)
    crafted = run(techniques.pgd, soft, eps=RADIUS, norm="l2", steps=20, generator=seeded(), early_removal=False, batch_size=32)
    return replay(defended, crafted, setting.images, setting.criterion, norm="l2")


DEFENSES = {
    "randomised smoothing on a noise-trained base": DefenseRow(
        "smoothed", lambda model: techniques.smoothed(base(), sigma=SIGMA, n=32), _against_smoothing, _pgd_l2,
        stands=True, utility_cost=0.1, within=lambda attacked, images: in_l2_ball(attacked, images, RADIUS),
        setting=lambda: classification().head(64),
    ),
}  # fmt: skip
