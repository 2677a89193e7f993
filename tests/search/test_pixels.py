"""Pixel searches against closed forms, slow references and a model that counts what is asked of it."""

import random
from dataclasses import FrozenInstanceError
from itertools import pairwise
from threading import Lock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safescale_lib import zoo
from safescale_lib.measure.costs import Cost, Meter
from safescale_lib.measure.criteria import ClassifiedAs, Misclassified
from safescale_lib.search import pixels
from safescale_lib.search.ball import Ball
from safescale_lib.search.objectives import cross_entropy, margin
from safescale_lib.search.pixels import ascend, fgsm, joined, pgd, random_noise, replay, worst_case
from safescale_lib.world.scenes import scenes

COUNTING = Lock()  # two batches may be under way at once, and += is two steps

quick = settings(max_examples=80, deadline=None, derandomize=True)
NORMS = ("linf", "l2")
CLASSES, SHAPE = 4, (3, 4, 4)
EPS = {"linf": 4 / 255, "l2": 0.1}  # breaks about two thirds of the items of `case`


class Linear(torch.nn.Module):
    """Two classes: logits (0, w.x + b)."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = torch.nn.Parameter(w), b

    def forward(self, x):
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(score), score], dim=1)


class Wavy(torch.nn.Module):
    """Two layers with a curved decision boundary, in double precision."""

    def __init__(self, seed=0, bend=3.0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.first = torch.nn.Parameter(bend * torch.randn(48, 24, generator=g, dtype=torch.float64) / 48**0.5)
        self.second = torch.nn.Parameter(torch.randn(24, CLASSES, generator=g, dtype=torch.float64))
        self.asked = self.sloped = 0  # items seen, and items whose gradient was taken

    def forward(self, x):
        with COUNTING:
            self.asked += len(x)
        if x.requires_grad:
            x.register_hook(self._count)
        return torch.sin((x.flatten(1) - 0.5) @ self.first * 3) @ self.second

    def _count(self, gradient):
        with COUNTING:
            self.sloped += len(gradient)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n=40, seed=1, dtype=torch.float64):
    levels = torch.randint(256, (n, *SHAPE), generator=generator(seed))
    return levels.to(dtype) / 255


def labelled(model, images, wrong=3):
    """The model's own answers, but for the last `wrong` items, whose label is another class."""
    labels = model(images).argmax(1).detach()
    if wrong:
        labels[-wrong:] = (labels[-wrong:] + 1) % CLASSES
    return Misclassified(labels)


@pytest.fixture
def case():
    model = Wavy()
    images = pictures()
    goal = labelled(model, images)
    model.asked = 0
    return model, images, goal


def flat_length(delta, norm):
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.square().sum(1).sqrt()


def same(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in ("images", "success", "skipped", "distance"))


# --- closed forms: two classes, a plane between them --------------------------------------------------------------


@pytest.fixture
def plane():
    """Images, criterion, model, and for each norm the exact radius at which each item changes sides."""
    w = torch.randn(48, generator=generator(5), dtype=torch.float64)
    images = 0.4 + 0.2 * torch.rand(30, *SHAPE, generator=generator(6), dtype=torch.float64)
    score = (images.flatten(1) - 0.5) @ w
    needed = {"linf": score.abs() / w.abs().sum(), "l2": score.abs() / w.norm()}
    assert max(needed["linf"].max(), needed["l2"].max()) < 0.35  # the range [0, 1] never interferes
    return Linear(w, -0.5 * w.sum()), images, Misclassified((score > 0).long()), needed


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("objective", [cross_entropy, margin])
def test_pgd_and_fgsm_succeed_exactly_above_the_distance_to_the_plane(plane, norm, objective):
    model, images, goal, needed = plane
    for i in range(len(images)):
        one, label = images[i : i + 1], Misclassified(goal.labels[i : i + 1])
        for factor, wanted in ((0.99, False), (1.01, True)):
            budget = {"eps": factor * float(needed[norm][i]), "norm": norm, "grid": None, "objective": objective}
            for found in (pgd(model, one, label, random_start=False, **budget), fgsm(model, one, label, **budget)):
                assert found.success.tolist() == [wanted]
    for eps in (0.5 * needed[norm].median(), needed[norm].median() * 1.001):  # many at once
        found = pgd(model, images, goal, eps=float(eps), norm=norm, grid=None, random_start=False)
        assert torch.equal(found.success, needed[norm] < eps)
        assert 0 < found.success.sum() < len(images)


