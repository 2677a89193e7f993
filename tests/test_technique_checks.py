"""The checks every demo passes, over the rows in `tests/rows`: add a row there when you bind a function to the taxonomy.

Run on the shipped models, since a check on a toy function would not tell whether the demo is real.
"""

from __future__ import annotations

import io
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from safescale_lib import survey
from safescale_lib.measure.intervals import paired_test
from safescale_lib.search.models import Model
from safescale_lib.search.pixels import PixelAttack
from tests.rows.common import AttackRow, DefenseRow, Setting

ROWS = [
    import_module(f"tests.rows.{path.stem}")
    for path in sorted((Path(__file__).parent / "rows").glob("*.py"))
    if path.stem != "common"
]
ATTACKS: dict[str, AttackRow] = {name: row for module in ROWS for name, row in getattr(module, "ATTACKS", {}).items()}
DEFENSES: dict[str, DefenseRow] = {name: row for module in ROWS for name, row in getattr(module, "DEFENSES", {}).items()}
ELSEWHERE = {name for module in ROWS for name in getattr(module, "FUNCTIONS", ())}
"""Bound functions whose checks differ in kind (backdoors, poisoned training sets) and stand in `tests/vfm`."""

attacks = pytest.mark.parametrize("name", ATTACKS)
defenses = pytest.mark.parametrize("name", DEFENSES)


@lru_cache
def result(name: str, budget: float | None = None, batch_size: int = 256) -> PixelAttack:
    row = ATTACKS[name]
    return row.attack(row.setting(), row.budget if budget is None else budget, batch_size=batch_size)


def verdicts(setting: Setting, images: torch.Tensor, verdict: str = "met") -> torch.Tensor:
    """(N,) bool of the criterion on images, asked anew."""
    with torch.no_grad():
        return getattr(setting.criterion, verdict)(setting.model(images), torch.arange(len(images)))


@attacks
def test_zero_budget_reproduces_the_clean_result(name: str) -> None:
    row = ATTACKS[name]
    attack, setting = result(name, row.rising[0]), row.setting()
    assert torch.equal(attack.images, setting.images)
    assert torch.equal(attack.skipped, ~verdicts(setting, setting.images, "correct"))
    assert not attack.success.any()


@attacks
def test_budget_and_success_hold_on_the_file_that_would_be_saved(name: str) -> None:
    row, attack = ATTACKS[name], result(name)
    setting, loaded = row.setting(), []
    for image in attack.images:
        file = io.BytesIO()
        Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(file, "png")
        loaded.append(torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1).float() / 255)
    saved = torch.stack(loaded)
    assert row.within(saved, setting.images, row.budget).all()
    assert attack.success.any()
    assert torch.equal(verdicts(setting, saved)[attack.attempted], attack.success[attack.attempted])
    assert torch.equal(saved[~attack.success], setting.images[~attack.success])
    assert not (attack.success & attack.skipped).any()


@attacks
def test_success_does_not_fall_with_the_budget(name: str) -> None:
    rates = [result(name, budget).success.float().mean().item() for budget in ATTACKS[name].rising]
    assert rates == sorted(rates)
    assert rates[-1] > rates[0]


@attacks
def test_unbounded_budget_always_wins_or_the_row_says_why(name: str) -> None:
    expected = ATTACKS[name].unbounded
    if isinstance(expected, str):
        assert len(expected) > 20, "say why"
        return
    budget, least = expected
    attack = result(name, budget)
    assert (attack.success.sum() / attack.attempted.sum()).item() >= least


@attacks
def test_it_is_at_least_as_strong_as_the_simpler_attack(name: str) -> None:
    weaker = ATTACKS[name].beats
    if weaker in ATTACKS:
        assert result(name).success.sum() >= result(weaker).success.sum()
    else:
        assert len(weaker) > 10, "say why there is none"


