"""Masks: fit, error and criteria against slow, obvious counterparts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safescale_lib import figures
from safescale_lib.measure.masks import MaskLost, MaskMoved, MaskRemoved, iou, mask_error

SIDE = 4
pixels = st.sets(st.tuples(st.integers(0, SIDE - 1), st.integers(0, SIDE - 1)))


class Literal:
    """A segmenter whose embeddings are the mask logits themselves, shifted by x of the prompt."""

    def decode(self, embeddings: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        return embeddings - points[:, 0, None, None]


def as_mask(chosen: set[tuple[int, int]]) -> torch.Tensor:
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    for place in chosen:
        mask[place] = True
    return mask


@given(pixels, pixels)
def test_iou_counts_pixels(a: set[tuple[int, int]], b: set[tuple[int, int]]) -> None:
    expected = len(a & b) / len(a | b) if a | b else 1.0
    assert iou(as_mask(a), as_mask(b)).item() == pytest.approx(expected)
    assert iou(as_mask(a), as_mask(a)).item() == 1.0


def test_iou_of_a_batch_is_that_of_each() -> None:
    a, b = torch.rand(2, 3, 5, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(iou(a, b), torch.stack([iou(a[i, j], b[i, j]) for i in range(3) for j in range(5)]).view(3, 5))


def test_iou_refuses_what_is_not_a_mask() -> None:
    with pytest.raises(TypeError, match="bool"):
        iou(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="shape"):
        iou(as_mask(set()), as_mask(set())[None])


def test_mask_error_by_hand() -> None:
    logits, truth = torch.tensor([[[2.0, -1.0], [0.0, 3.0]]]), torch.tensor([[[True, False], [True, False]]])
    p = [1 / (1 + math.exp(-z)) for z in (2.0, -1.0, 0.0, 3.0)]
    cross = -sum(map(math.log, (p[0], 1 - p[1], p[2], 1 - p[3]))) / 4
    dice = 1 - (2 * (p[0] + p[2]) + 1) / (sum(p) + 2 + 1)
    assert mask_error(logits, truth).item() == pytest.approx(cross + dice, rel=1e-5)


def test_mask_error_is_lowest_at_the_truth() -> None:
    truth = as_mask({(0, 0), (1, 2)})[None]
    sure = torch.where(truth, 12.0, -12.0)
    assert mask_error(sure, truth).item() < 1e-3
    assert mask_error(-sure, truth).item() > 10


def test_a_mask_is_lost_below_the_threshold_at_its_own_prompt() -> None:
    truth = as_mask({(0, 0), (0, 1)}).expand(3, -1, -1)
    logits = torch.where(truth, 1.0, -1.0)
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.5, 0.0]])  # a shift of 2 erases the mask
    goal = MaskLost(Literal(), points, truth)
    for rows in (torch.arange(3), torch.tensor([1, 0])):
        wanted = torch.tensor([False, True, False])[rows]
        assert torch.equal(goal.met(logits[rows], rows), wanted)
        assert torch.equal(goal.correct(logits[rows], rows), ~wanted)
    assert len(goal) == 3


@pytest.mark.parametrize(("area", "removed"), [(0, True), (1, True), (2, False), (10, False)])
def test_removed_means_nearly_empty_and_not_merely_wrong(area: int, removed: bool) -> None:
    truth = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    truth.view(-1)[:10] = True
    logits = -torch.ones(1, SIDE, SIDE)
    logits.view(-1)[:area] = 1.0
    goal, row = MaskRemoved(Literal(), torch.zeros(1, 2), truth), torch.tensor([0])
    assert goal.met(logits, row).item() is removed
    assert goal.correct(logits, row).item() is (area >= 5)
    elsewhere = -logits if area == 0 else logits
    assert not goal.met(torch.ones_like(elsewhere), row)


def test_moved_means_on_the_target_and_an_ambiguous_item_is_never_attempted() -> None:
    truth = as_mask({(0, 0), (0, 1)}).expand(2, -1, -1)
    target = torch.stack([as_mask({(2, 0), (2, 1)}), as_mask({(0, 0), (0, 1), (0, 2)})])
    goal, rows = MaskMoved(Literal(), torch.zeros(2, 2), truth, target=target), torch.arange(2)
    honest, moved = torch.where(truth, 1.0, -1.0), torch.where(target, 1.0, -1.0)
    assert goal.correct(honest, rows).tolist() == [True, False]
    assert goal.met(moved, rows).tolist() == [True, True]
    assert not goal.met(honest, rows)[0]


@pytest.mark.parametrize(
    ("points", "truth", "other", "error", "match"),
    [
        (torch.zeros(2, 2), torch.zeros(2, 4, 4), {}, TypeError, "truth"),
        (torch.zeros(2, 2), torch.zeros(4, 4, dtype=torch.bool), {}, ValueError, "truth"),
        (torch.zeros(3, 2), torch.zeros(2, 4, 4, dtype=torch.bool), {}, ValueError, "points"),
        (torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 4, 4, dtype=torch.bool), {}, TypeError, "points"),
        (torch.zeros(2, 2), torch.zeros(2, 4, 4, dtype=torch.bool), {"threshold": 0.0}, ValueError, "threshold"),
        (torch.zeros(2, 2), torch.zeros(2, 4, 4, dtype=torch.bool), {"left": 1.0}, ValueError, "left"),
    ],
)
def test_bad_criteria_are_refused(points: torch.Tensor, truth: torch.Tensor, other: dict, error: type, match: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match=match):
        MaskRemoved(Literal(), points, truth, **other)


def test_a_masked_picture_keeps_the_inside_and_greys_the_outside() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[:, 2:6, 2:6] = True
    shown = figures.masked(images, masks, torch.tensor([[0.0, 7.0], [3.0, 3.0]]), zoom=9)
    assert shown.shape == (2, 3, 72, 72)
    centre = shown[..., 4::9, 4::9]
    assert torch.equal(centre[0][:, 2:6, 2:6], images[0][:, 2:6, 2:6])
    grey = centre[0][:, 0]
    assert torch.equal(grey[0], grey[1])
    assert grey.max() < 0.43
    assert torch.equal(shown[0, :, 7 * 9 + 4, 4], torch.ones(3))  # the prompt, bottom left
    assert torch.equal(shown[1, :, 3 * 9 + 4, 3 * 9 + 4], torch.ones(3))
    with pytest.raises(ValueError, match="masks"):
        figures.masked(images, masks[:1])
