"""How the benchmarks judge: planted contenders whose worth is known. No other attack library is needed here."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import backdoor_detectors, carlini_wagner, common, ensemble, gcg, square
from safescale_lib.measure.intervals import Interval
from safescale_lib.search.tokens import Prompts, Slot, Tokens, target_loss


def bright(images: torch.Tensor) -> torch.Tensor:
    """A model of two classes: 1 where the mean is above 0.599, which lies between two grey levels."""
    mean = images.mean(dim=(1, 2, 3))
    return torch.stack([0.599 - mean, mean - 0.599], dim=1)


class Bright(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return bright(images)


def pictures(*levels: float) -> torch.Tensor:
    return torch.tensor(levels)[:, None, None, None].expand(-1, 3, 4, 4).clone()


IMAGES = pictures(0.7, 0.7, 0.7, 0.7, 0.4)
LABELS = torch.tensor([1, 1, 1, 1, 1])  # the last is wrong from the start
RETURNED = pictures(0.4, 0.0, 0.7, 0.5985, 0.4)  # broken, black, unchanged, broken until it is rounded, wrong anyway
CLAIMS = torch.tensor([True, True, False, True, True])


def test_a_success_is_what_the_model_misreads_and_not_a_stand_in_for_failure() -> None:
    verdict = carlini_wagner.judge(bright, IMAGES, LABELS, RETURNED, CLAIMS)
    assert verdict.verified.tolist() == [True, False, False, True, False]
    assert verdict.in_file.tolist() == [True, False, False, False, False]  # 0.5985 becomes 153 / 255
    assert verdict.claimed is not None
    assert verdict.claimed.tolist() == [True, True, False, True, False]
    assert verdict.black.tolist() == [False, True, False, False, False]
    assert verdict.unchanged.tolist() == [False, False, True, False, False]
    assert verdict.distance == pytest.approx(np.array([0.3, 0.7, 0, 0.1015, 0]) * 48**0.5, abs=1e-6)


@pytest.mark.parametrize("level", [-0.1, 1.1, float("nan")])
def test_what_is_no_picture_is_refused(level: float) -> None:
    with pytest.raises(ValueError, match="returned"):
        carlini_wagner.judge(bright, IMAGES[:1], LABELS[:1], pictures(level), None)


def test_a_budget_is_measured_anew() -> None:
    assert common.inside(IMAGES, (IMAGES + 0.1).clamp(0, 1), 0.1, "it").shape == IMAGES.shape
    for returned in (IMAGES + 0.2, IMAGES - float("nan"), IMAGES * 3):
        with pytest.raises(ValueError, match="it must keep the budget"):
            common.inside(IMAGES, returned, 0.1, "it")


@pytest.mark.parametrize(
    ("measured", "holds", "outcome"),
    [
        ((1.2, 1.1, 1.3), True, "won"),
        ((1.2, 1.0, 1.3), True, "won"),
        ((1.2, 0.9, 1.3), True, "level"),
        ((0.8, 0.7, 1.0), True, "level"),
        ((0.8, 0.7, 0.9), True, "LOST"),
        ((1.2, 1.1, 1.3), False, "LOST"),
    ],
)
def test_a_goal_is_won_or_lost_when_the_interval_lies_on_one_side(
    measured: tuple[float, float, float], holds: bool, outcome: str
) -> None:
    assert common.word(Interval(*measured, 9), 1.0, holds=holds) == outcome


def test_at_most_is_at_least_seen_from_the_other_side() -> None:
    assert [
        common.word(common.negative(Interval(value, low, high, 9)), -1.05)
        for value, low, high in ((1.0, 0.9, 1.05), (1.0, 0.9, 1.1), (1.2, 1.1, 1.3))
    ] == ["won", "level", "LOST"]


def test_the_ratio_of_means_pairs_the_items() -> None:
    below = np.array([1.0, 10.0, 100.0, 1000.0])
    ratio = common.ratio_of_means(3 * below, below)
    assert ratio.value == pytest.approx(3)
    assert (ratio.low, ratio.high) == pytest.approx((3, 3))  # however different the items, each pair says the same
    assert common.ratio_of_means(np.array([1.0, 3.0]), np.array([2.0, 2.0])).value == pytest.approx(1)


def contender(
    library: str, call: Callable[[torch.Tensor, torch.Tensor], Any], setting: str = "default", repeats: int | None = None
) -> common.Contender:
    return common.Contender(library, setting, 2, call, lambda answer, images, labels: (answer, None), repeats=repeats)


def test_a_run_keeps_the_order_of_the_items_and_skips_what_is_too_slow() -> None:
    asked = {"all": 0, "once": 0}

    def darken(who: str) -> Callable[[torch.Tensor, torch.Tensor], Any]:
        def call(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            asked[who] += 1
            return images / 2

        return call

    pair = [contender("all", darken("all")), contender("once", darken("once"), repeats=1)]
    results = common.run(Bright(), pair, IMAGES, LABELS, 3, 2)
    every, once = results["all, default"], results["once, default"]
    assert asked == {"all": 9, "once": 3}
    assert torch.equal(every.returned, IMAGES / 2)
    assert torch.equal(once.returned, IMAGES / 2)
    assert every.totals.shape == (3,)
    assert once.totals.shape == (1,)
    assert np.isnan(once.times[1:]).all()
    assert every.ratio_to(once).n == 3  # only the parts on which both ran


def measured(label: str, seconds: float) -> common.Result:
    library, setting = label.split(", ")
    return common.Result(contender(library, lambda x, y: x, setting), np.full((5, 2), seconds), IMAGES, None)


def verdict(broken: list[int], distance: float, claimed: list[int] | None = None, black: list[int] | None = None) -> Any:
    def mask(rows: list[int]) -> torch.Tensor:
        return torch.zeros(6, dtype=torch.bool).scatter(0, torch.tensor(rows, dtype=torch.int64), True)

    return carlini_wagner.Verdict(
        mask(broken),
        mask(broken),
        None if claimed is None else mask(claimed),
        mask(black or []),
        mask([]),
        np.full(6, distance),
    )


def judged(ours: Any, peer: Any, peer_seconds: float) -> list[str]:
    labels = [f"safescale, {carlini_wagner.FILE}", f"safescale, {carlini_wagner.RAW}", "foolbox, tuned"]
    verdicts = dict(zip(labels, (ours, ours, peer), strict=True))
    results = {label: measured(label, s) for label, s in zip(labels, (1.0, 1.0, peer_seconds), strict=True)}
    return carlini_wagner.readings(verdicts, results)


def test_carlini_wagner_is_won_only_on_what_is_verified() -> None:
    everything = [0, 1, 2, 3, 4, 5]
    lines = judged(verdict(everything, 1.0), verdict([0, 1], 1.0, claimed=everything, black=[2, 3, 4, 5]), 2.0)
    assert lines[0].startswith("won: ours breaks 6 of 6")
    assert any("claims 6 of 6, verified are 2 of 6" in line and "4 as black" in line for line in lines)
    assert any(line.startswith("No peer breaks as many") for line in lines)
    lost = judged(verdict([0, 1], 1.2), verdict(everything, 1.0), 0.5)
    assert [line.split(":")[0] for line in lost[:5]] == ["LOST"] * 5  # success, L2 twice, time twice
    assert "on the 2 images both broke" in lost[1]


def test_a_nearer_peer_is_of_comparable_quality_and_a_farther_one_is_not() -> None:
    everything = [0, 1, 2, 3, 4, 5]
    for distance, comparable in ((0.5, True), (1.04, True), (1.2, False)):
        lines = judged(verdict(everything, 1.0), verdict(everything, distance), 2.0)
        assert any("breaks as many within" in line and "2.00 [2.00, 2.00] times" in line for line in lines) == comparable


def test_the_area_is_a_mean_over_the_logarithm_of_the_queries() -> None:
    curve = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])  # (budgets, N): one breaks at the end only, one at once
    assert square.area(curve, (1, 10, 100)).tolist() == pytest.approx([0.25, 1.0])
    steady = np.log(np.array([10, 30, 100, 300]))
    assert square.area(steady, (10, 30, 100, 300)) == pytest.approx((steady[0] + steady[-1]) / 2)


def test_a_lead_averages_seeds_and_resamples_images() -> None:
    ours, peer = np.ones((2, 3, 4)), np.zeros((2, 3, 4))
    peer[:, 0] = 1  # (budgets, seeds, N): equal under one seed of three
    assert square.lead(ours, peer, (10, 100)) == pytest.approx((2 / 3, 2 / 3, 2 / 3, 4))


def test_only_what_was_right_before_can_break() -> None:
    returned = pictures(0.4, 0.7, 0.7, 0.7, 0.4)
    assert square.broken(bright, IMAGES, LABELS, returned).tolist() == [True, False, False, False, False]


def test_every_library_runs_with_every_first_window_and_one_of_them_is_its_default() -> None:
    for library, share in square.DEFAULTS.items():
        names = [square.setting(library, each) for each in square.SHARES]
        assert [name for name in names if name.startswith("default: ")] == [f"default: first window {share}"]
        assert square.THEIRS in square.SHARES


@pytest.mark.parametrize(
    ("ours", "peer", "seconds", "outcome"),
    [(50, 50, 3.0, "won"), (51, 50, 3.0, "won"), (52, 50, 3.0, "LOST"), (40, 50, 3.0, "won"), (50, 50, 1.5, "LOST")],
)
def test_an_ensemble_must_be_as_strong_and_twice_as_fast(ours: int, peer: int, seconds: float, outcome: str) -> None:
    labels = (f"safescale, {ensemble.FILE}", "torchattacks, tuned")
    stands = {label: np.arange(100) < count for label, count in zip(labels, (ours, peer), strict=True)}
    results = {label: measured(label, s) for label, s in zip(labels, (1.0, seconds), strict=True)}
    assert ensemble.reading("a case", stands, results).startswith(f"{outcome}: a case")


def test_recall_is_compared_at_the_peers_false_alarms() -> None:
    poisoned = np.array([False] * 10 + [True] * 4)
    scores = np.r_[np.arange(10.0), 8.5, 9.5, 9.6, 0.0]
    assert backdoor_detectors.caught(scores, poisoned, 0.0).tolist() == [False, True, True, False]
    assert backdoor_detectors.caught(scores, poisoned, 0.1).tolist() == [True, True, True, False]
    flags = np.array([True] + [False] * 9 + [True, False, False, True])  # one false alarm in ten, two of four caught
    duel = backdoor_detectors.duel([scores, scores], [flags, flags], [poisoned, poisoned])
    assert duel.fpr == pytest.approx(0.1)
    assert duel.theirs.tolist() == [True, False, False, True] * 2
    assert duel.ours.tolist() == [True, True, True, False] * 2
    assert duel.lead.value == pytest.approx(0.25)


def test_the_detectors_table_names_who_caught_more() -> None:
    poisoned = np.array([False] * 10 + [True] * 4)
    scores, flags = torch.tensor(np.r_[np.zeros(10), np.ones(4)]), torch.tensor([True] + [False] * 13)
    found = {}
    for library, setting, returned, said in (
        ("safescale", "activation clustering", scores, None),
        ("ART", "activation clustering, default", torch.full_like(scores, float("nan")), flags),
    ):
        who = contender(library, lambda x, y: x, setting)
        found[who.label] = [common.Result(who, np.ones((2, 1)), returned, said)]
    report = backdoor_detectors.table(found, [poisoned])
    assert len(report["rows"]) == 2
    assert all(len(row) == len(report["columns"]) for row in report["rows"])
    (line,) = report["readings"]
    assert line.startswith("won: activation clustering")
    assert "10.0% of the clean items, ours catches 4 of 4 poisoned items, ART 0 of 4" in line


@pytest.mark.parametrize(
    ("ours", "seconds", "outcomes"),
    [
        (1.0, (6.0, 1.3), ["level", "won", "won"]),
        (0.9, (4.0, 1.3), ["won", "LOST", "won"]),
        (1.1, (6.0, 1.3), ["LOST", "LOST", "LOST"]),  # fast, and worse
        (1.0, (6.0, 1.1), ["level", "won", "LOST"]),
    ],
)
def test_a_search_must_be_as_low_before_it_is_fast(ours: float, seconds: tuple[float, float], outcomes: list[str]) -> None:
    labels = ["safescale, default", f"nanogcg, {gcg.SHIPPED}", f"nanogcg, {gcg.STUBBED}"]
    results = {label: measured(label, s) for label, s in zip(labels, (1.0, *seconds), strict=True)}
    spread = np.array([-0.05, 0.0, 0.05, 0.0])
    losses = {label: np.full(4, 1.0) for label in labels} | {labels[0]: ours + spread}
    report = gcg.table(losses, losses, results, dict.fromkeys(labels, 65.0))
    assert [line.split(":")[0] for line in report["readings"]] == outcomes
    assert all(len(row) == len(report["columns"]) for row in report["rows"])


def test_the_judge_of_losses_reads_what_a_search_reads() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=40, initializer_range=0.3, **shape)).eval()
    slot, free = Slot((1, 5, 9, 7), (3, 4), (11, 12, 13)), [20, 21]
    searched = target_loss(Prompts(model, [slot]))(Tokens(torch.tensor([free])), torch.tensor([0]))
    assert gcg.loss(model, slot, free) == pytest.approx(float(searched), abs=1e-5)


def test_prompts_are_short_and_long_in_turn_and_end_in_the_gap() -> None:
    made = gcg.prompts(4)
    assert made == gcg.prompts(4)
    assert all(messages[-1]["content"].endswith(" {slot}") for messages in made)
    lengths = [sum(len(message["content"].split()) for message in messages) for messages in made]
    assert max(lengths[::2]) < min(lengths[1::2])


@pytest.mark.parametrize("stub", [False, True])
def test_a_peer_is_put_back_as_it_was(monkeypatch: pytest.MonkeyPatch, stub: bool) -> None:
    package, inner, utils = (ModuleType(name) for name in ("nanogcg", "nanogcg.gcg", "nanogcg.utils"))
    inner.gc, utils.gc, package.gcg, package.utils = gc, gc, inner, utils  # type: ignore[attr-defined]
    for module in (package, inner, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    stream, level = torch.get_rng_state(), logging.getLogger("nanogcg").level
    with gcg._aside(stub=stub):
        torch.manual_seed(5)
        torch.use_deterministic_algorithms(True)
        assert [(module.gc is gc) for module in (inner, utils)] == [not stub] * 2
        inner.gc.collect()
    assert inner.gc is gc
    assert utils.gc is gc
    assert torch.equal(stream, torch.get_rng_state())
    assert not torch.are_deterministic_algorithms_enabled()
    logging.getLogger("nanogcg").setLevel(level)