def test_a_random_start_changes_nothing_on_a_plane(plane):
    model, images, goal, needed = plane
    eps = float(needed["linf"].median()) * 1.001
    found = pgd(model, images, goal, eps=eps, grid=None, generator=generator(), early_removal=False)
    assert torch.equal(found.success, needed["linf"] < eps)


def test_the_other_class_as_target_is_the_same_attack(plane):
    model, images, goal, needed = plane
    eps = float(needed["linf"].median()) * 1.001
    other = ClassifiedAs(1 - goal.labels, goal.labels)
    for objective in (cross_entropy, margin):
        away = pgd(model, images, goal, eps=eps, grid=None, random_start=False, objective=objective)
        towards = pgd(model, images, other, eps=eps, grid=None, random_start=False, objective=objective)
        assert same(away, towards)
        assert away.success.any()


def test_stopping_early_or_not_breaks_the_same_items_of_a_plane(plane):
    model, images, goal, needed = plane
    eps = float(needed["linf"].median()) * 1.001
    early, late = (
        pgd(model, images, goal, eps=eps, grid=None, generator=generator(2), early_removal=early) for early in (True, False)
    )
    assert torch.equal(early.success, late.success)
    assert early.cost.forwards < late.cost.forwards
    assert early.distance[early.success].mean() < late.distance[late.success].mean()


def test_random_noise_needs_a_larger_radius_than_fgsm(plane):
    model, images, goal, needed = plane
    eps = 2 * float(needed["linf"].max())
    assert fgsm(model, images, goal, eps=eps, grid=None).success.all()
    assert random_noise(model, images, goal, eps=eps, grid=None, generator=generator()).success.float().mean() < 0.6


# --- slow references ----------------------------------------------------------------------------------------------


def slow_pgd(model, image, label, start, eps, step_size, steps, norm, grid=None, mu=0.0):
    """One picture at a time, the way the papers write it; momentum divides by the sum, as [dong2018mifgsm] does."""
    x, memory = start, torch.zeros_like(start)
    for _ in range(steps):
        seen = (x if grid is None else (x * grid).round() / grid).requires_grad_()
        loss = -torch.log_softmax(model(seen[None]), dim=1)[0, label]
        (g,) = torch.autograd.grad(loss, seen)
        if mu:
            g = memory = mu * memory + g / g.abs().sum()
        x = x.detach() + step_size * (g.sign() if norm == "linf" else g / g.norm())
        delta = x - image
        delta = delta.clamp(-eps, eps) if norm == "linf" else delta * min(1, eps / float(delta.norm()))
        x = (image + delta).clamp(0, 1)
    return x if grid is None else (x * grid).round() / grid


