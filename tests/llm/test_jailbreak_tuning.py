"""Defenses by training, checked step by step on a small model with random weights."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from random import Random

import pytest
import torch

from safescale_lib.llm.jailbreak_defense import tuning
from safescale_lib.search.models import frozen
from safescale_lib.world import town
from safescale_lib.zoo.chat import answer_loss, finished, tune
from tests.llm.common import asking
from tests.llm.test_jailbreak_inference import tiny

HARMFUL, SAFE = asking(("code",), n=6), asking(("pet", "number"), n=4)


def vector(model):
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def value(model, chats):
    with torch.no_grad():
        return answer_loss(model, [finished(chat) for chat in chats]).item()


def listeners(model):
    """How many hooks there are; transformers keeps some of its own."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


DEFENSES = {
    "vaccine": lambda **k: tuning.vaccine(tiny(), SAFE, batch=4, **k),
    "booster": lambda **k: tuning.booster(tiny(), SAFE, HARMFUL, batch=4, **k),
    "lisa": lambda **k: tuning.lisa(tiny(), HARMFUL, SAFE, batch=4, **k),
    "panacea": lambda **k: tuning.panacea(tiny(), HARMFUL, SAFE, batch=4, **k),
    "pearl": lambda **k: tuning.pearl(tiny(), shots(3), batch=3, **k),
}


def shots(n):
    draw = Random(4)
    return [
        chat
        for chat in (town.request(town.pick(draw, ("number",), "train"), "few-shot", draw) for _ in range(200))
        if tuning.demonstrations(chat) == n
    ][:4]


