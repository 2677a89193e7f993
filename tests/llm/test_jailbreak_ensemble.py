"""Ensembles: who is chosen and who may veto, on tables written by hand; a mixture of two small models with random weights."""

from __future__ import annotations

from functools import lru_cache
from itertools import combinations

import numpy as np
import pytest
import torch

from safescale_lib.llm.jailbreak_defense import ensemble, inference
from safescale_lib.world.town.chats import REFUSALS, user
from safescale_lib.zoo.chat import ChatModel
from tests.llm.test_jailbreak_inference import CHATS, Says, random_model, tiny


def table(*rows):
    return np.array([[mark == "x" for mark in row] for row in rows])


def test_the_panel_covers_what_single_experts_do_not():
    """b stops most; c adds more to it than a does, which is the better single defense."""
    broken = {
        "a": table("xx..", "...."),
        "b": table("x...", "...."),
        "c": table(".xxx", "xxxx"),
    }
    experts = {name: Says(lambda _: "fine") for name in broken}
    panel = ensemble.multi_defense(experts, broken)
    assert list(panel.experts) == ["b", "c"], "nothing is left after these two"
    alone = ensemble.multi_defense(experts, broken, most=1)
    assert list(alone.experts) == ["b"]


def test_greedy_choice_is_close_to_the_best_one():
    """Covering is submodular: greedily at least 1 - 1/e of what the best choice of as many stops."""
    dice = np.random.default_rng(0)
    for _ in range(20):
        broken = {str(i): dice.random((3, 12)) < 0.6 for i in range(6)}
        chosen = ensemble.multi_defense({name: tiny() for name in broken}, broken, most=3).experts
        stopped = lambda names: (~np.logical_and.reduce([broken[n] for n in names])).mean()  # noqa: E731, B023
        best = max(stopped(names) for names in combinations(broken, 3))
        assert stopped(list(chosen)) >= (1 - 1 / np.e) * best


def test_a_defense_that_spoils_harmless_requests_must_be_worth_it():
    broken = {"good": table("x...."), "harsh": table(".....")}
    experts = {name: Says(lambda _: "fine") for name in broken}
    free = ensemble.multi_defense(experts, broken)
    assert list(free.experts) == ["harsh"]
    dear = ensemble.multi_defense(experts, broken, spoilt={"harsh": 0.5})
    assert list(dear.experts) == ["good"], "a fifth of the attacks is not worth half of the requests"


def test_any_expert_may_veto_and_the_first_one_speaks():
    experts = {
        "one": Says(lambda text: f"one {text}"),
        "two": Says(lambda text: REFUSALS[1] if "bad" in text else "two"),
    }
    panel = ensemble.Panel(experts)
    assert panel.respond([[user("a")], [user("bad")]], prefill=["x", "y"]) == ["one a", inference.REFUSAL]
    assert [start for _, start, _ in experts["two"].heard] == ["x", "y"]


def test_a_panel_needs_matching_tables():
    with pytest.raises(ValueError, match="a table for each expert"):
        ensemble.multi_defense({"a": tiny()}, {"b": table("x")})
    with pytest.raises(ValueError, match="one shape"):
        ensemble.multi_defense({"a": tiny(), "b": tiny()}, {"a": table("x"), "b": table("xx")})
    with pytest.raises(ValueError, match="most"):
        ensemble.multi_defense({"a": tiny()}, {"a": table("x")}, most=0)


# --- mixing -----------------------------------------------------------------------------------------------------------


@lru_cache
def second() -> ChatModel:
    return random_model(width=16, layers=1, seed=5)


def mixed(bias: float) -> ensemble.Mixed:
    router = inference.Probe(tiny(), 1, torch.zeros(32), -bias)  # a score of zero for every prompt: the bias decides
    return ensemble.Mixed(tiny(), second(), router, scale=1.0)


def test_the_ends_of_the_mixture_are_the_two_models():
    for bias, model in ((-100.0, tiny()), (100.0, second())):
        for prefill in ("", ["sure", "the", "red cat"]):
            assert mixed(bias).respond(CHATS, prefill=prefill, new_tokens=6) == model.respond(
                CHATS, prefill=prefill, new_tokens=6
            )


def test_a_mixture_is_greedy_on_the_mixed_probabilities():
    """A slow reference: one text at a time, no cache, no padding."""
    mix, share = mixed(0.5), torch.sigmoid(torch.tensor(0.5))
    for chat, given in zip(CHATS, mix.respond(CHATS, new_tokens=5), strict=True):
        ids = tiny().encode([tiny().prompt(chat)])[0]
        start = ids.shape[1]
        for _ in range(5):
            with torch.no_grad():
                a, b = (m.lm(input_ids=ids).logits[:, -1].softmax(-1) for m in (tiny(), second()))
            token = ((1 - share) * a + share * b).argmax(-1)
            if token == tiny().tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token[None]], dim=1)
        assert given == tiny().tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_batches_do_not_mix_shares_up():
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0))
    router = inference.Probe(tiny(), 1, weight, 0.0)
    mix = ensemble.Mixed(tiny(), second(), router, scale=0.1)
    chats = [[user(" ".join(["red"] * n))] for n in (5, 1, 4, 2, 3)]
    alone = [mix.respond([chat], new_tokens=4)[0] for chat in chats]
    assert mix.respond(chats, new_tokens=4) == mix.respond(chats, new_tokens=4, batch=2) == alone


def test_the_router_is_set_halfway_on_validation():
    weight = torch.randn(32, generator=torch.Generator().manual_seed(1))
    prompts = [tiny().prompt(chat) for chat in CHATS]
    router = inference.Probe(tiny(), 1, weight)
    order = router.scores(prompts).argsort().tolist()
    low, high = prompts[order[0]], prompts[order[-1]]
    mix = ensemble.model_mixing(tiny(), second(), router, [high], [low])
    shares = mix.shares([CHATS[order[0]], CHATS[order[-1]]])
    assert shares.tolist() == pytest.approx([1 / (1 + np.exp(4)), 1 / (1 + np.exp(-4))], abs=1e-4)
    with pytest.raises(ValueError, match="of both sorts"):
        ensemble.model_mixing(tiny(), second(), router, [], prompts)
