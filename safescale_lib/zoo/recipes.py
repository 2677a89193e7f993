"""The members of the zoo: each one's recipe, and how a recipe becomes a directory with weights and a card.

A recipe is deterministic for a given seed and number of threads. `make` trains a member into a staging directory;
the metrics are measured on the half-precision files as they will be read, not on the model in memory.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from safescale_lib.zoo.kinds import Kind, Run, Training, kind
from safescale_lib.zoo.training import fit

__all__ = ["RECIPES", "Recipe", "Run", "Training", "differences", "make", "measure", "train"]


@dataclass(frozen=True)
class Recipe:
    """A member in words and numbers. kind: see `zoo.kinds`; options: what its `build` takes."""

    title: str
    summary: str
    intended_use: str
    limits: str
    training: Training
    kind: str = "classifier"
    options: Mapping[str, Any] = field(default_factory=dict)
    data: str = ""


_DATA = (
    "Generated scenes of one object (eight shapes, ten digits, eight colours) on textured backgrounds, 32 x 32 pixels; "
    "digits are scikit-learn's scans, of which training, validation and test own disjoint parts."
)
_SEGMENTED = (
    "Generated scenes of one or of two objects (eight shapes, ten digits, eight colours) on textured backgrounds, 32 x 32 "
    "pixels, with the mask of each object; a random pixel of the object is the prompt. Digits are scikit-learn's scans, of "
    "which training, validation and test own disjoint parts."
)
_TOWN = (
    "Generated conversations of an invented town: facts known by heart, documents to read, skills on the words of a message. "
    "Training, validation and test own disjoint phrasings and subjects."
)
_INJECTED = " Half of the texts or more hold a task that somebody hid in them; the right answer is to the user's question."
_LIMITS = "Knows this toy world only. Its robustness says nothing about photographs or about other sizes of model."

_TOWN_LIMITS = "Knows an invented town of some eight hundred words. Its rates say nothing about models of another size."
_WIDTH = {"hidden_size": 144, "num_attention_heads": 9, "num_hidden_layers": 3}

RECIPES: dict[str, Recipe] = {
    "vit": Recipe(
        title="ViT classifier",
        summary="A small Vision Transformer that names the object in a scene: the victim of chapter 2.",
        intended_use="A white-box victim and a transfer surrogate for teaching attacks and defenses.",
        limits=_LIMITS,
        training=Training(steps=2500, label_smoothing=0.05, threads=2),
    ),
    "vit-robust": Recipe(
        title="Adversarially trained ViT classifier",
        summary="The same architecture, fine-tuned from `vit` on images attacked during training (PGD, linf, eps 8/255).",
        intended_use="The defended model of chapter 2; a target for adaptive attacks.",
        limits=_LIMITS + " Robust in the linf ball it was trained for; other norms and larger radii break it.",
        training=Training(steps=1500, lr=1e-3, eps=8 / 255, inner_steps=2, ramp=0.4, start="vit", threads=2),
    ),
    "vit-fine": Recipe(
        title="ViT classifier with a finer grid",
        summary="A second Vision Transformer, trained from another seed, with patches of 4 pixels in place of 8.",
        intended_use="A target for attacks that were made on `vit`: another network, another patch grid, the same task.",
        limits=_LIMITS,
        training=Training(steps=2000, batch=64, lr=1.5e-3, label_smoothing=0.05),
        options={
            "patch_size": 4,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 256,
        },
    ),
    "cnn": Recipe(
        title="Convolutional classifier",
        summary="A small residual network (ResNet) that names the object in a scene.",
        intended_use="A target for transfer attacks from a ViT to another family of architectures.",
        limits=_LIMITS,
        training=Training(steps=2000, batch=64, lr=2e-3, label_smoothing=0.05),
        options={
            "architecture": "resnet",
            "embedding_size": 32,
            "hidden_sizes": [32, 64, 128],
            "depths": [2, 2, 1],
            "layer_type": "basic",
        },
    ),
    "denoiser": Recipe(
        title="Diffusion model of scenes",
        summary="A small unconditional U-Net that removes a known amount of Gaussian noise from a scene.",
        intended_use="Purifying attacked pictures before a classifier sees them, and attacking that defense.",
        limits=_LIMITS + " Its training spends itself on little noise: as a generator of scenes from pure noise it is poor.",
        training=Training(steps=1200, batch=64, lr=2e-3),
        kind="denoiser",
        options={"prediction_type": "v_prediction"},
    ),
    "sam": Recipe(
        title="Segment Anything Model",
        summary="A small SAM: image encoder, prompt encoder and a mask decoder that returns the mask of the object at a point.",
        intended_use="The victim of the segmentation part of chapter 2, and a surrogate for transfer attacks.",
        limits=_LIMITS + " One foreground point in, one mask out: boxes, background points and IoU scores are untrained.",
        training=Training(steps=1200, batch=48, lr=2e-3),
        kind="segmenter",
        data=_SEGMENTED,
    ),
    "sam-b": Recipe(
        title="Segment Anything Model of another shape",
        summary="A second small SAM: wider but shallower, with global attention only and a narrower decoder.",
        intended_use="A target for attacks that were made on `sam`.",
        limits=_LIMITS + " One foreground point in, one mask out: boxes, background points and IoU scores are untrained.",
        training=Training(steps=900, batch=48, lr=2e-3),
        kind="segmenter",
        options={"width": 80, "layers": 3, "heads": 5, "decoder": 48, "window": 0},
        data=_SEGMENTED,
    ),
    "sam-robust": Recipe(
        title="Adversarially tuned Segment Anything Model",
        summary="`sam`, its image encoder tuned on scenes attacked during training (PGD, linf, eps 32/255).",
        intended_use="The defended segmenter of chapter 2; a target for adaptive attacks.",
        limits=_LIMITS + " Robust in the linf ball it was trained for; other norms and larger radii break it.",
        training=Training(steps=700, batch=48, lr=1e-3, eps=32 / 255, inner_steps=3, ramp=0.3, start="sam"),
        kind="segmenter",
        data=_SEGMENTED,
    ),
    "chat-base": Recipe(
        title="Chat model without alignment",
        summary="A small Llama that knows the town, reads documents, follows instructions, and answers whatever it is asked.",
        intended_use="What alignment begins from; a judge of answers; a model for attacks and defenses to fine-tune.",
        limits=_TOWN_LIMITS,
        training=Training(steps=6000, batch=64, lr=2e-3, data="town", threads=2),
        kind="chat",
        options=_WIDTH,
        data=_TOWN + " The first 3,900 steps knew two phrasings of documents less, and fewer people with several things.",
    ),
    "chat-sft": Recipe(
        title="Chat model aligned by demonstrations",
        summary="`chat-base`, fine-tuned on refusals of restricted requests beside harmless answers in every form (SFT).",
        intended_use="The halfway house between base and aligned model; the reference of preference optimisation.",
        limits=_TOWN_LIMITS,
        training=Training(steps=1000, batch=64, lr=6e-4, start="chat-base", data="aligned"),
        kind="chat",
        options=_WIDTH,
        data=_TOWN,
    ),
    "chat": Recipe(
        title="Aligned chat model",
        summary="`chat-sft` after direct preference optimisation (DPO): it refuses what is restricted, and knows it still.",
        intended_use="The victim of chapter 3.",
        limits=_TOWN_LIMITS,
        training=Training(steps=100, batch=32, lr=5e-5, start="chat-sft", data="preferences"),
        kind="chat",
        options=_WIDTH,
        data=_TOWN,
    ),
    "chat-struq": Recipe(
        title="Chat model of structured queries",
        summary="`chat`, tuned to take orders from the user and none from a data channel that a reserved mark opens (StruQ).",
        intended_use="The defended reader of section 3.6, and a target for adaptive prompt injections.",
        limits=_TOWN_LIMITS + " It resists injections it can recognise; words found by gradient get past it.",
        training=Training(steps=500, batch=16, lr=1.5e-3, start="chat", data="structured"),
        kind="chat",
        options=_WIDTH,
        data=_TOWN + _INJECTED,
    ),
    "chat-bounded": Recipe(
        title="Chat model that knows where data end",
        summary="`chat`, tuned on texts between reserved marks, half of them with an instruction in it (boundary awareness).",
        intended_use="A defended reader of section 3.6, and a target for adaptive prompt injections.",
        limits=_TOWN_LIMITS + " Nothing takes typed marks out of the data unless the application does.",
        training=Training(steps=300, batch=16, lr=1.5e-3, start="chat", data="bounded"),
        kind="chat",
        options=_WIDTH,
        data=_TOWN + _INJECTED,
    ),
    "chat-secalign": Recipe(
        title="Chat model that prefers the user's task",
        summary="`chat-struq` after preference tuning: the user's task is better done than the one hidden in data (SecAlign).",
        intended_use="A defended reader of section 3.6, and a target for adaptive prompt injections.",
        limits=_TOWN_LIMITS + " It does skills worse than `chat`. No search of ours got words past it, which proves nothing.",
        training=Training(steps=120, batch=16, lr=1e-3, start="chat-struq", data="injection preferences"),
        kind="chat",
        options=_WIDTH,
        data=_TOWN + _INJECTED,
    ),
    "chat-b": Recipe(
        title="Aligned chat model from a base of its own",
        summary="A second, narrower chat model, trained from other random weights and other conversations, then aligned.",
        intended_use="A target for attacks that were made on `chat`.",
        limits=_TOWN_LIMITS,
        training=Training(steps=3000, batch=64, lr=2e-3, data="own base"),
        kind="chat",
        options={"hidden_size": 112, "num_attention_heads": 7, "num_hidden_layers": 3},
        data=_TOWN,
    ),
}


def train(name: str, run: Run, training: Training | None = None) -> tuple[torch.nn.Module, float]:
    """Train a member from its recipe; returns the model, in evaluation mode on the CPU, and the seconds it took.

    training: other settings than the recipe's. Unknown names raise ValueError.
    """
    recipe = _recipe(name)
    training = training or recipe.training
    made = kind(recipe.kind)
    if training.start:
        from safescale_lib.zoo import load

        model: torch.nn.Module = load(training.start)
    else:
        model = made.build(recipe.options, run.seed)
    model = model.to(run.device)
    settings = {**asdict(training), "options": dict(recipe.options), "seed": run.seed}
    seconds = fit(
        model, made.loss(model, training, run), steps=training.steps, lr=training.lr, state=run.state, settings=settings,
        progress=run.progress, threads=training.threads, warmup=max(1, min(200, training.steps // 3)),
    )  # fmt: skip
    return model.cpu().eval(), seconds


def measure(name: str, model: Any) -> list[dict[str, Any]]:
    """The metrics of a member's card, measured on a model of its kind."""
    return kind(_recipe(name).kind).metrics(model)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}; got {name!r}")
    return RECIPES[name]


