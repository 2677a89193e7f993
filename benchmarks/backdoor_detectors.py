"""Activation clustering and spectral signatures against ART's, on the same backdoored models and the same features.

    .venv-bench/bin/python -m benchmarks.backdoor_detectors     # from the repository's root; see benchmarks/README.md

ART answers with flags. Ours answers with scores, so that it can be put at the very share of false alarms that ART chose:
then only the recall is left to compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from benchmarks.common import (
    RESULTS,
    Answer,
    Contender,
    Result,
    art_estimator,
    echo,
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
from safescale_lib.measure.detection import threshold_at_fpr
from safescale_lib.measure.intervals import Interval, bootstrap
from safescale_lib.vfm.vit.backdoor_attack import Backdoor, badvit
from safescale_lib.vfm.vit.backdoor_defense import activation_clustering, last_features, spectral_signature
from safescale_lib.world.scenes import KINDS, scenes
from safescale_lib.zoo.adapter import PixelClassifier

RATE, TARGET = 0.02, KINDS.index("disc")
FPR = 0.05
OURS = "safescale"
DETECTORS = {"activation clustering": activation_clustering, "spectral signatures": spectral_signature}


def planted(seed: int, n: int) -> Backdoor:
    """The poisoned training set and the model that its user trains on it."""
    pool = scenes(n, split="train", seed=11)
    return badvit(
        zoo.load("vit"), pool.images, pool.labels, target=TARGET, rate=RATE, progress=False,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def safescale(model: PixelClassifier, method: str) -> Contender:
    def call(images: torch.Tensor, labels: torch.Tensor) -> Any:
        return DETECTORS[method](last_features(model, images).numpy(), labels.numpy())

    def unpack(scores: Any, images: torch.Tensor, labels: torch.Tensor) -> Answer:
        return torch.from_numpy(scores), None

    return Contender(OURS, method, 256, call, unpack)


class Features(torch.nn.Module):
    """What the classification head reads, as the only layer of a model: ART looks for its features in the last one."""

    def __init__(self, model: PixelClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return last_features(self.model, images)


def art(model: PixelClassifier, method: str, name: str, seed: int, **settings: Any) -> Contender:
    """settings: of the constructor for spectral signatures, of `detect_poison` for activation clustering."""
    from art.defences.detector.poison import ActivationDefence, SpectralSignatureDefense

    shape = (3, model.side, model.side)
    estimator = art_estimator(torch.nn.Sequential(Features(model)), shape, len(model.classes))

    def call(images: torch.Tensor, labels: torch.Tensor) -> Any:
        np.random.seed(seed)  # noqa: NPY002 - its clustering draws from there
        if method == "activation clustering":
            return ActivationDefence(estimator, images.numpy(), labels.numpy()).detect_poison(**settings)[1]
        return SpectralSignatureDefense(estimator, images.numpy(), labels.numpy(), **settings).detect_poison()[1]

    def unpack(clean: Any, images: torch.Tensor, labels: torch.Tensor) -> Answer:
        scores = np.full(len(labels), np.nan)  # activation clustering gives none
        if method == "spectral signatures":
            features, classes = last_features(model, images).numpy(), labels.numpy()
            for label in np.unique(classes):
                own = classes == label
                scores[own] = SpectralSignatureDefense.spectral_signature_scores(features[own])[:, 0]
        return torch.from_numpy(scores), ~torch.tensor(clean, dtype=torch.bool)

    return Contender("ART", f"{method}, {name}", 128, call, unpack)


def contenders(model: PixelClassifier, seed: int) -> list[Contender]:
    clustering, spectral = DETECTORS
    return [
        safescale(model, clustering),
        safescale(model, spectral),
        art(model, clustering, "default", seed),
        art(model, clustering, "FastICA", seed, reduce="FastICA"),
        art(model, clustering, "distance", seed, cluster_analysis="distance"),
        art(model, spectral, "default", seed),
        art(model, spectral, "told the poison rate", seed, expected_pp_poison=RATE),
    ]


def caught(scores: np.ndarray, poisoned: np.ndarray, fpr: float) -> np.ndarray:
    """(poisoned items,) bool: score above the threshold that flags at most a share fpr of the clean items."""
    above: np.ndarray = scores[poisoned] > threshold_at_fpr(scores[~poisoned], fpr)
    return above


@dataclass(frozen=True)
class Duel:
    """One of ART's settings and our detector at the same share of false alarms, over all models.

    theirs, ours: (poisoned items of all models,) bool, caught. fpr: mean share of clean items that ART flags.
    """

    theirs: np.ndarray
    ours: np.ndarray
    fpr: float

    @property
    def lead(self) -> Interval:
        """Our recall minus theirs, bootstrap over the poisoned items."""
        return bootstrap(self.ours.astype(float) - self.theirs)


def duel(ours: list[np.ndarray], flags: list[np.ndarray], poisoned: list[np.ndarray]) -> Duel:
    """ours: scores, flags: ART's verdicts, a pair for each model, both (N,); poisoned: (N,) bool, the truth."""
    rates = [float(flag[~bad].mean()) for flag, bad in zip(flags, poisoned, strict=True)]
    mine = [caught(scores, bad, rate) for scores, bad, rate in zip(ours, poisoned, rates, strict=True)]
    theirs = [flag[bad] for flag, bad in zip(flags, poisoned, strict=True)]
    return Duel(np.concatenate(theirs), np.concatenate(mine), float(np.mean(rates)))


