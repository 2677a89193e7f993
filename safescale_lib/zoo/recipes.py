"""How each member was made: its data, its loss, its test metrics, its card.

A recipe is deterministic for a given seed and number of threads. `make` trains a member into a staging directory;
the metrics are measured on the half-precision files as they will be read, not on the model in memory.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from safescale_lib.measure.criteria import Misclassified
from safescale_lib.measure.intervals import rate
from safescale_lib.search.pixels import pgd, random_noise, worst_case
from safescale_lib.world.scenes import KINDS, SHAPES, Scenes, scenes
from safescale_lib.zoo.adapter import PixelClassifier, load_classifier, save_classifier
from safescale_lib.zoo.training import fit

THREADS = 2  # sums differ in their last bit between 1 and 2 threads, and training amplifies that


@dataclass(frozen=True)
class Run:
    """One training: seed of everything random, where, where to resume from (None: nowhere), bar or no bar."""

    seed: int = 0
    device: str = "cpu"
    state: Path | None = None
    progress: bool = True


@dataclass(frozen=True)
class Training:
    """The numbers of a recipe. steps of `batch` fresh scenes each; lr: peak learning rate of AdamW.

    eps, inner_steps: radius (in pixel units) and steps of the attack inside adversarial training; 0 for none.
    ramp: share of the training over which eps grows from zero. start: member whose weights it begins from.
    """

    steps: int
    batch: int = 128
    lr: float = 1.5e-3
    label_smoothing: float = 0.0
    eps: float = 0.0
    inner_steps: int = 0
    ramp: float = 0.0
    start: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A member in words and numbers."""

    title: str
    summary: str
    intended_use: str
    limits: str
    training: Training


_DATA = (
    "Generated scenes of one object (eight shapes, ten digits, eight colours) on textured backgrounds, 32 x 32 pixels; "
    "digits are scikit-learn's scans, of which training, validation and test own disjoint parts."
)
_LIMITS = "Knows this toy world only. Its robustness says nothing about photographs or about other sizes of model."

RECIPES: dict[str, Recipe] = {
    "vit": Recipe(
        title="ViT classifier",
        summary="A small Vision Transformer that names the object in a scene: the victim of chapter 2.",
        intended_use="A white-box victim and a transfer surrogate for teaching attacks and defenses.",
        limits=_LIMITS,
        training=Training(steps=2500, label_smoothing=0.05),
    ),
    "vit-robust": Recipe(
        title="Adversarially trained ViT classifier",
        summary="The same architecture, fine-tuned from `vit` on images attacked during training (PGD, linf, eps 8/255).",
        intended_use="The defended model of chapter 2; a target for adaptive attacks.",
        limits=_LIMITS + " Robust in the linf ball it was trained for; other norms and larger radii break it.",
        training=Training(steps=1500, lr=1e-3, eps=8 / 255, inner_steps=2, ramp=0.4, start="vit"),
    ),
}


