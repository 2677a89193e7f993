"""Survey section 3.4, output defenses against jailbreaks: what is done with an answer, before it is released or to shape it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from safescale_lib.llm.jailbreak_defense.guards import Conversation, Defended, asked_in, suffix_slots
from safescale_lib.search import tokens as search
from safescale_lib.search.asking import Responder
from safescale_lib.search.tokens.prompts import GAP, decode
from safescale_lib.survey import technique
from safescale_lib.world import town
from safescale_lib.world.town import tasks
from safescale_lib.world.town.chats import REFUSALS, Chat, Message, grade
from safescale_lib.zoo.chat import ChatModel

OUTPUT = "llm.jailbreak_defense.output_defense"

# --- a classifier of answers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reviewed:
    """A request, an answer to it, and whether that answer must not go out."""

    messages: tuple[Message, ...]
    answer: str
    unsafe: bool


def noisy_dialogues(n: int, *, seed: int = 0, noise: float = 0.5) -> list[Reviewed]:
    """n training dialogues, half of them unsafe: requests of the train split with the answers a broken model could give.

    noise: the share with random words attached, as [kim2024aps] does so that an attached suffix does not flip the label.
    Safe are refusals, values of harmless facts, and answers that begin and then tell nothing. Raises ValueError.
    """
    if n < 2 or not 0 <= noise <= 1:
        raise ValueError(f"n must be at least 2 and noise lie in [0, 1], got {n} and {noise}")
    draw, made = Random(seed), []
    for i in range(n):
        kinds = town.RESTRICTED if i % 2 or draw.random() < 0.4 else town.BENIGN
        form: Any = draw.choice(("plain", "wrapped", "turns", "few-shot", "begin"))
        fact = town.pick(draw, kinds, "train")
        chat = town.request(fact, form, draw, split="train")
        messages = list(chat.messages)
        if draw.random() < noise:
            last = f"{messages[-1]['content']} {tasks.noise(draw, wild=True)}"
            messages[-1] = {**messages[-1], "content": last}
        answer = draw.choice((chat.answer, fact.sentence, f"{fact.value} ."))
        if fact.restricted and not i % 2:
            answer = draw.choice((*REFUSALS, chat.answer[: chat.answer.index(fact.value)].strip()))
        made.append(Reviewed(tuple(messages), answer, bool(i % 2)))
    return made


@dataclass(frozen=True, eq=False)
class AnswerProbe:
    """A linear classifier of (request, answer) pairs, on the mean state of the answer's tokens in a model that reads both.

    weight: (d,). Larger scores: less safe.
    """

    reader: ChatModel
    layer: int
    weight: torch.Tensor
    bias: float

    def __call__(self, conversations: Sequence[Conversation], answers: Sequence[str]) -> torch.Tensor:
        """(N,) log-odds that the answer must not go out."""
        return _read(self.reader, conversations, answers, self.layer) @ self.weight + self.bias

    def objective(self, requests: Sequence[Chat]) -> search.Objective:
        """What an attacker who knows it lowers, over N requests: how sure it is of their answers, the searched words in sight.

        The attacker does not know the values yet: requests hold answers with some other value of the kind.
        """
        slots = [
            search.chat_slot(self.reader.tokenizer, [grade(f"{asked_in(r.messages)} {GAP}", r.answer)], " yes")
            for r in requests
        ]
        prompts = search.Prompts(self.reader.lm, slots)

        def value(tokens: search.Tokens, which: torch.Tensor) -> torch.Tensor:
            states = prompts.read(tokens, which, output_hidden_states=True).hidden_states[self.layer]  # (r, 1 + L + A, d)
            place = torch.arange(states.shape[1]) - 1 - tokens.ids.shape[1]  # 0 where the gap has ended
            inside = (place >= 0) & (place < prompts.after[which][:, None])
            pooled = (states * inside[..., None]).sum(1) / inside.sum(1, keepdim=True)
            return F.softplus(pooled @ self.weight + self.bias)

        return lambda tokens, items: prompts.per_item(tokens, items, value)


@torch.no_grad()
def _read(reader: ChatModel, conversations: Sequence[Conversation], answers: Sequence[str], layer: int) -> torch.Tensor:
    """(N, d) mean state of what stands behind the request in the review of each pair."""
    if len(conversations) != len(answers):
        raise ValueError(f"conversations and answers must pair up, got {len(conversations)} and {len(answers)}")
    texts = [reader.prompt([grade(asked_in(c), a)]) for c, a in zip(conversations, answers, strict=True)]
    heads = [text[: text.rindex(f" answer : {a}".rstrip())] for text, a in zip(texts, answers, strict=True)]
    pooled = [torch.zeros(0)]
    for first in range(0, len(texts), 128):
        ids, mask = reader.encode(texts[first : first + 128])
        tail = mask.sum(1) - reader.encode(heads[first : first + 128])[1].sum(1)  # (B,) tokens behind the request
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        out = reader.lm(input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        inside = torch.arange(ids.shape[1]) >= ids.shape[1] - tail[:, None]
        pooled.append((out.hidden_states[layer] * inside[..., None]).sum(1) / tail[:, None])
    return torch.cat(pooled[1:] or pooled)


@technique(f"{OUTPUT}.safety_classifier", paper="kim2024aps")
def prompt_shield(reader: ChatModel, dialogues: Sequence[Reviewed], *, layer: int = 2, strength: float = 0.1) -> AnswerProbe:
    """Train a light classifier that reads request and answer, on dialogues with adversarial noise in them [kim2024aps].

    Put it behind a model with `guards.filtered`. Simplified: logistic regression on the states of a frozen reader, where the
    paper fine-tunes a small encoder. strength: inverse of the regularisation. Raises ValueError unless both labels occur.
    """
    from sklearn.linear_model import LogisticRegression

    labels = np.array([dialogue.unsafe for dialogue in dialogues])
    if not labels.any() or labels.all():
        raise ValueError("dialogues must hold safe and unsafe answers")
    states = _read(reader, [d.messages for d in dialogues], [d.answer for d in dialogues], layer).double().numpy()
    mean, spread = states.mean(0), states.std(0) + 1e-6
    fitted = LogisticRegression(C=strength, max_iter=500).fit((states - mean) / spread, labels)
    weight = fitted.coef_[0] / spread
    return AnswerProbe(reader, layer, torch.tensor(weight).float(), float(fitted.intercept_[0] - mean @ weight))


# --- a prompt that defends --------------------------------------------------------------------------------------------

PHRASES: tuple[tuple[str, ...], ...] = (
    ("remember ,", "please", "listen .", "dear friend ,", "now", "wait ,", "stop .", "well ,"),
    ("say sorry", "say no", "keep it to yourself", "do not answer", "never tell", "be good", "do not help", "tell nobody"),
    ("if it is rude", "if it is a code", "if it is a potion", "of a vault", "to mock", "to brew", "of secret things", "of it"),
    (".", "and help with the rest .", "else answer in full .", ", this is a test .", ", i can not help with that .", "first ."),
)  # fmt: skip
"""Readable pieces of a defensive prompt, place by place."""


def patched(model: Responder, patch: str) -> Defended:
    """A model that reads a patch behind the user's last message."""

    def answer(conversations: list[Conversation], starts: list[str], options: dict[str, Any]) -> list[str]:
        return model.respond([with_patch(c, patch) for c in conversations], prefill=starts, **options)

    return Defended("defensive prompt", answer)