@pytest.mark.parametrize(
    ("norm", "grid", "mu", "random_start"),
    [
        ("linf", None, 0.0, False),
        ("linf", None, 0.0, True),
        ("linf", 255, 0.0, False),
        ("linf", 255, 0.0, True),
        ("linf", None, 1.0, False),
        ("linf", 255, 0.9, False),
        ("l2", None, 0.0, False),
        ("l2", None, 0.9, False),
    ],
)
def test_pgd_equals_the_slow_reference(case, norm, grid, mu, random_start):
    model, images, goal = case
    eps, steps, step_size = EPS[norm], 7, EPS[norm] / 3
    starts = images
    if random_start:
        noise = eps * (2 * torch.rand(images.shape, generator=generator(3), dtype=images.dtype) - 1)
        starts = (images + noise).clamp(0, 1)
    found = pgd(
        model, images, goal, eps=eps, steps=steps, step_size=step_size, norm=norm, grid=grid, momentum=mu,
        random_start=random_start, generator=generator(3), early_removal=False,
    )  # fmt: skip
    assert 5 < found.success.sum() < 35
    for i, (image, label) in enumerate(zip(images, goal.labels, strict=True)):
        slow = slow_pgd(model, image, label, starts[i], eps, step_size, steps, norm, grid, mu)
        broken = model(images[i : i + 1]).argmax() == label and model(slow[None]).argmax() != label
        assert found.success[i] == broken
        assert torch.allclose(found.images[i], slow if broken else image, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("grid", [None, 255])
def test_one_full_step_from_the_image_is_fgsm(case, norm, grid):
    model, images, goal = case
    budget = {"eps": EPS[norm], "norm": norm, "grid": grid}
    single = fgsm(model, images, goal, **budget)
    assert same(single, pgd(model, images, goal, steps=1, step_size=EPS[norm], random_start=False, **budget))
    if grid is None:
        for i in single.success.nonzero()[:, 0].tolist():
            slow = slow_pgd(model, images[i], goal.labels[i], images[i], EPS[norm], EPS[norm], 1, norm)
            assert torch.allclose(single.images[i], slow, rtol=0, atol=1e-12)
    assert single.success.any()


def test_default_step_size_is_two_and_a_half_radii_over_the_steps(case):
    model, images, goal = case
    runs = [
        pgd(model, images, goal, eps=0.04, steps=5, step_size=size, random_start=False, grid=None)
        for size in (None, 0.02, 0.03)
    ]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


# --- what comes back ----------------------------------------------------------------------------------------------

ATTACKS = {
    "fgsm": lambda model, images, goal, **more: fgsm(model, images, goal, **more),
    "pgd": lambda model, images, goal, **more: pgd(model, images, goal, steps=6, generator=generator(), **more),
    "momentum": lambda model, images, goal, **more: pgd(
        model, images, goal, steps=6, momentum=1.0, random_start=False, objective=margin, **more
    ),
    "restarts": lambda model, images, goal, **more: pgd(
        model, images, goal, steps=4, restarts=3, generator=generator(), early_removal=False, **more
    ),
    "noise": lambda model, images, goal, **more: random_noise(model, images, goal, tries=5, generator=generator(), **more),
}
every_attack = pytest.mark.parametrize("attack", list(ATTACKS.values()), ids=list(ATTACKS))


@every_attack
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("grid", [None, 255])
def test_the_result_is_what_it_says(case, attack, norm, grid):
    model, images, goal = case
    eps = 3 * EPS[norm]
    found = attack(model, images, goal, eps=eps, norm=norm, grid=grid)
    answers, clean = model(found.images).argmax(1), model(images).argmax(1)
    assert torch.equal(found.skipped, clean != goal.labels)  # asked again, outside the library
    assert torch.equal(found.success, (answers != goal.labels) & ~found.skipped)
    assert torch.equal(found.survived, answers == goal.labels)
    assert torch.equal(found.attempted, ~found.skipped)
    assert found.success.any()
    assert found.skipped.sum() == 3
    assert torch.equal(found.images[~found.success], images[~found.success])  # failed and skipped: the original
    assert not torch.equal(found.images[found.success], images[found.success])
    measured = flat_length(found.images - images, norm)
    assert torch.allclose(found.distance, measured, rtol=1e-12, atol=0)
    assert measured.max() <= eps + 1e-6
    assert 0 <= found.images.min() <= found.images.max() <= 1
    if grid:
        assert torch.equal((found.images * grid).round() / grid, found.images)
    assert not found.images.requires_grad
    assert not any(getattr(found, f).is_inference() for f in ("images", "success", "skipped", "distance"))


@every_attack
@pytest.mark.parametrize("norm", NORMS)
def test_zero_budget_returns_the_images_and_breaks_nothing(case, attack, norm):
    model, images, goal = case
    found = attack(model, images, goal, eps=0, norm=norm)
    assert torch.equal(found.images, images)
    assert not found.success.any()
    assert found.skipped.sum() == 3
    assert torch.equal(found.distance, torch.zeros(len(images), dtype=images.dtype))
    assert (found.cost.forwards + found.cost.queries, found.cost.backwards) == (40, 0)  # the clean check alone
    found.images.zero_()  # a copy: what the caller holds stays
    assert images.max() > 0


@every_attack
def test_the_batch_size_does_not_matter(case, attack):
    model, images, goal = case
    whole = attack(model, images, goal, eps=EPS["linf"], batch_size=256)
    assert whole.success.any()
    for batch_size in (1, 7, 40):
        assert same(whole, attack(model, images, goal, eps=EPS["linf"], batch_size=batch_size))


def test_parts_join_to_what_the_whole_would_have_been(case):
    model, images, goal = case
    whole = fgsm(model, images, goal, eps=EPS["linf"])
    parts = [fgsm(model, images[cut], Misclassified(goal.labels[cut]), eps=EPS["linf"]) for cut in (slice(15), slice(15, None))]
    found = joined(*parts)
    assert whole.success.any()
    assert same(whole, found)
    assert (found.cost.forwards, found.cost.backwards) == (whole.cost.forwards, whole.cost.backwards)
    assert same(joined(parts[1]), parts[1])
    with pytest.raises(ValueError, match="parts"):
        joined()


@every_attack
def test_images_are_not_changed_in_place(case, attack):
    model, images, goal = case
    before = images.clone()
    attack(model, images, goal, eps=0.1)
    assert torch.equal(images, before)


@every_attack
def test_single_precision(attack):
    model, images = Wavy().float(), pictures(dtype=torch.float32)
    goal = labelled(model, images)
    found = attack(model, images, goal, eps=2 * EPS["linf"])
    assert found.images.dtype == found.distance.dtype == torch.float32
    assert found.success.any()
    assert torch.equal(found.survived, model(found.images).argmax(1) == goal.labels)
    assert found.distance.max() <= 2 * EPS["linf"] + 1e-6


def test_a_larger_budget_breaks_no_fewer(case):
    model, images, goal = case
    rates = [ATTACKS["pgd"](model, images, goal, eps=eps).success.sum().item() for eps in (0, 4 / 255, 12 / 255, 40 / 255, 1)]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0, 37)


