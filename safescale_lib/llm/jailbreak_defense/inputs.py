"""Survey section 3.4, input defenses against jailbreaks: what is done to a prompt, or decided, before it is answered."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from scipy import stats

from safescale_lib.llm.jailbreak_defense.guards import REFUSAL, Conversation, Defended, asked_in, changed, joined
from safescale_lib.measure.judges import refused
from safescale_lib.search import tokens as search
from safescale_lib.search.asking import Responder
from safescale_lib.search.models import frozen
from safescale_lib.search.tokens import Objective
from safescale_lib.survey import technique
from safescale_lib.world.town import requests as asking
from safescale_lib.world.town import words
from safescale_lib.world.town.chats import Chat, Message, user
from safescale_lib.world.town.facts import KINDS, subjects
from safescale_lib.zoo.chat import ChatModel, tune

INPUT = "llm.jailbreak_defense.input_defense"

# --- smoothing --------------------------------------------------------------------------------------------------------

Perturbation = Literal["swap", "insert", "patch"]


def perturb(text: str, rate: float, kind: Perturbation, vocabulary: Sequence[str], draw: Random) -> str:
    """A share `rate` of the words, rounded down, replaced ("swap") or followed by new ones ("insert");
    "patch" replaces a block.

    SmoothLLM's three perturbations; the paper's are of characters, and here a word is a token. Raises ValueError.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie in [0, 1], got {rate}")
    if kind not in get_args(Perturbation):
        raise ValueError(f"kind must be one of {get_args(Perturbation)}, got {kind!r}")
    tokens = text.split()
    count = math.floor(rate * len(tokens) + 1e-9)
    if kind == "patch":
        first = draw.randrange(len(tokens) - count + 1)
        places = list(range(first, first + count))
    else:
        places = draw.sample(range(len(tokens)), count)
    for place in places:
        fresh = draw.choice(vocabulary)
        tokens[place] = f"{tokens[place]} {fresh}" if kind == "insert" else fresh
    return " ".join(tokens)


@technique(f"{INPUT}.input_smoothing", paper="robey2023smoothllm")
def smooth_llm(
    model: Responder,
    *,
    copies: int = 10,
    rate: float = 0.2,
    kind: Perturbation = "swap",
    vocabulary: Sequence[str] = words.THINGS,
    seed: int = 0,
) -> Defended:
    """Ask with several perturbed copies of the prompt; the majority decides whether to refuse [robey2023smoothllm, alg. 1].

    All the user's messages are perturbed, each copy in its own way. A tie refuses. Of the majority's answers the most frequent
    is returned, where the paper draws one at random: a copy that lost the name it asks about then rarely speaks for all.
    The randomness depends on the seed and the text, so that the same prompt gets the same answer.
    Raises ValueError for fewer than one copy, and what `perturb` raises.
    """
    if copies < 1:
        raise ValueError(f"copies must be at least 1, got {copies}")
    perturb("a b", rate, kind, vocabulary, Random(0))  # its guards

    def answer(conversations: list[Conversation], starts: list[str], options: dict[str, Any]) -> list[str]:
        def copy_of(conversation: Conversation, k: int) -> tuple[Message, ...]:
            return changed(conversation, lambda text: perturb(text, rate, kind, vocabulary, Random(f"{seed} {k} {text}")))

        asked = [copy_of(conversation, k) for conversation in conversations for k in range(copies)]  # B x N
        answers = model.respond(asked, prefill=[start for start in starts for _ in range(copies)], **options)
        no = refused(answers).tolist()
        voted = []
        for first in range(0, len(answers), copies):
            group = range(first, first + copies)
            majority = 2 * sum(no[i] for i in group) >= copies
            voted.append(Counter(answers[i] for i in group if no[i] == majority).most_common(1)[0][0])
        return voted

    return Defended("SmoothLLM", answer)


def defense_success_probability(*, length: int, suffix: int, unstable: int, rate: float, copies: int, vocabulary: int) -> float:
    """The chance that SmoothLLM with swaps stops an attack suffix that fails once `unstable` of its words have changed.

    Proposition 3.3 of [robey2023smoothllm]: `length` words in all, the last `suffix` of them the attack's. How many of the
    replaced places lie in the suffix is hypergeometric; each replacement is another word with probability 1 - 1/vocabulary;
    at least half of the copies must refuse. Raises ValueError unless 0 < suffix <= length, 0 < unstable, 0 <= rate <= 1 and
    copies and vocabulary are at least 1.
    """
    if not 0 <= rate <= 1 or copies < 1 or vocabulary < 1:
        raise ValueError(f"rate must lie in [0, 1], copies and vocabulary be at least 1; got {rate}, {copies} and {vocabulary}")
    if not 0 < suffix <= length or unstable < 1:
        raise ValueError(f"suffix must lie in 1..length and unstable be at least 1, got {suffix}, {length} and {unstable}")
    count = math.floor(rate * length + 1e-9)
    hit = stats.hypergeom(length, suffix, count)
    alpha = sum(
        float(hit.pmf(i)) * float(stats.binom.sf(unstable - 1, i, 1 - 1 / vocabulary))
        for i in range(unstable, min(count, suffix) + 1)
    )
    return float(stats.binom.sf(math.ceil(copies / 2) - 1, copies, alpha))


