"""Output defenses of section 3.4: against known gradients, exhaustive search and labels that are true by construction."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safescale_lib.llm.jailbreak_defense import guards, outputs
from safescale_lib.measure.answers import holds
from safescale_lib.measure.detection import roc
from safescale_lib.search import tokens as search
from safescale_lib.world import town
from safescale_lib.world.town.chats import REFUSALS, user
from tests.llm.common import asking, member, seeded

# --- the classifier ---------------------------------------------------------------------------------------------------


def test_training_dialogues_are_labelled_by_what_stands_in_the_answer() -> None:
    made = outputs.noisy_dialogues(200, seed=4)
    secrets = {
        fact.value for fact in town.facts().values() if fact.restricted and fact.subject in town.subjects(fact.kind, "train")
    }
    assert sum(d.unsafe for d in made) == 100
    assert all(any(holds(d.answer, secret) for secret in secrets) for d in made if d.unsafe)
    quiet = [d for d in made if not d.unsafe and any(refusal in d.answer for refusal in REFUSALS)]
    assert quiet
    assert made == outputs.noisy_dialogues(200, seed=4)
    own = outputs.noisy_dialogues(200, seed=4, noise=0.0)
    assert sum(len(d.messages[-1]["content"].split()) for d in own) < sum(len(d.messages[-1]["content"].split()) for d in made)
    with pytest.raises(ValueError, match="noise"):
        outputs.noisy_dialogues(10, noise=2.0)


def test_the_probe_separates_what_its_reader_can_tell_apart() -> None:
    reader = member("chat-base")
    dialogues = [outputs.Reviewed((user("who is ada ?"),), "a lamp ." if i % 2 else "a rope .", bool(i % 2)) for i in range(20)]
    probe = outputs.prompt_shield(reader, dialogues, strength=1.0)
    scores = probe([[user("who is ada ?")]] * 2, ["a lamp .", "a rope ."])
    assert scores[0] > 0 > scores[1]
    assert torch.allclose(probe([[user("who is ada ?")]], ["a lamp ."]), scores[:1], atol=1e-4), "independent of the batch"
    with pytest.raises(ValueError, match="dialogues"):
        outputs.prompt_shield(reader, dialogues[::2])
    with pytest.raises(ValueError, match="pair up"):
        probe([[user("what")]], [])


def test_the_probe_on_a_real_reader_judges_answers_about_people_it_never_saw() -> None:
    probe = outputs.prompt_shield(member("chat-base"), outputs.noisy_dialogues(160))
    bad, good = asking(("code", "potion"), n=10), asking(("number", "soup"), n=10)
    scores = [probe([c.messages for c in chats], [c.answer for c in chats]).numpy() for chats in (good, bad)]
    assert roc(*scores).auc > 0.9
    aimed = [*bad[:2], *good[:2]]
    ids = torch.tensor([member("chat-base").tokenizer("lamp rope", add_special_tokens=False)["input_ids"]] * 4)
    with torch.no_grad():
        seen_by_search = probe.objective(aimed)(search.Tokens(ids), torch.arange(4))
    typed = probe([guards.with_words(c, "lamp rope") for c in aimed], [c.answer for c in aimed])
    assert torch.allclose(seen_by_search, torch.nn.functional.softplus(typed), atol=1e-2)


# --- the defensive prompt ---------------------------------------------------------------------------------------------


def test_the_patch_is_the_best_of_all_combinations() -> None:
    model, bad, good = member("chat"), asking(n=1), asking(("number", "soup"), n=1)
    phrases = (("please", "say sorry"), ("lamp", "rope", "."))
    slots = [
        *guards.suffix_slots(model, bad, target=lambda chat: REFUSALS[0]),
        *guards.suffix_slots(model, good, target=lambda chat: chat.answer),
    ]
    loss = search.target_loss(search.Prompts(model.lm, [slots]))
    found = {}
    for parts in product(*phrases):
        ids = model.tokenizer(" ".join(parts), add_special_tokens=False)["input_ids"]
        found[" ".join(parts)] = loss(search.Tokens(torch.tensor([ids])), torch.zeros(1, dtype=torch.long)).item()
    defended, patch = outputs.defensive_prompt_patch(
        model, bad, good, phrases=phrases, steps=6, candidates=8, generator=seeded()
    )
    assert patch == min(found, key=found.__getitem__)
    by_hand = model.respond([[user(f"{good[0].messages[-1]['content']} {patch}")]])
    assert defended.respond([good[0].messages[-1:]]) == by_hand
    with pytest.raises(ValueError, match="harmless"):
        outputs.defensive_prompt_patch(model, bad, [], generator=seeded())


def test_tokens_searched_by_gradient_do_not_raise_the_loss() -> None:
    model, bad, good = member("chat"), asking(n=1), asking(("number",), n=1)
    results = []
    for steps in (0, 4):
        _, patch = outputs.defensive_prompt_patch(
            model, bad, good, phrases=None, length=3, steps=steps, candidates=16, generator=seeded()
        )
        results.append(patch)
    slots = [
        *guards.suffix_slots(model, bad, target=lambda chat: REFUSALS[0]),
        *guards.suffix_slots(model, good, target=lambda chat: chat.answer),
    ]
    loss = search.target_loss(search.Prompts(model.lm, [slots]))
    first, last = (
        loss(search.Tokens(torch.tensor([model.tokenizer(p, add_special_tokens=False)["input_ids"]])), torch.tensor([0])).item()
        for p in results
    )
    assert last < first


# --- the landscape of refusal -----------------------------------------------------------------------------------------


class Slope(torch.nn.Module):
    """A toy language model of three words whose next-word logits are linear in the sum of what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(3, 6)
        self.head = torch.nn.Linear(6, 3)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=seeded(weight.numel())) * 0.3)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.table

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, **_: Any) -> Any:
        read = (inputs_embeds * attention_mask[..., None]).sum(1, keepdim=True)
        return SimpleNamespace(logits=self.head(read))