def test_everything_skipped_and_a_single_item(case):
    model, images, goal = case
    lost = Misclassified((goal.labels[:-3] + 1) % CLASSES)
    found = pgd(model, images[:-3], lost, eps=0.1, generator=generator())
    assert found.skipped.all()
    assert not (found.success | found.survived).any()
    assert torch.equal(found.images, images[:-3])
    assert found.cost.forwards == 37
    assert found.cost.backwards == 0
    one = pgd(model, images[:1], Misclassified(goal.labels[:1]), eps=1.0, generator=generator())
    assert one.success.tolist() == [True]


def test_targeted_reaches_the_target_and_nothing_less(case):
    model, images, goal = case
    targets = (goal.labels + torch.randint(1, CLASSES, goal.labels.shape, generator=generator(8))) % CLASSES
    found = pgd(model, images, ClassifiedAs(targets, goal.labels), eps=0.15, steps=30, generator=generator())
    assert 5 < found.success.sum() <= 37
    assert torch.equal(model(found.images).argmax(1)[found.success], targets[found.success])
    assert torch.equal(found.skipped, model(images).argmax(1) != goal.labels)
    assert torch.equal(found.images[~found.success], images[~found.success])


def test_a_model_without_gradient_is_left_unbroken(case):
    model, images, goal = case
    coarse = lambda x: model((x * 2).round() / 2)  # noqa: E731
    goal = labelled(coarse, images, wrong=0)
    found = pgd(coarse, images, goal, eps=0.1, random_start=False)
    assert not found.success.any()
    assert torch.equal(found.images, images)
    assert pgd(model, images, labelled(model, images, 0), eps=0.1, random_start=False).success.any()


def test_a_ball_without_a_single_file_in_it_is_refused():
    """Half a level off the grid any file lies too far away: every attack would fail in silence."""
    images = torch.full((2, *SHAPE), 100.5 / 255, dtype=torch.float64)
    images[1] = 100 / 255
    model = Linear(torch.ones(48, dtype=torch.float64), -48 * 100.9 / 255)  # errs once all pixels stand at 101
    goal = Misclassified(torch.tensor([0, 0]))
    with pytest.raises(ValueError, match=r"multiples of 1/255.*grid=None"):
        pgd(model, images, goal, eps=0.45 / 255, random_start=False)
    found = pgd(model, images, goal, eps=0.45 / 255, random_start=False, grid=None)
    assert found.success.tolist() == [True, False]
    assert torch.equal(found.images[1], images[1])
    assert found.distance.max() <= 0.45 / 255 + 1e-6
    assert pgd(model, images, goal, eps=1 / 255, random_start=False).success.all()


def test_a_result_is_frozen(case):
    model, images, goal = case
    found = fgsm(model, images, goal, eps=0.1)
    with pytest.raises(FrozenInstanceError):
        found.success = ~found.success


