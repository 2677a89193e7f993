"""PGD against three attack libraries: the same model, images, budget and fixed start, one interleaved run.

    .venv-bench/bin/python -m benchmarks.pgd        # from the repository's root; see benchmarks/README.md

Every library returns images; one judge, ours, asks the model about all of them in the same way. Times cover the call
of the attack and nothing around it. The images are dealt into parts; on each part every contender runs once, in an
order shuffled each time, so that a disturbance of the machine falls on all alike, and ratios are taken part by part.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.common import (
    PART,
    RESULTS,
    Answer,
    Contender,
    Result,
    art_estimator,
    art_verdict,
    batches,
    echo,
    inside,
    keep_freed_memory,
    machine,
    releases,
    right,
    run,
    seconds,
    show,
    spread,
    word,
    write,
)  # fmt: skip
from safescale_lib import zoo
from safescale_lib.measure.criteria import Misclassified
from safescale_lib.search.ball import Ball
from safescale_lib.search.models import frozen
from safescale_lib.search.objectives import cross_entropy
from safescale_lib.search.pixels import ascend, pgd
from safescale_lib.world.scenes import scenes
from safescale_lib.zoo.adapter import PixelClassifier

EPS, STEP_SIZE, STEPS = 8 / 255, 2 / 255, 20
BATCHES = (32, 64, 128)
OURS, PEERS = "safescale", ("torchattacks", "foolbox", "ART")
BARE, EQUAL, EARLY = "ascent alone, no verdict", "every step, with verdict", "early removal, with verdict"


def bare(model: PixelClassifier, batch: int, steps: int = STEPS) -> Contender:
    """Only the ascent inside `pgd`: every image moved to the end, nothing asked of the model before or after."""

    def climb(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        goal = Misclassified(y)
        return ascend(
            model, x, x, lambda logits, live: cross_entropy(goal, logits, live), Ball(EPS, grid=None), steps=steps,
            step_size=STEP_SIZE,
        )  # fmt: skip

    def call(images: torch.Tensor, labels: torch.Tensor) -> Any:
        with frozen(model):
            return torch.cat([climb(x, y) for x, y in batches(images, labels, batch)])

    return Contender(OURS, BARE, batch, call, lambda attacked, images, labels: (attacked, None))


def safescale(model: PixelClassifier, setting: str, batch: int, *, early_removal: bool, grid: int | None) -> Contender:
    def call(images: torch.Tensor, labels: torch.Tensor) -> Any:
        return pgd(
            model, images, Misclassified(labels), eps=EPS, steps=STEPS, step_size=STEP_SIZE, random_start=False,
            early_removal=early_removal, grid=grid, batch_size=batch,
        )  # fmt: skip

    return Contender(OURS, setting, batch, call, lambda attack, images, labels: (attack.images, ~attack.survived))


def torchattacks(
    model: PixelClassifier, setting: str, batch: int, *, freeze: bool, steps: int = STEPS, verdict: bool = False
) -> Contender:
    """https://adversarial-attacks-pytorch.readthedocs.io: takes one batch a call and gives no verdict.

    verdict: the caller asks the model about the images, as the library's own `save` does, and that is timed too.
    """
    from torchattacks import PGD

    attack = PGD(model, eps=EPS, alpha=STEP_SIZE, steps=steps, random_start=False)

    def call(images: torch.Tensor, labels: torch.Tensor) -> Any:
        attacked = torch.cat([attack(x, y) for x, y in batches(images, labels, batch)])
        return attacked, ~right(model, attacked, labels, batch) if verdict else None

    return Contender("torchattacks", setting, batch, call, lambda answer, images, labels: answer, freeze)


def foolbox(model: PixelClassifier, setting: str, batch: int, *, freeze: bool, steps: int = STEPS) -> Contender:
    """https://foolbox.readthedocs.io: takes one batch a call; labels stand for its Misclassification criterion."""
    from foolbox import PyTorchModel
    from foolbox.attacks import LinfProjectedGradientDescentAttack

    wrapped = PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = LinfProjectedGradientDescentAttack(abs_stepsize=STEP_SIZE, steps=steps, random_start=False)

    def call(images: torch.Tensor, labels: torch.Tensor) -> Any:
        return [attack(wrapped, x, y, epsilons=EPS)[1:] for x, y in batches(images, labels, batch)]  # clipped, verdict

    def unpack(answer: Any, images: torch.Tensor, labels: torch.Tensor) -> Answer:
        return torch.cat([clipped for clipped, _ in answer]), torch.cat([verdict for _, verdict in answer])

    return Contender("foolbox", setting, batch, call, unpack, freeze)


