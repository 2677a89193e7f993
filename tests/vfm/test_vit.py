"""Section 2.1: what the shared checks do not cover."""

from __future__ import annotations

import pytest
import torch

from safescale_lib import zoo
from safescale_lib.search.models import straight_through
from safescale_lib.vfm.vit import adversarial_training, quantise, quantised_input
from safescale_lib.world.scenes import scenes


def test_quantise_against_the_nearest_level() -> None:
    x = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for levels in (2, 3, 8, 256):
        grid = torch.linspace(0, 1, levels, dtype=torch.float64)
        nearest = (x[:, None] - grid).abs().amin(dim=1)
        rounded = quantise(x, levels)
        torch.testing.assert_close((rounded - x).abs(), nearest)
        assert len(rounded.unique()) == levels


@pytest.mark.parametrize("levels", [1, 0, -3])
def test_quantise_refuses_fewer_than_two_levels(levels: int) -> None:
    with pytest.raises(ValueError, match="levels"):
        quantised_input(lambda x: x, levels=levels)


def test_rounding_masks_the_gradient_and_straight_through_shows_it() -> None:
    model, batch = zoo.load("vit"), scenes(4, split="validation", seed=0)
    through = straight_through(model, lambda x: quantise(x, 8))
    gradients = []
    for f in (quantised_input(model, levels=8), through):
        x = batch.images.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(f(x).sum(), x)
        gradients.append(gradient)
    assert gradients[0].abs().max() == 0
    assert gradients[1].abs().max() > 0
    with torch.inference_mode():
        torch.testing.assert_close(through(batch.images), quantised_input(model, levels=8)(batch.images))


def test_adversarial_training_is_seeded_and_leaves_its_model_alone() -> None:
    model = zoo.load("vit")
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        fresh = scenes(8, split="train", seed=step)
        return fresh.images, fresh.labels

    first, second = (adversarial_training(model, batch, eps=4 / 255, steps=3, progress=False) for _ in range(2))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), model.parameters(), strict=True))
    assert first.training == model.training


@pytest.mark.parametrize(("named", "value"), [("eps", 0.0), ("eps", 2.0), ("steps", 0), ("inner_steps", 0)])
def test_adversarial_training_refuses_a_budget_that_trains_nothing(named: str, value: float) -> None:
    arguments = {"eps": 8 / 255, "steps": 1, "inner_steps": 1} | {named: value}
    with pytest.raises(ValueError, match=named):
        adversarial_training(zoo.load("vit"), lambda step: (torch.zeros(1), torch.zeros(1)), progress=False, **arguments)
