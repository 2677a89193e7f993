"""Square attack against two libraries: how much breaks for how many queries, verified on the images that come back.

    .venv-bench/bin/python -m benchmarks.square     # from the repository's root; see benchmarks/README.md

The peers do not say after how many queries an image broke, so every budget is a run of its own, for ours too. The window
shrinks with the share of the budget that is used, so that a short run is no prefix of a long one.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.common import (
    RESULTS,
    Contender,
    Result,
    art_estimator,
    echo,
    inside,
    keep_freed_memory,
    machine,
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
from safescale_lib.measure.intervals import Interval, bootstrap
from safescale_lib.search.models import Model
from safescale_lib.search.queries import square
from safescale_lib.world.scenes import scenes
from safescale_lib.zoo.adapter import PixelClassifier

EPS = 16 / 255
BUDGETS = (10, 30, 100, 300)
SHARE = 40  # images an interleaved turn
OURS, PEERS = "safescale", ("torchattacks", "ART")
THEIRS = 0.8  # share of the image that the first window covers, the default of both peers
DEFAULTS = {OURS: signature(square).parameters["share"].default, "torchattacks": THEIRS, "ART": THEIRS}
SHARES = sorted({0.3, *DEFAULTS.values()})


def safescale(model: PixelClassifier, setting: str, queries: int, seed: int, share: float) -> Contender:
    def call(images: torch.Tensor, labels: torch.Tensor) -> Any:
        return square(
            model, images, Misclassified(labels), eps=EPS, queries=queries, share=share,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    return Contender(OURS, setting, SHARE, call, lambda attack, images, labels: (attack.images, ~attack.survived))


def torchattacks(model: PixelClassifier, setting: str, queries: int, seed: int, share: float) -> Contender:
    from torchattacks import Square

    attack = Square(model, eps=EPS, n_queries=queries, p_init=share, seed=seed)

    def call(images: torch.Tensor, labels: torch.Tensor) -> Any:
        with torch.random.fork_rng():  # it seeds the global generator
            return attack(images, labels)

    return Contender("torchattacks", setting, SHARE, call, lambda attacked, images, labels: (attacked, None))


def art(model: PixelClassifier, setting: str, queries: int, seed: int, share: float) -> Contender:
    from art.attacks.evasion import SquareAttack

    estimator = art_estimator(model, (3, model.side, model.side), len(model.classes))
    attack = SquareAttack(estimator, eps=EPS, max_iter=queries, p_init=share, verbose=False)

    def call(images: torch.Tensor, labels: torch.Tensor) -> Any:
        np.random.seed(seed)  # noqa: NPY002 - the only source it draws from
        return attack.generate(images.numpy(), labels.numpy())

    return Contender("ART", setting, SHARE, call, lambda attacked, images, labels: (torch.from_numpy(attacked), None))


MAKERS = {OURS: safescale, "torchattacks": torchattacks, "ART": art}


def setting(library: str, share: float) -> str:
    return f"{'default: ' if share == DEFAULTS[library] else ''}first window {share}"


def contenders(model: PixelClassifier, queries: int, seed: int) -> list[Contender]:
    """Every library with every first window, so that the settings can be told from the code."""
    return [make(model, setting(library, share), queries, seed, share) for library, make in MAKERS.items() for share in SHARES]


def answers(model: PixelClassifier, queries: int, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Model answers that a run takes per image, in the mean: the clean image and the final check are among them."""
    seen = [0]
    counter = model.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(0, seen[0] + len(inputs[0])))
    counts = {}
    try:
        for each in contenders(model, queries, seed=0):
            seen[0] = 0
            each.call(images, labels)
            counts[each.label] = seen[0] / len(images)
    finally:
        counter.remove()
    return counts


def broken(model: Model, images: torch.Tensor, labels: torch.Tensor, returned: torch.Tensor) -> np.ndarray:
    """(N,) bool: right before, wrong on the returned image."""
    mask: np.ndarray = (right(model, images, labels) & ~right(model, returned, labels)).numpy()
    return mask


def area(curve: np.ndarray, budgets: Sequence[int]) -> np.ndarray:
    """(budgets, ...) success, 0 to 1 -> (...) area under it over the logarithm of the queries, 1 for all at once."""
    at = np.log(np.asarray(budgets, dtype=float))
    under: np.ndarray = np.trapezoid(curve.astype(float), at, axis=0) / (at[-1] - at[0])
    return under


def lead(ours: np.ndarray, peer: np.ndarray, budgets: Sequence[int]) -> Interval:
    """Our area minus the peer's: curves (budgets, seeds, N), bootstrap over the images, seeds averaged."""
    return bootstrap((area(ours, budgets) - area(peer, budgets)).mean(axis=0))


