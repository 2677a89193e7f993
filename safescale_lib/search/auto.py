"""Attacks without knobs: gradient ascent that sets its own step size, and an ensemble that takes the worst case.

Robustness measured with one badly tuned attack is robustness against that attack. The searches here need a budget and
nothing else, which makes them the usual last word on a defense.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import torch

from safescale_lib.measure.costs import Meter
from safescale_lib.measure.criteria import ClassifiedAs, Criterion, Misclassified
from safescale_lib.search.ball import Ball, Norm, per_item
from safescale_lib.search.models import Model, frozen
from safescale_lib.search.objectives import Objective, cross_entropy, dlr, towards
from safescale_lib.search.pixels import PixelAttack, _best_of, _guard, _stateless
from safescale_lib.search.queries import square


def _checkpoints(steps: int) -> set[int]:
    """The steps at which the step size is reconsidered: p_1 = 0.22, then periods shrinking by 0.03 down to 0.06."""
    marks, before, now = set(), 0.0, 0.22
    while now <= 1:
        marks.add(ceil(now * steps - 1e-9))
        before, now = now, now + max(now - before - 0.03, 0.06)
    return marks


@torch.enable_grad()
def adaptive_ascent(
    model: Model,
    images: torch.Tensor,
    start: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ball: Ball,
    *,
    steps: int,
    stop: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    meter: Meter | None = None,
) -> torch.Tensor:
    """`ascend` with a momentum step and a step size of its own for each item [croce2020autoattack, algorithm 1].

    images, start, loss, stop: as for `ascend`. Returns (B, C, H, W): the point at which an item stopped, else the last
    point; without stop the point of highest loss.
    """
    a, rho, marks = 0.75, 0.75, _checkpoints(steps)
    done, live = start.clone(), torch.arange(len(images), device=images.device)
    x, before, origin, peak, peak_gradient = start, start, images, start, torch.zeros_like(start)
    top = top_then = images.new_full((len(images),), float("-inf"))
    last = -top  # the first point does not count as a rise
    rises, eta, eta_then = torch.zeros_like(last), torch.full_like(last, 2 * ball.eps), torch.full_like(last, 2 * ball.eps)
    since = 0
    for step in range(steps):
        seen = ball.settle(x, origin).detach().requires_grad_(True)
        outputs = model(seen)
        value = loss(outputs, live)
        left = ~stop(outputs.detach(), live) if stop else None
        if meter:
            meter.forwards += len(seen)
        if left is not None and not left.any():
            done[live] = seen.detach()
            return done
        (gradient,) = torch.autograd.grad(value.sum(), seen)
        value = value.detach()
        if meter:
            meter.backwards += len(seen)
        if left is not None and not left.all():
            done[live[~left]] = seen.detach()[~left]
            live, x, before, origin, peak, peak_gradient, gradient, value, last, top, top_then, rises, eta, eta_then = (
                t[left]
                for t in (
                    live,
                    x,
                    before,
                    origin,
                    peak,
                    peak_gradient,
                    gradient,
                    value,
                    last,
                    top,
                    top_then,
                    rises,
                    eta,
                    eta_then,
                )
            )
        better = value > top
        peak, peak_gradient = (torch.where(per_item(better), new, old) for new, old in ((x, peak), (gradient, peak_gradient)))
        top, rises, last = value.maximum(top), rises + (value > last), value
        if step in marks:
            stuck = rises < rho * (step - since)  # condition 1: too few steps went up
            stuck |= (eta == eta_then) & (top == top_then)  # condition 2: nothing gained since the last checkpoint
            eta_then, top_then, since, rises = eta, top, step, torch.zeros_like(rises)
            eta = torch.where(stuck, eta / 2, eta)
            x, gradient = (torch.where(per_item(stuck), best, now) for best, now in ((peak, x), (peak_gradient, gradient)))
            before = torch.where(per_item(stuck), x, before)
        z = ball.project(x + per_item(eta) * ball.steepest(gradient), origin)
        if step:
            z = ball.project(x + a * (z - x) + (1 - a) * (x - before), origin)
        before, x = x, z
    done[live] = ball.settle(x if stop else peak, origin)
    return done


def apgd(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    eps: float,
    steps: int = 50,
    norm: Norm = "linf",
    objective: Objective = cross_entropy,
    restarts: int = 1,
    early_removal: bool = True,
    grid: int | None = 255,
    batch_size: int = 256,
    generator: torch.Generator,
) -> PixelAttack:
    """Auto-PGD: projected gradient descent that halves its step where it stalls [croce2020autoattack].

    Per item, the step starts at 2 eps; at checkpoints an item that made too little progress gets half the step and goes
    back to its best point. objective: `cross_entropy`, `dlr`, or `towards(targets)` for one wrong class per item.
    Other arguments as for `pgd`. It differs from the paper in that the model sees 8-bit images on the way (`grid`)
    and that the random start is uniform in the ball. Raises TypeError or ValueError naming the bad argument.
    """
    ball = Ball(eps, norm, grid)
    _guard(images, criterion, steps=steps, restarts=restarts, batch_size=batch_size)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")

    def search(rows: torch.Tensor, start: torch.Tensor, meter: Meter) -> torch.Tensor:
        return adaptive_ascent(
            model, images[rows], start,
            lambda outputs, live: objective(criterion, outputs, rows[live]),
            ball, steps=steps, meter=meter,
            stop=(lambda outputs, live: criterion.met(outputs, rows[live])) if early_removal else None,
        )  # fmt: skip

    starts = (ball.sample(images, generator) for _ in range(restarts))
    return _best_of(model, images, criterion, ball, starts, search, batch_size, independent=_stateless(model))


@dataclass(frozen=True, eq=False)
class EnsembleAttack(PixelAttack):
    """The worst case over several attacks. members: their names, in the order in which they ran.

    broken_by: (N,) int64 position of the member that broke the item, -1 for none.
    """

    members: tuple[str, ...]
    broken_by: torch.Tensor


def auto_ensemble(
    model: Model,
    images: torch.Tensor,
    criterion: Misclassified | ClassifiedAs,
    *,
    eps: float,
    steps: int = 50,
    targets: int = 3,
    queries: int = 300,
    norm: Norm = "linf",
    grid: int | None = 255,
    batch_size: int = 256,
    generator: torch.Generator,
) -> EnsembleAttack:
    """Worst case per item over different attacks, each run on what the ones before left standing [croce2020autoattack].

    In order: Auto-PGD on the cross-entropy; Auto-PGD on the targeted DLR towards each of the `targets` wrong classes
    with the largest logits; Square, which takes no gradient and so cannot be fooled by a hidden one (linf only). steps: of each
    Auto-PGD run; queries: of Square; 0 targets or queries leave that member out. Other arguments as for `pgd`. It
    differs from the paper's AutoAttack in leaving out FAB and in being much shorter by default; the numbers of the
    paper are 100 steps, 9 targets and 5,000 queries. Raises TypeError or ValueError naming the bad argument.
    """
    ball = Ball(eps, norm, grid)
    _guard(images, criterion, steps=steps, batch_size=batch_size)
    if not isinstance(criterion, (Misclassified, ClassifiedAs)):
        raise TypeError(f"criterion must be Misclassified or ClassifiedAs, got {type(criterion).__name__}")
    for name, count in (("targets", targets), ("queries", queries)):
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"{name} must be a whole number >= 0, got {count!r}")
    meter = Meter()
    with frozen(model), torch.no_grad():
        logits = torch.cat([model(part) for part in torch.split(images, batch_size)])  # (N, classes)
    meter.forwards += len(images)
    shared: dict[str, Any] = {"eps": eps, "grid": grid, "batch_size": batch_size, "generator": generator}

    def climb(rows: torch.Tensor, objective: Objective) -> PixelAttack:
        goal = _only(criterion, rows)
        return apgd(model, images[rows], goal, steps=steps, norm=norm, objective=objective, **shared)

    members: dict[str, Callable[[torch.Tensor], PixelAttack]] = {"APGD-CE": lambda rows: climb(rows, cross_entropy)}
    if isinstance(criterion, ClassifiedAs) and targets:
        members["APGD-DLR"] = lambda rows: climb(rows, dlr)
    elif isinstance(criterion, Misclassified):
        ranked = logits.scatter(1, criterion.labels[:, None], float("-inf")).argsort(dim=1, descending=True)

        def aimed(k: int, rows: torch.Tensor) -> PixelAttack:
            return climb(rows, towards(ranked[rows, k]))

        for k in range(min(targets, logits.shape[1] - 1)):
            members[f"APGD-DLR, target {k + 1}"] = partial(aimed, k)
    if queries and norm == "linf":
        members["Square"] = lambda rows: square(model, images[rows], _only(criterion, rows), queries=queries, **shared)

    skipped = ~criterion.correct(logits, torch.arange(len(images), device=images.device))
    best, success = images.clone(), torch.zeros_like(skipped)
    broken_by = torch.full((len(images),), -1, dtype=torch.int64, device=images.device)
    cost = meter.cost
    for number, run in enumerate(members.values()):
        rows = (~(skipped | success)).nonzero()[:, 0]
        if len(rows) and eps > 0:
            found = run(rows)
            won = rows[found.success]
            best[won], success[won], broken_by[won] = found.images[found.success], True, number
            cost = cost + found.cost
    return EnsembleAttack(best, success, skipped, ball.size(best - images), cost, tuple(members), broken_by)


def _only(criterion: Misclassified | ClassifiedAs, rows: torch.Tensor) -> Misclassified | ClassifiedAs:
    """The criterion for some of its items."""
    labels = criterion.labels[rows]
    return Misclassified(labels) if isinstance(criterion, Misclassified) else ClassifiedAs(criterion.targets[rows], labels)
