"""The space a pixel attack may use: all images within eps of the original, as a file could hold them."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

import torch

Norm = Literal["linf", "l2"]
_SLACK = 1e-6  # rounding of float32 pixels in [0, 1]; for eps above 1, of eps itself


def per_item(values: torch.Tensor) -> torch.Tensor:
    """(B,) as (B, 1, 1, 1), to go with images."""
    return values[:, None, None, None]


@dataclass(frozen=True)
class Ball:
    """Images at most eps away from an original, inside [0, 1].

    eps: radius in units of the pixel range, >= 0; 8/255 is eight grey levels. norm: "linf" or "l2".
    grid: pixel values are multiples of 1/grid (255 for an 8-bit file); None for any float.
    Every method works on batches (B, C, H, W).
    """

    eps: float
    norm: Norm = "linf"
    grid: int | None = 255

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm must be one of {get_args(Norm)}, got {self.norm!r}")
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps must be finite and >= 0, got {self.eps}")
        if self.grid is not None and (not isinstance(self.grid, Integral) or self.grid < 1):
            raise ValueError(f"grid must be a whole number >= 1 or None, got {self.grid!r}")

    def size(self, delta: torch.Tensor) -> torch.Tensor:
        """(B,) length of each change."""
        flat = delta.flatten(1)
        if self.norm == "linf":
            return flat.abs().amax(1)
        # In double: a float32 sum over 150,000 pixels is off by more than the slack.
        length: torch.Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
        return length.to(delta.dtype)

    @property
    def _reach(self) -> float:
        """The longest change that still counts as eps."""
        return self.eps + _SLACK * max(1.0, self.eps)

    def holds(self, x: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """(B,) bool: does x keep the budget around images, measured anew?"""
        inside = (x.flatten(1) >= 0).all(1) & (x.flatten(1) <= 1).all(1)
        return inside & (self.size(x - images) <= self._reach)

    def steepest(self, gradient: torch.Tensor) -> torch.Tensor:
        """The unit step that climbs fastest: the sign for linf, the normalised gradient for l2."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / self.size(gradient).clamp(min=torch.finfo(gradient.dtype).tiny)[:, None, None, None]

    def project(self, x: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The nearest point of the ball, then of the pixel range."""
        delta = x - images
        if self.norm == "linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            delta = delta * (self.eps / self.size(delta).clamp(min=1e-12)).clamp(max=1)[:, None, None, None]
        return (images + delta).clamp(0, 1)

    def settle(self, x: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The nearest image a file can hold; where rounding leaves the ball, round towards the original instead."""
        if self.grid is None:
            return x
        nearest = (x * self.grid).round() / self.grid
        outside = self.size(nearest - images) > self._reach
        if not outside.any():
            return nearest
        close = 0.5 * _SLACK * self.grid  # a pixel this near to a grid value is on it
        inward = torch.where(x > images, (x * self.grid + close).floor(), (x * self.grid - close).ceil()) / self.grid
        return torch.where(outside[:, None, None, None], inward, nearest)

    def sample(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A random point: uniform in the cube for linf; uniform direction and uniform radius for l2."""
        if self.norm == "linf":
            unit = torch.rand(images.shape, generator=generator, dtype=images.dtype)
            noise = self.eps * (2 * unit - 1)
        else:
            direction = torch.randn(images.shape, generator=generator, dtype=images.dtype)
            radius = self.eps * torch.rand(len(images), generator=generator, dtype=images.dtype)
            noise = self.steepest(direction) * radius[:, None, None, None]
        return self.project(images + noise.to(images.device), images)

    def sample_surface(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A random point at full length: a corner of the cube for linf, a random direction for l2."""
        noise = self.steepest(torch.randn(images.shape, generator=generator, dtype=images.dtype))
        return self.project(images + self.eps * noise.to(images.device), images)
