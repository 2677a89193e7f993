"""Attacks on SAM: each against a segmenter simple enough to know the answer, then on full-size shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from safescale_lib.measure.masks import MaskLost, MaskMoved, MaskRemoved
from safescale_lib.search.pixels import PixelAttack
from safescale_lib.vfm import sam as techniques
from safescale_lib.vfm.sam.adversarial_attack import _bands, clipped_error
from safescale_lib.zoo import segmenter
from safescale_lib.zoo.segmenter import PixelSegmenter

S, EPS = 8, 8 / 255
sam: Any = techniques  # the toy segmenters below only look like one


class Brightness(torch.nn.Module):
    """Every pixel brighter than 0.5 is in the mask, whatever the prompt. Remembers the prompts of each decoding."""

    def __init__(self, scale: float = 4.0) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.asked: list[torch.Tensor] = []

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean(1, keepdim=True) * self.scale  # (B, 1, S, S)

    def decode(self, embeddings: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        self.asked.append(points)
        logits = embeddings - 0.5 * self.scale  # (B, 1, S, S)
        return logits[:, 0] if points.ndim == 2 else logits.expand(-1, points.shape[1], -1, -1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def task(n: int = 6, bright: float = 128 / 255) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images with a square just above the threshold of `Brightness` on a dark ground, prompts at its corner, its mask."""
    truth = torch.zeros(n, S, S, dtype=torch.bool)
    truth[:, 2:6, 2:6] = True
    images = torch.where(truth[:, None], bright, 40 / 255).expand(-1, 3, -1, -1).contiguous()
    return images, torch.full((n, 2), 2.0), truth


def any_attack(name: str, model: Any, images: torch.Tensor, goal: MaskLost, surrogate: Any = None, **kw: Any) -> PixelAttack:
    more: dict[str, dict[str, Any]] = {
        "region_attack": {"region": goal.truth, "prompts": 2},
        "dark_sam": {"known": images.flip(0), "batch": 4},
        "umi_grat": {"surrogate": surrogate or model, "known": images.flip(0), "batch": 4, "meta_steps": 2},
    }
    function: Callable[..., PixelAttack] = getattr(sam, name)
    return function(model, images, goal, **{"eps": EPS, "steps": 3, "generator": generator(), **more.get(name, {}), **kw})


NAMES = ("attack_sam", "region_attack", "feature_attack", "dark_sam", "umi_grat")


def test_clipped_error_by_hand() -> None:
    logits = torch.tensor([[[-12.0, -10.0], [0.0, 3.0]], [[12.0, 10.0], [-4.0, 1.0]]])
    wanted = torch.tensor([[[False, False], [False, True]], [[True, True], [False, True]]])
    assert clipped_error(logits, wanted, 10.0).tolist() == [(0 + 0 + 100 + 49) / 4, (0 + 0 + 36 + 81) / 4]


@pytest.mark.parametrize("name", ["attack_sam", "region_attack"])
def test_removal_darkens_every_pixel_by_all_of_eps(name: str) -> None:
    images, points, truth = task()
    model = Brightness()
    goal = MaskRemoved(model, points, truth)
    kw = {"early_removal": False} if name == "attack_sam" else {}
    attack = any_attack(name, model, images, goal, steps=12, **kw)
    assert attack.success.all()
    torch.testing.assert_close(attack.images, images - EPS, rtol=0, atol=1.01 / 255)  # the only way down
    square = truth[:, None].expand_as(images)
    torch.testing.assert_close(attack.images[square], (images - EPS)[square], rtol=0, atol=1e-6)


