"""Jailbreak toolkits: attacks taken apart and put together again, and run side by side under one judge.

Every attack by words is a `Rewrite`, from a request and the number of the try to what is sent. So attacks compose, a search
can look for the best composition, and a bench of named attacks can be kept and sent again to any defense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

import torch

from safescale_lib.measure.answers import told
from safescale_lib.measure.costs import Cost, Meter
from safescale_lib.measure.criteria import Verdicts
from safescale_lib.search.asking import Attempt, Responder, Rewrite, send
from safescale_lib.survey import technique
from safescale_lib.world.town.chats import Chat

KEY = "llm.jailbreak_attack.black_box.toolkit"


@dataclass(frozen=True, eq=False)
class Entry(Verdicts):
    """What one attack sent for N restricted requests and, in the very same form, for N harmless twins.

    name: of the attack. technique: its leaf. attempts: N of what was sent, *always* in the attack's form: the try that
    worked, for a failed request the last try, for a skipped one the first. (A `PromptAttack` gives failed requests back
    unchanged; an entry must not, or a defense would be praised for blocking what was never attacked.) twins: each twin
    rewritten by the same try as its request, so that a defense's utility is measured in the attack's own format.
    success: (N,) bool, on the model it was made on. skipped: (N,) bool, requests answered without an attack.
    cost: what making it took.
    """

    name: str
    technique: str
    attempts: tuple[Attempt, ...]
    twins: tuple[Attempt, ...]
    success: torch.Tensor
    skipped: torch.Tensor
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class Plan:
    """A named attack: its leaf, how it rewrites a request, and how many tries it gets."""

    technique: str
    rewrite: Rewrite
    tries: int = 1


def entry(
    model: Responder,
    requests: Sequence[Chat],
    twins: Sequence[Chat],
    rewrite: Rewrite,
    *,
    name: str,
    technique: str,
    tries: int = 1,
    meter: Meter | None = None,
    **options: Any,
) -> Entry:
    """An attack's entry: up to `tries` tries a request, then each twin by the try its request ended on.

    requests, twins: N each. tries: 0 leaves everything as it is. meter: counts of a search that went before. options:
    passed on to `respond`. Raises ValueError for no requests, other numbers of twins, or negative tries.
    """
    _paired(requests, twins)
    if tries < 0:
        raise ValueError(f"tries must be >= 0, got {tries}")
    meter, values = meter or Meter(), [request.value for request in requests]
    sent = [Attempt(request.messages) for request in requests]
    skipped = told(send(model, sent, meter, **options), values)
    success, last = torch.zeros(len(requests), dtype=torch.bool), [0] * len(requests)
    for n in range(tries):
        live = [i for i in range(len(requests)) if n == 0 or not (success[i] or skipped[i])]
        if not live:
            break
        for i in live:
            sent[i], last[i] = rewrite(requests[i], n), n
        won = told(send(model, [sent[i] for i in live], meter, **options), [values[i] for i in live])
        success[live] = won & ~skipped[live]
    made = [rewrite(twin, n) if tries else Attempt(twin.messages) for twin, n in zip(twins, last, strict=True)]
    return Entry(name, technique, tuple(sent), tuple(made), success, skipped, meter.cost)


def replay(
    responder: Responder, kept: Entry, requests: Sequence[Chat], twins: Sequence[Chat], **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Send an entry's attempts to any responder, such as a defended model, without adapting anything.

    Returns (N,) bool, the secret was told, for requests that were told without an attack before False; and (N,) bool, the
    twin in the attack's form was answered right. requests, twins: those the entry was made from, in the same order.
    """
    _paired(requests, twins)
    if len(kept.attempts) != len(requests):
        raise ValueError(f"requests must be the {len(kept.attempts)} the entry was made from, got {len(requests)}")
    answers = send(responder, [*kept.attempts, *kept.twins], **options)
    right = told(answers, [chat.value for chat in (*requests, *twins)])
    leaked, useful = right[: len(requests)], right[len(requests) :]
    return leaked & kept.attempted, useful


def _paired(requests: Sequence[Chat], twins: Sequence[Chat]) -> None:
    if not requests or len(requests) != len(twins):
        raise ValueError(f"requests and twins must be as many, at least one; got {len(requests)} and {len(twins)}")


