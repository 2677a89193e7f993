"""Learned attackers against targets whose every answer is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from safescale_lib.llm.jailbreak_attack import learned
from safescale_lib.search.asking import rewritten
from safescale_lib.world import town
from safescale_lib.world.town import Chat
from safescale_lib.world.town.chats import Message
from tests.llm.common import asking, check_attack, member, seeded

PLACES = (("hello .", "moon .", "sun ."), ("{q}",), ("", "please .", "now ."))


class Target(torch.nn.Module):
    """Tells what it is asked for in a text with the magic word; else it refuses, or answers something if the text is odd."""

    def __init__(self, requests: Sequence[Chat], magic: str = "moon") -> None:
        super().__init__()
        self.requests, self.magic = requests, magic
        self.queries: list[str] = []

    def respond(
        self, conversations: Sequence[Sequence[Message]], *, prefill: Any = "", new_tokens: int = 24, **_: Any
    ) -> list[str]:
        answers = []
        for messages in conversations:
            text = messages[-1]["content"]
            self.queries.append(text)
            asked = next((r for r in self.requests if learned.names_subject(r, text)), None)
            odd = "well ." if "odd" in text.split() else "sorry , no ."
            answers.append(asked.answer if asked and self.magic in text.split() else odd)
        return answers


class Attacker:
    """A language model in the tests' hands: script(text, again, number) -> what it writes."""

    def __init__(self, script: Any) -> None:
        self.script, self.seen = script, list[tuple[str, bool]]()

    def respond(self, conversations: Sequence[Sequence[Message]], **_: Any) -> list[str]:
        answers = []
        for number, messages in enumerate(conversations):
            text = messages[-1]["content"]
            again = text.startswith("sorry")
            body = text.removeprefix("sorry . ").removeprefix("write again : ")
            self.seen.append((body, again))
            answers.append(self.script(body, again, number))
        return answers


def codes(n: int = 3) -> list[Chat]:
    from random import Random

    draw = Random(0)
    return [town.request(town.facts()["code", x], "plain", draw, split="test") for x in town.subjects("code", "test")[:n]]


# --- the attacker as a language model ---------------------------------------------------------------------------------


def test_an_attacker_reads_refusals_and_revises_what_met_none() -> None:
    requests, target = codes(2), None
    target = Target(requests)

    def script(text: str, again: bool, number: int) -> str:
        if not again:
            return f"odd {text}" if number % 2 else f"dull {text}"
        return f"moon {text}" if text.startswith("odd") else f"dull {text}"

    attacker: Any = Attacker(script)
    result = learned.tree_attack(target, requests, attacker, width=2, depth=2, generator=seeded())
    assert result.success.all()
    assert result.cost.queries == 2 + 2 * 2 + 2 * 2 + 2 + 2
    second = [text for text, again in attacker.seen if again]
    assert all(text.startswith("odd") for text in second), "only what was not refused is revised"
    assert all(a.messages[-1]["content"].startswith("moon odd") for a in result.attempts)


def test_what_strays_from_the_topic_is_never_asked() -> None:
    requests = codes(2)
    target = Target(requests)
    result = learned.tree_attack(target, requests, Attacker(lambda *_: "moon only"), width=3, depth=2, generator=seeded())  # type: ignore[arg-type]
    assert not result.success.any()
    assert not any("moon" in text.split() for text in target.queries)


def test_a_tree_attack_passes_the_checks_of_every_attack() -> None:
    requests = codes(3)
    target: Any = Target(requests[:2])
    script = lambda text, again, number: f"moon {text}" if again else f"dull {text}"  # noqa: E731

    def attack(model: Any, asked: Sequence[Chat], budget: int) -> Any:
        return learned.tree_attack(model, asked, Attacker(script), width=2, depth=budget, generator=seeded())  # type: ignore[arg-type]

    result = check_attack(attack, target, requests, 2)
    assert result.success.tolist() == [True, True, False]
    for wrong in ({"width": 0}, {"depth": -1}):
        with pytest.raises(ValueError, match="width must"):
            learned.tree_attack(target, requests, Attacker(script), **wrong, generator=seeded())  # type: ignore[arg-type]


def test_rewrites_are_sorted_by_what_the_target_did() -> None:
    requests = codes(2)
    ways = [lambda r, n: rewritten(r, lambda q: f"moon {q}"), lambda r, n: rewritten(r, lambda q: f"dull {q}")]
    worked, failed = learned.rewrites_that_worked(Target(requests), requests, ways)
    assert [text for _, text in worked] == [f"moon {r.messages[-1]['content']}" for r in requests]
    assert [text for _, text in failed] == [f"dull {r.messages[-1]['content']}" for r in requests]
    assert [asked for asked, _ in worked] == [r.messages[-1]["content"] for r in requests]