def test_the_bound_spares_what_is_gone_already() -> None:
    images, points, truth = task()
    model = Brightness(scale=100.0)  # the dark ground lies at -34, far below -bound
    goal = MaskRemoved(model, points, truth)
    attack = sam.attack_sam(
        model, images, goal, eps=EPS, steps=12, bound=10.0, early_removal=False, generator=generator(), grid=None
    )
    ground = (attack.images - images)[~truth[:, None].expand_as(images)]
    assert (attack.images - images)[truth[:, None].expand_as(images)].max() < -0.9 * EPS
    assert ground.min() < 0 < ground.max()  # still where the random start left it
    assert ground.mean().abs() < 0.1 * EPS


def test_manipulation_pushes_up_inside_the_target_and_down_outside() -> None:
    images, points, truth = task(bright=130 / 255)
    images[:, :, :, 6:] = 126 / 255  # two columns just below the threshold
    target = torch.zeros_like(truth)
    target[:, :, 6:] = True
    goal = MaskMoved(Brightness(), points, truth, target=target)
    attack = sam.attack_sam(Brightness(), images, goal, eps=EPS, steps=12, early_removal=False, generator=generator())
    assert attack.success.all()
    assert torch.equal(attack.images.mean(1) > 0.5, target)


def test_the_region_attack_asks_only_inside_the_region_and_at_new_points_each_step() -> None:
    images, points, truth = task()
    region = truth.clone()
    region[:, 2:4] = False
    model = Brightness()
    any_attack("region_attack", model, images, MaskLost(model, points, truth), region=region, steps=5, prompts=3)
    inner = [p for p in model.asked if p.ndim == 3]
    assert len(inner) == 5
    for asked in inner:
        x, y = asked.long().unbind(-1)  # (B, K)
        assert region[torch.arange(len(images))[:, None], y, x].all()
    assert len({tuple(asked.flatten().tolist()) for asked in inner}) == 5