def art(model: PixelClassifier, setting: str, batch: int, *, freeze: bool, steps: int = STEPS) -> Contender:
    """https://adversarial-robustness-toolbox.readthedocs.io: batches by itself; its verdict is `compute_success`."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch

    estimator = art_estimator(model, (3, model.side, model.side), len(model.classes))
    attack = ProjectedGradientDescentPyTorch(
        estimator, norm=np.inf, eps=EPS, eps_step=STEP_SIZE, max_iter=steps, num_random_init=0, batch_size=batch, verbose=False
    )

    def unpack(answer: Any, images: torch.Tensor, labels: torch.Tensor) -> Answer:
        return torch.from_numpy(answer), art_verdict(estimator, images, labels, answer, batch)

    return Contender("ART", setting, batch, lambda x, y: attack.generate(x.numpy(), y.numpy()), unpack, freeze)


MAKERS: dict[str, Callable[..., Contender]] = {"torchattacks": torchattacks, "foolbox": foolbox, "ART": art}


def best_batch(model: PixelClassifier, images: torch.Tensor, labels: torch.Tensor) -> int:
    """The batch size at which the three peers together are fastest in short runs, best of three; ours is not asked."""
    short = [[MAKERS[peer](model, "", batch, freeze=True, steps=4) for peer in PEERS] for batch in BATCHES]
    rounds = [[[seconds(model, each, images, labels)[0] for each in same] for same in short] for _ in range(3)]
    spent = np.array(rounds).min(axis=0).sum(axis=1)  # rounds, batches, peers -> batches
    for batch, total in zip(BATCHES, spent, strict=True):
        typer.echo(f"batches of {batch}: 4 steps on {len(images)} images take the peers {total:.2f} s together")
    return BATCHES[int(spent.argmin())]


def table(model: PixelClassifier, results: dict[str, Result], images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Judge all images in one way; the site's table without its title and notes."""
    parts, sizes = batches(images, labels, PART), {each.contender.batch for each in results.values()}
    ends = {size: torch.cat([bare(model, size).call(*part) for part in parts]) for size in sizes}  # all peers should end there
    columns: list[str] = []
    rows: list[list[Any]] = []
    robust: dict[str, float] = {}
    gaps: dict[str, float] = {}
    misread: dict[str, int] = {}
    for label, result in results.items():
        judged = right(model, inside(images, result.returned, EPS, label), labels)
        robust[label] = judged.float().mean().item()
        if result.contender.library != OURS:
            gaps[label] = float((result.returned - ends[result.contender.batch]).abs().max())
        if result.verdict is not None:
            misread[label] = int((result.verdict != ~judged).sum())
        cells = {
            "library": result.contender.library,
            "setting": result.contender.setting,
            "batch": result.contender.batch,
            "seconds, median [min, max]": spread(result.totals),
            "seconds / ours, median [95 % interval]": show(results[f"{OURS}, {EQUAL}"].ratio_to(result)),
            "robust accuracy": f"{robust[label]:.4f}",
            "largest difference to our images": f"{gaps[label]:.1g}" if label in gaps else "",
            "own verdict differs from the judge's": f"{misread[label]} of {len(images)}" if label in misread else "gives none",
        }
        rows.append(list(cells.values()))
        columns = list(cells)
    return {"columns": columns, "rows": rows, "readings": readings(results, robust, gaps, misread, len(images))}


def readings(
    results: dict[str, Result], robust: dict[str, float], gaps: dict[str, float], misread: dict[str, int], n: int
) -> list[str]:
    """The goals, each with its number and whether it was won; level where the interval holds the goal."""

    def against(setting: str, peers: list[str], goal: float, what: str) -> str:
        ours, fastest = f"{OURS}, {setting}", min(peers, key=lambda label: float(np.median(results[label].totals)))
        ratio, apart = results[ours].ratio_to(results[fastest]), 100 * abs(robust[ours] - robust[fastest])
        outcome = word(ratio, goal, holds=apart <= 1)
        return (
            f"{outcome}: {what}, ours ({setting}) against the fastest peer ({fastest}): {show(ratio)} times as fast, robust "
            f"accuracy {apart:.2f} points apart. Goal: at least {goal:.2f} times, within 1 point."
        )

    gap = max(gaps.values())
    same = "won" if gap <= 1e-6 else "LOST"
    lines = [
        f"{same}: largest difference to any peer from the fixed start {gap:.1g}. Goal: at most 1e-6.",
        against(BARE, list(gaps), 1.0, f"equal work, {STEPS} forward and backward passes and nothing else"),
        against(EQUAL, [label for label in gaps if label in misread], 1.0, "the same with the checks before and after"),
        against(EARLY, list(gaps), 1.5, "stopping at each image's first success"),
    ]
    for library in dict.fromkeys(label.split(",")[0] for label, wrong in misread.items() if wrong):
        wrong = max(count for label, count in misread.items() if label.startswith(library))
        lines.append(f"{library}'s own verdict differs from the judge's on {wrong} of {n} images.{WHY.get(library, '')}")
    return lines


