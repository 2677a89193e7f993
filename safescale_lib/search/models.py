"""Leaving a model as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

Model = Callable[[torch.Tensor], Any]
"""What a pixel search needs of a model: a callable from images (B, C, H, W) in [0, 1] to outputs."""


@dataclass
class _Held:
    """A module's mode or a weight's gradient flag as it was found, and how many blocks rely on it being changed."""

    part: torch.nn.Module | torch.nn.Parameter
    found: bool
    users: int = 0

    def put(self, value: bool) -> None:
        """To set what is set already would cost as much as a small model's forward pass."""
        if isinstance(self.part, torch.nn.Module):
            if self.part.training != value:
                self.part.training = value
        elif self.part.requires_grad != value:
            self.part.requires_grad_(value)


_HELD: dict[int, _Held] = {}
_LOCK = Lock()


@contextmanager
def frozen(model: Model) -> Iterator[None]:
    """Inside the block the model is in evaluation mode and its weights take no gradients; then all is restored.

    Blocks may overlap, also from two threads: what they share is restored when the last of them ends. A plain function
    passes through untouched.
    """
    if not isinstance(model, torch.nn.Module):
        yield
        return
    parts: list[torch.nn.Module | torch.nn.Parameter] = [*model.modules(), *model.parameters()]
    with _LOCK:
        for part in parts:
            found = part.training if isinstance(part, torch.nn.Module) else part.requires_grad
            _HELD.setdefault(id(part), _Held(part, found)).users += 1
            _HELD[id(part)].put(False)
    try:
        yield
    finally:
        with _LOCK:
            for part in parts:
                held = _HELD[id(part)]
                held.users -= 1
                if not held.users:
                    held.put(held.found)
                    del _HELD[id(part)]


_OPEN: ContextVar[frozenset[object]] = ContextVar("_OPEN", default=frozenset())


@contextmanager
def hooked(*hooks: tuple[Callable[[Callable[..., Any]], Any], Callable[..., Any]]) -> Iterator[None]:
    """Inside the block hooks are on, for what the block itself does: a job beside it may share the model and sees nothing.

    hooks: pairs of what registers a hook, such as `layer.register_forward_hook`, and the hook. Jobs that are started inside
    the block by `side_by_side` belong to it.
    """
    block = object()

    def only_here(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: hook(*given, **named) if block in _OPEN.get() else None

    token = _OPEN.set(_OPEN.get() | {block})
    handles = [register(only_here(hook)) for register, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _OPEN.reset(token)


def within_hooks() -> bool:
    """Whether this code stands in a block of `hooked`: a model may answer otherwise than it would alone."""
    return bool(_OPEN.get())


def straight_through(model: Model, transform: Callable[[torch.Tensor], torch.Tensor]) -> Model:
    """The model behind a transform whose gradient is useless: backwards, the transform counts as the identity.

    Backward pass differentiable approximation (BPDA) in its simplest form, for transforms with transform(x) close
    to x [athalye2018obfuscated]. Forwards the answers are exactly those of model(transform(x)).
    """

    def through(x: torch.Tensor) -> Any:
        with torch.no_grad():
            changed = transform(x)
        return model(changed + (x - x.detach()))

    return through