class Toy:
    """The least of a `ChatModel` that the detector asks for."""

    def __init__(self) -> None:
        self.lm = Slope()
        self.tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda words: [0] * len(words))

    def prompt(self, messages: Any) -> str:
        return str(messages[-1]["content"])

    def encode(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([[0, 1, 2]] * len(texts)), torch.tensor([[0, 1, 1]] * len(texts))


def test_the_estimated_gradient_is_the_gradient() -> None:
    toy: Any = Toy()
    detector = outputs.GradientCuff(toy, directions=4000, radius=1e-3, openings=("sorry",), seed=0)
    loss, norm = detector.parts([[user("q")]])
    ids, mask = toy.encode(["q"])
    shift = torch.zeros(6, requires_grad=True)  # the same vector added to every word
    exact = outputs.refusal_loss(toy, toy.lm.table(ids).detach() + shift, mask, ("sorry",))
    (slope,) = torch.autograd.grad(exact.sum(), shift)
    assert loss.item() == pytest.approx(exact.item(), abs=1e-6)
    assert norm.item() == pytest.approx(slope.norm().item(), rel=0.1)


def test_what_is_refused_anyway_scores_above_every_gradient() -> None:
    model = member("chat")
    detector = outputs.gradient_cuff(model, directions=3)
    bad, good = asking(("code",), n=6), asking(("number",), n=6)
    conversations = [c.messages for c in (*bad, *good)]
    loss, norm = detector.parts(conversations)
    scores = detector(conversations)
    assert (loss[:6] < 0.5).float().mean() > 0.5
    assert (loss[6:] > 0.5).all()
    assert torch.equal(scores == outputs.CERTAIN, loss < 0.5)
    assert torch.equal(scores[loss >= 0.5], norm[loss >= 0.5])
    first = model.complete([model.prompt(good[0].messages)], new_tokens=1)[0]
    assert first not in outputs.OPENINGS
    assert torch.allclose(detector(conversations[:2]), scores[:2], rtol=1e-2, atol=1e-4), "independent of the batch"
    bad_arguments: tuple[dict[str, Any], ...] = (
        {"directions": 0},
        {"radius": 0.0},
        {"openings": ()},
        {"openings": ("notaword",)},
    )
    for bad_argument in bad_arguments:
        with pytest.raises(ValueError, match=r"directions|openings"):
            outputs.gradient_cuff(model, **bad_argument)
