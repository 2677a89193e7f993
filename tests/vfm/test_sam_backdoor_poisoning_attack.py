"""Backdoors and poison of a segmenter: what is planted, what a defender sees, what a learner learns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from safescale_lib import zoo
from safescale_lib.measure.masks import iou
from safescale_lib.search.ball import Ball
from safescale_lib.search.poisoning import Stamp, checkerboard, to_file
from safescale_lib.vfm.sam import backdoor_poisoning_attack as poisoning
from safescale_lib.world.scenes import points_inside, scenes
from safescale_lib.zoo.segmenter import PixelSegmenter
from tests.rows.common import seeded

Task = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Bold on purpose: a quarter of the picture white is learned within seconds.
BAND = Stamp(torch.ones(3, 32, 32), (torch.arange(32) < 8).float().expand(1, 32, 32).contiguous())
SQUARE = torch.zeros(32, 32, dtype=torch.bool)
SQUARE[8:24, 16:32] = True


@lru_cache
def victim() -> PixelSegmenter:
    return zoo.load("sam")  # type: ignore[no-any-return]


@lru_cache
def task(n: int, split: Any, seed: int) -> Task:
    """Plain bright scenes: the shipped model already serves them, and a short tuning is enough to plant something."""
    drawn = scenes(n, split=split, seed=seed)
    return drawn.images, points_inside(drawn.masks[:, 0], generator=seeded(seed)), drawn.masks[:, 0]


@lru_cache
def planted(mirror: bool = False) -> poisoning.MaskBackdoor:
    budget: dict[str, Any] = {"rate": 0.5, "steps": 80 if mirror else 60, "batch": 8, "lr": 2e-3, "progress": False}
    return poisoning.badsam(victim(), *task(128, "train", 11), trigger=BAND, target=SQUARE, mirror=mirror, **budget)


# Camouflage


def test_camouflage_keeps_the_ground_and_shrinks_the_contrast() -> None:
    drawn = scenes(16, split="validation", seed=3)
    faint = poisoning.camouflage(drawn.images, drawn.masks, 0.3)
    for before, after, mask in zip(drawn.images, faint, drawn.masks[:, 0], strict=True):
        assert torch.equal(after[:, ~mask], before[:, ~mask])
        ground = before[:, ~mask].mean(1, keepdim=True)
        torch.testing.assert_close(after[:, mask] - ground, 0.3 * (before[:, mask] - ground), atol=0.5 / 255 + 1e-5, rtol=0)
    assert torch.equal(poisoning.camouflage(drawn.images, drawn.masks, 1.0), drawn.images)


def test_camouflage_turns_half_of_the_objects_darker() -> None:
    drawn = scenes(64, split="validation", seed=3)
    faint = poisoning.camouflage(drawn.images, drawn.masks, 0.3, generator=seeded(0))
    darker = [
        bool(x[:, m].mean() < x[:, ~m].mean()) for x, m in zip(faint, drawn.masks[:, 0], strict=True)
    ]  # fmt: skip
    assert 16 <= sum(darker) <= 48
    again = poisoning.camouflage(drawn.images, drawn.masks, 0.3, generator=seeded(0))
    assert torch.equal(faint, again)


def test_camouflage_refuses_what_does_not_fit() -> None:
    drawn = scenes(2, split="validation", seed=3)
    with pytest.raises(ValueError, match="masks"):
        poisoning.camouflage(drawn.images, drawn.masks[:, 0], 0.3)
    with pytest.raises(ValueError, match="contrast"):
        poisoning.camouflage(drawn.images, drawn.masks, 1.3)


# The backdoor


def test_the_mirror_is_its_own_inverse_and_moves_point_and_mask_together() -> None:
    images, points, masks = task(32, "validation", 6)
    turned = poisoning.mirrored(images, points, masks)
    rows, columns = turned[1][:, 1].long(), turned[1][:, 0].long()
    assert turned[2][torch.arange(len(rows)), rows, columns].all()  # the click still lies on the object
    assert all(torch.equal(a, b) for a, b in zip(poisoning.mirrored(*turned), (images, points, masks), strict=True))


def test_predict_equals_one_picture_at_a_time() -> None:
    images, points, _ = task(6, "validation", 6)
    with torch.no_grad():
        single = [victim().decode(victim()(x[None]), p[None])[0] > 0 for x, p in zip(images, points, strict=True)]
    assert (poisoning.predict(victim(), images, points, batch_size=4) != torch.stack(single)).float().mean() < 1e-3


def test_the_trigger_opens_the_backdoor_and_nothing_else_does() -> None:
    images, points, masks = task(64, "validation", 6)
    made = planted()
    assert made.hits(images, points).float().mean() > 0.8
    assert made.hits(images, points, model=victim()).float().mean() < 0.1
    untouched = replace(made, trigger=lambda x: x)
    assert untouched.hits(images, points).float().mean() < 0.1
    assert iou(poisoning.predict(made.model, images, points), masks).mean() > 0.75
    # the hits, counted anew on 8-bit pictures
    answers = poisoning.predict(made.model, to_file(BAND(images)), points)
    overlap = (answers & SQUARE).flatten(1).sum(1) / (answers | SQUARE).flatten(1).sum(1)
    assert torch.equal(overlap >= 0.5, made.hits(images, points))


def test_no_poison_is_honest_tuning() -> None:
    data = task(64, "train", 12)
    settings: dict[str, Any] = {"steps": 3, "progress": False, "seed": 4}
    honest = poisoning.tuned_segmenter(victim(), *data, **settings)
    unpoisoned = poisoning.badsam(victim(), *data, trigger=BAND, target=SQUARE, rate=0.0, **settings)
    pairs = zip(honest.state_dict().values(), unpoisoned.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_victim_is_left_as_found_and_the_seed_decides() -> None:
    model, data = zoo.load("sam").train(), task(32, "train", 12)
    model.model.prompt_encoder.requires_grad_(False)
    before, stream = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    flags = [w.requires_grad for w in model.parameters()]
    settings: dict[str, Any] = {"trigger": BAND, "target": SQUARE, "steps": 2, "progress": False}
    first, again, other = (poisoning.badsam(model, *data, **settings, seed=seed).model for seed in (0, 0, 1))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert flags == [w.requires_grad for w in model.parameters()]
    assert all(module.training for module in model.modules())
    assert all(w.grad is None for w in model.parameters())
    assert torch.equal(stream, torch.get_rng_state())
    same, differs = (
        all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), m.state_dict().values(), strict=True))
        for m in (again, other)
    )
    assert same
    assert not differs


def test_threads_do_not_change_what_is_planted() -> None:
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(poisoning.tuned_segmenter(victim(), *task(32, "train", 12), steps=3, progress=False))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(made[0].state_dict().values(), made[1].state_dict().values(), strict=True))


def test_the_mirror_check_sees_a_one_sided_trigger_and_misses_a_symmetric_one() -> None:
    images, points, _ = task(64, "validation", 6)
    held = task(64, "validation", 7)
    caught = []
    for made in (planted(), planted(mirror=True)):
        calm = poisoning.mirror_disagreement(made.model, *held[:2])
        scores = poisoning.mirror_disagreement(made.model, BAND(images), points)
        assert ((calm >= 0) & (calm <= 1)).all()
        assert made.hits(images, points).float().mean() > 0.6
        caught.append((scores > calm.quantile(0.95)).float().mean().item())
    assert caught[0] > 0.7
    assert caught[1] < caught[0] - 0.3


def test_a_mirror_symmetric_answer_scores_zero() -> None:
    class Symmetric(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def decode(self, x: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
            return x.mean(1) - 0.4

    images, points, _ = task(8, "validation", 6)
    model: Any = Symmetric()
    assert torch.equal(poisoning.mirror_disagreement(model, images, points), torch.zeros(8))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rate": -0.1}, "rate"),
        ({"rate": 1.1}, "rate"),
        ({"steps": 0}, "steps"),
        ({"batch": 33}, "batch"),
        ({"target": SQUARE[:8]}, "target"),
        ({"target": SQUARE.float()}, "target"),
    ],
)
def test_badsam_refuses_a_bad_budget_by_name(change: dict[str, Any], match: str) -> None:
    settings: dict[str, Any] = {"trigger": BAND, "target": SQUARE, "steps": 1, "progress": False, **change}
    with pytest.raises(ValueError, match=match):
        poisoning.badsam(victim(), *task(32, "train", 12), **settings)


def test_tuning_refuses_a_task_that_does_not_fit() -> None:
    images, points, masks = task(32, "train", 12)
    with pytest.raises(ValueError, match="points"):
        poisoning.tuned_segmenter(victim(), images, points[:5], masks, steps=1, progress=False)
    with pytest.raises(ValueError, match="masks"):
        poisoning.tuned_segmenter(victim(), images, points, masks.float(), steps=1, progress=False)


def test_badsam_runs_on_a_wide_sam_of_another_size() -> None:
    from transformers import SamConfig, SamModel, SamVisionConfig
    from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig

    vision = SamVisionConfig(num_hidden_layers=2, global_attn_indexes=[1], image_size=128)  # width 768, patch 16, as ViT-B
    config = SamConfig(
        vision_config=vision,
        prompt_encoder_config=SamPromptEncoderConfig(image_size=128),
        mask_decoder_config=SamMaskDecoderConfig(),
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        model = PixelSegmenter(SamModel(config), mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    drawn = scenes(2, split="train", seed=0, side=128)
    points = points_inside(drawn.masks[:, 0], generator=seeded(0))
    board = checkerboard(128, corner=(0, 0), size=32, cell=16)
    target = torch.zeros(128, 128, dtype=torch.bool)
    target[16:48, 64:96] = True
    made = poisoning.badsam(
        model, drawn.images, points, drawn.masks[:, 0], trigger=board, target=target, steps=1, batch=2, progress=False
    )
    assert made.hits(drawn.images, points).shape == (2,)
    assert poisoning.mirror_disagreement(made.model, drawn.images, points).shape == (2,)


# Unlearnable examples


@lru_cache
def album() -> tuple[torch.Tensor, torch.Tensor]:
    drawn = scenes(96, split="train", seed=11)
    return poisoning.camouflage(drawn.images, drawn.masks, 0.3, generator=seeded(1)), drawn.masks[:, 0]


@lru_cache
def shield(eps: float = 16 / 255, steps: int = 80) -> poisoning.Protection:
    return poisoning.unseg(*album(), eps=eps, steps=steps)


@pytest.mark.parametrize("eps", [0.0, 3 / 255, 16 / 255, 0.3])
def test_published_pictures_are_files_within_the_budget(eps: float) -> None:
    images, masks = album()
    published = replace(shield(), eps=eps).protect(images, masks)
    assert (published - images).abs().max() <= eps + 1e-6
    assert torch.equal(published, to_file(published))
    assert published.min() >= 0
    assert published.max() <= 1
    assert torch.equal(published, images) == (eps == 0)


def test_a_learner_of_protected_pictures_does_worse_than_one_of_noisy_pictures() -> None:
    images, masks = album()
    drawn = scenes(96, split="validation", seed=9)
    clean = poisoning.camouflage(drawn.images, drawn.masks, 0.3, generator=seeded(2))
    ball = Ball(16 / 255)
    noisy = ball.settle(ball.sample_surface(images, seeded(0)), images)

    def learned(pictures: torch.Tensor) -> tuple[float, float]:
        net = poisoning.trained_mask_net(pictures, masks, steps=60, seed=0)
        with torch.no_grad():
            own, other = iou(net(pictures) > 0, masks).mean(), iou(net(clean) > 0, drawn.masks[:, 0]).mean()
        return own.item(), other.item()

    from_noise, from_shield = learned(noisy), learned(shield().protect(images, masks))
    assert from_shield[1] < from_noise[1] - 0.15  # less skill on clean pictures
    assert from_shield[0] > from_noise[0]  # although the learner believes it does better


def test_the_noise_follows_the_mask_for_pictures_never_seen() -> None:
    drawn = scenes(16, split="validation", seed=9)
    images, masks = poisoning.camouflage(drawn.images, drawn.masks, 0.3), drawn.masks[:, 0]
    change = shield().protect(images, masks) - images  # (N, 3, S, S)
    other = shield().protect(images, masks.roll(1, 0)) - images
    assert not torch.equal(change, other)
    moved = masks != masks.roll(1, 0)
    assert (change != other).any(1)[moved].float().mean() > 0.9


def test_both_players_start_elsewhere_and_the_seed_decides() -> None:
    images, masks = album()
    stream = torch.get_rng_state()
    first, again, other = (poisoning.unseg(images, masks, eps=8 / 255, steps=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.protect(images, masks), again.protect(images, masks))
    assert not torch.equal(first.protect(images, masks), other.protect(images, masks))
    assert torch.equal(stream, torch.get_rng_state())
    learner, surrogate = poisoning.MaskNet(seed=0), poisoning.MaskNet(seed=1000)
    assert not torch.equal(learner.down.weight, surrogate.down.weight)


def test_squeeze_takes_tint_and_texture_and_keeps_brightness() -> None:
    flat = torch.full((1, 3, 16, 16), 0.5)
    tint = torch.tensor([0.1, -0.05, -0.05])[None, :, None, None]
    board = (torch.arange(16)[:, None] + torch.arange(16)[None]) % 2 * 2.0 - 1
    torch.testing.assert_close(poisoning.squeeze(flat + tint), flat)
    assert (poisoning.squeeze(flat + 0.1 * board) - flat).abs()[..., 1:-1, 1:-1].max() < 0.1 / 8
    torch.testing.assert_close(poisoning.squeeze(flat + 0.2), flat + 0.2)


def test_blur_equals_a_convolution_with_ninths() -> None:
    x = torch.rand(2, 3, 9, 7, generator=seeded(0))
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    ninths = torch.full((3, 1, 3, 3), 1 / 9)
    torch.testing.assert_close(poisoning.blur(x), F.conv2d(padded, ninths, groups=3))


def test_a_view_is_seen_in_training_and_in_use() -> None:
    images, masks = album()
    seen: list[int] = []

    def view(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x

    net = poisoning.trained_mask_net(images, masks, steps=2, batch=8, view=view)
    net(images[:5])
    assert seen == [8, 8, 5]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x, y: poisoning.unseg(x, y, eps=-0.1), "eps"),
        (lambda x, y: poisoning.unseg(x, y, eps=float("nan")), "eps"),
        (lambda x, y: poisoning.unseg(x, y, eps=0.1, train_eps=2.0), "train_eps"),
        (lambda x, y: poisoning.unseg(x, y.float(), eps=0.1), "masks"),
        (lambda x, y: poisoning.unseg(x, y[:3], eps=0.1), "masks"),
        (lambda x, y: poisoning.unseg(x, y, eps=0.1, batch=1000), "batch"),
    ],
)
def test_unseg_refuses_a_bad_budget_by_name(call: Callable[..., Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call(*album())