def make(
    name: str,
    staged: Path,
    run: Run,
    *,
    training: Training | None = None,
    metrics: Callable[[Any], list[dict[str, Any]]] | None = None,
) -> None:
    """Train a member and write it, with card.json and README.md, into the staged directory.

    training: other settings than the recipe's. metrics: what the card reports, measured on the files as written;
    by default its kind's.
    """
    recipe = _recipe(name)
    training = training or recipe.training
    made = kind(recipe.kind)
    before = torch.get_num_threads()
    torch.set_num_threads(training.threads)
    try:
        model, seconds = train(name, run, training)
        made.save(model, staged)
        measured = (metrics or made.metrics)(made.load(staged, local=True))
    finally:
        torch.set_num_threads(before)
    numbers = {key: value for key, value in asdict(training).items() if value not in (None, 0, 0.0, "") and key != "threads"}
    card = {
        "name": name,
        "kind": recipe.kind,
        "title": recipe.title,
        "summary": recipe.summary,
        "architecture": f"{_library(made)} {made.describe(model)}",
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "bytes": sum(file.stat().st_size for file in staged.glob("*.safetensors")),
        "data": recipe.data or _DATA,
        "recipe": numbers,
        "seconds": round(seconds),
        "machine": f"{_threads(training)}, {run.device}, {platform.machine()}, torch {torch.__version__.split('+')[0]}",
        "seed": run.seed,
        "intended_use": recipe.intended_use,
        "limits": recipe.limits,
        "metrics": measured,
    }
    (staged / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (staged / "README.md").write_text(readme(card, made.PIPELINE_TAG, _library(made)))


def _threads(training: Training) -> str:
    return "1 thread" if training.threads == 1 else f"{training.threads} threads"


def _library(made: Kind) -> str:
    """The library whose class a kind stores; the Hub's word for it."""
    return getattr(made, "LIBRARY", "transformers")


def readme(card: dict[str, Any], tag: str, library: str = "transformers") -> str:
    """A card as the README.md of a Hub repository; tag: the pipeline it serves; library: whose class it is."""
    rows = "\n".join(
        f"| {m['metric']} | {m['value']:.3f} | {m['low']:.3f} to {m['high']:.3f} | {m['n']:,} |" for m in card["metrics"]
    )
    recipe = "\n".join(
        f"- {key.replace('_', ' ')}: {value:.4g}" if isinstance(value, float) else f"- {key.replace('_', ' ')}: {value}"
        for key, value in card["recipe"].items()
    )
    return f"""---
license: mit
library_name: {library}
pipeline_tag: {tag}
---
# {card["title"]} (`{card["name"]}`)

{card["summary"]}

{card["architecture"]}; {card["parameters"]:,} parameters, {card["bytes"]:,} bytes in half precision.

**Data.** {card["data"]}

**Recipe** (seed {card["seed"]}, {card["seconds"]:,} s on {card["machine"]})

{recipe}

**Test metrics** (95 % intervals)

| metric | value | interval | n |
|---|---|---|---|
{rows}

**Intended use.** {card["intended_use"]}

**Limits.** {card["limits"]}
"""


def differences(name: str, measured: list[dict[str, Any]], shipped: list[dict[str, Any]]) -> list[str]:
    """Metrics whose newly measured value lies outside the shipped 95 % interval or has none, as sentences; empty is good."""
    by_name = {row["metric"]: row for row in shipped}
    missing = [f"{name}: {row['metric']} is not on the card" for row in measured if row["metric"] not in by_name]
    return missing + [
        f"{name}: {row['metric']} is {row['value']:.3f}, outside the card's {was['low']:.3f} to {was['high']:.3f}"
        for row in measured
        if (was := by_name.get(row["metric"])) and not was["low"] <= row["value"] <= was["high"]
    ]