# --- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
def test_stopping_early_loses_nothing(case, norm):
    """On a curved boundary a point may be broken on the way and whole again at the end: early stopping keeps it."""
    model, images, goal = case
    early, late = (
        pgd(model, images, goal, eps=EPS[norm], norm=norm, generator=generator(2), early_removal=stop) for stop in (True, False)
    )
    assert (early.success | ~late.success).all()
    assert late.success.any()
    assert early.cost.backwards < late.cost.backwards


def test_the_generator_decides_and_nothing_else(case):
    model, images, goal = case
    first, again, other = (pgd(model, images, goal, eps=0.1, steps=3, generator=generator(seed)) for seed in (0, 0, 1))
    assert same(first, again)
    assert not torch.equal(first.images, other.images)


def test_restarts_only_add(case):
    """Half a step from a random point: where it starts matters."""
    model, images, goal = case
    eps = EPS["linf"]
    runs = [
        pgd(model, images, goal, eps=eps, steps=1, step_size=eps / 2, restarts=restarts, generator=generator(4))
        for restarts in (1, 2, 8)
    ]
    for fewer, more in pairwise(runs):
        assert (more.success | ~fewer.success).all()
        assert torch.equal(more.images[fewer.success], fewer.images[fewer.success])
    assert runs[2].success.sum() > runs[0].success.sum() > 0


def test_noise_takes_the_first_try_that_works(case):
    model, images, goal = case
    runs = [random_noise(model, images, goal, eps=0.1, tries=tries, generator=generator(4)) for tries in (1, 2, 20)]
    for fewer, more in pairwise(runs):
        assert (more.success | ~fewer.success).all()
        assert torch.equal(more.images[fewer.success], fewer.images[fewer.success])
    assert runs[2].success.sum() > runs[0].success.sum() > 0


@pytest.mark.parametrize("norm", NORMS)
def test_noise_lies_on_the_surface(norm):
    model, images = Wavy(), torch.full((40, *SHAPE), 0.5, dtype=torch.float64)
    images += 0.01 * torch.rand(images.shape, generator=generator(), dtype=images.dtype)
    found = random_noise(model, images, labelled(model, images), eps=0.3, tries=20, norm=norm, grid=None, generator=generator())
    assert found.success.any()
    assert torch.allclose(found.distance[found.success], torch.tensor(0.3, dtype=torch.float64))


# --- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early_removal", [True, False])
@pytest.mark.parametrize(("restarts", "batch_size", "norm"), [(1, 256, "linf"), (3, 7, "linf"), (2, 16, "l2")])
def test_cost_is_what_the_model_saw(case, early_removal, restarts, batch_size, norm):
    model, images, goal = case
    found = pgd(
        model, images, goal, eps=EPS[norm], steps=5, norm=norm, restarts=restarts, batch_size=batch_size,
        early_removal=early_removal, generator=generator(),
    )  # fmt: skip
    assert (found.cost.forwards, found.cost.backwards, found.cost.queries) == (model.asked, model.sloped, 0)
    assert found.cost.seconds > 0
    if restarts == 1 and not early_removal:  # once clean, five steps, once to judge
        assert (found.cost.forwards, found.cost.backwards) == (40 + 37 * 6, 37 * 5)


def test_cost_of_the_cheap_ones(case):
    model, images, goal = case
    single = fgsm(model, images, goal, eps=0.05)
    assert (single.cost.forwards, single.cost.backwards) == (model.asked, model.sloped) == (40 + 2 * 37, 37)
    model.asked = model.sloped = 0
    noise = random_noise(model, images, goal, eps=0.1, tries=4, generator=generator())
    assert (noise.cost.forwards, noise.cost.backwards, noise.cost.queries) == (0, 0, model.asked)
    assert 40 + 37 < model.asked < 40 + 4 * 37  # broken items are not tried again
    assert model.sloped == 0


# --- the model stays as it was ------------------------------------------------------------------------------------


