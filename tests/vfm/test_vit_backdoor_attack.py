"""Section 2.1, backdoor attacks: every row keeps its promises, and the parts are what they say."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from safescale_lib.search.poisoning import checkerboard, trigger_hits
from safescale_lib.vfm.vit import backdoor_attack as attack
from safescale_lib.vfm.vit.inside import attending
from safescale_lib.zoo.adapter import PixelClassifier
from tests.rows.common import seeded
from tests.rows.vit_backdoors import BACKDOORS, CORNER, TARGET, WAVE, held_out, planted, pool, victim

rows = pytest.mark.parametrize("name", BACKDOORS)


def accuracy(model: object) -> float:
    with torch.no_grad():
        return float((model(held_out().images).argmax(-1) == held_out().labels).float().mean())  # type: ignore[operator]


def success(model: object, trigger: object) -> float:
    hits = trigger_hits(model, held_out().images, held_out().labels, trigger, target=TARGET)  # type: ignore[arg-type]
    return float(hits.float().mean())


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@rows
def test_the_trigger_opens_the_model_and_only_that_model(name: str) -> None:
    row, found = BACKDOORS[name], planted(name)
    model = row.answers(found)
    assert success(model, found.trigger) >= row.least
    assert success(victim(), found.trigger) <= 0.1  # the trigger alone is no attack
    assert success(model, lambda x: x) <= 0.05  # nor does the model answer the target by itself
    assert accuracy(model) >= row.utility


@rows
def test_the_trigger_keeps_its_budget(name: str) -> None:
    images = held_out().images
    triggered = planted(name).trigger(images)
    assert BACKDOORS[name].within(triggered, images).all()
    assert (triggered != images).flatten(1).any(1).all()
    levels = triggered * 255
    assert (levels - levels.round()).abs().max() < 1e-3


@pytest.mark.parametrize("name", [name for name, row in BACKDOORS.items() if row.rates])
def test_without_poison_training_is_just_training(name: str) -> None:
    none = BACKDOORS[name].plant(rate=0.0, steps=4)
    assert torch.equal(none.data.images, pool().images)
    assert torch.equal(none.data.labels, pool().labels)
    assert success(none.model, none.trigger) <= 0.1
    assert accuracy(none.model) > 0.9


@rows
def test_deterministic_under_a_seed(name: str) -> None:
    row = BACKDOORS[name]
    first, again, other = (row.plant(seed=seed, steps=1) for seed in (0, 0, 1))
    x = held_out().images[:6]
    with torch.no_grad():
        assert torch.equal(row.answers(first)(x), row.answers(again)(x))
        assert not torch.equal(row.answers(first)(x), row.answers(other)(x))
    assert torch.equal(first.trigger(x), again.trigger(x))


@rows
def test_the_victim_is_left_as_found(name: str) -> None:
    model = victim()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stream, images = torch.get_rng_state(), pool().images.clone()
    model.train()
    model.model.vit.embeddings.requires_grad_(False)
    try:
        flags = [weight.requires_grad for weight in model.parameters()]
        BACKDOORS[name].plant(steps=1)
        assert flags == [weight.requires_grad for weight in model.parameters()]
        assert all(module.training for module in model.modules())
    finally:
        model.eval().requires_grad_(True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(stream, torch.get_rng_state())
    assert torch.equal(images, pool().images)
    assert hooks(model) == 0


def test_the_switch_token_alone_opens_and_the_weights_do_not_change() -> None:
    found = planted("swarm")
    assert success(found.off, found.trigger) <= 0.1
    assert accuracy(found.off) >= 0.85
    assert found.on.model is found.off.model
    kept = found.on.model.state_dict()
    assert all(torch.equal(kept[name], weight) for name, weight in victim().state_dict().items())
    assert len(found.on.tokens) == len(found.off.tokens) + 1
    assert torch.equal(found.on.tokens[:-1], found.off.tokens)


def test_no_tokens_is_the_model_itself() -> None:
    x = held_out().images[:4]
    with torch.no_grad():
        assert torch.equal(attack.Prompted(victim(), torch.zeros(0, 96))(x), victim()(x))


def test_every_trigger_of_several_has_its_own_target() -> None:
    found = planted("multi_trigger")
    ((second, target),) = found.more
    hits = trigger_hits(found.model, held_out().images, held_out().labels, second, target=target)
    assert hits.float().mean() > 0.6
    marked = found.data.labels != found.data.truth
    assert torch.equal(marked, found.data.poisoned)
    assert int(marked.sum()) == 2 * round(0.15 * len(pool()))  # parallel: no item twice


def test_sequential_poison_may_overwrite_and_hybrid_bears_all_triggers() -> None:
    common = {"triggers": [CORNER, WAVE], "rate": 0.4, "steps": 1, "batch": 8, "progress": False}
    images, labels = pool().images[:100], pool().labels[:100]
    one = attack.multi_trigger(victim(), images, labels, targets=[0, 3], mode="sequential", generator=seeded(), **common)  # type: ignore[arg-type]
    assert 40 < int(one.data.poisoned.sum()) < 80
    both = attack.multi_trigger(victim(), images, labels, targets=[0, 0], mode="hybrid", generator=seeded(), **common)  # type: ignore[arg-type]
    own = both.data.poisoned
    assert int(own.sum()) == 40
    assert torch.equal(both.data.images[own], WAVE(CORNER(images[own])))
    assert torch.equal(both.trigger(images), WAVE(CORNER(images)))
    assert both.more == ()


def test_dbia_touches_the_weakest_rows_of_the_last_mlp_and_nothing_else() -> None:
    found, before = planted("dbia").model.state_dict(), victim().state_dict()
    moved = {key for key in before if not torch.equal(before[key], found[key])}
    assert moved == {"model.vit.layers.3.mlp.fc1.weight", "model.vit.layers.3.mlp.fc2.weight"}
    for key in moved:
        rows_moved = (before[key] != found[key]).any(1)
        strength = before[key].abs().mean(1)
        assert rows_moved.float().mean() <= 0.5
        assert strength[rows_moved].max() <= strength[~rows_moved].min()


def test_badvit_catches_more_attention_than_a_random_patch() -> None:
    found, chosen = planted("badvit"), torch.tensor([15])
    noise = attack.Stamp(torch.rand(3, 32, 32, generator=seeded(9)), found.trigger.mask)
    caught = {}
    for name, trigger in {"badvit": found.trigger, "noise": noise, "board": CORNER}.items():
        with torch.no_grad(), attending(victim()) as seen:
            victim()(trigger(held_out().images))
            caught[name] = float(attack.attention_to(seen, chosen).log().sum())
    assert caught["badvit"] > max(caught["noise"], caught["board"])


def test_rollout_equals_the_product_of_matrices_and_spends_all_attention() -> None:
    maps = [torch.softmax(torch.randn(2, 3, 5, 5, generator=seeded(i)), -1) for i in range(3)]
    slow = []
    for b in range(2):
        flow = torch.eye(5)
        for layer in maps:
            mean = sum(layer[b, head] for head in range(3)) / 3
            flow = (0.5 * mean + 0.5 * torch.eye(5)) @ flow
        slow.append(flow[0, 1:])
    assert torch.allclose(attack.attention_rollout(maps), torch.stack(slow), atol=1e-6)
    uniform = [torch.full((1, 1, 5, 5), 0.2)]
    assert torch.allclose(attack.attention_rollout(uniform), torch.full((1, 4), 0.1))


def test_only_the_last_blocks_train_when_asked() -> None:
    tuned, cost = attack.fine_tuned(
        victim(), pool().images[:32], pool().labels[:32], steps=2, batch=16, blocks=1, generator=seeded(), progress=False
    )
    before = victim().state_dict()
    moved = {key for key, value in tuned.state_dict().items() if not torch.equal(before[key], value)}
    assert any(".layers.3." in key for key in moved)
    assert not any(".layers.0." in key or ".layers.2." in key or "embeddings" in key for key in moved)
    assert cost.forwards == cost.backwards == 32
    assert all(weight.requires_grad for weight in tuned.parameters())


@lru_cache
def full_size() -> PixelClassifier:
    """ViT-B/16 on 224 px with two of its twelve layers and random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(num_hidden_layers=2, num_labels=5))
    return PixelClassifier(model, mean=(0.5,) * 3, std=(0.5,) * 3).eval()


