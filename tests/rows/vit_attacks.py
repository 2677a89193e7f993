"""The ViT's own attacks: patch, position embedding, attention, token, transfer, queries."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from safescale_lib import zoo
from safescale_lib.search.ball import Ball
from safescale_lib.search.pixels import PixelAttack
from safescale_lib.vfm import vit as techniques
from safescale_lib.vfm.vit.inside import patch_grid
from safescale_lib.world.scenes import scenes
from tests.rows.common import EPS, AttackRow, Setting, classification, noise_control, seeded


@lru_cache
def few() -> Setting:
    return classification().head(48)


@lru_cache
def against_cnn() -> Setting:
    """The victim of the transfer is a CNN; its surrogate is the ViT."""
    return classification("cnn")


@lru_cache
def surrogate() -> Any:
    return zoo.load("vit")


@lru_cache
def crafting() -> torch.Tensor:
    return scenes(96, split="train", seed=31).images


def patches_changed(attacked: torch.Tensor, images: torch.Tensor, budget: float) -> torch.Tensor:
    """(N,) bool: at most `budget` patches differ anywhere."""
    _, _, height, width = patch_grid(few().model)
    changed = (attacked != images).any(1).unfold(1, height, height).unfold(2, width, width).flatten(3).any(3)
    return (changed.flatten(1).sum(1) <= budget) & (attacked >= 0).flatten(1).all(1) & (attacked <= 1).flatten(1).all(1)


def in_first_patch(attacked: torch.Tensor, images: torch.Tensor, eps: float) -> torch.Tensor:
    """(N,) bool: nothing outside the top left patch moved, and nothing inside it further than eps."""
    _, _, height, width = patch_grid(few().model)
    inside = torch.zeros_like(images, dtype=torch.bool)
    inside[:, :, :height, :width] = True
    return Ball(eps).holds(attacked, images) & ~((attacked != images) & ~inside).flatten(1).any(1)


def in_l2_ball(attacked: torch.Tensor, images: torch.Tensor, eps: float) -> torch.Tensor:
    return Ball(eps, "l2").holds(attacked, images)


def _patch_fool(setting: Setting, patches: float, batch_size: int = 64, **other: Any) -> PixelAttack:
    settings: dict[str, Any] = {"patches": patches, "steps": 30, "generator": seeded(), "batch_size": batch_size, **other}
    return techniques.patch_fool(setting.model, setting.images, setting.criterion, **settings)


def _position(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
    return techniques.position_attack(
        setting.model, setting.images, setting.criterion, eps=eps, crafting=crafting(), steps=20, batch_size=batch_size
    )


def _attention_fool(setting: Setting, eps: float, batch_size: int = 64, **other: Any) -> PixelAttack:
    settings: dict[str, Any] = {"eps": eps, "steps": 30, "generator": seeded(), "batch_size": batch_size, **other}
    return techniques.attention_fool(setting.model, setting.images, setting.criterion, **settings)


def _token(setting: Setting, tokens: float, batch_size: int = 64, **other: Any) -> PixelAttack:
    settings: dict[str, Any] = {
        "tokens": tokens,
        "eps": 4 * EPS,
        "steps": 20,
        "generator": seeded(),
        "batch_size": batch_size,
        **other,
    }
    return techniques.token_attack(setting.model, setting.images, setting.criterion, **settings)


def _transfer(setting: Setting, eps: float, batch_size: int = 64) -> PixelAttack:
    return techniques.pna_patchout(
        setting.model, setting.images, setting.criterion,
        surrogate=surrogate(), eps=eps, generator=seeded(), batch_size=batch_size,
    )  # fmt: skip


def _removal(setting: Setting, eps: float, batch_size: int = 256) -> PixelAttack:
    return techniques.patch_removal(
        setting.model,
        setting.images,
        setting.criterion,
        eps=eps,
        queries=100,
        tries=30,
        generator=seeded(),
        batch_size=batch_size,
    )


ATTACKS = {
    "plain patch attack, random patch": AttackRow(
        "patch_fool", lambda s, b, batch_size=64: _patch_fool(s, b, batch_size, by="random", attention_weight=0.0), 1,
        rising=(0, 1, 2), unbounded=(16, 0.99), beats="it is the simpler attack of the next row",
        control=lambda s: _patch_fool(s, 1, by="random", steps=0, restarts=20),
        within=patches_changed, setting=few, bad=(-1, 1.5, 17), bad_match="patches",
    ),
    "patch-fool": AttackRow(
        "patch_fool", _patch_fool, 1, rising=(0, 1, 2), unbounded=(16, 0.99), beats="plain patch attack, random patch",
        control=lambda s: _patch_fool(s, 1, steps=0, restarts=20),
        within=patches_changed, setting=few, bad=(-1, 1.5, 17), bad_match="patches",
    ),
    "position attack": AttackRow(
        "position_attack", _position, 2 * EPS, rising=(0, EPS, 2 * EPS, 4 * EPS),
        unbounded="one pattern serves all pictures: at full contrast it saturates, and is a picture of its own",
        beats="plain PGD, made anew for every picture, is stronger at the same eps",
        control=lambda s: noise_control(s, 2 * EPS),
    ),
    "attention-fool": AttackRow(
        "attention_fool", _attention_fool, 1.0, rising=(0, 0.25, 1.0),
        unbounded="eps = 1 already frees the whole patch; some pictures survive the loss of one corner",
        beats="pull = 0 is the simpler attack: they are compared in the notebook, over seeds",
        control=lambda s: _attention_fool(s, 1.0, steps=0, restarts=20), within=in_first_patch, setting=few,
    ),
    "token attack": AttackRow(
        "token_attack", _token, 2, rising=(0, 1, 2, 4), unbounded=(16, 0.99), beats="its random choice is the control",
        control=lambda s: _token(s, 2, by="random", steps=1), within=patches_changed, setting=few,
        bad=(-1, 1.5, 17), bad_match="tokens",
    ),
    "pna-patchout": AttackRow(
        "pna_patchout", _transfer, 2 * EPS, rising=(0, EPS, 2 * EPS, 4 * EPS),
        unbounded="its gradients are another model's: no step of them need fool the victim",
        beats="momentum transfer is the same function with other arguments: compared in the notebook, over seeds",
        control=lambda s: noise_control(s, 2 * EPS), setting=against_cnn,
    ),
    "patch-wise removal": AttackRow(
        "patch_removal", _removal, 3.0, rising=(0, 1.0, 3.0, 6.0), unbounded=(100.0, 0.99),
        beats="start noise alone is the control",
        control=lambda s: techniques.patch_removal(
            s.model, s.images, s.criterion, eps=3.0, queries=100, tries=30, sizes=[32], generator=seeded()
        ),
        within=in_l2_ball, setting=few,
    ),
}  # fmt: skip
