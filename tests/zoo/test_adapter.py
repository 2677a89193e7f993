"""Pixels in, logits out: against the raw model, on the shipped weights, a checkpoint of another size, and a ViT-B/16."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from safescale_lib import zoo
from safescale_lib.measure.criteria import ClassifiedAs, Misclassified
from safescale_lib.search.pixels import pgd
from safescale_lib.world.scenes import KINDS, scenes
from safescale_lib.zoo.adapter import PixelClassifier, save_classifier


def random_vit(seed: int = 0, **config: object) -> ViTForImageClassification:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ViTForImageClassification(ViTConfig(**config))


def test_adapter_equals_the_stock_processor_and_the_raw_model() -> None:
    classifier, batch = zoo.load("vit"), scenes(6, split="test", seed=3)
    directory = zoo.check("vit")
    processor = ViTImageProcessorPil.from_pretrained(directory)
    raw = ViTForImageClassification.from_pretrained(directory, dtype=torch.float32).eval()
    pictures = [Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for image in batch.images]
    with torch.inference_mode():
        expected = raw(**processor(pictures, return_tensors="pt")).logits
        torch.testing.assert_close(classifier(batch.images), expected, atol=1e-5, rtol=1e-5)


def test_members_load_fast_and_ready_to_use() -> None:
    seconds = []
    for _ in range(6):  # the first imports transformers; on a shared machine one load may wait for somebody else's work
        start = time.perf_counter()
        classifier = zoo.load("vit-robust")
        seconds.append(time.perf_counter() - start)
    assert min(seconds[1:]) <= 0.5
    assert not classifier.training
    assert {weight.dtype for weight in classifier.parameters()} == {torch.float32}
    assert classifier.classes == KINDS
    assert classifier.side == 32


def test_the_victim_is_good() -> None:
    batch = scenes(1000, split="test", seed=11)
    with torch.inference_mode():
        accuracy = (zoo.load("vit")(batch.images).argmax(-1) == batch.labels).float().mean()
    assert accuracy >= 0.95


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 32, 32), (3, 32, 32)])
def test_wrong_shapes_are_answered_with_the_right_one(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pixels must have shape \(B, 3, 32, 32\)"):
        zoo.load("vit")(torch.zeros(shape))


def test_bad_normalisation_is_refused() -> None:
    with pytest.raises(ValueError, match="mean and std"):
        PixelClassifier(torch.nn.Identity(), mean=(0.5,), std=(0.0,))


def test_saving_leaves_the_classifier_as_it_was(tmp_path: Path) -> None:
    classifier = PixelClassifier(
        random_vit(image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=1), (0.5,) * 3, (0.5,) * 3
    )
    before = copy.deepcopy(classifier.state_dict())
    save_classifier(classifier, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "preprocessor_config.json", "model.safetensors"}
    assert all(torch.equal(before[key], value) for key, value in classifier.state_dict().items())


@pytest.fixture
def stranger(tmp_path: Path) -> Path:
    """A checkpoint directory nobody here made: another size, another normalisation, other classes."""
    config = {"image_size": 48, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    random_vit(intermediate_size=64, num_labels=5, **config).save_pretrained(tmp_path / "stranger")
    processor = ViTImageProcessorPil(size={"height": 48, "width": 48}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4])
    processor.save_pretrained(tmp_path / "stranger")
    return tmp_path / "stranger"


@pytest.mark.parametrize("as_text", [False, True])
def test_any_local_checkpoint_takes_the_same_attack(stranger: Path, as_text: bool) -> None:
    classifier = zoo.load("vit", checkpoint=str(stranger) if as_text else stranger)
    assert (classifier.side, len(classifier.classes)) == (48, 5)
    assert classifier.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    images = torch.rand(6, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        labels = classifier(images).argmax(-1)
    attack = pgd(
        classifier, images, Misclassified(labels.clone()), eps=0.2, steps=5, generator=torch.Generator().manual_seed(0)
    )
    assert attack.success.any()
    assert attack.distance.max() <= 0.2 + 1e-6


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        zoo.load("vit", checkpoint=tmp_path)


def test_a_checkpoint_does_not_excuse_an_unknown_name(stranger: Path) -> None:
    with pytest.raises(ValueError, match="name must be one of"):
        zoo.load("resnet", checkpoint=stranger)


def test_the_same_attack_code_runs_on_a_full_size_vit() -> None:
    """ViT-B/16 at 224 pixels with random weights: nothing assumes a size, a patch or a number of classes.

    All twelve layers once; the other searches run on two of them, in `tests/search/test_full_size.py`.
    """
    classifier = PixelClassifier(random_vit(num_labels=1000), (0.5,) * 3, (0.5,) * 3)
    assert sum(weight.numel() for weight in classifier.parameters()) > 85e6
    image = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        label = classifier.eval()(image).argmax(-1).clone()
    attack = pgd(classifier, image, ClassifiedAs((label + 1) % 1000, label), eps=8 / 255, steps=1, random_start=False)
    assert attack.attempted.all()
    assert attack.distance.max() <= 8 / 255 + 1e-6
    assert attack.cost.forwards >= 1
    assert attack.cost.backwards == 1
