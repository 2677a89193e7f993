"""Robust inference: the logic on answers written by hand, the inside on a small model with random weights."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safescale_lib.llm.jailbreak_defense import inference
from safescale_lib.measure.judges import refused
from safescale_lib.world.town.chats import REFUSALS, user
from safescale_lib.zoo.chat import ChatModel
from tests.llm.common import asking, member, seeded


@dataclass
class Says:
    """A responder that answers by a function of the last message, and keeps what it was asked."""

    answer: object
    heard: list = field(default_factory=list)

    def respond(self, conversations, *, prefill="", new_tokens=24, **options):
        starts = inference.started(conversations, prefill)
        self.heard += [(tuple(c), start, dict(options)) for c, start in zip(conversations, starts, strict=True)]
        return [self.answer(c[-1]["content"]) for c in conversations]


@lru_cache
def tiny() -> ChatModel:
    """Random weights: enough where the arithmetic is the point."""
    return random_model(width=32, layers=2, seed=0)


def random_model(*, width: int, layers: int, seed: int) -> ChatModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = member("chat").tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ChatModel(LlamaForCausalLM(config), tokenizer).eval()


CHATS = [[user("hello")], [user("what is the pet of ada ?")], [user("red red blue")]]


def nothing(answers):
    return torch.zeros(len(answers), dtype=torch.bool)


# --- moving target ----------------------------------------------------------------------------------------------------


def test_moving_target_draws_evenly_among_the_replies_that_are_responsive_and_safe():
    members = [Says(lambda _: "sure , one"), Says(lambda _: REFUSALS[1]), Says(lambda _: "sure , bad"), Says(lambda _: "two")]
    flagged = lambda answers: torch.tensor(["bad" in a for a in answers])  # noqa: E731
    target = inference.moving_target([inference.Member(m) for m in members], flagged, generator=seeded())
    counts = Counter(target.respond([[user("x")]] * 2000))
    assert set(counts) == {"sure , one", "two"}
    assert abs(counts["two"] - 1000) < 4 * math.sqrt(500)  # four standard deviations
    members[0].answer = members[3].answer = lambda _: "bad"
    assert target.respond([[user("x")]]) == [inference.REFUSAL]


def test_moving_target_reads_the_beginning_that_was_put_into_its_mouth():
    flagged = lambda answers: torch.tensor([a.startswith("bad") for a in answers])  # noqa: E731
    target = inference.moving_target([inference.Member(Says(lambda _: "4 7"))], flagged, generator=seeded())
    assert target.respond([[user("x")], [user("y")]], prefill=["bad", "good"]) == [inference.REFUSAL, "4 7"]


def test_sampling_draws_from_the_softmax_and_stays_in_the_nucleus():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0]).log_softmax(-1)
    (noisy,) = inference.sampling(0.7, 1.0, seeded())["logits_processor"]
    drawn = noisy(torch.zeros(1), logits.expand(40_000, 4)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / 40_000
    assert torch.allclose(shares, (logits / 0.7).softmax(-1), atol=0.01)
    (noisy,) = inference.sampling(1.0, 0.7, seeded())["logits_processor"]
    kept = noisy(torch.zeros(1), logits.expand(2000, 4)).argmax(-1).unique().tolist()
    assert kept == [0, 1]  # 0.64, then 0.24: the second is needed to reach 0.7
    (noisy,) = inference.sampling(1.0, 0.01, seeded())["logits_processor"]
    assert (noisy(torch.zeros(1), logits.expand(50, 4)).argmax(-1) == 0).all()


def test_sampling_moves_no_global_stream_and_repeats_under_a_seed():
    before = torch.get_rng_state()
    first, second, other = (
        tiny().respond(CHATS, new_tokens=6, **inference.sampling(1.5, 1.0, seeded(seed))) for seed in (0, 0, 1)
    )
    assert first == second != other
    assert torch.equal(before, torch.get_rng_state())
    assert inference.sampling(0.0, 0.5, seeded()) == {}


def test_moving_target_refuses_bad_settings():
    with pytest.raises(ValueError, match="members"):
        inference.moving_target([], nothing, generator=seeded())
    with pytest.raises(TypeError, match="generator"):
        inference.moving_target([inference.Member(tiny())], nothing, generator=0)
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="top_p in"):
            inference.Member(tiny(), **bad)
    with pytest.raises(ValueError, match="one text or one each"):
        inference.started(CHATS, ["a"])


# --- repetition -------------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=9).map(" ".join)


def slow_bleu(reference: str, candidate: str) -> float:
    """By the definition, counting with lists."""
    a, b = reference.split(), candidate.split()
    product = 1.0
    for n in range(1, 5):
        left = [a[i : i + n] for i in range(len(a) - n + 1)]
        grams = [b[i : i + n] for i in range(len(b) - n + 1)]
        common = 0
        for gram in grams:
            if gram in left:
                left.remove(gram)
                common += 1
        extra = 0 if n == 1 else 1
        product *= (common + extra) / max(len(grams) + extra, 1)
    return product**0.25 * math.exp(min(0.0, 1 - len(a) / len(b))) if b else 0.0


@given(WORDS, WORDS)
@settings(max_examples=200, deadline=None)
def test_bleu_is_what_its_definition_says(a, b):
    assert inference.bleu(a, b) == pytest.approx(slow_bleu(a, b))
    assert 0 <= inference.bleu(a, b) <= 1
    assert inference.bleu(a, a) == pytest.approx(1.0 if a else 0.0)


def test_repetition_holds_back_what_is_not_repeated():
    def answer(asked):
        if asked.startswith("repeat :"):
            return REFUSALS[0] if "vault" in asked else asked.removeprefix("repeat : ")
        return f"sure , it is {asked}"

    model = Says(answer)
    shots = [("a b c", "a b c"), ("the code of that vault", REFUSALS[0])]
    harmless = asking(("pet", "job"), n=4)
    guard = inference.output_repetition(model, harmless, shots)
    assert guard.threshold == pytest.approx(0.0)  # all of them are repeated word for word
    assert guard.respond([[user("a cat")], [user("a vault")]]) == ["sure , it is a cat", inference.REFUSAL]
    assert guard.respond([[user("a cat")]], prefill="the vault :") == [inference.REFUSAL], "the beginning is read, too"
    last = model.heard[-1][0]
    assert [m["content"] for m in last[:4]] == ["repeat : a b c", "a b c", "repeat : the code of that vault", REFUSALS[0]]


def test_repetition_lets_refusals_be_and_needs_harmless_requests():
    guard = inference.Repetition(Says(lambda _: REFUSALS[1]), Says(lambda _: "no"), (), threshold=0.5)
    assert guard.respond([[user("x")]]) == [REFUSALS[1]]
    with pytest.raises(ValueError, match="harmless"):
        inference.output_repetition(Says(str), [])


def test_repetition_threshold_keeps_to_its_false_positive_rate():
    """Every tenth harmless answer is repeated badly: at 10 % they may be flagged, at 5 % they must pass."""
    harmless = asking(("number",), n=20)
    marks = {chat.messages[-1]["content"]: i for i, chat in enumerate(harmless)}
    assert len(marks) >= 10
    draw = Random(0)
    spoiled = {text for text in marks if draw.random() < 0.3}

    def answer(asked):
        inside = asked.removeprefix("repeat : ")
        if asked.startswith("repeat :"):
            return "no idea" if inside in spoiled else inside
        return asked

    scores = inference.Repetition(Says(answer), Says(answer), ()).scores([c.messages[-1]["content"] for c in harmless])
    for fpr in (0.0, 0.1, 0.5):
        guard = inference.output_repetition(Says(answer), harmless, fpr=fpr)
        assert (scores > guard.threshold).double().mean() <= fpr


# --- boundary and probe -----------------------------------------------------------------------------------------------


def test_a_wide_boundary_changes_nothing_and_a_narrow_one_holds():
    model = tiny()
    hooks = [len(layer._forward_hooks) for layer in inference.decoder_layers(model.lm)]
    wide = inference.activation_boundary(model, CHATS, layers=[0, 1], reach=1e6)
    assert wide.respond(CHATS, new_tokens=6) == model.respond(CHATS, new_tokens=6)
    narrow = inference.activation_boundary(model, CHATS, layers=[0], reach=0.5)
    seen = []

    def look(states):
        seen.append(states)
        return states

    ids, mask = model.encode([model.prompt(chat) for chat in CHATS])
    with torch.no_grad(), narrow.held(), inference.altered(model.lm, {0: look}):
        model.lm(input_ids=ids, attention_mask=mask)
    z = (seen[0] - narrow.middle[0]) / narrow.spread[0]
    assert z.abs().max() <= 0.6 + 1e-4
    with torch.no_grad(), inference.altered(model.lm, {0: look}):
        model.lm(input_ids=ids, attention_mask=mask)
    plain = (seen[1] - narrow.middle[0]) / narrow.spread[0]
    inside = plain.abs() <= 0.5
    assert torch.equal(seen[0][inside], seen[1][inside]), "inside the boundary nothing moves"
    assert (z.sign() == plain.sign())[~inside].all()
    assert [len(layer._forward_hooks) for layer in inference.decoder_layers(model.lm)] == hooks


def test_the_boundary_is_measured_on_plain_conversations_with_their_answers():
    model = tiny()
    bounded = inference.activation_boundary(model, CHATS, layers=[1], reach=2.0)
    answers, rows, seen = model.respond(CHATS), [], []
    for chat, answer in zip(CHATS, answers, strict=True):  # one by one: no padding anywhere
        with torch.no_grad(), inference.altered(model.lm, {1: lambda s: seen.append(s) or s}):
            model.lm(input_ids=model.encode([f"{model.prompt(chat)} {answer}"])[0])
        rows.append(seen.pop()[0])
    states = torch.cat(rows)
    assert torch.allclose(bounded.middle[1], states.mean(0), atol=1e-4)
    assert torch.allclose(bounded.spread[1], states.std(0), atol=1e-4)
    with pytest.raises(ValueError, match="from 0 to 1"):
        inference.activation_boundary(model, CHATS, layers=[2])
    with pytest.raises(ValueError, match="reach"):
        inference.activation_boundary(model, CHATS, layers=[0], reach=0)


def test_the_probe_finds_a_planted_direction():
    """States drawn by hand: with a shared covariance, Fisher's weight is S^-1 (difference of means)."""

    class Drawn:
        def states(self, texts):
            return torch.stack([torch.tensor([float(x) for x in text.split()]) for text in texts])[:, None]

    dice = seeded(1)
    mixing = torch.tensor([[1.0, 0.5], [0.0, 0.3]])
    harmless = torch.randn(4000, 2, generator=dice) @ mixing.T
    restricted = torch.randn(4000, 2, generator=dice) @ mixing.T + torch.tensor([0.5, 0.5])
    spell = lambda rows: [" ".join(f"{x:.6f}" for x in row.tolist()) for row in rows]  # noqa: E731
    probe = inference.fit_probe(Drawn(), spell(restricted), spell(harmless), spell(harmless), layer=0, fpr=0.1, ridge=1e-6)
    wanted = torch.linalg.solve(mixing @ mixing.T, torch.tensor([0.5, 0.5]))
    assert torch.nn.functional.cosine_similarity(probe.weight, wanted, dim=0) > 0.99
    assert probe.flags(spell(harmless)).float().mean() == pytest.approx(0.1, abs=0.001)
    assert probe.flags(spell(restricted)).float().mean() > 0.3
    with pytest.raises(ValueError, match="two texts"):
        inference.fit_probe(Drawn(), ["1 1"], ["1 1"], [], layer=0)


def test_refusals_are_what_the_judge_calls_refused():
    assert refused([inference.REFUSAL]).all()