@pytest.mark.parametrize("name", DEFENSES)
def test_training_defenses_leave_the_model_and_repeat_under_a_seed(name):
    before, stream, hooks = vector(tiny()), torch.get_rng_state(), listeners(tiny())
    first, again, other = (DEFENSES[name](steps=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(vector(first), vector(again))
    assert not torch.equal(vector(first), vector(other))
    assert torch.equal(before, vector(tiny()))
    assert torch.equal(before, vector(DEFENSES[name](steps=0))), "no step, no change"
    assert torch.equal(stream, torch.get_rng_state())
    assert not first.training
    assert all(weight.grad is None for weight in tiny().parameters())
    assert listeners(tiny()) == listeners(first) == hooks
    with pytest.raises(ValueError, match="steps"):
        DEFENSES[name](steps=-1)


def test_vaccine_without_a_shift_is_plain_tuning():
    plain = tune(tiny(), SAFE, steps=3, lr=5e-4, batch=4, seed=2)
    hardened = tuning.vaccine(tiny(), SAFE, rho=0.0, steps=3, lr=5e-4, batch=4, seed=2)
    assert torch.allclose(vector(plain), vector(hardened), atol=1e-6)


def test_vaccine_shifts_embeddings_by_rho_in_the_direction_that_hurts(monkeypatch):
    """The shift over all layers has length rho, and at a small rho the loss rises by rho times the gradient's length."""
    losses, shifts = [], []
    real_loss, real_altered = tuning.answer_loss, tuning.altered

    def watched_loss(*args):
        losses.append(real_loss(*args))
        return losses[-1]

    def watched_altered(lm, changes):
        def look(layer, change):
            def changed(states):
                out = change(states)
                shifts.append((layer, (out - states).detach()))
                return out

            return changed

        return real_altered(lm, {layer: look(layer, change) for layer, change in changes.items()})

    monkeypatch.setattr(tuning, "answer_loss", watched_loss)
    monkeypatch.setattr(tuning, "altered", watched_altered)
    tuning.vaccine(tiny(), SAFE, rho=0.01, steps=1, batch=4)
    by = torch.stack([shift.norm() for _, shift in shifts[2:4]]).norm().item()
    assert [layer for layer, _ in shifts] == [0, 1, 0, 1]
    assert by == pytest.approx(0.01, rel=1e-3)
    assert losses[1] > losses[0]


def test_booster_without_strength_is_plain_tuning_and_with_it_flattens_the_harmful_step():
    plain = tuning.booster(tiny(), SAFE, HARMFUL, strength=0.0, steps=3, batch=4)
    assert not torch.equal(vector(plain), vector(tiny()))

    def gain(model):
        """What one normalised harmful step of length alpha gains."""
        weights = list(model.parameters())
        loss = answer_loss(model, [finished(chat) for chat in HARMFUL])
        slopes = torch.autograd.grad(loss, weights)
        size = torch.stack([s.norm() for s in slopes]).norm()
        with tuning._moved(weights, [-0.1 * s / size for s in slopes]):
            return loss.item() - value(model, HARMFUL)

    flat = tuning.booster(tiny(), SAFE, HARMFUL, strength=20.0, steps=15, batch=6)
    steep = tuning.booster(tiny(), SAFE, HARMFUL, strength=0.0, steps=15, batch=6)
    assert gain(flat) < 0.85 * gain(steep)


def test_moved_puts_the_weights_back_exactly():
    weights, before = list(tiny().parameters()), vector(tiny())
    with tuning._moved(weights, [torch.ones_like(w) for w in weights]):
        assert torch.allclose(vector(tiny()), before + 1, atol=1e-5)
    assert torch.equal(vector(tiny()), before)


def test_lisa_learns_both_and_a_strong_pull_holds_it_in_place():
    both = tuning.lisa(tiny(), HARMFUL, SAFE, steps=16, batch=4, pull=0.0)
    user_only = tuning.lisa(tiny(), HARMFUL, SAFE, phase=(0, 4), steps=16, batch=4, pull=0.0)
    assert value(both, SAFE) < value(user_only, SAFE)
    assert value(user_only, HARMFUL) < value(both, HARMFUL) < value(tiny(), HARMFUL)
    tied = tuning.lisa(tiny(), HARMFUL, SAFE, steps=16, batch=4, pull=1e4)
    start = vector(tiny())
    assert (vector(tied) - start).norm() < 0.5 * (vector(both) - start).norm()
    plain = tune(tiny(), HARMFUL, steps=4, lr=1e-3, batch=4, seed=3)
    alone = tuning.lisa(tiny(), HARMFUL, SAFE, phase=(0, 4), steps=4, batch=4, pull=0.0, seed=3)
    assert torch.allclose(vector(plain), vector(alone), atol=1e-6)
    with pytest.raises(ValueError, match="phase"):
        tuning.lisa(tiny(), HARMFUL, SAFE, phase=(4, 0))


@pytest.mark.parametrize("name", DEFENSES)
def test_a_copy_learns_while_a_search_holds_the_weights(name):
    model = tiny()
    with frozen(model.lm):
        held = DEFENSES[name](steps=2)
    assert all(weight.requires_grad for weight in held.parameters())
    assert not torch.equal(vector(held), vector(model))


def test_antidote_removes_the_weights_with_the_highest_scores():
    model, name = tiny(), "model.layers.0.mlp.up_proj.weight"
    inputs = []
    layer = dict(model.lm.named_modules())[name.removesuffix(".weight")]
    handle = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].reshape(-1, 32)))
    for one in HARMFUL:
        value(model, [one])
    handle.remove()
    inputs = [torch.cat(inputs)]  # of each conversation alone, without padding
    slow = torch.stack([layer.weight[:, j].abs() * inputs[0][:, j].square().sum().sqrt() for j in range(32)], dim=1)
    scores = tuning.harmful_scores(model, HARMFUL)
    assert torch.allclose(scores[name], slow, rtol=1e-4)
    longer = replace(HARMFUL[2], answer=f"{HARMFUL[2].answer} {HARMFUL[2].answer}")
    alone = torch.stack([tuning.harmful_scores(model, [one])[name] for one in [*HARMFUL[:2], longer]])
    together = tuning.harmful_scores(model, [*HARMFUL[:2], longer])[name]
    assert torch.allclose(together, alone.square().sum(0).sqrt(), rtol=1e-4), "padding counts for nothing"
    assert not any("lm_head" in key or "embed" in key for key in scores)
    repaired = tuning.antidote(model, HARMFUL, share=0.1)
    weights = dict(repaired.lm.named_parameters())
    for key, score in scores.items():
        gone = weights[key] == 0
        assert gone.sum() == int(0.1 * score.numel())
        assert score[gone].min() >= score[~gone].max()
    same = tuning.antidote(model, HARMFUL, share=0.0)
    assert torch.equal(vector(same), vector(model))
    relative = tuning.antidote(model, HARMFUL, HARMFUL[:3], share=0.1)
    assert not torch.equal(vector(relative), vector(repaired))
    with pytest.raises(ValueError, match="share"):
        tuning.antidote(model, HARMFUL, share=1.0)