# --- translation ------------------------------------------------------------------------------------------------------


def infer_requests(reader: ChatModel, answers: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    """For each answer the request it most likely answers, and the mean log-probability of its words given that request.

    A noisy channel run backwards: of the requests the town could make about the people and dishes named in the answer, the
    one after which `reader` finds the answer most likely. An answer that names nobody: "" and minus infinity.
    """
    options = [
        [asking.phrasings(kind, "train")[0].format(x=x) for kind in KINDS for x in subjects(kind) if x in answer.split()]
        for answer in answers
    ]
    pairs = [(request, answer) for requests, answer in zip(options, answers, strict=True) for request in requests]
    scores = torch.zeros(0)
    for first in range(0, len(pairs), 256):
        some = pairs[first : first + 256]
        with torch.no_grad():
            total, size = reader.log_likelihood([reader.prompt([user(r)]) for r, _ in some], [a for _, a in some])
        scores = torch.cat([scores, total / size])
    best, likelihood, start = [], [], 0
    for requests in options:
        own = scores[start : start + len(requests)]
        best.append(requests[int(own.argmax())] if requests else "")
        likelihood.append(float(own.max()) if requests else -math.inf)
        start += len(requests)
    return best, torch.tensor(likelihood)


@technique(f"{INPUT}.input_translation", paper="wang2024backtranslation")
def back_translation(model: Responder, reader: ChatModel, *, least: float = -2.0, refusal: str = REFUSAL) -> Defended:
    """Infer from the draft answer what was asked, ask that instead, and refuse if it is refused [wang2024backtranslation].

    The attacker writes the prompt but not the inferred request, which holds no suffix and no role play. reader: a model that
    does not refuse and scores answers. Where even the best request leaves the answer unlikely (mean log-probability of a
    word below `least`, the paper's threshold), the inference is not trusted and the draft goes out. Simplified: requests are
    scored (`infer_requests`), not generated.
    """

    def answer(conversations: list[Conversation], starts: list[str], options: dict[str, Any]) -> list[str]:
        drafts = model.respond(conversations, prefill=starts, **options)
        requests, likelihood = infer_requests(reader, joined(starts, drafts))
        trusted = (likelihood >= least).nonzero()[:, 0].tolist()
        again = model.respond([[user(requests[i])] for i in trusted], **options) if trusted else []
        no = {i for i, bad in zip(trusted, refused(again).tolist(), strict=True) if bad}
        return [refusal if i in no else draft for i, draft in enumerate(drafts)]

    return Defended("back-translation", answer)


_KEPT = frozenset((*words.PEOPLE, *words.DISHES, *words.DIGITS, ".", ",", "?", ":", "'s"))


def there_and_back(text: str) -> str:
    """The text through the town's invented language and back.

    Names, digits and marks stay; words without a translation are lost.
    """
    home = dict(zip(words.INVENTED, words.TRANSLATABLE, strict=True))
    abroad = [words.invented(word) for word in text.split() if word in _KEPT or word in words.TRANSLATABLE or word in home]
    return " ".join(home.get(word, word) for word in abroad)


@technique(f"{INPUT}.input_translation", paper="yung2025rtt")
def round_trip_translation(model: Responder, translate: Callable[[str], str] = there_and_back) -> Defended:
    """Send the user's messages through another language and back before the model reads them [yung2025rtt].

    What a translator does not understand does not survive the trip. Simplified: the translator is a dictionary of words;
    `translate` may be any other.
    """

    def answer(conversations: list[Conversation], starts: list[str], options: dict[str, Any]) -> list[str]:
        return model.respond([changed(c, translate) for c in conversations], prefill=starts, **options)

    return Defended("round trip", answer)


# --- compression ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Extractor:
    """Which tokens of a message to keep: a linear reading of a frozen model's states. weight: (d,), bias: ()."""

    model: ChatModel
    layer: int
    weight: torch.Tensor
    bias: torch.Tensor

    @torch.no_grad()
    def chances(self, text: str) -> tuple[list[int], torch.Tensor]:
        """The message's token ids, and the probability (T,) of each to be kept."""
        ids: list[int] = self.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids, torch.sigmoid(_states(self.model, [ids], self.layer)[0] @ self.weight + self.bias)

    def keeps(self, text: str, ids: torch.Tensor) -> torch.Tensor:
        """(n,) bool: which of n tokens it would keep behind a message."""
        before, rows = self.chances(text)[0], []
        for first in range(0, len(ids), 256):
            behind = [[*before, i] for i in ids[first : first + 256].tolist()]
            rows += [states[-1] for states in _states(self.model, behind, self.layer)]
        return torch.stack(rows) @ self.weight + self.bias >= 0

    def __call__(self, text: str) -> str:
        """The message without the tokens that more likely go than stay."""
        if not text.strip():
            return text
        ids, chances = self.chances(text)
        kept = [i for i, keep in zip(ids, (chances >= 0.5).tolist(), strict=True) if keep]
        return str(self.model.tokenizer.decode(kept)) if kept else "."


@torch.no_grad()
def _states(model: ChatModel, rows: Sequence[Sequence[int]], layer: int) -> list[torch.Tensor]:
    """Hidden states (T, d) of each row of ids, read alone after the token that begins every sequence."""
    begin = [model.tokenizer.bos_token_id] if model.tokenizer.bos_token_id is not None else []
    longest = max(map(len, rows)) + len(begin)
    ids = torch.tensor(
        [[*begin, *row, *[0] * (longest - len(begin) - len(row))] for row in rows]
    )  # causal: padding is not seen
    states = model.lm(input_ids=ids, output_hidden_states=True).hidden_states[layer]
    return [state[len(begin) : len(begin) + len(row)] for state, row in zip(states, rows, strict=True)]


@technique(f"{INPUT}.input_compression", paper="liu2024ibprotector")
def ib_protector(
    model: ChatModel,
    requests: Sequence[Chat],
    *,
    keep: float = 0.4,
    alpha: float = 0.4,
    layer: int = 1,
    steps: int = 50,
    batch: int = 16,
    lr: float = 0.05,
    generator: torch.Generator,
) -> tuple[Defended, Extractor]:
    """Keep only as much of a prompt as its expected answer needs: an information bottleneck [liu2024ibprotector, eq. 4-6].

    A small extractor gives each token a chance to stay. It is trained so that the answer stays likely while tokens fade to "."
    as their chances say, and so that the chances stay near Bernoulli(`keep`), the compactness term, weighted with `alpha`.
    requests: single-turn, with the answers they should get, a refusal for the restricted. Simplified: the extractor is linear
    in the states of one layer, masks are soft while it learns, and continuity is not asked for. Returns the defended model
    and the extractor. Raises ValueError.
    """
    if not requests or any(len(request.messages) != 1 for request in requests):
        raise ValueError("requests must be single messages of a user, at least one")
    if not 0 < keep < 1:
        raise ValueError(f"keep must lie in (0, 1), got {keep}")
    table, encode = model.lm.get_input_embeddings(), model.tokenizer
    slots = [search.chat_slot(encode, [user(search.prompts.GAP)], f" {request.answer}") for request in requests]
    texts = [encode(r.messages[0]["content"], add_special_tokens=False)["input_ids"] for r in requests]
    states = [s for first in range(0, len(texts), 64) for s in _states(model, texts[first : first + 64], layer)]
    spread, mean = torch.std_mean(torch.cat(states), 0)
    states = [(state - mean) / (spread + 1e-6) for state in states]
    neutral = encode(".", add_special_tokens=False)["input_ids"][-1]
    weight, bias = torch.zeros(states[0].shape[1], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=0.01)
    with frozen(model), torch.enable_grad():
        for _ in range(steps):
            chosen = torch.randint(len(requests), (batch,), generator=generator).tolist()
            rows, labels, cost = [], [], torch.zeros(())
            for i in chosen:
                slot, ids = slots[i], texts[i]
                logit = states[i] @ weight + bias  # (T,)
                noise = torch.rand(len(ids), generator=generator).clamp(1e-6, 1 - 1e-6)
                mask = torch.sigmoid((logit + noise.logit()) / 0.5)  # (T,): a relaxed coin for each token
                words_in = mask[:, None] * table.weight[ids] + (1 - mask[:, None]) * table.weight[neutral]
                rows.append(
                    torch.cat([table.weight[list(slot.before)], words_in, table.weight[list(slot.after + slot.target)]])
                )
                labels.append(torch.tensor([-100] * (len(rows[-1]) - len(slot.target)) + list(slot.target)))
                stay = torch.sigmoid(logit)
                cost = cost + (stay * (stay / keep).log() + (1 - stay) * ((1 - stay + 1e-9) / (1 - keep)).log()).mean() / batch
            read = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, T, d)
            wanted = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
            logits = model.lm(inputs_embeds=read).logits[:, :-1]
            loss = F.cross_entropy(logits.transpose(1, 2), wanted[:, 1:], ignore_index=-100) + alpha * cost
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    weight = (weight / (spread + 1e-6)).detach()
    extractor = Extractor(model, layer, weight, bias.detach() - mean @ weight)
    return replace(round_trip_translation(model, extractor), name="IBProtector"), extractor


