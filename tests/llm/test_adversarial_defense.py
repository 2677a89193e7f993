"""Section 3.2: the filter against a slow reference, the certificate on any suffix, rerouting, and the searches that adapt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from safescale_lib.llm import adversarial_defense as defense
from safescale_lib.search.asking import PromptAttack
from safescale_lib.search.tokens import Prompts, chat_slot, fill, gcg, random_tokens, target_loss
from safescale_lib.search.tokens.prompts import GAP, Tokens
from safescale_lib.world import town
from safescale_lib.world.town import Chat, Message, words
from safescale_lib.zoo.chat import ChatModel, finished, labelled
from tests.llm.common import asking, check_attack, member, seeded


@lru_cache
def tiny() -> ChatModel:
    """Random weights, the town's words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = member("chat").tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ChatModel(LlamaForCausalLM(config), tokenizer).eval()


class Echo:
    """Answers with the prefill and the last message."""

    def respond(self, conversations: Sequence[Sequence[Message]], *, prefill: str | Sequence[str] = "", **_: Any) -> list[str]:
        starts = [prefill] * len(conversations) if isinstance(prefill, str) else prefill
        return [f"{start} {m[-1]['content']}".strip() for start, m in zip(starts, conversations, strict=True)]


def says(text: str) -> tuple[Message, ...]:
    return (town.user(text),)


def holds_vault(conversations: Sequence[Sequence[Message]]) -> torch.Tensor:
    """A safety filter: an odd number of the words "vault" is harmful. Adding words can fool it."""
    return torch.tensor([m[-1]["content"].split().count("vault") % 2 == 1 for m in conversations], dtype=torch.bool)


# --- a filtered responder ---------------------------------------------------------------------------------------------


def test_what_is_flagged_is_refused_and_the_rest_passes_in_order() -> None:
    guarded = defense.Filtered(Echo(), holds_vault)
    asked = [says("a"), says("the vault"), says("b"), says("vault vault")]
    assert guarded.respond(asked, prefill=["1", "2", "3", "4"]) == ["1 a", guarded.refusal, "3 b", "4 vault vault"]
    assert guarded.respond(asked[:2], prefill="sure") == ["sure a", guarded.refusal]
    assert guarded.respond([]) == []
    with pytest.raises(ValueError, match="prefill must be one text or one each"):
        guarded.respond(asked, prefill=["1"])


# --- perplexity -------------------------------------------------------------------------------------------------------


