"""Survey section 2.1: attacks and defenses for Vision Transformers, in the survey's order.

So far the ground the section stands on: the gradient attacks from which the ViT attacks start, adversarial training,
and a defense that only hides its gradients, as the standing example of how not to measure robustness.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F

from safescale_lib.search import pixels
from safescale_lib.search.models import Model
from safescale_lib.survey import technique
from safescale_lib.zoo.adapter import PixelClassifier
from safescale_lib.zoo.training import fit

# The attacks are the plain searches: on pixels, a ViT is a classifier like any other.
fgsm = technique("vfm.vit.adversarial_attack", paper="goodfellow2015fgsm")(pixels.fgsm)
pgd = technique("vfm.vit.adversarial_attack", paper="madry2018pgd")(pixels.pgd)


@technique("vfm.vit.adversarial_defense.adversarial_training", paper="madry2018pgd")
def adversarial_training(
    model: PixelClassifier,
    batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    *,
    eps: float,
    steps: int,
    inner_steps: int = 2,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> PixelClassifier:
    """Fine-tune a copy of the model on the worst images an attacker finds within eps; the model itself stays.

    min over weights of E[ max over |delta| <= eps of loss(x + delta, y) ], equation 2.1 of [madry2018pgd].
    batch: step number -> images (B, 3, S, S) in [0, 1] and labels (B,) int64. eps: linf radius in pixel units, > 0.
    steps: outer updates, >= 1; inner_steps: PGD steps of the inner maximisation. lr: peak learning rate.
    Raises ValueError for a budget that trains nothing.
    """
    if not 0 < eps <= 1:
        raise ValueError(f"eps must lie in (0, 1], got {eps}")
    if steps < 1 or inner_steps < 1:
        raise ValueError(f"steps and inner_steps must be at least 1, got {steps} and {inner_steps}")
    student = copy.deepcopy(model)

    def loss(step: int) -> torch.Tensor:
        images, labels = batch(step)  # (B, 3, S, S), (B,)
        generator = torch.Generator().manual_seed(seed * 1_000_000 + step)
        attacked = pixels.worst_case(student, images, labels, eps=eps, steps=inner_steps, generator=generator)  # inner max
        return F.cross_entropy(student(attacked), labels)  # outer min

    fit(student, loss, steps=steps, lr=lr, warmup=max(1, steps // 10), label="adversarial training", progress=progress)
    return student


def quantise(images: torch.Tensor, levels: int) -> torch.Tensor:
    """Round pixels in [0, 1] to `levels` evenly spaced values, at least 2. The gradient of rounding is zero."""
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    return (images * (levels - 1)).round() / (levels - 1)


@technique("vfm.vit.adversarial_defense", paper="xu2018squeezing")
def quantised_input(model: Model, *, levels: int) -> Model:
    """Show the model coarse pixels only: small changes are to be rounded away [xu2018squeezing].

    Its gradient is zero almost everywhere, so a white-box attack alone will call it robust whether or not it is.
    levels: grey levels a channel, at least 2. Returns a callable with the model's own call.
    """
    quantise(torch.zeros(1), levels)  # refuse bad levels now, not at the first image

    def defended(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(quantise(images, levels))
        return logits

    return defended
