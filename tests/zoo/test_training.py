"""Training: the same seed gives the same weights, also when the run was killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from safescale_lib.measure.costs import Cost
from safescale_lib.zoo import recipes
from safescale_lib.zoo.training import fit, in_halves, own_dice, side_by_side

STEPS = 40


def build() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))


def train(model: torch.nn.Module, state: Path | None = None, stop: int | None = None, **other: object) -> float:
    def loss(step: int) -> torch.Tensor:
        if step == stop:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(16, 5, generator=generator)
        return F.cross_entropy(model(x), (x[:, 0] > 0).long())

    arguments = {"steps": STEPS, "lr": 0.05, "warmup": 5, "state": state, "save_every": 0.0, "progress": False} | other
    return fit(model, loss, **arguments)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_it_learns() -> None:
    model = build()
    train(model)
    x = torch.randn(500, 5, generator=torch.Generator().manual_seed(99))
    assert (model(x).argmax(-1) == (x[:, 0] > 0).long()).float().mean() > 0.9


@pytest.mark.parametrize("stop", [1, 7, STEPS - 1])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, stop: int) -> None:
    whole, broken, resumed = build(), build(), build()
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(broken, tmp_path / "state.safetensors", stop)
    train(resumed, tmp_path / "state.safetensors")
    assert same(whole, resumed)
    assert not same(whole, broken)


def test_a_state_of_other_settings_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    train(build(), state)
    with pytest.raises(ValueError, match="other settings"):
        train(build(), state, lr=0.01)


def test_seconds_add_up_and_the_mode_is_kept(tmp_path: Path) -> None:
    model = build().eval()
    with pytest.raises(KeyboardInterrupt):
        train(build(), tmp_path / "state.safetensors", stop=20)
    with safe_open(tmp_path / "state.safetensors", framework="pt") as file:
        before = float(file.metadata()["seconds"])
    assert train(model, tmp_path / "state.safetensors") > before > 0
    assert not model.training


TINY = """
import sys, torch
from pathlib import Path
from safescale_lib.measure.costs import Cost
from safescale_lib.zoo import recipes
recipes.fit.__kwdefaults__["save_every"] = 0.0
torch.set_num_threads(1)
recipes.train("vit", recipes.Run(seed=3, state=Path(sys.argv[1]), progress=False), recipes.Training(steps=30, batch=4))
"""


def test_a_recipe_survives_sigkill_at_any_moment(tmp_path: Path) -> None:
    """Kill a real training with no chance to clean up; the state is whole, and the end is the same."""
    state = tmp_path / "killed.safetensors"
    victim = subprocess.Popen([sys.executable, "-c", TINY, str(state)], env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(victim.pid, signal.SIGKILL)
    assert victim.wait() == -signal.SIGKILL, "it ended before it could be killed"
    with safe_open(state, framework="pt") as file:
        assert 0 < int(file.metadata()["step"]) < 30
    training = recipes.Training(steps=30, batch=4)
    resumed, whole = (
        recipes.train("vit", recipes.Run(seed=3, state=path, progress=False), training)[0]
        for path in (state, tmp_path / "whole.safetensors")
    )
    assert same(resumed, whole)


def test_make_writes_a_whole_member_with_a_card(tmp_path: Path) -> None:
    run = recipes.Run(seed=1, progress=False)
    recipes.make("vit", tmp_path, run, training=recipes.Training(steps=2, batch=4), metrics=lambda model: [])
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["seed"] == 1
    assert card["recipe"] == {"steps": 2, "batch": 4, "lr": 1.5e-3}
    assert card["bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert card["title"] in (tmp_path / "README.md").read_text()


def test_make_refuses_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vit-robust"):
        recipes.make("resnet", tmp_path, recipes.Run())


def test_differences_speak_up_only_outside_the_interval() -> None:
    shipped = [{"metric": "clean accuracy", "value": 0.9, "low": 0.88, "high": 0.92, "n": 100}]
    near, far = ([{**shipped[0], "value": value}] for value in (0.881, 0.8))
    assert recipes.differences("vit", near, shipped) == []
    assert recipes.differences("vit", far, shipped) == ["vit: clean accuracy is 0.800, outside the card's 0.880 to 0.920"]
    assert recipes.differences("vit", far, []) == ["vit: clean accuracy is not on the card"]


def test_a_training_does_not_depend_on_the_callers_threads() -> None:
    one, two = build(), build()
    before = torch.get_num_threads()
    try:
        for threads, model in ((1, one), (2, two)):
            torch.set_num_threads(threads)
            train(model)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert same(one, two)


def test_terms_side_by_side_are_their_sum() -> None:
    def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(step))
        return x, (x[:, 0] > 0).long()

    def parts(model: torch.nn.Module, step: int) -> list[Callable[[], torch.Tensor]]:
        x, y = data(step)
        first = partial(F.cross_entropy, model[0](x)[:, :3], y)  # does not reach the last layer
        return [lambda: 0.3 * first(), lambda: F.cross_entropy(model(x), y)]

    settings = {"steps": STEPS, "lr": 0.05, "warmup": 5, "progress": False}
    whole, apart, nested = build(), build(), build()
    fit(whole, lambda step: torch.stack([term() for term in parts(whole, step)]).sum(), **settings)  # type: ignore[arg-type]
    fit(apart, lambda step: parts(apart, step), **settings)  # type: ignore[arg-type]
    side_by_side(lambda: fit(nested, lambda step: parts(nested, step), **settings))  # type: ignore[arg-type]
    assert same(apart, nested)
    for a, b in zip(whole.parameters(), apart.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_two_jobs_draw_their_first_weights_apart_and_leave_the_global_stream_alone() -> None:
    def drawn(seed: int) -> torch.Tensor:
        with own_dice(seed):
            time.sleep(0.01)
            return torch.rand(3)

    before = torch.get_rng_state()
    found = side_by_side(*(partial(drawn, seed) for seed in (1, 2, 1, 2)))
    assert torch.equal(torch.get_rng_state(), before)
    for value, seed in zip(found, (1, 2, 1, 2), strict=True):
        assert torch.equal(value, torch.rand(3, generator=torch.Generator().manual_seed(seed)))


def test_side_by_side_gives_the_same_models_in_order() -> None:
    alone, together = [build() for _ in range(3)], [build() for _ in range(3)]
    rates = (0.01, 0.05, 0.1)
    for model, lr in zip(alone, rates, strict=True):
        train(model, lr=lr)
    jobs = [lambda m=m, lr=lr: train(m, lr=lr) and lr for m, lr in zip(together, rates, strict=True)]  # type: ignore[misc]
    assert side_by_side(*jobs) == list(rates)
    assert all(map(same, alone, together))
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda: 1, lambda: 1 // 0)


@dataclass(frozen=True, eq=False)
class Found:
    """A result with a field of every kind that halves are joined by."""

    words: tuple[str, ...]
    success: torch.Tensor
    skipped: torch.Tensor
    history: torch.Tensor
    cost: Cost


def test_halves_come_back_in_the_order_given() -> None:
    def search(items: Sequence[int], *, generator: torch.Generator) -> Found:
        noise = torch.rand(1, generator=generator).item()
        values = torch.tensor(items)
        history = values.float() + torch.arange(2 + items[0] % 2)[:, None]  # the halves take different numbers of steps
        return Found(
            tuple(f"{item} {noise:.4f}" for item in items), values > 3, values == 0, history, Cost(len(items), 0, 1, 0.0)
        )

    whole = in_halves(search, list(range(7)), seed=4)
    draws = [f"{torch.rand(1, generator=torch.Generator().manual_seed(seed)).item():.4f}" for seed in (8, 9)]
    assert whole.words == tuple(f"{item} {draws[item % 2]}" for item in range(7))
    assert whole.success.tolist() == [item > 3 for item in range(7)]
    assert whole.history.shape == (3, 7)
    assert whole.history[-1].tolist() == [item + (1 if item % 2 == 0 else 2) for item in range(7)]
    assert (whole.cost.forwards, whole.cost.queries) == (7, 2)
    with pytest.raises(ValueError, match="at least two"):
        in_halves(search, [1])
