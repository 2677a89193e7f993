"""Scenes: small RGB pictures of shapes and real handwritten digits over textured backgrounds.

Every chapter looks at the same pictures. A scene holds one object (or two, side by side): one of eight
drawn shapes or one of scikit-learn's scanned digits, in one of eight colours. Whatever a later chapter
needs to know about a scene - its class, the mask of each object, a caption - comes with it.

Three splits never meet: each has its own stream of random numbers and its own share of the digit images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F

Split = Literal["train", "validation", "test"]

SHAPES = ("disc", "ring", "square", "triangle", "star", "cross", "moon", "heart")
DIGITS = tuple(f"digit {d}" for d in range(10))
KINDS = SHAPES + DIGITS
"""Class names; a scene's label is an index into this tuple."""

COLOURS = {
    "red": (0.90, 0.16, 0.16),
    "green": (0.16, 0.72, 0.22),
    "blue": (0.25, 0.42, 1.00),
    "yellow": (1.00, 0.88, 0.12),
    "purple": (0.70, 0.28, 0.90),
    "cyan": (0.15, 0.85, 0.90),
    "orange": (1.00, 0.55, 0.10),
    "white": (1.00, 1.00, 1.00),
}
COLOUR_NAMES = tuple(COLOURS)

# Share of each digit class that a split owns; the image indices are dealt once, with a fixed seed.
_DIGIT_SHARES: dict[Split, tuple[float, float]] = {
    "train": (0.0, 0.65),
    "validation": (0.65, 0.75),
    "test": (0.75, 1.0),
}


