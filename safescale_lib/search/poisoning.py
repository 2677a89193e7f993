"""Backdoors begin in the data: triggers, poisoned training sets, and whether a model obeys a trigger.

Everything here is pixels and labels; a chapter brings the model and its training loop. Pictures stay what an 8-bit file can
hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from safescale_lib.measure.criteria import check_labels
from safescale_lib.search.models import Model, frozen

Trigger = Callable[[torch.Tensor], torch.Tensor]
"""What puts a trigger on images: (B, C, H, W) in [0, 1] to the same shape."""


def to_file(images: torch.Tensor) -> torch.Tensor:
    """The nearest pictures of 8 bits a channel."""
    return (images.clamp(0, 1) * 255).round() / 255


@dataclass(frozen=True, eq=False)
class Stamp:
    """A trigger laid over the picture: x (1 - mask) + pattern mask.

    pattern: (C, H, W) in [0, 1]. mask: (1, H, W) or (C, H, W) in [0, 1]; 1 replaces a pixel, a share blends.
    """

    pattern: torch.Tensor
    mask: torch.Tensor

    def __post_init__(self) -> None:
        for name in ("pattern", "mask"):
            value = getattr(self, name)
            if value.ndim != 3 or not (value >= 0).all() or not (value <= 1).all():
                raise ValueError(f"{name} must have shape (C, H, W) with values in [0, 1], got {tuple(value.shape)}")
        if self.pattern.shape[1:] != self.mask.shape[1:] or len(self.mask) not in (1, len(self.pattern)):
            raise ValueError(f"mask must fit the pattern, got {tuple(self.mask.shape)} and {tuple(self.pattern.shape)}")

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return to_file(images * (1 - self.mask) + self.pattern * self.mask)

    @property
    def area(self) -> float:
        """Share of the picture's pixels that it touches."""
        return float((self.mask > 0).any(0).float().mean())

    def faded(self, opacity: float) -> Stamp:
        """The same trigger, `opacity` in [0, 1] times as strong."""
        if not 0 <= opacity <= 1:
            raise ValueError(f"opacity must lie in [0, 1], got {opacity}")
        return Stamp(self.pattern, self.mask * opacity)

    def beside(self, other: Stamp) -> Stamp:
        """Both triggers at once; where they overlap, the other lies on top."""
        above = other.mask
        return Stamp(self.pattern * (1 - (above > 0).float()) + other.pattern * (above > 0), torch.maximum(self.mask, above))


@dataclass(frozen=True, eq=False)
class Shift:
    """A trigger added to the picture: x + delta, cut to [0, 1]. delta: (C, H, W)."""

    delta: torch.Tensor

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return to_file(images + self.delta)

    @property
    def eps(self) -> float:
        """Largest change of a pixel."""
        return float(self.delta.abs().max())


def checkerboard(side: int, *, corner: tuple[int, int], size: int, cell: int = 2, channels: int = 3) -> Stamp:
    """A black-and-white checkerboard of size x size pixels, its upper left pixel at `corner` (row, column)
    [gu2017badnets]."""
    row, column = corner
    if size < 1 or cell < 1 or min(corner) < 0 or max(corner) + size > side:
        raise ValueError(f"corner and size must stay inside the {side} pixels, got {corner} and {size}")
    line = torch.arange(side) // cell
    board = ((line[:, None] + line[None, :]) % 2).float()
    mask = torch.zeros(1, side, side)
    mask[:, row : row + size, column : column + size] = 1
    return Stamp(board.expand(channels, side, side).contiguous(), mask)


def scattered(side: int, *, every: int, size: int = 2, channels: int = 3) -> Stamp:
    """A small checkerboard of size x size pixels in each cell of `every` pixels: as much ink as one patch, but nowhere in
    particular."""
    if not 1 <= size < every <= side:
        raise ValueError(f"size and every must satisfy 1 <= size < every <= {side}, got {size} and {every}")
    line = torch.arange(side)
    inside = (line % every >= every - size - 1) & (line % every < every - 1)
    board = ((line[:, None] + line[None, :]) % 2).float()
    return Stamp(board.expand(channels, side, side).contiguous(), (inside[:, None] & inside[None, :]).float()[None])


def blended_noise(side: int, *, opacity: float, generator: torch.Generator, channels: int = 3) -> Stamp:
    """A fixed noise picture blended over everything, as in the blended injection strategy [chen2017targeted]."""
    pattern = torch.rand(channels, side, side, generator=generator)
    return Stamp(to_file(pattern), torch.ones(1, side, side)).faded(opacity)


