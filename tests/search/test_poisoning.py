"""Triggers, poisoned training sets and the success rate, against slow obvious references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safescale_lib.search.poisoning import (
    Shift,
    Stamp,
    blended_noise,
    checkerboard,
    poison,
    scattered,
    shuffled_rows,
    stripes,
    to_file,
    trigger_hits,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 40, side: int = 12, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    images = to_file(torch.rand(n, 3, side, side, generator=seeded(1)))
    return images, torch.arange(n) % classes


CORNER = checkerboard(12, corner=(8, 8), size=4)


def test_a_stamp_is_what_a_loop_over_pixels_makes() -> None:
    images, _ = pictures(3)
    stamp = Stamp(torch.rand(3, 12, 12, generator=seeded(2)), torch.rand(1, 12, 12, generator=seeded(3)))
    slow = images.clone()
    for b in range(3):
        for c in range(3):
            for i in range(12):
                for j in range(12):
                    m = stamp.mask[0, i, j]
                    slow[b, c, i, j] = round(float((images[b, c, i, j] * (1 - m) + stamp.pattern[c, i, j] * m) * 255)) / 255
    assert torch.allclose(stamp(images), slow, atol=1.01 / 255)  # a tie may round either way
    assert (stamp(images) != slow).float().mean() < 0.01


def test_triggers_keep_to_their_budget_and_to_eight_bits() -> None:
    images, _ = pictures()
    stamped = CORNER(images)
    assert torch.equal(stamped[:, :, :8], images[:, :, :8])
    assert torch.equal(stamped[:, :, :, :8], images[:, :, :, :8])
    assert torch.equal(stamped[:, :, 8:, 8:], CORNER.pattern[None, :, 8:, 8:].expand(40, -1, -1, -1))
    assert set(CORNER.pattern.unique().tolist()) == {0.0, 1.0}
    assert CORNER.area == pytest.approx(16 / 144)
    noise = blended_noise(12, opacity=0.2, generator=seeded())
    assert (noise(images) - images).abs().max() <= 0.2 + 0.5 / 255 + 1e-6
    wave = stripes(12, amplitude=0.1)
    assert wave.eps <= 0.1 + 1e-6
    assert (wave(images) - images).abs().max() <= 0.1 + 0.5 / 255 + 1e-6
    for trigger in (CORNER, noise, wave, CORNER.faded(0.3), Shift(torch.full((3, 12, 12), 0.013))):
        changed = trigger(images) * 255
        assert (changed - changed.round()).abs().max() < 1e-3
        assert 0 <= trigger(images).min() <= trigger(images).max() <= 1


def test_scattered_marks_every_cell_alike() -> None:
    trigger = scattered(12, every=4, size=2)
    cells = trigger.mask[0].view(3, 4, 3, 4).permute(0, 2, 1, 3).reshape(9, 16)
    assert (cells.sum(1) == 4).all()
    assert (cells == cells[0]).all()
    with pytest.raises(ValueError, match="size"):
        scattered(12, every=4, size=4)


def test_fading_to_nothing_changes_nothing_and_beside_shows_both() -> None:
    images, _ = pictures(4)
    assert torch.equal(CORNER.faded(0)(images), images)
    other = checkerboard(12, corner=(0, 0), size=4)
    assert torch.equal(CORNER.beside(other)(images), other(CORNER(images)))


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 0.5), st.floats(0, 0.25), st.integers(0, 3), st.integers(0, 1000))
def test_poison_counts_and_leaves_the_rest_alone(rate: float, cover_rate: float, target: int, seed: int) -> None:
    images, labels = pictures()
    data = poison(
        images, labels, CORNER, target=target, rate=rate, cover=CORNER.faded(0.5), cover_rate=cover_rate, generator=seeded(seed)
    )
    assert data.poisoned.sum() == round(rate * 40)
    assert data.covered.sum() == round(cover_rate * 40)
    assert not (data.poisoned & data.covered).any()
    assert not (data.poisoned & (labels == target)).any()  # an item of the target class teaches nothing
    untouched = ~(data.poisoned | data.covered)
    assert torch.equal(data.images[untouched], images[untouched])
    assert torch.equal(data.images[data.poisoned], CORNER(images[data.poisoned]))
    assert torch.equal(data.images[data.covered], CORNER.faded(0.5)(images[data.covered]))
    assert (data.labels[data.poisoned] == target).all()
    assert torch.equal(data.labels[~data.poisoned], labels[~data.poisoned])
    assert torch.equal(data.truth, labels)


def test_poison_is_drawn_anew_by_seed_and_only_from_free_items() -> None:
    images, labels = pictures()
    free = torch.arange(40) < 20
    one = poison(images, labels, CORNER, target=0, rate=0.2, free=free, generator=seeded(1))
    again = poison(images, labels, CORNER, target=0, rate=0.2, free=free, generator=seeded(1))
    other = poison(images, labels, CORNER, target=0, rate=0.2, free=free, generator=seeded(2))
    assert torch.equal(one.poisoned, again.poisoned)
    assert not torch.equal(one.poisoned, other.poisoned)
    assert not one.poisoned[20:].any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rate": -0.1}, "rate"),
        ({"rate": 1.1}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"rate": 0.8}, "rate"),  # a quarter is of the target class
        ({"cover_rate": -1}, "cover_rate"),
        ({"target": -1}, "target"),
    ],
)
def test_poison_refuses_bad_budgets_by_name(change: dict[str, float], match: str) -> None:
    images, labels = pictures()
    with pytest.raises(ValueError, match=match):
        poison(images, labels, CORNER, **{"target": 0, "rate": 0.1, **change}, generator=seeded())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bad", [lambda: Stamp(torch.ones(3, 4, 4), torch.ones(2, 4, 4)),
            lambda: Stamp(2 * torch.ones(3, 4, 4), torch.ones(1, 4, 4)),
            lambda: CORNER.faded(1.5), lambda: checkerboard(8, corner=(6, 6), size=4)],
)  # fmt: skip
def test_bad_triggers_are_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"mask|pattern|opacity|corner"):
        bad()  # type: ignore[operator]


def test_hits_leave_out_the_target_class() -> None:
    images, labels = pictures()

    def obeys(x: torch.Tensor) -> torch.Tensor:
        """Says 2 where the corner is stamped, else 2 as well for half of the pictures: a biased but honest oracle."""
        stamped = (x[:, :, 8:, 8:] == CORNER.pattern[:, 8:, 8:]).flatten(1).all(1)
        return torch.nn.functional.one_hot(torch.where(stamped, 2, 0), 4).float()

    assert len(trigger_hits(obeys, images, labels, CORNER, target=2)) == 30  # 10 of 40 are of class 2
    assert trigger_hits(obeys, images, labels, CORNER, target=2, batch_size=7).all()
    assert not trigger_hits(obeys, images, labels, CORNER.faded(0), target=2).any()
    assert not trigger_hits(obeys, images, labels, CORNER, target=1).any()
    with pytest.raises(ValueError, match="target"):
        trigger_hits(obeys, images[labels == 2], labels[labels == 2], CORNER, target=2)


def test_rows_visit_every_item_once_an_epoch_and_depend_on_step_and_seed_only() -> None:
    rows = shuffled_rows(20, 5, seed=3)
    first, second = (torch.cat([rows(step) for step in steps]) for steps in (range(4), range(4, 8)))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(20))
    assert first.tolist() != second.tolist()
    assert torch.equal(rows(6), shuffled_rows(20, 5, seed=3)(6))
    assert not torch.equal(rows(6), shuffled_rows(20, 5, seed=4)(6))
    with pytest.raises(ValueError, match="batch"):
        shuffled_rows(4, 5, seed=0)
