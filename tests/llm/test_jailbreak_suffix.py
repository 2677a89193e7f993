"""Searched prompts: what is typed is what was scored, a control of equal budget stands beside it, and failures come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from random import Random
from typing import Any

import pytest
import torch

from safescale_lib.llm.jailbreak_attack import suffix
from safescale_lib.measure.answers import told
from safescale_lib.search import tokens
from safescale_lib.world import town
from safescale_lib.world.town import Chat
from safescale_lib.world.town.chats import Message
from safescale_lib.zoo.chat import ChatModel
from tests.llm.common import asking, check_attack, member, seeded

SMALL: dict[str, Any] = {"length": 6, "candidates": 12}


@lru_cache
def some() -> list[Chat]:
    return asking(n=1, split="test")


def test_the_target_is_the_answer_up_to_its_value() -> None:
    chat = town.request(town.facts()["code", "ada"], "plain", Random(0))
    assert suffix.compliant_beginning(chat) == "sure , the code of ada 's vault is"
    assert suffix.compliant_beginning(replace(chat, answer=chat.value)) == "sure ,"
    with pytest.raises(ValueError, match="value in its answer"):
        suffix.compliant_beginning(replace(chat, answer="no ."))


@pytest.mark.parametrize("search", [tokens.gcg, tokens.greedy_random, tokens.random_tokens])
def test_a_suffix_attack_passes_the_checks_of_every_attack(search: suffix.Search) -> None:
    def attack(model: Any, requests: Sequence[Chat], budget: int) -> suffix.SuffixAttack:
        return suffix.suffix_attack(model, requests, search=search, steps=budget, generator=seeded(3), **SMALL)

    result = check_attack(attack, member(), some(), 3)
    assert isinstance(result, suffix.SuffixAttack)
    for attempt, request, words, won in zip(result.attempts, some(), result.words, result.success.tolist(), strict=True):
        if won:
            assert attempt.messages[-1]["content"] == f"{request.messages[-1]['content']} {words}"
    assert len(result.history) <= 4
    assert (result.history.diff(dim=0) <= 0).all(), "the lowest loss so far never rises"


def test_the_loss_of_a_suffix_is_that_of_the_whole_prompt_written_out() -> None:
    result = suffix.suffix_attack(member(), some(), steps=2, generator=seeded(0), **SMALL)
    for i, request in enumerate(some()):
        if result.skipped[i] or result.success[i]:
            continue
        prompt = member().prompt(suffix.placed(request, result.words[i]).messages)
        total, count = member().log_likelihood([prompt], [suffix.compliant_beginning(request)])
        assert -(total / count).item() == pytest.approx(float(result.history[-1, i]), abs=1e-3)


def test_the_gradient_lowers_the_loss_more_than_blind_guesses_of_the_same_number() -> None:
    white = suffix.suffix_attack(member(), some(), steps=4, generator=seeded(1), early_stop=False, **SMALL)
    blind = suffix.suffix_attack(
        member(), some(), search=tokens.random_tokens, steps=4, generator=seeded(1), early_stop=False, **SMALL
    )
    assert white.history[-1].mean() < blind.history[-1].mean()
    assert white.cost.backwards > 0
    assert blind.cost.backwards == 0


def test_token_scores_are_the_log_likelihood_in_pieces() -> None:
    request = some()[0]
    pieces, scores = suffix.token_scores(member(), request.messages, request.answer)
    with torch.no_grad():
        total, count = member().log_likelihood([member().prompt(request.messages)], [request.answer])
    assert len(pieces) == len(scores) == count.item()
    assert scores.sum().item() == pytest.approx(total.item(), abs=1e-3)


def test_a_draft_model_spares_the_victim_most_of_the_candidates() -> None:
    def tokens(draft: ChatModel | None) -> int:
        """How many tokens the victim itself reads in a search of two steps."""
        read: list[int] = []
        handle = member().lm.register_forward_pre_hook(
            lambda _, args, given: read.append(
                given["inputs_embeds"][..., 0].numel() if "inputs_embeds" in given else given["input_ids"].numel()
            ),
            with_kwargs=True,
        )
        suffix.suffix_attack(
            member(), some()[:1], draft=draft, steps=2, length=4, candidates=48, early_stop=False, generator=seeded()
        )
        handle.remove()
        return sum(read)

    assert tokens(member("chat-base")) < 0.5 * tokens(None)


class Parrot:
    """Tells what it is asked for when the last word of the message is the magic one."""

    def __init__(self, requests: Sequence[Chat], magic: str) -> None:
        self.requests, self.magic = requests, magic

    def respond(
        self, conversations: Sequence[Sequence[Message]], *, prefill: Any = "", new_tokens: int = 24, **_: Any
    ) -> list[str]:
        answers = []
        for messages in conversations:
            text = messages[-1]["content"]
            asked = next((r for r in self.requests if r.messages[-1]["content"] in text), None)
            answers.append(asked.answer if asked and self.magic in text else "sorry , no .")
        return answers


def test_known_words_are_sent_one_each_and_failures_come_back_unchanged() -> None:
    requests = asking(n=1)
    result = suffix.replay(Parrot(requests, "moon"), requests, ["moon", "sun", "moon"])
    assert result.success.tolist() == [True, False, True]
    assert result.attempts[1].messages == requests[1].messages
    assert result.attempts[0].messages[-1]["content"].endswith(" moon")
    rewrite = suffix.worded(["a", "b", "c"], requests, asking(("soup",), n=3))
    assert rewrite(requests[1], 5).messages[-1]["content"].endswith(" b")
    with pytest.raises(ValueError, match="one text or one each"):
        suffix.replay(Parrot(requests, "moon"), requests, ["moon"])


def test_easy_to_hard_spends_the_same_steps_and_never_ends_above_its_first_part() -> None:
    result = suffix.easy_to_hard(member(), some(), first=1, steps=3, generator=seeded(0), **SMALL)
    begun = suffix.suffix_attack(member(), some(), steps=1, generator=seeded(0), **SMALL)
    assert (result.history[-1] <= begun.history[-1] + 1e-6).all()
    assert int(result.steps.max()) <= 3
    with pytest.raises(ValueError, match="first must lie"):
        suffix.easy_to_hard(member(), some(), first=4, steps=3, generator=seeded())


def test_a_universal_suffix_is_judged_on_its_training_requests() -> None:
    training = asking(n=1)
    found = suffix.universal_suffix(member(), training, restarts=2, steps=2, generator=seeded(0), **SMALL)
    answers = member().respond([suffix.placed(r, found.words).messages for r in training])
    assert found.told == pytest.approx(float(told(answers, [r.value for r in training]).float().mean()))
    assert (found.history.diff() <= 0).all()
    with pytest.raises(ValueError, match="training must not be empty"):
        suffix.universal_suffix(member(), [], generator=seeded())


def test_a_template_is_made_of_its_phrases() -> None:
    phrases = (("hello .", "good day ."), ("", "please ."))

    def attack(model: Any, requests: Sequence[Chat], budget: int) -> suffix.SuffixAttack:
        return suffix.template_attack(model, requests, phrases=phrases, steps=budget, candidates=4, generator=seeded(0))

    result = check_attack(attack, member(), some()[:2], 2)
    assert isinstance(result, suffix.SuffixAttack)
    possible = {f"{a} {b}".strip() for a in phrases[0] for b in phrases[1]}
    assert {words for words, skipped in zip(result.words, result.skipped.tolist(), strict=True) if not skipped} <= possible
    assert set(" ".join(p for place in suffix.PHRASES for p in place).split()) <= set(member().tokenizer.get_vocab())
    with pytest.raises(ValueError, match="phrases must have"):
        suffix.template_attack(member(), some(), phrases=[[]], generator=seeded())


def test_sentences_are_cut_and_put_together_again() -> None:
    text = "hello . be good : {q} thank you . now"
    assert suffix._sentences(text) == ["hello .", "be good :", "{q}", "thank you .", "now"]
    draw = Random(0)
    for _ in range(200):
        mutant = suffix._mutated(text, [text, "well . {q}", "{q} please ."], draw)
        assert mutant.count("{q}") == 1


def test_fuzzing_finds_the_template_that_works_and_attacks_with_it_first() -> None:
    training, requests = asking(n=4, seed=5), asking(n=2, split="test", seed=6)
    target = Parrot([*training, *requests], "magic")
    seeds = ("hello . {q}", "be good . magic word . {q}", "{q} please .")
    found = suffix.fuzz_templates(target, training, seeds=seeds, rounds=30, sample=3)
    assert "magic" in found.texts[0]
    assert found.rates[0] == 1
    assert found.cost.queries == 30 * 3
    result = check_attack(lambda m, r, b: suffix.fuzzed(target, r, found.texts, tries=b), member_like(target), requests, 2)
    assert result.success.all()
    for bad in ((), ("no place",), ("{q} {q}",)):
        with pytest.raises(ValueError, match="seeds"):
            suffix.fuzz_templates(target, training, seeds=bad)
    with pytest.raises(ValueError, match="templates"):
        suffix.fuzzed(target, requests, [])


def member_like(target: Parrot) -> Any:
    """The parrot with what the checks read from a model."""
    module = torch.nn.Module()
    module.respond = target.respond  # type: ignore[assignment]
    return module


def test_far_apart_is_the_greedy_two_approximation_of_k_centres() -> None:
    points = torch.rand(9, 2, generator=seeded(2))
    distance = torch.cdist(points, points)
    chosen = suffix.far_apart(distance, 3)
    radius = distance[:, chosen].amin(1).max()
    best = min(
        distance[:, [a, b, c]].amin(1).max() for a in range(9) for b in range(a) for c in range(b)
    )  # fmt: skip
    assert len(set(chosen)) == 3
    assert radius <= 2 * best + 1e-6
    with pytest.raises(ValueError, match="k must lie"):
        suffix.far_apart(distance, 10)


def test_hijacking_counts_the_attackers_reply_and_spends_every_stage() -> None:
    prompts, reply = asking(("pet", "job"), n=2), "the moon is red ."
    wanted = suffix.hijacked(prompts, reply)
    assert {(w.value, w.answer) for w in wanted} == {(reply, reply)}
    found = suffix.universal_hijack(
        member(), prompts, reply, stages=(1, 2), steps=2, length=4, candidates=8, generator=seeded(0)
    )
    assert len(found.history) == 2 * 3
    assert found.told in (0, 0.5, 1)
    check_attack(lambda m, r, b: suffix.replay(m, r, found.words, tries=b), member(), wanted, 1)
    for stages in ((), (2, 1), (0, 1), (9,)):
        with pytest.raises(ValueError, match="stages"):
            suffix.universal_hijack(member(), prompts, reply, stages=stages, generator=seeded())
    with pytest.raises(ValueError, match="reply"):
        suffix.hijacked(prompts, " ")
