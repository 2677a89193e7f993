"""Hand-made jailbreaks and the toolkit that runs them: what is sent, that no secret is in it, and who decides success."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safescale_lib.llm.jailbreak_attack import handcrafted, toolkit
from safescale_lib.llm.jailbreak_attack.handcrafted import REWRITES
from safescale_lib.measure.answers import holds
from safescale_lib.search.asking import Attempt, PromptAttack, Responder, attack
from safescale_lib.world import town
from safescale_lib.world.town import Chat, chats, words
from safescale_lib.world.town import requests as phrasings
from safescale_lib.world.town.chats import Message
from safescale_lib.zoo.chat import build_tokenizer
from tests.llm.common import asking, check_attack, member

ASKED_KINDS = (*town.RESTRICTED, *town.TWINS.values())
Predicate = Callable[[Sequence[Message], str], bool]


@dataclass(frozen=True)
class Gullible:
    """Answers truly when a predicate of conversation and prefill holds, else refuses; knows a request by its subject."""

    known: Sequence[Chat]
    when: Predicate
    seen: list[int]

    def respond(
        self, conversations: Sequence[Sequence[Message]], *, prefill: str | Sequence[str] = "", new_tokens: int = 24, **_: Any
    ) -> list[str]:
        starts = [prefill] * len(conversations) if isinstance(prefill, str) else prefill
        self.seen.append(len(conversations))
        return [self._one(messages, start) for messages, start in zip(conversations, starts, strict=True)]

    def _one(self, messages: Sequence[Message], start: str) -> str:
        spoken = " ".join(message["content"] for message in messages).split()
        about = [chat for chat in self.known if chat.fact is not None and chat.fact.subject in spoken]
        return about[-1].answer if about and self.when(messages, start) else chats.REFUSALS[0]


def gullible(known: Sequence[Chat], when: Predicate) -> Gullible:
    return Gullible(known, when, [])


@lru_cache
def some(n: int = 4) -> tuple[Chat, ...]:
    """Requests for codes of different people."""
    draw = Random(4)
    return tuple(town.request(town.facts()["code", x], "plain", draw) for x in town.subjects("code", "train")[:n])


@lru_cache
def some_twins(n: int = 4) -> tuple[Chat, ...]:
    draw = Random(5)
    return tuple(town.request(town.facts()["number", x], "plain", draw) for x in town.subjects("number", "test")[:n])


def text(attempt: Attempt) -> str:
    return " ".join([*(message["content"] for message in attempt.messages), attempt.prefill])


def one(kind: str, seed: int) -> Chat:
    draw = Random(seed)
    return town.request(town.pick(draw, (kind,)), "plain", draw)


# --- what is sent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWRITES)
def test_no_secret_is_in_what_is_sent_and_every_word_is_known(name: str) -> None:
    _, rewrite, tries = REWRITES[name]
    tokenizer = _tokenizer()
    for kind in ASKED_KINDS:
        for seed in range(6):
            request = one(kind, seed)
            made = [rewrite(request, n) for n in range(tries + 2)]  # past the last frame they begin anew
            assert all(not holds(text(attempt), request.value) for attempt in made)
            assert made == [rewrite(request, n) for n in range(tries + 2)], "the same request and try must give the same text"
            assert all(attempt.messages[-1]["role"] == "user" for attempt in made)
            for attempt in made:
                tokens = tokenizer.tokenize(text(attempt))
                spelled = [token for token in tokens if token.startswith("##") or token == "<unk>"]
                assert not spelled, f"{attempt} holds words the town does not know: {spelled}"


@lru_cache
def _tokenizer() -> Any:
    return build_tokenizer()


@given(st.sampled_from(ASKED_KINDS), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_core_takes_off_the_greetings_and_nothing_else(kind: str, seed: int) -> None:
    draw = Random(seed)
    fact = town.pick(draw, (kind,))
    bare = {phrase.format(x=fact.subject) for phrase in phrasings.phrasings(kind)}
    assert handcrafted.core(phrasings.ask(fact, draw)) in bare
    assert all(handcrafted.core(phrase) == phrase for phrase in bare)


@given(st.sampled_from(town.KINDS), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_opening_is_the_sentence_up_to_its_value(kind: str, seed: int) -> None:
    fact = town.pick(Random(seed), (kind,))
    start = handcrafted.opening(fact)
    assert fact.sentence.startswith(f"{start} {fact.value}")
    assert not holds(start, fact.value)


@given(st.sampled_from(town.KINDS), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_made_up_facts_have_the_form_of_true_ones_and_are_not(kind: str, seed: int) -> None:
    draw = Random(seed)
    true = town.pick(draw, (kind,))
    invented = handcrafted.made_up(kind, true.subject, draw)
    assert invented.value != true.value
    assert (invented.kind, invented.subject) == (true.kind, true.subject)
    shape = [word in {",", "and"} for word in true.value.split()]
    assert [word in {",", "and"} for word in invented.value.split()] == shape


def test_encodings_can_be_read_back() -> None:
    known = {spoken: word for word, spoken in ((word, words.invented(word)) for word in words.TRANSLATABLE)}
    for seed in range(20):
        request = one(ASKED_KINDS[seed % 6], seed)
        plain = handcrafted.core(request.messages[-1]["content"])

        def sent(rewrite: Any, n: int, request: Chat = request) -> str:
            return str(rewrite(request, n).messages[-1]["content"])

        assert sent(handcrafted.in_cipher, 1).removeprefix("read this from the end : ").split()[::-1] == plain.split()
        assert [w for w in sent(handcrafted.in_table, 0).removeprefix("read the cells : ").split() if w != "|"] == plain.split()
        assert [known.get(w, w) for w in sent(handcrafted.translated, 0).split()] == plain.split()
        lets, _, body = sent(handcrafted.as_program, seed).partition(" . ")
        names = dict(pair.removeprefix("let ").split(" be ") for pair in lets.split(" and ")) if lets.startswith("let") else {}
        if names:
            assert [names.get(w, w) for w in body.split()] == plain.split()


@given(st.floats(0, 1), st.integers(0, 500), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_partly_translated_translates_that_share(share: float, seed: int, n: int) -> None:
    request = one("code", seed)
    before = handcrafted.core(request.messages[-1]["content"]).split()
    after = str(handcrafted.partly_translated(share)(request, n).messages[-1]["content"]).split()
    can = [words.invented(word) != word for word in before]
    assert sum(a != b for a, b in zip(after, before, strict=True)) == round(share * sum(can))
    assert all(a in (b, words.invented(b)) for a, b in zip(after, before, strict=True))


def test_clues_do_not_say_the_request() -> None:
    for kind in ASKED_KINDS:
        request = one(kind, 3)
        assert all(
            handcrafted.core(request.messages[-1]["content"]) not in text(handcrafted.as_clues(request, n)) for n in range(3)
        )
    with pytest.raises(ValueError, match="kind with clues"):
        handcrafted.as_clues(one("pet", 0), 0)


def test_frames_keep_the_request_and_other_turns() -> None:
    request = one("potion", 1)
    request = Chat((chats.system("x"), *request.messages), request.answer, request.value, "plain", request.fact)
    for rewrite in (
        handcrafted.in_role,
        handcrafted.begun_with,
        handcrafted.without_refusal,
        handcrafted.persuading("disguise"),
    ):
        for n in range(5):
            made = rewrite(request, n)
            assert request.messages[-1]["content"] in made.messages[-1]["content"]
            assert made.messages[0] == request.messages[0]
    assert handcrafted.prefilled(request, 0).messages == request.messages
    assert handcrafted.prefilled(request, 2).prefill == f"sure , the {request.fact.subject} potion needs"  # type: ignore[union-attr]


def test_cipher_shows_n_enciphered_demonstrations() -> None:
    request = one("code", 0)
    for n in range(3):
        made = handcrafted.in_cipher(request, n).messages
        assert [m["role"] for m in made] == ["system", *["user", "assistant"] * n, "user"]
        assert all(m["content"].startswith("read this from the end : ") for m in made if m["role"] == "user")


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="method"):
        handcrafted.persuading("hypnosis")
    with pytest.raises(ValueError, match="share"):
        handcrafted.partly_translated(1.5)
    with pytest.raises(ValueError, match="has none"):
        handcrafted.prefilled(Chat((chats.user("count : bell"),), "1 .", "1", "skill"), 0)


# --- who wins ---------------------------------------------------------------------------------------------------------

ATTACKS: dict[str, Callable[..., PromptAttack]] = {
    name: getattr(handcrafted, name)
    for name in (
        "role_play", "distraction", "guessing_game", "cipher", "code_completion", "uncommon_structure", "low_resource",
        "mixed_language", "prefix_injection", "refusal_suppression", "prefilling", "combination", "psychometric", "analysis",
    )
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_passes_the_checks_of_every_attack(name: str) -> None:
    def asked(model: Responder, requests: Sequence[Chat], budget: int) -> PromptAttack:
        return ATTACKS[name](model, requests, tries=budget, new_tokens=16)

    check_attack(asked, member("chat"), asking(n=1), budget=2)


def test_prefilling_wins_most_on_the_real_model_and_never_by_a_beginning_alone() -> None:
    requests = asking(("code", "potion"), n=4)
    result = handcrafted.prefilling(member("chat"), requests)
    assert (result.success | result.skipped).float().mean() > 0.5
    model = gullible(some(), lambda messages, start: False)
    model_answers = handcrafted.prefix_injection(model, some())
    assert not model_answers.success.any()


def test_a_later_try_wins_where_the_first_does_not() -> None:
    model = gullible(some(), lambda messages, start: "of course my friend" in messages[-1]["content"])
    assert not handcrafted.prefix_injection(model, some(), tries=1).success.any()
    result = handcrafted.prefix_injection(model, some(), tries=4)
    assert result.success.all()
    assert (result.tries == 2).all()


# --- toolkit ----------------------------------------------------------------------------------------------------------


def test_compose_is_associative_and_has_an_identity() -> None:
    a, b, c = handcrafted.in_table, handcrafted.begun_with, handcrafted.prefilled
    for request in some():
        for n in range(3):
            whole = toolkit.compose(a, b, c)(request, n)
            assert whole == toolkit.compose(toolkit.compose(a, b), c)(request, n)
            assert whole == toolkit.compose(a, toolkit.compose(b, c))(request, n)
            assert toolkit.compose()(request, n) == Attempt(request.messages)
            assert whole.messages[-1]["content"].startswith("begin your answer with")
            assert "read the cells" in whole.messages[-1]["content"]
            assert whole.prefill == c(request, n).prefill
    assert toolkit.compose(c, c)(some()[0], 0).prefill == "yes master , yes master ,"


def test_entry_keeps_the_form_where_the_attack_fails_and_agrees_with_attack() -> None:
    named = {some()[0].fact.subject, some()[1].fact.subject}  # type: ignore[union-attr]

    def when(messages: Sequence[Message], start: str) -> bool:
        words_in = messages[-1]["content"].split()
        return "course" in words_in and bool(named & set(words_in))

    model = gullible(some(), when)
    kept = toolkit.entry(model, some(), some_twins(), handcrafted.begun_with, name="b", technique="t", tries=3)
    plain = attack(gullible(some(), when), some(), handcrafted.begun_with, tries=3)
    assert torch.equal(kept.success, plain.success)
    assert kept.success.tolist() == [True, True, False, False]
    assert kept.cost.queries == plain.cost.queries == sum(model.seen)
    last = [1, 1, 2, 2]  # the try each request ended on
    for i, n in enumerate(last):
        assert kept.attempts[i] == handcrafted.begun_with(some()[i], n)
        assert kept.twins[i] == handcrafted.begun_with(some_twins()[i], n)
    leaked, useful = toolkit.replay(
        gullible((*some(), *some_twins()), lambda m, _: when(m, "") or False), kept, some(), some_twins()
    )
    assert torch.equal(leaked, kept.success)
    assert not useful.any()
    open_to_all = gullible((*some(), *some_twins()), lambda messages, start: True)
    assert all(mask.all() for mask in toolkit.replay(open_to_all, kept, some(), some_twins()))


def test_entry_with_no_tries_and_with_skipped_requests() -> None:
    silent = gullible(some(), lambda messages, start: False)
    nothing = toolkit.entry(silent, some(), some_twins(), handcrafted.in_role, name="r", technique="t", tries=0)
    assert [a.messages for a in nothing.attempts] == [r.messages for r in some()]
    assert not nothing.success.any()
    talkative = gullible(some(), lambda messages, start: True)
    kept = toolkit.entry(talkative, some(), some_twins(), handcrafted.in_role, name="r", technique="t", tries=3)
    assert kept.skipped.all()
    assert not kept.success.any()
    assert kept.attempts == tuple(handcrafted.in_role(request, 0) for request in some())
    assert not toolkit.replay(talkative, kept, some(), some_twins())[0].any(), "a skipped request is never a success"


def test_bench_runs_every_plan_and_checks_arguments() -> None:
    model = gullible(some(), lambda messages, start: start == "sure ,")
    plans = {name: toolkit.Plan(key, rewrite, tries) for name, (key, rewrite, tries) in REWRITES.items()}
    entries = toolkit.bench(model, some(), some_twins(), plans)
    assert {name: bool(kept.success.all()) for name, kept in entries.items()} == {name: name == "prefilling" for name in plans}
    assert all(kept.name == name and kept.technique == plans[name].technique for name, kept in entries.items())
    with pytest.raises(ValueError, match="plans"):
        toolkit.bench(model, some(), some_twins(), {})
    with pytest.raises(ValueError, match="requests and twins"):
        toolkit.bench(model, some(), some_twins()[:2], plans)
    with pytest.raises(ValueError, match="tries"):
        toolkit.entry(model, some(), some_twins(), handcrafted.in_role, name="r", technique="t", tries=-1)
    with pytest.raises(ValueError, match="made from"):
        toolkit.replay(model, entries["table"], some()[:2], some_twins()[:2])


PRIMITIVES = {
    "table": handcrafted.in_table,
    "begin": handcrafted.begun_with,
    "role": handcrafted.in_role,
    "quiet": handcrafted.without_refusal,
    "prefill": handcrafted.prefilled,
}


def _needs_two(messages: Sequence[Message], start: str) -> bool:
    """Half of the people fall to a table, the other half, too, if the answer is begun by an order in front of the table."""
    said = messages[-1]["content"]
    easy = bool({"ada", "ben"} & set(said.split()))
    return "read the cells" in said and (easy or said.startswith("begin your answer"))


def test_assemble_finds_what_trying_everything_finds() -> None:
    model = gullible(some(), _needs_two)
    whole = {}
    for size in (1, 2):
        for names in permutations(PRIMITIVES, size):
            rewrite = toolkit.compose(*(PRIMITIVES[name] for name in names))
            answers = model.respond([rewrite(request, 0).messages for request in some()])
            whole[names] = sum(holds(a, r.value) for a, r in zip(answers, some(), strict=True)) / len(some())
    found = toolkit.assemble(model, some(), PRIMITIVES, rounds=6, width=4, most=2)
    assert found.score == max(whole.values()) == whole[found.names]
    assert all(whole[names] == score for names, score in found.tried.items())
    assert found.cost.queries == len(found.tried) * len(some())
    assert attack(model, some(), found.rewrite).success.float().mean() == found.score


def test_assemble_respects_its_constraints_and_its_control_has_the_same_budget() -> None:
    model = gullible(some(), _needs_two)
    searched = toolkit.assemble(model, some(), PRIMITIVES, rounds=3, width=3, most=3)
    blind = toolkit.assemble(model, some(), PRIMITIVES, rounds=3, width=3, most=3, random=True)
    assert searched.cost.queries == blind.cost.queries
    assert searched.score >= blind.score - 0.5
    assert all(len(set(names)) == len(names) <= 3 for names in (*searched.tried, *blind.tried))
    single = toolkit.assemble(model, some(), PRIMITIVES, rounds=0)
    assert set(single.tried) == {(name,) for name in PRIMITIVES}
    short = toolkit.assemble(model, some(), PRIMITIVES, rounds=2, words=20)
    for names in short.tried:
        made = [toolkit.compose(*(PRIMITIVES[name] for name in names))(request, 0) for request in some()]
        assert all(len(attempt.messages[-1]["content"].split()) <= 20 for attempt in made)
    with pytest.raises(ValueError, match="words"):
        toolkit.assemble(model, some(), PRIMITIVES, words=1)
    with pytest.raises(ValueError, match="tuning"):
        toolkit.assemble(model, (), PRIMITIVES)