def test_what_a_blind_attack_does_cannot_depend_on_the_judging_prompt() -> None:
    model = segmenter.build({"width": 16, "layers": 1, "heads": 2, "decoder": 16}, seed=0)
    images, points, truth = segmenter.mixed(2, split="train", seed=0)

    class Always(MaskLost):
        def met(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return torch.ones(len(rows), dtype=torch.bool)

        def correct(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            return self.met(outputs, rows)

    here, there = (Always(model, p, truth) for p in (points, points.flip(0)))
    for name in NAMES[1:]:
        first, second = (any_attack(name, model, images, goal, steps=1) for goal in (here, there))  # fmt: skip
        assert torch.equal(first.images, second.images), name
        assert not torch.equal(first.images, images), name


def test_the_feature_attack_needs_no_decoder() -> None:
    class Sealed(Brightness):
        def decode(self, embeddings: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            return super().decode(embeddings, points)

    images, points, truth = task()
    model = Sealed()
    attack = sam.feature_attack(model, images, MaskLost(model, points, truth), eps=EPS, steps=12, generator=generator())
    assert (attack.distance[attack.success] > 0).all()


def test_the_universal_perturbation_is_one_for_all_and_learned_elsewhere() -> None:
    images, points, truth = task()
    known, model = task(10, bright=129 / 255)[0], Brightness()
    attack = sam.dark_sam(
        model,
        images,
        MaskLost(model, points, truth),
        known=known,
        eps=EPS,
        steps=40,
        batch=4,
        texture=0.0,
        generator=generator(),
    )
    delta = sam.universal_perturbation(model, known, eps=EPS, steps=40, batch=4, texture=0.0, generator=generator())
    assert attack.success.all()
    change = attack.images - images
    assert torch.equal(change, change[:1].expand_as(change))
    torch.testing.assert_close(change[0], delta, rtol=0, atol=0.51 / 255)
    inside = truth[0].expand(3, -1, -1)
    assert delta[inside].max() < 0 < delta[~inside].min()  # the blueprint turned inside out


def test_the_texture_term_moves_high_frequencies_and_leaves_low_ones() -> None:
    known = torch.rand(6, 3, S, S, generator=generator()) * 0.2 + 0.4

    class Deaf(Brightness):
        def decode(self, embeddings: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
            return super().decode(embeddings, points) * 0.0

    delta = sam.universal_perturbation(Deaf(), known, eps=EPS, steps=40, batch=6, texture=1.0, generator=generator())
    low, high = _bands(delta[None])
    assert high.square().mean() > 20 * low.square().mean()


def test_bands_add_up_and_the_low_one_is_constant_on_blocks() -> None:
    images = torch.rand(2, 3, S, S, generator=generator())
    low, high = _bands(images)
    torch.testing.assert_close(low + high, images)
    torch.testing.assert_close(low[..., ::2, ::2], low[..., 1::2, 1::2])
    torch.testing.assert_close(F.avg_pool2d(high, 2), torch.zeros(2, 3, S // 2, S // 2), atol=1e-6, rtol=0)


def test_a_transfer_attack_never_differentiates_the_victim() -> None:
    class Sealed(Brightness):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            return super().forward(pixels)

    images, points, truth = task()
    victim, surrogate = Sealed(), Brightness(scale=3.0)
    attack = any_attack("umi_grat", victim, images, MaskLost(victim, points, truth), surrogate, steps=8)
    assert attack.images.shape == images.shape
    assert all(weight.requires_grad for weight in surrogate.parameters())


@pytest.fixture(scope="module")
def large() -> PixelSegmenter:
    return segmenter.build(
        {"side": 128, "patch": 16, "width": 768, "layers": 2, "heads": 12, "decoder": 256, "window": 14}, seed=0
    ).eval()


@pytest.mark.parametrize("name", NAMES)
def test_full_size_shapes(name: str, large: PixelSegmenter) -> None:
    """The widths, patch and window of SAM's ViT-B at an eighth of its side, two layers deep, random weights."""
    model = large
    images = torch.randint(256, (2, 3, 128, 128), generator=generator()) / 255
    with torch.no_grad():
        points = torch.tensor([[50.0, 60.0], [100.0, 10.0]])
        truth = model.decode(model(images), points) > 0
    truth[:, 0, 0] = True
    goal = MaskLost(model, points, truth, threshold=0.5)
    attack = any_attack(name, model, images, goal, steps=1)
    assert not attack.skipped.any()
    assert attack.images.shape == images.shape
    assert (attack.distance <= EPS + 1e-6).all()


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("attack_sam", {"bound": 0.0}),
        ("attack_sam", {"steps": 0}),
        ("region_attack", {"prompts": 0}),
        ("region_attack", {"bound": -1.0}),
        ("region_attack", {"region": torch.ones(6, 4, 4, dtype=torch.bool)}),
        ("dark_sam", {"known": torch.zeros(3, S, S)}),
        ("dark_sam", {"texture": -1.0}),
        ("dark_sam", {"batch": 0}),
        ("umi_grat", {"meta_steps": 0}),
        ("umi_grat", {"noise": -0.1}),
        ("umi_grat", {"momentum": float("inf")}),
        ("umi_grat", {"known": torch.zeros(0, 3, S, S)}),
        ("feature_attack", {"steps": 0}),
        ("feature_attack", {"step_size": float("nan")}),
        ("dark_sam", {"step_size": -1.0}),
        ("umi_grat", {"step_size": float("inf")}),
        ("umi_grat", {"known": torch.zeros(2, 3, 2 * S, 2 * S)}),
    ],
)
def test_bad_arguments_are_refused_by_name(name: str, bad: dict[str, Any]) -> None:
    images, points, truth = task()
    model = Brightness()
    with pytest.raises(ValueError, match=next(iter(bad))):
        any_attack(name, model, images, MaskLost(model, points, truth), **bad)


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_global_stream_is_not_an_option(name: str) -> None:
    images, points, truth = task()
    model = Brightness()
    with pytest.raises(TypeError, match="generator"):
        any_attack(name, model, images, MaskLost(model, points, truth), generator=None)