def readings(curves: dict[str, np.ndarray], budgets: Sequence[int], longest: dict[str, Result]) -> list[str]:
    """The goal against each library's better setting; then the same first window, and the time."""
    lines = []
    areas = {label: float(area(curve, budgets).mean()) for label, curve in curves.items()}
    own = f"{OURS}, {setting(OURS, DEFAULTS[OURS])}"
    for library in PEERS:
        best = max((label for label in areas if label.startswith(library)), key=areas.__getitem__)
        ahead = lead(curves[own], curves[best], budgets)
        lines.append(
            f"{word(ahead, 0.0)}: area under the success-query curve, ours at its default {areas[own]:.3f}, {library} at the "
            f"best of its settings ({best.split(', ')[1]}) {areas[best]:.3f}: {show(ahead)} apart. Goal: at least 0."
        )
    for library in PEERS if DEFAULTS[OURS] != THEIRS else ():
        ahead = lead(curves[f"{OURS}, {setting(OURS, THEIRS)}"], curves[f"{library}, {setting(library, THEIRS)}"], budgets)
        lines.append(f"With the same first window of {THEIRS}, ours is ahead of {library} by {show(ahead)}.")
    fastest = min(
        (label for label in longest if not label.startswith(OURS)), key=lambda label: np.median(longest[label].totals)
    )
    ratio = longest[own].ratio_to(longest[fastest])
    lines.append(f"At {budgets[-1]} queries ours is {show(ratio)} times as fast as the fastest peer ({fastest}).")
    return lines


def table(
    curves: dict[str, np.ndarray], budgets: Sequence[int], longest: dict[str, Result], asked: dict[str, float]
) -> dict[str, Any]:
    """The site's table without its title and notes."""
    columns = ["library", "setting", *(f"success at {budget}" for budget in budgets), "area", "model answers an image"]
    columns += [f"seconds at {budgets[-1]}, median [min, max]", "seconds / ours, median [95 % interval]"]
    rows, own = [], f"{OURS}, {setting(OURS, DEFAULTS[OURS])}"
    for label, curve in curves.items():
        result = longest[label]
        rows.append([
            result.contender.library, result.contender.setting, *(f"{share:.3f}" for share in curve.mean(axis=(1, 2))),
            f"{area(curve, budgets).mean():.3f}", f"{asked[label]:.0f}", spread(result.totals),
            show(longest[own].ratio_to(result)),
        ])  # fmt: skip
    return {"columns": columns, "rows": rows, "readings": readings(curves, budgets, longest)}


def notes(n: int, seeds: int, budgets: Sequence[int]) -> list[str]:
    return [
        f"Square attack in the linf ball of eps 16/255 on the zoo's ViT, {n} test scenes in parts of {SHARE}, {seeds} seeds. "
        f"Peers: {releases(*PEERS)}.",
        "Every budget is a run of its own. A success is verified: the model was right before and errs on the returned image, "
        f"whose distance is measured anew. The area is taken over the logarithm of the queries, from {budgets[0]} to "
        f"{budgets[-1]}; its interval over the images, seeds averaged.",
        f"First window: the share of the image that the first square covers, {DEFAULTS[OURS]} by our default, {THEIRS} by the "
        "peers'. Each library runs with the same shares, so that the settings can be told from the code.",
        "A budget is what the library calls so: ours counts every answer; torchattacks does not count the stripes it begins "
        "with; ART asks three times an iteration and is given as many iterations as the others queries. The model answers per "
        f"image (at {budgets[-1]}, clean image and final check included) say what that comes to.",
        f"Ours asks of 8-bit images only, the peers of raw floats. Seconds: {seeds} seeds are as many interleaved repeats; on "
        "each part all contenders run in turn, in an order shuffled each time.",
    ]


def main(
    seeds: Annotated[int, typer.Option(min=1, help="seeds, each a repeat; at least 5 for timings to keep")] = 5,
    images: Annotated[int, typer.Option(min=2, help="test scenes")] = 80,
    threads: Annotated[int, typer.Option(min=1, help="threads of every contender")] = 1,
    longest: Annotated[int, typer.Option(min=11, help="largest budget; smaller ones stay as they are")] = BUDGETS[-1],
    out: Annotated[Path, typer.Option(help="where the table goes")] = RESULTS / "square.json",
) -> None:
    """Measure, print and write the table."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    about = machine(threads)
    model, drawn = zoo.load("vit"), scenes(images, split="test", seed=1)
    budgets = (*(budget for budget in BUDGETS if budget < longest), longest)
    found: dict[str, list[list[np.ndarray]]] = {}  # per contender: budgets, seeds, (N,)
    last: dict[str, list[Result]] = {}  # per contender: the longest run of each seed
    for place, budget in enumerate(budgets):
        for seed in range(seeds):
            results = run(model, contenders(model, budget, seed), drawn.images, drawn.labels, 1, SHARE, seed)
            for label, result in results.items():
                curve = found.setdefault(label, [[] for _ in budgets])
                returned = inside(drawn.images, result.returned, EPS, label)
                curve[place].append(broken(model, drawn.images, drawn.labels, returned))
                if budget == budgets[-1]:
                    last.setdefault(label, []).append(result)
    timed = {
        label: Result(each[0].contender, np.concatenate([one.times for one in each]), each[0].returned, None)
        for label, each in last.items()
    }
    curves = {label: np.array(curve) for label, curve in found.items()}
    asked = answers(model, budgets[-1], drawn.images[:SHARE], drawn.labels[:SHARE])
    heading = {
        "title": "Square attack against torchattacks and ART",
        "machine": about,
        "notes": notes(images, seeds, budgets),
    }
    report = {**heading, **table(curves, budgets, timed, asked)}
    write(report, out)
    echo(report)


if __name__ == "__main__":
    typer.run(main)
