"""Image classifiers that name the object in a scene: Vision Transformers and a convolutional network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from safescale_lib.measure.criteria import Misclassified
from safescale_lib.measure.intervals import rate
from safescale_lib.search.pixels import pgd, random_noise, worst_case
from safescale_lib.world.scenes import KINDS, SHAPES, Scenes, scenes
from safescale_lib.zoo.adapter import PixelClassifier, load_classifier, save_classifier
from safescale_lib.zoo.kinds import Run, Training
from safescale_lib.zoo.training import own_dice

PIPELINE_TAG = "image-classification"
load, save = load_classifier, save_classifier

_VIT: Mapping[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 384,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.06,
}


def build(options: Mapping[str, Any], seed: int) -> PixelClassifier:
    """A fresh classifier of 32 px scenes. options: "architecture" ("vit" or "resnet") and entries of its configuration.

    Without options: a ViT with patch 8, width 96, 4 layers, about 0.47 M parameters.
    """
    from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

    given = dict(options)
    architecture = given.pop("architecture", "vit")
    names = {"id2label": dict(enumerate(KINDS)), "label2id": {kind: index for index, kind in enumerate(KINDS)}}
    with own_dice(seed):  # transformers draws initial weights from the global stream
        if architecture == "vit":
            model = ViTForImageClassification(ViTConfig(**{**_VIT, **given}, **names))
        elif architecture == "resnet":
            model = ResNetForImageClassification(ResNetConfig(image_size=32, **given, **names))
        else:
            raise ValueError(f"options['architecture'] must be 'vit' or 'resnet', got {architecture!r}")
    return PixelClassifier(model, mean=(0.5,) * 3, std=(0.5,) * 3)


def loss(model: PixelClassifier, training: Training, run: Run) -> Callable[[int], torch.Tensor]:
    """Cross-entropy on fresh scenes; with eps > 0 on their worst case in the ball, adversarial training [madry2018pgd]."""

    def at(step: int) -> torch.Tensor:
        batch = scenes(training.batch, split="train", seed=training.batch_seed(run, step))
        images, labels = batch.images.to(run.device), batch.labels.to(run.device)
        if training.eps:
            images = worst_case(
                model, images, labels, eps=training.eps_at(step), steps=training.inner_steps,
                generator=torch.Generator().manual_seed(step),
            )  # fmt: skip
        return F.cross_entropy(model(images), labels, label_smoothing=training.label_smoothing)

    return at


def metrics(model: PixelClassifier, n: int = 2000, n_attacked: int = 500) -> list[dict[str, Any]]:
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


def describe(model: PixelClassifier) -> str:
    """The architecture in one line."""
    c = model.model.config
    if c.model_type == "resnet":
        shape = f"stages {'-'.join(map(str, c.hidden_sizes))}, depths {'-'.join(map(str, c.depths))}"
    else:
        shape = f"patch {c.patch_size}, width {c.hidden_size}, {c.num_hidden_layers} layers, {c.num_attention_heads} heads"
    return f"{type(model.model).__name__}: {c.image_size} px, {shape}, {len(model.classes)} classes"