@dataclass(frozen=True)
class Scenes:
    """A batch of N scenes with K objects each, side S pixels.

    images: (N, 3, S, S) float32 in [0, 1], every value a multiple of 1/255 (what a PNG would hold).
    labels: (N,) int64 index into `KINDS` of the first (left) object.
    kinds, colours: (N, K) int64 indices into `KINDS` and `COLOUR_NAMES`.
    masks: (N, K, S, S) bool, the pixels each object covers.
    digit_ids: (N, K) int64 index of the scikit-learn digit image used, -1 for a drawn shape.
    captions: N strings such as "a red ring" or "a red ring left of a blue star".
    """

    images: torch.Tensor
    labels: torch.Tensor
    kinds: torch.Tensor
    colours: torch.Tensor
    masks: torch.Tensor
    digit_ids: torch.Tensor
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def scenes(n: int, *, split: Split, seed: int, objects: int = 1, side: int = 32) -> Scenes:
    """Draw n scenes of a split; the same arguments always give the same scenes.

    n: number of scenes, >= 1. split: which stream and which digit images. seed: >= 0; a seed means other
    scenes in each split. objects: 1 or 2 a scene. side: pixels, >= 16. Raises ValueError on anything else.
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}")
    for name, value, least in (("n", n, 1), ("seed", seed, 0), ("objects", objects, 1), ("side", side, 16)):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    if objects > 2:
        raise ValueError(f"objects must be 1 or 2, got {objects}")
    rng = np.random.default_rng([get_args(Split).index(split), seed])  # one stream a split
    kinds = rng.integers(len(KINDS), size=(n, objects))
    colours = rng.integers(len(COLOURS), size=(n, objects))
    if objects == 2:  # two objects of one kind and colour could not be told apart in words
        twins = (kinds[:, 0] == kinds[:, 1]) & (colours[:, 0] == colours[:, 1])
        colours[twins, 1] = (colours[twins, 1] + 1) % len(COLOURS)
    digit_ids = _pick_digits(kinds, split, rng)
    u, v, radius = _place(n, objects, side, rng)  # (N, K, S, S) object coordinates, (N, K) pixels
    cover = _cover(kinds, digit_ids, u, v, radius)  # (N, K, S, S) in [0, 1]

    image = _background(n, side, rng)  # (N, 3, S, S)
    palette = torch.tensor(list(COLOURS.values()))  # (8, 3)
    shade = torch.from_numpy(rng.uniform(0.88, 1.0, size=(n, objects, 1))).float()
    paint = palette[torch.from_numpy(colours)] * shade  # (N, K, 3)
    for k in range(objects):
        alpha = cover[:, k, None]  # (N, 1, S, S)
        image = image * (1 - alpha) + paint[:, k, :, None, None] * alpha
    return Scenes(
        images=(image * 255).round().clamp(0, 255) / 255,
        labels=torch.from_numpy(kinds[:, 0].copy()),
        kinds=torch.from_numpy(kinds),
        colours=torch.from_numpy(colours),
        masks=cover > 0.5,
        digit_ids=torch.from_numpy(digit_ids),
        captions=tuple(_caption(*row) for row in zip(kinds, colours, strict=True)),
    )


def points_inside(masks: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    """A random pixel of each mask, as a point prompt for a segmenter.

    masks: (..., S, S) bool, none of them empty. Returns (..., 2) float32: x (column) and y (row) of the pixel.
    """
    if masks.dtype != torch.bool or masks.ndim < 2 or not masks.flatten(-2).any(-1).all():
        raise ValueError(f"masks must be bool (..., S, S), none of them empty, got {masks.dtype} {tuple(masks.shape)}")
    draw = torch.rand(masks.shape, generator=generator).masked_fill(~masks, -1.0)
    pixel = draw.flatten(-2).argmax(-1)
    return torch.stack([pixel % masks.shape[-1], pixel // masks.shape[-1]], dim=-1).float()


def _caption(kinds: np.ndarray, colours: np.ndarray) -> str:
    words = [f"a {COLOUR_NAMES[c]} {KINDS[k]}" for k, c in zip(kinds, colours, strict=True)]
    return " left of ".join(words).replace("a orange", "an orange")


@lru_cache(maxsize=1)
def _digits() -> tuple[torch.Tensor, np.ndarray, dict[Split, list[np.ndarray]]]:
    """Scikit-learn's 1,797 scans (8x8, in [0, 1]), their labels, and for each split the indices by class."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(1797).permutation(len(bunch.target))
    dealt: dict[Split, list[np.ndarray]] = {split: [] for split in _DIGIT_SHARES}
    for digit in range(10):
        own = order[bunch.target[order] == digit]
        for split, (low, high) in _DIGIT_SHARES.items():
            dealt[split].append(own[round(low * len(own)) : round(high * len(own))])
    return torch.from_numpy(bunch.images / 16).float(), bunch.target, dealt


def _pick_digits(kinds: np.ndarray, split: Split, rng: np.random.Generator) -> np.ndarray:
    """(N, K) index of a digit image of the split for each digit object, -1 for shapes."""
    dealt = _digits()[2][split]
    draw = rng.random(kinds.shape)
    picked = np.full(kinds.shape, -1)
    for digit, own in enumerate(dealt):
        here = kinds == len(SHAPES) + digit
        picked[here] = own[(draw[here] * len(own)).astype(int)]
    return picked