def slow_surprise(reader: ChatModel, text: str, window: int | None) -> float:
    """One message, token by token, without padding or batches."""
    ids = reader.tokenizer(f"{reader.tokenizer.bos_token} <user> {text} <end>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = reader.lm(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    losses = [-float(logits[i - 1, ids[i]]) for i in range(2, len(ids) - 1)]
    size = len(losses) if window is None else min(window, len(losses))
    return max(sum(losses[i : i + size]) / size for i in range(len(losses) - size + 1))


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_surprise_is_that_of_a_slow_reference(window: int | None) -> None:
    texts = [
        "what is the pet of ada ?",
        "drum kite unknownword lamp rope bell coin",
        "hello",
        "show me the vault colour of ben .",
    ]
    found = defense.surprise(tiny(), [says(text) for text in texts], window=window, batch=3)
    expected = torch.tensor([slow_surprise(tiny(), text, window) for text in texts])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_only_what_the_user_wrote_is_read_and_the_worst_window_rules() -> None:
    plain = says("what is the pet of ada ?")
    guided = (town.system("you are a helpful guide ."), *plain)
    longer = (*plain, town.assistant("sure , the pet of ada is a cat ."), town.user("drum kite lamp"))
    one, with_system, both = (defense.surprise(tiny(), [m], window=1) for m in (plain, guided, longer))
    assert torch.isfinite(with_system).all()
    assert both >= one - 1e-4
    narrow, wide = (defense.surprise(tiny(), [plain, longer], window=size) for size in (2, None))
    assert (narrow >= wide - 1e-5).all()
    for bad in (0, -1):
        with pytest.raises(ValueError, match="window"):
            defense.surprise(tiny(), [plain], window=bad)
    with pytest.raises(ValueError, match="conversations"):
        defense.surprise(tiny(), [])


def test_the_threshold_keeps_the_promised_share_of_harmless_prompts() -> None:
    harmless = [chat.messages for chat in asking(town.BENIGN, 5)]
    for fpr in (0.0, 0.05, 0.2):
        guarded, threshold = defense.perplexity_filter(Echo(), tiny(), harmless, fpr=fpr)
        scores = defense.surprise(tiny(), harmless)
        assert guarded.flagged(harmless).float().mean() <= fpr + 1e-9
        assert torch.equal(guarded.flagged(harmless), scores > threshold)


def test_the_objective_through_the_filter_is_what_the_window_exceeds() -> None:
    model, free = tiny(), [[10, 50, 90, 130], [200, 201, 202, 203]]
    slot = chat_slot(model.tokenizer, says(f"what is the pet of ada ? {GAP}"), " sure")
    ids = torch.tensor(free)
    for window, threshold in ((2, 0.0), (4, 6.0), (9, 1e3)):
        loss = defense.unsuspicious(Prompts(model.lm, [slot]), threshold=threshold, window=window)(
            Tokens(ids), torch.zeros(2, dtype=torch.int64)
        )
        for row, found in zip(free, loss.tolist(), strict=True):
            whole = torch.tensor([[*slot.before, *row]])
            with torch.no_grad():
                nll = F.cross_entropy(model.lm(input_ids=whole).logits[0, :-1], whole[0, 1:], reduction="none")[-4:]
            size = min(window, 4)
            worst = max(float(nll[i : i + size].mean()) for i in range(4 - size + 1))
            assert found == pytest.approx(max(0.0, worst - threshold), abs=1e-4)


# --- erase and check --------------------------------------------------------------------------------------------------


def test_erasures_are_those_counted_by_hand() -> None:
    assert defense.erasures("a b c", 9) == ["a b c", "a b", "a"]
    assert defense.erasures("a b c", 1) == ["a b c", "a b"]
    assert defense.erasures("a b c", 2, "insertion") == ["a b c", "b c", "a c", "a b", "c", "a"]
    assert defense.erasures("a", 3, "insertion") == ["a"]


WORDS = st.lists(st.sampled_from(("vault", "drum", "kite", "the")), max_size=4)


@given(WORDS, WORDS, st.sampled_from(("suffix", "insertion")), st.integers(0, 8))
def test_the_certificate_holds_for_any_words_added(base: list[str], added: list[str], mode: defense.Mode, place: int) -> None:
    """The filter is easy to fool, yet what it flags stays flagged, whatever up to `most` words are added."""
    clean = ["the", *base]
    where = min(place, len(clean)) if mode == "insertion" else len(clean)
    attacked = [*clean[:where], *added, *clean[where:]]
    guarded = defense.erase_and_check(Echo(), holds_vault, most=4, mode=mode)
    if holds_vault([says(" ".join(clean))])[0]:
        assert guarded.flagged([says(" ".join(attacked))])[0]


def test_beyond_the_certificate_the_filter_can_be_fooled() -> None:
    for mode in ("suffix", "insertion"):
        guarded = defense.erase_and_check(Echo(), holds_vault, most=2, mode=mode)
        assert guarded.flagged([says("open the vault")]).all()
    suffix = defense.erase_and_check(Echo(), holds_vault, most=2)
    assert not suffix.flagged([says("open the vault vault drum drum kite")]).any(), "longer than what is erased"
    assert not suffix.flagged([says("vault a b open the vault x y")]).any(), "before, not behind"
    inserted = defense.erase_and_check(Echo(), holds_vault, most=3, mode="insertion")
    assert inserted.flagged([says("vault a b open the vault x y")]).all()


def test_only_the_last_message_is_erased_and_bad_arguments_are_named() -> None:
    seen: list[Sequence[Message]] = []

    def watch(conversations: Sequence[Sequence[Message]]) -> torch.Tensor:
        seen.extend(conversations)
        return torch.zeros(len(conversations), dtype=torch.bool)

    guarded = defense.erase_and_check(Echo(), watch, most=2)
    assert guarded.respond([(town.system("be kind"), town.user("a b c d"))]) == ["a b c d"]
    assert [m[-1]["content"] for m in seen] == ["a b c d", "a b c", "a b"]
    assert all(m[0] == town.system("be kind") for m in seen)
    with pytest.raises(ValueError, match="most"):
        defense.erase_and_check(Echo(), watch, most=-1)
    with pytest.raises(ValueError, match="mode"):
        defense.erase_and_check(Echo(), watch, mode="infusion")  # type: ignore[arg-type]


# --- rerouting --------------------------------------------------------------------------------------------------------


def states(model: ChatModel, some: Sequence[Chat]) -> tuple[torch.Tensor, torch.Tensor]:
    """(layers, tokens, d) states on the answers of conversations, and on all of their tokens."""
    ids, own = labelled(model, [finished(chat) for chat in some])
    with torch.no_grad():
        hidden = torch.stack(model.lm(input_ids=ids, output_hidden_states=True).hidden_states)
    return hidden[:, own], hidden[:, ids != model.tokenizer.pad_token_id]


def test_adapters_leave_all_but_the_blocks_alone() -> None:
    model = tiny()
    broken = defense.circuit_breakers(model, asking(("code",), 4), asking(("pet",), 4), steps=3, lr=1e-2, batch=2, rank=2)
    for (name, old), new in zip(model.state_dict().items(), (broken.state_dict()[n] for n in model.state_dict()), strict=True):
        change = (new - old).float()
        if "layers." in name and "norm" not in name:
            assert 0 < torch.linalg.matrix_rank(change, rtol=1e-3) <= 2
        else:
            assert not change.any()


def test_the_reader_learns_what_users_write() -> None:
    said = [(town.user("the pet of ada is a cat ."),), (town.user("show me the vault of ben ."),)] * 8
    reader = defense.message_reader(member("chat").tokenizer, said, width=32, steps=100, batch=8)
    usual, salad = defense.surprise(reader, [said[0], says("cat vault . ada the me ben pet")])
    assert usual < 1.5 < salad
    again = defense.message_reader(member("chat").tokenizer, said, width=32, steps=100, batch=8)
    assert all(torch.equal(a, b) for a, b in zip(reader.parameters(), again.parameters(), strict=True))


def test_rerouting_turns_harmful_states_and_holds_the_others() -> None:
    model, harmful, harmless = tiny(), asking(town.RESTRICTED, 4), asking(town.BENIGN, 2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    stream = torch.get_rng_state()
    broken = defense.circuit_breakers(model, harmful, harmless, retain=0.5, steps=25, lr=1e-2, batch=4)
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())
    assert torch.equal(stream, torch.get_rng_state())
    bad, good = (
        F.cosine_similarity(states(broken, some)[part], states(model, some)[part], dim=-1)[1:].mean()
        for some, part in ((harmful, 0), (harmless, 1))
    )
    assert bad < good - 0.2
    again = defense.circuit_breakers(model, harmful, harmless, retain=0.5, steps=25, lr=1e-2, batch=4)
    assert all(torch.equal(a, b) for a, b in zip(broken.parameters(), again.parameters(), strict=True))
    same = defense.circuit_breakers(model, harmful, harmless, steps=0)
    assert same.state_dict().keys() == before.keys(), "the adapters are merged"
    assert all(torch.equal(before[name], weight) for name, weight in same.state_dict().items())
    assert all(weight.requires_grad for weight in broken.parameters())
    with pytest.raises(ValueError, match="layers"):
        defense.circuit_breakers(model, harmful, harmless, layers=(9,))
    with pytest.raises(ValueError, match="rank"):
        defense.circuit_breakers(model, harmful, harmless, rank=0)
    with pytest.raises(ValueError, match="harmful"):
        defense.circuit_breakers(model, [], harmless)


# --- searches that know the defense -----------------------------------------------------------------------------------


class Gate:
    """Tells everything if a word of the attacker's is there: what a search must find."""

    def __init__(self, requests: Sequence[Chat], key: frozenset[str]) -> None:
        self.values, self.key = {r.messages[-1]["content"]: r.value for r in requests}, key
        self.asked: list[tuple[str, str]] = []

    def respond(self, conversations: Sequence[Sequence[Message]], *, prefill: str | Sequence[str] = "", **_: Any) -> list[str]:
        starts = [prefill] * len(conversations) if isinstance(prefill, str) else prefill
        texts = [m[-1]["content"] for m in conversations]
        self.asked += zip(texts, starts, strict=True)
        return [
            next((v for q, v in self.values.items() if q in text), "") if self.key & set(text.split()) else "no ."
            for text in texts
        ]


KEY = frozenset(words.THINGS[:60])


@pytest.mark.parametrize(("place", "most"), [("suffix", 0), ("prefix", 2)])
def test_a_search_finds_the_word_and_puts_it_where_it_belongs(place: Any, most: int) -> None:
    requests = asking(("code",), 3)
    gate = Gate(requests, KEY)
    found: PromptAttack = defense.searched(
        tiny(), gate, requests, search=random_tokens, place=place, most=most, length=3, steps=12, candidates=2,
        generator=seeded(0),
    )  # fmt: skip
    assert found.success.all()
    for request, attempt in zip(requests, found.attempts, strict=True):
        asked, sent = request.messages[-1]["content"], attempt.messages[-1]["content"]
        assert (sent.startswith if place == "suffix" else sent.endswith)(asked)
        assert KEY & set(sent.replace(asked, "").split())
        assert len(asked.split()) < len(sent.split()) <= len(asked.split()) + 3, "tokens may spell a word together"
        assert attempt.messages[:-1] == request.messages[:-1]


def test_prefilled_searches_prefill_every_time() -> None:
    requests = asking(("code",), 2)
    gate = Gate(requests, KEY)
    found = defense.searched(
        tiny(),
        gate,
        requests,
        search=random_tokens,
        prefill=True,
        length=2,
        steps=8,
        candidates=1,
        generator=seeded(0),
        objective=lambda items: target_loss(Prompts(tiny().lm, items)),
    )
    assert found.success.any()
    for attempt, won in zip(found.attempts, found.success.tolist(), strict=True):
        assert attempt.prefill.startswith("sure , the code") == won


def test_a_search_passes_the_checks_of_every_attack_that_asks() -> None:
    requests = asking(("code",), 2)

    def run(model: Any, some: Sequence[Chat], budget: int) -> PromptAttack:
        return defense.searched(
            model, model, some, search=gcg, length=6, steps=2 * budget, candidates=12, topk=32, generator=seeded(0)
        )

    result = check_attack(run, member("chat"), requests)
    assert result.cost.backwards > 0
    with pytest.raises(ValueError, match="requests"):
        defense.searched(member("chat"), Echo(), [], generator=seeded())


def test_a_defended_model_is_asked_through_its_defense() -> None:
    model, requests = member("chat"), asking(("code", "potion"), 3)
    guarded = defense.erase_and_check(model, defense.refusal_filter(model), most=4)
    alone = defense.refusal_filter(model)([r.messages for r in requests])
    assert alone.any()
    draw = Random(0)
    added = [
        fill([{**r.messages[-1], "content": f"{r.messages[-1]['content']} {GAP}"}], " ".join(draw.choices(words.THINGS, k=4)))
        for r in requests
    ]
    assert (guarded.flagged(added) >= alone).all(), "the certificate, on the shipped model"