@technique(KEY, paper="zhou2024easyjailbreak")
def bench(
    model: Responder, requests: Sequence[Chat], twins: Sequence[Chat], plans: Mapping[str, Plan], **options: Any
) -> dict[str, Entry]:
    """Run many named attacks against one model under one judge, the true value in the answer [zhou2024easyjailbreak].

    Returns an entry for each plan, by its name. Raises ValueError for no plans.
    """
    if not plans:
        raise ValueError("plans must not be empty")
    return {
        name: entry(
            model, requests, twins, plan.rewrite, name=name, technique=plan.technique, tries=plan.tries, **options
        )
        for name, plan in plans.items()
    }  # fmt: skip


def compose(*parts: Rewrite) -> Rewrite:
    """One rewrite after another, as [doumbouya2024h4rm3l] composes primitives: each reads what the one before it made.

    Prefills add up in order. No parts: the request as it is.
    """

    def rewrite(request: Chat, n: int) -> Attempt:
        prefills: list[str] = []
        for part in parts:
            made = part(request, n)
            request, prefills = replace(request, messages=made.messages), [*prefills, made.prefill]
        return Attempt(request.messages, " ".join(filter(None, prefills)))

    return rewrite


@dataclass(frozen=True)
class Recipe:
    """A composition of primitives. names: in order of use. rewrite: what they do together. score: share of the tuning
    requests it opened. tried: every composition with its score, in order. cost: what the search spent."""

    names: tuple[str, ...]
    rewrite: Rewrite
    score: float
    tried: Mapping[tuple[str, ...], float]
    cost: Cost


@technique(KEY, paper="zhou2024easyjailbreak")
def assemble(
    model: Responder,
    tuning: Sequence[Chat],
    primitives: Mapping[str, Rewrite],
    *,
    rounds: int = 4,
    width: int = 6,
    most: int = 3,
    words: int = 200,
    random: bool = False,
    seed: int = 0,
    **options: Any,
) -> Recipe:
    """Search for a composition of primitives, with the four parts a toolkit takes attacks apart into [zhou2024easyjailbreak].

    Selector: the `width` best compositions so far. Mutator: put one more primitive at a place drawn at random, or leave one
    out. Constraint: at most `most` primitives, none twice, and at most `words` words in the messages. Evaluator: the share of
    the tuning requests whose value is told. The first round holds the single primitives. random: draw compositions blindly
    instead, the control of equal budget. Use validation requests, and judge the recipe on others. Raises ValueError.
    """
    if not primitives or not tuning or rounds < 0 or width < 1 or most < 1:
        raise ValueError("primitives and tuning must not be empty, rounds >= 0, width >= 1 and most >= 1")
    draw, meter, known = Random(seed), Meter(), list(primitives)
    values, scores = [request.value for request in tuning], dict[tuple[str, ...], float]()

    def mutated(names: tuple[str, ...]) -> tuple[str, ...]:
        place = draw.randrange(len(names) + 1)
        if len(names) > 1 and draw.random() < 0.25:
            return names[:place] + names[place + 1 :]
        return (*names[:place], draw.choice(known), *names[place:])

    def blind() -> tuple[str, ...]:
        return tuple(draw.sample(known, draw.randint(1, min(most, len(known)))))

    def evaluate(names: tuple[str, ...]) -> bool:
        """Score a composition unless a constraint rules it out or it is known; whether it was scored."""
        if names in scores or not 1 <= len(names) <= most or len(set(names)) < len(names):
            return False
        rewrite = compose(*(primitives[name] for name in names))
        attempts = [rewrite(request, 0) for request in tuning]
        if max(sum(len(m["content"].split()) for m in attempt.messages) for attempt in attempts) > words:
            return False
        scores[names] = float(told(send(model, attempts, meter, **options), values).float().mean())
        return True

    for name in known:
        evaluate((name,))
    for _ in range(rounds):
        seeds = sorted(scores, key=lambda names: -scores[names])[:width]
        for chosen in seeds:
            any(evaluate(blind() if random else mutated(chosen)) for _ in range(20))  # until one may be scored
    if not scores:
        raise ValueError(f"words must leave room for at least one primitive, got {words}")
    best = max(scores, key=lambda names: scores[names])
    return Recipe(best, compose(*(primitives[name] for name in best)), scores[best], scores, meter.cost)