def _place(n: int, objects: int, side: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Object coordinates of every pixel: the object fills the unit square [-1, 1]^2, y pointing down."""
    room = side / objects  # two objects share the width
    radius = room * rng.uniform(0.34, 0.46, size=(n, objects))
    slack = np.maximum(room / 2 - radius, 0) * 0.8
    slack_y = np.maximum(side / 2 - radius, 0) * 0.8
    cx = room * (np.arange(objects) + 0.5) + slack * rng.uniform(-1, 1, size=(n, objects))
    cy = side / 2 + slack_y * rng.uniform(-1, 1, size=(n, objects))
    angle = rng.uniform(-12, 12, size=(n, objects)) * math.pi / 180
    x0, y0, turn, r = (torch.from_numpy(a).float()[:, :, None, None] for a in (cx, cy, angle, radius))
    centre = torch.arange(side) + 0.5
    dx, dy = centre[None, None, None, :] - x0, centre[None, None, :, None] - y0
    u = (dx * turn.cos() + dy * turn.sin()) / r  # (N, K, S, S)
    v = (dy * turn.cos() - dx * turn.sin()) / r
    return u, v, r[:, :, 0, 0]


def _cover(kinds: np.ndarray, digit_ids: np.ndarray, u: torch.Tensor, v: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """How much of each pixel an object covers, in [0, 1]; shapes by signed distance, digits by their scan."""
    cover = torch.zeros_like(u)
    for kind, name in enumerate(SHAPES):
        here = torch.from_numpy(kinds == kind)
        if here.any():
            outside = _DISTANCE[name](u[here], v[here])  # < 0 inside, in units of the radius
            cover[here] = (0.5 - outside * radius[here][:, None, None]).clamp(0, 1)
    here = torch.from_numpy(digit_ids >= 0)
    if here.any():
        scans = _digits()[0][torch.from_numpy(digit_ids)[here]]  # (M, 8, 8)
        grid = torch.stack([u[here], v[here]], dim=-1)  # (M, S, S, 2)
        ink = F.grid_sample(scans[:, None], grid, mode="bicubic", align_corners=False)[:, 0]
        cover[here] = (1.5 * ink - 0.1).clamp(0, 1)
    return cover


def _disc(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.hypot(u, v) - 0.95


def _ring(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (torch.hypot(u, v) - 0.72).abs() - 0.22


def _square(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.maximum(u.abs(), v.abs()) - 0.82


def _triangle(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.maximum(0.894 * u.abs() - 0.447 * (v + 0.95), v - 0.80)


def _star(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    fold = 2 * math.pi / 5  # five-fold symmetry: fold the plane into one half-point
    angle = torch.remainder(torch.atan2(u, -v) + fold / 2, fold) - fold / 2
    r = torch.hypot(u, v)
    x, y = r * angle.cos(), r * angle.sin().abs()
    tip, notch = 1.05, 0.45
    nx, ny = notch * math.cos(fold / 2), notch * math.sin(fold / 2)
    length = math.hypot(tip - nx, ny)
    return ((x - tip) * ny + y * (tip - nx)) / length


def _cross(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    a, b = torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    return torch.maximum(a - 0.95, b - 0.27)


def _moon(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.maximum(torch.hypot(u, v) - 0.95, 0.78 - torch.hypot(u - 0.48, v))


def _heart(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    lobes = torch.hypot(u.abs() - 0.45, v + 0.35) - 0.50
    tip = torch.maximum(0.707 * (u.abs() + v - 0.72), -v - 0.35)
    return torch.minimum(lobes, tip)


_DISTANCE = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "moon": _moon,
    "heart": _heart,
}


def _background(n: int, side: int, rng: np.random.Generator) -> torch.Tensor:
    """(N, 3, S, S) dark tinted textures: smooth noise and a faint grating, values about 0.05 to 0.4."""
    coarse = torch.from_numpy(rng.uniform(-1, 1, size=(n, 3, 5, 5))).float()
    clouds = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
    angle, phase = rng.uniform(0, math.pi, size=(n, 1, 1)), rng.uniform(0, 2 * math.pi, size=(n, 1, 1))
    pitch = rng.uniform(0.25, 0.6, size=(n, 1, 1)) * side  # pixels per stripe
    y, x = np.mgrid[0:side, 0:side]
    stripes = np.sin(2 * math.pi * (x * np.cos(angle) + y * np.sin(angle)) / pitch + phase)
    level = torch.from_numpy(rng.uniform(0.12, 0.28, size=(n, 1, 1, 1))).float()
    tint = torch.from_numpy(rng.uniform(-0.04, 0.04, size=(n, 3, 1, 1))).float()
    return (level + tint + 0.06 * clouds + 0.03 * torch.from_numpy(stripes).float()[:, None]).clamp(0, 1)
