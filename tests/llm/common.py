"""What the tests of chapter 3 share: the shipped victims, some requests, and the checks every attack by words passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random

import torch

from safescale_lib import zoo
from safescale_lib.measure.answers import told
from safescale_lib.search.asking import PromptAttack, Responder
from safescale_lib.world import town
from safescale_lib.world.town import Chat, Split
from safescale_lib.zoo.chat import ChatModel


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@lru_cache
def member(name: str = "chat") -> ChatModel:
    """A chat model of the zoo, one for all tests: leave it as found."""
    model: ChatModel = zoo.load(name)
    return model


def asking(kinds: tuple[str, ...] = town.RESTRICTED, n: int = 4, split: Split = "validation", seed: int = 1) -> list[Chat]:
    """n plain requests for facts of each kind."""
    draw = Random(seed)
    return [town.request(town.pick(draw, (kind,), split), "plain", draw, split=split) for kind in kinds for _ in range(n)]


def check_attack(
    attack: Callable[[Responder, Sequence[Chat], int], PromptAttack],
    model: ChatModel,
    requests: Sequence[Chat],
    budget: int = 1,
) -> PromptAttack:
    """The checks of every attack that asks. attack(model, requests, budget): 0 must change nothing, one more loses nothing.

    Returns the result at the given budget, so that a test may go on with it.
    """
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    stream, training = torch.get_rng_state(), model.training
    nothing, result, again = attack(model, requests, 0), attack(model, requests, budget), attack(model, requests, budget)
    assert not nothing.success.any(), "a budget of zero must win nothing"
    assert [a.messages for a in nothing.attempts] == [r.messages for r in requests]
    assert torch.equal(nothing.skipped, told(model.respond([r.messages for r in requests]), [r.value for r in requests]))
    asked_anew = model.respond([a.messages for a in result.attempts], prefill=[a.prefill for a in result.attempts])
    won = told(asked_anew, [r.value for r in requests])
    assert torch.equal(won[result.attempted], result.success[result.attempted]), "the verdict must hold when asked anew"
    for request, attempt, success in zip(requests, result.attempts, result.success.tolist(), strict=True):
        assert success or attempt.messages == request.messages, "a failed item comes back as the request itself"
    assert not (result.success & result.skipped).any()
    assert not (result.success & ~attack(model, requests, budget + 1).success).any(), "more budget must not lose what was won"
    assert result.attempts == again.attempts, "the same seed must give the same attack"
    assert torch.equal(result.success, again.success)
    assert result.cost.queries >= len(requests)
    assert model.training == training
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(stream, torch.get_rng_state()), "no global random stream may move"
    return result