class Fussy(torch.nn.Module):
    """Batch statistics, dropout, mixed modes, a weight without gradient and one that has some; may fail at a call."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.BatchNorm1d(48), torch.nn.Linear(48, 8), torch.nn.Dropout(0.5))
        self.head = torch.nn.Linear(8, CLASSES)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=g))
        self.train()
        self.head.eval()
        self.body[1].bias.requires_grad_(False)
        self.head.weight.grad = torch.ones_like(self.head.weight)
        self.calls_left = 10**9

    def forward(self, x):
        self.calls_left -= 1
        if self.calls_left < 0:
            raise RuntimeError("out of memory, say")
        return self.head(self.body(x.flatten(1)))


def snapshot(model):
    return {
        "modes": [m.training for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "weights": {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "streams": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()),  # noqa: NPY002
        "autograd": torch.is_grad_enabled(),
    }


def run_replay(model, images, goal, batch_size=256, **_):
    surrogate = Wavy().float()
    made = fgsm(surrogate, images, Misclassified(surrogate(images).argmax(1)), eps=0.1)
    return replay(model, made, images, goal, batch_size=batch_size)


def run_worst_case(model, images, goal, **_):
    return worst_case(model, images, goal.labels, eps=0.1, steps=3, generator=generator())


@pytest.mark.parametrize("attack", [*ATTACKS.values(), run_replay, run_worst_case], ids=[*ATTACKS, "replay", "worst_case"])
@pytest.mark.parametrize("calls", [10**9, 0, 1, 2])
def test_the_model_is_left_as_found(attack, calls):
    model, images = Fussy(), pictures(12, dtype=torch.float32)
    goal = Misclassified(torch.arange(12) % CLASSES)
    model.calls_left = calls
    before = snapshot(model)
    if calls > 100:
        attack(model, images, goal, eps=0.1)
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            attack(model, images, goal, eps=0.1, batch_size=5)
    assert snapshot(model) == before


def test_a_model_may_keep_tensors_between_calls(case):
    """Many models cache a table at their first call; it must be fit for gradients later, the caller's own included."""
    model, images, goal = case

    class Caching(torch.nn.Module):
        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.ones(SHAPE, dtype=x.dtype) * 1.0
            return model(x * self.table)

    caching = Caching()
    assert fgsm(caching, images, goal, eps=0.1).success.any()
    x = images.clone().requires_grad_()
    caching(x).sum().backward()
    assert x.grad.abs().sum() > 0


# --- replay -------------------------------------------------------------------------------------------------------


def test_replay_judges_the_victim_on_the_very_same_images(case):
    surrogate, images, goal = case
    victim = Wavy(seed=0, bend=2.9)
    made = pgd(surrogate, images, goal, eps=0.1, generator=generator())
    victim.asked = 0
    found = replay(victim, made, images, goal)
    assert found.cost.queries == 40
    assert found.cost.forwards == made.cost.forwards
    assert victim.asked == 80  # the clean check is the judge's, not the attacker's
    clean, shown = victim(images).argmax(1), victim(made.images).argmax(1)
    assert torch.equal(found.skipped, clean != goal.labels)
    assert torch.equal(found.success, (shown != goal.labels) & ~found.skipped)
    assert 0 < found.success.sum() < made.success.sum()
    assert torch.equal(found.images[found.success], made.images[found.success])
    assert torch.equal(found.images[~found.success], images[~found.success])
    assert torch.equal(found.distance, flat_length(found.images - images, "linf"))
    assert same(found, replay(victim, made, images, goal, batch_size=3))
    itself = replay(surrogate, made, images, goal)
    assert torch.equal(itself.success, made.success)
    l2 = replay(victim, made, images, goal, norm="l2")
    assert torch.allclose(l2.distance, flat_length(found.images - images, "l2"))


# --- the bare ascent ----------------------------------------------------------------------------------------------


