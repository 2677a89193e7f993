"""Section 2.1, backdoor defenses: what each part does, on planted cases; how well it defends is the chapter's to say."""

from __future__ import annotations

import pytest
import torch

from safescale_lib.search.poisoning import trigger_hits
from safescale_lib.vfm.vit import backdoor_defense as defense
from safescale_lib.vfm.vit.backdoor_attack import attention_rollout
from safescale_lib.vfm.vit.inside import attending
from safescale_lib.zoo.adapter import PixelClassifier
from tests.rows.common import seeded
from tests.rows.vit_backdoors import CORNER, TARGET, held_out, planted, pool, victim
from tests.vfm.test_vit_backdoor_attack import accuracy, full_size, hooks

IMAGES = held_out().images[:24]


class Grid(torch.nn.Module):
    """Answers by a rule on pixels, but with a ViT's patch grid."""

    def __init__(self, rule: object) -> None:
        super().__init__()
        self.model, self.rule = victim().model, rule

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(self.rule(images).long(), 3).float()  # type: ignore[operator]


def tiles(images: torch.Tensor) -> list[list[bytes]]:
    """The 8 x 8 patches of every picture, by a loop."""
    return [
        [image[:, i : i + 8, j : j + 8].contiguous().numpy().tobytes() for i in range(0, 32, 8) for j in range(0, 32, 8)]
        for image in images
    ]


def test_shuffling_moves_whole_patches_and_loses_none() -> None:
    mixed = defense.shuffle_patches(victim(), IMAGES, seeded())
    for before, after in zip(tiles(IMAGES), tiles(mixed), strict=True):
        assert sorted(before) == sorted(after)
        assert before != after
    assert torch.equal(mixed, defense.shuffle_patches(victim(), IMAGES, seeded()))


@pytest.mark.parametrize("count", [1, 5, 16])
def test_dropping_blackens_so_many_whole_patches(count: int) -> None:
    images = IMAGES.clamp(min=0.01)
    black = torch.zeros(3, 8, 8).numpy().tobytes()
    for before, after in zip(tiles(images), tiles(defense.drop_patches(victim(), images, count, seeded())), strict=True):
        assert sum(tile == black for tile in after) == count
        assert all(a in (b, black) for a, b in zip(after, before, strict=True))


def test_drop_scores_count_how_often_the_trigger_patch_is_lost() -> None:
    """A rule that looks at one patch changes its answer with probability drop / 16."""
    looks = Grid(lambda x: x[:, :, 24:, 24:].flatten(1).amax(1) > 0)
    scores = defense.patch_drop(looks, IMAGES.clamp(min=0.01), drop=4, tries=200, generator=seeded())
    assert scores.mean() == pytest.approx(4 / 16, abs=0.02)
    constant = Grid(lambda x: torch.ones(len(x)))
    assert not defense.patch_drop(constant, IMAGES, drop=4, tries=3, generator=seeded()).any()


def test_shuffle_scores_are_one_for_what_any_order_shows() -> None:
    blind = Grid(lambda x: x.mean((1, 2, 3)) > 0.3)  # the mean does not know the order
    assert (defense.patch_shuffle(blind, IMAGES, tries=5, generator=seeded()) == 1).all()
    place = Grid(lambda x: x[:, :, 24:, 24:].mean((1, 2, 3)) > 0.9)
    marked = IMAGES * 0.5
    marked[:, :, 24:, 24:] = 1.0
    scores = defense.patch_shuffle(place, marked, tries=200, generator=seeded())
    assert scores.mean() == pytest.approx(1 / 16, abs=0.02)  # the bright patch stays where it was


def test_scores_do_not_depend_on_the_batch_size() -> None:
    for detector in (lambda b: defense.patch_drop(victim(), IMAGES, drop=4, tries=3, batch_size=b, generator=seeded()),
                     lambda b: defense.patch_shuffle(victim(), IMAGES, tries=3, batch_size=b, generator=seeded())):  # fmt: skip
        assert (detector(256) - detector(5)).abs().max() < 1e-6


