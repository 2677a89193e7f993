"""Query attacks: what they ask, what they keep, and what it costs them."""

import math

import pytest
import torch

from safescale_lib.measure.criteria import ClassifiedAs, Misclassified
from safescale_lib.search.ball import Ball
from safescale_lib.search.queries import _side, hop_skip_jump, random_guesses, square

CLASSES, SHAPE = 4, (3, 6, 6)


class Asked(torch.nn.Module):
    """A curved classifier that remembers every picture it was shown."""

    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Parameter(2 * torch.randn(108, 24, generator=g, dtype=torch.float64) / 108**0.5)
        self.second = torch.nn.Parameter(torch.randn(24, CLASSES, generator=g, dtype=torch.float64))
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return torch.sin((x.flatten(1) - 0.5) @ self.first * 3) @ self.second


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def case():
    model = Asked()
    images = torch.randint(256, (24, *SHAPE), generator=seeded(1)).double() / 255
    labels = model(images).argmax(1).detach()
    labels[-2:] = (labels[-2:] + 1) % CLASSES
    model.seen.clear()
    return model, images, Misclassified(labels)


def test_the_window_shrinks_as_in_the_paper_but_four_times_more_slowly():
    sides = [_side(step, 2_500, 0.8, 32, 32) for step in (1, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)]
    assert sides == [max(1, round(math.sqrt(0.8 / 2**k * 1024))) for k in range(10)]
    assert _side(0, 100, 1.0, 32, 20) == 20  # never larger than the image
    assert _side(99, 100, 0.01, 4, 4) == 1


@pytest.mark.parametrize("attack", [square, random_guesses])
def test_questions_budget_and_counts(case, attack):
    model, images, goal = case
    eps = 12 / 255
    found = attack(model, images, goal, eps=eps, queries=40, generator=seeded())
    assert found.cost.queries == sum(len(x) for x in model.seen)
    assert found.cost.forwards == found.cost.backwards == 0
    assert found.queries[found.skipped].eq(0).all()
    assert found.queries[found.survived].eq(40).all()
    assert (found.queries[found.success] >= 1).all()
    shown = torch.cat(model.seen)
    assert torch.equal((shown * 255).round() / 255, shown)
    assert Ball(eps).holds(found.images, images).all()
    assert torch.equal(goal.met(model(found.images), torch.arange(24)) & ~found.skipped, found.success)
    assert torch.equal(found.images[~found.success], images[~found.success])
    by_budget = [int(found.broken_within(q).sum()) for q in range(41)]
    assert by_budget == sorted(by_budget)
    assert by_budget[0] == 0
    assert by_budget[-1] == found.success.sum()


def test_the_queries_of_an_item_are_those_the_model_saw():
    """One item alone: as many pictures in the ball's corners as `queries` says, each one window away from the best."""
    model = Asked(3)
    image = torch.randint(40, 216, (1, *SHAPE), generator=seeded(2)).double() / 255
    goal = Misclassified(model(image).argmax(1))
    model.seen.clear()
    eps = 3 / 255
    found = square(model, image, goal, eps=eps, queries=60, generator=seeded())
    asked = model.seen[1:]  # the first is the clean picture
    assert found.queries.item() in (len(asked), len(asked) - 1)  # the last is the final check
    best, lead = asked[0], -math.inf
    for step, x in enumerate(asked[: found.queries.item()]):
        torch.testing.assert_close((x - image).abs(), torch.full_like(x, eps))
        if step:
            changed = (x != best).any(1)[0].nonzero()
            assert len(changed)
            assert (changed.amax(0) - changed.amin(0) < _side(step, 60, 0.8, 6, 6)).all()
        logits = model(x)[0].detach()
        label = int(goal.labels)
        now = float(torch.cat([logits[:label], logits[label + 1 :]]).max() - logits[label])
        if now > lead:
            best, lead = x, now


@pytest.mark.parametrize("attack", [square, random_guesses])
def test_what_happens_to_an_item_does_not_depend_on_the_batch(case, attack):
    model, images, goal = case
    whole, parts = (
        attack(model, images, goal, eps=12 / 255, queries=30, generator=seeded(), batch_size=size) for size in (256, 5)
    )
    assert torch.equal(whole.images, parts.images)
    assert torch.equal(whole.queries, parts.queries)


def test_square_learns_what_guessing_does_not():
    wins = losses = 0
    for seed in range(3):
        model, images = Asked(seed), torch.randint(256, (40, *SHAPE), generator=seeded(seed)).double() / 255
        goal = Misclassified(model(images).argmax(1))
        settings = {"eps": 8 / 255, "queries": 60}
        wins += int(square(model, images, goal, **settings, generator=seeded()).success.sum())
        losses += int(random_guesses(model, images, goal, **settings, generator=seeded()).success.sum())
    assert wins > losses * 1.3