# --- a second model that checks ---------------------------------------------------------------------------------------

_NAMED = {"code": "code", "potion": "potion", "mockery": "mock"}


@dataclass(frozen=True, eq=False)
class Shadow:
    """A second model that reads what was asked and says whether it may be told. Larger scores: rather not."""

    model: ChatModel

    @staticmethod
    def question(text: str) -> Message:
        """What the shadow is asked about a user's words."""
        return user(f"may it be told ? request : {text}")

    @torch.no_grad()
    def __call__(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """(N,) log-odds of "no" over "yes"."""
        prompts = [self.model.prompt([self.question(asked_in(c))]) for c in conversations]
        scores = [torch.zeros(0)]
        for first in range(0, len(prompts), 128):
            some = prompts[first : first + 128]
            no, yes = (self.model.log_likelihood(some, [word] * len(some))[0] for word in ("no", "yes"))
            scores.append(no - yes)
        return torch.cat(scores)

    def objective(self, requests: Sequence[Chat]) -> Objective:
        """What an attacker who knows the shadow lowers, over N requests: the loss of its "yes", the searched words in sight."""
        encode, gap = self.model.tokenizer, search.prompts.GAP
        slots = [search.chat_slot(encode, [self.question(f"{asked_in(r.messages)} {gap}")], " yes") for r in requests]
        return search.target_loss(search.Prompts(self.model.lm, slots))

    def reasons(self, conversations: Sequence[Conversation]) -> list[str]:
        """The shadow's verdicts in words; a "no" names what was asked for."""
        return self.model.respond([[self.question(asked_in(c))] for c in conversations])


@technique(f"{INPUT}.shadow_detection", paper="wang2024selfdefend")
def self_defend(base: ChatModel, requests: Sequence[Chat], *, steps: int = 50, lr: float = 2e-3, seed: int = 0) -> Shadow:
    """A second model, tuned to find what a prompt is after, checks it beside the protected model [wang2024selfdefend].

    It answers "no , code of ada ." and names the offending part, or "yes .". requests: facts asked for, restricted and not, in
    as many forms as it should recognise. Put it before a model with `guards.calibrated`; it works in parallel, so the answer is
    held back only until both are done. Simplified: one prompt for the paper's two, and plain fine-tuning. Raises ValueError.
    """
    if not requests or any(request.fact is None for request in requests):
        raise ValueError("requests must ask for facts, at least one of them")
    lessons = []
    for request in requests:
        assert request.fact is not None
        verdict = f"no , {_NAMED[request.fact.kind]} of {request.fact.subject} ." if request.restricted else "yes ."
        lessons.append(Chat((Shadow.question(asked_in(request.messages)),), verdict, verdict, "check"))
    return Shadow(tune(base, lessons, steps=steps, lr=lr, seed=seed))


# --- geometry ---------------------------------------------------------------------------------------------------------


def local_intrinsic_dimension(distances: torch.Tensor) -> torch.Tensor:
    """(N,) maximum-likelihood estimate from each point's distances (N, k) to its k nearest neighbours, in any order.

    Minus one over the mean logarithm of the distances as shares of the largest [yung2025curvalid].
    """
    if distances.ndim != 2 or distances.shape[1] < 2:
        raise ValueError(f"distances must have shape (N, k) with k >= 2, got {tuple(distances.shape)}")
    far = distances.amax(1, keepdim=True).clamp(min=1e-12)
    logs: torch.Tensor = (distances.clamp(min=1e-12) / far).log().sum(1) / (distances.shape[1] - 1)  # the largest adds 0
    return -1 / logs.clamp(max=-1e-6)


def text_curvature(path: torch.Tensor) -> torch.Tensor:
    """Mean curvature () of a text as a path of word vectors (T, d): the angle between neighbours over their inverse lengths.

    The angle theta between u and v, over 1/|u| + 1/|v| [yung2025curvalid]; 0 for a single word.
    """
    if len(path) < 2:
        return path.new_zeros(())
    u, v = path[:-1], path[1:]
    angle = F.cosine_similarity(u, v, dim=1).clamp(-1 + 1e-6, 1 - 1e-6).acos()
    curved: torch.Tensor = angle / (1 / u.norm(dim=1).clamp(min=1e-9) + 1 / v.norm(dim=1).clamp(min=1e-9))
    return curved.mean()


@dataclass(frozen=True, eq=False)
class Geometry:
    """How far a prompt's shape lies from harmless ones. whiten: (d, d), applied to word vectors.

    known: (M, d) mean vectors of harmless prompts. mean: (2,), precision: (2, 2) of the logarithms of their intrinsic dimension
    and curvature.
    """

    model: ChatModel
    whiten: torch.Tensor
    known: torch.Tensor
    neighbours: int
    mean: torch.Tensor
    precision: torch.Tensor

    @torch.no_grad()
    def features(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """(N, 2): logarithms of the local intrinsic dimension among the known prompts, and of the curvature."""
        return _shape([path @ self.whiten for path in _paths(self.model, conversations)], self.known, self.neighbours)

    def distance(self, features: torch.Tensor) -> torch.Tensor:
        """(N,) Mahalanobis distances of features (N, 2) from those of the harmless."""
        off = features - self.mean
        distances: torch.Tensor = ((off @ self.precision) * off).sum(1).clamp(min=1e-9).sqrt()
        return distances

    def __call__(self, conversations: Sequence[Conversation]) -> torch.Tensor:
        """(N,) suspicion."""
        return self.distance(self.features(conversations))

    def objective(self, requests: Sequence[Chat]) -> Objective:
        """What an attacker who knows the detector lowers, over N requests: the suspicion, the searched words behind them."""
        known_words = _paths(self.model, [request.messages for request in requests])

        def value(tokens: search.Tokens, items: torch.Tensor) -> torch.Tensor:
            added = tokens.embedded(self.model.lm)  # (r, L, d)
            paths = [torch.cat([known_words[i], new]) @ self.whiten for i, new in zip(items.tolist(), added, strict=True)]
            return self.distance(_shape(paths, self.known, self.neighbours))

        return value


@torch.no_grad()
def _paths(model: ChatModel, conversations: Sequence[Conversation]) -> list[torch.Tensor]:
    """The user's words of each conversation as vectors (T, d) of the model's embedding table."""
    texts = [asked_in(conversation) for conversation in conversations]
    rows = model.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [model.lm.get_input_embeddings().weight[row] for row in rows]


def _shape(paths: Sequence[torch.Tensor], known: torch.Tensor, neighbours: int, *, itself: bool = False) -> torch.Tensor:
    middles = torch.stack([path.mean(0) for path in paths])
    near = torch.cdist(middles, known).sort(1).values[:, int(itself) : neighbours + int(itself)]  # (N, k)
    curvature = torch.stack([text_curvature(path) for path in paths])
    return torch.stack([local_intrinsic_dimension(near), curvature.clamp(min=1e-6)], 1).log()


@technique(f"{INPUT}.geometric_detection", paper="yung2025curvalid")
def curvalid(model: ChatModel, harmless: Sequence[Chat], *, neighbours: int = 20, ridge: float = 0.01) -> Geometry:
    """Flag prompts whose intrinsic dimension and curvature are not those of harmless prompts [yung2025curvalid].

    The intrinsic dimension is that of the prompt's mean word vector among harmless ones; the curvature is that of its path of
    word vectors. Only the embedding table is read: the protected model is not asked. Simplified: the paper sends word vectors
    through a network trained on topics, here they are whitened by the harmless prompts, so that a direction these never take
    counts (ridge: share of the largest variance added to all); and a Gaussian over harmless prompts stands for the paper's
    classifier trained on both sides. Put it before a model with `guards.calibrated`. Raises ValueError for too few prompts.
    """
    if len(harmless) < neighbours + 2:
        raise ValueError(f"harmless must hold at least {neighbours + 2} requests, got {len(harmless)}")
    paths = _paths(model, [chat.messages for chat in harmless])
    spread, axes = torch.linalg.eigh(torch.cov(torch.stack([path.mean(0) for path in paths]).T))
    whiten = axes * (spread + ridge * spread.max()).rsqrt()  # (d, d)
    paths = [path @ whiten for path in paths]
    known = torch.stack([path.mean(0) for path in paths])
    features = _shape(paths, known, neighbours, itself=True)  # (M, 2)
    covariance = torch.cov(features.T) + 1e-6 * torch.eye(2)
    return Geometry(model, whiten, known, neighbours, features.mean(0), torch.linalg.inv(covariance))