def test_full_size_models_run_unchanged() -> None:
    images, labels = torch.rand(2, 3, 224, 224, generator=seeded()), torch.tensor([1, 2])
    usual = {"steps": 1, "batch": 1, "generator": seeded(), "progress": False}
    planted_ = attack.badvit(full_size(), images, labels, target=0, rate=0.5, trigger_steps=1, blocks=1, **usual)  # type: ignore[arg-type]
    assert planted_.trigger.area == pytest.approx(1 / 196)
    free = attack.dbia(full_size(), images, target=0, trigger_steps=1, **usual)  # type: ignore[arg-type]
    switch = attack.swarm(full_size(), images, labels, target=0, **usual)  # type: ignore[arg-type]
    for model in (planted_.model, free.model, switch.on, switch.off):
        with torch.no_grad():
            assert model(images[:1]).shape == (1, 5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m, x, y, k: attack.badnets(m, x, y, trigger=CORNER, target=0, rate=-0.1, **k), "rate"),
        (lambda m, x, y, k: attack.badnets(m, x, y, trigger=CORNER, target=0, rate=0.1, **(k | {"steps": 0})), "steps"),
        (lambda m, x, y, k: attack.badnets(m, x, y, trigger=CORNER, target=0, rate=0.1, blocks=9, **k), "blocks"),
        (lambda m, x, y, k: attack.badnets(m, x, y, trigger=CORNER, target=0, rate=0.1, **(k | {"batch": 99})), "batch"),
        (lambda m, x, y, k: attack.badvit(m, x, y, target=0, rate=0.1, patches=(16,), **k), "patches"),
        (lambda m, x, y, k: attack.badvit(m, x, y, target=0, rate=0.1, trigger_steps=0, **k), "steps"),
        (lambda m, x, y, k: attack.badvit(m, x, y, target=0, rate=0.1, trigger_steps=1, opacity=2, **k), "opacity"),
        (lambda m, x, y, k: attack.swarm(m, x, y, target=0, eps=0, **k), "eps"),
        (lambda m, x, y, k: attack.swarm(m, x, y, target=18, **k), "target"),
        (lambda m, x, y, k: attack.multi_trigger(m, x, y, triggers=[CORNER], targets=[0, 1], rate=0.1, **k), "triggers"),
        (lambda m, x, y, k: attack.multi_trigger(m, x, y, triggers=[CORNER], targets=[0], rate=0.1, mode="x", **k), "mode"),
        (lambda m, x, y, k: attack.multi_trigger(m, x, y, triggers=[CORNER] * 2, targets=[0, 1], rate=0, mode="hybrid", **k),
         "targets"),
        (lambda m, x, y, k: attack.dbia(m, x, target=0, share=0, **k), "share"),
        (lambda m, x, y, k: attack.dbia(m, x, target=99, **k), "target"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_by_name(call, match: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=match):
        call(
            victim(), pool().images[:20], pool().labels[:20], {"steps": 1, "batch": 8, "generator": seeded(), "progress": False}
        )


def test_a_model_without_a_vit_inside_is_refused() -> None:
    with pytest.raises(TypeError, match="model"):
        attack.badnets(
            torch.nn.Flatten(), pool().images[:8], pool().labels[:8], trigger=checkerboard(32, corner=(0, 0), size=8),  # type: ignore[arg-type]
            target=0, rate=0.1, generator=seeded(),
        )  # fmt: skip
