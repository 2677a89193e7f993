"""Attacks against defenses: every kept attack is sent to every defense, without adapting it, and to its harmless twins.

What a row of the matrix says is an average; what a defense is worth against somebody who knows all the attacks is its
worst case: a request is broken if any attack broke it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import torch

from safescale_lib.llm.jailbreak_attack.toolkit import Entry
from safescale_lib.measure.answers import told
from safescale_lib.measure.costs import Cost, Meter
from safescale_lib.search.asking import Responder, send
from safescale_lib.search.models import hooked
from safescale_lib.world.town.chats import Chat
from safescale_lib.zoo.training import side_by_side


@dataclass
class Spent:
    """What a language model read: sequences begun, and tokens, padding included."""

    queries: int = 0
    tokens: int = 0


@contextmanager
def spending(*models: torch.nn.Module) -> Iterator[Spent]:
    """Count what some language models (`ChatModel.lm`) read for the block, whoever asks them inside it.

    A forward pass over one token goes on with a sequence; one over more begins sequences. Padding counts for nothing, so
    that it does not matter which prompts share a batch.
    """
    spent, lock = Spent(), Lock()

    def note(_: torch.nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        ids = named.get("input_ids", given[0] if given else None)
        ids = named["inputs_embeds"][..., 0] if ids is None else ids
        rows, length = ids.shape
        mask = named.get("attention_mask")
        with lock:
            padded = mask is not None and mask.ndim == 2  # a mask of four dimensions says who sees whom
            spent.tokens += int(named["attention_mask"][:, -length:].sum()) if padded else rows * length
            spent.queries += rows if length > 1 else 0

    with hooked(*((partial(model.register_forward_pre_hook, with_kwargs=True), note) for model in dict.fromkeys(models))):
        yield spent


@dataclass(frozen=True, eq=False)
class Matrix:
    """A attacks against D defenses on N requests and their twins.

    broken: (A, D, N) bool, the secret was told. useful: (A, D, N) bool, the twin in the attack's form was answered right.
    attempted: (N,) bool, requests that needed an attack. tokens: (D,) read by the models for the whole column.
    costs: one a defense, with the queries to it.
    """

    attacks: tuple[str, ...]
    defenses: tuple[str, ...]
    broken: np.ndarray
    useful: np.ndarray
    attempted: np.ndarray
    tokens: np.ndarray
    costs: tuple[Cost, ...]

    @property
    def success(self) -> np.ndarray:
        """(A, D) attack success rates, over requests that needed an attack."""
        return np.asarray(self.broken[..., self.attempted].mean(-1))

    @property
    def utility(self) -> np.ndarray:
        """(A, D) accuracy on the twins in the attack's form."""
        return np.asarray(self.useful.mean(-1))

    @property
    def price(self) -> np.ndarray:
        """(D,) tokens read, relative to the first column."""
        return np.asarray(self.tokens / self.tokens[0])

    def worst(self, defense: str) -> np.ndarray:
        """(n,) bool, over requests that needed an attack: did any of the attacks break it?"""
        hit = np.asarray(self.broken[:, self.defenses.index(defense)].any(0))  # (N,)
        return np.asarray(hit[self.attempted])

    def best_attack(self, defense: str) -> str:
        """The attack with the highest success rate against a defense."""
        return self.attacks[int(self.success[:, self.defenses.index(defense)].argmax())]


def matrix(
    bank: Mapping[str, Entry],
    defenses: Mapping[str, Responder],
    requests: Sequence[Chat],
    twins: Sequence[Chat],
    *,
    rows: Sequence[int] | None = None,
    models: Sequence[torch.nn.Module] = (),
    **options: Any,
) -> Matrix:
    """Send every entry of a bank to every defense, and every twin in the attack's form too.

    bank: made from these requests and twins, in this order. defenses: the first one is the undefended model, to which prices
    relate. rows: which of the N requests to use, by default all. models: language models whose reading is counted.
    Nothing is adapted: a defense that stops all of this may still fall to an attack made for it. A request counts as
    attempted if it needed an attack in any entry. Raises ValueError for an empty bank, no defenses, or entries of
    another size.
    """
    if not bank or not defenses:
        raise ValueError("bank and defenses must each hold at least one entry")
    if any(len(kept.attempts) != len(requests) for kept in bank.values()) or len(twins) != len(requests):
        raise ValueError(f"requests, twins and every entry must be as many, got {len(requests)} requests")
    rows = list(range(len(requests)) if rows is None else rows)
    sent = [kept.attempts[i] for kept in bank.values() for i in rows] + [kept.twins[i] for kept in bank.values() for i in rows]
    values = [requests[i].value for i in rows] * len(bank) + [twins[i].value for i in rows] * len(bank)
    needed = torch.stack([kept.attempted[rows] for kept in bank.values()]).numpy()  # (A, n)

    def column(responder: Responder) -> tuple[np.ndarray, int, Cost]:
        meter = Meter()
        with spending(*models) as spent:
            answers = send(responder, sent, meter, **options)
        return told(answers, values).view(2, len(bank), len(rows)).numpy(), spent.tokens, meter.cost

    right, tokens, costs = zip(*side_by_side(*(partial(column, responder) for responder in defenses.values())), strict=True)
    broken, useful = np.stack(right, axis=2)  # (A, D, n) each
    return Matrix(
        tuple(bank), tuple(defenses), broken & needed[:, None], useful, np.asarray(needed.any(0)), np.array(tokens), costs,
    )  # fmt: skip
