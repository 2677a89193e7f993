"""Survey section 2.2, adversarial defenses of the Segment Anything Model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from safescale_lib.measure.masks import mask_error
from safescale_lib.survey import technique
from safescale_lib.zoo.segmenter import PixelSegmenter, worst_masks
from safescale_lib.zoo.training import fit

Task = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Images (B, 3, S, S) in [0, 1], a point on an object of each (B, 2), and that object's mask (B, S, S) bool."""


@technique("vfm.sam.adversarial_defense.adversarial_tuning", paper="li2024asam")
def adversarial_tuning(
    model: PixelSegmenter,
    batch: Callable[[int], Task],
    *,
    eps: float,
    steps: int,
    inner_steps: int = 2,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> PixelSegmenter:
    """Tune a copy of the image encoder on images attacked during tuning; prompt encoder and decoder stay as they are.

    min over encoder weights of E[ max over |delta| <= eps of mask error(x + delta, prompt, truth) ]. batch: step number ->
    task. eps: linf radius in pixel units, > 0. steps: outer updates; inner_steps: PGD steps of the inner maximisation.
    Deviations: [li2024asam] makes its adversarial examples with a diffusion model and tunes the decoder's output tokens, for
    accuracy on natural images; the examples here are of the kind the attacks use, as in [long2025robustsam], which tunes
    singular values only. Raises ValueError for a budget that trains nothing.
    """
    if not 0 < eps <= 1:
        raise ValueError(f"eps must lie in (0, 1], got {eps}")
    if steps < 1 or inner_steps < 1:
        raise ValueError(f"steps and inner_steps must be at least 1, got {steps} and {inner_steps}")
    student = copy.deepcopy(model)
    wanted = [weight.requires_grad for weight in student.parameters()]
    student.requires_grad_(False)
    student.model.vision_encoder.requires_grad_(True)

    def loss(step: int) -> torch.Tensor:
        images, points, truth = batch(step)
        generator = torch.Generator().manual_seed(seed * 1_000_000 + step)
        attacked = worst_masks(student, images, points, truth, eps=eps, steps=inner_steps, generator=generator)  # inner max
        return mask_error(student.decode(student(attacked), points), truth).mean()  # outer min

    fit(student, loss, steps=steps, lr=lr, warmup=max(1, steps // 10), label="adversarial tuning", progress=progress)
    for weight, flag in zip(student.parameters(), wanted, strict=True):
        weight.requires_grad_(flag)
    return student