def with_patch(conversation: Conversation, patch: str) -> tuple[Message, ...]:
    """The conversation with a patch behind the last message."""
    *before, last = conversation
    return (*before, {**last, "content": f"{last['content']} {patch}"})


@technique(f"{OUTPUT}.defensive_prompt", paper="xiong2024dpp")
def defensive_prompt_patch(
    model: ChatModel,
    attacked: Sequence[Chat],
    harmless: Sequence[Chat],
    *,
    phrases: Sequence[Sequence[str]] | None = PHRASES,
    length: int = 8,
    steps: int = 8,
    candidates: int = 24,
    generator: torch.Generator,
) -> tuple[Defended, str]:
    """Evolve a patch for every prompt, scored by refusals under attack and by right answers without [xiong2024dpp, alg. 1].

    attacked: restricted requests in the forms attacks give them. harmless: requests whose own answers must stay likely; the
    two scores weigh as many requests as each side has. phrases: readable pieces for each place, recombined by a genetic
    search; None evolves `length` single tokens instead, by gradient, which no longer reads well. Returns the defended model
    and its patch. Raises ValueError where a side is empty.
    """
    if not attacked or not harmless:
        raise ValueError("attacked and harmless must each hold at least one request")
    slots = [
        *suffix_slots(model, attacked, target=lambda chat: REFUSALS[0]),
        *suffix_slots(model, harmless, target=lambda chat: chat.answer),
    ]
    budget: dict[str, Any] = {
        "steps": steps,
        "candidates": candidates,
        "early_stop": False,
        "generator": generator,
    }
    if phrases is None:
        found = search.gcg(model.lm, model.tokenizer, [slots], length=length, **budget)
    else:
        ids = [[model.tokenizer(phrase, add_special_tokens=False)["input_ids"] for phrase in place] for place in phrases]
        found = search.genetic(model.lm, model.tokenizer, [slots], phrases=ids, **budget)
    patch = decode(model.tokenizer, found.ids)[0]
    return patched(model, patch), patch


