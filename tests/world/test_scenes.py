"""Scenes: what the picture shows, what the labels say, and what the three splits may share (nothing)."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import rotate
from sklearn.datasets import load_digits

from safescale_lib.world import scenes as module
from safescale_lib.world.scenes import COLOUR_NAMES, COLOURS, DIGITS, KINDS, SHAPES, scenes

SPLITS = ("train", "validation", "test")
quick = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def many():
    """A thousand scenes of each split, two objects each, at one seed."""
    return {split: scenes(1000, split=split, seed=11, objects=2) for split in SPLITS}


# --- contents -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("side", [16, 32, 45])
def test_shapes_types_and_values(objects, side):
    n = 30
    s = scenes(n, split="validation", seed=2, objects=objects, side=side)
    assert (s.images.shape, s.images.dtype) == ((n, 3, side, side), torch.float32)
    assert (s.masks.shape, s.masks.dtype) == ((n, objects, side, side), torch.bool)
    for field in (s.kinds, s.colours, s.digit_ids):
        assert (field.shape, field.dtype) == ((n, objects), torch.int64)
    assert (s.labels.shape, s.labels.dtype, len(s), len(s.captions)) == ((n,), torch.int64, n, n)
    levels = s.images.double() * 255
    assert torch.equal((levels.round() / 255).float(), s.images)  # what an 8-bit file holds, exactly
    assert 0 <= levels.round().min() < levels.round().max() <= 255
    assert torch.equal(s.labels, s.kinds[:, 0])
    assert 0 <= s.kinds.min() <= s.kinds.max() < len(KINDS)
    assert s.masks.flatten(2).any(2).all()  # nothing is painted outside the picture
    assert s.masks.sum(1).max() == 1  # objects do not overlap


def test_every_kind_and_colour_appears_equally_often(many):
    for values, names in ((many["train"].kinds, KINDS), (many["train"].colours, COLOUR_NAMES)):
        share = np.bincount(values.flatten().numpy(), minlength=len(names)) / values.numel()
        spread = math.sqrt(1 / len(names) / values.numel())  # binomial standard deviation, about
        assert np.abs(share - 1 / len(names)).max() < 4 * spread


def test_captions_name_the_kinds_and_colours(many):
    for s in (*many.values(), scenes(300, split="train", seed=1)):
        for caption, kinds, colours in zip(s.captions, s.kinds, s.colours, strict=True):
            things = []
            for kind, colour in zip(kinds, colours, strict=True):
                article = "an" if COLOUR_NAMES[colour][0] in "aeiou" else "a"
                things.append(f"{article} {COLOUR_NAMES[colour]} {KINDS[kind]}")
            assert caption == " left of ".join(things)


def test_the_first_object_is_the_left_one(many):
    columns = torch.arange(32.0)
    masks = many["test"].masks.float()
    centre = (masks.sum(2) * columns).sum(2) / masks.sum((2, 3))  # (N, 2) mean column
    assert (centre[:, 0] < 16).all()
    assert (centre[:, 1] > 16).all()


def test_two_objects_are_never_twins(many):
    for s in many.values():
        kind, colour = s.kinds, s.colours
        assert not ((kind[:, 0] == kind[:, 1]) & (colour[:, 0] == colour[:, 1])).any()
        assert (kind[:, 0] == kind[:, 1]).any()  # the rule had something to forbid
        assert (colour[:, 0] == colour[:, 1]).any()


def paint(s, i, k):
    """(S, S) how far each pixel has gone from the background's colour (0) to the object's (1)."""
    image = s.images[i]
    ground = image[:, ~s.masks[i].any(0)].median(dim=1).values
    object_colour = 0.94 * torch.tensor(COLOURS[COLOUR_NAMES[s.colours[i, k]]])
    along = object_colour - ground
    return torch.einsum("chw,c->hw", image - ground[:, None, None], along) / along.square().sum()


@pytest.mark.parametrize(("objects", "side"), [(1, 32), (2, 32), (1, 64), (2, 48)])
def test_masks_are_where_the_paint_is(objects, side):
    s = scenes(150, split="test", seed=5, objects=objects, side=side)
    for i in range(len(s)):
        elsewhere = ~s.masks[i].any(0)
        for k in range(objects):
            shown, mask = paint(s, i, k), s.masks[i, k]
            assert shown[mask].min() > 0.35
            if objects == 1:
                assert shown[elsewhere].max() < 0.7  # half-covered edge pixels, and the texture's ups and downs
                visible = shown > 0.5
                assert (visible & mask).sum() > 0.9 * (visible | mask).sum()


def test_objects_have_the_colour_they_are_said_to_have():
    s = scenes(300, split="train", seed=9, side=48)
    names = torch.tensor(list(COLOURS.values()))
    for i in range(len(s)):
        inner = s.images[i][:, s.masks[i, 0]].quantile(0.75, dim=1)  # past the mixed edge pixels
        direction = inner / inner.norm()
        likeness = names @ direction / names.norm(dim=1)
        assert likeness.argmax() == s.colours[i, 0]


# --- shapes -------------------------------------------------------------------------------------------------------

# Membership of a point (u, v) of the object's own square, and the shape's area in it: the slow, obvious way.
POINTWISE = {
    "disc": (lambda u, v: u**2 + v**2 < 0.95**2, math.pi * 0.95**2),
    "ring": (lambda u, v: abs(np.hypot(u, v) - 0.72) < 0.22, math.pi * (0.94**2 - 0.5**2)),
    "square": (lambda u, v: (abs(u) < 0.82) & (abs(v) < 0.82), 1.64**2),
    "cross": (
        lambda u, v: ((abs(u) < 0.95) & (abs(v) < 0.27)) | ((abs(u) < 0.27) & (abs(v) < 0.95)),
        2 * 1.9 * 0.54 - 0.54**2,
    ),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_masks_equal_a_supersampled_membership_test(name):
    """From the mask alone: the centre by its centroid, the radius by its area, the angle by trying; then compare."""
    side, fine = 64, 5
    inside, unit_area = POINTWISE[name]
    s = scenes(150, split="train", seed=3, side=side)
    found = (s.labels == SHAPES.index(name)).nonzero()[:, 0].tolist()
    assert len(found) >= 3
    axis = (np.arange(side * fine) + 0.5) / fine
    for i in found[:5]:
        mask = s.masks[i, 0].numpy()
        ys, xs = np.nonzero(mask)
        radius = math.sqrt(mask.sum() / unit_area)
        assert 0.33 < radius / side < 0.47
        dx, dy = axis[None, :] - xs.mean() - 0.5, axis[:, None] - ys.mean() - 0.5
        overlap = []
        for angle in np.radians(np.linspace(-12, 12, 25)):
            u = (dx * math.cos(angle) + dy * math.sin(angle)) / radius
            v = (dy * math.cos(angle) - dx * math.sin(angle)) / radius
            area = inside(u, v).reshape(side, fine, side, fine).mean(axis=(1, 3))
            reference = area > 0.5
            overlap.append((mask & reference).sum() / (mask | reference).sum())
        assert max(overlap) > 0.97


def test_polygons_agree_with_a_point_in_polygon_test():
    from matplotlib.path import Path

    turn = np.arange(10) * math.pi / 5  # tips and notches in turn, the first tip up (v points down)
    reach = np.where(np.arange(10) % 2 == 0, 1.05, 0.45)
    star = np.stack([reach * np.sin(turn), -reach * np.cos(turn)], axis=1)
    half = (0.80 + 0.95) * 0.447 / 0.894  # half the width of the triangle's foot
    triangle = np.array([[0, -0.95], [half, 0.80], [-half, 0.80]])
    points = np.random.default_rng(0).uniform(-1.2, 1.2, size=(20_000, 2))
    u, v = torch.from_numpy(points).float().T
    for name, corners in (("star", star), ("triangle", triangle)):
        distance = module._DISTANCE[name](u, v).numpy()
        clear = np.abs(distance) > 1e-4  # not on the edge itself
        inside = Path(np.vstack([corners, corners[:1]]), closed=True).contains_points(points)
        assert np.array_equal(inside[clear], distance[clear] < 0)
        assert 0.1 < inside.mean() < 0.9


@pytest.mark.parametrize("name", SHAPES)
def test_distance_is_a_length_near_the_edge(name):
    """Anti-aliasing takes it for pixels: its slope must be 1 where it crosses zero, but for corners."""
    u, v = torch.from_numpy(np.random.default_rng(1).uniform(-1.1, 1.1, size=(2, 60_000)))
    h, distance = 1e-5, module._DISTANCE[name]
    near = distance(u, v).abs() < 0.03
    slope = torch.hypot(
        (distance(u + h, v) - distance(u - h, v))[near] / (2 * h), (distance(u, v + h) - distance(u, v - h))[near] / (2 * h)
    )
    assert near.sum() > 500
    assert ((slope - 1).abs() < 0.01).float().mean() > 0.97


# --- digits -------------------------------------------------------------------------------------------------------


def _ink_box(image, size=16):
    """The part of a 2-D image between its outermost inked pixels, resized."""
    rows, columns = np.nonzero((image > 0.4).any(1))[0], np.nonzero((image > 0.4).any(0))[0]
    part = torch.from_numpy(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]).float()[None, None]
    return F.interpolate(part, size=(size, size), mode="bilinear", align_corners=False)[0, 0].numpy()


def test_digits_show_the_scan_they_name():
    """The painted ink, turned upright, correlates with the scan of that id, and less with others of its class."""
    scans, target = load_digits().images / 16, load_digits().target
    s = scenes(90, split="test", seed=4, side=48)
    rng = np.random.default_rng(0)
    own, other = [], []
    for i in (s.digit_ids[:, 0] >= 0).nonzero()[:, 0].tolist():
        ink = (paint(s, i, 0).clamp(0, 1) * F.max_pool2d(s.masks[i].float(), 3, 1, 1)[0]).numpy()  # without the texture
        upright = [_ink_box(rotate(ink, angle, reshape=False, order=1)).ravel() for angle in np.linspace(-12, 12, 9)]
        name = int(s.digit_ids[i, 0])
        stranger = rng.choice(np.flatnonzero((target == target[name]) & (np.arange(1797) != name)))
        for scan, likeness in ((name, own), (stranger, other)):
            big = F.interpolate(torch.from_numpy(scans[scan])[None, None], size=48, mode="bicubic")[0, 0].clamp(0, 1)
            likeness.append(max(np.corrcoef(u, _ink_box(big.numpy()).ravel())[0, 1] for u in upright))
    own, other = np.array(own), np.array(other)
    assert len(own) > 40
    assert own.min() > 0.85
    assert own.mean() > 0.94
    assert (own > other).mean() > 0.95


def test_digit_ids_point_at_scans_of_the_right_digit(many):
    target = load_digits().target
    for s in many.values():
        drawn = s.kinds < len(SHAPES)
        assert (s.digit_ids[drawn] == -1).all()
        ids = s.digit_ids[~drawn].numpy()
        assert ids.min() >= 0
        assert np.array_equal(target[ids], s.kinds[~drawn].numpy() - len(SHAPES))


def test_the_three_splits_partition_the_scans_class_by_class():
    target, dealt = load_digits().target, module._digits()[2]
    everyone = np.concatenate([own for split in SPLITS for own in dealt[split]])
    assert sorted(everyone.tolist()) == list(range(1797))  # each scan once
    for split, share in (("train", 0.65), ("validation", 0.10), ("test", 0.25)):
        assert len(dealt[split]) == len(DIGITS)
        for digit, own in enumerate(dealt[split]):
            assert (target[own] == digit).all()
            assert abs(len(own) - share * (target == digit).sum()) <= 1
    assert len(np.unique(load_digits().images.reshape(1797, -1), axis=0)) == 1797  # no scan stands there twice


def test_splits_share_no_digit_image_in_what_they_draw(many):
    drawn = {split: set(s.digit_ids[s.digit_ids >= 0].tolist()) for split, s in many.items()}
    assert not drawn["train"] & drawn["validation"]
    assert not drawn["train"] & drawn["test"]
    assert not drawn["validation"] & drawn["test"]
    for split, ids in drawn.items():
        owned = set(np.concatenate(module._digits()[2][split]).tolist())
        assert ids <= owned
        assert len(ids) > 0.5 * len(owned)


# --- seeds --------------------------------------------------------------------------------------------------------


def _same(a, b):
    fields = ("images", "labels", "kinds", "colours", "masks", "digit_ids")
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in fields) and a.captions == b.captions


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("objects", [1, 2])
def test_same_arguments_same_scenes(split, objects):
    first = scenes(20, split=split, seed=7, objects=objects)
    assert _same(first, scenes(20, split=split, seed=7, objects=objects))
    assert not _same(first, scenes(20, split=split, seed=8, objects=objects))


def test_splits_and_seeds_have_streams_of_their_own():
    seeds = (0, 1, 2, 3, 10**6, 2**32, 2**32 + 1, 2**64 + 1)
    drawn = [
        tuple(scenes(40, split=split, seed=seed, side=16).colours.flatten().tolist()) for split in SPLITS for seed in seeds
    ]
    assert len(set(drawn)) == len(SPLITS) * len(seeds)
    agreement = [np.mean(np.equal(a, b)) for i, a in enumerate(drawn) for b in drawn[:i]]
    assert abs(np.mean(agreement) - 1 / len(COLOURS)) < 0.01  # as often as chance has it


def test_no_picture_stands_in_two_splits(many):
    pictures = Counter(image.numpy().tobytes() for s in many.values() for image in s.images)
    assert max(pictures.values()) == 1


def test_the_global_random_streams_are_not_touched():
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before = states()
    scenes(5, split="train", seed=0, objects=2)
    assert states() == before


# --- guards -------------------------------------------------------------------------------------------------------

not_whole = st.one_of(st.floats(), st.text(max_size=3), st.none())
GOOD = {"n": 2, "split": "train", "seed": 0, "objects": 1, "side": 16}
BAD = {
    "n": st.integers(max_value=0) | not_whole,
    "split": st.text(max_size=12).filter(lambda s: s not in SPLITS) | st.integers() | st.none(),
    "seed": st.integers(max_value=-1) | not_whole,
    "objects": st.integers().filter(lambda k: k not in (1, 2)) | not_whole,
    "side": st.integers(max_value=15) | not_whole,
}


@quick
@given(st.sampled_from(sorted(BAD)).flatmap(lambda name: st.tuples(st.just(name), BAD[name])))
def test_a_bad_argument_is_named(bad):
    name, value = bad
    with pytest.raises(ValueError, match=rf"^{name} must be"):
        scenes(**{**GOOD, name: value})


@quick
@given(n=st.integers(1, 3), split=st.sampled_from(SPLITS), seed=st.integers(0, 2**70), objects=st.integers(1, 2))
def test_good_arguments_pass(n, split, seed, objects):
    s = scenes(np.int64(n), split=split, seed=seed, objects=objects, side=16)
    assert s.images.shape == (n, 3, 16, 16)
    assert s.masks.flatten(2).any(2).all()
