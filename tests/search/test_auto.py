"""Auto-PGD against its algorithm written for one item; the ensemble against its members."""

import math
from threading import Lock

import pytest
import torch

from safescale_lib.measure.criteria import ClassifiedAs, Misclassified
from safescale_lib.search.auto import _checkpoints, adaptive_ascent, apgd, auto_ensemble
from safescale_lib.search.ball import Ball
from safescale_lib.search.objectives import cross_entropy, dlr, margin, towards
from safescale_lib.search.pixels import pgd

COUNTING = Lock()  # two batches may be under way at once, and += is two steps

CLASSES, SHAPE = 5, (3, 4, 4)


class Wavy(torch.nn.Module):
    """Two layers with a curved decision boundary, in double precision; counts what is asked of it."""

    def __init__(self, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Parameter(3 * torch.randn(48, 24, generator=g, dtype=torch.float64) / 48**0.5)
        self.second = torch.nn.Parameter(torch.randn(24, CLASSES, generator=g, dtype=torch.float64))
        self.asked = 0

    def forward(self, x):
        with COUNTING:
            self.asked += len(x)
        return torch.sin((x.flatten(1) - 0.5) @ self.first * 3) @ self.second


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def case():
    model = Wavy()
    images = torch.randint(256, (30, *SHAPE), generator=seeded(1)).double() / 255
    labels = model(images).argmax(1).detach()
    labels[-2:] = (labels[-2:] + 1) % CLASSES
    model.asked = 0
    return model, images, Misclassified(labels)


def test_checkpoints_are_those_of_the_paper():
    assert sorted(_checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    for steps in (1, 2, 5, 20, 50):
        assert all(1 <= mark <= steps for mark in _checkpoints(steps))


def one_item(f, x0, eps, steps, norm):
    """Algorithm 1 for one flat float image in the paper's notation; f(x) -> (value, gradient)."""

    def project(x):
        d = x - x0
        d = d.clamp(-eps, eps) if norm == "linf" else d * min(1.0, eps / max(float(d.norm()), 1e-12))
        return (x0 + d).clamp(0, 1)

    def direction(g):
        return g.sign() if norm == "linf" else g / g.norm()

    marks = sorted(_checkpoints(steps))
    xs, eta = [x0], 2 * eps
    values, gradients = [], []
    best = (-math.inf, None, None)
    eta_then, top_then, since = eta, -math.inf, 0
    for k in range(steps):
        value, gradient = f(xs[-1])
        values.append(value)
        gradients.append(gradient)
        if value > best[0]:
            best = (value, xs[-1], gradient)
        x, before, g = xs[-1], xs[-2] if k else xs[-1], gradient
        if k in marks:
            rises = sum(values[i] > values[i - 1] for i in range(since + 1, k + 1))
            stuck = rises < 0.75 * (k - since) or (eta == eta_then and best[0] == top_then)
            eta_then, top_then, since = eta, best[0], k
            if stuck:
                eta, x, before, g = eta / 2, best[1], best[1], best[2]
        z = project(x + eta * direction(g))
        if k:
            z = project(x + 0.75 * (z - x) + 0.25 * (x - before))
        if k in marks and torch.equal(x, best[1]):
            xs[-1] = x
        xs.append(z)
    return best


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_batched_ascent_follows_the_algorithm_for_each_item(case, norm):
    model, images, goal = case
    eps = {"linf": 0.05, "l2": 0.3}[norm]
    found = adaptive_ascent(model, images, images, lambda z, live: margin(goal, z, live), Ball(eps, norm, grid=None), steps=30)
    for i in range(8):
        row = torch.tensor([i])

        def f(x, row=row):
            seen = x[None].clone().requires_grad_(True)
            value = margin(goal, model(seen), row)
            return value.item(), torch.autograd.grad(value.sum(), seen)[0][0]

        value, x, _ = one_item(f, images[i], eps, 30, norm)
        torch.testing.assert_close(found[i], x)
        assert margin(goal, model(found[i : i + 1]), row).item() == pytest.approx(value)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("objective", [cross_entropy, dlr])
def test_budget_verdict_and_originals_hold(case, norm, objective):
    model, images, goal = case
    eps = {"linf": 6 / 255, "l2": 0.15}[norm]
    found = apgd(model, images, goal, eps=eps, steps=20, norm=norm, objective=objective, generator=seeded())
    rows = torch.arange(len(images))
    assert Ball(eps, norm).holds(found.images, images).all()
    assert torch.equal(goal.met(model(found.images), rows)[found.attempted], found.success[found.attempted])
    assert found.skipped.tolist() == [False] * 28 + [True] * 2
    assert torch.equal(found.images[~found.success], images[~found.success])
    assert 0 < found.success.sum() < 28
    assert torch.equal((found.images * 255).round() / 255, found.images)
    assert found.cost.forwards == model.asked - len(images)  # the last call is this test's own


def test_early_removal_changes_the_cost_and_not_the_verdict_for_the_worse(case):
    model, images, goal = case
    settings = {"eps": 8 / 255, "steps": 20}
    early = apgd(model, images, goal, **settings, generator=seeded())
    whole = apgd(model, images, goal, **settings, generator=seeded(), early_removal=False)
    assert early.success.sum() >= whole.success.sum()
    assert early.cost.backwards < whole.cost.backwards == 20 * 28


def test_it_is_at_least_as_strong_as_pgd_of_the_same_steps_over_seeds():
    ours = theirs = 0
    for seed in range(4):
        model, images = Wavy(seed), torch.randint(256, (60, *SHAPE), generator=seeded(seed)).double() / 255
        goal = Misclassified(model(images).argmax(1))
        ours += int(apgd(model, images, goal, eps=5 / 255, steps=30, generator=seeded()).success.sum())
        theirs += int(pgd(model, images, goal, eps=5 / 255, steps=30, generator=seeded()).success.sum())
    assert ours >= theirs - 2


def test_aiming_at_a_class_lifts_it_above_the_true_one(case):
    model, images, goal = case
    targets = (goal.labels + 1) % CLASSES
    settings = {"eps": 0.2, "steps": 40, "objective": towards(targets), "early_removal": False}
    found = apgd(model, images, goal, **settings, generator=seeded())
    rows = torch.arange(len(images))
    before, after = ((z[rows, targets] > z[rows, goal.labels]) for z in (model(images), model(found.images)))
    assert before[:28].sum() == 0
    assert after.double().mean() > 0.9
    with pytest.raises(TypeError, match="Misclassified"):
        towards(targets)(ClassifiedAs(targets, goal.labels), model(images), torch.arange(30))


def test_the_ensemble_is_the_worst_case_of_its_members(case):
    model, images, goal = case
    settings = {"eps": 4 / 255, "steps": 15}
    found = auto_ensemble(model, images, goal, **settings, targets=2, queries=30, generator=seeded())
    assert found.members == ("APGD-CE", "APGD-DLR, target 1", "APGD-DLR, target 2", "Square")
    first = apgd(model, images[:28], Misclassified(goal.labels[:28]), **settings, generator=seeded())
    rows = torch.arange(len(images))
    assert torch.equal((found.broken_by == 0)[:28], first.success)
    assert torch.equal(found.broken_by >= 0, found.success)
    assert torch.equal(goal.met(model(found.images), rows) & ~found.skipped, found.success)
    assert Ball(4 / 255).holds(found.images, images).all()
    assert found.success.sum() >= first.success.sum()
    nothing = auto_ensemble(model, images, goal, eps=0, generator=seeded())
    assert torch.equal(nothing.images, images)
    assert not nothing.success.any()


def test_where_the_gradient_is_hidden_the_queries_still_find_the_way(case):
    model, images, _ = case

    def masked(x):
        return model((x * 8).round() / 8 + 0 * x)

    masked_goal = Misclassified(masked(images).argmax(1))
    found = auto_ensemble(masked, images, masked_goal, eps=16 / 255, steps=5, targets=1, queries=60, generator=seeded())
    by_square = found.broken_by == found.members.index("Square")
    assert by_square.sum() >= 5
    assert torch.equal(masked(found.images).argmax(1) != masked_goal.labels, found.success)


def test_the_ensemble_serves_targets_and_l2(case):
    model, images, goal = case
    target = ClassifiedAs((goal.labels + 1) % CLASSES, goal.labels)
    aimed = auto_ensemble(model, images, target, eps=0.1, steps=15, queries=10, generator=seeded())
    assert aimed.members == ("APGD-CE", "APGD-DLR", "Square")
    assert torch.equal(model(aimed.images).argmax(1)[aimed.success], target.targets[aimed.success])
    assert aimed.success.any()
    round_ = auto_ensemble(model, images, goal, eps=0.2, norm="l2", steps=10, targets=1, queries=10, generator=seeded())
    assert round_.members == ("APGD-CE", "APGD-DLR, target 1")
    assert Ball(0.2, "l2").holds(round_.images, images).all()


def test_bad_arguments_are_named(case):
    model, images, goal = case
    with pytest.raises(TypeError, match="generator"):
        apgd(model, images, goal, eps=0.1, generator=None)
    for name, value in (("eps", -1.0), ("steps", 0), ("restarts", 0), ("norm", "l7")):
        with pytest.raises(ValueError, match=name):
            apgd(model, images, goal, **({"eps": 0.1, "generator": seeded()} | {name: value}))
    for name, value in (("targets", -1), ("queries", -2), ("queries", 1.5)):
        with pytest.raises(ValueError, match=name):
            auto_ensemble(model, images, goal, **({"eps": 0.1, "generator": seeded()} | {name: value}))
