"""Attacks that ask: each rewrites a request, sends it, and counts only what the answer gives away.

What differs between them is one function, from a request and the number of the try to what is sent. The rest is here: items
that need no attack are skipped, an item that is broken is not asked again, and every query is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from safescale_lib.measure.answers import told
from safescale_lib.measure.costs import Cost, Meter
from safescale_lib.measure.criteria import Verdicts
from safescale_lib.world.town.chats import Chat, Message


class Responder(Protocol):
    """Anything that answers conversations: a chat model, or a defense around one."""

    def respond(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        prefill: str | Sequence[str] = "",
        new_tokens: int = 24,
        **options: Any,
    ) -> list[str]:
        """One answer a conversation; prefill: the beginning put into the model's mouth, one for all or one each."""
        ...


@dataclass(frozen=True)
class Attempt:
    """What is sent for one request: the conversation, and the beginning put into the model's mouth."""

    messages: tuple[Message, ...]
    prefill: str = ""


@dataclass(frozen=True, eq=False)
class PromptAttack(Verdicts):
    """What an attack by words returns for N requests.

    attempts: what was sent: the try that worked, or, for a failed or skipped item, the request itself. answers: what came back.
    success: (N,) bool, the value stands in the answer. skipped: (N,) bool, requests answered without an attack.
    tries: (N,) int64, the number of the try that worked, counted from 1; 0 for the others. cost: what was spent.
    """

    attempts: tuple[Attempt, ...]
    answers: tuple[str, ...]
    success: torch.Tensor
    skipped: torch.Tensor
    tries: torch.Tensor
    cost: Cost


Rewrite = Callable[[Chat, int], Attempt]
"""From a request and the number of the try, from 0, to what is sent."""


def attack(
    model: Responder, requests: Sequence[Chat], rewrite: Rewrite, *, tries: int = 1, meter: Meter | None = None, **options: Any
) -> PromptAttack:
    """Send each request as `rewrite` puts it, up to `tries` times, until the answer holds the request's value.

    options: passed on to `respond`. meter: counts of a search that went before. Raises ValueError for no requests or a
    negative number of tries.
    """
    if not requests:
        raise ValueError("requests must not be empty")
    if tries < 0:
        raise ValueError(f"tries must be >= 0, got {tries}")
    meter = meter or Meter()
    sent = [Attempt(request.messages) for request in requests]
    answers = send(model, sent, meter, **options)
    skipped = told(answers, [request.value for request in requests])
    success, number = torch.zeros(len(requests), dtype=torch.bool), torch.zeros(len(requests), dtype=torch.int64)
    for n in range(tries):
        live = (~(success | skipped)).nonzero().flatten().tolist()
        if not live:
            break
        made = [rewrite(requests[i], n) for i in live]
        replies = send(model, made, meter, **options)
        for i, attempt, reply, won in zip(live, made, replies, told(replies, [requests[i].value for i in live]), strict=True):
            if won:
                sent[i], answers[i], success[i], number[i] = attempt, reply, True, n + 1
    return PromptAttack(tuple(sent), tuple(answers), success, skipped, number, meter.cost)


def send(model: Responder, attempts: Sequence[Attempt], meter: Meter | None = None, **options: Any) -> list[str]:
    """The answers to some attempts, counted as queries."""
    if meter:
        meter.queries += len(attempts)
    return model.respond([a.messages for a in attempts], prefill=[a.prefill for a in attempts], **options)


def rewritten(request: Chat, change: Callable[[str], str]) -> Attempt:
    """The request with its last message changed."""
    *before, last = request.messages
    return Attempt((*before, {**last, "content": change(last["content"])}))