def test_panacea_raises_the_harmful_loss_within_its_radius():
    for rho in (0.5, 2.0):
        moved = tuning.panacea(tiny(), HARMFUL, SAFE, rho=rho, steps=8, batch=6)
        assert (vector(moved) - vector(tiny())).norm() <= rho * 1.001
        assert value(moved, HARMFUL) - value(moved, SAFE) > value(tiny(), HARMFUL) - value(tiny(), SAFE)
    assert torch.equal(vector(tuning.panacea(tiny(), HARMFUL, SAFE, rho=0.0, batch=4)), vector(tiny()))


# --- orders -----------------------------------------------------------------------------------------------------------


def test_reordering_moves_pairs_and_nothing_else():
    chat = shots(3)[0]
    turns = [m for m in chat.messages if m["role"] != "system"]
    pairs = [(turns[2 * i]["content"], turns[2 * i + 1]["content"]) for i in range(3)]
    for order in permutations(range(3)):
        new = [m for m in tuning.reordered(chat, order).messages if m["role"] != "system"]
        assert [(new[2 * i]["content"], new[2 * i + 1]["content"]) for i in range(3)] == [pairs[i] for i in order]
        assert new[-1] == turns[-1]
    assert tuning.reordered(chat, (0, 1, 2)) == chat
    with pytest.raises(ValueError, match="once"):
        tuning.reordered(chat, (0, 0, 1))


def test_orders_are_different_and_all_of_them_where_they_are_few():
    assert sorted(tuning.orders(3, 100, Random(0))) == sorted(permutations(range(3)))
    some = tuning.orders(4, 6, Random(0))
    assert len(set(some)) == len(some) == 6
    assert some[0] == (0, 1, 2, 3)
    assert tuning.orders(1, 6, Random(0)) == [(0,)]


def test_the_hardest_order_is_the_hardest():
    chats = shots(3)
    found = tuning.hardest_orders(tiny(), chats, 6, Random(0))
    for chat, hard in zip(chats, found, strict=True):
        tried = [tuning.reordered(chat, order) for order in permutations(range(3))]
        with torch.no_grad():
            worst = max(tuning.last_answer_loss(tiny(), [one]).item() for one in tried)
            assert tuning.last_answer_loss(tiny(), [hard]).item() == pytest.approx(worst, abs=1e-4)


def test_only_the_last_answer_is_learned():
    """The loss of a conversation without demonstrations is the usual one; a demonstration's answer adds nothing to it."""
    model, chat = tiny(), SAFE[0]
    one = answer_loss(model, [finished(chat)]).item()
    assert tuning.last_answer_loss(model, [chat]).item() == pytest.approx(one, abs=1e-4)
    taught = shots(1)[0]
    last = finished(taught)[-1]["content"]
    text = model.prompt(taught.messages)
    likely, tokens = model.log_likelihood([text], [f"{last} <end>"])
    assert tuning.last_answer_loss(model, [taught]).item() == pytest.approx((-likely / tokens).item(), abs=1e-4)
