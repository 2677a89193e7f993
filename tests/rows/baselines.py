"""FGSM and PGD, adversarial training, and the quantised input that only hides."""

from __future__ import annotations

import torch

from safescale_lib.search.models import Model, straight_through
from safescale_lib.search.pixels import PixelAttack, replay
from safescale_lib.vfm import vit as techniques
from safescale_lib.world.scenes import scenes
from tests.rows.common import EPS, AttackRow, DefenseRow, Setting, noise_control, seeded


def _fgsm(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
    return techniques.fgsm(setting.model, setting.images, setting.criterion, eps=eps, batch_size=batch_size)


def _pgd(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
    return techniques.pgd(
        setting.model, setting.images, setting.criterion, eps=eps, steps=10, generator=seeded(), batch_size=batch_size
    )


ATTACKS = {
    "fgsm": AttackRow(
        "fgsm", _fgsm, EPS, rising=(0, 1 / 255, 2 / 255, 4 / 255),
        unbounded="one step of any length overshoots: it is not a search", beats="the single step itself",
        control=noise_control,
    ),
    "pgd": AttackRow(
        "pgd", _pgd, EPS, rising=(0, 1 / 255, 4 / 255, 8 / 255, 32 / 255), unbounded=(1.0, 0.99), beats="fgsm",
        control=noise_control,
    ),
}  # fmt: skip


def _adapt_training(defended: Model, setting: Setting) -> PixelAttack:
    return techniques.pgd(defended, setting.images, setting.criterion, eps=EPS, steps=20, restarts=2, generator=seeded(1))


def _adapt_quantised(defended: Model, setting: Setting) -> PixelAttack:
    through = straight_through(setting.model, lambda x: techniques.quantise(x, 8))
    crafted = techniques.pgd(through, setting.images, setting.criterion, eps=EPS, steps=20, generator=seeded(1))
    return replay(defended, crafted, setting.images, setting.criterion)


def _briefly_trained(model: Model) -> Model:
    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        fresh = scenes(48, split="train", seed=step)
        return fresh.images, fresh.labels

    return techniques.adversarial_training(model, batch, eps=EPS, steps=40, progress=False)


def _plain(setting: Setting) -> PixelAttack:
    return _pgd(setting, EPS)


DEFENSES = {
    "adversarial training, 40 steps": DefenseRow(
        "adversarial_training", _briefly_trained, _adapt_training, _plain, stands=True
    ),
    "quantised input, 8 levels": DefenseRow(
        "quantised_input", lambda model: techniques.quantised_input(model, levels=8), _adapt_quantised, _plain, stands=False,
        lesson="a white-box attack alone would have called it solved: its gradient is masked",
    ),
}  # fmt: skip
