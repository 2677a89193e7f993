"""One change for many images: an optimised patch that works wherever it lands, and a universal perturbation.

Both are computed once, on images of the attacker's own, and then cost nothing a victim: no gradient, no query. Judge
them on images they were not computed on: `stick` and `add_universal` do that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch

from safescale_lib.measure.costs import Cost, Meter
from safescale_lib.measure.criteria import Criterion
from safescale_lib.search.ball import Ball
from safescale_lib.search.models import Model, frozen
from safescale_lib.search.objectives import Objective, margin
from safescale_lib.search.pixels import PixelAttack, _ask, _guard


@dataclass(frozen=True, eq=False)
class PlacedPatch(PixelAttack):
    """What a patch did to N images.

    patch: (C, s, s), or (N, C, s, s) with a patch for each image. corners: (N, 2) int64, row and column of the upper
    left pixel. `distance` is linf, which says little here: the budget of a patch is its area.
    """

    patch: torch.Tensor
    corners: torch.Tensor


@dataclass(frozen=True, eq=False)
class UniversalAttack(PixelAttack):
    """What one perturbation did to N images. delta: (C, H, W), the change before clipping to [0, 1]."""

    delta: torch.Tensor


def paste(images: torch.Tensor, patch: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """Images (N, C, H, W) with the patch (C, s, s) or (N, C, s, s) at their corners (N, 2); differentiable in the patch."""
    many = patch if patch.ndim == 4 else patch.expand(len(images), *patch.shape)
    offsets = torch.arange(patch.shape[-1], device=images.device)
    rows, columns = (corners[:, k, None] + offsets for k in (0, 1))  # (N, s) each
    item = torch.arange(len(images), device=images.device)[:, None, None]
    pasted = images.permute(0, 2, 3, 1).clone()  # (N, H, W, C)
    pasted[item, rows[:, :, None], columns[:, None, :]] = many.permute(0, 2, 3, 1)
    return pasted.permute(0, 3, 1, 2)


def _corners(images: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """(N, 2) uniformly random places for a patch of this size."""
    room = [images.shape[2] - size + 1, images.shape[3] - size + 1]
    return torch.stack([torch.randint(r, (len(images),), generator=generator) for r in room], dim=1).to(images.device)


def _some(images: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """(count,) different items, drawn at random; all of them if there are no more."""
    return torch.randperm(len(images), generator=generator)[:count].to(images.device)


def _guard_patch(images: torch.Tensor, size: int, generator: torch.Generator) -> None:
    if not isinstance(size, Integral) or not 0 <= size <= min(images.shape[2:]):
        raise ValueError(f"size must be a whole number of pixels from 0 to {min(images.shape[2:])}, got {size!r}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")


def adversarial_patch(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    size: int,
    steps: int = 100,
    step_size: float = 0.05,
    universal: bool = True,
    objective: Objective = margin,
    per_step: int = 64,
    grid: int | None = 255,
    batch_size: int = 256,
    generator: torch.Generator,
) -> PlacedPatch:
    """A square patch that fools the model wherever it is stuck: raise E over places of the objective [brown2017patch, eq. 1].

    size: side in pixels; 0 returns the images. steps: signed gradient steps of step_size on the patch, each over per_step
    images with a fresh random place apiece. universal: one patch for all images; false optimises one for each. The
    result is judged on `images` themselves at fresh places; see `stick` for images the patch has not seen. Of the
    paper's transformations only the place is drawn, no rotation or scale. Other arguments as for `pgd`; a targeted patch is a
    criterion `ClassifiedAs`. Raises TypeError or ValueError naming the bad argument.
    """
    _guard(images, criterion, steps=steps, per_step=per_step, batch_size=batch_size)
    _guard_patch(images, size, generator)
    if not 0 < step_size <= 1:
        raise ValueError(f"step_size must lie in (0, 1], got {step_size}")
    meter, everyone = Meter(), torch.arange(len(images), device=images.device)
    shape = (1 if universal else len(images), images.shape[1], size, size)
    patch = torch.rand(shape, generator=generator, dtype=images.dtype).to(images.device)
    with frozen(model), torch.enable_grad():
        for step in range(steps if size else 0):
            places = _corners(images, size, generator)  # for all items: none depends on the batch
            chosen = _some(images, per_step, generator) if universal else everyone
            gradient = torch.zeros_like(patch)
            for rows in torch.split(chosen, batch_size):
                own = (patch if universal else patch[rows]).clone().requires_grad_(True)
                logits = model(paste(images[rows], own[0] if universal else own, places[rows]))
                (slope,) = torch.autograd.grad(objective(criterion, logits, rows).sum(), own)
                meter.forwards, meter.backwards = meter.forwards + len(rows), meter.backwards + len(rows)
                gradient.index_add_(0, torch.zeros_like(rows[:1]) if universal else rows, slope)
            patch = (patch + step_size * (1 - step / steps) * gradient.sign()).clamp(0, 1)
    patch = patch if grid is None else (patch * grid).round() / grid
    return _stuck(model, patch[0] if universal else patch, images, criterion, batch_size, generator, meter.cost)


def stick(
    model: Model,
    patch: torch.Tensor,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    batch_size: int = 256,
    generator: torch.Generator,
) -> PlacedPatch:
    """Stick a finished patch (C, s, s) at a random place on each image and judge: the attack on a victim not seen before.

    A random patch, `torch.rand(C, s, s)`, stuck the same way is the control. One query an item.
    """
    _guard(images, criterion, batch_size=batch_size)
    if patch.ndim not in (3, 4) or patch.shape[-3] != images.shape[1] or patch.shape[-1] != patch.shape[-2]:
        raise ValueError(f"patch must have shape (C, s, s) or (N, C, s, s), got {tuple(patch.shape)}")
    _guard_patch(images, patch.shape[-1], generator)
    return _stuck(model, patch, images, criterion, batch_size, generator, Cost(queries=len(images)))


def _stuck(
    model: Model, patch: torch.Tensor, images: torch.Tensor, criterion: Criterion, batch_size: int,
    generator: torch.Generator, spent: Cost,
) -> PlacedPatch:  # fmt: skip
    corners = _corners(images, patch.shape[-1], generator)
    best, success, skipped, distance, cost = _judged(
        model, lambda rows: paste(images[rows], patch if patch.ndim == 3 else patch[rows], corners[rows]),
        images, criterion, Ball(1.0), batch_size, spent,
    )  # fmt: skip
    return PlacedPatch(best, success, skipped, distance, cost, patch, corners)


def _judged(
    model: Model, change: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor, criterion: Criterion,
    ball: Ball, batch_size: int, spent: Cost,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Cost]:  # fmt: skip
    """Ask about change(all rows) once, keep what works: images, success, skipped, distance and cost of a result."""
    meter = Meter()
    changed = change(torch.arange(len(images), device=images.device))
    with frozen(model):
        skipped = ~_ask(model, images, criterion.correct, batch_size, meter)
        success = _ask(model, changed, criterion.met, batch_size, meter) & ~skipped & ball.holds(changed, images)
    best = torch.where(success[:, None, None, None], changed, images)
    if spent.queries:  # a finished change, seen through one answer an item
        return best, success, skipped, ball.size(best - images), spent + Cost(seconds=meter.cost.seconds)
    return best, success, skipped, ball.size(best - images), spent + meter.cost


def universal_perturbation(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    eps: float,
    steps: int = 100,
    step_size: float | None = None,
    objective: Objective = margin,
    per_step: int = 64,
    grid: int | None = 255,
    batch_size: int = 256,
    generator: torch.Generator,
) -> UniversalAttack:
    """One perturbation, at most eps in linf, that fools the model on most images [moosavi2017universal].

    Signed gradient steps on the mean objective over random batches; an item that is broken by a margin of 1 already
    has no say, so that the others decide. The paper instead adds up minimal single-image perturbations; the problem
    (its eq. 1) is the same. per_step: images a step. step_size: default 8 * eps / steps,
    falling to zero.
    Judged on `images`; see `add_universal` for images it has not seen. Other arguments as for `pgd`.
    Raises TypeError or ValueError naming the bad argument.
    """
    ball = Ball(eps, "linf", grid)
    _guard(images, criterion, steps=steps, per_step=per_step, batch_size=batch_size)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    step_size = 8 * eps / steps if step_size is None else step_size
    if not 0 <= step_size < float("inf"):
        raise ValueError(f"step_size must be finite and >= 0, got {step_size}")
    meter = Meter()
    delta = torch.zeros_like(images[0])  # (C, H, W)
    with frozen(model), torch.enable_grad():
        for step in range(steps):
            gradient = torch.zeros_like(delta)
            for rows in torch.split(_some(images, per_step, generator), batch_size):
                seen = delta.clone().requires_grad_(True)
                logits = model((images[rows] + seen).clamp(0, 1))
                gain = objective(criterion, logits, rows)
                gain = torch.where(criterion.met(logits.detach(), rows), gain.clamp(max=1.0), gain)
                gradient += torch.autograd.grad(gain.sum(), seen)[0]
                meter.forwards, meter.backwards = meter.forwards + len(rows), meter.backwards + len(rows)
            delta = (delta + step_size * (1 - step / steps) * gradient.sign()).clamp(-eps, eps)
    if grid is not None:
        delta = (delta * grid).trunc() / grid
    return _added(model, delta, images, criterion, ball, batch_size, meter.cost)


def add_universal(
    model: Model, delta: torch.Tensor, images: torch.Tensor, criterion: Criterion, *, eps: float, batch_size: int = 256
) -> UniversalAttack:
    """Add a finished perturbation (C, H, W) to images it was not computed on and judge. One query an item.

    A random corner of the ball, added the same way, is the control. eps: the budget in linf, measured again.
    """
    _guard(images, criterion, batch_size=batch_size)
    if delta.shape != images.shape[1:]:
        raise ValueError(f"delta must have shape {tuple(images.shape[1:])}, got {tuple(delta.shape)}")
    return _added(model, delta, images, criterion, Ball(eps), batch_size, Cost(queries=len(images)))


def _added(
    model: Model, delta: torch.Tensor, images: torch.Tensor, criterion: Criterion, ball: Ball, batch_size: int, spent: Cost
) -> UniversalAttack:
    def change(rows: torch.Tensor) -> torch.Tensor:
        return ball.settle((images[rows] + delta).clamp(0, 1), images[rows])

    return UniversalAttack(*_judged(model, change, images, criterion, ball, batch_size, spent), delta)
