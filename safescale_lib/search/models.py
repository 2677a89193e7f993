"""Leaving a model as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Model = Callable[[torch.Tensor], Any]
"""What a pixel search needs of a model: a callable from images (B, C, H, W) in [0, 1] to outputs."""


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Inside the block the model is in evaluation mode and its weights take no gradients; then all is restored.

    A plain function passes through untouched.
    """
    if not isinstance(model, torch.nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    flags = [(weight, weight.requires_grad) for weight in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for weight, flag in flags:
            weight.requires_grad_(flag)


def straight_through(model: Model, transform: Callable[[torch.Tensor], torch.Tensor]) -> Model:
    """The model behind a transform whose gradient is useless: backwards, the transform counts as the identity.

    Backward pass differentiable approximation (BPDA) in its simplest form, for transforms with transform(x) close
    to x [athalye2018obfuscated]. Forwards the answers are exactly those of model(transform(x)).
    """

    def through(x: torch.Tensor) -> Any:
        return model(transform(x).detach() + (x - x.detach()))

    return through
