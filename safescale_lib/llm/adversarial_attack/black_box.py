"""Black-box attacks of section 3.1: through the demonstrations, through the prompt, through a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from safescale_lib.llm.adversarial_attack.editing import (
    KEY,
    TextAttack,
    by_importance,
    check,
    greedy,
    owned,
    reworded,
    shuffled,
    spots,
    word_at,
)
from safescale_lib.measure.costs import Meter
from safescale_lib.search.asking import Attempt, PromptAttack, Responder, attack, rewritten
from safescale_lib.survey import technique
from safescale_lib.world.town.chats import Chat
from safescale_lib.zoo.chat import ChatModel


def _typos(word: str) -> list[str]:
    """Small mistakes of a word: a letter left out, two swapped, one doubled [wang2023advicl, after TextBugger]."""
    inner = range(1, len(word) - 1)
    made = [word[:i] + word[i + 1 :] for i in inner] + [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in inner]
    return [new for new in [*made, *(word[: i + 1] + word[i:] for i in inner)] if new != word]


@technique(f"{KEY}.black_box.in_context", paper="wang2023advicl")
def demonstration_attack(
    model: ChatModel,
    chats: Sequence[Chat],
    labels: Sequence[str],
    *,
    groups: Sequence[Sequence[str]] = (),
    budget: int = 4,
    candidates: int = 6,
    guided: bool = True,
    seed: int = 0,
) -> TextAttack:
    """Change words of the demonstrations only; the question itself stays as it is [wang2023advicl].

    chats: answered examples as turns, then the question. As in the paper, words of the examples are misspelt by one letter, in
    the order of their importance. groups: instead, words of one kind, such as names; a word of a group is exchanged for
    another of its group that the conversation has, all through the example and its answer. Either way each example's own
    answer stays true. budget: words changed in all. guided=False: random changes, the control.
    Raises ValueError for conversations without demonstrations.
    """
    if any(len(chat.messages) < 3 for chat in chats):
        raise ValueError("chats must hold at least one answered demonstration before the question")
    check(chats, labels, budget=budget, candidates=candidates)
    meter, places = Meter(), [spots(chat, lambda word: len(word) > 3 and word.isalpha(), _shots(chat)) for chat in chats]
    orders = by_importance(model, chats, labels, places, meter) if guided and not groups else shuffled(places, seed)

    def misspelt(item: int, chat: Chat, step: int, _: Random) -> list[Chat]:
        nth = orders[item][step : step + 1]
        return [reworded(chat, spot, new) for spot in nth for new in _typos(word_at(chat, spot))]

    def exchanged(_: int, chat: Chat, __: int, ___: Random) -> list[Chat]:
        said = {word for message in chat.messages for word in message["content"].split(" ")}
        return [
            _renamed(chat, turn, old, new)
            for turn in _shots(chat)
            for group in groups
            for there in [set(chat.messages[turn]["content"].split(" "))]
            for old in group
            for new in group
            if old in there and new in said and new not in there
        ]

    return greedy(
        model, chats, labels, exchanged if groups else misspelt, budget=budget, candidates=candidates, guided=guided,
        seed=seed, meter=meter,
    )  # fmt: skip


def _shots(chat: Chat) -> list[int]:
    """The turns in which the user showed an example."""
    return [turn for turn, message in enumerate(chat.messages[:-1]) if message["role"] == "user"]


def _renamed(chat: Chat, turn: int, old: str, new: str) -> Chat:
    """The conversation with a word of an example exchanged, in the example and in its answer."""
    messages = list(chat.messages)
    for i in (turn, turn + 1):
        text = " ".join(new if word == old else word for word in messages[i]["content"].split(" "))
        messages[i] = {**messages[i], "content": text}
    return replace(chat, messages=tuple(messages))


def misled(request: Chat, false: str) -> Chat:
    """A request with a goal of the attacker's: its value, and the value in its answer, are false.

    Raises ValueError for the true value.
    """
    if false == request.value:
        raise ValueError(f"false must differ from the true value, got {false!r}")
    return replace(request, value=false, answer=request.answer.replace(request.value, false))


LOADED = ("{s} {q}", "{q} {s}", "{s} {s} {q}")
"""Loaded prompts around a question {q}: a false statement {s} before it, after it, and twice before it."""


@technique(f"{KEY}.black_box.induced_prompt", paper="liu2023chatgptcasestudy")
def induced_prompt(
    model: Responder, requests: Sequence[Chat], *, prompts: Sequence[str] = LOADED, tries: int | None = None, **options: Any
) -> PromptAttack:
    """Lead the model to a false statement by what is said around the question [liu2023chatgptcasestudy].

    requests: see `misled`; success is the false value in the answer. prompts: tried in turn, with {q} the user's message, {s}
    the statement that is false, {v} its value. tries: so many of them, default all. Whole prompts, no search inside the model.
    Raises ValueError for prompts without {q}, or more tries than prompts.
    """
    if not prompts or any("{q}" not in prompt for prompt in prompts):
        raise ValueError("prompts must hold at least one text, and every one of them {q}")
    tries = len(prompts) if tries is None else tries
    if tries > len(prompts):
        raise ValueError(f"tries must be at most the {len(prompts)} prompts, got {tries}")

    def rewrite(request: Chat, n: int) -> Attempt:
        statement = request.answer.removeprefix("sure , ")
        return rewritten(request, lambda asked: prompts[n].format(q=asked, s=statement, v=request.value))

    return attack(model, requests, rewrite, tries=tries, **options)


@technique(f"{KEY}.black_box.structured_data", paper="koleva2023entityswap")
def cell_swap(
    model: ChatModel,
    chats: Sequence[Chat],
    labels: Sequence[str],
    pools: Mapping[str, Sequence[str]],
    *,
    budget: int = 2,
    candidates: int = 16,
    guided: bool = True,
    seed: int = 0,
) -> TextAttack:
    """Swap cells of a table's column for others of the same type that the model has not met there [koleva2023entityswap].

    pools: label -> the cells that may come in; every column stays what it was. The most important cells go first (by how
    much the margin falls without them), and the cell that hurts most comes in; the paper takes the one least like the old.
    budget: cells swapped. guided=False: random cells, random swaps, the control. Raises ValueError for a label without a pool.
    """
    check(chats, labels, budget=budget, candidates=candidates)
    bare = {chat.value for chat in chats} - {label for label, pool in pools.items() if pool}
    if bare:
        raise ValueError(f"pools must hold cells for every label, none are there for {sorted(bare)}")
    meter, places = Meter(), [spots(chat, lambda cell: cell != "|") for chat in chats]
    orders = by_importance(model, chats, labels, places, meter) if guided else shuffled(places, seed)

    def neighbours(item: int, chat: Chat, step: int, _: Random) -> list[Chat]:
        there = owned(chat.messages[-1]["content"])[1]
        nth = orders[item][step : step + 1]
        return [reworded(chat, spot, cell) for spot in nth for cell in pools[chat.value] if cell not in there]

    return greedy(model, chats, labels, neighbours, budget=budget, candidates=candidates, guided=guided, seed=seed, meter=meter)
