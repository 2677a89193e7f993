"""The ball: what it lets through is inside, measured in double precision by other means than its own."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from safescale_lib.search.ball import Ball

quick = settings(max_examples=120, deadline=None, derandomize=True)
SHAPE = (3, 2, 4, 5)  # (B, C, H, W)


def length(delta, norm):
    """(B,) size of each change in double precision."""
    flat = np.asarray(delta, dtype=np.float64).reshape(len(delta), -1)
    return np.abs(flat).max(1) if norm == "linf" else np.sqrt((flat**2).sum(1))


def inside(x, images, ball):
    """True if every item is in the ball and in [0, 1], allowing for the rounding of float32."""
    slack = 1.1e-6 * max(1, ball.eps) if x.dtype == torch.float32 or ball.grid else 1e-12
    return bool(x.min() >= 0 and x.max() <= 1 and (length(x.double() - images.double(), ball.norm) <= ball.eps + slack).all())


def levels_of(x, grid):
    return (x.double() * grid).round()


def on_grid(x, grid):
    return torch.equal((levels_of(x, grid) / grid).to(x.dtype), x)


@st.composite
def cases(draw, grids=(None, 255, 15), originals_on_grid=True):
    """A ball, originals (many at the very edge of the range), and points near and far."""
    ball = Ball(
        draw(st.sampled_from([0.0, 1e-4, 1 / 255, 2.5 / 255, 8 / 255, 0.3, 1.0, 4.0]) | st.floats(0, 3)),
        draw(st.sampled_from(["linf", "l2"])),
        draw(st.sampled_from(grids)),
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    images = (3 * torch.rand(SHAPE, generator=g, dtype=torch.float64) - 1).clamp(0, 1)
    if ball.grid and originals_on_grid:
        images = (images * ball.grid).round() / ball.grid
    reach = draw(st.sampled_from([0.0, 1e-3, 0.05, 1.0, 30.0]))
    x = images + reach * torch.randn(SHAPE, generator=g, dtype=torch.float64)
    return ball, images.to(dtype), x.to(dtype), g


# --- measuring ----------------------------------------------------------------------------------------------------


@quick
@given(cases())
def test_size_and_holds_are_what_numpy_measures(case):
    ball, images, x, _ = case
    found, true = ball.size(x - images).double().numpy(), length((x - images).double(), ball.norm)
    assert np.allclose(found, true, rtol=1e-6, atol=0)
    for i in range(len(x)):
        assume(abs(true[i] - ball.eps) > 1e-5)  # on the edge, either answer is right
        wanted = true[i] <= ball.eps and 0 <= x[i].min() <= x[i].max() <= 1
        assert bool(ball.holds(x, images)[i]) == wanted


def test_holds_refuses_what_is_not_a_number():
    images = torch.full(SHAPE, 0.5)
    x = images.clone()
    x[1, 0, 2, 2] = float("nan")
    for norm in ("linf", "l2"):
        assert Ball(0.1, norm, None).holds(x, images).tolist() == [True, False, True]


@pytest.mark.parametrize(("n", "side", "eps"), [(4, 224, 0.5), (4, 224, 3.0), (4, 224, 30.0), (40, 96, 16.1)])
def test_a_projection_holds_on_large_pictures_too(n, side, eps):
    """Many float32 pixels: a sum in single precision would be off by more than the slack, eps itself by a little."""
    g = torch.Generator().manual_seed(0)
    images = (100 + 55 * torch.rand(n, 3, side, side, generator=g)).round() / 255
    ball = Ball(eps, "l2", None)
    x = ball.project(images + 2 * torch.rand(images.shape, generator=g) - 1, images)
    assert ball.holds(x, images).all()
    assert np.allclose(length(x.double() - images.double(), "l2"), eps, rtol=2e-6)


# --- project ------------------------------------------------------------------------------------------------------


@quick
@given(cases())
def test_project_stays_inside_and_is_idempotent(case):
    ball, images, x, _ = case
    once = ball.project(x, images)
    assert inside(once, images, Ball(ball.eps, ball.norm, None))
    tiny = 1e-6 if x.dtype == torch.float32 else 1e-12
    assert (ball.project(once, images) - once).abs().max() <= tiny
    assert (ball.project(images, images) - images).abs().max() == 0  # also at eps = 0


@quick
@given(cases())
def test_project_is_the_closed_form(case):
    """linf: the nearest point of ball and range together. l2: shrink to the radius, then clip to the range."""
    ball, images, x, _ = case
    i, y = images.double().numpy(), x.double().numpy()
    if ball.norm == "linf":
        wanted = np.clip(y, np.maximum(0, i - ball.eps), np.minimum(1, i + ball.eps))
    else:
        shrink = np.minimum(1, ball.eps / np.maximum(length(y - i, "l2"), 1e-300))
        wanted = np.clip(i + (y - i) * shrink[:, None, None, None], 0, 1)
    found = ball.project(x, images).double().numpy()
    assert np.abs(found - wanted).max() <= (1e-5 if x.dtype == torch.float32 else 1e-12)


@quick
@given(cases(), st.integers(0, 10**6))
def test_no_other_point_of_the_cube_is_nearer(case, seed):
    ball, images, x, _ = case
    assume(ball.norm == "linf")
    other = np.random.default_rng(seed).uniform(-1, 1, size=SHAPE) * ball.eps
    other = np.clip(images.double().numpy() + other, 0, 1)
    found = ball.project(x, images).double().numpy()
    assert (length(found - x.numpy(), "l2") <= length(other - x.numpy(), "l2") + 1e-5).all()


# --- settle -------------------------------------------------------------------------------------------------------


@quick
@given(cases(grids=(255, 15, 3)))
def test_settled_originals_on_the_grid(case):
    """Of a point in the ball: on the grid, still in the ball, nowhere more than a level away, and at rest."""
    ball, images, x, _ = case
    x = ball.project(x, images)
    settled = ball.settle(x, images)
    assert on_grid(settled, ball.grid)
    assert inside(settled, images, ball)
    assert ball.holds(settled, images).all()
    assert (settled - x).abs().max() <= 1 / ball.grid + 1e-6
    assert torch.equal(ball.settle(settled, images), settled)
    nearest = levels_of(x, ball.grid) / ball.grid
    fits = length(nearest - images.double(), ball.norm) <= ball.eps - 1e-5
    assert torch.equal(levels_of(settled, ball.grid)[fits], levels_of(x, ball.grid)[fits])
    assert torch.equal(ball.settle(images, images), images)


@quick
@given(cases(grids=(255, 15), originals_on_grid=False))
def test_settled_originals_off_the_grid(case):
    """A file cannot hold the original itself: the result is on the grid, and in the cube once eps spans a level."""
    ball, images, x, _ = case
    x = ball.project(x, images)
    settled = ball.settle(x, images)
    assert on_grid(settled, ball.grid)
    assert 0 <= settled.min() <= settled.max() <= 1
    assert (settled - x).abs().max() <= 1 / ball.grid + 1e-6
    if ball.norm == "linf" and ball.eps >= 1 / ball.grid:
        assert inside(settled, images, ball)
    # Otherwise it may lie outside, and `holds` says so.
    truly = length((settled - images).double(), ball.norm)
    assert (ball.holds(settled, images).numpy() <= (truly <= ball.eps + 1.1e-6 * max(1, ball.eps))).all()


def test_off_the_grid_a_small_ball_may_hold_no_file_at_all():
    images = torch.full((1, 3, 4, 4), 100.5 / 255)
    for ball in (Ball(0.3 / 255, "linf"), Ball(2 / 255, "l2")):  # the nearest file is half a level away everywhere
        assert not ball.holds(ball.settle(images, images), images).any()


def test_settle_rounds_inward_where_rounding_would_leave_the_ball():
    images = torch.full((2, 1, 1, 2), 100 / 255, dtype=torch.float64)
    x = torch.tensor([[102.5, 97.6], [101.4, 100.0]], dtype=torch.float64).view(2, 1, 1, 2) / 255
    settled = Ball(2.5 / 255).settle(x, images) * 255
    assert settled.flatten().round(decimals=9).tolist() == [102, 98, 101, 100]
    assert torch.equal(Ball(2.5 / 255, grid=None).settle(x, images), x)


# --- sample -------------------------------------------------------------------------------------------------------


@quick
@given(cases())
def test_samples_stay_inside_and_follow_the_generator(case):
    ball, images, _, g = case
    free = Ball(ball.eps, ball.norm, None)
    for draw in (ball.sample, ball.sample_surface):
        state = g.get_state()
        x = draw(images, g)
        assert inside(x, images, free)
        assert x.dtype == images.dtype
        assert ball.grid is None or inside(ball.settle(x, images), images, ball)
        assert not torch.equal(g.get_state(), state)
        assert torch.equal(draw(images, g.set_state(state)), x)


def test_samples_are_spread_as_promised():
    n, eps, g = 2000, 0.1, torch.Generator().manual_seed(0)
    images = torch.full((n, 1, 3, 3), 0.5, dtype=torch.float64)
    cube = (Ball(eps).sample(images, g) - images).flatten() / eps
    assert stats.kstest(cube, stats.uniform(-1, 2).cdf).pvalue > 0.01
    delta = (Ball(eps, "l2").sample(images, g) - images).flatten(1) / eps
    radius = delta.norm(dim=1)
    assert stats.kstest(radius, stats.uniform(0, 1).cdf).pvalue > 0.01
    first = (delta / radius[:, None])[:, 0]  # one coordinate of a point on the sphere in 9 dimensions
    assert stats.kstest((first + 1) / 2, stats.beta(4, 4).cdf).pvalue > 0.01


def test_surface_samples_are_at_full_length():
    eps, g = 0.1, torch.Generator().manual_seed(1)
    images = torch.full((500, 1, 3, 3), 0.5, dtype=torch.float64)
    corners = (Ball(eps).sample_surface(images, g) - images) / eps
    assert (corners.abs() - 1).abs().max() < 1e-12
    assert abs(corners.mean()) < 4 / 4500**0.5
    delta = (Ball(eps, "l2").sample_surface(images, g) - images).flatten(1)
    assert (delta.norm(dim=1) - eps).abs().max() < 1e-12
    assert delta.mean(0).abs().max() < 4 * eps / 3 / 500**0.5


# --- steepest -----------------------------------------------------------------------------------------------------


@quick
@given(st.integers(0, 10**6), st.sampled_from(["linf", "l2"]), st.integers(-25, 25))
def test_steepest_climbs_fastest_among_unit_steps_at_any_scale(seed, norm, power):
    g = torch.Generator().manual_seed(seed)
    gradient = 10.0**power * torch.randn(SHAPE, generator=g)
    ball = Ball(1.0, norm)
    best = ball.steepest(gradient)
    assert np.allclose(length(best, norm), 1, atol=1e-6)
    climb = (best.double() * gradient.double()).sum((1, 2, 3)).numpy()
    dual = np.abs(gradient.double().numpy()).reshape(len(gradient), -1)
    assert np.allclose(climb, dual.sum(1) if norm == "linf" else np.sqrt((dual**2).sum(1)), rtol=1e-5)  # the dual norm
    other = torch.randn(SHAPE, generator=g).double().numpy()
    other /= length(other, norm)[:, None, None, None]
    assert (climb >= (other * gradient.double().numpy()).sum((1, 2, 3)) * (1 - 1e-6)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_gradient_no_step(norm):
    assert torch.equal(Ball(1.0, norm).steepest(torch.zeros(SHAPE)), torch.zeros(SHAPE))


# --- guards -------------------------------------------------------------------------------------------------------


@quick
@given(st.floats().filter(lambda eps: not 0 <= eps < float("inf")))
def test_bad_eps(eps):
    with pytest.raises(ValueError, match=r"^eps must"):
        Ball(eps)


@quick
@given(st.text(max_size=5).filter(lambda norm: norm not in ("linf", "l2")) | st.integers() | st.none())
def test_bad_norm(norm):
    with pytest.raises(ValueError, match=r"^norm must"):
        Ball(0.1, norm)


@quick
@given(st.integers(max_value=0) | st.floats() | st.text(max_size=3))
def test_bad_grid(grid):
    with pytest.raises(ValueError, match=r"^grid must"):
        Ball(0.1, "linf", grid)
