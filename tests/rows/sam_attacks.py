"""Attacks on SAM and its adversarial tuning. The model is the image encoder; prompt and truth live in the criterion."""

from __future__ import annotations

from functools import lru_cache

import torch

from safescale_lib import zoo
from safescale_lib.measure.masks import MaskLost
from safescale_lib.search.models import Model
from safescale_lib.search.pixels import PixelAttack
from safescale_lib.vfm import sam
from safescale_lib.zoo.segmenter import PixelSegmenter, mixed
from tests.rows.common import AttackRow, DefenseRow, Setting, in_ball, noise_control, seeded

EPS = 32 / 255  # at 8/255, the classifiers' budget, hardly a mask of this world is lost
RISING = (0, 16 / 255, 48 / 255)


@lru_cache
def segmentation(name: str = "sam", n: int = 20) -> Setting:
    """A zoo segmenter on n validation scenes with one and with two objects."""
    images, points, truth = mixed(n, split="validation", seed=4)
    model = zoo.load(name)
    return Setting(model, images, MaskLost(model, points, truth))


def other() -> Setting:
    return segmentation("sam-b")


def many() -> Setting:
    return segmentation("sam", 36)  # enough for a paired test


def parts(setting: Setting) -> tuple[PixelSegmenter, torch.Tensor, MaskLost]:
    assert isinstance(setting.model, PixelSegmenter)
    assert isinstance(setting.criterion, MaskLost)
    return setting.model, setting.images, setting.criterion


def _attack_sam(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
    return sam.attack_sam(*parts(setting), eps=eps, steps=10, batch_size=batch_size, generator=seeded())


def _region(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
    model, images, goal = parts(setting)
    region = goal.truth
    return sam.region_attack(
        model, images, goal, region=region, eps=eps, steps=10, prompts=2, batch_size=batch_size, generator=seeded()
    )


def _feature(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
    return sam.feature_attack(*parts(setting), eps=eps, steps=10, batch_size=batch_size, generator=seeded())


@lru_cache
def _known() -> torch.Tensor:
    return mixed(24, split="train", seed=0)[0]


def _dark(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
    return sam.dark_sam(
        *parts(setting), known=_known(), eps=eps, steps=25, prompts=1, batch=8, batch_size=batch_size, generator=seeded()
    )


def _umi_grat(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
    surrogate, _, _ = parts(segmentation())
    return sam.umi_grat(
        *parts(setting),
        surrogate=surrogate,
        known=_known(),
        eps=eps,
        meta_steps=3,
        batch=8,
        batch_size=batch_size,
        generator=seeded(),
    )


def _noise(setting: Setting) -> PixelAttack:
    return noise_control(setting, EPS)


ATTACKS = {
    "attack_sam": AttackRow(
        "attack_sam", _attack_sam, EPS, RISING, unbounded=(1.0, 0.99), beats="the first of its kind", control=_noise,
        setting=segmentation,
    ),
    "region_attack": AttackRow(
        "region_attack", _region, EPS, RISING, unbounded=(1.0, 0.95), beats="it knows less than attack_sam", control=_noise,
        setting=segmentation,
    ),
    "feature_attack": AttackRow(
        "feature_attack", _feature, EPS, RISING, unbounded=(1.0, 0.95), beats="the first without a prompt", control=_noise,
        setting=segmentation,
    ),
    "dark_sam": AttackRow(
        "dark_sam", _dark, EPS, RISING, unbounded=(1.0, 0.95), beats="the only universal one", control=_noise,
        setting=segmentation,
    ),
    "umi_grat": AttackRow(
        "umi_grat", _umi_grat, EPS, RISING, unbounded=(1.0, 0.9), beats="the only one without the victim",
        control=_noise, setting=other,
    ),
}  # fmt: skip


def _tuned(model: Model) -> Model:
    assert isinstance(model, PixelSegmenter)
    return sam.adversarial_tuning(
        model, lambda step: mixed(16, split="train", seed=step), eps=EPS, steps=20, inner_steps=2, progress=False
    )


def _adapt(defended: Model, setting: Setting) -> PixelAttack:
    _, images, goal = parts(setting)
    assert isinstance(defended, PixelSegmenter)
    moved = MaskLost(defended, goal.points, goal.truth)
    return sam.attack_sam(defended, images, moved, eps=EPS, steps=10, restarts=2, generator=seeded(1))


def _plain(setting: Setting) -> PixelAttack:
    return sam.attack_sam(*parts(setting), eps=EPS, steps=10, restarts=2, generator=seeded(1))


DEFENSES = {
    "adversarial tuning of SAM, 20 steps": DefenseRow(
        "adversarial_tuning", _tuned, _adapt, _plain, stands=True,
        within=lambda attacked, images: in_ball(attacked, images, EPS), setting=many,
    )
}  # fmt: skip
