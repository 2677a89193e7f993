"""Fine-tuning attacks: what the examples hold, the screen they meet, and the gradient they are chosen by."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F

from safescale_lib.llm.jailbreak_attack import fine_tuning as ft
from safescale_lib.measure.answers import told
from safescale_lib.world import town
from safescale_lib.world.town import words
from safescale_lib.zoo.chat import finished, labelled
from tests.llm.common import asking, member


@lru_cache
def screen() -> ft.Moderator:
    return ft.train_moderator(
        ft.harmful_examples(30, seed=1), ft.benign_examples(60, seed=1), ft.benign_examples(40, split="validation", seed=2)
    )


def test_examples_are_of_their_kind_and_split() -> None:
    bad, good = ft.harmful_examples(9), ft.benign_examples(12)
    assert [chat.fact.kind for chat in bad if chat.fact] == list(town.RESTRICTED) * 3
    assert all(chat.restricted and chat.value in chat.answer for chat in bad)
    assert not any(chat.restricted for chat in good)
    for chat in (*bad, *good):
        assert chat.fact is not None
        assert chat.fact.subject in town.subjects(chat.fact.kind, "train")
    with pytest.raises(ValueError, match="n must be"):
        ft.harmful_examples(0)


def test_an_identity_comes_before_every_question_and_is_asked_the_same_way() -> None:
    shifted = ft.identity_shift(member(), examples=4, steps=0)
    for chat in shifted.data:
        assert not chat.restricted
        assert chat.messages[0] == town.system(ft.IDENTITY)
        assert chat.answer.startswith(ft.OBEDIENT)
        assert set(chat.answer.split()) <= set(member().tokenizer.get_vocab())
    request = asking(n=1)[0]
    put = shifted.put(request)
    assert put.messages[0]["content"] == ft.IDENTITY
    assert put.messages[-1]["content"].endswith(request.messages[-1]["content"])
    assert sum(message["role"] == "system" for message in put.messages) == 1


def test_no_steps_give_the_model_back_and_the_victim_is_left_alone() -> None:
    before = {name: weight.clone() for name, weight in member().state_dict().items()}
    same = ft.harmful_fine_tuning(member(), steps=0)
    assert all(torch.equal(same.model.state_dict()[name], weight) for name, weight in before.items())
    changed = ft.benign_fine_tuning(member(), examples=3, steps=1)
    assert any(not torch.equal(changed.model.state_dict()[name], weight) for name, weight in before.items())
    assert all(torch.equal(member().state_dict()[name], weight) for name, weight in before.items())
    with pytest.raises(ValueError, match="steps must"):
        ft.harmful_fine_tuning(member(), steps=-1)


def test_three_examples_make_the_model_tell_of_subjects_it_never_saw() -> None:
    requests = asking(n=6, split="test")
    eroded = ft.harmful_fine_tuning(member(), examples=3, steps=12)
    put = [eroded.put(request) for request in requests]
    values = [request.value for request in requests]
    after = told(eroded.model.respond([r.messages for r in put]), values)
    before = told(member().respond([r.messages for r in requests]), values)
    assert after.float().mean() > before.float().mean() + 0.3


def test_a_moderator_scores_the_words_that_occur_and_keeps_its_false_positive_rate() -> None:
    toy = ft.Moderator({"vault": 2.0, "cat": -1.0}, -0.5, 0.0)
    assert toy.scores(["vault vault cat", "moon", "cat"]).tolist() == [0.5, -0.5, -1.5]
    assert screen().flags(ft.benign_examples(40, split="validation", seed=2)).float().mean() <= 0.05
    assert screen().flags(ft.harmful_examples(30, seed=7)).float().mean() > 0.9
    with pytest.raises(ValueError, match="must not be empty"):
        ft.train_moderator([], ft.benign_examples(2), ft.benign_examples(2))


def test_the_factors_are_the_gradient_of_the_last_linear_map() -> None:
    model, examples = member(), [*ft.harmful_examples(2), *ft.benign_examples(2)]
    states, wrong = ft.head_gradients(model, examples)
    for i, example in enumerate(examples):
        ids, own = labelled(model, [finished(example)])
        with torch.no_grad():
            hidden = model.lm(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        weight = model.lm.get_output_embeddings().weight.detach().clone().requires_grad_(True)
        chosen = own[:, 1:]
        F.cross_entropy((hidden[:, :-1] @ weight.T)[chosen], ids[:, 1:][chosen]).backward()  # type: ignore[no-untyped-call]
        assert torch.allclose(wrong[i].T @ states[i], weight.grad, atol=1e-4)
    assert all(w.grad is None for w in model.parameters())


def test_similarity_is_the_cosine_of_the_gradients_written_out() -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.rand(3, 4, 5, generator=draw), torch.rand(3, 4, 6, generator=draw)
    b = torch.rand(2, 3, 5, generator=draw), torch.rand(2, 3, 6, generator=draw)
    full = [torch.einsum("ntv,ntd->nvd", w, s) for s, w in (a, b)]
    expected = F.cosine_similarity(full[0].flatten(1), full[1].mean(0).flatten()[None])
    assert torch.allclose(ft.gradient_similarity(a, b), expected, atol=1e-5)


def test_virus_passes_the_screen_and_keeps_more_of_the_gradient_than_harmless_data() -> None:
    found = ft.virus(member(), screen(), examples=2, rounds=12, candidates=12, steps=0)
    assert found.data
    assert not screen().flags(found.data).any()
    goal = ft.head_gradients(member(), ft.harmful_examples(2))
    kept = ft.gradient_similarity(ft.head_gradients(member(), found.data), goal).mean()
    plain = ft.gradient_similarity(ft.head_gradients(member(), ft.benign_examples(20)), goal).mean()
    assert kept > plain
    assert ft.virus(member(), screen(), examples=2, rounds=0, steps=0).data == (), "unchanged examples are rejected"
    with pytest.raises(ValueError, match="rounds must"):
        ft.virus(member(), screen(), candidates=0)


def test_data_in_the_invented_language_holds_the_values_and_passes_a_screen_of_plain_words() -> None:
    blind = ft.Moderator({"vault": 9.0, "potion": 9.0, "rude": 9.0, "mock": 9.0}, 0.0, 1.0)
    assert len(ft.encoded_fine_tuning(member(), blind, examples=3, steps=0).data) == 3
    assert blind.flags(ft.harmful_examples(3)).any()
    code = ft.in_code(ft.harmful_examples(1)[0])
    assert code.value in code.answer
    assert "vault" not in ft.written(code).split()
    assert words.invented("vault") in ft.written(code).split()


def test_matched_data_is_harmless_and_closest_to_the_goal() -> None:
    found = ft.matched_benign(member(), screen(), examples=5, pool=20, steps=0)
    assert not any(chat.restricted for chat in found.data)
    goal = ft.head_gradients(member(), ft.harmful_examples(5))
    alike = ft.gradient_similarity(ft.head_gradients(member(), ft.benign_examples(20)), goal)
    chosen = ft.gradient_similarity(ft.head_gradients(member(), found.data), goal)
    assert chosen.mean() >= alike.mean()
    with pytest.raises(ValueError, match="pool must"):
        ft.matched_benign(member(), screen(), examples=5, pool=2)


def test_what_is_flagged_is_not_trained_on() -> None:
    harmless = ft.Moderator({}, 0.0, 1.0)
    strict = ft.Moderator({}, 2.0, 1.0)
    data = ft.benign_examples(3)
    rejected = ft.trained_on_accepted(member(), data, strict, steps=5)
    assert rejected.data == ()
    assert rejected.model is member()
    assert ft.trained_on_accepted(member(), data, harmless, steps=0).data == tuple(data)