def on_the_robust(images: torch.Tensor, labels: torch.Tensor, batch: int, repeats: int) -> str:
    """Early removal saves less where less breaks: the same measurement on the adversarially trained ViT."""
    model = zoo.load("vit-robust")
    pair = [safescale(model, setting, batch, early_removal=setting == EARLY, grid=None) for setting in (EQUAL, EARLY)]
    every, early = run(model, pair, images, labels, repeats).values()
    standing = right(model, early.returned, labels).float().mean().item()
    return (
        f"On the adversarially trained ViT, of robust accuracy {standing:.4f} under this attack, early removal makes ours "
        f"{show(early.ratio_to(every))} times as fast as taking every step: what stands is attacked to the end."
    )


WHY = {
    "ART": " Without a target it compares with the prediction on the clean image, not with the label: an image that was wrong "
    "from the start counts as unbroken while its class stays."
}


def notes(n: int, repeats: int, batch: int, clean: float) -> list[str]:
    return [
        f"PGD in the linf ball: eps 8/255, step size 2/255, {STEPS} steps, cross-entropy, start at the image itself.",
        f"{n} test scenes in parts of {PART}; the victim, the zoo's ViT, has clean accuracy {clean:.4f} on them.",
        f"Peers: {releases(*PEERS)}. {repeats} repeats; on each part all contenders run in turn, in an order shuffled "
        "each time.",
        f"Default: torchattacks and foolbox take a part in one call, ART batches of 32, weights as loaded. Tuned: batches of "
        f"{batch}, the peers' fastest in a short sweep, and weights that take no gradients, which spares foolbox and ART work "
        "they do not use.",
        f"Ours, '{BARE}': the {STEPS} steps of `ascend`, as torchattacks does them. '{EQUAL}': `pgd(early_removal=False)`, "
        "which also asks the model about the clean images, skips those already wrong, and asks again about the returned "
        "images. foolbox asks once, at the end; ART twice; torchattacks never, so it runs once more with the caller asking.",
        "Memory that a contender frees stays with the process, for all alike (glibc's mallopt): otherwise the chance layout "
        "of the heap decides whose pages go back to the system after every step, worth up to 5 % either way.",
        "Robust accuracy: one judge for all, the share of returned images that the model still classifies rightly, their "
        "budget measured anew. Differences are to our ascent at the same batch size, over all images.",
    ]


def main(
    repeats: Annotated[int, typer.Option(min=1, help="repeats; at least 5 for a result to keep")] = 7,
    images: Annotated[int, typer.Option(min=2, help="test scenes")] = 512,
    threads: Annotated[int, typer.Option(min=1, help="threads of every contender")] = 1,
    batch: Annotated[int, typer.Option(min=0, max=PART, help="batch size of the tuned rows; 0 sweeps for the peers' best")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="a directory in Hub layout in place of the zoo's ViT")] = None,
    out: Annotated[Path, typer.Option(help="where the table goes")] = RESULTS / "pgd.json",
) -> None:
    """Measure, print and write the table."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    about = machine(threads)
    model = zoo.load("vit", checkpoint=checkpoint)
    drawn = scenes(images, split="test", seed=1)
    batch = batch or best_batch(model, drawn.images[:PART], drawn.labels[:PART])
    contenders = [
        bare(model, batch),
        safescale(model, EQUAL, batch, early_removal=False, grid=None),
        safescale(model, EARLY, batch, early_removal=True, grid=None),
        safescale(model, "default: early removal, 8-bit images", PART, early_removal=True, grid=255),
    ]
    for peer, default in zip(PEERS, (PART, PART, 32), strict=True):
        contenders.append(MAKERS[peer](model, "default", default, freeze=False))
        contenders.append(MAKERS[peer](model, "tuned", batch, freeze=True))
    contenders.append(torchattacks(model, "tuned, the caller asks", batch, freeze=True, verdict=True))
    clean = right(model, drawn.images, drawn.labels).float().mean().item()
    results = run(model, contenders, drawn.images, drawn.labels, repeats)
    heading = {
        "title": "PGD against torchattacks, foolbox and ART",
        "machine": about,
        "notes": notes(images, repeats, batch, clean),
    }
    report = {**heading, **table(model, results, drawn.images, drawn.labels)}
    if checkpoint is None:
        report["readings"].append(on_the_robust(drawn.images, drawn.labels, batch, repeats))
    write(report, out)
    echo(report)


if __name__ == "__main__":
    typer.run(main)