def test_zero_eps_asks_nothing_about_attacks(case):
    model, images, goal = case
    for attack in (square, random_guesses, hop_skip_jump):
        found = attack(model, images, goal, eps=0, queries=5, generator=seeded())
        assert torch.equal(found.images, images)
        assert not found.queries.any()


# --- labels only --------------------------------------------------------------------------------------------------


@pytest.fixture
def plane():
    w = torch.randn(108, generator=seeded(5), dtype=torch.float64)
    images = 0.3 + 0.4 * torch.rand(12, *SHAPE, generator=seeded(6), dtype=torch.float64)
    images = (images * 255).round() / 255
    shift = 0.6 * w.norm()
    score = (images.flatten(1) - 0.5) @ w + shift

    def model(x):
        score = (x.flatten(1) - 0.5) @ w + shift
        return torch.stack([torch.zeros_like(score), score.sign()], dim=1)  # labels alone

    return model, images, Misclassified((score > 0).long()), score.abs() / w.norm()


def test_it_comes_close_to_the_plane_by_labels_alone(plane):
    model, images, goal, needed = plane
    start = images.clone()
    far = torch.where(goal.labels.bool(), 0.0, 1.0)
    direction = torch.randn(108, generator=seeded(5), dtype=torch.float64).sign().reshape(1, *SHAPE)
    start = torch.where(far[:, None, None, None] > 0, (direction > 0).double(), (direction < 0).double()).expand_as(images)
    found = hop_skip_jump(model, images, goal, queries=1500, start=start.contiguous(), generator=seeded())
    assert found.success.all()
    assert (found.distance >= needed * (1 - 1e-6)).all()
    assert (found.distance / needed).median() < 1.3
    assert found.trace is not None
    assert (found.trace[1:] <= found.trace[:-1]).all()
    assert (found.trace[-1] < 0.9 * found.trace[0]).float().mean() > 0.7
    torch.testing.assert_close(found.trace[-1], found.distance)
    assert (found.queries <= 1500).all()


def test_labels_only_budget_verdict_and_counts(case):
    model, images, goal = case
    found = hop_skip_jump(model, images, goal, queries=120, probes=15, generator=seeded())
    assert found.cost.queries == sum(len(x) for x in model.seen)
    assert found.queries.sum() == found.cost.queries - 24 - found.attempted.sum()
    assert (found.queries <= 120).all()
    assert found.success.sum() >= 20
    assert torch.equal((found.images * 255).round() / 255, found.images)
    assert torch.equal(goal.met(model(found.images), torch.arange(24)) & ~found.skipped, found.success)
    shown = torch.cat(model.seen)
    assert torch.equal((shown * 255).round() / 255, shown)
    parts = hop_skip_jump(model, images, goal, queries=120, probes=15, generator=seeded(), batch_size=7)
    assert torch.equal(found.images, parts.images)
    near = hop_skip_jump(model, images, goal, queries=120, probes=15, eps=1.0, generator=seeded())
    assert Ball(1.0, "l2").holds(near.images, images).all()
    assert torch.equal(near.success, found.success & (found.distance <= 1.0))


def test_a_target_needs_a_start(case):
    model, images, goal = case
    targets = (goal.labels + 1) % CLASSES
    donor = torch.stack([images[(goal.labels == t).nonzero()[0, 0]] for t in targets])
    found = hop_skip_jump(model, images, ClassifiedAs(targets, goal.labels), queries=100, start=donor, generator=seeded())
    assert found.success.sum() >= 18
    assert torch.equal(model(found.images).argmax(1)[found.success], targets[found.success])


@pytest.mark.parametrize(("name", "value"), [("queries", 0), ("eps", -0.1), ("share", 0.0), ("share", 1.5)])
def test_bad_arguments_are_named(case, name, value):
    model, images, goal = case
    with pytest.raises(ValueError, match=name):
        square(model, images, goal, **({"eps": 0.1, "generator": seeded()} | {name: value}))
    with pytest.raises(TypeError, match="generator"):
        square(model, images, goal, eps=0.1, generator=None)
    for wrong in ({"probes": 0}, {"queries": 0}, {"eps": float("nan")}, {"start": images[:3]}):
        with pytest.raises(ValueError, match="|".join([*wrong, "criterion"])):
            hop_skip_jump(model, images, goal, generator=seeded(), **wrong)