@attacks
def test_it_beats_random_of_equal_budget(name: str) -> None:
    row = ATTACKS[name]
    if isinstance(row.control, str):
        assert len(row.control) > 20, "say why"
    else:
        assert result(name).success.sum() > row.control(row.setting()).success.sum()


@attacks
def test_independent_of_batch_size(name: str) -> None:
    first = result(name)
    small = result(name, None, batch_size=17)  # sums over other batches differ in the last bit, and so may a sign
    assert (first.success != small.success).float().mean() <= 0.03


@attacks
def test_deterministic_and_the_model_is_left_as_found(name: str) -> None:
    """The second run, on a model in training mode with a frozen weight, must give what the first one gave."""
    row, first = ATTACKS[name], result(name)
    setting = row.setting()
    model = setting.model
    assert isinstance(model, torch.nn.Module)
    weights = list(model.parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    stream = torch.get_rng_state()
    model.train()
    weights[0].requires_grad_(False)
    try:
        again = row.attack(setting, row.budget)
        assert all(module.training for module in model.modules())
        assert [weight.requires_grad for weight in weights] == [False] + [True] * (len(weights) - 1)
    finally:
        model.eval().requires_grad_(True)
    assert torch.equal(first.images, again.images)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(weight.grad is None for weight in weights)
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert torch.equal(stream, torch.get_rng_state())


BAD = [(name, budget) for name, row in ATTACKS.items() for budget in row.bad]


@pytest.mark.parametrize(("name", "budget"), BAD)
def test_a_bad_budget_is_refused_by_name(name: str, budget: float) -> None:
    row = ATTACKS[name]
    with pytest.raises(ValueError, match=row.bad_match):
        row.attack(row.setting(), budget)


@lru_cache
def defended(name: str) -> Model:
    return DEFENSES[name].defend(DEFENSES[name].setting().model)


@defenses
def test_a_defense_keeps_the_call_and_most_of_the_utility(name: str) -> None:
    row, model = DEFENSES[name], defended(name)  # a defense may train: not inside inference mode
    setting = row.setting()
    everyone = torch.arange(len(setting.images))
    with torch.inference_mode():
        after, before = model(setting.images), setting.model(setting.images)
        utility, plain = (setting.criterion.correct(x, everyone).float().mean().item() for x in (after, before))
    assert after.shape == before.shape
    assert utility >= plain - row.utility_cost


@defenses
def test_a_defense_is_judged_by_its_adaptive_attack(name: str) -> None:
    row = DEFENSES[name]
    setting = row.setting()
    undefended, adaptive = row.plain(setting), row.adaptive(defended(name), setting)
    assert row.within(adaptive.images, setting.images).all()
    if row.stands:
        assert adaptive.survived.sum() > undefended.survived.sum()
        assert paired_test(adaptive.survived.numpy(), undefended.survived.numpy()) < 0.01
    else:
        standard = row.plain(Setting(defended(name), setting.images, setting.criterion))
        assert len(row.lesson) > 20, "say what is learnt"
        assert paired_test(standard.survived.numpy(), adaptive.survived.numpy()) < 0.01, (
            "the adaptive attack must tell it apart"
        )
        assert standard.survived.sum() > adaptive.survived.sum()


@defenses
def test_the_defended_model_is_another_one(name: str) -> None:
    model = DEFENSES[name].setting().model
    assert isinstance(model, torch.nn.Module)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert defended(name) is not model
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_every_bound_technique_has_a_row() -> None:
    rows = {row.function for row in ATTACKS.values()} | {row.function for row in DEFENSES.values()} | ELSEWHERE
    bound = {technique.name for technique in survey.bindings()}
    assert bound == rows


def test_every_defense_in_the_book_meets_an_attack_written_against_it() -> None:
    notebooks = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
    entries = [entry.outcome for notebook in notebooks for entry in survey.outcomes(notebook)]
    defended_keys = {entry["technique"] for entry in entries if "_defense" in entry["technique"]}
    assert defended_keys
    assert defended_keys <= {entry["against"] for entry in entries}
