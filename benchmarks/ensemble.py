"""Our ensemble of attacks against AutoAttack as torchattacks ships it: robust accuracy, and the time to know it.

    .venv-bench/bin/python -m benchmarks.ensemble       # from the repository's root; see benchmarks/README.md

AutoAttack takes minutes where much stands, for its Square spends 5,000 queries on every image that no gradient broke. So
that the turns stay short, every part of the scenes is one interleaved turn, and the parts stand in for repeats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.common import (
    RESULTS,
    Contender,
    Result,
    echo,
    inside,
    keep_freed_memory,
    machine,
    of,
    releases,
    right,
    run,
    show,
    spread,
    word,
    write,
)  # fmt: skip
from safescale_lib import zoo
from safescale_lib.measure.criteria import Misclassified
from safescale_lib.search.auto import auto_ensemble
from safescale_lib.world.scenes import scenes
from safescale_lib.zoo.adapter import PixelClassifier

CASES = {"vit, eps 8/255": 8 / 255, "vit-robust, eps 8/255": 8 / 255, "vit-robust, eps 16/255": 16 / 255}
FULL = ("vit, eps 8/255",)  # with all settings of the peer; elsewhere its fastest only, which takes minutes
OURS, FILE, RAW, EVERY = "safescale", "default: 8-bit images", "raw floats", "every wrong class"
FASTER, APART = 2.0, 0.01  # goals: at least twice as fast; robust accuracy at most one point above


def safescale(
    model: PixelClassifier, setting: str, eps: float, batch: int, *, grid: int | None = 255, targets: int = 3
) -> Contender:
    def call(images: torch.Tensor, labels: torch.Tensor) -> Any:
        generator = torch.Generator().manual_seed(0)
        return auto_ensemble(model, images, Misclassified(labels), eps=eps, grid=grid, targets=targets, generator=generator)

    return Contender(OURS, setting, batch, call, lambda attack, images, labels: (attack.images, ~attack.survived))


def torchattacks(model: PixelClassifier, setting: str, eps: float, batch: int, *, freeze: bool, classes: int = 10) -> Contender:
    """The standard version: APGD-CE, targeted APGD, targeted FAB, Square; gives no verdict."""
    from torchattacks import AutoAttack

    attack = AutoAttack(model, eps=eps, version="standard", n_classes=classes, seed=0)

    def call(images: torch.Tensor, labels: torch.Tensor) -> Any:
        with torch.random.fork_rng():  # it seeds the global generator
            return attack(images, labels)

    return Contender("torchattacks", setting, batch, call, lambda attacked, images, labels: (attacked, None), freeze)


def reading(case: str, stands: dict[str, np.ndarray], results: dict[str, Result], setting: str = FILE) -> str:
    """The goal: as much broken as by the strongest setting of the peer, in half the time of its fastest."""
    own = f"{OURS}, {setting}"
    peers = [label for label in results if not label.startswith(OURS)]
    fastest = min(peers, key=lambda label: float(np.median(results[label].totals)))
    strongest = min(peers, key=lambda label: float(stands[label].mean()))
    ratio, above = results[own].ratio_to(results[fastest]), float(stands[own].mean() - stands[strongest].mean())
    outcome = word(ratio, FASTER, holds=above <= APART + 1e-9)
    return (
        f"{outcome}: {case}: ours ({setting}) leaves {stands[own].mean():.4f} standing, AutoAttack at its strongest setting "
        f"{stands[strongest].mean():.4f}, {100 * above:+.2f} points; ours is {show(ratio)} times as fast as the fastest "
        f"({fastest}). Goal: at most {100 * APART:.0f} point above, at least {FASTER:.0f} times as fast."
    )


def rows(case: str, stands: dict[str, np.ndarray], results: dict[str, Result]) -> tuple[list[str], list[list[Any]]]:
    found: list[list[Any]] = []
    cells: dict[str, Any] = {}
    own = f"{OURS}, {FILE}"
    for label, result in results.items():
        cells = {
            "model and budget": case,
            "library": result.contender.library,
            "setting": result.contender.setting,
            "robust accuracy": f"{stands[label].mean():.4f}",
            "broken that ours left": of(stands[own] & ~stands[label]),
            "left that ours broke": of(stands[label] & ~stands[own]),
            "seconds a part, median [min, max]": spread(result.times.ravel()),
            "seconds / ours, median [95 % interval]": show(results[own].ratio_to(result)),
        }
        found.append(list(cells.values()))
    return list(cells), found


def notes(n: int, part: int, classes: int) -> list[str]:
    return [
        f"{n} test scenes in parts of {part}; on each part all contenders run once, in an order shuffled each time, and the "
        f"ratios are taken part by part: {-(-n // part)} interleaved turns a case. Peer: {releases('torchattacks')}.",
        "Ours: `auto_ensemble` as it comes, 8-bit images; Auto-PGD on the cross-entropy (50 steps), on the targeted DLR "
        "towards 3 classes (50 steps each), Square with 300 queries. "
        "'every wrong class' aims at all the others instead of 3. 'raw floats' is `grid=None`, as the peer works.",
        "torchattacks: `AutoAttack(version='standard')`, which is Auto-PGD, targeted Auto-PGD and targeted FAB of 10 steps "
        "each and Square with 5,000 queries. By default it supposes 10 classes, so that it aims at the 9 likeliest wrong "
        f"ones, as in the paper; told of all {classes} it takes longer. On the robust model only its fastest setting runs. "
        "Seed 0 for all.",
        "Robust accuracy: the share of returned images that the model classifies rightly, their budget measured anew.",
    ]


def main(
    images: Annotated[int, typer.Option(min=2, help="test scenes")] = 100,
    part: Annotated[int, typer.Option(min=1, help="scenes an interleaved turn; at least 5 parts for a result to keep")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="threads of every contender")] = 1,
    out: Annotated[Path, typer.Option(help="where the table goes")] = RESULTS / "ensemble.json",
) -> None:
    """Measure, print and write the table."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    about, drawn = machine(threads), scenes(images, split="test", seed=1)
    columns: list[str] = []
    lines: list[list[Any]] = []
    readings: list[str] = []
    classes = 0
    for case, eps in CASES.items():
        model = zoo.load(case.split(",")[0])
        classes = len(model.classes)
        contenders = [
            safescale(model, FILE, eps, part),
            safescale(model, RAW, eps, part, grid=None),
            torchattacks(model, "weights without gradients", eps, part, freeze=True),
        ]
        if case in FULL:
            contenders.append(safescale(model, EVERY, eps, part, targets=classes - 1))
            contenders.append(torchattacks(model, "default", eps, part, freeze=False))
            contenders.append(torchattacks(model, f"told of {classes} classes", eps, part, freeze=True, classes=classes))
        typer.echo(case)
        results = run(model, contenders, drawn.images, drawn.labels, 1, part)
        stands = {
            label: right(model, inside(drawn.images, result.returned, eps, label), drawn.labels).numpy()
            for label, result in results.items()
        }
        columns, found = rows(case, stands, results)
        lines += found
        readings.append(reading(case, stands, results))
        if case in FULL:
            readings.append(reading(case, stands, results, EVERY))
    report = {
        "title": "Ensemble of attacks against AutoAttack of torchattacks",
        "machine": about,
        "notes": notes(images, part, classes),
        "columns": columns,
        "rows": lines,
        "readings": readings,
    }
    write(report, out)
    echo(report)


if __name__ == "__main__":
    typer.run(main)
