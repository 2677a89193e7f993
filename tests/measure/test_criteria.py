"""Criteria against the same verdict written as a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safescale_lib.measure.criteria import ClassifiedAs, Misclassified

quick = settings(max_examples=60, deadline=None, derandomize=True)


@st.composite
def answers(draw):
    """Logits without ties for some rows of a larger input, its labels, and a target beside each label."""
    n, classes = draw(st.integers(1, 8)), draw(st.integers(2, 5))
    rows = torch.tensor(draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=6)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    labels = torch.randint(classes, (n,), generator=g)
    targets = (labels + torch.randint(1, classes, (n,), generator=g)) % classes
    return torch.randn(len(rows), classes, generator=g), rows, labels, targets


@quick
@given(answers())
def test_verdicts(case):
    logits, rows, labels, targets = case
    away, towards = Misclassified(labels), ClassifiedAs(targets, labels)
    assert len(away) == len(towards) == len(labels)
    for i, row in enumerate(rows):
        top = max(range(logits.shape[1]), key=lambda c: logits[i, c])
        right, hit = top == labels[row], top == targets[row]
        assert away.correct(logits, rows)[i] == towards.correct(logits, rows)[i] == right
        assert away.met(logits, rows)[i] == (not right)
        assert towards.met(logits, rows)[i] == hit


def test_target_must_differ_from_the_label():
    with pytest.raises(ValueError, match="targets must differ from labels"):
        ClassifiedAs(torch.tensor([1, 2]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="one length, got 1 and 2"):
        ClassifiedAs(torch.tensor([1]), torch.tensor([0, 2]))


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ([0, 1], TypeError),
        (torch.tensor([0.0, 1.0]), TypeError),
        (torch.tensor([0, 1], dtype=torch.int32), TypeError),
        (None, TypeError),
        (torch.tensor([], dtype=torch.int64), ValueError),
        (torch.tensor([[0, 1]]), ValueError),
        (torch.tensor(1), ValueError),
        (torch.tensor([0, -1]), ValueError),
    ],
)
def test_bad_labels_are_named(bad, error):
    good = torch.tensor([0, 1])
    with pytest.raises(error, match=r"^labels must"):
        Misclassified(bad)
    with pytest.raises(error, match=r"^labels must"):
        ClassifiedAs(good, bad)
    with pytest.raises(error, match=r"^targets must"):
        ClassifiedAs(bad, good)
