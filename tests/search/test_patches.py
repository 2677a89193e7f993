"""One change for many images, against slow references and the closed form of a linear model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safescale_lib.measure.criteria import ClassifiedAs, Misclassified
from safescale_lib.search.patches import add_universal, adversarial_patch, paste, stick, universal_perturbation

SHAPE = (3, 8, 8)


class Linear(torch.nn.Module):
    """Two classes: logits (0, w.x + b); counts what is asked of it."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b, self.asked = torch.nn.Parameter(w), b, 0

    def forward(self, x):
        self.asked += len(x)
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(score), score], dim=1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def case():
    """All items of class 1, at various distances from the plane."""
    w = torch.randn(192, generator=seeded(5), dtype=torch.float64)
    images = (0.4 + 0.2 * torch.rand(30, *SHAPE, generator=seeded(6), dtype=torch.float64)) * 255
    images = images.round() / 255
    score = images.flatten(1) @ w
    b = float(-score.min() + 0.5)
    return Linear(w, b), images, Misclassified(torch.ones(30, dtype=torch.int64)), (score + b).detach()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 6), st.booleans(), st.integers(0, 999))
def test_paste_against_a_loop(n, size, own, seed):
    g = seeded(seed)
    images = torch.rand(n, 3, 6, 7, generator=g)
    patch = torch.rand(*([n] if own else []), 3, size, size, generator=g)
    corners = torch.stack([torch.randint(6 - size + 1, (n,), generator=g), torch.randint(7 - size + 1, (n,), generator=g)], 1)
    slow = images.clone()
    for i, (r, c) in enumerate(corners.tolist()):
        slow[i, :, r : r + size, c : c + size] = patch[i] if own else patch
    before = images.clone()
    assert torch.equal(paste(images, patch, corners), slow)
    assert torch.equal(images, before)


def test_the_gradient_of_a_patch_is_the_sum_over_its_places():
    images, weights = torch.rand(5, *SHAPE, generator=seeded()), torch.rand(5, *SHAPE, generator=seeded(1))
    corners = torch.randint(6, (5, 2), generator=seeded(2))
    patch = torch.rand(3, 3, 3, generator=seeded(3)).requires_grad_(True)
    (gradient,) = torch.autograd.grad((paste(images, patch, corners) * weights).sum(), patch)
    wanted = sum(weights[i, :, r : r + 3, c : c + 3] for i, (r, c) in enumerate(corners.tolist()))
    torch.testing.assert_close(gradient, wanted)


def test_a_universal_perturbation_of_a_plane_is_the_sign_of_its_normal(case):
    model, images, goal, score = case
    eps = 4 / 255
    found = universal_perturbation(model, images, goal, eps=eps, steps=40, generator=seeded())
    torch.testing.assert_close(found.delta, -eps * model.w.detach().sign().reshape(SHAPE))
    assert torch.equal(found.success, score < eps * model.w.abs().sum())
    assert found.cost.forwards == model.asked
    other = add_universal(model, found.delta, images[:7], Misclassified(goal.labels[:7]), eps=eps)
    assert torch.equal(other.success, found.success[:7])
    assert other.cost.queries == 7
    assert not add_universal(model, found.delta, images, goal, eps=eps / 2).success.any()  # over the budget: never counted


@pytest.mark.parametrize("universal", [True, False])
def test_a_patch_stays_in_its_square_and_the_verdict_holds(case, universal):
    model, images, goal, _ = case
    settings = {"size": 4, "steps": 25, "universal": universal}
    found = adversarial_patch(model, images, goal, **settings, generator=seeded())
    assert found.patch.shape == ((3, 4, 4) if universal else (30, 3, 4, 4))
    assert torch.equal((found.patch * 255).round() / 255, found.patch)
    shown = paste(images, found.patch, found.corners)
    assert torch.equal(found.images[found.success], shown[found.success])
    assert torch.equal(found.images[~found.success], images[~found.success])
    assert torch.equal(model(shown).argmax(1) != 1, found.success)
    assert (found.corners >= 0).all()
    assert (found.corners <= 4).all()
    small = adversarial_patch(model, images, goal, **settings, generator=seeded(), batch_size=4)
    torch.testing.assert_close(small.patch, found.patch)
    nothing = adversarial_patch(model, images, goal, size=0, generator=seeded())
    assert torch.equal(nothing.images, images)


def test_a_patch_as_large_as_the_image_is_the_best_image(case):
    model, images, goal, _ = case
    found = adversarial_patch(model, images, goal, size=8, steps=60, generator=seeded())
    assert torch.equal(found.patch, (model.w.detach().reshape(SHAPE) < 0).double())
    assert found.success.all() == bool(model(found.patch[None]).argmax(1) != 1)


def test_an_optimised_patch_beats_a_random_one_on_images_it_has_not_seen(case):
    model, images, goal, _ = case
    goal = Misclassified(goal.labels[:15])
    found = adversarial_patch(model, images[:15], goal, size=5, steps=40, generator=seeded())
    ours = stick(model, found.patch, images[15:], goal, generator=seeded(1))
    chance = stick(model, torch.rand(3, 5, 5, generator=seeded(2), dtype=torch.float64), images[15:], goal, generator=seeded(1))
    assert torch.equal(ours.corners, chance.corners)
    assert (
        model(paste(images[15:], ours.patch, ours.corners))[:, 1].mean()
        < model(paste(images[15:], chance.patch, chance.corners))[:, 1].mean()
    )
    assert ours.success.sum() >= chance.success.sum()


def test_a_targeted_patch_serves_its_target(case):
    model, images, _, _ = case
    labels = torch.ones(30, dtype=torch.int64)
    found = adversarial_patch(model, images, ClassifiedAs(1 - labels, labels), size=6, steps=40, generator=seeded())
    assert torch.equal(model(found.images).argmax(1) == 0, found.success)


def test_bad_arguments_are_named(case):
    model, images, goal, _ = case
    for name, value in (("size", 9), ("size", -1), ("size", 2.5), ("steps", 0), ("step_size", 0), ("per_step", 0)):
        with pytest.raises(ValueError, match=name):
            adversarial_patch(model, images, goal, **({"size": 3, "generator": seeded()} | {name: value}))
    for name, value in (("eps", -1.0), ("steps", 0), ("step_size", -1.0)):
        with pytest.raises(ValueError, match=name):
            universal_perturbation(model, images, goal, **({"eps": 0.1, "generator": seeded()} | {name: value}))
    with pytest.raises(ValueError, match="patch"):
        stick(model, torch.rand(3, 2, 5), images, goal, generator=seeded())
    with pytest.raises(ValueError, match="delta"):
        add_universal(model, torch.rand(3, 2, 5), images, goal, eps=0.1)
    with pytest.raises(TypeError, match="generator"):
        universal_perturbation(model, images, goal, eps=0.1, generator=0)