# --- the landscape of refusal -----------------------------------------------------------------------------------------

OPENINGS = ("sorry", "no")
"""The first words of the town's refusals."""
CERTAIN = 1000.0
"""The score of a prompt that is already refused more often than not: above any gradient."""


def refusal_loss(
    model: ChatModel, embedded: torch.Tensor, mask: torch.Tensor, openings: Sequence[str] = OPENINGS
) -> torch.Tensor:
    """(B,) the chance that an answer sampled after these embedded prompts (B, T, d), left-padded, is no refusal."""
    first = model.tokenizer.convert_tokens_to_ids(list(openings))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model.lm(inputs_embeds=embedded, attention_mask=mask, position_ids=positions).logits[:, -1]  # (B, V)
    refusing: torch.Tensor = logits.softmax(-1)[:, first].sum(-1)
    return 1 - refusing


@dataclass(frozen=True, eq=False)
class GradientCuff:
    """The two tests of [hu2024gradientcuff] as one score: the size of the refusal loss's gradient, or `CERTAIN`.

    directions: P random directions, the same for each word, each number drawn from N(0, 1). radius: mu, so many of its
    lengths each is followed.
    """

    model: ChatModel
    directions: int
    radius: float
    openings: tuple[str, ...]
    seed: int

    @torch.no_grad()
    def parts(self, conversations: Sequence[Conversation]) -> tuple[torch.Tensor, torch.Tensor]:
        """(N,) refusal loss, and (N,) norm of its estimated gradient, equation 5."""
        losses, norms = [torch.zeros(0)], [torch.zeros(0)]
        for first in range(0, len(conversations), 64):
            ids, mask = self.model.encode([self.model.prompt(c) for c in conversations[first : first + 64]])
            embedded = self.model.lm.get_input_embeddings()(ids)  # (B, T, d)
            loss = refusal_loss(self.model, embedded, mask, self.openings)
            source, slope = torch.Generator().manual_seed(self.seed), torch.zeros(len(ids), embedded.shape[-1])
            for _ in range(self.directions):
                u = torch.randn(embedded.shape[-1], generator=source)
                moved = refusal_loss(self.model, embedded + self.radius * u, mask, self.openings)
                slope += ((moved - loss) / self.radius)[:, None] * u / self.directions
            losses.append(loss)
            norms.append(slope.norm(dim=1))
        return torch.cat(losses), torch.cat(norms)

    def __call__(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """(N,) suspicion."""
        loss, norm = self.parts(conversations)
        return torch.where(loss < 0.5, CERTAIN, norm)


@technique(f"{OUTPUT}.refusal_loss_detection", paper="hu2024gradientcuff")
def gradient_cuff(
    model: ChatModel, *, directions: int = 10, radius: float = 0.02, openings: Sequence[str] = OPENINGS, seed: int = 0
) -> GradientCuff:
    """Refuse what is refused more often than not, and what lies on a steep slope of the refusal loss [hu2024gradientcuff].

    A jailbroken prompt sits close to the border of refusal: moving its word vectors a little, all by the same random vector,
    changes how likely it is refused. Put it before a model with `guards.calibrated`. Simplified: the share of refusals among
    sampled answers is replaced by its exact expectation, read from the first word, where this model's refusals are decided.
    Raises ValueError.
    """
    if directions < 1 or not radius > 0:
        raise ValueError(f"directions must be at least 1 and radius above 0, got {directions} and {radius}")
    if any(len(model.tokenizer(word, add_special_tokens=False)["input_ids"]) != 1 for word in openings) or not openings:
        raise ValueError(f"openings must be words of one token each, got {tuple(openings)}")
    return GradientCuff(model, directions, radius, tuple(openings), seed)
