"""Objectives against their closed forms: values, signs and gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp, softmax

from safescale_lib.measure.criteria import ClassifiedAs, Misclassified
from safescale_lib.search.objectives import cross_entropy, margin

quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def cases(draw):
    """Logits (B, classes) for some rows of a larger input, both criteria, and the classes they are about."""
    n, classes, scale = draw(st.integers(1, 6)), draw(st.integers(2, 6)), draw(st.sampled_from([0.1, 1.0, 100.0]))
    rows = torch.tensor(draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=6)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    labels = torch.randint(classes, (n,), generator=g)
    targets = (labels + torch.randint(1, classes, (n,), generator=g)) % classes
    logits = scale * torch.randn(len(rows), classes, generator=g, dtype=torch.float64)
    return logits, rows, Misclassified(labels), ClassifiedAs(targets, labels)


def gradient(objective, criterion, logits, rows):
    z = logits.clone().requires_grad_()
    return torch.autograd.grad(objective(criterion, z, rows).sum(), z)[0].numpy()


@quick
@given(cases())
def test_cross_entropy(case):
    logits, rows, away, towards = case
    z = logits.numpy()
    for criterion, classes, sign in ((away, away.labels[rows], 1), (towards, towards.targets[rows], -1)):
        own = z[np.arange(len(rows)), classes]
        assert np.allclose(cross_entropy(criterion, logits, rows), sign * (logsumexp(z, axis=1) - own))
        wanted = sign * (softmax(z, axis=1) - np.eye(z.shape[1])[classes])
        assert np.allclose(gradient(cross_entropy, criterion, logits, rows), wanted)


@quick
@given(cases())
def test_margin(case):
    logits, rows, away, towards = case
    for criterion, classes, sign in ((away, away.labels[rows], 1), (towards, towards.targets[rows], -1)):
        found, slope = margin(criterion, logits, rows), gradient(margin, criterion, logits, rows)
        for i, own in enumerate(classes.tolist()):
            rivals = [c for c in range(logits.shape[1]) if c != own]
            best = max(rivals, key=lambda c: logits[i, c])
            assert found[i] == sign * (logits[i, best] - logits[i, own])
            wanted = np.zeros(logits.shape[1])
            wanted[best], wanted[own] = sign, -sign
            assert np.array_equal(slope[i], wanted)


@quick
@given(cases())
def test_margin_is_positive_exactly_when_the_criterion_is_met(case):
    logits, rows, away, towards = case
    for criterion in (away, towards):
        assert torch.equal(margin(criterion, logits, rows) > 0, criterion.met(logits, rows))


def test_margin_does_not_fade_where_cross_entropy_does():
    logits, rows, away = torch.tensor([[60.0, 0.0]]), torch.tensor([0]), Misclassified(torch.tensor([0]))
    assert np.abs(gradient(cross_entropy, away, logits, rows)).max() < 1e-20
    assert np.abs(gradient(margin, away, logits, rows)).max() == 1


@pytest.mark.parametrize("objective", [cross_entropy, margin])
def test_another_criterion_is_named(objective):
    class Sure:
        """A criterion these objectives know nothing about."""

    with pytest.raises(TypeError, match=r"^criterion must be Misclassified or ClassifiedAs .* got Sure"):
        objective(Sure(), torch.zeros(1, 2), torch.tensor([0]))
