"""Survey section 2.2, adversarial attacks on the Segment Anything Model, in the survey's order.

All of them search over pixels with the image encoder as the model. They differ in what they know: the very point of the prompt,
a region, no prompt at all, not even the image, or not even the victim. The prompt that judges them is the criterion's.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral

import torch
import torch.nn.functional as F

from safescale_lib.measure.costs import Meter
from safescale_lib.measure.criteria import Criterion
from safescale_lib.measure.masks import MaskLost, MaskMoved
from safescale_lib.search.ball import Ball
from safescale_lib.search.models import frozen
from safescale_lib.search.pixels import PixelAttack, _best_of, _guard, ascend, pgd
from safescale_lib.survey import technique
from safescale_lib.world.scenes import points_inside
from safescale_lib.zoo.segmenter import PixelSegmenter

Aim = Callable[[torch.Tensor], Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]
"""For the rows of a batch, the loss(embeddings, live) to raise."""

# The baseline is the plain search: to it the image encoder is a model like any other.
technique("vfm.sam.adversarial_attack", paper="madry2018pgd")(pgd)


def clipped_error(logits: torch.Tensor, wanted: torch.Tensor, bound: float) -> torch.Tensor:
    """(...) mean squared distance of mask logits (..., S, S) from the far side of a bound: the ClipMSE of [zhang2023attacksam].

    wanted: bool, the mask the attacker would like; its pixels should lie at +bound or above, all others at -bound or below.
    A pixel beyond the bound costs nothing, so that the search spends its effort where the mask still stands.
    """
    short = torch.where(wanted, bound - logits, logits + bound).clamp(min=0)  # (..., S, S)
    return short.square().flatten(-2).mean(-1)


@technique("vfm.sam.adversarial_attack.prompt_specific", paper="zhang2023attacksam")
def attack_sam(
    model: PixelSegmenter,
    images: torch.Tensor,
    criterion: MaskLost,
    *,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    bound: float = 10.0,
    restarts: int = 1,
    early_removal: bool = True,
    grid: int | None = 255,
    batch_size: int = 256,
    generator: torch.Generator,
) -> PixelAttack:
    """Attack-SAM: change the mask that one known prompt gets, by PGD on the mask's logits [zhang2023attacksam].

    Mask removal (criterion MaskLost or MaskRemoved): min over |delta| <= eps of |clip(logits, -bound) + bound|^2.
    Mask manipulation (criterion MaskMoved): the same, with the logits of the target mask pushed above +bound.
    model: the segmenter. images: (N, 3, S, S) in [0, 1]. criterion: prompts, truth and goal, one entry per image; the attacker
    knows the prompts. bound: the paper's threshold, in logits. Other arguments, and errors, as for `pgd`.
    """
    _positive("bound", bound)

    def objective(_: Criterion, embeddings: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        logits = model.decode(embeddings, criterion.points[rows])  # (B, S, S)
        wanted = criterion.target[rows] if isinstance(criterion, MaskMoved) else torch.zeros_like(logits, dtype=torch.bool)
        return -clipped_error(logits, wanted, bound)

    return pgd(
        model, images, criterion, eps=eps, steps=steps, step_size=step_size, objective=objective, restarts=restarts,
        early_removal=early_removal, grid=grid, batch_size=batch_size, generator=generator,
    )  # fmt: skip


@technique("vfm.sam.adversarial_attack.prompt_agnostic", paper="shen2024sra")
def region_attack(
    model: PixelSegmenter,
    images: torch.Tensor,
    criterion: MaskLost,
    *,
    region: torch.Tensor,
    eps: float,
    steps: int = 20,
    step_size: float | None = None,
    prompts: int = 4,
    bound: float = 10.0,
    grid: int | None = 255,
    batch_size: int = 256,
    generator: torch.Generator,
) -> PixelAttack:
    """S-RA: hide an object from every click on it, by averaging over points sampled in its region [shen2024sra].

    region: (N, S, S) bool, where the user is expected to click; none empty. prompts: points drawn afresh in every step. The
    search never sees the criterion's own points and therefore never stops early: hold those out of the region. bound: as for
    `attack_sam`. Deviation: points are drawn at random, where the released code lays a grid over a box. Other arguments, and
    errors, as for `pgd`.
    """
    ball = Ball(eps, grid=grid)
    _guard(images, criterion, steps=steps, prompts=prompts, batch_size=batch_size)
    _positive("bound", bound)
    _check_generator(generator)
    if region.dtype != torch.bool or region.shape != (len(images), *images.shape[2:]):
        raise ValueError(f"region must be a bool mask for each image, got {region.dtype} {tuple(region.shape)}")
    drawn = [points_inside(region[:, None].expand(-1, prompts, -1, -1), generator=generator) for _ in range(steps)]
    pool = torch.stack(drawn, dim=1)  # (N, steps, K, 2), drawn at once: no item's points depend on the batch it is in

    def aim(rows: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        step = iter(range(steps))

        def loss(embeddings: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
            logits = model.decode(embeddings, pool[rows[live], next(step)])  # (b, K, S, S)
            return -clipped_error(logits, torch.zeros_like(logits, dtype=torch.bool), bound).mean(1)

        return loss

    return _blind(model, images, criterion, ball, aim, steps, step_size, batch_size, generator)


@technique("vfm.sam.adversarial_attack.prompt_agnostic", paper="croce2024segmentnothing")
def feature_attack(
    model: PixelSegmenter,
    images: torch.Tensor,
    criterion: MaskLost,
    *,
    eps: float,
    steps: int = 20,
    step_size: float | None = None,
    grid: int | None = 255,
    batch_size: int = 256,
    generator: torch.Generator,
) -> PixelAttack:
    """Segment (almost) nothing: drive the image embedding away, whatever the prompt [croce2024segmentnothing].

    max over |delta| <= eps of |f(x + delta) - f(x)|^2. Needs neither prompt nor truth nor decoder; the criterion only judges
    the end. Arguments and errors as for `pgd`.
    """
    ball = Ball(eps, grid=grid)
    _guard(images, criterion, steps=steps, batch_size=batch_size)

    def aim(rows: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        with torch.no_grad():
            clean = model(images[rows])  # (b, C, h, w)
        return lambda embeddings, live: (embeddings - clean[live]).square().flatten(1).mean(1)

    return _blind(model, images, criterion, ball, aim, steps, step_size, batch_size, generator)


@technique("vfm.sam.adversarial_attack.universal_perturbation", paper="zhou2024darksam")
def dark_sam(
    model: PixelSegmenter,
    images: torch.Tensor,
    criterion: MaskLost,
    *,
    known: torch.Tensor,
    eps: float,
    steps: int = 100,
    step_size: float | None = None,
    prompts: int = 4,
    batch: int = 16,
    bound: float = 10.0,
    texture: float = 0.1,
    grid: int | None = 255,
    batch_size: int = 256,
    generator: torch.Generator,
) -> PixelAttack:
    """DarkSAM: one perturbation for every image and prompt, learned from other images [zhou2024darksam].

    known: (M, 3, S, S), the attacker's own images; the attacked `images` serve the judging only. Spatial part: a blueprint of
    each known image, the union of its masks at random prompts (the shadow target), is turned inside out: the foreground is
    pushed below -bound and the background above +bound. Frequency part, weighted by `texture`: high frequencies of the image
    are driven away, low ones held. `universal_perturbation` does the learning. Deviations: one level of Haar averages in place
    of the paper's wavelet, and sign steps in place of its optimiser. Other arguments, and errors, as for `pgd`.
    """
    ball = Ball(eps, grid=grid)
    _guard(images, criterion, batch_size=batch_size)
    _check_learning(known, generator, like=images)
    meter = Meter()
    delta = universal_perturbation(
        model, known, eps=eps, steps=steps, step_size=step_size, prompts=prompts, batch=batch, bound=bound, texture=texture,
        generator=generator, meter=meter,
    )  # fmt: skip

    def search(rows: torch.Tensor, start: torch.Tensor, meter: Meter) -> torch.Tensor:
        return ball.settle(ball.project(images[rows] + delta, images[rows]), images[rows])

    judged = _best_of(model, images, criterion, ball, iter([images]), search, batch_size)
    return PixelAttack(judged.images, judged.success, judged.skipped, judged.distance, meter.cost + judged.cost)


def universal_perturbation(
    model: PixelSegmenter,
    known: torch.Tensor,
    *,
    eps: float,
    steps: int = 100,
    step_size: float | None = None,
    prompts: int = 4,
    batch: int = 16,
    bound: float = 10.0,
    texture: float = 0.1,
    generator: torch.Generator,
    meter: Meter | None = None,
) -> torch.Tensor:
    """The learning part of `dark_sam`: returns the perturbation (3, S, S), each value within eps."""
    Ball(eps)
    _check_learning(known, generator, like=known, steps=steps, prompts=prompts, batch=batch)
    _positive("bound", bound)
    if texture < 0:
        raise ValueError(f"texture must not be negative, got {texture}")
    meter = meter or Meter()
    everywhere = torch.ones(known.shape[2:], dtype=torch.bool)
    with frozen(model):
        foreground = _blueprint(model, known, everywhere, prompts, batch, generator, meter)  # (M, H, W)

        def gain(attacked: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            points = points_inside(everywhere.expand(len(rows), prompts, -1, -1), generator=generator)  # (b, K, 2)
            logits = model.decode(model(attacked), points)  # (b, K, H, W)
            inverted = ~foreground[rows, None].expand_as(logits)
            spatial = -clipped_error(logits, inverted, bound).mean() / bound**2
            (low, high), (low_before, high_before) = _bands(attacked), _bands(known[rows])
            change = (high - high_before).square().mean() - (low - low_before).square().mean()
            return spatial + texture * change / eps**2

        return _learn(known, gain, eps, steps, step_size, batch, generator, meter)


def _check_learning(known: torch.Tensor, generator: torch.Generator, *, like: torch.Tensor, **counts: int) -> None:
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {count!r}")
    if known.ndim != 4 or len(known) == 0 or known.shape[1:] != like.shape[1:]:
        raise ValueError(f"known must have shape (M, {', '.join(map(str, like.shape[1:]))}), M >= 1, got {tuple(known.shape)}")
    _check_generator(generator)


def _learn(
    known: torch.Tensor,
    gain: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    eps: float,
    steps: int,
    step_size: float | None,
    batch: int,
    generator: torch.Generator,
    meter: Meter,
) -> torch.Tensor:
    """One delta (C, H, W) within eps that raises gain(attacked images, their rows), by sign steps on random batches."""
    step_size = eps / 10 if step_size is None else step_size
    if not 0 <= step_size < float("inf"):
        raise ValueError(f"step_size must be finite and >= 0, got {step_size}")
    delta = eps * (2 * torch.rand(known.shape[1:], generator=generator) - 1)  # (C, H, W)
    for _ in range(steps if eps > 0 else 0):
        rows = torch.randperm(len(known), generator=generator)[:batch]
        delta = delta.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(gain((known[rows] + delta).clamp(0, 1), rows), delta)
        meter.forwards += len(rows)
        meter.backwards += len(rows)
        delta = (delta.detach() + step_size * gradient.sign()).clamp(-eps, eps)
    return delta.detach()


def _blueprint(
    model: PixelSegmenter,
    known: torch.Tensor,
    everywhere: torch.Tensor,
    prompts: int,
    batch: int,
    generator: torch.Generator,
    meter: Meter,
) -> torch.Tensor:
    """(M, H, W) bool: for each image the union of the masks at random prompts, without those that cover most of the picture."""
    points = points_inside(everywhere.expand(len(known), 4 * prompts, -1, -1), generator=generator)
    meter.forwards += len(known)
    found = []
    with torch.no_grad():
        for x, p in zip(torch.split(known, batch), torch.split(points, batch), strict=True):
            masks = model.decode(model(x), p) > 0  # (b, K, H, W)
            objects = masks.float().mean((-2, -1), keepdim=True) < 0.5
            found.append((masks & objects).any(1))
    return torch.cat(found)


def _bands(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high frequencies of images whose sides are even: means of 2 x 2 pixels, and what they leave out."""
    low = F.interpolate(F.avg_pool2d(images, 2), size=images.shape[-2:], mode="nearest")
    return low, images - low


