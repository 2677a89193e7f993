"""Steering while decoding, and refusal taken out of the states: closed forms, and the model as it was afterwards."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from safescale_lib.llm.jailbreak_attack import decoding
from safescale_lib.world import town
from safescale_lib.zoo.chat import ChatModel
from tests.llm.common import asking, member


@lru_cache
def few() -> tuple[list[town.Chat], list[town.Chat]]:
    return asking(n=2), asking(("number", "soup"), n=2)


@lru_cache
def refusal() -> decoding.Refusal:
    return decoding.refusal_direction(member(), asking(n=4), asking(town.BENIGN, n=2))


# --- weak to strong ---------------------------------------------------------------------------------------------------


def test_no_push_and_a_pair_that_agrees_leave_every_answer_as_it_is() -> None:
    asked = [chat.messages for chat in few()[0]]
    plain = member().respond(asked)
    assert decoding.weak_to_strong(member(), member("chat-base"), member(), alpha=0.0).respond(asked) == plain
    assert decoding.weak_to_strong(member(), member("chat-base"), member("chat-base"), alpha=2.0).respond(asked) == plain
    assert decoding.weak_to_strong(member(), member("chat-base"), member(), alpha=2.0, first=0).respond(asked) == plain


def test_a_strong_model_that_is_the_safe_one_cancels_out() -> None:
    """p_strong (p_unsafe / p_safe) ^ 1 is p_unsafe where strong and safe are the same model."""
    asked = [chat.messages for chat in (*few()[0], *few()[1])]
    steered = decoding.weak_to_strong(member(), member("chat-base"), member(), alpha=1.0)
    assert steered.respond(asked) == member("chat-base").respond(asked)
    assert steered.respond(asked, batch=3) == steered.respond(asked), "batches must not matter"


def test_only_the_first_tokens_are_steered() -> None:
    (chat,) = few()[0][:1]
    base, steered = member("chat-base"), decoding.weak_to_strong(member(), member("chat-base"), member(), first=3)
    ids = member().tokenizer(steered.respond([chat.messages])[0], add_special_tokens=False)["input_ids"]
    start = member().tokenizer.decode(ids[:3])
    assert base.respond([chat.messages])[0].startswith(start)
    assert (
        steered.respond([chat.messages])[0] == f"{start} {member().respond([chat.messages], prefill=start, new_tokens=21)[0]}"
    )


def test_a_prefill_does_not_count_as_steered() -> None:
    (chat,) = few()[0][:1]
    steered = decoding.weak_to_strong(member(), member("chat-base"), member(), alpha=1.0)
    assert steered.respond([chat.messages], prefill="sure ,") == member("chat-base").respond([chat.messages], prefill="sure ,")


def test_wrong_numbers_and_other_vocabularies_are_refused() -> None:
    for wrong in ({"alpha": -1.0}, {"alpha": float("inf")}, {"first": -1}):
        with pytest.raises(ValueError, match="alpha must"):
            decoding.weak_to_strong(member(), member("chat-base"), member(), **wrong)
    stranger = ChatModel(member().lm, _Tokens())
    with pytest.raises(ValueError, match="unsafe must share"):
        decoding.weak_to_strong(member(), stranger, member())


class _Tokens:
    chat_template = "other"

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}


# --- the direction of refusal -----------------------------------------------------------------------------------------


def test_the_direction_is_the_difference_of_means_at_the_answers_first_place() -> None:
    bad, good = few()
    found = decoding.refusal_direction(member(), bad, good)
    with torch.no_grad():
        one = [
            member()
            .lm(input_ids=member().encode([member().prompt(c.messages)])[0], output_hidden_states=True)
            .hidden_states[2][0, -1]
            for c in (*bad, *good)
        ]
    gap = torch.stack(one[: len(bad)]).mean(0) - torch.stack(one[len(bad) :]).mean(0)
    assert torch.allclose(found.direction(2), gap / gap.norm(), atol=1e-4)
    with pytest.raises(ValueError, match="must not be empty"):
        decoding.refusal_direction(member(), [], good)


def states_inside(
    layer: int, edit: decoding.Edit, strength: float = 1.0, at: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What layer number `at`, by default the edited one, gives for some requests, without and with the edit."""
    seen: list[torch.Tensor] = []
    place, prompts = member().lm.model.layers[(at or layer) - 1], [member().prompt(chat.messages) for chat in few()[0]]

    def listen(module: Any, inputs: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output)[:, -1].detach())

    for strong in (0.0, strength):
        with decoding.refusal_ablated(member(), refusal(), layer=layer, edit=edit, strength=strong):
            handle = place.register_forward_hook(listen)  # hears what the hooks before it have made of it
            member().states(prompts)
            handle.remove()
    return seen[0], seen[1]


def test_projecting_leaves_nothing_along_the_direction_in_any_layer() -> None:
    r = refusal().direction(2)
    for at in range(1, len(member().lm.model.layers) + 1):
        before, after = states_inside(2, "project", at=at)
        assert (after @ r).abs().max() < 1e-3
        assert (before @ r).abs().max() > 0.1


def test_subtracting_moves_by_the_gap_and_setting_gives_the_harmless_mean() -> None:
    before, after = states_inside(1, "subtract", 0.5)
    assert torch.allclose(before - after, (0.5 * (refusal().harmful[1] - refusal().harmless[1])).expand_as(before), atol=1e-4)
    before, after = states_inside(2, "set")
    r = refusal().direction(2)
    assert torch.allclose(after @ r, (refusal().harmless[2] @ r).expand(len(after)), atol=1e-3)
    moved = after - before
    assert torch.allclose(moved, (moved @ r)[:, None] * r, atol=1e-3), "nothing else may move"


def hooks() -> int:
    return sum(len(module._forward_hooks) for module in member().modules())


@pytest.mark.parametrize("edit", ["project", "subtract", "set"])
def test_the_model_is_as_it_was_afterwards_even_after_an_error(edit: decoding.Edit) -> None:
    model, asked = member(), [chat.messages for chat in few()[0]]
    plain, stream, found = model.respond(asked), torch.get_rng_state(), hooks()
    with decoding.refusal_ablated(model, refusal(), layer=1, edit=edit, strength=0.0):
        assert model.respond(asked) == plain, "no strength, no change"
    with pytest.raises(RuntimeError, match="stop"), decoding.refusal_ablated(model, refusal(), layer=1, edit=edit):
        raise RuntimeError("stop")
    assert model.respond(asked) == plain
    assert hooks() == found
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.equal(stream, torch.get_rng_state())


def test_choices_are_sorted_by_what_they_tell_while_the_model_stays_useful() -> None:
    choices = decoding.choose_edit(member(), refusal(), *few(), edits=("subtract",), strengths=(0.0, 1.0), least=0.5)
    assert len(choices) == 2 * (len(member().lm.model.layers) - 1)
    useful = [c for c in choices if c.kept >= 0.5]
    assert choices[: len(useful)] == useful
    assert [c.told for c in useful] == sorted((c.told for c in useful), reverse=True)
    with pytest.raises(ValueError, match="must not be empty"):
        decoding.choose_edit(member(), refusal(), [], few()[1])


def test_unknown_edits_and_layers_are_named() -> None:
    for wrong in ({"layer": 1, "edit": "twist"}, {"layer": 0}, {"layer": 99}):
        with pytest.raises(ValueError, match=r"edit must|layer must"), decoding.refusal_ablated(member(), refusal(), **wrong):
            pass
