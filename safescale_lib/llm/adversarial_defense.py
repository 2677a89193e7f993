"""Survey section 3.2, defenses against adversarial prompts, in the survey's order, and the searches that are adapted to them.

A detector reads a prompt before the model does: how likely its words are, or what a safety filter says to it with some of its
words erased. Rerouting changes the model instead. Each of them is judged by a suffix search that knows it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence

from safescale_lib.measure.answers import told
from safescale_lib.measure.costs import Meter
from safescale_lib.measure.detection import threshold_at_fpr
from safescale_lib.measure.judges import refused
from safescale_lib.search.asking import Attempt, PromptAttack, Responder, attack
from safescale_lib.search.models import frozen
from safescale_lib.search.tokens import (
    Objective,
    Prompts,
    Slot,
    TokenAttack,
    by_text,
    chat_slot,
    gcg,
    target_loss,
)
from safescale_lib.search.tokens.prompts import GAP, Tokens
from safescale_lib.survey import technique
from safescale_lib.world.town import chats
from safescale_lib.world.town.chats import Chat, Message
from safescale_lib.zoo.chat import ROLES, ChatModel, finished, labelled, logits_before
from safescale_lib.zoo.training import Terms, fit, own_dice

KEY = "llm.adversarial_defense"
Conversation = Sequence[Message]
Flag = Callable[[Sequence[Conversation]], torch.Tensor]
"""Conversations -> (N,) bool: is each of them suspicious?"""


@dataclass(frozen=True)
class Filtered:
    """A responder that refuses what a detector flags, and passes on the rest.

    model: what is protected. flagged: the detector's verdict on conversations. refusal: what is said instead of an answer.
    """

    model: Responder
    flagged: Flag
    refusal: str = chats.REFUSALS[0]

    def respond(
        self,
        conversations: Sequence[Conversation],
        *,
        prefill: str | Sequence[str] = "",
        new_tokens: int = 24,
        **options: Any,
    ) -> list[str]:
        """One answer a conversation; the refusal where it is flagged, whatever was prefilled. Raises ValueError for a list of
        beginnings that is not as long as the conversations."""
        if not isinstance(prefill, str) and len(prefill) != len(conversations):
            raise ValueError(f"prefill must be one text or one each: {len(conversations)} conversations, got {len(prefill)}")
        answers = [self.refusal] * len(conversations)
        passed = (~self.flagged(conversations)).nonzero().flatten().tolist() if conversations else []
        if passed:
            starts = prefill if isinstance(prefill, str) else [prefill[i] for i in passed]
            replies = self.model.respond([conversations[i] for i in passed], prefill=starts, new_tokens=new_tokens, **options)
            for i, reply in zip(passed, replies, strict=True):
                answers[i] = reply
        return answers


# --- detection: how likely a prompt is --------------------------------------------------------------------------------


def message_reader(
    tokenizer: Any, conversations: Sequence[Conversation], *, width: int = 64, steps: int = 250, batch: int = 24, seed: int = 0
) -> ChatModel:
    """A small language model of what users write, trained from scratch: the reader of a perplexity filter.

    A chat model that was trained on its own turns only, like the town's, says nothing about how likely a user's words are.
    tokenizer: that of the model to protect. conversations: what users wrote, of the training split. Raises ValueError for
    none of them, steps below 0 or a batch below 1.
    """
    if not conversations or steps < 0 or batch < 1:
        raise ValueError(
            f"conversations must not be empty, steps be at least 0 and batch at least 1; got {len(conversations)}, {steps} "
            f"and {batch}"
        )
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with own_dice(seed):
        reader = ChatModel(LlamaForCausalLM(config), tokenizer)
    texts = [[message for message in messages if message["role"] == "user"] for messages in conversations]

    def loss(step: int) -> torch.Tensor:
        chosen = Random(seed * 1_000_003 + step).choices(texts, k=batch)
        ids, users = _users_tokens(reader, chosen)
        return F.cross_entropy(logits_before(reader.lm, ids, users), ids[users])

    fit(reader, loss, steps=steps, lr=3e-3, warmup=max(1, steps // 10), weight_decay=0.0, progress=False)
    return reader.eval()


def _users_tokens(reader: ChatModel, conversations: Sequence[Conversation]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T), padded on the right, and which of them the users wrote."""
    tokenizer = reader.tokenizer
    rows = tokenizer([tokenizer.apply_chat_template(list(m), tokenize=False) for m in conversations], add_special_tokens=False)
    ids = pad_sequence(
        [torch.tensor(row) for row in rows["input_ids"]], batch_first=True, padding_value=tokenizer.pad_token_id or 0
    )
    marks = torch.tensor(tokenizer.convert_tokens_to_ids([f"<{role}>" for role in ROLES]))
    place = torch.arange(ids.shape[1]).expand_as(ids)
    turn = torch.where(torch.isin(ids, marks), place, 0).cummax(1).values  # where the current turn began
    real = (ids != tokenizer.eos_token_id) & (ids != tokenizer.pad_token_id)
    return ids, (ids.gather(1, turn) == marks[ROLES.index("user")]) & (place > turn) & real


