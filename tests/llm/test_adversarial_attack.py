"""Section 3.1: edits nobody sees, greedy search on victims whose rule is known, and the gradient attack on the real one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safescale_lib.llm import adversarial_attack as attack
from safescale_lib.llm.adversarial_attack import black_box, editing, white_box
from safescale_lib.world import town
from safescale_lib.world.town import Message, chats, tasks, words
from tests.llm.common import check_attack, member, seeded

LABELS = ("good", "bad")
Votes = dict[str, float]
POLAR = {**dict.fromkeys(words.GOOD, 1), **dict.fromkeys(words.BAD, -1)}
NEAR = ((*words.GOOD, *words.PRAISE), (*words.BAD, *words.MOCKERY))
TYPES = tuple(words.KINDS_OF_WORD)
KNOWN = {cell: kind for kind, pool in words.KINDS_OF_WORD.items() for cell in words.share(pool, "train")}
UNSEEN = {kind: words.share(pool, "test") for kind, pool in words.KINDS_OF_WORD.items()}


def asked(task: tasks.Task, shots: tuple[tasks.Task, ...] = ()) -> town.Chat:
    turns = [turn for shot in shots for turn in (town.user(shot.ask), town.assistant(shot.answer))]
    return town.Chat((*turns, town.user(task.ask)), task.answer, task.value, "judging")


@lru_cache
def reviews(n: int = 12, seed: int = 0) -> tuple[town.Chat, ...]:
    draw = Random(seed)
    return tuple(asked(tasks.review(draw)) for _ in range(n))


@lru_cache
def shown(n: int = 8, seed: int = 0) -> tuple[town.Chat, ...]:
    draw = Random(seed)
    return tuple(asked(tasks.review(draw), (tasks.review(draw), tasks.review(draw))) for _ in range(n))


@lru_cache
def columns(n: int = 12, seed: int = 0) -> tuple[town.Chat, ...]:
    draw = Random(seed)
    return tuple(asked(tasks.column(draw)) for _ in range(n))


class Rule:
    """A victim that answers by a rule: score(conversation) -> label -> votes; the first of the labels with most votes wins."""

    def __init__(self, score: Callable[[Sequence[Message]], Votes], labels: Sequence[str]) -> None:
        self.score, self.labels = score, labels

    def respond(self, conversations: Sequence[Sequence[Message]], **_: Any) -> list[str]:
        votes = [self.score(messages) for messages in conversations]
        return [f"it is {max(self.labels, key=lambda label: v.get(label, 0))} ." for v in votes]

    def margin(self, _: Any, chats_: Sequence[town.Chat], labels: Sequence[str], **__: Any) -> torch.Tensor:
        votes = [self.score(chat.messages) for chat in chats_]
        return torch.tensor(
            [
                v.get(c.value, 0) - max(v.get(label, 0) for label in labels if label != c.value)
                for v, c in zip(votes, chats_, strict=True)
            ],
            dtype=torch.float32,
        )


def opinions(messages: Sequence[Message]) -> Votes:
    said = [POLAR[word] for message in messages for word in message["content"].split() if word in POLAR]
    return {"good": said.count(1), "bad": said.count(-1)}


def cells(messages: Sequence[Message]) -> Votes:
    votes: Votes = dict.fromkeys(TYPES, 0.0)
    for word in messages[-1]["content"].split():
        if word in KNOWN:
            votes[KNOWN[word]] += 1
    return {**votes, "person": votes["person"] + 0.5}


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Rule:
    rule = Rule(opinions, LABELS)
    monkeypatch.setattr(editing, "margin", rule.margin)
    return rule


@pytest.fixture
def typer(monkeypatch: pytest.MonkeyPatch) -> Rule:
    rule = Rule(cells, TYPES)
    monkeypatch.setattr(editing, "margin", rule.margin)
    return rule


def needed(chat: town.Chat) -> float | None:
    """How many opinions must disappear until the counter errs: ties go to the first label, good."""
    votes = opinions(chat.messages)
    lead = votes["good"] - votes["bad"]
    least = lead + 1 if chat.value == "good" else -lead
    return least if least <= votes[chat.value] else None


# --- edits nobody sees ------------------------------------------------------------------------------------------------


@given(
    st.text("abcdefghijklmnopqrstuvwxyz", min_size=2, max_size=9),
    st.integers(0, 99),
    st.sampled_from(get_args(white_box.Imperceptible)),
)
def test_an_imperceptible_edit_changes_the_text_and_not_what_is_seen(
    word: str, place: int, kind: white_box.Imperceptible
) -> None:
    new = white_box._imperceptible(word, place % len(word), kind)
    if new is not None and new != word:
        assert attack.rendered(f"the {new} was") == f"the {word} was"
    if kind in ("invisible", "deleted"):
        assert new is not None
        assert new != word


def test_rendering_leaves_plain_text_alone_and_ends_on_stray_controls() -> None:
    assert attack.rendered("the show was lovely .") == "the show was lovely ."
    assert attack.rendered("\u0008 stray") == "\u0008 stray"
    assert attack.rendered("ab\u0008\u0008c") == "c"


# --- what is judged ---------------------------------------------------------------------------------------------------


def test_success_is_another_label_without_the_true_one() -> None:
    good = reviews()[0]
    some = [town.Chat(good.messages, "it is good .", "good", "judging")] * 5
    given_ = ["it is bad .", "it is good .", "good or bad .", "", "sorry , no ."]
    assert attack.misnamed(given_, some, LABELS).tolist() == [True, False, False, False, False]


def test_the_operators_words_end_with_the_question_mark() -> None:
    assert attack.owned("good or bad ? i met ada ? .") == (["good", "or", "bad", "?"], ["i", "met", "ada", "?", "."])
    assert attack.owned("no question") == ([], ["no", "question"])


def test_margin_is_the_log_odds_of_a_slow_reference() -> None:
    model = member("chat-base")
    some = list(reviews(5))
    texts = [model.prompt(chat.messages, "it is") for chat in some]
    with torch.no_grad():
        scores = {label: model.log_likelihood(texts, [label] * 5)[0] for label in LABELS}
    expected = [float(scores[c.value][i] - scores["bad" if c.value == "good" else "good"][i]) for i, c in enumerate(some)]
    found = attack.margin(model, some, LABELS, batch=2)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="labels must begin with different tokens"):
        attack.margin(model, some, ("good", "bad", "good"))


# --- searches against a rule that is known ----------------------------------------------------------------------------

NEAR_UNKNOWN = tuple((*group[:12], "nameless", "other") for group in NEAR)
HIDING: dict[str, Callable[..., attack.TextAttack]] = {
    "bad_characters": lambda v, c, b, **o: attack.bad_characters(v, c, LABELS, budget=b, candidates=99, **o),
    "text_fooler": lambda v, c, b, **o: attack.text_fooler(v, c, LABELS, NEAR_UNKNOWN, budget=b, **o),
}


@pytest.mark.parametrize("name", HIDING)
def test_greedy_edits_are_as_few_as_can_be(name: str, counter: Any) -> None:
    """The counter loses a vote with each opinion hidden, so the least number of edits is known."""
    hide, some = HIDING[name], list(reviews(16))
    assert any(needed(chat) is None for chat in some)
    assert any(needed(chat) for chat in some)
    result = hide(counter, some, 3)
    assert [int(n) or None for n in result.edits] == [needed(chat) for chat in some]
    for budget in (0, 1):
        assert torch.equal(hide(counter, some, budget).success, result.broken_within(budget))
    control = hide(counter, some, 3, guided=False)
    assert control.success.sum() <= result.success.sum()
    assert (control.edits >= result.edits)[control.success].all()


@pytest.mark.parametrize("name", HIDING)
def test_what_is_returned_is_judged_anew_and_within_budget(name: str, counter: Any) -> None:
    some = list(reviews(12))
    for result in (HIDING[name](counter, some, 2), HIDING[name](counter, some, 2, guided=False)):
        answers = counter.respond([chat.messages for chat in result.chats])
        assert tuple(answers) == result.answers
        assert torch.equal(attack.misnamed(answers, some, LABELS), result.success)
        assert result.cost.queries > 0
        for before, after, won, edits in zip(some, result.chats, result.success.tolist(), result.edits, strict=True):
            assert attack.changed_words(before, after) == edits <= 2
            assert won or after == before
            assert after.messages[-1]["content"].startswith("good or bad ?")
            if name == "bad_characters":
                assert attack.rendered(after.messages[-1]["content"]) == before.messages[-1]["content"]


def test_synonyms_stay_in_their_group(counter: Any) -> None:
    some = list(reviews(12))
    result = attack.text_fooler(counter, some, LABELS, NEAR_UNKNOWN, budget=3)
    for before, after in zip(some, result.chats, strict=True):
        for old, new in zip(before.messages[-1]["content"].split(), after.messages[-1]["content"].split(), strict=True):
            assert old == new or any(old in group and new in group for group in NEAR_UNKNOWN)


def test_an_item_that_is_wrong_before_is_skipped(counter: Any) -> None:
    some = [town.Chat(chat.messages, chat.answer, chat.value, "judging") for chat in reviews(4)]
    wrong = town.Chat(some[0].messages, "it is bad .", "bad" if some[0].value == "good" else "good", "judging")
    result = attack.bad_characters(counter, [wrong, *some[1:]], LABELS)
    assert result.skipped.tolist() == [True, False, False, False]
    assert not result.success[0]
    assert result.chats[0] == wrong


def test_cells_that_are_swapped_keep_the_columns_type(typer: Any) -> None:
    some = [chat for chat in columns(24) if chat.value != "person" and len(UNSEEN[chat.value]) > 3]
    result = attack.cell_swap(typer, some, TYPES, UNSEEN, budget=4)
    assert result.success.all()
    assert (result.edits == 4).all(), "the typer gives up when it knows no cell, and not before"
    for before, after in zip(some, result.chats, strict=True):
        kind = words.KINDS_OF_WORD[before.value]
        assert all(cell in kind for cell in attack.owned(after.messages[-1]["content"])[1] if cell != "|")
        assert attack.changed_words(before, after) <= 4
    assert not attack.cell_swap(typer, some, TYPES, UNSEEN, budget=3).success.any()
    with pytest.raises(ValueError, match="pools"):
        attack.cell_swap(typer, some, TYPES, {})


def test_only_the_demonstrations_are_misspelt(counter: Any) -> None:
    some = list(shown())
    result = attack.demonstration_attack(counter, some, LABELS, budget=3)
    assert result.success.any(), "the counter counts the words of the demonstrations as well"
    for before, after, edits in zip(some, result.chats, result.edits.tolist(), strict=True):
        assert after.messages[-1] == before.messages[-1]
        assert after.messages[1::2] == before.messages[1::2], "labels of the demonstrations stay true"
        assert attack.changed_words(before, after) == edits <= 3
    groups = (words.REVIEWED, (*words.GOOD, *words.BAD))  # an opinion may become its opposite, and that the counter sees
    swapped = attack.demonstration_attack(counter, some, LABELS, groups=groups, budget=2)
    assert swapped.success.any(), "or nothing of what follows is tested"
    for before, after in zip(some, swapped.chats, strict=True):
        assert after.messages[-1] == before.messages[-1]
        for old, new in zip(before.messages[:-1], after.messages[:-1], strict=True):
            for a, b in zip(old["content"].split(), new["content"].split(), strict=True):
                assert a == b or any(a in group and b in group for group in groups)
    with pytest.raises(ValueError, match="demonstration"):
        attack.demonstration_attack(counter, reviews(2), LABELS)


@given(st.sampled_from([word for word in (*words.GOOD, *words.THINGS) if len(word) > 3]))
def test_typos_change_one_letter(word: str) -> None:
    made = black_box._typos(word)
    assert made
    assert word not in made
    assert all(abs(len(new) - len(word)) <= 1 and new[0] == word[0] for new in made)


# --- entities ---------------------------------------------------------------------------------------------------------


def sentences(chat: town.Chat) -> list[str]:
    return chat.messages[0]["content"].split(" . ")


@lru_cache
def documents(n: int = 10, seed: int = 3) -> tuple[town.Chat, ...]:
    draw = Random(seed)
    made = [chats.reading(draw, "test", tangled=False) for _ in range(4 * n)]
    return tuple(chat for chat in made if len(chat.messages) == 1)[:n]


def by_person(known: set[str]) -> Callable[[Sequence[Message]], Votes]:
    """A reader that finds the things in the sentence about the person asked for, if it knows the name."""

    def votes(messages: Sequence[Message]) -> Votes:
        text = messages[0]["content"]
        question = text.split("question : ")[-1] if "question : " in text else text.split(" use the text")[0]
        story = text.split("text : ")[1].split(" question : ")[0]
        who = [word for word in question.split() if word in known]
        about = [part for part in story.split(" .") if who and who[0] in part.split()]
        found = {word: 2 for part in about for word in part.split() if word in words.THINGS}
        return {**dict.fromkeys((w for w in story.split() if w in words.THINGS), 1), **found}

    return votes


def test_a_new_name_breaks_a_reader_that_knows_names_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [chat for chat in documents(20) if len(set(chat.messages[0]["content"].split()) & set(words.PEOPLE)) > 1]
    strangers = ("greta", "otis", "selma")
    for known, breaks in ((set(words.PEOPLE), True), ({*words.PEOPLE, *strangers}, False)):
        rule: Any = Rule(by_person(known), words.THINGS)
        monkeypatch.setattr(editing, "margin", rule.margin)
        result = attack.entity_swap(rule, some, words.THINGS, names=strangers, candidates=1)
        assert result.attempted.all()
        assert result.success.any() == breaks
    assert all(chat.messages[0]["content"].split(" ")[0] for chat in result.chats)


def test_renaming_is_complete_and_context_stays_in_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    rule: Any = Rule(by_person(set(words.PEOPLE)), words.THINGS)
    monkeypatch.setattr(editing, "margin", rule.margin)
    some = list(documents(12))
    result = attack.entity_swap(rule, some, words.THINGS, names=("greta",))
    for before, after in zip(some, result.chats, strict=True):
        person = next(word for word in before.answer.split() if word in words.PEOPLE)
        if after != before:
            text = " ".join(message["content"] for message in after.messages).split() + after.answer.split()
            assert person not in text
            assert "greta" in text
            assert after.value == before.value
    around = attack.entity_swap(rule, some, words.THINGS, context=attack.CONTEXT, budget=2)
    assert not around.success.any(), "this reader looks at the name alone"

    def pedant(messages: Sequence[Message]) -> Votes:
        return {} if {"keeps", "owns", "holds"} & set(messages[0]["content"].split()) else rule.score(messages)

    strict: Any = Rule(pedant, words.THINGS)
    monkeypatch.setattr(editing, "margin", strict.margin)
    around = attack.entity_swap(strict, some, words.THINGS, context=attack.CONTEXT)
    assert around.success.any()
    for before, after in zip(some, around.chats, strict=True):
        person = next(word for word in before.answer.split() if word in words.PEOPLE)
        old, new = (chat.messages[0]["content"].split(" ") for chat in (before, after))
        changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
        assert len(changed) <= 1
        for i in changed:
            assert any(old[i] in group and new[i] in group for group in attack.CONTEXT)
            begin = max((j for j in range(i) if old[j] in (".", "?", ":")), default=-1)
            assert person in old[begin + 1 : next(j for j in range(i, len(old)) if old[j] in (".", "?", ":"))]
    with pytest.raises(ValueError, match="not both"):
        attack.entity_swap(rule, some, words.THINGS, names=("greta",), context=attack.CONTEXT)
    with pytest.raises(ValueError, match="not both"):
        attack.entity_swap(rule, some, words.THINGS)


# --- guards -----------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named() -> None:
    some: list[town.Chat] = list(reviews(2))
    rule: Any = Rule(opinions, LABELS)
    for wrong, word in (({"budget": -1}, "budget"), ({"candidates": 0}, "candidates"), ({"kinds": ("typo",)}, "kinds")):
        with pytest.raises(ValueError, match=word):
            attack.bad_characters(rule, some, LABELS, **wrong)
    with pytest.raises(ValueError, match="chats"):
        attack.bad_characters(rule, [], LABELS)
    with pytest.raises(ValueError, match="labels"):
        attack.bad_characters(rule, some, ("good", "not good"))
    with pytest.raises(ValueError, match="labels must hold"):
        attack.bad_characters(rule, some, ("fine", "poor"))
    with pytest.raises(ValueError, match="synonyms"):
        attack.text_fooler(rule, some, LABELS, [("lovely",)])
    with pytest.raises(TypeError, match="generator"):
        attack.gbda(rule, some, LABELS, keep=(), generator=0)  # type: ignore[arg-type]


# --- against the real model -------------------------------------------------------------------------------------------

KEEP = (*words.GOOD, *words.BAD, *words.PRAISE, *words.MOCKERY, "no", "good", "bad")


FAST: dict[str, Any] = {"lr": 0.5, "similarity": 1.0, "start": 5.0}


@lru_cache
def by_gradient(steps: int = 12) -> attack.TextAttack:
    return attack.gbda(
        member("chat-base"), list(reviews(6, seed=5)), LABELS, keep=KEEP, steps=steps, samples=4, generator=seeded(1), **FAST
    )


def test_gbda_changes_what_it_may_and_is_judged_anew() -> None:
    model, some = member("chat-base"), list(reviews(6, seed=5))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    stream = torch.get_rng_state()
    result = by_gradient()
    assert result.success.any()
    answers = model.respond([chat.messages for chat in result.chats])
    assert torch.equal(attack.misnamed(answers, some, LABELS) & ~result.skipped, result.success)
    for old, new, edits in zip(some, result.chats, result.edits.tolist(), strict=True):
        said = [word for word in old.messages[-1]["content"].split() if word in KEEP]
        assert [word for word in new.messages[-1]["content"].split() if word in KEEP] == said, "the opinions stand as they were"
        assert attack.changed_words(old, new) == edits
    again = attack.gbda(model, some, LABELS, keep=KEEP, steps=12, samples=4, generator=seeded(1), **FAST)
    assert again.chats == result.chats
    assert all(torch.equal(before[name], weight) and weight.grad is None for name, weight in model.state_dict().items())
    assert all(weight.requires_grad for weight in model.parameters())
    assert torch.equal(stream, torch.get_rng_state())


def test_gbda_without_steps_changes_nothing() -> None:
    result = by_gradient(steps=0)
    assert not result.success.any()
    assert result.chats == reviews(6, seed=5)


def test_the_places_gbda_may_change_are_the_attackers_words() -> None:
    model = member("chat-base")
    some = list(reviews(4))
    ids, mask, mine = white_box._own_tokens(model, some)
    for row, inside, chat in zip(ids, mine, some, strict=True):
        assert model.tokenizer.decode(row[inside]) == " ".join(attack.owned(chat.messages[-1]["content"])[1])
    assert not (mine & ~mask.bool()).any()


def test_induced_prompts_pass_the_checks_of_every_attack_that_asks() -> None:
    some = [attack.misled(chat, next(w for w in words.THINGS if w not in chat.messages[0]["content"])) for chat in documents(4)]
    check_attack(lambda m, r, b: attack.induced_prompt(m, r, tries=b), member("chat"), some, budget=2)
    with pytest.raises(ValueError, match="prompts"):
        attack.induced_prompt(member("chat"), some, prompts=("no question",))
    with pytest.raises(ValueError, match="tries"):
        attack.induced_prompt(member("chat"), some, tries=9)


def test_a_misled_request_differs_in_its_goal_alone() -> None:
    true = documents()[0]
    false = attack.misled(true, "drumstick")
    assert (false.messages, false.value) == (true.messages, "drumstick")
    assert false.answer.split() == ["drumstick" if word == true.value else word for word in true.answer.split()]
    with pytest.raises(ValueError, match="false"):
        attack.misled(true, true.value)


def test_random_words_are_the_control_of_the_gradient(counter: Any) -> None:
    some, model = list(reviews(6)), member("chat-base")
    counter.tokenizer, counter.lm = model.tokenizer, model.lm
    result = attack.random_words(counter, some, LABELS, keep=KEEP, budget=3)
    assert not result.success.any(), "the counter reads opinions, and those stay"
    blind = Rule(lambda messages: {"good": messages[-1]["content"].split().count("was") - 2.5}, LABELS)
    victim: Any = blind
    victim.tokenizer, victim.lm = model.tokenizer, model.lm
    good = [chat for chat in some if chat.value == "good"]
    found = attack.random_words(victim, good, LABELS, keep=KEEP, budget=12)
    assert found.success.any()
    for old, new, edits in zip(good, found.chats, found.edits.tolist(), strict=True):
        assert attack.changed_words(old, new) == edits