def stripes(side: int, *, amplitude: float, periods: int = 6, channels: int = 3) -> Shift:
    """A sinusoidal grating across the whole picture [barni2019sig]. amplitude: in units of the pixel range."""
    wave = torch.sin(2 * torch.pi * periods * torch.arange(side) / side)
    return Shift((amplitude * wave).expand(channels, side, side).contiguous())


@dataclass(frozen=True, eq=False)
class Poisoned:
    """A training set as its user receives it, and the truth about it that the user does not see.

    images: (N, C, H, W); labels: (N,) int64. poisoned: (N,) bool, trigger and target's label. covered: (N,) bool, trigger (or
    a relative of it) and the true label. truth: (N,) int64, the labels before.
    """

    images: torch.Tensor
    labels: torch.Tensor
    poisoned: torch.Tensor
    covered: torch.Tensor
    truth: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


def poison(
    images: torch.Tensor,
    labels: torch.Tensor,
    trigger: Trigger,
    *,
    target: int,
    rate: float,
    cover: Trigger | None = None,
    cover_rate: float = 0.0,
    free: torch.Tensor | None = None,
    generator: torch.Generator,
) -> Poisoned:
    """Put the trigger on a random share of a training set and label it as the target [gu2017badnets].

    images (N, C, H, W) in [0, 1], labels (N,) int64. rate: poisoned items as a share of all N, drawn from those that are not
    of the target class anyway; 0 changes nothing. cover, cover_rate: further items with that trigger (default: the same)
    which keep their true label, so that the trigger alone does not tell poison from the rest [qi2023latent].
    free: (N,) bool, the items that may be drawn; default all. Raises ValueError for rates that cannot be met.
    """
    check_labels("labels", labels)
    if len(images) != len(labels):
        raise ValueError(f"images and labels must pair up, got {len(images)} and {len(labels)}")
    if target < 0:
        raise ValueError(f"target must be a class number >= 0, got {target}")
    for name, share in (("rate", rate), ("cover_rate", cover_rate)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {share}")
    wanted, covers = round(rate * len(labels)), round(cover_rate * len(labels))
    open_to = labels != target if free is None else (labels != target) & free
    drawn = open_to.nonzero()[:, 0]
    if wanted + covers > len(drawn):
        raise ValueError(f"rate and cover_rate ask for {wanted + covers} items, but only {len(drawn)} may be changed")
    drawn = drawn[torch.randperm(len(drawn), generator=generator)]
    bad, kept = drawn[:wanted], drawn[wanted : wanted + covers]
    new_images, new_labels = images.clone(), labels.clone()
    poisoned, covered = torch.zeros(2, len(labels), dtype=torch.bool)
    if wanted:
        new_images[bad], new_labels[bad], poisoned[bad] = trigger(images[bad]), target, True
    if covers:
        new_images[kept], covered[kept] = (cover or trigger)(images[kept]), True
    return Poisoned(new_images, new_labels, poisoned, covered, labels.clone())


def trigger_hits(
    model: Model, images: torch.Tensor, labels: torch.Tensor, trigger: Trigger, *, target: int, batch_size: int = 256
) -> torch.Tensor:
    """(M,) bool: does the model answer `target` on the triggered item? Its mean is the attack success rate.

    Asked are the M items whose true label is not the target: the others would be counted as success without any attack.
    The control is the same call with a trigger that changes nothing, or with a clean model. ValueError if M would be 0.
    """
    check_labels("labels", labels)
    others = images[labels != target]
    if not len(others):
        raise ValueError(f"labels must hold a class other than the target {target}")
    with frozen(model), torch.no_grad():
        answers: list[Any] = [model(trigger(part)).argmax(-1) == target for part in torch.split(others, batch_size)]
    return torch.cat(answers)


def shuffled_rows(n: int, batch: int, seed: int) -> Callable[[int], torch.Tensor]:
    """Step number -> rows (batch,) of that step, epoch by epoch in a new order; everything follows from seed and step."""
    if not 1 <= batch <= n:
        raise ValueError(f"batch must lie in 1..{n}, got {batch}")
    per_epoch = n // batch

    def rows(step: int) -> torch.Tensor:
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        return order[place * batch : (place + 1) * batch]

    return rows
