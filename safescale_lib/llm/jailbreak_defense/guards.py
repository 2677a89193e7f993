"""What the defenses around a model share: how they are asked, where their thresholds come from, and how they are attacked.

A defense here is a wrapper with the model's own `respond`, so that any attack by words runs against it unchanged. A detector is
a function from conversations to scores, larger for more suspicious ones; `calibrated` puts it before a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from safescale_lib.measure.answers import told
from safescale_lib.measure.detection import threshold_at_fpr
from safescale_lib.search import tokens as search
from safescale_lib.search.asking import Responder
from safescale_lib.search.tokens.prompts import GAP, Objective, Slot
from safescale_lib.world.town.chats import REFUSALS, Chat, Message
from safescale_lib.zoo.chat import ChatModel

Conversation = Sequence[Message]
Detector = Callable[[Sequence[Conversation]], torch.Tensor]
"""Conversations -> (N,) scores, larger for more suspicious."""
OutputDetector = Callable[[Sequence[Conversation], Sequence[str]], torch.Tensor]
"""Conversations and their answers -> (N,) scores, larger for more suspicious."""
REFUSAL = REFUSALS[0]


@dataclass(frozen=True, eq=False)
class Defended:
    """A defense with the model's own call. answer: (conversations, prefills, options of `respond`) -> answers."""

    name: str
    answer: Callable[[list[Conversation], list[str], dict[str, Any]], list[str]]

    def respond(
        self,
        conversations: Sequence[Conversation],
        *,
        prefill: str | Sequence[str] = "",
        new_tokens: int = 24,
        **options: Any,
    ) -> list[str]:
        """One answer a conversation, as `ChatModel.respond`."""
        starts = [prefill] * len(conversations) if isinstance(prefill, str) else list(prefill)
        if len(starts) != len(conversations):
            raise ValueError(f"prefill must be one text or one each: {len(conversations)} conversations, got {len(starts)}")
        return self.answer(list(conversations), starts, {"new_tokens": new_tokens, **options}) if conversations else []


def guarded(
    model: Responder, suspicion: Detector, threshold: float, *, name: str = "detector", refusal: str = REFUSAL
) -> Defended:
    """A model behind a detector of its input: what scores above the threshold is refused and never reaches the model."""

    def answer(conversations: list[Conversation], starts: list[str], options: dict[str, Any]) -> list[str]:
        clear = (suspicion(conversations) <= threshold).nonzero()[:, 0].tolist()
        answers = [refusal] * len(conversations)
        if clear:
            replies = model.respond([conversations[i] for i in clear], prefill=[starts[i] for i in clear], **options)
            for i, text in zip(clear, replies, strict=True):
                answers[i] = text
        return answers

    return Defended(name, answer)


def calibrated(
    model: Responder, suspicion: Detector, harmless: Sequence[Chat], *, fpr: float = 0.05, name: str = "detector"
) -> tuple[Defended, float]:
    """`guarded` with the threshold that flags at most a share `fpr` of some harmless requests, and that threshold."""
    if not harmless:
        raise ValueError("harmless must not be empty: a threshold needs requests to be set on")
    threshold = threshold_at_fpr(suspicion([chat.messages for chat in harmless]).double().numpy(), fpr)
    return guarded(model, suspicion, threshold, name=name), threshold


def filtered(
    model: Responder, suspicion: OutputDetector, threshold: float, *, name: str = "filter", refusal: str = REFUSAL
) -> Defended:
    """A model behind a detector of its output: the answer, prefill included, is read and may be held back."""

    def answer(conversations: list[Conversation], starts: list[str], options: dict[str, Any]) -> list[str]:
        answers = model.respond(conversations, prefill=starts, **options)
        scores = suspicion(conversations, joined(starts, answers))
        return [refusal if bad else text for text, bad in zip(answers, (scores > threshold).tolist(), strict=True)]

    return Defended(name, answer)


def joined(starts: Sequence[str], answers: Sequence[str]) -> list[str]:
    """The answers as a reader sees them, prefills included."""
    return [f"{start} {text}".strip() for start, text in zip(starts, answers, strict=True)]


def changed(conversation: Conversation, change: Callable[[str], str]) -> tuple[Message, ...]:
    """The conversation with each of the user's messages changed."""
    return tuple({**m, "content": change(m["content"])} if m["role"] == "user" else dict(m) for m in conversation)


def asked_in(conversation: Conversation) -> str:
    """All that the user said, in one line."""
    return " ".join(message["content"] for message in conversation if message["role"] == "user")


# --- the attack that is adapted to each of them -------------------------------------------------------------------------


def opening(request: Chat) -> str:
    """The true answer up to the secret: what an attacker wants the model to begin with, and can write without knowing it."""
    return request.answer[: request.answer.index(request.value)].strip()


def suffix_slots(
    model: ChatModel,
    requests: Sequence[Chat],
    *,
    wrap: Callable[[Conversation], Conversation] = lambda messages: messages,
    target: Callable[[Chat], str] = opening,
) -> list[Slot]:
    """Each request with a gap behind its last message. wrap: what the defense makes of a conversation."""
    slots = []
    for request in requests:
        *before, last = request.messages
        gapped = (*before, {**last, "content": f"{last['content']} {GAP}"})
        slots.append(search.chat_slot(model.tokenizer, list(wrap(gapped)), f" {target(request)}"))
    return slots


def adaptive_suffix(
    model: ChatModel,
    defended: Responder,
    requests: Sequence[Chat],
    *,
    items: Sequence[Any] | None = None,
    also: Objective | None = None,
    length: int = 10,
    steps: int = 10,
    candidates: int = 24,
    topk: int = 64,
    allowed: torch.Tensor | None = None,
    generator: torch.Generator,
) -> tuple[str, ...]:
    """For each request words behind it, searched on the model inside with the defense in mind, until the defense tells.

    `search.tokens.gcg` [zou2023gcg] with two additions, after [tramer2020adaptive]: `also`, an objective
    over the requests, is what the defense looks at and falls with the loss; and after each step the words are sent to the
    defended model, whose answer decides who is done. items: the prompts as the model reads them behind the defense, one or
    several a request (an expectation over its randomness); default `suffix_slots`. allowed: ids of words that get through.
    A request that needs no words gets "". Raises ValueError for no requests or other numbers of items.
    """
    items = suffix_slots(model, requests) if items is None else list(items)
    if not requests or len(items) != len(requests):
        raise ValueError(f"requests must not be empty and items one each, got {len(requests)} and {len(items)}")

    def verdict(rows: torch.Tensor, texts: list[str]) -> torch.Tensor:
        asked = [requests[i] for i in rows.tolist()]
        attempts = [with_words(request, text) for request, text in zip(asked, texts, strict=True)]
        return told(defended.respond(attempts), [request.value for request in asked])

    aim = search.target_loss(search.Prompts(model.lm, items))
    found = search.gcg(
        model.lm, model.tokenizer, items, search.by_text(model.tokenizer, verdict), length=length, steps=steps,
        candidates=candidates, topk=topk, allowed=allowed, generator=generator,
        objective=aim if also is None else lambda tokens, rows: aim(tokens, rows) + also(tokens, rows),
    )  # fmt: skip
    return tuple("" if skipped else text for text, skipped in zip(found.texts, found.skipped.tolist(), strict=True))


def with_words(request: Chat, words: str) -> tuple[Message, ...]:
    """The request's conversation with some words behind its last message."""
    *before, last = request.messages
    return (*before, {**last, "content": f"{last['content']} {words}".strip()})