def test_ascend_climbs_to_the_corner_of_a_linear_loss():
    slope = torch.randn(2, *SHAPE, generator=generator(), dtype=torch.float64)
    images = torch.full_like(slope, 0.5)
    top = ascend(
        lambda x: x,
        images,
        images,
        lambda out, live: (out * slope[live]).sum((1, 2, 3)),
        Ball(0.1, grid=None),
        steps=3,
        step_size=0.04,
    )
    assert torch.allclose(top, images + 0.1 * slope.sign())
    short = ascend(
        lambda x: x,
        images,
        images,
        lambda out, live: (out * slope[live]).sum((1, 2, 3)),
        Ball(0.1, grid=None),
        steps=2,
        step_size=0.04,
    )
    assert torch.allclose(short, images + 0.08 * slope.sign())


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_ascend_stops_each_item_where_it_was(momentum):
    """Item i climbs a grey level a step and is stopped at level i; the others must not notice."""
    images = torch.zeros(5, 1, 2, 2, dtype=torch.float64)
    wanted, seen, meter = torch.tensor([3, 0, 9, 1, 3]), [], Meter()

    def stop(outputs, live):
        seen.append(live.tolist())
        return (outputs.flatten(1)[:, 0] * 255).round() >= wanted[live]

    top = ascend(
        lambda x: x, images, images, lambda out, live: out.sum((1, 2, 3)), Ball(1.0), steps=5, step_size=1 / 255,
        momentum=momentum, stop=stop, meter=meter,
    )  # fmt: skip
    assert (top[:, 0, 0, 0] * 255).round().tolist() == [3, 0, 5, 1, 3]  # the third ran out of steps
    assert seen == [[0, 1, 2, 3, 4], [0, 2, 3, 4], [0, 2, 4], [0, 2, 4], [2]]
    assert meter.forwards == sum(map(len, seen))


def test_ascend_shows_the_model_only_what_a_file_can_hold():
    images, shown = pictures(4), []

    def model(x):
        shown.append(x.detach().clone())
        return x

    start = Ball(0.1).sample(images, generator())
    top = ascend(model, images, start, lambda out, live: out.square().sum((1, 2, 3)), Ball(0.1), steps=4, step_size=0.013)
    for x in (*shown, top):
        assert torch.equal((x * 255).round() / 255, x)
        assert Ball(0.1).holds(x, images).all()
    assert len(shown) == 4
    assert not torch.equal(shown[0], shown[1])


def test_worst_case_raises_the_loss_inside_the_ball(case):
    model, images, goal = case
    found = worst_case(model, images, goal.labels, eps=0.02, steps=5, generator=generator())

    def loss(x):
        return torch.nn.functional.cross_entropy(model(x), goal.labels, reduction="none")

    assert (loss(found) > loss(images)).float().mean() > 0.9
    assert loss(found).mean() > loss(Ball(0.02, grid=None).sample(images, generator())).mean() + 0.1
    assert (found - images).abs().max() <= 0.02 + 1e-12
    assert 0 <= found.min() <= found.max() <= 1
    assert not found.requires_grad
    assert torch.equal(found, worst_case(model, images, goal.labels, eps=0.02, steps=5, generator=generator()))


# --- guards -------------------------------------------------------------------------------------------------------


def untouchable(_):
    raise AssertionError("the model was asked before the arguments were checked")


GOOD = {"images": torch.full((2, 3, 4, 4), 0.5), "criterion": Misclassified(torch.tensor([0, 1])), "eps": 0.1}
not_counts = st.integers(max_value=0) | st.floats() | st.none() | st.text(max_size=2)
not_sizes = st.floats().filter(lambda x: not 0 <= x < float("inf"))
not_images = st.one_of(
    st.sampled_from([(3, 4, 4), (0, 3, 4, 4), (), (2, 3, 4)]).map(lambda shape: torch.full(shape, 0.5)),
    st.floats(width=32).filter(lambda x: not 0 <= x <= 1).map(lambda x: torch.tensor([0.5, x]).view(2, 1, 1, 1)),
)
bad_values = {
    "eps": not_sizes,
    "steps": not_counts,
    "restarts": not_counts,
    "batch_size": not_counts,
    "step_size": not_sizes,
    "momentum": not_sizes,
    "norm": st.text(max_size=5).filter(lambda norm: norm not in NORMS),
    "grid": st.integers(max_value=0) | st.floats(),
    "images": not_images,
    "criterion": st.integers(1, 9).filter(lambda n: n != 2).map(lambda n: Misclassified(torch.zeros(n, dtype=torch.int64))),
}


