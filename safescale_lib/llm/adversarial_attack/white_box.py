"""White-box attacks of section 3.1: characters, words, gradients, entities.

The first two and the last need no gradient; the survey files them here because they read the probabilities of all labels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from safescale_lib.llm.adversarial_attack.editing import (
    KEY,
    TextAttack,
    by_importance,
    changed_words,
    check,
    classes,
    greedy,
    lead_of,
    misnamed,
    opened,
    owned,
    reworded,
    shuffled,
    spots,
    word_at,
)
from safescale_lib.measure.answers import told
from safescale_lib.measure.costs import Meter
from safescale_lib.search.models import frozen
from safescale_lib.search.tokens import vocabulary
from safescale_lib.search.tokens.prompts import decode
from safescale_lib.survey import technique
from safescale_lib.world.town import words
from safescale_lib.world.town.chats import Chat
from safescale_lib.zoo.chat import ChatModel

# --- white-box: characters --------------------------------------------------------------------------------------------

Imperceptible = Literal["invisible", "look-alike", "reordered", "deleted"]
ZERO_WIDTH, BACKSPACE, OVERRIDE, POP = "\u200b", "\u0008", "\u202e", "\u202c"
LOOK_ALIKE = dict(zip("aceiopsxyj", "\u0430\u0441\u0435\u0456\u043e\u0440\u0455\u0445\u0443\u0458", strict=True))
"""Latin letter -> the Cyrillic one that looks the same."""


def rendered(text: str) -> str:
    """What a reader sees: control characters carried out, look-alike letters read as what they look like."""
    text = re.sub(f"{OVERRIDE}(.*?){POP}", lambda found: found[1][::-1], text).replace(ZERO_WIDTH, "")
    while BACKSPACE in text:
        text, before = re.sub(f"[^{BACKSPACE}]{BACKSPACE}", "", text, count=1), text
        if text == before:
            break
    return text.translate({ord(fake): letter for letter, fake in LOOK_ALIKE.items()})


def _imperceptible(word: str, place: int, kind: Imperceptible) -> str | None:
    """A word with one imperceptible edit at a place, or None where that is not possible."""
    if kind == "invisible":
        return word[:place] + ZERO_WIDTH + word[place:]
    if kind == "look-alike":
        fake = LOOK_ALIKE.get(word[place])
        return None if fake is None else word[:place] + fake + word[place + 1 :]
    if kind == "reordered":
        pair = word[place : place + 2]
        return None if len(pair) < 2 else f"{word[:place]}{OVERRIDE}{pair[::-1]}{POP}{word[place + 2 :]}"
    return f"{word[:place]}q{BACKSPACE}{word[place:]}"


@technique(f"{KEY}.white_box.character_level", paper="boucher2022badcharacters")
def bad_characters(
    model: ChatModel,
    chats: Sequence[Chat],
    labels: Sequence[str],
    *,
    kinds: Sequence[Imperceptible] = get_args(Imperceptible),
    budget: int = 3,
    candidates: int = 32,
    guided: bool = True,
    seed: int = 0,
) -> TextAttack:
    """Edits nobody can see: the page looks the same, the tokens differ [boucher2022badcharacters].

    kinds: "invisible", a zero-width space; "look-alike", a letter of another alphabet; "reordered", two letters swapped and
    swapped back by a direction override; "deleted", a letter with the backspace that takes it away. Each edit counts one,
    at most one a word, in the attacker's words of the last message (`owned`). Simplified: the paper places them by
    differential evolution, this one greedily by the labels' probabilities. guided=False: at random, the control.
    Raises ValueError for unknown kinds, and for labels, budget or candidates that make no sense.
    """
    unknown = set(kinds) - set(get_args(Imperceptible))
    if unknown or not kinds:
        raise ValueError(f"kinds must be among {get_args(Imperceptible)}, at least one; got {list(kinds)}")

    def neighbours(_: int, chat: Chat, __: int, dice: Random) -> list[Chat]:
        edited = []
        for spot in spots(chat, lambda word: len(word) > 1 and word.isascii() and word.isalpha()):
            word = word_at(chat, spot)
            new = _imperceptible(word, dice.randrange(len(word) - 1), dice.choice(list(kinds)))
            edited += [reworded(chat, spot, new)] if new else []
        return edited

    return greedy(model, chats, labels, neighbours, budget=budget, candidates=candidates, guided=guided, seed=seed)


# --- white-box: words -------------------------------------------------------------------------------------------------


@technique(f"{KEY}.white_box.word_level", paper="jin2020textfooler")
def text_fooler(
    model: ChatModel,
    chats: Sequence[Chat],
    labels: Sequence[str],
    synonyms: Sequence[Sequence[str]],
    *,
    budget: int = 3,
    candidates: int = 64,
    guided: bool = True,
    seed: int = 0,
) -> TextAttack:
    """Words in the order of their importance, each replaced by the near-synonym that hurts most [jin2020textfooler, alg. 1].

    synonyms: groups of words that mean the same here. In the paper they come from word vectors and are filtered by part of
    speech and by a sentence encoder; in the town the lists are known. Only words of a group are changed, each once, in the
    last message. guided=False: random words, random synonyms. Raises ValueError for groups of fewer than two words.
    """
    if not synonyms or any(len(set(group)) < 2 for group in synonyms):
        raise ValueError("synonyms must hold at least one group, and every group at least two words")
    check(chats, labels, budget=budget, candidates=candidates)
    others = {word: [w for g in synonyms if word in g for w in g if w != word] for group in synonyms for word in group}
    meter, places = Meter(), [spots(chat, others.__contains__) for chat in chats]
    orders = by_importance(model, chats, labels, places, meter) if guided else shuffled(places, seed)

    def neighbours(item: int, chat: Chat, step: int, _: Random) -> list[Chat]:
        nth = orders[item][step : step + 1]
        return [reworded(chat, spot, word) for spot in nth for word in others[word_at(chats[item], spot)]]

    return greedy(model, chats, labels, neighbours, budget=budget, candidates=candidates, guided=guided, seed=seed, meter=meter)


# --- white-box: gradients ---------------------------------------------------------------------------------------------


@technique(f"{KEY}.white_box.gradient_based", paper="guo2021gbda")
def gbda(
    model: ChatModel,
    chats: Sequence[Chat],
    labels: Sequence[str],
    *,
    keep: Sequence[str],
    steps: int = 40,
    lr: float = 0.3,
    fluency: float = 0.1,
    similarity: float = 30.0,
    confidence: float = 3.0,
    start: float = 12.0,
    samples: int = 8,
    generator: torch.Generator,
) -> TextAttack:
    """A distribution over texts, moved by gradient: Gumbel-softmax at every place of the text [guo2021gbda, eq. 3 to 7].

    loss = relu(margin + confidence) + fluency * cross-entropy of the text under the model itself + similarity * (1 - cosine
    of its last hidden states and the original's). keep: words that must stay and must not come in, as they carry the
    meaning: here opinions and negations. start: logit of the original words at the beginning. samples: texts drawn from the
    distribution at the end and asked; of those that fool the model, the one with the fewest changed words is returned.
    steps = 0 changes nothing. Raises ValueError or TypeError naming the bad argument.
    """
    check(chats, labels, steps=steps + 1, samples=samples)
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    meter, table = Meter(), model.lm.get_input_embeddings().weight.detach()  # (V, d)
    answers = model.respond([chat.messages for chat in chats])
    skipped = ~told(answers, [chat.value for chat in chats])
    ids, mask, mine = _own_tokens(model, chats)  # (B, T) each
    fixed = torch.tensor(model.tokenizer.convert_tokens_to_ids(list(keep)))
    allowed = vocabulary(model.tokenizer, len(table))
    allowed = allowed[~torch.isin(allowed, fixed)]  # (A,)
    rows, places = (mine & torch.isin(ids, allowed)).nonzero(as_tuple=True)  # (F,)
    starts, own = classes(model, chats, labels)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    theta = (start * (allowed == ids[rows, places][:, None]).float()).requires_grad_(True)  # (F, A)
    optimizer = torch.optim.Adam([theta], lr=lr)

    def noisy() -> torch.Tensor:
        return theta - torch.log(-torch.log(torch.rand(theta.shape, generator=generator).clamp(1e-9, 1 - 1e-7)))

    def read(embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = model.lm(inputs_embeds=embedded, attention_mask=mask, position_ids=positions, output_hidden_states=True)
        meter.forwards += len(ids)
        return out.logits, out.hidden_states[-1]  # (B, T, V), (B, T, d)

    with frozen(model.lm), torch.enable_grad():
        reference = read(table[ids])[1].detach()
        for _ in range(steps if len(rows) else 0):
            soft = torch.softmax(noisy(), -1)  # (F, A), eq. 4
            logits, states = read(table[ids].index_put((rows, places), soft @ table[allowed]))
            fooled = F.relu(lead_of(logits[:, -1], starts, own) + confidence).sum()  # eq. 2
            spoken = -(logits[rows, places - 1].log_softmax(-1)[:, allowed] * soft).sum(-1)  # (F,), eq. 6
            apart = 1 - F.cosine_similarity(states, reference, dim=-1)[rows, places]  # (F,), eq. 7; there by BERTScore
            loss = fooled + (fluency * spoken + similarity * apart).sum() * len(ids) / len(rows)
            (theta.grad,) = torch.autograd.grad(loss, theta)
            optimizer.step()
            meter.backwards += len(ids)
    draws = samples if steps and len(rows) else 0
    drawn = [ids.index_put((rows, places), allowed[noisy().detach().argmax(-1)]) for _ in range(draws)]
    tried = [[_retyped(model, chat, tokens[i][mine[i]]) for i, chat in enumerate(chats)] for tokens in drawn]
    return _fewest_changes(model, chats, labels, tried, answers, skipped, meter)


def _fewest_changes(
    model: ChatModel,
    chats: Sequence[Chat],
    labels: Sequence[str],
    tried: Sequence[Sequence[Chat]],
    answers: Sequence[str],
    skipped: torch.Tensor,
    meter: Meter,
) -> TextAttack:
    """Ask all that was tried, and of each item's successes keep the one with the fewest changed words."""
    best = [(0, chat, answer) for chat, answer in zip(chats, answers, strict=True)]
    for some in tried:
        replies = model.respond([chat.messages for chat in some])
        meter.queries += len(some)
        for i, hit in enumerate(misnamed(replies, some, labels).tolist()):
            spent = changed_words(chats[i], some[i])
            if hit and not skipped[i] and (not best[i][0] or spent < best[i][0]):
                best[i] = spent, some[i], replies[i]
    edits = torch.tensor([spent for spent, _, _ in best])
    return TextAttack(tuple(c for _, c, _ in best), tuple(a for *_, a in best), edits > 0, skipped, edits, meter.cost)


def random_words(
    model: ChatModel,
    chats: Sequence[Chat],
    labels: Sequence[str],
    *,
    keep: Sequence[str],
    budget: int = 4,
    seed: int = 0,
) -> TextAttack:
    """The control of `gbda`: one word after another becomes any other, none of them in `keep`; the model is asked each time."""
    tokens = vocabulary(model.tokenizer, len(model.lm.get_input_embeddings().weight)).tolist()
    pool = [word for word in decode(model.tokenizer, [[token] for token in tokens]) if word not in keep]

    def neighbours(item: int, chat: Chat, _: int, dice: Random) -> list[Chat]:
        left = spots(chat, lambda word: word not in keep)
        fresh = [spot for spot in left if word_at(chat, spot) == word_at(chats[item], spot)]
        return [reworded(chat, dice.choice(fresh), dice.choice(pool))] if fresh else []

    return greedy(model, chats, labels, neighbours, budget=budget, candidates=1, guided=False, seed=seed)


def _own_tokens(model: ChatModel, chats: Sequence[Chat]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and the places of the attacker's words (B, T) in the prompts up to the label, padded on the left."""
    texts = [model.prompt(chat.messages, opened(chat)) for chat in chats]
    ids, mask = model.encode(texts)
    mine = torch.zeros_like(mask, dtype=torch.bool)
    for i, (chat, text) in enumerate(zip(chats, texts, strict=True)):
        words_of_mine = " ".join(owned(chat.messages[-1]["content"])[1])
        first = text.rindex(words_of_mine)
        spans = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        inside = [first <= a and b <= first + len(words_of_mine) for a, b in spans]
        mine[i, -len(inside) :] = torch.tensor(inside)
    return ids, mask, mine


def _retyped(model: ChatModel, chat: Chat, tokens: torch.Tensor) -> Chat:
    """The conversation with these tokens, written out, as the attacker's words of the last message."""
    head, _ = owned(chat.messages[-1]["content"])
    text = decode(model.tokenizer, [tokens.tolist()])[0]
    last = {**chat.messages[-1], "content": " ".join([*head, text])}
    return replace(chat, messages=(*chat.messages[:-1], last))


# --- white-box: entities ----------------------------------------------------------------------------------------------

CONTEXT = (
    ("has", "keeps", "owns", "holds"),
    ("found", "took", "got"),
    ("is", "was", "remains"),
    ("a", "one", "some"),
    ("wanted", "wished", "desired"),
    ("for", "of"),
)
"""Words of a document that may stand for one another without changing who has what."""


@technique(f"{KEY}.white_box.entity_level", paper="dirkson2021breakingbert")
def entity_swap(
    model: ChatModel,
    chats: Sequence[Chat],
    labels: Sequence[str],
    *,
    names: Sequence[str] = (),
    context: Sequence[Sequence[str]] = (),
    people: Sequence[str] = words.PEOPLE,
    budget: int = 1,
    candidates: int = 32,
    guided: bool = True,
    seed: int = 0,
) -> TextAttack:
    """Replace the entity, or the words around it: which of the two breaks the answer? [dirkson2021breakingbert]

    The model answers from a document about several people. names: the person asked about gets one of these names, wherever
    the conversation has the old one, so that the true answer stays what it was. context: groups of words that mean the
    same; words in the sentences that name the person are exchanged within their group, `budget` of them. Give one of the
    two. people: whom a document may be about. guided=False: a random name or random words, the control.
    Raises ValueError unless exactly one of names and context is given.
    """
    if bool(names) == bool(context):
        raise ValueError("names or context must be given, and not both")

    def asked_about(chat: Chat) -> str:
        return next((word for word in chat.answer.split() if word in people), "")

    def renamed(chat: Chat, old: str, new: str) -> Chat:
        def swap(text: str) -> str:
            return " ".join(new if word == old else word for word in text.split(" "))

        messages = tuple({**message, "content": swap(message["content"])} for message in chat.messages)
        return replace(chat, messages=messages, answer=swap(chat.answer))

    def others(_: int, chat: Chat, step: int, __: Random) -> list[Chat]:
        there = {word for message in chat.messages for word in message["content"].split()}
        old = asked_about(chats[_])
        return [renamed(chat, old, new) for new in names if new not in there] if old and step == 0 else []

    def around(_: int, chat: Chat, __: int, ___: Random) -> list[Chat]:
        content, person = chat.messages[0]["content"].split(" "), asked_about(chat)
        stops = [-1, *(i for i, word in enumerate(content) if word in (".", "?", ":")), len(content)]
        near = {i for a, b in pairwise(stops) if person in content[a + 1 : b] for i in range(a + 1, b)}
        made = []
        for i in sorted(near):
            for new in {w for group in context if content[i] in group for w in group if w != content[i]}:
                text = " ".join([*content[:i], new, *content[i + 1 :]])
                made.append(replace(chat, messages=({**chat.messages[0], "content": text}, *chat.messages[1:])))
        return sorted(made, key=lambda made_: made_.messages[0]["content"])

    return greedy(
        model, chats, labels, others if names else around, budget=budget, candidates=candidates, guided=guided, seed=seed
    )
