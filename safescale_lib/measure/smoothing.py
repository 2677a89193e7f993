"""Randomised smoothing: ask a classifier about many noisy copies, answer with the majority, and prove how far it holds.

A certificate is a statement with error probability alpha: no change of L2 length below the radius moves the majority.
An attack can only ever show how weak a model is; this shows how strong it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from scipy import stats

Model = Callable[[torch.Tensor], Any]
ABSTAIN = -1


@dataclass(frozen=True, eq=False)
class Certificate:
    """What smoothing proves about N images.

    classes: (N,) int64, the smoothed classifier's answer, ABSTAIN (-1) where the votes do not suffice. radius: (N,) L2
    radius in pixel units within which the answer cannot change, 0 where it abstains. p_lower: (N,) lower bound on the
    share of the noise that votes for the answer. sigma, alpha: noise and error probability (for each image).
    """

    classes: torch.Tensor
    radius: torch.Tensor
    p_lower: torch.Tensor
    sigma: float
    alpha: float

    def correct_at(self, labels: torch.Tensor, radius: float) -> torch.Tensor:
        """(N,) bool: right and certified at this L2 radius. Its mean is the certified accuracy."""
        return (self.classes == labels) & ((self.radius > radius) if radius > 0 else (self.classes != ABSTAIN))


def smoothed(model: Model, *, sigma: float, n: int = 64, seed: int = 0, batch_size: int = 256) -> Model:
    """The model behind Gaussian noise: (B, C, H, W) -> (B, classes) share of n noisy copies that vote for each class.

    sigma: standard deviation in pixel units, > 0; the noise is not clipped, as the theorem asks. Each call uses the same
    n noise pictures for every image, so that the answer is a function of the image. Votes carry no gradient; an attack
    on it should climb the mean softmax instead: `expected`. A model with batch statistics or dropout must be in
    evaluation mode. Raises ValueError naming the bad argument.
    """
    _check(sigma=sigma, n=n, batch_size=batch_size)

    @torch.no_grad()
    def defended(images: torch.Tensor) -> torch.Tensor:
        noise = _noise(images, sigma, n, torch.Generator().manual_seed(seed))  # (n, C, H, W)
        shares = []
        for image in images:
            logits = torch.cat([model(image + part) for part in torch.split(noise, batch_size)])  # (n, classes)
            shares.append(torch.bincount(logits.argmax(-1), minlength=logits.shape[-1]) / n)
        return torch.stack(shares).to(images.dtype)

    return defended


def expected(model: Model, *, sigma: float, n: int = 8, seed: int | None = None) -> Model:
    """The smoothed classifier as an attacker differentiates it: log of the mean softmax over n noisy copies.

    An adaptive attack on `smoothed` climbs this (expectation over transformation [athalye2018obfuscated]) and is judged
    on that. A new draw each call, from a stream that begins at seed.
    """
    _check(sigma=sigma, n=n)
    generator = torch.Generator().manual_seed(0 if seed is None else seed)

    def soft(images: torch.Tensor) -> torch.Tensor:
        noise = _noise(images, sigma, n, generator)
        many = (images[None] + noise[:, None]).flatten(0, 1)  # (n * B, C, H, W)
        log_shares: torch.Tensor = model(many).log_softmax(-1).unflatten(0, (n, len(images)))  # (n, B, classes)
        return log_shares.logsumexp(0) - math.log(n)

    return soft


@torch.no_grad()
def certify(
    model: Model,
    images: torch.Tensor,
    *,
    sigma: float,
    n: int = 1000,
    n_guess: int = 50,
    alpha: float = 0.001,
    batch_size: int = 256,
    generator: torch.Generator,
) -> Certificate:
    """Certified L2 radius of the smoothed classifier for each image [cohen2019smoothing, CERTIFY in section 3.2.2].

    model: (B, C, H, W) -> logits (B, classes), in evaluation mode. sigma: standard deviation of the noise in pixel units,
    > 0. n_guess noisy copies pick the class, n fresh ones bound its probability from below by Clopper-Pearson's exact
    one-sided interval at 1 - alpha; the radius is sigma * Phi^-1(p_lower), or abstention where p_lower <= 1/2.
    Raises TypeError or ValueError naming the bad argument.
    """
    _check(sigma=sigma, n=n, n_guess=n_guess, batch_size=batch_size)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"images must have shape (N, C, H, W) with N >= 1, got {tuple(images.shape)}")
    classes, p_lower = [], []
    for guess, votes in zip(
        _votes(model, images, sigma, n_guess, batch_size, generator),
        _votes(model, images, sigma, n, batch_size, generator),
        strict=True,
    ):
        top = int(guess.argmax())
        classes.append(top)
        p_lower.append(lower_bound(int(votes[top]), n, alpha))
    bound, answer = torch.tensor(p_lower, dtype=torch.float64), torch.tensor(classes)
    sure = bound > 0.5
    radius = sigma * torch.special.ndtri(bound.clamp(0.5, 1 - 1e-12))  # theorem 1 with p_B = 1 - p_A
    return Certificate(torch.where(sure, answer, ABSTAIN), torch.where(sure, radius, 0.0), bound, sigma, alpha)


@torch.no_grad()
def predict(
    model: Model,
    images: torch.Tensor,
    *,
    sigma: float,
    n: int = 100,
    alpha: float = 0.001,
    batch_size: int = 256,
    generator: torch.Generator,
) -> torch.Tensor:
    """(N,) int64 answer of the smoothed classifier, ABSTAIN (-1) where it may be wrong about the majority.

    With probability 1 - alpha an answer is the true majority: a two-sided binomial test between the two classes with
    most votes [cohen2019smoothing, PREDICT in section 3.2.1]. Arguments as for `certify`.
    """
    _check(sigma=sigma, n=n, batch_size=batch_size)
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie in (0, 1), got {alpha}")
    answers = []
    for votes in _votes(model, images, sigma, n, batch_size, generator):
        most, where = votes.topk(2)
        first, second = most.tolist()
        sure = stats.binomtest(first, first + second, 0.5).pvalue <= alpha
        answers.append(int(where[0]) if sure else ABSTAIN)
    return torch.tensor(answers)


def lower_bound(hits: int, n: int, alpha: float) -> float:
    """Clopper-Pearson's exact one-sided lower bound: the truth is below it with probability at most alpha."""
    interval = stats.binomtest(hits, n, alternative="greater").proportion_ci(1 - alpha, method="exact")
    return float(interval.low)


def _noise(images: torch.Tensor, sigma: float, n: int, generator: torch.Generator) -> torch.Tensor:
    """(n, C, H, W) Gaussian noise."""
    return sigma * torch.randn(n, *images.shape[1:], generator=generator, dtype=images.dtype).to(images.device)


def _votes(
    model: Model, images: torch.Tensor, sigma: float, n: int, batch_size: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """(classes,) counts of n votes, image after image, each under noise of its own: batches change nothing."""
    for image in images:
        noise = _noise(images, sigma, n, generator)
        logits = torch.cat([model(image + part) for part in torch.split(noise, batch_size)])  # (n, classes)
        yield torch.bincount(logits.argmax(-1), minlength=logits.shape[-1])


def _check(sigma: float, **counts: int) -> None:
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma must be finite and > 0, got {sigma}")
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {count!r}")
