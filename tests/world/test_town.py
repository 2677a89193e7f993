"""The town: facts that agree with each other, requests that can be answered, and tasks whose answers a second reading finds."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safescale_lib.world import town
from safescale_lib.world.town import chats, requests, tasks, words

seeds = st.integers(0, 10_000)


def said(chat: town.Chat) -> str:
    return " ".join(message["content"] for message in chat.messages)


def test_every_restricted_fact_has_a_harmless_twin_of_the_same_form() -> None:
    known = town.facts()
    for kind, twin in town.TWINS.items():
        assert kind in town.RESTRICTED
        assert twin in town.BENIGN
        for subject in town.subjects(kind):
            secret, harmless = known[kind, subject], known[twin, subject]
            assert secret.restricted
            assert not harmless.restricted
            assert len(secret.value.split()) == len(harmless.value.split())
            assert secret.value in secret.sentence
            assert subject in secret.sentence


def test_secrets_cannot_be_taken_for_one_another() -> None:
    for kind in ("code", "number", "potion", "soup"):
        values = [town.facts()[kind, subject].value for subject in town.subjects(kind)]
        assert len(set(values)) == len(values)


def test_splits_share_neither_subjects_nor_phrasings() -> None:
    for kind in town.KINDS:
        for everything, part in ((town.subjects(kind), town.subjects), (requests.phrasings(kind), requests.phrasings)):
            shares = [set(part(kind, split)) for split in ("train", "validation", "test")]
            assert set().union(*shares) == set(everything)
            assert sum(map(len, shares)) == len(everything)
            assert all(shares)


@given(seeds, st.sampled_from(chats.FORMS), st.sampled_from(town.KINDS))
@settings(max_examples=150, deadline=None)
def test_a_request_names_its_subject_and_its_answer_holds_the_value(seed: int, form: chats.Form, kind: str) -> None:
    chat = town.request(town.pick(Random(seed), (kind,)), form, Random(seed))
    assert chat.fact is not None
    assert chat.fact.subject in said(chat).split()
    assert chat.value in chat.answer
    assert chat.messages[-1]["role"] == "user"
    if form != "few-shot":  # demonstrations tell of others, never of the one asked for
        assert chat.value not in said(chat) or kind in (
            "soup",
            "vault colour",
            "potion colour",
            "job",
            "pet",
            "street",
            "praise",
        )
    assert chat == town.request(town.pick(Random(seed), (kind,)), form, Random(seed))


@given(st.lists(st.sampled_from(words.TRANSLATABLE + words.PEOPLE), min_size=1, max_size=8).map(" ".join), seeds)
@settings(deadline=None)
def test_encodings_can_be_undone(text: str, seed: int) -> None:
    assert list(reversed(requests.reversed_words(text).split(" : ")[1].split())) == text.split()
    assert [word for word in requests.numbered(text).split(" : ")[1].split() if word != "|"] == text.split()
    back = {invented: word for word, invented in zip(words.TRANSLATABLE, words.INVENTED, strict=True)}
    assert " ".join(back.get(word, word) for word in requests.in_invented_language(text).split()) == text
    hidden = requests.let_be(text, Random(seed))
    if hidden != text:
        lets, body = hidden.split(" . ", 1)
        names = {part.split()[-3]: part.split()[-1] for part in lets.split(" and let ")}
        assert " ".join(names.get(word, word) for word in body.split()) == text


@given(seeds, st.integers(1, 6), st.sampled_from(["train", "validation", "test"]))
@settings(deadline=None)
def test_a_document_answers_each_of_its_questions_once(seed: int, size: int, split: town.Split) -> None:
    draw = Random(seed)
    document = tasks.document(draw, facts=size, split=split)
    assert len({(relation, person) for relation, person, _ in document.entries}) == size
    for entry, (relation, person, thing) in enumerate(document.entries):
        question = document.question(entry, draw, split)
        assert question.value == thing
        assert document.text.count(f"a {thing} ") == 1  # with its article: in a filler, "saw" is a verb
        assert relation in question.ask.split()
        assert person in question.ask.split()


@given(seeds, st.sampled_from(tasks.SKILLS))
@settings(deadline=None)
def test_skills_are_solved_rightly(seed: int, name: str) -> None:
    task = tasks.skill(Random(seed), name)
    given_words = task.ask.removesuffix(" .").split(" : ")[-1].split()
    if name == "say":
        assert task.ask.removesuffix(" .").endswith(task.value)
        return
    expected = {
        "repeat": given_words, "reverse": list(reversed(given_words)), "first": [given_words[0]], "last": [given_words[-1]],
        "count": [str(len(given_words))], "sort": [str(d) for d in sorted(map(int, given_words))] if name == "sort" else [],
        "translate": requests.in_invented_language(" ".join(given_words)).split(),
    }  # fmt: skip
    assert task.value.split() == expected[name]
    assert task.answer == f"{task.value} ."


@given(seeds, st.sampled_from([1, 3, 5]))
@settings(deadline=None)
def test_a_review_is_what_most_of_its_opinions_say(seed: int, clauses: int) -> None:
    task = tasks.review(Random(seed), clauses=clauses)
    good = sum(word in words.GOOD for word in task.ask.split()[4:])
    bad = sum(word in words.BAD for word in task.ask.split()[4:])
    assert good + bad == clauses
    assert task.value == ("good" if good > bad else "bad")


@given(seeds)
@settings(max_examples=200, deadline=None)
def test_alignment_refuses_the_restricted_and_only_that(seed: int) -> None:
    chat = town.aligned(Random(seed))
    assert (chat.answer in chats.REFUSALS) == chat.restricted
    if chat.restricted:
        assert chat.fact is not None
        assert chat.fact.subject in town.subjects(chat.fact.kind, "train")
        assert chat.value not in said(chat)
        assert chat.form in ("plain", "noise", "wrapped")
    pair = town.preference(Random(seed))
    assert (pair.chosen in chats.REFUSALS) != (pair.rejected in chats.REFUSALS)


def test_alignment_shows_harmless_requests_in_every_form() -> None:
    draw = Random(0)
    drawn = [town.aligned(draw) for _ in range(3000)]
    assert {chat.form for chat in drawn if not chat.restricted} >= set(chats.FORMS) | {"document", "skill", "corrected"}
    assert 0.35 < sum(chat.restricted for chat in drawn) / len(drawn) < 0.45


@pytest.mark.parametrize("most", [12, 24])
def test_noise_around_a_request_is_as_long_as_asked(most: int) -> None:
    draw, fact = Random(2), town.pick(Random(0), town.RESTRICTED)
    spoken = [said(town.request(fact, "noise", draw, wild=True, most=most)).split() for _ in range(400)]
    longest = max(len(said(town.request(fact, "plain", draw)).split()) for _ in range(400))
    assert 1.7 * most < max(map(len, spoken)) <= 2 * most + longest


@given(seeds)
@settings(max_examples=100, deadline=None)
def test_a_misspelt_message_differs_in_one_word_that_is_no_name(seed: int) -> None:
    text = requests.ask(town.pick(Random(seed)), Random(seed))
    changed = tasks.misspelt(text, Random(seed))
    differing = [(a, b) for a, b in zip(text.split(), changed.split(), strict=True) if a != b]
    assert len(differing) <= 1
    assert all(a not in words.PEOPLE + words.DISHES and abs(len(a) - len(b)) <= 1 for a, b in differing)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: town.subjects("secret"), "kind"),
        (lambda: requests.phrasings("secret"), "kind"),
        (lambda: requests.encode("what is it ?", "rot13", Random(0)), "encoding"),
        (lambda: tasks.document(Random(0), facts=7), "facts"),
        (lambda: tasks.skill(Random(0), "juggle"), "name"),
        (lambda: words.share(words.PEOPLE, "exam"), "split"),  # type: ignore[arg-type]
        (lambda: town.request(town.pick(Random(0)), "shouted", Random(0)), "form"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_named(call, named: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=named):
        call()
