"""Searches over pixels: the fast gradient sign method and projected gradient descent.

One search serves every chapter. It takes any callable from pixels in [0, 1] to outputs, a criterion that says what
counts as success, and an objective to climb. What it returns has been checked once more: the budget by
measuring the distance, the success by asking the model about the very images returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from typing import TypeVar

import torch
import torch.nn.functional as F

from safescale_lib.measure.costs import Cost, Meter
from safescale_lib.measure.criteria import Criterion, Verdicts
from safescale_lib.search.ball import Ball, Norm
from safescale_lib.search.models import Model, frozen
from safescale_lib.search.objectives import Objective, cross_entropy

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PixelAttack(Verdicts):
    """What a pixel search returns for N images.

    images: (N, C, H, W) in [0, 1]; a failed or skipped item is its original, unchanged.
    success: (N,) bool, the criterion's verdict on `images`. skipped: (N,) bool, items wrong without an attack.
    distance: (N,) measured size of the change in the attack's norm. cost: what was spent.
    """

    images: torch.Tensor
    success: torch.Tensor
    skipped: torch.Tensor
    distance: torch.Tensor
    cost: Cost


def joined(*parts: PixelAttack) -> PixelAttack:
    """One result for items that were attacked in parts, such as halves side by side: in the order given, the costs added.

    parts: one or more, with images of one size. Raises ValueError for none.
    """
    if not parts:
        raise ValueError("parts must hold at least one attack")
    images, success, skipped, distance = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("images", "success", "skipped", "distance")
    )
    return PixelAttack(images, success, skipped, distance, sum((part.cost for part in parts), Cost()))


@torch.enable_grad()
def ascend(
    model: Model,
    images: torch.Tensor,
    start: torch.Tensor,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ball: Ball,
    *,
    steps: int,
    step_size: float,
    momentum: float = 0.0,
    stop: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    meter: Meter | None = None,
) -> torch.Tensor:
    """The bare ascent inside attacks and adversarial training: no verdict, no restarts, no guards.

    images, start: (B, C, H, W). loss(outputs, live) -> one number per live item, to raise; `live` (b,) holds the
    positions 0..B-1 still worked on. stop(outputs, live) -> (b,) bool: these are finished, keep them as they are.
    Returns (B, C, H, W): for each item the point at which it stopped, or the last one.
    """
    x, origin, velocity = start, images, torch.zeros_like(start)
    done, live = start.clone(), torch.arange(len(images), device=images.device)
    for _ in range(steps):
        seen = ball.settle(x, origin).detach().requires_grad_(True)  # the model sees what a file can hold
        outputs = model(seen)
        if meter:
            meter.forwards += len(seen)
        left = ~stop(outputs.detach(), live) if stop else None
        if left is not None and not left.any():
            done[live] = seen.detach()
            return done
        (gradient,) = torch.autograd.grad(loss(outputs, live).sum(), seen)
        if meter:
            meter.backwards += len(seen)
        if left is not None and not left.all():
            done[live[~left]] = seen.detach()[~left]
            live, x, origin, velocity, gradient = (t[left] for t in (live, x, origin, velocity, gradient))
        if momentum:
            mean = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
            gradient = velocity = momentum * velocity + gradient / mean.clamp(min=torch.finfo(mean.dtype).tiny)
        x = ball.project(x + step_size * ball.steepest(gradient), origin)  # x <- P(x + a * direction)
    done[live] = ball.settle(x, origin)
    return done


def worst_case(
    model: Model, images: torch.Tensor, labels: torch.Tensor, *, eps: float, steps: int, generator: torch.Generator
) -> torch.Tensor:
    """The inner maximisation of adversarial training: raise the cross-entropy from a random start [madry2018pgd].

    images (B, C, H, W) in [0, 1], labels (B,) int64. Returns for every item the last point reached, as raw floats,
    whether the model errs there or not: training wants the loss high, not a verdict.
    """
    ball = Ball(eps, "linf", grid=None)
    start = ball.sample(images, generator)

    def loss(logits: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels[live], reduction="none")

    with frozen(model):
        return ascend(model, images, start, loss, ball, steps=steps, step_size=1.5 * eps / steps)


def pgd(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    eps: float,
    steps: int = 20,
    step_size: float | None = None,
    norm: Norm = "linf",
    objective: Objective = cross_entropy,
    random_start: bool = True,
    restarts: int = 1,
    momentum: float = 0.0,
    early_removal: bool = True,
    grid: int | None = 255,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
) -> PixelAttack:
    """Projected gradient descent inside a ball of radius eps around each image [madry2018pgd].

    model: callable from (B, C, H, W) to outputs. images: (N, C, H, W) float32 or float64 in [0, 1].
    criterion: what counts as success, one entry per image. eps: radius in units of the pixel range (8/255
    is eight grey levels); 0 returns the images. step_size: default 2.5 * eps / steps. norm: "linf" or "l2".
    random_start: begin at a random point of the ball instead of at the image. restarts: independent runs,
    later ones only on items not yet broken. momentum: decay of the accumulated gradient [dong2018mifgsm],
    0 for none. early_removal: stop working on an item as soon as the criterion is met.
    grid: show the model, and return, only images whose values are multiples of 1/grid, as a file would hold
    them; None for raw floats. generator: source of the random starts, required when random_start is true.
    Raises TypeError or ValueError naming the bad argument.
    """
    ball = Ball(eps, norm, grid)
    _guard(images, criterion, steps=steps, restarts=restarts, batch_size=batch_size)
    step_size = 2.5 * eps / steps if step_size is None else step_size
    if not 0 <= step_size < float("inf"):
        raise ValueError(f"step_size must be finite and >= 0, got {step_size}")
    if not 0 <= momentum < float("inf"):
        raise ValueError(f"momentum must be finite and >= 0, got {momentum}")
    if random_start and generator is None:
        raise ValueError("generator must be given when random_start is true: torch.Generator().manual_seed(0)")
    if restarts > 1 and not random_start:
        raise ValueError("restarts above 1 need random_start: every run from a fixed start would be the same")

    def search(rows: torch.Tensor, start: torch.Tensor, meter: Meter) -> torch.Tensor:
        return ascend(
            model, images[rows], start,
            lambda outputs, live: objective(criterion, outputs, rows[live]),
            ball, steps=steps, step_size=step_size, momentum=momentum, meter=meter,
            stop=(lambda outputs, live: criterion.met(outputs, rows[live])) if early_removal else None,
        )  # fmt: skip

    def starts() -> Iterator[torch.Tensor]:
        for _ in range(restarts):  # drawn for all items at once: none depends on the fate of the others
            yield ball.sample(images, generator) if random_start and generator else images

    return _best_of(model, images, criterion, ball, starts(), search, batch_size, independent=_stateless(model))


def fgsm(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    eps: float,
    norm: Norm = "linf",
    objective: Objective = cross_entropy,
    grid: int | None = 255,
    batch_size: int = 256,
) -> PixelAttack:
    """Fast gradient sign method: one step of length eps from the image itself [goodfellow2015fgsm].

    It is projected gradient descent with a single full step; arguments and errors as for `pgd`.
    """
    return pgd(
        model, images, criterion, eps=eps, steps=1, step_size=eps, norm=norm, objective=objective,
        random_start=False, grid=grid, batch_size=batch_size,
    )  # fmt: skip


def random_noise(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    eps: float,
    tries: int = 1,
    norm: Norm = "linf",
    grid: int | None = 255,
    batch_size: int = 256,
    generator: torch.Generator,
) -> PixelAttack:
    """The control of every attack: the best of `tries` random points on the ball's surface, no gradients.

    For linf a random corner of the ball, for l2 a random direction at full length. With `tries` equal to an
    attack's steps the two compare at an equal number of model answers. Other arguments as for `pgd`.
    """
    ball = Ball(eps, norm, grid)
    _guard(images, criterion, tries=tries, batch_size=batch_size)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    guesses = (ball.sample_surface(images, generator) for _ in range(tries))
    found = _best_of(
        model, images, criterion, ball, guesses, lambda rows, start, meter: ball.settle(start, images[rows]), batch_size,
        independent=_stateless(model),
    )  # fmt: skip
    cost = Cost(queries=found.cost.forwards, seconds=found.cost.seconds)
    return PixelAttack(found.images, found.success, found.skipped, found.distance, cost)


def replay(
    model: Model, attack: PixelAttack, images: torch.Tensor, criterion: Criterion, *, norm: Norm = "linf", batch_size: int = 256
) -> PixelAttack:
    """Show images made against a surrogate to another model: the transfer attack, one query an item.

    attack: the result on the surrogate; images: the originals. Items the victim gets wrong anyway are skipped.
    """
    _guard(images, criterion, batch_size=batch_size)
    if attack.images.shape != images.shape:
        raise ValueError(f"attack and images must match, got {tuple(attack.images.shape)} and {tuple(images.shape)}")
    ball, meter = Ball(0, norm), Meter()
    with frozen(model):
        skipped = ~_ask(model, images, criterion.correct, batch_size, meter)
        success = _ask(model, attack.images, criterion.met, batch_size, meter) & ~skipped
    best = torch.where(success[:, None, None, None], attack.images, images)
    cost = attack.cost + Cost(queries=len(images), seconds=meter.cost.seconds)
    return PixelAttack(best, success, skipped, ball.size(best - images), cost)


def _best_of(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    ball: Ball,
    starts: Iterator[torch.Tensor],
    search: Callable[[torch.Tensor, torch.Tensor, Meter], torch.Tensor],
    batch_size: int,
    *,
    independent: bool = False,
) -> PixelAttack:
    """Search from each start in turn on the items still standing; judge what comes back, keep what holds.

    independent: the search shares nothing between batches, so two may run at once (see `_by_batches`).
    """
    if ball.eps > 0 and not ball.holds(ball.settle(images, images), images).all():
        raise ValueError(
            f"images must be multiples of 1/{ball.grid} when eps is this small: rounding alone already leaves the ball; "
            "round them first, or pass grid=None to attack raw floats"
        )
    meter, best = Meter(), images.clone()
    with frozen(model):
        skipped = ~_ask(model, images, criterion.correct, batch_size, meter)
        success = torch.zeros_like(skipped)
        for start in starts if ball.eps > 0 else ():

            def attempt(
                rows: torch.Tensor, start: torch.Tensor = start
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Meter]:
                spent = Meter()
                found = search(rows, start[rows], spent)
                won = ball.holds(found, images[rows])
                spent.forwards += len(rows)
                with torch.no_grad():
                    won &= criterion.met(model(found), rows)
                return rows, found, won, spent

            for rows, found, won, spent in _by_batches(attempt, ~(skipped | success), batch_size, alone=not independent):
                best[rows[won]], success[rows[won]] = found[won], True
                meter.take(spent)
    return PixelAttack(best, success, skipped, ball.size(best - images), meter.cost)


def _stateless(model: Model) -> bool:
    """A module answers the same whatever else it is asked; a plain function may keep a state, such as a stream of noise."""
    return isinstance(model, torch.nn.Module)


def _ask(
    model: Model,
    images: torch.Tensor,
    verdict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batch_size: int,
    meter: Meter,
) -> torch.Tensor:
    """(N,) bool verdict of a criterion's method on the model's outputs for all images."""
    everyone = torch.ones(len(images), dtype=torch.bool, device=images.device)
    meter.forwards += len(images)
    with torch.no_grad():  # not inference_mode: a tensor that the model caches there could not carry gradients later
        return torch.cat([verdict(model(images[rows]), rows) for rows in _batches(everyone, batch_size)])


def _by_batches(run: Callable[[torch.Tensor], T], wanted: torch.Tensor, batch_size: int, *, alone: bool) -> list[T]:
    """run(rows) over the True entries of an (N,) mask, batch by batch, in order.

    On models this small a second torch thread gains little and often costs. Where torch keeps to one thread on a CPU, two
    batches at once do gain: their arithmetic runs outside Python's lock. alone: one batch after the other.
    """
    pair = not alone and torch.get_num_threads() == 1 and wanted.device.type == "cpu"
    half = max(16, -(-int(wanted.sum()) // 2))
    batches = _batches(wanted, min(batch_size, half) if pair else batch_size)
    if not pair or len(batches) < 2:
        return [run(rows) for rows in batches]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, batches))


def _batches(wanted: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, ...]:
    """Positions of the True entries of an (N,) mask, batch_size at a time."""
    rows = wanted.nonzero()[:, 0]
    return torch.split(rows, int(batch_size)) if len(rows) else ()


def _guard(images: torch.Tensor, criterion: Criterion, **counts: int) -> None:
    if not isinstance(images, torch.Tensor) or images.dtype not in (torch.float32, torch.float64):  # halves cannot hold eps
        raise TypeError(f"images must be a float32 or float64 tensor, got {getattr(images, 'dtype', type(images).__name__)}")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must have shape (N, C, H, W) with N >= 1, got {tuple(images.shape)}")
    if not torch.isfinite(images).all() or images.min() < 0 or images.max() > 1:
        raise ValueError(f"images must lie in [0, 1], got values from {images.min():.3g} to {images.max():.3g}")
    if len(criterion) != len(images):
        raise ValueError(f"criterion must have one entry per image: {len(criterion)} entries for {len(images)} images")
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {count!r}")