def test_blocking_paints_over_the_patch_with_the_largest_rollout() -> None:
    shown: list[torch.Tensor] = []
    handle = victim().register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
    try:
        answers = defense.attention_blocked(victim(), blocked=2, fill=0.5)(IMAGES)
    finally:
        handle.remove()
    with torch.no_grad(), attending(victim()) as seen:
        victim()(IMAGES)
        wanted = attention_rollout(seen.maps).argsort(1, descending=True)[:, :2]
    for image, painted, chosen in zip(IMAGES, shown[1], wanted, strict=True):
        for patch in range(16):
            i, j = 8 * (patch // 4), 8 * (patch % 4)
            tile = painted[:, i : i + 8, j : j + 8]
            expected = torch.full_like(tile, 0.5) if patch in chosen else image[:, i : i + 8, j : j + 8]
            assert torch.equal(tile, expected)
    with torch.no_grad():
        assert torch.equal(answers, victim()(shown[1]))
        assert torch.equal(defense.attention_blocked(victim(), blocked=0)(IMAGES), victim()(IMAGES))
    assert hooks(victim()) == 0


def test_blocking_stays_open_to_gradients() -> None:
    x = IMAGES[:2].clone().requires_grad_(True)
    defense.attention_blocked(victim())(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_features_are_what_the_head_reads() -> None:
    features = defense.last_features(victim(), IMAGES, batch_size=7)
    with torch.no_grad():
        assert torch.allclose(victim().model.classifier(features), victim()(IMAGES), atol=1e-4)
    assert hooks(victim()) == 0


def test_pruning_cuts_the_idle_neurons_for_good() -> None:
    slim = defense.pruned(victim(), pool().images[:64], share=0.25)
    mlp, whole = slim.model.vit.layers[-1].mlp, victim().model.vit.layers[-1].mlp
    cut = (mlp.fc1.weight == 0).all(1)
    assert int(cut.sum()) == 96
    assert (mlp.fc2.weight[:, cut] == 0).all()
    assert torch.equal(mlp.fc1.weight[~cut], whole.fc1.weight[~cut])
    acts: list[torch.Tensor] = []
    handle = whole.fc2.register_forward_pre_hook(lambda module, inputs: acts.append(inputs[0]))
    with torch.no_grad():
        victim()(pool().images[:64])
    handle.remove()
    use = acts[0].abs().mean((0, 1))
    assert use[cut].max() <= use[~cut].min()
    later = defense.fine_pruning(
        victim(), pool().images[:64], pool().labels[:64], share=0.25, steps=3, batch=16, generator=seeded(), progress=False
    )
    again = later.model.vit.layers[-1].mlp
    assert int(((again.fc1.weight == 0).all(1) & (again.fc2.weight == 0).all(0)).sum()) == 96
    assert not torch.equal(again.fc1.weight, mlp.fc1.weight)
    assert hooks(victim()) == 0


def test_fine_tuning_keeps_the_accuracy_and_the_given_model() -> None:
    found = planted("badnets")
    before = {key: value.clone() for key, value in found.model.state_dict().items()}
    mended = defense.clean_fine_tuning(
        found.model, pool().images, pool().labels, steps=15, lr=5e-4, batch=32, generator=seeded(), progress=False
    )
    assert accuracy(mended) > 0.9
    assert all(torch.equal(before[key], value) for key, value in found.model.state_dict().items())
    hits = trigger_hits(found.model, held_out().images, held_out().labels, found.trigger, target=TARGET)
    assert hits.float().mean() > 0.8  # the defender's copy changed, not the model


def test_detectors_rank_the_poison_of_a_planted_model_first() -> None:
    from safescale_lib.measure.detection import roc

    data, model = planted("badnets").data, planted("badnets").model
    features = defense.last_features(model, data.images).numpy()
    bad = data.poisoned.numpy()
    own = data.labels.numpy() == TARGET
    for detector in (defense.activation_clustering, defense.spectral_signature):
        scores = detector(features, data.labels.numpy())
        assert scores.shape == (len(data),)
        side = roc(scores[own & ~bad], scores[own & bad]).auc
        assert max(side, 1 - side) > 0.8  # poison is the majority of its class here, so the sign may turn


def test_full_size_models_run_unchanged() -> None:
    model: PixelClassifier = full_size()
    images = torch.rand(2, 3, 224, 224, generator=seeded())
    assert defense.attention_blocked(model, blocked=3)(images).shape == (2, 5)
    assert defense.patch_drop(model, images, drop=98, tries=1, generator=seeded()).shape == (2,)
    assert defense.patch_shuffle(model, images, tries=1, generator=seeded()).shape == (2,)
    assert defense.last_features(model, images).shape == (2, 768)
    defense.pruned(model, images, share=0.5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: defense.attention_blocked(victim(), blocked=17), "blocked"),
        (lambda: defense.attention_blocked(victim(), fill=2), "fill"),
        (lambda: defense.patch_drop(victim(), IMAGES, drop=0, generator=seeded()), "count"),
        (lambda: defense.patch_drop(victim(), IMAGES, drop=17, generator=seeded()), "count"),
        (lambda: defense.patch_drop(victim(), IMAGES, drop=1, tries=0, generator=seeded()), "tries"),
        (lambda: defense.patch_shuffle(victim(), IMAGES, tries=0, generator=seeded()), "tries"),
        (lambda: defense.pruned(victim(), IMAGES, share=1.0), "share"),
        (lambda: defense.clean_fine_tuning(victim(), IMAGES, held_out().labels[:24], lr=0.0, generator=seeded()), "lr"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, match: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=match):
        call()


def test_a_corner_is_one_patch() -> None:
    """The rows of these tests rely on it."""
    assert CORNER.area == pytest.approx(1 / 16)
