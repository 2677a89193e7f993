"""Survey section 3.4, robust inference: the act of answering itself is made to resist, while the model stays as it is.

Three places to stand: the choice among several answers, the answer read back by the model, and the activations from
which each next word is read. A defense reads an answer as its user will: with the beginning that was put into its mouth.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from safescale_lib.measure.detection import threshold_at_fpr
from safescale_lib.measure.judges import refused
from safescale_lib.search.asking import Responder
from safescale_lib.search.models import hooked
from safescale_lib.survey import technique
from safescale_lib.world.town.chats import REFUSALS, Chat, Message, assistant, user
from safescale_lib.zoo.chat import ChatModel

KEY = "llm.jailbreak_defense.robust_inference"
REFUSAL = REFUSALS[0]
"""What a defense says in place of an answer it holds back."""


def started(conversations: Sequence[Sequence[Message]], prefill: str | Sequence[str]) -> list[str]:
    """The beginning of each answer. Raises ValueError unless prefill is one text or one each."""
    starts = [prefill] * len(conversations) if isinstance(prefill, str) else list(prefill)
    if len(starts) != len(conversations):
        raise ValueError(f"prefill must be one text or one each: {len(conversations)} conversations, {len(starts)} prefills")
    return starts


def whole(starts: Sequence[str], answers: Sequence[str]) -> list[str]:
    """Answers as a reader sees them, beginnings included."""
    return [" ".join(filter(None, pair)) for pair in zip(starts, answers, strict=True)]


# --- a reading of hidden states, which several defenses share ---------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Probe:
    """A line through a model's hidden states at the end of a text. score > threshold: suspicious.

    model, layer: whose states, 0 for the embeddings. weight: (d,). threshold: set on harmless texts.
    """

    model: ChatModel
    layer: int
    weight: torch.Tensor
    threshold: float = 0.0

    @torch.no_grad()
    def scores(self, texts: Sequence[str], batch: int = 128) -> torch.Tensor:
        """(B,) scores of texts as the model continues them, see `ChatModel.prompt`."""
        parts = [self.model.states(texts[i : i + batch])[:, self.layer] @ self.weight for i in range(0, len(texts), batch)]
        return torch.cat(parts)

    def flags(self, texts: Sequence[str]) -> torch.Tensor:
        """(B,) bool: is the score above the threshold?"""
        return self.scores(texts) > self.threshold


def fit_probe(
    model: ChatModel,
    restricted: Sequence[str],
    harmless: Sequence[str],
    held_out: Sequence[str],
    *,
    layer: int,
    fpr: float = 0.05,
    ridge: float = 0.1,
) -> Probe:
    """Fisher's discriminant between restricted and harmless texts, its threshold at `fpr` of held-out harmless ones.

    ridge: share of the mean variance added to the covariance. Raises ValueError for fewer than two texts of a group.
    """
    if min(len(restricted), len(harmless)) < 2 or not held_out:
        raise ValueError("restricted and harmless must hold two texts or more, held_out one or more")
    with torch.no_grad():
        groups = [model.states(texts)[:, layer].double() for texts in (restricted, harmless)]  # (n, d) each
    means = [group.mean(0) for group in groups]
    centred = torch.cat([group - mean for group, mean in zip(groups, means, strict=True)])
    covariance = centred.T @ centred / len(centred)  # (d, d)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    weight = torch.linalg.solve(covariance, means[0] - means[1]).float()
    probe = Probe(model, layer, weight)
    return Probe(model, layer, weight, threshold_at_fpr(probe.scores(held_out).numpy(), fpr))


# --- moving target ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One of the systems a query may meet: a responder and how it decodes. temperature 0: greedy."""

    responder: Responder
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"temperature must be >= 0 and top_p in (0, 1], got {self.temperature} and {self.top_p}")