@torch.no_grad()
def surprise(
    reader: ChatModel, conversations: Sequence[Conversation], *, window: int | None = 8, batch: int = 128
) -> torch.Tensor:
    """(N,) logarithm of the perplexity of what the user wrote: of its most surprising window of so many tokens.

    reader: the model that says how likely a token is. window: None for all of the user's tokens at once; a user who wrote
    fewer tokens has one window. Raises ValueError for a window below 1 or no conversations.
    """
    if not conversations:
        raise ValueError("conversations must not be empty")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 or None, got {window}")
    scores = torch.empty(len(conversations))
    order = sorted(range(len(conversations)), key=lambda i: sum(len(message["content"]) for message in conversations[i]))
    for some in (order[first : first + batch] for first in range(0, len(order), batch)):
        ids, users = _users_tokens(reader, [conversations[i] for i in some])  # (B, T)
        losses = F.cross_entropy(reader.lm(input_ids=ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        for i, loss, written in zip(some, losses, users[:, 1:], strict=True):
            own = loss[written]
            size = len(own) if window is None else min(window, len(own))
            scores[i] = own.unfold(0, size, 1).mean(1).max() if size else 0.0
    return scores


@technique(f"{KEY}.adversarial_detection.input_filtering", paper="jain2023baselinedefenses")
def perplexity_filter(
    model: Responder, reader: ChatModel, harmless: Sequence[Conversation], *, window: int | None = 8, fpr: float = 0.05
) -> tuple[Filtered, float]:
    """Refuse prompts that read like noise: a window of them is less likely than harmless ones are [jain2023baselinedefenses].

    reader: the language model that judges how likely the prompt is. harmless: held-out validation conversations; at most a
    share `fpr` of them is flagged. window: tokens of a window, None for the whole prompt. Returns the filtered responder
    and its threshold (see `surprise`). Of the paper's other baselines, paraphrasing and retokenisation, none is here.
    """
    threshold = threshold_at_fpr(surprise(reader, harmless, window=window).numpy(), fpr)

    def flagged(conversations: Sequence[Conversation]) -> torch.Tensor:
        return surprise(reader, conversations, window=window) > threshold

    return Filtered(model, flagged), threshold


def unsuspicious(prompts: Prompts, *, threshold: float, window: int = 8) -> Objective:
    """An objective for a search that must pass a perplexity filter: by how much the gap's worst window exceeds the threshold.

    prompts: the same items as the attack's, as the filter's own reader reads them.
    """

    def value(tokens: Tokens, slots: torch.Tensor) -> torch.Tensor:
        scores = prompts.read(tokens, slots, tail=False).logits[:, :-1].log_softmax(-1)  # (r, L, V)
        losses = -tokens.pick(scores)  # (r, L)
        if not losses.shape[1]:
            return losses.sum(1)  # nothing there, nothing suspicious
        worst = losses.unfold(1, min(window, losses.shape[1]), 1).mean(2).amax(1)  # (r,)
        return F.relu(worst - threshold)

    return lambda tokens, items: prompts.per_item(tokens, items, value)


# --- detection: erase and check ---------------------------------------------------------------------------------------

Mode = Literal["suffix", "insertion"]


def erasures(content: str, most: int, mode: Mode = "suffix") -> list[str]:
    """A text with up to `most` words erased, from its end or a run of them anywhere; itself first, at least one word left."""
    tokens = content.split(" ")
    sizes = range(1, min(most, len(tokens) - 1) + 1)
    if mode == "suffix":
        return [content, *(" ".join(tokens[:-n]) for n in sizes)]
    return [content, *(" ".join([*tokens[:i], *tokens[i + n :]]) for n in sizes for i in range(len(tokens) - n + 1))]


def refusal_filter(model: Responder, *, new_tokens: int = 5) -> Flag:
    """A safety filter from what is at hand: a conversation is harmful if the model itself begins to refuse it."""

    def flagged(conversations: Sequence[Conversation]) -> torch.Tensor:
        return refused(model.respond(conversations, new_tokens=new_tokens))

    return flagged


@technique(f"{KEY}.adversarial_detection.certified_erasure", paper="kumar2023eraseandcheck")
def erase_and_check(model: Responder, harmful: Flag, *, most: int = 8, mode: Mode = "suffix") -> Filtered:
    """Refuse a prompt if a safety filter flags it or a version with some words erased [kumar2023eraseandcheck, alg. 1].

    harmful: the safety filter. most: words erased at most. mode: "suffix", words at the end; "insertion", one run anywhere.
    The certificate (the paper's theorem 1): a prompt that the filter flags stays flagged whatever suffix (or insertion) of up
    to `most` words is added, as one of the erased versions is the prompt itself. So the share of harmful prompts that the
    filter flags, measured without any attack, is a certified accuracy. Only the last message is erased.
    Raises ValueError for most below 0 or an unknown mode.
    """
    if most < 0:
        raise ValueError(f"most must be >= 0, got {most}")
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")

    def flagged(conversations: Sequence[Conversation]) -> torch.Tensor:
        versions = [erasures(messages[-1]["content"], most, mode) for messages in conversations]
        asked = [
            (*messages[:-1], {**messages[-1], "content": text})
            for messages, texts in zip(conversations, versions, strict=True)
            for text in texts
        ]
        verdicts = torch.split(harmful(asked), [len(texts) for texts in versions])
        return torch.stack([some.any() for some in verdicts])

    return Filtered(model, flagged)


# --- robust inference: representation rerouting -----------------------------------------------------------------------


class _LowRank(torch.nn.Module):
    """A weight (out, in) plus the product of two thin matrices, small but not zero [zou2024circuitbreakers, by LoRA].

    At zero the new states are the old ones, where their cosine is largest and its gradient zero: training would not begin.
    """

    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down = torch.nn.Parameter(torch.randn(rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5)
        noise = torch.randn(weight.shape[0], rank, generator=generator)
        self.up = torch.nn.Parameter(0.3 * float(weight.detach().std()) * noise)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def _adapted(lm: torch.nn.Module, rank: int, seed: int) -> list[torch.nn.Module]:
    """Give every linear layer inside the blocks a low-rank adapter, and leave nothing else to train."""
    lm.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = [part for name, part in lm.named_modules() if isinstance(part, torch.nn.Linear) and "layers." in name]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _LowRank(layer.weight, rank, generator))
    return list(layers)


@technique(f"{KEY}.robust_inference.circuit_breaking", paper="zou2024circuitbreakers")
def circuit_breakers(
    model: ChatModel,
    harmful: Sequence[Chat],
    harmless: Sequence[Chat],
    *,
    layers: Sequence[int] | None = None,
    reroute: float = 1.0,
    retain: float = 4.0,
    rank: int = 16,
    steps: int = 60,
    lr: float = 2e-3,
    batch: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> ChatModel:
    """A copy whose hidden states on harmful answers point away from where they used to [zou2024circuitbreakers, alg. 1].

    harmful: restricted requests with the answers that tell; on the answers' tokens, relu(cosine(new, old)) falls at `layers`
    (indices into the hidden states, default the upper half). harmless: conversations with their answers, refusals and
    look-alikes of the harmful ones among them; everywhere in them, the squared distance of new and old states falls, in
    lengths of the old ones. reroute, retain: weights of the two losses; over the steps the first goes down by half and the
    second up by half. The paper begins with the second at 0; in so few steps a model that was pushed away first did not
    come back. steps: 0 changes nothing. Low-rank adapters of that rank train and are merged at the end. The model itself
    is left alone.
    Raises ValueError for no conversations, a layer that is not there, or a rank below 1.
    """
    depth = model.lm.config.num_hidden_layers
    layers = tuple(range((depth + 1) // 2, depth + 1)) if layers is None else tuple(layers)
    if not harmful or not harmless:
        raise ValueError("harmful and harmless must not be empty")
    if not layers or any(not 0 <= layer <= depth for layer in layers):
        raise ValueError(f"layers must lie in 0..{depth}, at least one; got {layers}")
    if rank < 1 or steps < 0:
        raise ValueError(f"rank must be at least 1 and steps at least 0, got {rank} and {steps}")
    student = copy.deepcopy(model)
    if not steps:
        return student.requires_grad_(True).eval()
    adapted = _adapted(student.lm, rank, seed)

    def states(chat: ChatModel, ids: torch.Tensor) -> torch.Tensor:
        return torch.stack(chat.lm(input_ids=ids, output_hidden_states=True).hidden_states)  # (layers + 1, B, T, d)

    def both(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad(), frozen(model.lm):
            old = states(model, ids)
        return states(student, ids), old

    def turned(bad: torch.Tensor, own: torch.Tensor, weight: float) -> torch.Tensor:
        similar = F.cosine_similarity(*both(bad), dim=-1)[list(layers)]  # (layers, B, T)
        return weight * F.relu(similar)[:, own].mean()

    def moved(good: torch.Tensor, weight: float) -> torch.Tensor:
        new, old = both(good)
        away = (new - old).norm(dim=-1) / old.norm(dim=-1)  # (layers + 1, B, T)
        real = good != (student.tokenizer.pad_token_id or 0)
        total: torch.Tensor = weight * away.square()[1:, real].mean()  # embeddings do not change
        return total

    def loss(step: int) -> Terms:
        draw, share = Random(seed * 1_000_003 + step), step / (2 * steps)
        bad, own = labelled(student, [finished(chat) for chat in draw.choices(harmful, k=batch)])
        good, _ = labelled(student, [finished(chat) for chat in draw.choices(harmless, k=2 * batch)])
        return [partial(turned, bad, own, reroute * (1 - share)), partial(moved, good, retain * (1 + share))]

    fit(student, loss, steps=steps, lr=lr, warmup=max(1, steps // 10), weight_decay=0.0, progress=progress)
    for layer in adapted:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return student.requires_grad_(True).eval()


# --- the attacker who knows the defense -------------------------------------------------------------------------------

Search = Callable[..., TokenAttack]
Place = Literal["suffix", "prefix"]


@dataclass(frozen=True, eq=False)
class SearchedAttack(PromptAttack):
    """What a search beside N requests returns. texts: the N texts found, of failed items as well."""

    texts: tuple[str, ...]


def beside(messages: Conversation, text: str, place: Place = "suffix") -> tuple[Message, ...]:
    """A conversation with a text behind or before its last message."""
    *before, last = messages
    parts = (last["content"], text) if place == "suffix" else (text, last["content"])
    return (*before, {**last, "content": " ".join(parts)})


def searched(
    model: ChatModel,
    responder: Responder,
    requests: Sequence[Chat],
    *,
    search: Search = gcg,
    place: Place = "suffix",
    most: int = 0,
    objective: Callable[[list[list[Slot]]], Objective] | None = None,
    prefill: bool = False,
    length: int = 10,
    steps: int = 20,
    generator: torch.Generator,
    **options: Any,
) -> SearchedAttack:
    """Search tokens beside each request until the responder tells; the search sees `model`, the responder decides.

    place: where the tokens stand. most: the loss is a mean over the request with 0 to so many of its last words erased, which
    is how a search passes erase-and-check. objective: made from the items, default `target_loss`: the true answer up to its
    value. prefill: that beginning is put into the model's mouth as well; what follows it is the objective's affair, so there
    must be one. length, steps and options: of the search, such as candidates and topk. steps = 0 changes nothing. The
    result's `tries` are 1 for successes. Raises ValueError naming the bad argument.
    """
    if not requests:
        raise ValueError("requests must not be empty")
    if place not in get_args(Place):
        raise ValueError(f"place must be one of {get_args(Place)}, got {place!r}")
    if prefill and objective is None:
        raise ValueError("objective must be given with prefill: the default target is the beginning that prefill already holds")
    opened = [request.answer[: request.answer.index(request.value)].strip() for request in requests]

    def gapped(request: Chat, erased: int = 0) -> tuple[Message, ...]:
        *before, last = request.messages
        words = last["content"].split(" ")
        left = " ".join(words[: len(words) - min(erased, len(words) - 1)])
        return beside([*before, {**last, "content": left}], GAP, place)

    def slot(request: Chat, start: str, erased: int) -> Slot:
        messages = gapped(request, erased)
        if prefill:
            return chat_slot(model.tokenizer, [*messages, chats.assistant(start)], " .")
        return chat_slot(model.tokenizer, messages, f" {start}")

    def verdict(items: torch.Tensor, texts: list[str]) -> torch.Tensor:
        some = [requests[i] for i in items.tolist()]
        sent = [beside(request.messages, text, place) for request, text in zip(some, texts, strict=True)]
        starts = [opened[i] for i in items.tolist()] if prefill else ""
        return told(responder.respond(sent, prefill=starts), [request.value for request in some])

    items = [[slot(request, start, n) for n in range(most + 1)] for request, start in zip(requests, opened, strict=True)]
    aim = objective(items) if objective else target_loss(Prompts(model.lm, items))
    found = search(
        model.lm, model.tokenizer, items, by_text(model.tokenizer, verdict), objective=aim, length=length, steps=steps,
        generator=generator, **options,
    )  # fmt: skip
    place_of = {id(request): i for i, request in enumerate(requests)}

    def rewrite(request: Chat, _: int) -> Attempt:
        i = place_of[id(request)]
        return Attempt(beside(request.messages, found.texts[i], place), opened[i] if prefill else "")

    meter = Meter()
    meter.forwards, meter.backwards, meter.queries = found.cost.forwards, found.cost.backwards, found.cost.queries
    made = attack(responder, requests, rewrite, tries=int(steps > 0), meter=meter)
    cost = replace(made.cost, seconds=made.cost.seconds + found.cost.seconds)
    return SearchedAttack(made.attempts, made.answers, made.success, made.skipped, made.tries, cost, found.texts)
