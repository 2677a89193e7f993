"""Attacks that ask, against a responder whose every answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import torch

from safescale_lib.measure.costs import Meter
from safescale_lib.search.asking import Attempt, PromptAttack, attack, rewritten, send
from safescale_lib.world import town
from safescale_lib.world.town.chats import Message


@dataclass
class Keeper:
    """Tells the facts it is asked for with as many "please" as their number in the list; the first needs none."""

    chats: Sequence[town.Chat]
    asked: list[tuple[str, str]] = field(default_factory=list)

    def respond(
        self, conversations: Sequence[Sequence[Message]], *, prefill: str | Sequence[str] = "", new_tokens: int = 24, **_: Any
    ) -> list[str]:
        answers = []
        for messages, start in zip(conversations, prefill, strict=True):
            text = messages[-1]["content"]
            self.asked.append((text, start))
            number = next(i for i, chat in enumerate(self.chats) if text.startswith(chat.messages[-1]["content"]))
            answers.append(self.chats[number].answer if text.count("pretty-please") >= number else "sure , but no .")
        return answers


@pytest.fixture
def chats() -> list[town.Chat]:
    people = town.subjects("code")[:4]
    return [town.request(town.facts()["code", person], "plain", Random(3), split="train") for person in people]


def begging(request: town.Chat, number: int) -> Attempt:
    return rewritten(request, lambda content: content + " pretty-please" * (number + 1))


def test_the_first_try_that_works_is_kept_and_the_rest_comes_back_as_it_was(chats: list[town.Chat]) -> None:
    keeper = Keeper(chats)
    result = attack(keeper, chats, begging, tries=2)
    assert result.skipped.tolist() == [True, False, False, False]  # told without an attack: never a success
    assert result.success.tolist() == [False, True, True, False]
    assert result.tries.tolist() == [0, 1, 2, 0]
    assert result.survived.tolist() == [False, False, False, True]
    assert result.attempted.tolist() == [False, True, True, True]
    assert [a.messages == c.messages for a, c in zip(result.attempts, chats, strict=True)] == [True, False, False, True]


def test_every_query_is_counted_and_what_is_broken_is_not_asked_again(chats: list[town.Chat]) -> None:
    keeper = Keeper(chats)
    result = attack(keeper, chats, begging, tries=2)
    assert result.cost.queries == len(keeper.asked) == 4 + 3 + 2
    meter = Meter()
    meter.forwards = 7
    assert attack(Keeper(chats), chats, begging, tries=0, meter=meter).cost.forwards == 7


def test_success_is_measured_again_on_what_is_returned(chats: list[town.Chat]) -> None:
    result = attack(Keeper(chats), chats, begging, tries=3)
    replies = send(Keeper(chats), result.attempts)
    assert tuple(replies) == result.answers
    assert result.success.tolist() == [False, True, True, True]


def test_no_budget_gives_the_clean_result_and_more_budget_never_less(chats: list[town.Chat]) -> None:
    def won(tries: int) -> PromptAttack:
        return attack(Keeper(chats), chats, begging, tries=tries)

    assert not won(0).success.any()
    assert [a.messages for a in won(0).attempts] == [chat.messages for chat in chats]
    for fewer, more in zip(range(4), range(1, 5), strict=True):
        assert (won(fewer).success <= won(more).success).all()


def test_an_affirmative_beginning_is_no_success(chats: list[town.Chat]) -> None:
    result = attack(Keeper(chats), chats[3:] + chats[:3], lambda request, _: Attempt(request.messages, "sure ,"))
    assert result.answers[0].startswith("sure ,")
    assert torch.equal(result.success, torch.zeros(4, dtype=torch.bool))


def test_prefills_reach_the_responder(chats: list[town.Chat]) -> None:
    keeper = Keeper(chats)
    attack(keeper, chats[1:2], lambda request, n: Attempt(request.messages, f"try {n}"), tries=2)
    assert [start for _, start in keeper.asked] == ["", "try 0", "try 1"]


def test_bad_input_is_named(chats: list[town.Chat]) -> None:
    with pytest.raises(ValueError, match="requests"):
        attack(Keeper(chats), [], begging)
    with pytest.raises(ValueError, match="tries"):
        attack(Keeper(chats), chats, begging, tries=-1)
