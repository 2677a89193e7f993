"""One training loop for every recipe: seeded, with a progress bar, and killable at any moment.

Nothing random is remembered between steps. A recipe computes step t's batch from (seed, t) alone, so the state is the
weights, the buffers (running means), AdamW's two moments and t, in one safetensors file, written aside and renamed.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

import torch
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file

from safescale_lib.measure.costs import Cost
from safescale_lib.zoo import memory

T = TypeVar("T")
Terms = Sequence[Callable[[], torch.Tensor]]
"""A loss as functions that may be worked out at the same time; they are summed."""


def fit(
    model: torch.nn.Module,
    loss: Callable[[int], torch.Tensor | Terms],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.05,
    warmup: int = 200,
    state: Path | None = None,
    settings: dict[str, object] | None = None,
    save_every: float = 20.0,
    label: str = "training",
    progress: bool = True,
    threads: int = 1,
) -> float:
    """Minimise loss(step) over the model's weights, in place; returns the seconds spent, over all resumed runs.

    AdamW, linear warm-up over `warmup` steps, then a cosine to zero, gradient norm clipped at 1.
    loss: step number -> scalar; everything random in it comes from that number. Terms that have nothing in common but the
    weights may come as functions, () -> scalar each, and are worked out side by side; their sum counts.
    state: file to resume from and to save to every `save_every` seconds; None keeps nothing. settings: what the run depends
    on; a state written under other settings is refused with ValueError. threads: of the CPU while it trains; sums differ in
    their last bit between 1 and 2, and training amplifies that, so the number must not depend on who calls.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    fingerprint = json.dumps({"steps": steps, "lr": lr, **(settings or {})}, sort_keys=True, default=str)
    buffers = dict(model.named_buffers())
    first, before = _resume(state, weights, buffers, optimizer, fingerprint) if state and state.exists() else (0, 0.0)
    begun = saved = time.perf_counter()
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    was_training = model.training
    model.train()
    with _threads(threads), Progress(*columns, disable=not progress) as bar:
        task = bar.add_task(label, total=steps, completed=first, loss=float("nan"))
        for step in range(first, steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
            value = _slope(loss(step), weights)
            torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
            optimizer.step()
            bar.update(task, advance=1, loss=value.item())
            now = time.perf_counter()
            if state and now - saved > save_every:
                _save(state, weights, buffers, optimizer, step + 1, before + now - begun, fingerprint)
                saved = now
    model.train(was_training)
    return before + time.perf_counter() - begun


def _slope(loss: torch.Tensor | Terms, weights: dict[str, torch.nn.Parameter]) -> torch.Tensor:
    """Give the weights their gradients; returns the loss. Sums go in the order of the terms, however those are run."""
    if isinstance(loss, torch.Tensor):
        for weight in weights.values():
            weight.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def taken(term: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        value = term()
        return value.detach(), torch.autograd.grad(value, list(weights.values()), allow_unused=True)

    jobs = [partial(taken, term) for term in loss]
    done = [job() for job in jobs] if len(jobs) == 1 or memory.beside() else side_by_side(*jobs)
    for weight, *parts in zip(weights.values(), *(slopes for _, slopes in done), strict=True):
        known = [part for part in parts if part is not None]
        weight.grad = sum(known[1:], start=known[0]) if known else None
    return torch.stack([value for value, _ in done]).sum()


_DICE = Lock()  # torch has one global stream; two trainings may begin at once


@contextmanager
def own_dice(seed: int | None = None) -> Iterator[None]:
    """For what draws from torch's global stream, such as the first weights of a class: that stream is left as it was found.

    seed: what the block draws from; None where it does not matter, because it is overwritten. One block at a time.
    """
    with _DICE, torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


def side_by_side(*jobs: Callable[[], T]) -> list[T]:
    """Run independent trainings or attacks two at a time; returns their results in the order given.

    On two cores two small models take little more than the time of one; a second torch thread inside one of them
    gains nothing. The last job begins first: among attacks the one that adapts takes longest and mostly comes last, and
    should not be left alone at the end. Each job must own what it changes: train copies, draw from generators of its own.
    Attacks may share a model that they only read (`frozen`) or listen to by hooks of their own (`hooked`).
    """
    ready, together = memory.apart(jobs)  # each in a copy of this context: it belongs to the blocks it was started in
    with _threads(1), ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(job) for job in reversed(ready)]
        results = [run.result() for run in reversed(runs)]
    together()
    return results


def in_halves(attack_on: Callable[..., T], items: Sequence[Any], *, seed: int = 0) -> T:
    """An attack on every second item and one on the others, side by side, as one result in the order given.

    attack_on: (items, generator=...) -> a dataclass whose fields have one entry an item: tuples and tensors (n,), and
    histories (steps, n), of which the shorter one goes on level; costs are added. Each half gets random numbers of its
    own, so that it does not matter which of the two is faster. Raises ValueError for fewer than two items.
    """
    if len(items) < 2:
        raise ValueError(f"items must be at least two to be halved, got {len(items)}")
    jobs = (partial(attack_on, items[i::2], generator=torch.Generator().manual_seed(2 * seed + i)) for i in (0, 1))
    halves = side_by_side(*jobs)
    order = torch.tensor([*range(0, len(items), 2), *range(1, len(items), 2)]).argsort()
    one: Any = halves[0]
    return type(halves[0])(**{f.name: _joined(*(getattr(half, f.name) for half in halves), order=order) for f in fields(one)})


def _joined(first: Any, second: Any, *, order: torch.Tensor) -> Any:
    if isinstance(first, Cost):
        return first + second
    if not isinstance(first, torch.Tensor):
        rows = [*first, *second]
        return tuple(rows[i] for i in order.tolist())
    if first.ndim == 1:
        return torch.cat([first, second])[order]
    most = max(len(first), len(second))
    return torch.cat([torch.cat([h, h[-1:].expand(most - len(h), -1)]) for h in (first, second)], dim=1)[:, order]


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _save(
    state: Path,
    weights: dict[str, torch.nn.Parameter],
    buffers: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
    fingerprint: str,
) -> None:
    tensors: dict[str, torch.Tensor] = {f"buffer.{name}": buffer for name, buffer in buffers.items()}
    for name, weight in weights.items():
        moments = optimizer.state[weight]
        tensors |= {
            f"weight.{name}": weight.detach(),
            f"first.{name}": moments["exp_avg"],
            f"second.{name}": moments["exp_avg_sq"],
        }
    aside = state.with_suffix(".partial")
    metadata = {"step": str(step), "seconds": str(seconds), "settings": fingerprint}
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, aside, metadata)
    os.replace(aside, state)


def _resume(
    state: Path,
    weights: dict[str, torch.nn.Parameter],
    buffers: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
) -> tuple[int, float]:
    with safe_open(state, framework="pt") as file:
        metadata = file.metadata()
        if metadata["settings"] != fingerprint:
            raise ValueError(
                f"{state.name} belongs to a run with other settings; delete it to start afresh.\n"
                f"  there: {metadata['settings']}\n  here:  {fingerprint}"
            )
        step = int(metadata["step"])
        with torch.no_grad():
            for name, buffer in buffers.items():
                buffer.copy_(file.get_tensor(f"buffer.{name}"))
            for name, weight in weights.items():
                weight.copy_(file.get_tensor(f"weight.{name}"))
                optimizer.state[weight] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": file.get_tensor(f"first.{name}").to(weight.device),
                    "exp_avg_sq": file.get_tensor(f"second.{name}").to(weight.device),
                }
    return step, float(metadata["seconds"])