@technique("vfm.sam.adversarial_attack.transfer_based", paper="xia2024umigrat")
def umi_grat(
    model: PixelSegmenter,
    images: torch.Tensor,
    criterion: MaskLost,
    *,
    surrogate: PixelSegmenter,
    known: torch.Tensor,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    momentum: float = 1.0,
    noise: float = 0.05,
    meta_steps: int = 20,
    batch: int = 16,
    grid: int | None = 255,
    batch_size: int = 256,
    generator: torch.Generator,
) -> PixelAttack:
    """UMI-GRAT: attack a model of which only a public relative is known, through the encoder's embedding [xia2024umigrat].

    Universal meta-initialisation: learn on the attacker's own images `known` one perturbation that moves the surrogate's
    embeddings away from the clean ones. Gradient robustness: from there search each image, with noise in every gradient, so
    that the search does not follow what only the surrogate computes. model: the victim; it is asked only to judge. surrogate:
    whose encoder is differentiated; no prompt, truth or decoder is used. noise: standard deviation, in pixel units.
    Deviations: the noise is added to the pixels, where the paper perturbs gradients; the meta-initialisation is first-order.
    Other arguments, and errors, as for `pgd`.
    """
    ball = Ball(eps, grid=grid)
    _guard(images, criterion, steps=steps, batch_size=batch_size)
    _check_learning(known, generator, like=images, meta_steps=meta_steps, batch=batch)
    if not 0 <= noise < float("inf") or not 0 <= momentum < float("inf"):
        raise ValueError(f"noise and momentum must be finite and >= 0, got {noise} and {momentum}")
    step_size = _step_size(step_size, eps, steps)
    meter = Meter()

    def gain(attacked: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        away: torch.Tensor = (surrogate(attacked) - clean[rows]).square().mean()
        return away

    def search(rows: torch.Tensor, start: torch.Tensor, meter: Meter) -> torch.Tensor:
        with torch.no_grad():
            before = surrogate(images[rows])  # (b, C, h, w)
        step = iter(jitter)
        return ascend(
            lambda x: surrogate(x + next(step)), images[rows], start,
            lambda embeddings, live: (embeddings - before[live]).square().flatten(1).mean(1),
            ball, steps=steps, step_size=step_size, momentum=momentum, meter=meter,
        )  # fmt: skip

    with frozen(surrogate):
        with torch.no_grad():
            clean = torch.cat([surrogate(part) for part in torch.split(known, batch_size)])
        meter.forwards += len(known)
        delta = _learn(known, gain, eps, meta_steps, None, batch, generator, meter)
        jitter = noise * torch.randn((steps, *images.shape[1:]), generator=generator)  # the same for all images of a step
        found = _best_of(
            model, images, criterion, ball, iter([ball.project(images + delta, images)]), search, batch_size, independent=True
        )
    return PixelAttack(found.images, found.success, found.skipped, found.distance, meter.cost + found.cost)


def _blind(
    model: PixelSegmenter,
    images: torch.Tensor,
    criterion: MaskLost,
    ball: Ball,
    aim: Aim,
    steps: int,
    step_size: float | None,
    batch_size: int,
    generator: torch.Generator,
) -> PixelAttack:
    """Climb `aim` through every step, without a look at the criterion; it judges the last point, once."""
    step_size = _step_size(step_size, ball.eps, steps)
    _check_generator(generator)

    def search(rows: torch.Tensor, start: torch.Tensor, meter: Meter) -> torch.Tensor:
        return ascend(model, images[rows], start, aim(rows), ball, steps=steps, step_size=step_size, meter=meter)

    return _best_of(
        model, images, criterion, ball, iter([ball.sample(images, generator)]), search, batch_size, independent=True
    )


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name} must be finite and above 0, got {value}")


def _step_size(given: float | None, eps: float, steps: int) -> float:
    """The step size of `pgd`, its default included."""
    size = 2.5 * eps / steps if given is None else given
    if not 0 <= size < float("inf"):
        raise ValueError(f"step_size must be finite and >= 0, got {size}")
    return size


def _check_generator(generator: torch.Generator) -> None:
    if not isinstance(generator, torch.Generator):  # None would draw from the global stream
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
