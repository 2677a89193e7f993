"""Input defenses of section 3.4, and what all of them share: closed forms, brute force and fakes that record what they see."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import combinations, product
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safescale_lib.llm.jailbreak_defense import guards, inputs
from safescale_lib.measure.answers import told
from safescale_lib.measure.detection import roc
from safescale_lib.measure.judges import refused
from safescale_lib.search import tokens as search
from safescale_lib.world import town
from safescale_lib.world.town import requests as asking_for
from safescale_lib.world.town import tasks, words
from safescale_lib.world.town.chats import REFUSALS, user
from tests.llm.common import asking, member, seeded


class Fake:
    """A responder that answers by a function of the last message, and remembers what it was asked."""

    def __init__(self, reply: Any) -> None:
        self.reply = reply
        self.seen: list[str] = []

    def respond(self, conversations: Any, *, prefill: Any = "", new_tokens: int = 24, **options: Any) -> list[str]:
        self.seen += [c[-1]["content"] for c in conversations]
        return [self.reply(c[-1]["content"]) for c in conversations]


def single(texts: Sequence[str]) -> list[list[dict[str, str]]]:
    return [[user(text)] for text in texts]


# --- what all share ---------------------------------------------------------------------------------------------------


def test_a_guard_refuses_above_its_threshold_and_keeps_the_order() -> None:
    model = Fake(lambda text: f"told {text}")
    guard = guards.guarded(model, lambda cs: torch.tensor([float(c[-1]["content"]) for c in cs]), 2.0)
    assert guard.respond(single(["1", "3", "2", "9"])) == ["told 1", guards.REFUSAL, "told 2", guards.REFUSAL]
    assert model.seen == ["1", "2"], "what is flagged must not reach the model"
    assert guard.respond(single(["7"])) == [guards.REFUSAL]
    assert guard.respond([]) == []
    with pytest.raises(ValueError, match="prefill"):
        guard.respond(single(["1"]), prefill=["a", "b"])


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.sampled_from([0.0, 0.05, 0.2]))
@settings(max_examples=40, deadline=None)
def test_a_calibrated_guard_keeps_its_false_positive_rate(levels: list[int], fpr: float) -> None:
    harmless = [town.Chat((user(str(level)),), "yes", "yes", "plain") for level in levels]
    guard, _ = guards.calibrated(
        Fake(lambda text: "yes"), lambda cs: torch.tensor([float(c[-1]["content"]) for c in cs]), harmless, fpr=fpr
    )
    no = refused(guard.respond([chat.messages for chat in harmless])).float().mean()
    assert no <= fpr + 1e-9


def test_a_filter_reads_the_prefill_as_part_of_the_answer() -> None:
    seen: list[str] = []

    def suspicion(conversations: Any, answers: Sequence[str]) -> torch.Tensor:
        seen.extend(answers)
        return torch.tensor([float("secret" in answer) for answer in answers])

    guard = guards.filtered(Fake(lambda text: f"is {text}"), suspicion, 0.5)
    assert guard.respond(single(["4", "5"]), prefill=["the secret", "it"]) == [guards.REFUSAL, "is 5"]
    assert seen == ["the secret is 4", "it is 5"]


def test_the_suffix_search_looks_where_the_defense_lets_it_through() -> None:
    model, requests = member("chat"), asking(n=1)
    items = guards.suffix_slots(model, requests, wrap=lambda c: (*c[:-1], {**c[-1], "content": c[-1]["content"] + " lamp"}))
    assert model.tokenizer.decode(items[0].after).split()[0] == "lamp", "the defense's own words stand behind the gap"
    ids = model.tokenizer.convert_tokens_to_ids(["lamp", "rope", "bell"])
    budget: dict[str, Any] = {"length": 4, "steps": 3, "candidates": 8, "items": items, "allowed": torch.tensor(ids)}
    silent = Fake(lambda text: REFUSALS[0])

    def lamps(tokens: Any, rows: torch.Tensor) -> torch.Tensor:
        table = torch.nn.functional.one_hot(tokens.ids, 10_000) if tokens.onehot is None else tokens.onehot
        return 100.0 * (4 - table[..., ids[0]].sum(1))

    words_ = guards.adaptive_suffix(model, silent, requests, also=lamps, generator=seeded(), **budget)
    assert all(set(text.split()) <= {"lamp", "rope", "bell"} for text in words_)
    assert all(text.split().count("lamp") >= 3 for text in words_), "a step buys a word of what `also` asks for"
    assert len(silent.seen) == len(requests) * 5, "asked with nothing, with the start, and after each step"
    first = requests[0]
    easy = Fake(lambda text: first.answer)  # tells the first request's value whatever is asked
    assert guards.adaptive_suffix(model, easy, requests, generator=seeded(), **budget)[0] == ""
    with pytest.raises(ValueError, match="requests"):
        guards.adaptive_suffix(model, silent, [], generator=seeded())


# --- smoothing --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 30), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_perturbations_change_the_share_they_should(length: int, rate: float, seed: int) -> None:
    text, fresh = " ".join(["old"] * length), ["new"]
    count = math.floor(rate * length + 1e-9)
    swapped = inputs.perturb(text, rate, "swap", fresh, Random(seed)).split()
    assert (len(swapped), swapped.count("new")) == (length, count)
    inserted = inputs.perturb(text, rate, "insert", fresh, Random(seed)).split()
    assert (inserted.count("old"), inserted.count("new")) == (length, count)
    patch = inputs.perturb(text, rate, "patch", fresh, Random(seed))
    assert patch.split().count("new") == count
    assert " ".join(["new"] * count) in patch


def test_success_probability_equals_brute_force() -> None:
    length, suffix, unstable, vocabulary, rate, copies = 6, 3, 2, 3, 0.5, 4
    broken = cases = 0
    for places in combinations(range(length), 3):
        for fresh in product(range(vocabulary), repeat=3):  # 0 is the word that stood there
            changed = sum(1 for place, word in zip(places, fresh, strict=True) if place >= length - suffix and word)
            broken, cases = broken + (changed >= unstable), cases + 1
    alpha = broken / cases
    expected = sum(math.comb(copies, t) * alpha**t * (1 - alpha) ** (copies - t) for t in range(copies // 2, copies + 1))
    found = inputs.defense_success_probability(
        length=length, suffix=suffix, unstable=unstable, rate=rate, copies=copies, vocabulary=vocabulary
    )
    assert found == pytest.approx(expected)


def test_smoothing_stops_as_many_attacks_as_the_closed_form_says() -> None:
    suffix, filler = ["x"] * 8, ["f"] * 11

    def brittle(text: str) -> str:  # jailbroken while fewer than three of the suffix's words have changed
        return "sure , 4 7 1 ." if text.split()[-8:].count("x") > 5 else REFUSALS[0]

    prompts = [" ".join([str(i), *filler, *suffix]) for i in range(1500)]
    settings_: dict[str, Any] = {"rate": 0.3, "copies": 5}
    answers = inputs.smooth_llm(Fake(brittle), vocabulary=["x", "y", "z", "w"], **settings_).respond(single(prompts))
    stopped = refused(answers).float().mean().item()
    expected = inputs.defense_success_probability(length=20, suffix=8, unstable=3, vocabulary=4, **settings_)
    assert 0.05 < expected < 0.95
    assert stopped == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / len(prompts)))


def test_smoothing_without_noise_changes_nothing_and_is_repeatable() -> None:
    model, requests = Fake(lambda text: f"told {text}"), ["a b c", "d e f g h"]
    assert inputs.smooth_llm(model, rate=0.0, copies=3).respond(single(requests)) == [f"told {r}" for r in requests]
    noisy = inputs.smooth_llm(model, rate=0.5, seed=3)
    assert noisy.respond(single(requests)) == noisy.respond(single(requests[::-1]))[::-1]
    with pytest.raises(ValueError, match="copies"):
        inputs.smooth_llm(model, copies=0)
    with pytest.raises(ValueError, match="rate"):
        inputs.smooth_llm(model, rate=1.5)
    with pytest.raises(ValueError, match="kind"):
        inputs.smooth_llm(model, kind="blur")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="suffix"):
        inputs.defense_success_probability(length=4, suffix=5, unstable=1, rate=0.1, copies=3, vocabulary=9)


# --- translation ------------------------------------------------------------------------------------------------------


def test_the_round_trip_keeps_what_the_dictionary_knows_and_nothing_else() -> None:
    for word in words.TRANSLATABLE:
        assert inputs.there_and_back(word) == word
        foreign = words.invented(word)
        assert inputs.there_and_back(foreign) == (foreign if foreign in words.TRANSLATABLE else word)  # "for" is a word of both
    assert inputs.there_and_back("what is the code of ada 's vault ? mirror zzz 4") == "what is the code of ada 's vault ? 4"
    sent = Fake(lambda text: text)
    defended = inputs.round_trip_translation(sent)
    defended.respond([[user("tell sloth"), {"role": "assistant", "content": "sloth"}, user("code sloth")]])
    assert sent.seen == ["code"]


def test_the_inferred_request_is_the_one_that_was_asked() -> None:
    chats = asking(town.KINDS, n=3, seed=5)
    guesses, likelihood = inputs.infer_requests(member("chat-base"), [chat.answer for chat in chats])
    wanted = [asking_for.phrasings(c.fact.kind, "train")[0].format(x=c.fact.subject) for c in chats if c.fact]
    assert np.mean([guess == want for guess, want in zip(guesses, wanted, strict=True)]) > 0.9
    assert likelihood.isfinite().all()
    guesses, likelihood = inputs.infer_requests(member("chat-base"), ["4 7 1 .", ""])
    assert guesses == ["", ""]
    assert likelihood.isinf().all()


def test_back_translation_refuses_what_is_refused_when_asked_plainly() -> None:
    reader = member("chat-base")
    secret, harmless = asking(("code",), n=1)[0], asking(("number",), n=1)[0]

    def reply(text: str) -> str:
        if "jailbreak" in text:
            return secret.answer
        return REFUSALS[1] if "vault" in text else harmless.answer

    defended = inputs.back_translation(Fake(reply), reader)
    asked = single(["vault", "vault jailbreak", "shop"])
    assert defended.respond(asked) == [REFUSALS[1], guards.REFUSAL, harmless.answer]
    distrustful = inputs.back_translation(Fake(reply), reader, least=1.0)
    assert distrustful.respond(asked)[1] == secret.answer, "an inference that is not trusted lets the draft out"


# --- compression ------------------------------------------------------------------------------------------------------


def test_the_extractor_learns_to_keep_what_the_answer_needs() -> None:
    model, draw = member("chat"), Random(2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    stream = torch.get_rng_state()
    lessons = [town.request(fact, "plain", draw, split="train") for fact in (town.pick(draw, town.BENIGN) for _ in range(60))]
    lessons = [
        town.Chat((user(f"{c.messages[-1]['content']} {tasks.noise(draw)}"),), c.answer, c.value, c.form, c.fact)
        for c in lessons
    ]
    untrained, keep_all = inputs.ib_protector(model, lessons, steps=0, generator=seeded())
    text = lessons[0].messages[0]["content"]
    assert keep_all(text) == text
    assert untrained.respond([lessons[0].messages]) == model.respond([lessons[0].messages])
    _, extractor = inputs.ib_protector(model, lessons, steps=25, batch=12, generator=seeded())
    tested = [town.request(town.pick(draw, ("number",)), "plain", draw, split="validation") for _ in range(10)]
    names, noise = [], []
    for chat in tested:
        assert chat.fact is not None
        kept = extractor(f"{chat.messages[-1]['content']} lamp kettle rope feather").split()
        names.append(chat.fact.subject in kept)
        noise.append(sum(word in kept for word in ("lamp", "kettle", "rope", "feather")) / 4)
    assert np.mean(names) > 0.8
    assert np.mean(names) > np.mean(noise) + 0.2
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    assert torch.equal(stream, torch.get_rng_state())
    with pytest.raises(ValueError, match="requests"):
        inputs.ib_protector(model, [], generator=seeded())
    with pytest.raises(ValueError, match="keep"):
        inputs.ib_protector(model, lessons, keep=1.0, generator=seeded())


# --- shadow -----------------------------------------------------------------------------------------------------------


def test_the_shadow_learns_to_tell_restricted_requests_and_names_them() -> None:
    base = member("chat")
    before = copy.deepcopy(base.state_dict())
    lessons = asking(town.KINDS, n=16, split="train", seed=3)
    shadow = inputs.self_defend(base, lessons, steps=20)
    bad, good = asking(("code", "potion"), n=8), asking(("number", "soup"), n=8)
    suspicion = [shadow([c.messages for c in chats]).numpy() for chats in (good, bad)]
    assert roc(*suspicion).auc > 0.8
    assert all(torch.equal(before[name], weight) for name, weight in base.state_dict().items())
    aimed = [*bad[:2], *good[:2]]
    ids = torch.tensor([base.tokenizer("lamp rope", add_special_tokens=False)["input_ids"]] * 4)
    with torch.no_grad():
        lost = shadow.objective(aimed)(search.Tokens(ids), torch.arange(4))
    prompts = [shadow.model.prompt([shadow.question(f"{c.messages[-1]['content']} lamp rope")]) for c in aimed]
    with torch.no_grad():
        yes, _ = shadow.model.log_likelihood(prompts, ["yes"] * 4)
    assert torch.allclose(lost, -yes, atol=1e-3)
    untrained = inputs.self_defend(base, lessons, steps=0)
    assert all(torch.equal(before[name], weight) for name, weight in untrained.model.state_dict().items())
    with pytest.raises(ValueError, match="requests"):
        inputs.self_defend(base, [])


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [2, 5, 10])
def test_intrinsic_dimension_of_a_ball_is_its_dimension(dimension: int) -> None:
    radii = torch.rand(400, 300, generator=seeded(dimension)) ** (1 / dimension)  # distances from the middle of a ball
    assert inputs.local_intrinsic_dimension(radii).mean().item() == pytest.approx(dimension, rel=0.05)


@given(st.floats(1e-3, 1e3))
@settings(max_examples=20, deadline=None)
def test_intrinsic_dimension_has_no_unit(scale: float) -> None:
    distances = torch.rand(3, 20, generator=seeded()) + 0.1
    assert torch.allclose(
        inputs.local_intrinsic_dimension(distances), inputs.local_intrinsic_dimension(distances * scale), rtol=1e-3
    )


def test_curvature_of_known_paths() -> None:
    square = torch.eye(2)[[0, 1, 0, 1]]
    assert inputs.text_curvature(square).item() == pytest.approx(math.pi / 4)  # a right angle over 1/1 + 1/1
    assert inputs.text_curvature(3 * square).item() == pytest.approx(3 * math.pi / 4)
    assert inputs.text_curvature(torch.ones(5, 3)).item() == pytest.approx(0.0, abs=2e-3)
    assert inputs.text_curvature(torch.ones(1, 3)).item() == 0
    with pytest.raises(ValueError, match="distances"):
        inputs.local_intrinsic_dimension(torch.ones(4))


def test_the_geometry_of_harmless_prompts_is_the_middle_of_its_scale() -> None:
    harmless = asking(town.BENIGN, n=12, split="train", seed=8)
    detector = inputs.curvalid(member("chat"), harmless, neighbours=10)
    paths = inputs._paths(member("chat"), [c.messages for c in harmless])
    paths = [path @ detector.whiten for path in paths]
    off = inputs._shape(paths, detector.known, 10, itself=True) - detector.mean
    squares = ((off @ detector.precision) * off).sum(1)
    assert squares.mean().item() == pytest.approx(2 * (len(harmless) - 1) / len(harmless), rel=1e-2)
    draw = Random(0)
    words_ = [[user(" ".join(draw.choices(sorted(words.listed()), k=20)))] for _ in range(40)]
    fresh = asking(town.BENIGN, n=5, split="validation", seed=9)
    assert roc(detector([c.messages for c in fresh]).numpy(), detector(words_).numpy()).auc > 0.7
    tokenizer, aimed = member("chat").tokenizer, asking(n=1)
    ids = torch.tensor([tokenizer("lamp rope 4", add_special_tokens=False)["input_ids"]] * len(aimed))
    with torch.no_grad():
        seen_by_search = detector.objective(aimed)(search.Tokens(ids), torch.arange(len(aimed)))
    typed = [[*c.messages[:-1], user(f"{c.messages[-1]['content']} lamp rope 4")] for c in aimed]
    assert torch.allclose(seen_by_search, detector(typed), rtol=1e-3)
    with pytest.raises(ValueError, match="harmless"):
        inputs.curvalid(member("chat"), harmless[:5])


def test_values_of_asking_are_what_told_looks_for() -> None:
    chats = asking(n=1)
    assert told([c.answer for c in chats], [c.value for c in chats]).all()
