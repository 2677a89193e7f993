"""What the attacks of section 3.1 share: which words are the attacker's, when a text is broken, and one greedy search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import torch

from safescale_lib.measure.answers import told
from safescale_lib.measure.costs import Cost, Meter
from safescale_lib.measure.criteria import Verdicts
from safescale_lib.world.town.chats import Chat
from safescale_lib.zoo.chat import ChatModel

KEY = "llm.adversarial_attack"


@dataclass(frozen=True, eq=False)
class TextAttack(Verdicts):
    """What an attack on a text returns for N conversations.

    chats: the attacked ones; a failed or skipped item comes back as it was. answers: the model's answers to them. success:
    (N,) bool, the answer names another label and not the true one. skipped: (N,) bool, answers that were wrong before.
    edits: (N,) int64, edits made to the successful ones, else 0. cost: what was spent.
    """

    chats: tuple[Chat, ...]
    answers: tuple[str, ...]
    success: torch.Tensor
    skipped: torch.Tensor
    edits: torch.Tensor
    cost: Cost

    def broken_within(self, budget: int) -> torch.Tensor:
        """(N,) bool: broken by at most that many edits."""
        return self.success & (self.edits <= budget)


# --- what all of them share -------------------------------------------------------------------------------------------

Spot = tuple[int, int]
"""A word: the turn it stands in, and its place among the attacker's words there."""

Neighbours = Callable[[int, Chat, int, Random], Sequence[Chat]]
"""(item, the conversation as it stands, edits made so far, dice) -> conversations one edit further."""


def misnamed(answers: Sequence[str], chats: Sequence[Chat], labels: Sequence[str]) -> torch.Tensor:
    """(N,) bool: does each answer name a label other than the true one, and not the true one?"""
    right = told(answers, [chat.value for chat in chats]).tolist()
    named = [bool(set(labels) & set(answer.split()) - {chat.value}) for answer, chat in zip(answers, chats, strict=True)]
    return torch.tensor([other and not own for other, own in zip(named, right, strict=True)], dtype=torch.bool)


def opened(chat: Chat) -> str:
    """The true answer up to its label: "it is" of "it is good ."."""
    return chat.answer[: chat.answer.index(chat.value)].strip()


