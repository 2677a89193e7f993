"""Section 2.1, adversarial defenses: what the shared checks do not cover."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

from safescale_lib import zoo
from safescale_lib.measure.criteria import Misclassified
from safescale_lib.measure.detection import threshold_at_fpr
from safescale_lib.search import pixels
from safescale_lib.search.ball import Ball
from safescale_lib.vfm.vit import adversarial_defense as defense
from safescale_lib.vfm.vit.inside import attending
from safescale_lib.world.scenes import scenes
from safescale_lib.zoo import denoiser
from safescale_lib.zoo.adapter import PixelClassifier


@lru_cache
def vit() -> PixelClassifier:
    return zoo.load("vit")


def darker(images: torch.Tensor) -> torch.Tensor:
    return 0.8 * images


@lru_cache
def washer() -> denoiser.Denoiser:
    return denoiser.build({"block_out_channels": (8, 16), "norm_num_groups": 4, "prediction_type": "sample"}, seed=0).eval()


@lru_cache
def full_size() -> PixelClassifier:
    """ViT-B/16 on 224 px with two of its twelve layers and random weights."""
    config = ViTConfig(num_hidden_layers=2, num_labels=10)
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        return PixelClassifier(ViTForImageClassification(config), mean=(0.5,) * 3, std=(0.5,) * 3).eval()


def batch(step: int, n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    fresh = scenes(n, split="train", seed=step)
    return fresh.images, fresh.labels


def hooks(model: torch.nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


TRAININGS = {
    "ard_prm": lambda model, **other: defense.ard_prm(model, batch, **{"eps": 4 / 255, "steps": 2, "progress": False, **other}),
    "rspc": lambda model, **other: defense.rspc(model, batch, **{"patches": 2, "steps": 2, "progress": False, **other}),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_is_seeded_and_leaves_its_model_and_the_global_stream_alone(name: str) -> None:
    before, stream = {key: value.clone() for key, value in vit().state_dict().items()}, torch.get_rng_state()
    first, same, other = (TRAININGS[name](vit(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in vit().state_dict().items())
    weights = [torch.cat([w.detach().flatten() for w in model.parameters()]) for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert hooks(first) == hooks(vit())
    assert all(w.requires_grad for w in first.parameters())


def test_ard_prm_without_its_ramp_is_plain_adversarial_training() -> None:
    plain = defense.adversarial_training(vit(), batch, eps=4 / 255, steps=2, progress=False)
    reduced = TRAININGS["ard_prm"](vit(), ramp=0.0)
    for ours, theirs in zip(reduced.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_dropped_attention_block_is_a_constant_backwards_only() -> None:
    images, _ = batch(0, 2)
    installed = hooks(vit())
    x = images.clone().requires_grad_(True)
    reference = vit()(x)
    with defense._gradient_around_attention(vit(), 1.0, seeded()):
        answer = vit()(x)
        torch.testing.assert_close(answer, reference)
        # without attention, the class token hears of no patch: nothing reaches the pixels
        assert torch.autograd.grad(answer.sum(), x)[0].abs().max() == 0
    assert torch.autograd.grad(reference.sum(), x)[0].abs().max() > 0
    with pytest.raises(RuntimeError), defense._gradient_around_attention(vit(), 1.0, seeded()):
        raise RuntimeError
    assert hooks(vit()) == installed


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("ard_prm", {"eps": 0.0}), ("ard_prm", {"steps": 0}), ("ard_prm", {"ramp": 1.5}), ("ard_prm", {"ramp": -0.1}),
        ("rspc", {"patches": 0}), ("rspc", {"patches": 16}), ("rspc", {"steps": 0}), ("rspc", {"weight": -1.0}),
    ],
)  # fmt: skip
def test_a_training_refuses_bad_numbers_by_name(name: str, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        TRAININGS[name](vit(), **bad)


def test_rspc_lowers_the_loss_on_scenes_with_ruined_patches() -> None:
    student = defense.rspc(vit(), lambda step: batch(step, 32), patches=1, steps=15, progress=False)
    test = scenes(64, split="validation", seed=5)
    crafted = torch.rand(test.images.shape, generator=seeded())
    mask = torch.zeros(64, 1, 32, 32, dtype=torch.bool)
    mask[:, :, 8:24, 8:16] = True
    ruined = torch.where(mask, crafted, test.images)
    with torch.no_grad():
        assert F.cross_entropy(student(ruined), test.labels) < F.cross_entropy(vit()(ruined), test.labels)


@pytest.mark.parametrize("part", ["attention", "cls"])
def test_the_score_is_the_distance_of_what_the_vit_reads(part: Any) -> None:
    detector = defense.vitguard(vit(), darker, layer=2, part=part)
    images, _ = batch(0, 3)
    installed = hooks(vit())
    x = images.clone().requires_grad_(True)
    assert torch.autograd.grad(detector(x).sum(), x)[0].abs().max() > 0
    assert hooks(vit()) == installed
    with torch.no_grad():
        scores, pair = detector(images), (images, darker(images))
        if part == "cls":
            read = [
                vit().model(pixel_values=(x - vit().mean) / vit().std, output_hidden_states=True).hidden_states[3][:, 0]
                for x in pair
            ]
        else:
            read = []
            for x in pair:
                with attending(vit()) as attention:
                    vit()(x)
                read.append(attention.maps[2][:, :, 0, 1:].flatten(1))
    torch.testing.assert_close(scores, (read[0] - read[1]).square().sum(1).sqrt())


def test_an_unnoticed_error_needs_both_a_wrong_class_and_silence() -> None:
    outputs = torch.tensor([[2.0, 1, -0.5], [2, 1, 0.5], [1, 2, -0.5], [1, 2, 0.5], [1, 2, 0]])
    criterion, rows = defense.Unnoticed(torch.zeros(5, dtype=torch.int64)), torch.arange(5)
    assert criterion.met(outputs, rows).tolist() == [False, False, True, False, True]
    assert criterion.correct(outputs, rows).tolist() == [True, False, False, False, False]
    climbed = defense.evading(2.0)(criterion, outputs, rows)
    torch.testing.assert_close(climbed, torch.tensor([-1 + 0.2, -1 - 1, 1 + 0.2, 1 - 1, 1]))
    with pytest.raises(TypeError, match="Unnoticed"):
        defense.evading(1.0)(Misclassified(criterion.labels), outputs, rows)


def test_a_guarded_model_answers_as_before_and_sounds_its_alarm_above_the_threshold() -> None:
    images, _ = batch(0, 4)
    outputs = defense.guarded(vit(), lambda x: torch.tensor([0.5, 1.0, 2.0, 4.0]), 2.0)(images)
    torch.testing.assert_close(outputs[:, :-1], vit()(images))
    torch.testing.assert_close(outputs[:, -1], torch.tensor([-0.75, -0.5, 0, 1]))


def test_a_purifier_averages_fresh_draws_and_is_fixed_by_its_seed() -> None:
    images, _ = batch(0, 4)
    with torch.no_grad():
        answer = defense.diffpure(vit(), washer(), time=50, draws=3, seed=7)(images)
        generator = seeded(7)
        draws = [torch.randn(1, 3, 32, 32, generator=generator) for _ in range(3)]
        washed = [defense.purify(washer(), images, time=50, noise=noise) for noise in draws]
        torch.testing.assert_close(answer, torch.stack([vit()(x).softmax(-1) for x in washed]).mean(0).log())
        assert torch.equal(answer, defense.diffpure(vit(), washer(), time=50, draws=3, seed=7)(images))
        assert not torch.equal(answer, defense.diffpure(vit(), washer(), time=50, draws=3, seed=8)(images))
        alone = defense.diffpure(vit(), washer(), time=50, draws=3, seed=7)(images[2:3])
        torch.testing.assert_close(alone, answer[2:3], atol=1e-4, rtol=1e-4)
    assert all(x.min() >= 0 and x.max() <= 1 for x in washed)


@pytest.mark.parametrize("bad", [{"time": 0}, {"time": 1000}, {"steps": 0}, {"time": 3, "steps": 4}, {"draws": 0}])
def test_a_purifier_refuses_bad_numbers_by_name(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="draws" if "draws" in bad else "steps" if "steps" in bad else "time"):
        defense.diffpure(vit(), washer(), **{"time": 50, **bad})


def test_a_surrogate_that_is_the_victim_gives_plain_pgd() -> None:
    images, labels = batch(3, 24)
    criterion = Misclassified(labels)
    ours = defense.surrogate_pgd(vit(), vit(), images, criterion, eps=2 / 255, steps=4, generator=seeded())
    plain = pixels.pgd(vit(), images, criterion, eps=2 / 255, steps=4, early_removal=False, generator=seeded())
    assert torch.equal(ours.images, plain.images)
    assert torch.equal(ours.success, plain.success)
    assert ours.success.any()


def test_a_surrogates_verdict_does_not_count() -> None:
    images, labels = batch(3, 8)
    silent = defense.surrogate_pgd(
        lambda x: F.one_hot(labels, 18).float(), vit(), images, Misclassified(labels), eps=8 / 255, steps=2, generator=seeded()
    )
    assert not silent.success.any()
    assert torch.equal(silent.images, images)


@pytest.mark.parametrize("bad", [{"layer": 4}, {"layer": -1}, {"part": "value"}])
def test_a_detector_refuses_what_the_model_lacks(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        defense.vitguard(vit(), darker, **{"layer": 0, **bad})


def test_everything_runs_on_a_full_size_vit() -> None:
    images = torch.rand(2, 3, 224, 224, generator=seeded()).mul(255).round() / 255
    labels = full_size()(images).argmax(-1)
    detector = defense.vitguard(full_size(), darker, layer=1)
    assert detector(images).shape == (2,)
    trained = defense.ard_prm(full_size(), lambda step: (images, labels), eps=1 / 255, steps=1, inner_steps=1, progress=False)
    assert trained(images).shape == (2, 10)
    stable = defense.rspc(full_size(), lambda step: (images, labels), patches=20, steps=1, inner_steps=0, progress=False)
    assert stable(images).shape == (2, 10)
    options = {"sample_size": 224, "block_out_channels": (8,), "norm_num_groups": 4, "add_attention": False}
    defended = defense.diffpure(full_size(), denoiser.build(options, seed=0).eval(), time=100)
    criterion = Misclassified(defended(images).argmax(-1).detach())
    attack = defense.surrogate_pgd(defended, defended, images, criterion, eps=4 / 255, steps=1, generator=seeded())
    assert Ball(4 / 255).holds(attack.images, images).all()


@pytest.mark.parametrize("name", ["ard_prm", "rspc", "vitguard"])
def test_what_needs_a_vit_says_so(name: str) -> None:
    class Flat(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    with pytest.raises(TypeError, match="ViT"):
        TRAININGS[name](Flat()) if name in TRAININGS else defense.vitguard(Flat(), darker, layer=0)  # type: ignore[arg-type]


def test_the_detector_flags_plain_pgd_and_falls_to_an_attack_that_knows_of_it() -> None:
    cleaner, calm = zoo.load("denoiser"), scenes(100, split="validation", seed=21)

    def rebuild(x: torch.Tensor) -> torch.Tensor:
        return defense.purify(cleaner, x, time=50, noise=torch.randn(1, 3, 32, 32, generator=seeded(3)))

    detector = defense.vitguard(vit(), rebuild, layer=3, part="cls")
    with torch.no_grad():
        threshold = threshold_at_fpr(detector(calm.images).numpy(), 0.05)
    test = scenes(32, split="validation", seed=22)
    goal, guard = defense.Unnoticed(test.labels), defense.guarded(vit(), detector, threshold)
    budget = {"eps": 8 / 255, "steps": 10, "generator": seeded()}
    plain = pixels.pgd(vit(), test.images, Misclassified(test.labels), **budget)
    unaware = pixels.replay(guard, plain, test.images, goal)
    aware = pixels.pgd(guard, test.images, goal, objective=defense.evading(1.0), **budget)
    assert plain.success.float().mean() > 0.7
    assert unaware.success.float().mean() < 0.3
    assert aware.success.sum() > unaware.success.sum()
    assert Ball(8 / 255).holds(aware.images, test.images).all()