def build_vit(seed: int) -> PixelClassifier:
    """A fresh ViT with random weights: 32 px, patch 8, width 96, 4 layers, about 0.47 M parameters."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=384,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.06,
        id2label=dict(enumerate(KINDS)),
        label2id={kind: index for index, kind in enumerate(KINDS)},
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws initial weights from the global stream
        torch.random.manual_seed(seed)
        model = ViTForImageClassification(config)
    return PixelClassifier(model, mean=(0.5,) * 3, std=(0.5,) * 3)


def train_classifier(training: Training, run: Run, start: PixelClassifier | None = None) -> tuple[PixelClassifier, float]:
    """Train on fresh scenes; with eps > 0 on their worst case in the ball, as adversarial training does [madry2018pgd].

    Returns the classifier and the seconds it took. The scenes of step t and the random start of its attack come from
    (run.seed, t), so that a resumed run is the same run.
    """
    model = (start or build_vit(run.seed)).to(run.device)

    def loss(step: int) -> torch.Tensor:
        # Seeds below a million are for evaluation and the notebooks.
        batch = scenes(training.batch, split="train", seed=(run.seed + 1) * 1_000_000 + step)
        images, labels = batch.images.to(run.device), batch.labels.to(run.device)
        if training.eps:
            eps = training.eps * min(1.0, (step + 1) / (training.ramp * training.steps))
            images = worst_case(
                model, images, labels, eps=eps, steps=training.inner_steps, generator=torch.Generator().manual_seed(step)
            )
        return F.cross_entropy(model(images), labels, label_smoothing=training.label_smoothing)

    settings = {**asdict(training), "seed": run.seed}
    seconds = fit(
        model, loss, steps=training.steps, lr=training.lr, state=run.state, settings=settings, progress=run.progress
    )  # fmt: skip
    return model.cpu().eval(), seconds


def classifier_metrics(model: PixelClassifier, n: int = 2000, n_attacked: int = 500) -> list[dict[str, Any]]:
    """Clean and robust accuracy on test scenes with 95 % Wilson intervals, as rows of a card."""
    test = scenes(n, split="test", seed=0)
    clean = _survived(model, test, 0.0)
    drawn = test.labels < len(SHAPES)
    rows = [
        ("clean accuracy", clean),
        ("clean accuracy, shapes", clean[drawn]),
        ("clean accuracy, unseen digits", clean[~drawn]),
    ]
    few = scenes(n_attacked, split="test", seed=1)
    noise = random_noise(model, few.images, Misclassified(few.labels), eps=8 / 255, generator=torch.Generator().manual_seed(0))
    rows.append(("accuracy under random noise, eps 8/255", noise.survived))
    rows += [(f"robust accuracy, PGD-20, eps {level}/255", _survived(model, few, level / 255)) for level in (2, 4, 8)]
    return [{"metric": name, **rate(hits.numpy())._asdict()} for name, hits in rows]


def _survived(model: PixelClassifier, test: Scenes, eps: float) -> torch.Tensor:
    attack = pgd(model, test.images, Misclassified(test.labels), eps=eps, steps=20, generator=torch.Generator().manual_seed(0))
    return attack.survived


def make(
    name: str,
    staged: Path,
    run: Run,
    *,
    training: Training | None = None,
    metrics: Callable[[PixelClassifier], list[dict[str, Any]]] = classifier_metrics,
) -> None:
    """Train a member and write it, with card.json and README.md, into the staged directory.

    training: other settings than the recipe's. metrics: what the card reports, measured on the files as written.
    """
    if name not in RECIPES:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}; got {name!r}")
    recipe = RECIPES[name]
    training = training or recipe.training
    start = None
    if training.start:
        from safescale_lib.zoo import load

        start = load(training.start)
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        model, seconds = train_classifier(training, run, start)
        save_classifier(model, staged)
        measured = metrics(load_classifier(staged, local=True))
    finally:
        torch.set_num_threads(before)
    card = {
        "name": name,
        "title": recipe.title,
        "summary": recipe.summary,
        "architecture": f"transformers {type(model.model).__name__}: " + _shape(model),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "bytes": (staged / "model.safetensors").stat().st_size,
        "data": _DATA,
        "recipe": {key: value for key, value in asdict(training).items() if value not in (None, 0, 0.0)},
        "seconds": round(seconds),
        "machine": f"{THREADS} threads, {run.device}, {platform.machine()}, torch {torch.__version__.split('+')[0]}",
        "seed": run.seed,
        "intended_use": recipe.intended_use,
        "limits": recipe.limits,
        "metrics": measured,
    }
    (staged / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (staged / "README.md").write_text(readme(card))


def _shape(model: PixelClassifier) -> str:
    c = model.model.config
    return (
        f"{c.image_size} px, patch {c.patch_size}, width {c.hidden_size}, {c.num_hidden_layers} layers, "
        f"{c.num_attention_heads} heads, {len(model.classes)} classes"
    )


def readme(card: dict[str, Any]) -> str:
    """A card as the README.md of a Hub repository."""
    rows = "\n".join(
        f"| {m['metric']} | {m['value']:.3f} | {m['low']:.3f} to {m['high']:.3f} | {m['n']:,} |" for m in card["metrics"]
    )
    recipe = "\n".join(
        f"- {key.replace('_', ' ')}: {value:.4g}" if isinstance(value, float) else f"- {key.replace('_', ' ')}: {value}"
        for key, value in card["recipe"].items()
    )
    return f"""---
license: mit
library_name: transformers
pipeline_tag: image-classification
---
# {card["title"]} (`{card["name"]}`)

{card["summary"]}

{card["architecture"]}; {card["parameters"]:,} parameters, {card["bytes"]:,} bytes in half precision.

**Data.** {card["data"]}

**Recipe** (seed {card["seed"]}, {card["seconds"]:,} s on {card["machine"]})

{recipe}

**Test metrics** (95 % Wilson intervals)

| metric | value | interval | n |
|---|---|---|---|
{rows}

**Intended use.** {card["intended_use"]}

**Limits.** {card["limits"]}
"""


def differences(name: str, measured: list[dict[str, Any]], shipped: list[dict[str, Any]]) -> list[str]:
    """Metrics whose newly measured value lies outside the shipped 95 % interval, as sentences; empty is good."""
    by_name = {row["metric"]: row for row in shipped}
    return [
        f"{name}: {row['metric']} is {row['value']:.3f}, outside the card's {was['low']:.3f} to {was['high']:.3f}"
        for row in measured
        if not (was := by_name[row["metric"]])["low"] <= row["value"] <= was["high"]
    ]
