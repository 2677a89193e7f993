"""Every search on the configuration of ViT-B/16: 224 px, patch 16, random weights, two of its layers, two images."""

from functools import lru_cache

import pytest
import torch

from safescale_lib.measure.criteria import Misclassified
from safescale_lib.measure.smoothing import certify, smoothed
from safescale_lib.search.auto import apgd, auto_ensemble
from safescale_lib.search.minimal import carlini_wagner, decoupled
from safescale_lib.search.patches import adversarial_patch, universal_perturbation
from safescale_lib.search.pixels import fgsm, pgd
from safescale_lib.search.queries import hop_skip_jump, random_guesses, square
from safescale_lib.zoo.adapter import PixelClassifier


def seeded():
    return torch.Generator().manual_seed(0)


@lru_cache
def setting():
    from transformers import ViTConfig, ViTForImageClassification

    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(num_hidden_layers=2, num_labels=1000))
    model = PixelClassifier(model, (0.5,) * 3, (0.5,) * 3).eval()
    images = torch.randint(256, (2, 3, 224, 224), generator=seeded()) / 255
    return model, images, Misclassified(model(images).argmax(1))


ATTACKS = {
    "fgsm": lambda *a: fgsm(*a, eps=8 / 255),
    "pgd": lambda *a: pgd(*a, eps=8 / 255, steps=2, generator=seeded()),
    "apgd": lambda *a: apgd(*a, eps=8 / 255, steps=2, generator=seeded()),
    "ensemble": lambda *a: auto_ensemble(*a, eps=4 / 255, steps=1, targets=1, queries=1, generator=seeded()),
    "decoupled": lambda *a: decoupled(*a, steps=3),
    "carlini_wagner": lambda *a: carlini_wagner(*a, head_start=2, steps=2),
    "square": lambda *a: square(*a, eps=8 / 255, queries=3, generator=seeded()),
    "random": lambda *a: random_guesses(*a, eps=8 / 255, queries=2, generator=seeded()),
    "hop_skip_jump": lambda *a: hop_skip_jump(*a, queries=28, probes=3, generator=seeded()),
    "patch": lambda *a: adversarial_patch(*a, size=50, steps=2, generator=seeded()),
    "universal": lambda *a: universal_perturbation(*a, eps=8 / 255, steps=2, generator=seeded()),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_it_runs_and_returns_what_it_claims(name):
    model, images, goal = setting()
    found = ATTACKS[name](model, images, goal)
    with torch.no_grad():
        met = goal.met(model(found.images), torch.arange(2))
    assert found.images.shape == images.shape
    assert torch.equal(met, found.success)
    assert torch.equal(found.images[~found.success], images[~found.success])


def test_smoothing_runs():
    model, images, _ = setting()
    shares = smoothed(model, sigma=0.1, n=3)(images)
    assert shares.shape == (2, 1000)
    assert certify(model, images[:1], sigma=0.1, n=4, n_guess=1, generator=seeded()).radius.shape == (1,)