def classes(model: ChatModel, chats: Sequence[Chat], labels: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(L,) first token of every label, and (B,) where the true one stands among them.

    Raises ValueError where two labels begin with the same token: their scores would be one.
    """
    starts = [model.tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in labels]
    if len(set(starts)) < len(starts):
        raise ValueError(f"labels must begin with different tokens of the model, got {list(labels)}")
    return torch.tensor(starts), torch.tensor([list(labels).index(chat.value) for chat in chats])


def lead_of(logits: torch.Tensor, starts: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """(B,) how far the true label is ahead of the best other one, in nats; logits (B, V)."""
    scores = logits[:, starts]  # (B, L)
    others = scores.scatter(1, own[:, None], float("-inf")).amax(1)
    return scores.gather(1, own[:, None])[:, 0] - others


@torch.no_grad()
def margin(model: ChatModel, chats: Sequence[Chat], labels: Sequence[str], *, batch: int = 256) -> torch.Tensor:
    """(B,) log-odds of the true label against the best other one where the answer names it: below 0, another one comes.

    Needs the probabilities of the labels, not the weights. Raises ValueError for a true label that is not among them.
    """
    check(chats, labels)
    starts, own = classes(model, chats, labels)
    texts = [model.prompt(chat.messages, opened(chat)) for chat in chats]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    leads = torch.empty(len(texts))
    for some in (order[first : first + batch] for first in range(0, len(order), batch)):
        ids, mask = model.encode([texts[i] for i in some])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model.lm(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits[:, -1]
        leads[some] = lead_of(logits.float(), starts, own[some])
    return leads


def check(chats: Sequence[Chat], labels: Sequence[str], **counts: int) -> None:
    """Raise ValueError for no chats, labels that are not two different words or more, a chat of another label, a bad count."""
    if not chats:
        raise ValueError("chats must not be empty")
    if len(set(labels)) < 2 or any(len(label.split()) != 1 for label in labels):
        raise ValueError(f"labels must be at least two different words, got {list(labels)}")
    missing = {chat.value for chat in chats} - set(labels)
    if missing:
        raise ValueError(f"labels must hold the true label of every conversation; {sorted(missing)[:3]} are not among them")
    for name, count in counts.items():
        least = 0 if name == "budget" else 1
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"{name} must be a whole number >= {least}, got {count!r}")


def greedy(
    model: ChatModel,
    chats: Sequence[Chat],
    labels: Sequence[str],
    neighbours: Neighbours,
    *,
    budget: int,
    candidates: int,
    guided: bool,
    seed: int,
    meter: Meter | None = None,
) -> TextAttack:
    """Greedy search: from all texts one edit further, go on with the one whose margin is lowest; ask; stop when it is broken.

    candidates: most of them looked at a step, drawn at random. guided: else the control, a random one of them.
    """
    check(chats, labels, budget=budget, candidates=candidates)
    meter, now = meter or Meter(), list(chats)
    answers = model.respond([chat.messages for chat in now])
    skipped = ~told(answers, [chat.value for chat in chats])
    success, edits = torch.zeros(len(now), dtype=torch.bool), torch.zeros(len(now), dtype=torch.int64)
    dice, stuck = [Random(seed * 1_000_003 + i) for i in range(len(now))], set[int]()
    for step in range(budget):
        live = [i for i in range(len(now)) if not (success[i] or skipped[i] or i in stuck)]
        pools = {i: list(neighbours(i, now[i], step, dice[i])) for i in live}
        pools = {i: dice[i].sample(pool, min(candidates, len(pool))) for i, pool in pools.items() if pool}
        stuck |= set(live) - set(pools)
        if not pools:
            break
        best = dict.fromkeys(pools, 0)
        if guided:
            leads = margin(model, [chat for pool in pools.values() for chat in pool], labels)
            meter.forwards += len(leads)
            best = {
                i: int(part.argmin())
                for i, part in zip(pools, torch.split(leads, [len(p) for p in pools.values()]), strict=True)
            }
        now = [pools[i][best[i]] if i in pools else chat for i, chat in enumerate(now)]
        tried = list(pools)
        replies = model.respond([now[i].messages for i in tried])
        meter.queries += len(tried)
        won = misnamed(replies, [now[i] for i in tried], labels)
        for i, reply, hit in zip(tried, replies, won.tolist(), strict=True):
            if hit:
                answers[i], success[i], edits[i] = reply, True, step + 1
    kept = tuple(new if hit else old for new, old, hit in zip(now, chats, success.tolist(), strict=True))
    return TextAttack(kept, tuple(answers), success, skipped, edits, meter.cost)


def owned(content: str) -> tuple[list[str], list[str]]:
    """A message's words up to its first question mark, which are the operator's, and the attacker's words after it."""
    tokens = content.split(" ")
    start = tokens.index("?") + 1 if "?" in tokens else 0
    return tokens[:start], tokens[start:]


def reworded(chat: Chat, spot: Spot, new: str | None) -> Chat:
    """The conversation with one of the attacker's words replaced, or with None left out."""
    turn, place = spot
    head, mine = owned(chat.messages[turn]["content"])
    mine[place : place + 1] = [] if new is None else [new]
    messages = list(chat.messages)
    messages[turn] = {**messages[turn], "content": " ".join([*head, *mine])}
    return replace(chat, messages=tuple(messages))


def word_at(chat: Chat, spot: Spot) -> str:
    """The attacker's word at a spot."""
    return owned(chat.messages[spot[0]]["content"])[1][spot[1]]


def changed_words(before: Chat, after: Chat) -> int:
    """How many words of the messages differ, place by place; a word more or less counts as well."""
    total = 0
    for old, new in zip(before.messages, after.messages, strict=True):
        a, b = old["content"].split(" "), new["content"].split(" ")
        total += sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
    return total


def spots(chat: Chat, may: Callable[[str], bool], turns: Sequence[int] = (-1,)) -> list[Spot]:
    """The attacker's words of some turns that may be changed."""
    return [
        (turn, place)
        for turn in turns
        for place, word in enumerate(owned(chat.messages[turn]["content"])[1])
        if may(word)
    ]  # fmt: skip


def by_importance(
    model: ChatModel, chats: Sequence[Chat], labels: Sequence[str], places: Sequence[Sequence[Spot]], meter: Meter
) -> list[list[Spot]]:
    """Each conversation's spots, the most important word first: the one without which the margin is lowest."""
    without = [reworded(chat, spot, None) for chat, some in zip(chats, places, strict=True) for spot in some]
    if not without:
        return [[] for _ in chats]
    meter.forwards += len(without)
    leads = torch.split(margin(model, without, labels), [len(some) for some in places])
    return [[some[i] for i in part.argsort(stable=True).tolist()] for some, part in zip(places, leads, strict=True)]


def shuffled(places: Sequence[Sequence[Spot]], seed: int) -> list[list[Spot]]:
    """The control: each conversation's spots in random order."""
    return [Random(seed * 1_000_003 + i).sample(list(some), len(some)) for i, some in enumerate(places)]
