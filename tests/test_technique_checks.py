"""The checks every demo passes, a row per technique: add a row when you bind a function to the taxonomy.

Run on the shipped models, since a check on a toy function would not tell whether the demo is real.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from safescale_lib import survey, zoo
from safescale_lib.measure.criteria import Misclassified
from safescale_lib.measure.intervals import paired_test
from safescale_lib.search.ball import Ball
from safescale_lib.search.models import Model, straight_through
from safescale_lib.search.pixels import PixelAttack, random_noise, replay
from safescale_lib.vfm import vit as techniques
from safescale_lib.world.scenes import scenes
from safescale_lib.zoo.adapter import PixelClassifier

N = 96
EPS = 8 / 255


@lru_cache
def victim(name: str = "vit") -> PixelClassifier:
    return zoo.load(name)


@lru_cache
def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    batch = scenes(N, split="validation", seed=4)
    return batch.images, batch.labels


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class AttackRow:
    """attack(model, images, criterion, eps, batch_size) -> result; weaker: name of the row it must not fall behind.

    rising: budgets over which success must not fall. unbounded: success expected at eps = 1, or why it is not ~1.
    """

    attack: Callable[..., PixelAttack]
    function: str
    rising: tuple[float, ...]
    unbounded: float | str
    weaker: str | None = None


def _fgsm(model: Model, images: torch.Tensor, criterion: Misclassified, eps: float, batch_size: int = 256) -> PixelAttack:
    return techniques.fgsm(model, images, criterion, eps=eps, batch_size=batch_size)


def _pgd(model: Model, images: torch.Tensor, criterion: Misclassified, eps: float, batch_size: int = 256) -> PixelAttack:
    return techniques.pgd(model, images, criterion, eps=eps, steps=10, generator=seeded(), batch_size=batch_size)


ATTACKS = {
    "fgsm": AttackRow(
        _fgsm, "fgsm", rising=(0, 1 / 255, 2 / 255, 4 / 255), unbounded="one step of any length overshoots: it is not a search"
    ),
    "pgd": AttackRow(_pgd, "pgd", rising=(0, 1 / 255, 4 / 255, 8 / 255, 32 / 255), unbounded=0.99, weaker="fgsm"),
}


@lru_cache
def result(name: str, eps: float = EPS, batch_size: int = 256) -> PixelAttack:
    images, labels = inputs()
    return ATTACKS[name].attack(victim(), images, Misclassified(labels), eps, batch_size=batch_size)


attacks = pytest.mark.parametrize("name", ATTACKS)


@attacks
def test_zero_budget_reproduces_the_clean_result(name: str) -> None:
    images, labels = inputs()
    attack = result(name, 0.0)
    assert torch.equal(attack.images, images)
    with torch.inference_mode():
        assert torch.equal(attack.skipped, victim()(images).argmax(-1) != labels)
    assert not attack.success.any()


@attacks
def test_budget_and_success_hold_on_the_file_that_would_be_saved(name: str) -> None:
    images, labels = inputs()
    attack = result(name)
    loaded = []
    for image in attack.images:
        file = io.BytesIO()
        Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(file, "png")
        loaded.append(torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1).float() / 255)
    saved = torch.stack(loaded)
    assert (saved - images).abs().max() <= EPS + 1e-6
    with torch.inference_mode():
        wrong = victim()(saved).argmax(-1) != labels
    assert attack.success.any()
    assert torch.equal(wrong, attack.success | attack.skipped)
    assert torch.equal(saved[~attack.success], images[~attack.success])


@attacks
def test_success_does_not_fall_with_the_budget(name: str) -> None:
    rates = [result(name, eps).success.float().mean().item() for eps in ATTACKS[name].rising]
    assert rates == sorted(rates)
    assert rates[-1] > rates[0]


@attacks
def test_unbounded_budget_always_wins_or_the_row_says_why(name: str) -> None:
    expected = ATTACKS[name].unbounded
    attack = result(name, 1.0)
    rate = (attack.success.sum() / attack.attempted.sum()).item()
    if isinstance(expected, str):
        assert rate < 0.99, f"remove the excuse: {expected}"
    else:
        assert rate >= expected


@attacks
def test_iterating_is_at_least_as_strong_as_one_step(name: str) -> None:
    weaker = ATTACKS[name].weaker
    if weaker is None:
        assert name == "fgsm"  # the single step itself
    else:
        assert result(name).success.sum() >= result(weaker).success.sum()


@attacks
def test_white_box_then_black_box_then_random(name: str) -> None:
    images, labels = inputs()
    criterion = Misclassified(labels)
    surrogate = ATTACKS[name].attack(victim("vit-robust"), images, criterion, EPS)
    transferred = replay(victim(), surrogate, images, criterion)
    noise = random_noise(victim(), images, criterion, eps=EPS, tries=10, generator=seeded())
    assert result(name).success.sum() >= transferred.success.sum()
    assert result(name).success.sum() > noise.success.sum()


@attacks
def test_deterministic_and_independent_of_batch_size(name: str) -> None:
    first = result(name)
    images, labels = inputs()
    again = ATTACKS[name].attack(victim(), images, Misclassified(labels), EPS)
    assert torch.equal(first.images, again.images)
    small = result(name, EPS, batch_size=17)  # sums over other batches differ in the last bit, and so may a sign
    assert (first.success != small.success).float().mean() <= 0.02


@attacks
def test_the_model_is_left_as_found(name: str) -> None:
    images, labels = inputs()
    model = zoo.load("vit").train()
    model.model.vit.embeddings.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [weight.requires_grad for weight in model.parameters()]
    stream = torch.get_rng_state()
    ATTACKS[name].attack(model, images[:8], Misclassified(labels[:8]), EPS)
    assert all(module.training for module in model.modules())
    assert flags == [weight.requires_grad for weight in model.parameters()]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(stream, torch.get_rng_state())


@attacks
@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_a_bad_budget_is_refused_by_name(name: str, eps: float) -> None:
    images, labels = inputs()
    with pytest.raises(ValueError, match="eps"):
        ATTACKS[name].attack(victim(), images, Misclassified(labels), eps)


@dataclass(frozen=True)
class DefenseRow:
    """defend(model) -> defended callable. adaptive(defended) -> attack written against this defense.

    stands: under its adaptive attack it still beats the undefended model, by a paired test; False for a lesson that must fall.
    """

    defend: Callable[[PixelClassifier], Model]
    function: str
    adaptive: Callable[[Model], PixelAttack]
    stands: bool


def _adapt_training(defended: Model) -> PixelAttack:
    images, labels = inputs()
    return techniques.pgd(defended, images, Misclassified(labels), eps=EPS, steps=20, restarts=2, generator=seeded(1))


def _adapt_quantised(defended: Model) -> PixelAttack:
    images, labels = inputs()
    through = straight_through(victim(), lambda x: techniques.quantise(x, 8))
    crafted = techniques.pgd(through, images, Misclassified(labels), eps=EPS, steps=20, generator=seeded(1))
    return replay(defended, crafted, images, Misclassified(labels))


def _briefly_trained(model: PixelClassifier) -> Model:
    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        fresh = scenes(48, split="train", seed=step)
        return fresh.images, fresh.labels

    return techniques.adversarial_training(model, batch, eps=EPS, steps=40, progress=False)


DEFENSES = {
    "adversarial training, 40 steps": DefenseRow(_briefly_trained, "adversarial_training", _adapt_training, stands=True),
    "quantised input, 8 levels": DefenseRow(
        lambda model: techniques.quantised_input(model, levels=8), "quantised_input", _adapt_quantised, stands=False
    ),
}
defenses = pytest.mark.parametrize("name", DEFENSES)


@lru_cache
def defended(name: str) -> Model:
    return DEFENSES[name].defend(victim())


@defenses
def test_a_defense_keeps_the_call_and_most_of_the_utility(name: str) -> None:
    images, labels = inputs()
    model = defended(name)  # a defense may train: not inside inference mode
    with torch.inference_mode():
        logits, plain = model(images), victim()(images)
    assert logits.shape == plain.shape
    utility, before = ((x.argmax(-1) == labels).float().mean().item() for x in (logits, plain))
    assert utility >= before - 0.05


@defenses
def test_a_defense_is_judged_by_its_adaptive_attack(name: str) -> None:
    images, labels = inputs()
    row = DEFENSES[name]
    standard = techniques.pgd(defended(name), images, Misclassified(labels), eps=EPS, steps=10, generator=seeded())
    adaptive = row.adaptive(defended(name))
    assert Ball(EPS).holds(adaptive.images, images).all()
    if row.stands:
        plain = result("pgd").survived
        assert adaptive.survived.sum() > plain.sum()
        assert paired_test(adaptive.survived.numpy(), plain.numpy()) < 0.01
    else:
        assert standard.survived.float().mean() > 0.9, "the lesson needs a defense that looks good"
        assert adaptive.survived.float().mean() < 0.35


@defenses
def test_the_defended_model_is_another_one(name: str) -> None:
    before = {key: value.clone() for key, value in victim().state_dict().items()}
    assert defended(name) is not victim()
    assert all(torch.equal(before[key], value) for key, value in victim().state_dict().items())


def test_every_bound_technique_has_a_row() -> None:
    rows = {row.function for row in ATTACKS.values()} | {row.function for row in DEFENSES.values()}
    bound = {technique.name for technique in survey.bindings()}
    assert bound == rows


def test_every_defense_in_the_book_meets_an_attack_written_against_it() -> None:
    notebooks = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
    entries = [entry.outcome for notebook in notebooks for entry in survey.outcomes(notebook)]
    defended_keys = {entry["technique"] for entry in entries if "_defense" in entry["technique"]}
    assert defended_keys
    assert defended_keys <= {entry["against"] for entry in entries}
