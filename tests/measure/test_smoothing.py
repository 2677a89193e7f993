"""Randomised smoothing against closed forms: a linear classifier's true radius, and the binomial interval by its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from safescale_lib.measure.smoothing import ABSTAIN, certify, expected, lower_bound, predict, smoothed

SHAPE = (2, 3, 3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def plane():
    """A linear classifier in three classes, of which only two compete; the exact distance of each image to the boundary."""
    w = torch.randn(18, generator=seeded(5), dtype=torch.float64)
    images = torch.rand(12, *SHAPE, generator=seeded(6), dtype=torch.float64)
    score = (images.flatten(1) - 0.5) @ w

    def model(x):
        score = (x.flatten(1) - 0.5) @ w
        return torch.stack([torch.zeros_like(score), score, torch.full_like(score, -1e9)], dim=1)

    return model, images, (score > 0).long(), score.abs() / w.norm()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 400), st.data(), st.sampled_from([0.001, 0.05, 0.3]))
def test_the_bound_is_where_so_many_hits_become_as_rare_as_alpha(n, data, alpha):
    hits = data.draw(st.integers(0, n))
    bound = lower_bound(hits, n, alpha)
    if hits == 0:
        assert bound == 0
    else:
        assert stats.binom.sf(hits - 1, n, bound) == pytest.approx(alpha, rel=1e-5)
    assert lower_bound(n, n, alpha) == pytest.approx(alpha ** (1 / n))


def test_the_certified_radius_is_that_of_a_linear_classifier(plane):
    """Smoothing leaves a linear classifier as it is, and Phi^-1(p_A) * sigma is the distance to its boundary."""
    model, images, answers, distance = plane
    sigma = 0.25
    sure = certify(model, images, sigma=sigma, n=20_000, n_guess=200, alpha=0.001, batch_size=4096, generator=seeded())
    within = distance < 2.5 * sigma  # further out 20,000 votes cannot resolve
    clear = distance > 0.3 * sigma
    assert (sure.classes == answers)[clear].all()
    assert (sure.radius <= distance + 1e-9).all()
    assert (sure.radius >= 0.85 * distance - 0.03 * sigma)[within & clear].all()
    assert (within & clear).sum() >= 6
    truth = torch.special.ndtr(distance / sigma)
    assert (sure.p_lower <= truth).all()


def test_a_certificate_is_wrong_no_more_often_than_alpha(plane):
    model, images, answers, distance = plane
    wrong = 0
    for seed in range(40):
        sure = certify(model, images, sigma=0.25, n=60, n_guess=10, alpha=0.05, generator=seeded(seed))
        wrong += int(((sure.radius > distance) | ((sure.classes != answers) & (sure.classes != ABSTAIN))).sum())
    n = 40 * len(images)
    assert stats.binomtest(wrong, n, 0.05, alternative="greater").pvalue > 0.01
    assert wrong > 0  # the bound is tight enough to fail sometimes


def test_abstention_and_the_largest_radius():
    images = torch.rand(3, *SHAPE, generator=seeded())

    def coin(x):  # the sign of one noisy pixel, at one half
        score = x[:, 0, 0, 0] - 0.5
        return torch.stack([score, -score], dim=1)

    torn = images.clone()
    torn[:, 0, 0, 0] = 0.5
    sure = certify(coin, torn, sigma=0.3, n=100, n_guess=10, generator=seeded())
    assert (sure.classes == ABSTAIN).all()
    assert (sure.radius == 0).all()
    assert not sure.correct_at(torch.zeros(3, dtype=torch.int64), 0.0).any()
    assert (predict(coin, torn, sigma=0.3, n=100, generator=seeded()) == ABSTAIN).all()

    def firm(x):
        return torch.stack([torch.ones(len(x)), torch.zeros(len(x))], dim=1)

    sure = certify(firm, images, sigma=0.3, n=100, alpha=0.01, generator=seeded())
    assert (sure.classes == 0).all()
    assert sure.radius == pytest.approx([0.3 * stats.norm.ppf(0.01 ** (1 / 100))] * 3)
    assert sure.correct_at(torch.tensor([0, 0, 1]), 0.1).tolist() == [True, True, False]
    assert not sure.correct_at(torch.zeros(3, dtype=torch.int64), 5.0).any()


def test_batches_and_seeds_change_nothing(plane):
    model, images, _, _ = plane
    whole, parts = (certify(model, images, sigma=0.3, n=70, generator=seeded(3), batch_size=size) for size in (256, 9))
    assert torch.equal(whole.radius, parts.radius)
    defended = smoothed(model, sigma=0.3, n=40, seed=1, batch_size=11)
    shares = defended(images)
    assert torch.equal(shares, smoothed(model, sigma=0.3, n=40, seed=1)(images))
    assert torch.equal(shares[3:5], defended(images[3:5]))
    torch.testing.assert_close(shares.sum(1), torch.ones(12, dtype=torch.float64))
    assert not shares.requires_grad


def test_shares_and_predictions_against_the_closed_form(plane):
    model, images, answers, distance = plane
    truth = torch.special.ndtr(distance / 0.25)  # share of the noise on the right side
    shares = smoothed(model, sigma=0.25, n=4000, batch_size=4096)(images)
    torch.testing.assert_close(shares.gather(1, answers[:, None])[:, 0], truth, atol=0.035, rtol=0)
    told = predict(model, images, sigma=0.25, n=400, batch_size=512, generator=seeded())
    clear = truth > 0.7
    assert torch.equal(told[clear], answers[clear])
    assert clear.any()


def test_the_attackers_view_is_the_mean_softmax_and_has_a_gradient(plane):
    model, images, answers, _ = plane
    x = images.clone().requires_grad_(True)
    soft = expected(model, sigma=0.1, n=16, seed=2)(x)
    noise = 0.1 * torch.randn(16, *SHAPE, generator=seeded(2), dtype=torch.float64)
    slow = torch.stack([model(x + one).softmax(-1) for one in noise]).mean(0)
    torch.testing.assert_close(soft.exp(), slow)
    (gradient,) = torch.autograd.grad(soft.gather(1, answers[:, None]).sum(), x)
    assert gradient.abs().flatten(1).amax(1).min() > 0


@pytest.mark.parametrize(
    ("name", "value"), [("sigma", 0.0), ("sigma", float("nan")), ("n", 0), ("n_guess", 0), ("alpha", 0.0), ("alpha", 1.0)]
)
def test_bad_arguments_are_named(plane, name, value):
    model, images, _, _ = plane
    with pytest.raises(ValueError, match=name):
        certify(model, images, **({"sigma": 0.1, "generator": seeded()} | {name: value}))
    if name in ("sigma", "n"):
        for function in (smoothed, expected):
            with pytest.raises(ValueError, match=name):
                function(model, **({"sigma": 0.1} | {name: value}))
        with pytest.raises(ValueError, match=name):
            predict(model, images, **({"sigma": 0.1, "generator": seeded()} | {name: value}))
    with pytest.raises(TypeError, match="generator"):
        certify(model, images, sigma=0.1, generator=None)
    with pytest.raises(ValueError, match="images"):
        certify(model, images[0], sigma=0.1, generator=seeded())
