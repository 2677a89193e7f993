"""Detectors of poison in a training set: on planted clusters, and against an independent computation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safescale_lib.measure.detection import roc
from safescale_lib.measure.poison_detection import activation_clustering, spectral_signature


def planted(seed: int = 0, poisoned: int = 20, gap: float = 6.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three classes of 80 in 12 dimensions; class 1 holds `poisoned` further items that sit elsewhere."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(3, 12)) * 4
    labels = np.repeat([0, 1, 2], 80)
    x = centres[labels] + rng.normal(size=(240, 12))
    away = rng.normal(size=12)
    extra = centres[1] + gap * away / np.linalg.norm(away) + 0.5 * rng.normal(size=(poisoned, 12))
    return np.r_[x, extra], np.r_[labels, np.ones(poisoned, int)], np.r_[np.zeros(240, bool), np.ones(poisoned, bool)]


@pytest.mark.parametrize("detector", [spectral_signature, activation_clustering])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_poison_is_found(detector, seed: int) -> None:  # type: ignore[no-untyped-def]
    features, labels, poisoned = planted(seed)
    scores = detector(features, labels)
    assert roc(scores[~poisoned], scores[poisoned]).auc > 0.97


def test_no_poison_no_signal() -> None:
    features, labels, poisoned = planted(gap=0.0)
    for detector in (spectral_signature, activation_clustering):
        scores = detector(features, labels)
        assert roc(scores[~poisoned], scores[poisoned]).auc < 0.75


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_spectral_scores_are_the_variance_along_the_top_eigenvector(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, labels = rng.normal(size=(60, 5)), rng.integers(0, 3, 60)
    scores = spectral_signature(features, labels)
    for label in np.unique(labels):
        own = features[labels == label]
        top = np.linalg.eigvalsh(np.cov(own.T, bias=True))[-1] if len(own) > 1 else 0.0
        assert scores[labels == label].mean() == pytest.approx(top, rel=1e-6, abs=1e-9)


def test_scores_do_not_depend_on_the_order_of_the_items() -> None:
    features, labels, _ = planted()
    order = np.random.default_rng(5).permutation(len(labels))
    assert np.allclose(spectral_signature(features, labels)[order], spectral_signature(features[order], labels[order]))
    first, second = activation_clustering(features, labels)[order], activation_clustering(features[order], labels[order])
    two = labels[order] == 1  # where there are two groups; a class that is one splits anyhow
    assert np.allclose(first[two], second[two], atol=1e-6)


def test_clustering_scores_lie_in_their_range_and_follow_the_sizes() -> None:
    features, labels, poisoned = planted()
    scores = activation_clustering(features, labels)
    assert np.abs(scores).max() <= 1
    assert (scores[poisoned] > 0).all()
    for label in range(3):
        assert (scores[labels == label] > 0).mean() <= 0.5
    assert np.array_equal(scores, activation_clustering(features, labels))


def test_small_or_constant_classes_score_zero() -> None:
    features, labels = np.zeros((7, 3)), np.array([0, 1, 1, 2, 2, 2, 2])
    assert not spectral_signature(features, labels).any()
    assert not activation_clustering(features, labels).any()


@pytest.mark.parametrize("detector", [spectral_signature, activation_clustering])
def test_bad_input_is_refused_by_name(detector) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="features"):
        detector(np.zeros(5), np.zeros(5, int))
    with pytest.raises(ValueError, match="features"):
        detector(np.full((5, 2), np.nan), np.zeros(5, int))
    with pytest.raises(ValueError, match="labels"):
        detector(np.zeros((5, 2)), np.zeros(4, int))
    with pytest.raises(ValueError, match="labels"):
        detector(np.zeros((5, 2)), np.zeros(5))


@pytest.mark.parametrize("bad", [{"components": 0}, {"reduce": "tsne"}])
def test_bad_reductions_are_refused_by_name(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        activation_clustering(*planted()[:2], **bad)  # type: ignore[arg-type]


def test_independent_components_find_poison_where_they_are_few() -> None:
    features, labels, poisoned = planted()
    scores = activation_clustering(features, labels, reduce="ica", components=2)
    assert roc(scores[~poisoned], scores[poisoned]).auc > 0.9
