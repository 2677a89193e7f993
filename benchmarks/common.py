"""What the benchmarks share: contenders, the interleaved run, one judge for all, and what the times depend on.

The images are dealt into parts; on each part every contender runs once, in an order shuffled each time, so that a
disturbance of the machine falls on all alike, and ratios are taken part by part.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from rich.progress import Progress

from safescale_lib.measure.intervals import Interval, bootstrap
from safescale_lib.search.models import Model

PART = 128  # images an interleaved turn, unless a benchmark says otherwise
RESULTS = Path(__file__).parent / "results"
Attack = Callable[[torch.Tensor, torch.Tensor], Any]
Answer = tuple[torch.Tensor, torch.Tensor | None]


@dataclass(frozen=True)
class Contender:
    """One library in one setting.

    call: what is timed, from images (N, C, H, W) and labels (N,) to the library's answer. unpack: the answer, images
    and labels -> what it returned for each item (attacked images, or a detector's scores) and, where there is a verdict,
    (N,) bool: which items the library counts as broken, or flags. batch: images a forward pass. freeze: the caller lets
    the weights take no gradients. repeats: run in the first so many only, for one that takes too long to run in all.
    """

    library: str
    setting: str
    batch: int
    call: Attack
    unpack: Callable[[Any, torch.Tensor, torch.Tensor], Answer]
    freeze: bool = False
    repeats: int | None = None

    @property
    def label(self) -> str:
        return f"{self.library}, {self.setting}"


def batches(images: torch.Tensor, labels: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(torch.split(images, size), torch.split(labels, size), strict=True))


def right(model: Model, images: torch.Tensor, labels: torch.Tensor, batch: int = PART) -> torch.Tensor:
    """The judge: (N,) bool, the model names the true class."""
    with torch.no_grad():
        return torch.cat([model(x).argmax(dim=1) == y for x, y in batches(images, labels, batch)])


def inside(images: torch.Tensor, returned: torch.Tensor, eps: float, who: str) -> torch.Tensor:
    """returned, after its linf budget has been measured anew; ValueError where it is exceeded or not a picture."""
    excess = float((returned - images).abs().max()) - eps
    if not excess <= 1e-6 or returned.min() < 0 or returned.max() > 1:
        raise ValueError(f"{who} must keep the budget, it is exceeded by {excess:.3g}")
    return returned


def seconds(model: torch.nn.Module, contender: Contender, images: torch.Tensor, labels: torch.Tensor) -> tuple[float, Any]:
    """Wall time of one call and its answer."""
    for weight in model.parameters():
        weight.requires_grad_(not contender.freeze)
        weight.grad = None
    gc.collect()
    begun = time.perf_counter()
    answer = contender.call(images, labels)
    return time.perf_counter() - begun, answer


@dataclass(frozen=True)
class Result:
    """What one contender did.

    times: (repeats, parts) seconds, NaN where it did not run. returned, verdict: over all parts, in order, first repeat.
    """

    contender: Contender
    times: np.ndarray
    returned: torch.Tensor
    verdict: torch.Tensor | None

    @property
    def totals(self) -> np.ndarray:
        """(whole repeats,) seconds over all parts."""
        whole = self.times[~np.isnan(self.times).any(axis=1)]
        totals: np.ndarray = whole.sum(axis=1)
        return totals

    def ratio_to(self, other: Result) -> Interval:
        """How many times this one's seconds the other needs: median over repeats and parts, 95 % bootstrap interval."""
        ratios = (other.times / self.times).ravel()
        return bootstrap(ratios[~np.isnan(ratios)], np.median)


def run(
    model: torch.nn.Module,
    contenders: list[Contender],
    images: torch.Tensor,
    labels: torch.Tensor,
    repeats: int,
    part_size: int = PART,
    seed: int = 0,
) -> dict[str, Result]:
    """Every contender on every part in every repeat, the order shuffled from turn to turn."""
    parts, order = batches(images, labels, part_size), np.random.default_rng(seed)
    times = np.full((len(contenders), repeats, len(parts)), np.nan)
    answers: dict[tuple[int, int], Answer] = {}
    with Progress() as bar:
        job = bar.add_task("attacks", total=times.size)
        for turn in range(repeats * len(parts)):
            repeat, part = divmod(turn, len(parts))
            for who in order.permutation(len(contenders)):
                bar.advance(job)
                if repeat >= (contenders[who].repeats or repeats):
                    continue
                times[who, repeat, part], answer = seconds(model, contenders[who], *parts[part])
                if repeat == 0:
                    answers[who, part] = contenders[who].unpack(answer, *parts[part])
            if part == len(parts) - 1:
                spent = ", ".join(
                    f"{c.label} {s:.1f} s" for c, s in zip(contenders, times[:, repeat].sum(axis=1), strict=True) if s == s
                )
                bar.console.print(f"repeat {repeat + 1}: {spent}")
    results = {}
    for who, contender in enumerate(contenders):
        returned, verdicts = zip(*(answers[who, part] for part in range(len(parts))), strict=True)
        verdict = None if verdicts[0] is None else torch.cat(verdicts)
        results[contender.label] = Result(contender, times[who], torch.cat(returned).detach(), verdict)
    return results


def word(measured: Interval, goal: float, *, holds: bool = True) -> str:
    """How a goal of `at least` came out: won or lost where the whole interval lies on one side of it, else level.

    holds: a second condition, without which the goal is lost whatever the interval.
    """
    return "LOST" if measured.high < goal or not holds else "won" if measured.low >= goal else "level"


def negative(interval: Interval) -> Interval:
    """For `word` where the goal is `at most`: the same interval seen from the other side."""
    return Interval(-interval.value, -interval.high, -interval.low, interval.n)


def ratio_of_means(above: np.ndarray, below: np.ndarray) -> Interval:
    """mean(above) / mean(below) over the same items (N,), with the bootstrap interval of the pairs."""

    def ratio(rows: np.ndarray, axis: int) -> np.ndarray:
        chosen = rows.astype(int)
        quotient: np.ndarray = above[chosen].mean(axis=axis) / below[chosen].mean(axis=axis)
        return quotient

    return bootstrap(np.arange(len(above)), ratio)


def show(interval: Interval) -> str:
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def spread(seconds: np.ndarray) -> str:
    return f"{np.median(seconds):.2f} [{seconds.min():.2f}, {seconds.max():.2f}]"


def of(hits: torch.Tensor | np.ndarray) -> str:
    return f"{int(hits.sum())} of {len(hits)}"


def art_estimator(model: torch.nn.Module, inputs: tuple[int, ...], classes: int) -> Any:
    """The model as ART wants it. inputs: shape of one item."""
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        model, loss=torch.nn.CrossEntropyLoss(), input_shape=inputs, nb_classes=classes, clip_values=(0.0, 1.0),
        device_type="cpu",
    )  # fmt: skip