def sampling(temperature: float, top_p: float, generator: torch.Generator) -> dict[str, Any]:
    """Options of `respond` that sample from a generator of one's own: the largest of logit plus Gumbel noise is a draw.

    `generate` itself would draw from the global stream. Temperature 0 gives no options: greedy.
    """
    if temperature == 0:
        return {}

    def noisy(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # (B, V) -> (B, V)
        scores = scores / temperature
        ordered, order = scores.softmax(-1).sort(-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # the most likely token always stays
        scores = scores.masked_fill(outside.scatter(-1, order, outside), -math.inf)
        uniform = torch.rand(scores.shape, generator=generator).clamp_min(1e-20)
        return scores - (-uniform.log()).log()

    return {"logits_processor": [noisy]}


@dataclass(frozen=True, eq=False)
class MovingTarget:
    """See `moving_target`."""

    members: tuple[Member, ...]
    flagged: Callable[[Sequence[str]], torch.Tensor]
    generator: torch.Generator

    def respond(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        prefill: str | Sequence[str] = "",
        new_tokens: int = 24,
        **options: Any,
    ) -> list[str]:
        starts = started(conversations, prefill)
        replies, good = [], []
        for member in self.members:
            how = {**options, **sampling(member.temperature, member.top_p, self.generator)}
            answers = member.responder.respond(conversations, prefill=starts, new_tokens=new_tokens, **how)
            replies.append(answers)
            good.append(~(refused(answers) | self.flagged(whole(starts, answers))))  # responsive and safe
        fit = torch.stack(good)  # (members, B)
        lots = torch.rand(fit.shape, generator=self.generator).masked_fill(~fit, -1.0)
        pick = lots.argmax(0).tolist()
        return [replies[k][i] if fit[k, i] else REFUSAL for i, k in enumerate(pick)]


@technique(f"{KEY}.moving_target", paper="chen2023mtd")
def moving_target(
    members: Sequence[Member], flagged: Callable[[Sequence[str]], torch.Tensor], *, generator: torch.Generator
) -> MovingTarget:
    """Several systems answer, and one of their replies that are responsive and safe goes out, drawn at random [chen2023mtd].

    members: models, or one model under several decoding settings. flagged: answers -> (B,) bool, the evaluator's verdict
    that one is unsafe; the paper asks a commercial moderation service. No reply is both: a refusal. The generator moves on
    with every call, so that asking again may meet another member. Raises ValueError for no members.
    """
    if not members:
        raise ValueError("members must hold at least one system")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    return MovingTarget(tuple(members), flagged, generator)


# --- output repetition ------------------------------------------------------------------------------------------------


def bleu(reference: str, candidate: str, order: int = 4) -> float:
    """BLEU of two sentences in [0, 1], over n-grams up to `order`, with counts from the second on smoothed by one.

    Shorter candidates pay the brevity penalty; an empty one, or one without a common word, gets 0.
    """
    wanted, given = reference.split(), candidate.split()
    if not wanted or not given:
        return 0.0
    logs = []
    for n in range(1, order + 1):
        a, b = (Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (wanted, given))
        common, total, smooth = sum((a & b).values()), sum(b.values()), int(n > 1)
        if common + smooth == 0:
            return 0.0
        logs.append(math.log((common + smooth) / (total + smooth)))
    return math.exp(sum(logs) / order + min(0.0, 1 - len(wanted) / len(given)))


@dataclass(frozen=True, eq=False)
class Repetition:
    """See `output_repetition`. shots: (text, what is said when asked to repeat it)."""

    model: Responder
    repeater: Responder
    shots: tuple[tuple[str, str], ...]
    threshold: float = 1.0

    def scores(self, answers: Sequence[str]) -> torch.Tensor:
        """(B,) 1 - BLEU of each answer and its repetition: larger is more suspicious."""
        before = tuple(turn for said, again in self.shots for turn in (user(f"repeat : {said}"), assistant(again)))
        longest = max((len(answer.split()) for answer in answers), default=0)
        repeated = self.repeater.respond([(*before, user(f"repeat : {answer}")) for answer in answers], new_tokens=longest + 8)
        return torch.tensor([1 - bleu(a, b) for a, b in zip(answers, repeated, strict=True)], dtype=torch.float64)

    def respond(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        prefill: str | Sequence[str] = "",
        new_tokens: int = 24,
        **options: Any,
    ) -> list[str]:
        starts = started(conversations, prefill)
        answers = self.model.respond(conversations, prefill=starts, new_tokens=new_tokens, **options)
        flags = (self.scores(whole(starts, answers)) > self.threshold).tolist()
        return [REFUSAL if flag and not no else a for a, flag, no in zip(answers, flags, refused(answers), strict=True)]


@technique(f"{KEY}.output_repetition", paper="zhang2024parden")
def output_repetition(
    model: Responder,
    harmless: Sequence[Chat],
    shots: Sequence[tuple[str, str]] = (),
    *,
    repeater: Responder | None = None,
    fpr: float = 0.05,
) -> Repetition:
    """Ask the model to repeat its own answer, and hold back what it does not repeat word for word [zhang2024parden].

    A model aligned to refuse harmful text refuses to repeat it; harmless text it copies. harmless: validation requests, whose
    answers set the threshold on 1 - BLEU at this false positive rate. shots: examples of repeating, a refusal among them,
    as in the paper's prompt. repeater: who repeats, by default the model. Raises ValueError for no harmless requests.
    """
    if not harmless:
        raise ValueError("harmless must hold validation requests, their answers set the threshold")
    loose = Repetition(model, repeater or model, tuple(shots))
    scores = loose.scores(model.respond([chat.messages for chat in harmless]))
    return Repetition(loose.model, loose.repeater, loose.shots, threshold_at_fpr(scores.numpy(), fpr))


# --- activation boundary ----------------------------------------------------------------------------------------------


def decoder_layers(lm: Any) -> Any:
    """The list of a causal language model's layers."""
    return lm.get_decoder().layers


@contextmanager
def altered(lm: Any, changes: Mapping[int, Callable[[torch.Tensor], torch.Tensor]]) -> Iterator[None]:
    """Inside the block the outputs (B, T, d) of some layers, counted from 0, are changed."""
    layers = decoder_layers(lm)

    def hook(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, Any, Any], Any]:
        return lambda _, __, out: (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    with hooked(*((layers[number].register_forward_hook, hook(change)) for number, change in changes.items())):
        yield


@dataclass(frozen=True, eq=False)
class Bounded:
    """See `activation_boundary`. middle, spread: (d,) for each bounded layer, counted from 0."""

    model: ChatModel
    middle: Mapping[int, torch.Tensor]
    spread: Mapping[int, torch.Tensor]
    reach: float

    def _change(self, layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        middle, spread = self.middle[layer], self.spread[layer]

        def change(states: torch.Tensor) -> torch.Tensor:
            z = (states - middle) / spread
            over = (z.abs() - self.reach).clamp_min(0)
            inside = z.clamp(-self.reach, self.reach) + z.sign() * 0.1 * torch.tanh(over)
            return torch.where(over > 0, middle + spread * inside, states)

        return change

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block the model thinks within the boundary: for answers, and for a search through the defense."""
        with altered(self.model.lm, {layer: self._change(layer) for layer in self.middle}):
            yield

    def respond(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        prefill: str | Sequence[str] = "",
        new_tokens: int = 24,
        **options: Any,
    ) -> list[str]:
        with self.held():
            return self.model.respond(conversations, prefill=prefill, new_tokens=new_tokens, **options)


@technique(f"{KEY}.activation_boundary", paper="gao2025abd")
def activation_boundary(
    model: ChatModel, plain: Sequence[Sequence[Message]], *, layers: Sequence[int], reach: float = 3.0
) -> Bounded:
    """Keep the activations of some layers inside the region that plain conversations span [gao2025abd].

    Jailbreak prompts push activations out of the region where safety training holds. Each coordinate gets a boundary at
    `reach` standard deviations, measured over all tokens of plain conversations, requests with the model's own answers,
    refusals among them; what lies beyond is pressed back by a saturating penalty. layers: counted from 0; the paper
    finds them by Bayesian optimisation, here the caller tries a few on validation. Raises ValueError for no conversations,
    an unknown layer or a reach not above 0.
    """
    count = len(decoder_layers(model.lm))
    if not plain or not layers or not all(0 <= layer < count for layer in layers):
        raise ValueError(f"plain must hold conversations, and layers numbers from 0 to {count - 1}, got {list(layers)}")
    if reach <= 0:
        raise ValueError(f"reach must be above 0, got {reach}")
    answers = model.respond(plain)
    ids, mask = model.encode([f"{model.prompt(chat)} {answer}" for chat, answer in zip(plain, answers, strict=True)])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    seen: dict[int, torch.Tensor] = {}  # (tokens, d) each
    with torch.no_grad(), altered(model.lm, {layer: _noting(seen, layer, mask.bool()) for layer in layers}):
        model.lm(input_ids=ids, attention_mask=mask, position_ids=positions)
    middle = {layer: states.mean(0) for layer, states in seen.items()}
    return Bounded(model, middle, {layer: states.std(0).clamp_min(1e-6) for layer, states in seen.items()}, reach)


def _noting(seen: dict[int, torch.Tensor], layer: int, mask: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def note(states: torch.Tensor) -> torch.Tensor:
        seen[layer] = states[mask]
        return states

    return note