def table(found: dict[str, list[Result]], poisoned: list[np.ndarray]) -> dict[str, Any]:
    """The site's table without its title and notes. found: per contender, a result for each model."""
    rows: list[list[Any]] = []
    lines: list[str] = []
    cells: dict[str, Any] = {}
    for results in found.values():
        contender = results[0].contender
        method = contender.setting.split(",")[0]
        mine = found[f"{OURS}, {method}"]
        scores = [each.returned.numpy() for each in results]
        fixed = "gives no scores"
        if not np.isnan(scores[0]).any():
            fixed = of(np.concatenate([caught(s, bad, FPR) for s, bad in zip(scores, poisoned, strict=True)]))
        times, own = (np.concatenate([each.times for each in group]) for group in (results, mine))
        ratio = bootstrap((times / own).ravel(), np.median)
        met = None
        if contender.library != OURS:
            flags = [each.verdict.numpy() for each in results if each.verdict is not None]
            met = duel([each.returned.numpy() for each in mine], flags, poisoned)
            lines.append(
                f"{word(met.lead, 0.0)}: {method}: at the false alarms of ART ({contender.setting.split(', ')[1]}), "
                f"{met.fpr:.1%} of the clean items, ours catches {of(met.ours)} poisoned items, ART {of(met.theirs)}: "
                f"{show(met.lead)} of them more. Goal: at least 0."
            )
        cells = {
            "library": contender.library,
            "setting": contender.setting,
            "false alarms": f"{met.fpr:.1%}" if met else "a threshold's choice",
            "recall there": f"{met.theirs.mean():.3f}" if met else "",
            "our recall there": f"{met.ours.mean():.3f}" if met else "",
            f"caught at {FPR:.0%} false alarms": fixed,
            "seconds, median [min, max]": spread(times.ravel()),
            "seconds / ours, median [95 % interval]": show(ratio),
        }
        rows.append(list(cells.values()))
    return {"columns": list(cells), "rows": rows, "readings": lines}


def notes(n: int, seeds: int, repeats: int, poisoned: list[np.ndarray], attack: str) -> list[str]:
    return [
        f"{seeds} models with a backdoor, `badvit` at a poison rate of {RATE:.0%} of {n} training scenes, fine-tuned from the "
        f"zoo's ViT with seeds 0 to {seeds - 1}; {sum(int(bad.sum()) for bad in poisoned)} poisoned items in all. {attack}",
        f"All detectors see the training set and read what the classification head reads. Peer: {releases('ART')}.",
        "ART flags; ours gives scores. Our recall is taken where the threshold flags as many clean items as ART flagged on the "
        "same model. Both sides' false alarms are counted with the truth at hand, which no user has.",
        "ART's activation clustering: default (PCA, the smaller cluster of every class is poison), FastICA in place of PCA, "
        "distance (a cluster is poison only if it lies nearer to another class). Its two other ways to judge a class, relative "
        "size and silhouette scores, end in an error here as soon as they would clear one. Its spectral signatures: default "
        "(expects a third of each class poisoned and flags half), and told the poison rate.",
        "Ours sets one threshold for all classes, ART cuts the same share from each. Its spectral scores project the features "
        "as they are, where the paper, and ours, subtract the class's mean first.",
        f"Seconds include the features. {repeats} repeats on each of the {seeds} models; on each all contenders run in turn, "
        "in an order shuffled each time.",
    ]


def main(
    seeds: Annotated[int, typer.Option(min=1, help="models, each with a poisoning and training of its own")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="timed repeats a model; 5 turns in all for a result to keep")] = 2,
    images: Annotated[int, typer.Option(min=200, help="training scenes")] = 2000,
    threads: Annotated[int, typer.Option(min=1, help="threads of every contender")] = 1,
    out: Annotated[Path, typer.Option(help="where the table goes")] = RESULTS / "backdoor_detectors.json",
) -> None:
    """Measure, print and write the table."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    about, test = machine(threads), scenes(200, split="test", seed=2)
    found: dict[str, list[Result]] = {}
    truths: list[np.ndarray] = []
    hits, accurate = [], []
    for seed in range(seeds):
        backdoor = planted(seed, images)
        hits.append(float(backdoor.hits(test.images, test.labels).float().mean()))
        accurate.append(float(right(backdoor.model, test.images, test.labels).float().mean()))
        typer.echo(f"model {seed}: attack success rate {hits[-1]:.3f}, accuracy {accurate[-1]:.3f}")
        data = backdoor.data
        if data is None:
            raise RuntimeError("the backdoor must come with its training set")
        truths.append(data.poisoned.numpy())
        results = run(backdoor.model, contenders(backdoor.model, seed), data.images, data.labels, repeats, images, seed)
        for label, result in results.items():
            found.setdefault(label, []).append(result)
    attack = (
        f"Attack success rate {min(hits):.3f} to {max(hits):.3f}, clean accuracy {min(accurate):.3f} to {max(accurate):.3f}."
    )
    heading = {
        "title": "Backdoor detectors against ART",
        "machine": about,
        "notes": notes(images, seeds, repeats, truths, attack),
    }
    report = {**heading, **table(found, truths)}
    write(report, out)
    echo(report)


if __name__ == "__main__":
    typer.run(main)