def test_an_attacker_learns_to_write_what_worked() -> None:
    requests = asking(("code",), n=3)
    worked = [(r.messages[-1]["content"], "moon") for r in requests]
    before = {name: weight.clone() for name, weight in member("chat-base").state_dict().items()}
    attacker = learned.train_attacker(member("chat-base"), worked, [(worked[0][0], "dull")], steps=12, lr=2e-3)
    assert (
        learned.write(attacker, [text for text, _ in worked], again=False, temperature=0.1, generator=seeded()) == ["moon"] * 3
    )
    assert all(torch.equal(member("chat-base").state_dict()[name], weight) for name, weight in before.items())
    with pytest.raises(ValueError, match="worked must hold"):
        learned.train_attacker(member("chat-base"), [])


def test_gumbel_noise_draws_from_the_models_distribution() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    dice = learned._Dice(2.0, seeded(0))
    drawn = dice(torch.zeros(1), logits.expand(40_000, 4)).argmax(1)
    share = torch.bincount(drawn, minlength=4) / 40_000
    assert torch.allclose(share, (logits / 2).softmax(0), atol=0.01)


# --- a policy trained by reward ---------------------------------------------------------------------------------------


def test_the_policy_gradient_is_that_of_the_expected_reward_where_all_options_are_tried() -> None:
    logit = torch.tensor([0.3, -0.2, 0.9]).double().requires_grad_(True)
    value = torch.tensor([1.0, 0.0, 0.5]).double()
    p = logit.softmax(0)
    objective = (p * value).sum() - 0.1 * (p * p.log()).sum()
    objective.backward()  # type: ignore[no-untyped-call]
    drawn = torch.multinomial(p.detach(), 200_000, replacement=True, generator=seeded(1))
    estimate = learned._climb(logit.detach(), drawn, value[drawn] - 0.4, 0.1)
    assert logit.grad is not None
    assert torch.allclose(estimate, logit.grad, atol=5e-3)


def test_the_policy_finds_the_one_option_that_pays_and_beats_the_uniform_one() -> None:
    training, requests = codes(6), codes(3)
    target: Any = Target([*training, *requests])
    trained = learned.red_team(target, training, PLACES, rounds=15, batch=24, generator=seeded(0))
    assert trained.queries == 15 * 24
    assert trained.rewards[-3:].mean() > trained.rewards[:2].mean()
    assert trained.policy.logits[0].argmax() == 1
    again = learned.red_team(target, training, PLACES, rounds=15, batch=24, generator=seeded(0))
    assert all(torch.equal(a, b) for a, b in zip(trained.policy.logits, again.policy.logits, strict=True))

    def attack(model: Any, asked: Sequence[Chat], budget: int) -> Any:
        return learned.policy_attack(model, asked, trained.policy, tries=budget, generator=seeded(1))

    assert check_attack(attack, target, requests, 2).success.all()


def test_novelty_keeps_a_policy_that_nothing_pays_for_moving() -> None:
    target: Any = Target([])
    still = learned.red_team(target, codes(2), PLACES, rounds=4, batch=8, entropy=0.0, generator=seeded(0))
    moved = learned.red_team(target, codes(2), PLACES, rounds=4, batch=8, entropy=0.0, novelty=1.0, generator=seeded(0))
    assert all(not logit.any() for logit in still.policy.logits)
    assert any(logit.abs().max() > 0 for logit in moved.policy.logits)


def test_places_hold_the_request_exactly_once() -> None:
    assert learned.uniform(PLACES).words((1, 0, 1), "what ?") == "moon . what ? please ."
    for wrong in ((), (("a",),), (("{q}",), ("{q}",)), (("{q}", "a"),), (("{q}",), ())):
        with pytest.raises(ValueError, match="places must hold"):
            learned.uniform(wrong)
    with pytest.raises(ValueError, match="training must not be empty"):
        learned.red_team(Target([]), [], PLACES, generator=seeded())


def test_twins_get_the_drafts_of_their_requests() -> None:
    policy, requests, others = learned.uniform(PLACES), codes(3), asking(("number",), n=3)
    rewrite = learned.by_policy(policy, requests, others, tries=2, generator=seeded(0))
    for a, b in zip(requests, others, strict=True):
        one, two = (rewrite(chat, 1).messages[-1]["content"].split() for chat in (a, b))
        assert one[0] == two[0]
        assert one[-1] == two[-1] or one[-1] == "?" or two[-1] == "?"
