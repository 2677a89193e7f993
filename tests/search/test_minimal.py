"""Minimal-distance attacks against the exact distance to a plane, and what they must return when they fail."""

from threading import Lock

import pytest
import torch

from safescale_lib.measure.criteria import ClassifiedAs, Misclassified
from safescale_lib.search.ball import Ball
from safescale_lib.search.minimal import carlini_wagner, decoupled

COUNTING = Lock()  # two batches may be under way at once, and += is two steps

SHAPE = (3, 6, 6)
both = pytest.mark.parametrize("attack", [carlini_wagner, decoupled])


class Linear(torch.nn.Module):
    """Two classes: logits (0, w.x + b)."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b, self.asked = torch.nn.Parameter(w), b, 0

    def forward(self, x):
        with COUNTING:
            self.asked += len(x)
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(score), score], dim=1)


@pytest.fixture
def plane():
    w = torch.randn(108, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    images = 0.4 + 0.2 * torch.rand(24, *SHAPE, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    images = (images * 255).round() / 255
    score = (images.flatten(1) - 0.5) @ w
    return Linear(w, -0.5 * w.sum()), images, Misclassified((score > 0).long()), score.abs() / w.norm()


def test_the_distance_is_that_to_the_plane(plane):
    model, images, goal, needed = plane
    for attack, settings in (
        (decoupled, {"steps": 100}),
        (carlini_wagner, {"head_start": 60}),
        (carlini_wagner, {"head_start": 0, "searches": 4, "steps": 150, "lr": 0.01}),
    ):
        found = attack(model, images, goal, grid=None, **settings)
        assert found.success.all()
        assert (found.distance >= needed * (1 - 1e-9)).all()
        assert (found.distance <= needed * 1.05 + 0.004).all()


@both
def test_eight_bits_budget_verdict_and_count(plane, attack):
    model, images, goal, needed = plane
    eps = float(needed.median())
    model.asked = 0
    found = attack(model, images, goal, eps=eps)
    assert found.cost.forwards == model.asked
    assert torch.equal((found.images * 255).round() / 255, found.images)
    assert Ball(eps, "l2").holds(found.images, images).all()
    assert torch.equal(goal.met(model(found.images), torch.arange(24)), found.success)
    assert torch.equal(found.images[~found.success], images[~found.success])
    assert (needed[found.success] <= eps).all()
    assert 6 <= found.success.sum() <= 12
    nothing = attack(model, images, goal, eps=0)
    assert torch.equal(nothing.images, images)
    assert not nothing.success.any()


@both
def test_pixels_at_the_ends_of_the_range_can_move(attack):
    """All pixels are 0 or 1, where the tanh of the paper has no gradient."""
    images = torch.randint(2, (6, *SHAPE), generator=torch.Generator().manual_seed(1)).double()
    w = 0.5 - images[0].flatten()  # points inwards from the first image
    score = images.flatten(1) @ w
    goal = Misclassified((score - score.median() > 0).long())
    model = Linear(w, -score.median() - 1e-3)
    found = attack(model, images, goal)
    inside = found.attempted
    assert found.success[inside].all()
    assert (found.images[found.success] != images[found.success]).any()


@both
def test_an_unbreakable_item_comes_back_as_it_was(attack):
    images = torch.randint(256, (3, *SHAPE), generator=torch.Generator().manual_seed(1)) / 255

    def stubborn(x):
        return torch.stack([x.flatten(1).sum(1) * 1e-3 + 100, x.flatten(1).sum(1) * 0], dim=1)

    found = attack(stubborn, images, Misclassified(torch.zeros(3, dtype=torch.int64)))
    assert not found.success.any()
    assert torch.equal(found.images, images)
    assert (found.distance == 0).all()


@both
def test_a_target_is_reached_and_the_wrong_are_skipped(plane, attack):
    model, images, goal, _ = plane
    labels = goal.labels.clone()
    labels[0] = 1 - labels[0]
    found = attack(model, images, ClassifiedAs(1 - labels, labels))
    assert found.skipped.tolist() == [True] + [False] * 23
    assert not found.success[0]
    assert torch.equal(model(found.images).argmax(1)[found.success], (1 - labels)[found.success])
    assert found.success.sum() == 23


def test_confidence_buys_a_margin(plane):
    model, images, goal, _ = plane
    settings = {"head_start": 0, "searches": 4, "steps": 60, "lr": 0.01, "grid": None}
    near = carlini_wagner(model, images, goal, **settings)
    far = carlini_wagner(model, images, goal, confidence=1.0, **settings)
    assert near.success.all()
    assert far.success.all()
    assert far.distance.mean() >= near.distance.mean() * 0.99  # what is kept is the nearest success either way


@both
@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("eps", -1.0), ("batch_size", 0)])
def test_bad_arguments_are_named(plane, attack, name, value):
    model, images, goal, _ = plane
    with pytest.raises(ValueError, match=name):
        attack(model, images, goal, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("searches", 0), ("head_start", -1), ("lr", -0.1), ("confidence", float("nan"))])
def test_bad_arguments_of_the_penalty_are_named(plane, name, value):
    model, images, goal, _ = plane
    with pytest.raises(ValueError, match=name):
        carlini_wagner(model, images, goal, **{name: value})
    with pytest.raises(ValueError, match="gamma"):
        decoupled(model, images, goal, gamma=1.5)
