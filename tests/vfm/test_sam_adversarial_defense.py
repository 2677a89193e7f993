"""Adversarial tuning of SAM: it tunes a copy, of the encoder only, and on what was attacked."""

from __future__ import annotations

import pytest
import torch

from safescale_lib import zoo
from safescale_lib.measure.masks import mask_error
from safescale_lib.vfm.sam import adversarial_tuning
from safescale_lib.zoo import segmenter
from safescale_lib.zoo.segmenter import PixelSegmenter, mixed, worst_masks

EPS = 8 / 255


@pytest.fixture(scope="module")
def small() -> PixelSegmenter:
    return segmenter.build({"width": 16, "layers": 1, "heads": 2, "decoder": 16}, seed=0).eval()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return mixed(8, split="train", seed=step)


def test_it_tunes_a_copy_of_the_encoder_and_nothing_else(small: PixelSegmenter) -> None:
    before = {name: weight.clone() for name, weight in small.state_dict().items()}
    tuned = adversarial_tuning(small, batch, eps=EPS, steps=2, progress=False)
    assert all(torch.equal(before[name], weight) for name, weight in small.state_dict().items())
    changed = {name.split(".")[1] for name, weight in tuned.state_dict().items() if not torch.equal(before[name], weight)}
    assert changed == {"vision_encoder"}
    assert all(weight.requires_grad for weight in tuned.parameters())
    assert not tuned.training


def test_it_lowers_the_error_on_attacked_scenes() -> None:
    eps, plain = 32 / 255, zoo.load("sam")
    tuned = adversarial_tuning(
        plain, lambda step: mixed(12, split="train", seed=step), eps=eps, steps=10, inner_steps=1, progress=False
    )
    images, points, truth = mixed(24, split="validation", seed=0)

    def attacked_error(model: PixelSegmenter) -> float:
        generator = torch.Generator().manual_seed(0)
        worst = worst_masks(model, images, points, truth, eps=eps, steps=4, generator=generator)
        with torch.no_grad():
            return mask_error(model.decode(model(worst), points), truth).mean().item()

    assert attacked_error(tuned) < 0.8 * attacked_error(plain)


@pytest.mark.parametrize("bad", [{"eps": 0.0}, {"eps": 2.0}, {"steps": 0}, {"inner_steps": 0}])
def test_a_budget_that_trains_nothing_is_refused(small: PixelSegmenter, bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        adversarial_tuning(small, batch, **{"eps": EPS, "steps": 1, "progress": False, **bad})  # type: ignore[arg-type]