def art_verdict(estimator: Any, images: torch.Tensor, labels: torch.Tensor, attacked: np.ndarray, batch: int) -> torch.Tensor:
    """(N,) bool: which items ART's `compute_success_array` counts as broken."""
    from art.utils import compute_success_array

    onehot = np.eye(estimator.nb_classes)[labels.numpy()]
    return torch.from_numpy(compute_success_array(estimator, images.numpy(), onehot, attacked, batch_size=batch))


PACKAGES = {"ART": "adversarial-robustness-toolbox"}


def releases(*libraries: str) -> str:
    return ", ".join(f"{library} {version(PACKAGES.get(library, library))}" for library in libraries)


def keep_freed_memory() -> None:
    """Ask glibc never to hand freed memory back to the system; elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt:
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap
        mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap too


def machine(threads: int) -> str:
    """What the times depend on; no host name, no path."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    load = f", load average {os.getloadavg()[0]:.1f} before the start" if hasattr(os, "getloadavg") else ""
    return (
        f"{threads} thread{'s' * (threads > 1)} of {model} ({os.cpu_count()} cores), {platform.system()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {version('transformers')}{load}"
    )


def write(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(json.dumps(report, indent=2) + "\n")
    os.replace(aside, path)


def echo(report: dict[str, Any]) -> None:
    """Print a table and what to read in it."""
    for row in [report["columns"], *report["rows"]]:
        typer.echo(" | ".join(map(str, row)))
    for line in report["readings"]:
        typer.echo(line)
