"""The ViT's own attacks against slow, obvious references; the checks every attack passes stand in test_technique_checks."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ViTConfig, ViTForImageClassification

from safescale_lib import zoo
from safescale_lib.measure.criteria import Misclassified
from safescale_lib.search.pixels import PixelAttack, pgd
from safescale_lib.vfm.vit import (
    attention_fool,
    choose_patches,
    patch_fool,
    patch_removal,
    pna_patchout,
    position_attack,
    token_attack,
)
from safescale_lib.vfm.vit.inside import (
    attending,
    constant_attention,
    patch_grid,
    patch_mask,
    positions_of,
    tokens_of,
    vit_inside,
)
from safescale_lib.world.scenes import scenes
from safescale_lib.zoo.adapter import PixelClassifier


@lru_cache
def victim() -> PixelClassifier:
    return zoo.load("vit")


@lru_cache
def batch(n: int = 12) -> tuple[torch.Tensor, Misclassified]:
    drawn = scenes(n, split="validation", seed=21)
    return drawn.images, Misclassified(drawn.labels)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@lru_cache
def full_size() -> PixelClassifier:
    """The shape of ViT-B/16, two layers deep, with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(0)
        config = ViTConfig(num_hidden_layers=2, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return PixelClassifier(ViTForImageClassification(config), (0.5,) * 3, (0.5,) * 3).eval()


# --- the inside of a ViT ------------------------------------------------------------------------------------------------


def test_attention_maps_are_those_of_the_eager_model() -> None:
    images, _ = batch()
    config = ViTConfig.from_dict(victim().model.config.to_dict(), attn_implementation="eager")
    eager = ViTForImageClassification(config).eval()
    eager.load_state_dict(victim().model.state_dict())
    with torch.no_grad(), attending(victim()) as attention:
        logits = victim()(images)
        reference = eager((images - 0.5) / 0.5, output_attentions=True)
    assert torch.allclose(reference.logits, logits, atol=1e-4)
    assert len(reference.attentions) == len(attention.maps)
    for ours, theirs in zip(attention.maps, reference.attentions, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_constant_attention_changes_the_gradient_but_not_the_answer() -> None:
    """The reference holds the attention maps as given numbers and applies them by hand."""
    model, (images, criterion) = victim(), batch(4)
    with attending(model) as attention, torch.no_grad():
        plain = model(images)
        maps = [m.clone() for m in attention.maps]
    x = images.clone().requires_grad_(True)
    with constant_attention(model):
        logits = model(x)
        (cut,) = torch.autograd.grad(F.cross_entropy(logits, criterion.labels), x)
    assert torch.allclose(plain, logits, atol=1e-6)

    y = images.clone().requires_grad_(True)
    inside = vit_inside(model)
    hidden = inside.embeddings((y - model.mean) / model.std)
    for layer, weights in zip(inside.layers, maps, strict=True):
        normed = layer.layernorm_before(hidden)
        values = layer.attention.v_proj(normed).unflatten(-1, (weights.shape[1], -1)).transpose(1, 2)
        hidden = hidden + layer.attention.o_proj((weights @ values).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.layernorm_after(hidden))
    by_hand = model.model.classifier(inside.layernorm(hidden)[:, 0])
    (reference,) = torch.autograd.grad(F.cross_entropy(by_hand, criterion.labels), y)
    (full,) = torch.autograd.grad(F.cross_entropy(model(y), criterion.labels), y)
    assert torch.allclose(cut, reference, atol=1e-5)
    assert not torch.allclose(cut, full, atol=1e-4)


@pytest.mark.parametrize("block", [attending, constant_attention])
def test_hooks_are_gone_after_an_error(block: Callable[[PixelClassifier], object]) -> None:
    with pytest.raises(RuntimeError, match="midway"), block(victim()):  # type: ignore[attr-defined]
        raise RuntimeError("midway")
    assert not any(module._forward_hooks for module in victim().modules())


@given(st.lists(st.integers(0, 15), min_size=1, max_size=16, unique=True))
@settings(max_examples=25, deadline=None)
def test_patch_mask_marks_exactly_the_pixels_of_the_chosen_patches(chosen: list[int]) -> None:
    mask = patch_mask(victim(), torch.tensor([chosen]))
    for row in range(32):
        for column in range(32):
            assert mask[0, 0, row, column] == ((row // 8) * 4 + column // 8 in chosen)


def test_a_patch_changes_its_own_token_only() -> None:
    images, _ = batch(2)
    changed = torch.where(patch_mask(victim(), torch.tensor([[6], [6]])), 1 - images, images)
    with torch.no_grad():
        moved = (tokens_of(victim(), changed) - tokens_of(victim(), images)).abs().amax((0, 2)) > 1e-6
    assert moved.nonzero()[:, 0].tolist() == [6]


# --- who is attacked ------------------------------------------------------------------------------------------------------


def test_attention_choice_is_the_largest_column_sum() -> None:
    images, criterion = batch(6)
    chosen = choose_patches(victim(), images, criterion, patches=3, layer=2)
    for image, found in zip(images, chosen, strict=True):
        with torch.no_grad(), attending(victim()) as attention:
            victim()(image[None])
        received = [sum(float(head[:, key].sum()) for head in attention.maps[2][0]) for key in range(1, 17)]
        assert sorted(range(16), key=lambda i: -received[i])[:3] == found.tolist()


def test_gradient_choice_is_the_largest_gradient_norm() -> None:
    images, criterion = batch(4)
    chosen = choose_patches(victim(), images, criterion, patches=2, by="gradient")
    for i in range(4):
        x = images[i : i + 1].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(victim()(x), criterion.labels[i : i + 1]), x)
        norms = [float(gradient[0, :, 8 * (p // 4) :][:, :8, 8 * (p % 4) :][:, :, :8].norm()) for p in range(16)]
        assert sorted(range(16), key=lambda p: -norms[p])[:2] == chosen[i].tolist()


def test_random_choice_has_no_repeats_and_follows_the_generator() -> None:
    images, criterion = batch()
    first, again, other = (
        choose_patches(victim(), images, criterion, patches=5, by="random", generator=seeded(s)) for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(len(set(row.tolist())) == 5 for row in first)


# --- the attacks -----------------------------------------------------------------------------------------------------------


def test_token_attack_on_all_tokens_is_pgd() -> None:
    """With every token in the budget and step sizes alike, only the random start differs; from the image itself none does."""
    images, criterion = batch()
    every = token_attack(victim(), images, criterion, tokens=16, eps=4 / 255, steps=2, step_size=4 / 255, generator=seeded())
    plain = pgd(victim(), images, criterion, eps=4 / 255, steps=2, step_size=4 / 255, generator=seeded())
    assert torch.equal(every.images, plain.images)


def test_patch_fool_leaves_the_rest_of_the_picture_alone() -> None:
    images, criterion = batch()
    attack = patch_fool(victim(), images, criterion, patches=2, steps=6, generator=seeded())
    mask = patch_mask(victim(), attack.chosen).expand_as(images)
    assert attack.success.any()
    assert torch.equal(attack.images[~mask], images[~mask])


class Patient:
    """Met only once the search has taken all its steps, so that the end of the search comes back for every item."""

    def __init__(self, n: int, steps: int) -> None:
        self.n, self.left = n, steps

    def __len__(self) -> int:
        return self.n

    def met(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        return torch.full((len(rows),), self.left < 0)

    def correct(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return torch.ones(len(rows), dtype=torch.bool)


def nothing(criterion: object, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """An objective that asks for nothing, so that only the attack's own term moves the pixels."""
    return 0 * logits[:, 0]


def test_the_attention_term_raises_the_attention_paid_to_the_patch() -> None:
    images, _ = batch()

    def paid(weight: float) -> float:
        attack = patch_fool(
            victim(),
            images,
            Patient(len(images), steps=15),
            steps=15,
            attention_weight=weight,
            objective=nothing,
            generator=seeded(),
        )
        with torch.no_grad(), attending(victim()) as attention:
            victim()(attack.images)
        assert attack.success.all()
        keys = attack.chosen[:, None, None, :].expand(-1, 3, 17, -1) + 1
        return float(torch.stack([m.gather(3, keys).mean() for m in attention.maps]).mean())

    assert paid(1.0) > 1.5 * paid(0.0)


def test_attention_fool_raises_the_scores_of_its_key() -> None:
    images, _ = batch()

    def score(pull: float) -> float:
        """Mean score before the softmax that all queries of all layers give to the patch."""
        attack = attention_fool(
            victim(),
            images,
            Patient(len(images), steps=15),
            patch=5,
            steps=15,
            pull=pull,
            objective=nothing,
            generator=seeded(),
        )
        with torch.no_grad(), attending(victim()) as attention:
            victim()(attack.images)
        return float(torch.stack([(q @ k[:, :, 6, :, None]).mean() for q, k in attention.pairs]).mean())

    assert score(1.0) > score(0.0) + 0.5


def test_a_pattern_on_every_picture_is_another_position_table() -> None:
    """The identity the position attack rests on: W (x + d) + p = W x + (p + W d), checked on the logits."""
    images, criterion = batch()
    images = images.clamp(0.2, 0.8)  # so that nothing is clipped
    images = (images * 255).round() / 255
    attack = position_attack(victim(), images, criterion, eps=24 / 255, crafting=images, steps=5)
    table = vit_inside(victim()).embeddings.position_embeddings
    with torch.no_grad():
        patterned = victim()(images + attack.pattern)
        original = table.clone()
        table[0, 1:] += attack.shift
        shifted = victim()(images)
        table.copy_(original)
        assert torch.allclose(patterned, shifted, atol=1e-4)
        assert not torch.allclose(patterned, victim()(images), atol=1e-1)


def test_the_displaced_pattern_is_the_best_corner_of_the_ball() -> None:
    images, criterion = batch(2)
    attack = position_attack(victim(), images, criterion, eps=8 / 255)
    towards = (positions_of(victim()).roll(-1, 0) - positions_of(victim())).detach()
    best = float((attack.shift * towards).sum())
    assert torch.unique(attack.pattern.abs()).tolist() == pytest.approx([8 / 255])
    for seed in range(20):
        flipped = attack.pattern * (torch.rand(attack.pattern.shape, generator=seeded(seed)) > 0.05).float().mul(2).sub(1)
        with torch.no_grad():
            shift = (tokens_of(victim(), flipped[None]) - tokens_of(victim(), torch.zeros_like(flipped[None])))[0]
        assert float((shift * towards).sum()) < best


def test_plain_transfer_is_momentum_pgd_judged_by_the_victim() -> None:
    images, criterion = batch()
    other = zoo.load("vit-robust")
    ours = pna_patchout(
        other,
        images,
        criterion,
        surrogate=victim(),
        eps=32 / 255,
        steps=4,
        pay_no_attention=False,
        kept=1.0,
        generator=seeded(),
    )
    theirs = pgd(
        victim(), images, criterion, eps=32 / 255, steps=4, step_size=8 / 255, momentum=1.0,
        random_start=False, early_removal=False,
    )  # fmt: skip
    both = ours.success & theirs.success
    assert both.any()
    assert torch.equal(ours.images[both], theirs.images[both])
    with torch.no_grad():
        fooled = other(ours.images).argmax(-1) != criterion.labels
    assert torch.equal(fooled, ours.success | ours.skipped)


def test_patch_out_moves_no_patch_that_was_never_shown() -> None:
    images, criterion = batch()
    attack = pna_patchout(
        victim(),
        images,
        criterion,
        surrogate=victim(),
        eps=32 / 255,
        steps=1,
        step_size=32 / 255,
        kept=0.25,
        generator=seeded(),
    )
    changed = (attack.images != images).any(1, keepdim=True)
    per_patch = F.max_pool2d(changed.float(), 8).flatten(1).sum(1)
    assert attack.success.any()
    assert (per_patch <= 4).all()


def _slow_removal(
    model: PixelClassifier, image: torch.Tensor, label: int, noisy: torch.Tensor, sizes: list[int], left: int
) -> torch.Tensor:
    """The removal stage for one image, in plain loops."""
    best = noisy.clone()
    for size in sizes:
        cells = [(r, c) for r in range(0, 32, size) for c in range(0, 32, size)]
        needed = set()
        while left:
            energy = {
                (r, c): float((best - image)[:, r : r + size, c : c + size].square().sum())
                for r, c in cells
                if (r, c) not in needed
            }
            r, c = max(energy, key=lambda cell: energy[cell], default=(0, 0))
            if not energy or energy[r, c] == 0:
                break
            tried = best.clone()
            tried[:, r : r + size, c : c + size] = image[:, r : r + size, c : c + size]
            left -= 1
            if int(model(tried[None]).argmax()) != label:
                best = tried
            else:
                needed.add((r, c))
    return best


def test_patch_removal_agrees_with_plain_loops() -> None:
    images, criterion = batch(4)
    started = patch_removal(victim(), images, criterion, eps=100.0, queries=60, sizes=[32], generator=seeded())
    fast = patch_removal(victim(), images, criterion, eps=100.0, queries=60, sizes=[8, 4], generator=seeded())
    assert started.success.all()
    for i in range(4):
        asked = int((started.trace[:, i] == float("inf")).sum())  # the query that found the start included
        with torch.no_grad():
            slow = _slow_removal(victim(), images[i], int(criterion.labels[i]), started.images[i], [8, 4], 60 - asked)
        assert torch.equal(fast.images[i], slow)


def test_the_trace_of_a_removal_only_falls_and_ends_at_the_result() -> None:
    images, criterion = batch()
    attack = patch_removal(victim(), images, criterion, eps=100.0, queries=40, generator=seeded())
    assert (attack.trace[1:] <= attack.trace[:-1]).all()
    won = attack.success
    assert torch.allclose(attack.trace[-1][won], attack.distance[won])
    assert attack.cost.queries <= len(images) * 41
    assert attack.cost.forwards == attack.cost.backwards == 0


# --- any size, and bad input -------------------------------------------------------------------------------------------------


FULL: dict[str, Callable[[PixelClassifier, torch.Tensor, Misclassified], PixelAttack]] = {
    "patch_fool": lambda m, x, c: patch_fool(m, x, c, patches=2, steps=3, generator=seeded()),
    "position_attack": lambda m, x, c: position_attack(m, x, c, eps=8 / 255, crafting=x, steps=1),
    "attention_fool": lambda m, x, c: attention_fool(m, x, c, patch=195, steps=3, generator=seeded()),
    "token_attack": lambda m, x, c: token_attack(m, x, c, tokens=5, steps=1, generator=seeded()),
    "pna_patchout": lambda m, x, c: pna_patchout(m, x, c, surrogate=m, eps=8 / 255, steps=1, generator=seeded()),
    "patch_removal": lambda m, x, c: patch_removal(m, x, c, eps=50.0, queries=3, generator=seeded()),
}


@pytest.mark.parametrize("name", FULL)
def test_it_runs_on_the_shape_of_a_public_checkpoint(name: str) -> None:
    model = full_size()
    assert patch_grid(model) == (14, 14, 16, 16)
    images = (torch.rand(2, 3, 224, 224, generator=seeded()) * 255).round() / 255
    with torch.no_grad():
        criterion = Misclassified(model(images).argmax(-1))
    attack = FULL[name](model, images, criterion)
    assert attack.images.shape == images.shape
    assert not attack.skipped.any()
    assert torch.equal(attack.images[~attack.success], images[~attack.success])


@pytest.mark.parametrize("name", [name for name in FULL if name != "patch_removal"])
def test_a_model_that_is_no_vit_is_refused(name: str) -> None:
    images, criterion = batch(2)
    with pytest.raises(TypeError, match="ViTForImageClassification"):
        FULL[name](zoo.load("cnn"), images, criterion)


def test_bad_arguments_are_refused_by_name() -> None:
    model, (images, criterion) = victim(), batch(2)
    with pytest.raises(ValueError, match="layer"):
        patch_fool(model, images, criterion, layer=4, generator=seeded())
    with pytest.raises(ValueError, match="by"):
        patch_fool(model, images, criterion, by="guess", generator=seeded())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="patch"):
        attention_fool(model, images, criterion, patch=16, generator=seeded())
    with pytest.raises(ValueError, match="steps"):
        patch_fool(model, images, criterion, steps=-1, generator=seeded())
    with pytest.raises(TypeError, match="generator"):
        patch_fool(model, images, criterion, generator=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kept"):
        pna_patchout(model, images, criterion, surrogate=model, eps=0.1, kept=0.0, generator=seeded())
    with pytest.raises(ValueError, match="crafting"):
        position_attack(model, images, criterion, eps=0.1, crafting=images[:, :, :16])
    with pytest.raises(ValueError, match="sizes"):
        patch_removal(model, images, criterion, eps=1.0, sizes=[5], generator=seeded())
    with pytest.raises(ValueError, match="queries"):
        patch_removal(model, images, criterion, eps=1.0, queries=0, generator=seeded())