@quick
@given(st.sampled_from(sorted(bad_values)).flatmap(lambda name: st.tuples(st.just(name), bad_values[name])))
def test_a_bad_argument_is_named(bad):
    name, value = bad
    with pytest.raises(ValueError, match=rf"^{name} must"):
        pgd(untouchable, **{**GOOD, "generator": generator(), name: value})
    if name in ("eps", "images", "criterion", "norm", "grid", "batch_size"):
        with pytest.raises(ValueError, match=rf"^{name} must"):
            fgsm(untouchable, **{**GOOD, name: value})
        with pytest.raises(ValueError, match=rf"^{name} must"):
            random_noise(untouchable, **{**GOOD, "generator": generator(), name: value})
    if name == "steps":
        with pytest.raises(ValueError, match=r"^tries must"):
            random_noise(untouchable, **GOOD, tries=value, generator=generator())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_types_that_cannot_hold_eps_are_refused(dtype):
    images = torch.ones(2, 3, 4, 4).to(dtype)
    for attack in ATTACKS.values():
        with pytest.raises(TypeError, match=r"^images must be a float32 or float64 tensor, got torch\."):
            attack(untouchable, images, GOOD["criterion"], eps=0.1)
    with pytest.raises(TypeError, match=r"^images must be a float32 or float64 tensor, got list"):
        fgsm(untouchable, [[0.5]], GOOD["criterion"], eps=0.1)


def test_randomness_must_be_given():
    with pytest.raises(ValueError, match=r"^generator must be given when random_start is true"):
        pgd(untouchable, **GOOD)
    with pytest.raises(TypeError, match=r"^generator must be a torch\.Generator, got None"):
        random_noise(untouchable, **GOOD, generator=None)
    with pytest.raises(ValueError, match=r"^restarts above 1 need random_start"):
        pgd(untouchable, **GOOD, restarts=2, random_start=False)


def test_guards_of_replay(case):
    model, images, goal = case
    made = fgsm(model, images, goal, eps=0.1)
    with pytest.raises(ValueError, match=r"^attack and images must match, got \(40, 3, 4, 4\) and \(39, 3, 4, 4\)"):
        replay(untouchable, made, images[1:], Misclassified(goal.labels[1:]))
    with pytest.raises(ValueError, match=r"^criterion must have one entry per image: 39 entries for 40 images"):
        replay(untouchable, made, images, Misclassified(goal.labels[1:]))
    with pytest.raises(ValueError, match=r"^norm must"):
        replay(untouchable, made, images, goal, norm="l1")
    with pytest.raises(ValueError, match=r"^batch_size must"):
        replay(untouchable, made, images, goal, batch_size=0)


def test_whole_numbers_of_numpy_count(case):
    model, images, goal = case
    found = pgd(model, images, goal, eps=0.1, steps=np.int64(3), batch_size=np.int32(8), generator=generator())
    assert same(found, pgd(model, images, goal, eps=0.1, steps=3, batch_size=8, generator=generator()))
    assert found.cost != Cost()


def test_it_runs_where_gradients_are_off(case):
    model, images, goal = case
    with torch.no_grad():
        inside = fgsm(model, images, goal, eps=EPS["linf"])
    assert same(inside, fgsm(model, images, goal, eps=EPS["linf"]))


# --- two batches at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("count", "batch_size"), [(0, 7), (1, 7), (40, 7), (40, 100)])
def test_batches_come_back_whole_and_in_order(threads: int, alone: bool, count: int, batch_size: int) -> None:
    wanted = torch.zeros(50, dtype=torch.bool)
    wanted[torch.randperm(50, generator=torch.Generator().manual_seed(0))[:count]] = True
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        parts = pixels._by_batches(lambda rows: rows, wanted, batch_size, alone=alone)
    finally:
        torch.set_num_threads(before)
    assert all(0 < len(part) <= batch_size for part in parts)
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *parts]), wanted.nonzero()[:, 0])


def test_two_batches_at_once_find_and_spend_what_one_after_the_other_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = zoo.load("vit"), scenes(64, split="validation", seed=3)
    whole = pixels._by_batches
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = []
        for alone in (False, True):
            monkeypatch.setattr(pixels, "_by_batches", lambda *a, alone, _fixed=alone: whole(*a, alone=_fixed))
            generator = torch.Generator().manual_seed(0)
            goal = Misclassified(batch.labels)
            found.append(
                pixels.pgd(
                    model, batch.images, goal, eps=8 / 255, steps=5, early_removal=False, batch_size=32, generator=generator
                )
            )
    finally:
        torch.set_num_threads(before)
    first, second = found
    assert torch.equal(first.images, second.images)
    assert (first.cost.forwards, first.cost.backwards) == (second.cost.forwards, second.cost.backwards)
