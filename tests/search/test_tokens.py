"""Searches over tokens: the fast path is the slow obvious one, and what comes back can be typed."""

from functools import lru_cache, partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from safescale_lib.search import tokens as search
from safescale_lib.search.tokens import Prompts, Slot, Tokens

MARKS = ["<unk>", "<s>", "</s>", "<user>", "<bot>"]
WORDS = [f"w{i}" for i in range(35)]
CHAT = (
    "<s>{% for m in messages %} {{ '<user>' if m['role'] == 'user' else '<bot>' }} {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} <bot>{% endif %}"
)
SEARCHES = {
    "gcg": partial(search.gcg, topk=8),
    "greedy_random": search.greedy_random,
    "random_tokens": search.random_tokens,
    "genetic": search.genetic,
    "beam": search.beam,
}
every_search = pytest.mark.parametrize("name", SEARCHES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@lru_cache
def words():
    """One token a word: every filling survives."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(MARKS + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": MARKS[3:]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **marks)
    tokenizer.chat_template = CHAT
    return tokenizer


@lru_cache
def pieces():
    """Byte-level pieces of words: most random fillings do not survive."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = ["the mayor opens the market when the bell of the old tower rings", "a baker bakes bread before the bell rings"]
    inner.train_from_iterator(text, trainers.BpeTrainer(vocab_size=320, show_progress=False, special_tokens=["<s>"],
                                                        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


@lru_cache
def model(kind="llama", seed=0, size=40):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "llama":
            shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
            made = LlamaForCausalLM(LlamaConfig(vocab_size=size, num_hidden_layers=2, initializer_range=0.3, **shape))
        else:
            shape = {"n_embd": 32, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
            made = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_layer=2, initializer_range=0.3, **shape))
    return made.eval()


def some(n, seed, low=5, high=40):
    return tuple(torch.randint(low, high, (n,), generator=seeded(seed)).tolist())


def slots(n=3):
    """Prompts of different lengths, one of them with nothing before the gap but the first token."""
    return [Slot((1, *some(5 * i % 7, i)), some((i + 1) % 3, i + 50), some(1 + i % 3, i + 90)) for i in range(n)]


def obvious(lm, slot, free, onehot=None):
    """The target's mean negative log-likelihood: the whole prompt read from its start, no cache, one at a time."""
    free = list(free)
    for place, token in slot.swaps:
        free[place] = token
    ids = torch.tensor([[*slot.before, *free, *slot.after, *slot.target]])
    table = lm.get_input_embeddings().weight
    embedded = table[ids]
    if onehot is not None:
        start = len(slot.before)
        embedded = torch.cat([embedded[:, :start], onehot[None] @ table, embedded[:, start + len(free) :]], 1)
    logits = lm(inputs_embeds=embedded, use_cache=False).logits[0]
    return F.cross_entropy(logits[-len(slot.target) - 1 : -1], torch.tensor(slot.target))


def fillings(n, length, seed=7, size=40):
    return torch.randint(5, size, (n, length), generator=seeded(seed))


# --- the fast path is the slow one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 256])
@pytest.mark.parametrize("length", [0, 4])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_losses_are_those_of_a_model_that_reads_everything_anew(kind, length, batch_size):
    lm, many = model(kind), slots(5)
    loss = search.target_loss(Prompts(lm, many, batch_size=batch_size))
    free, items = fillings(20, length), torch.arange(5).repeat(4)
    with torch.no_grad():
        expected = torch.stack([obvious(lm, many[i], row) for i, row in zip(items.tolist(), free.tolist(), strict=True)])
        for rows in (slice(0, 20), slice(0, 5), slice(3, 4), slice(0, 20), slice(1, 19)):  # what is kept between must not show
            assert torch.allclose(loss(Tokens(free[rows]), items[rows]), expected[rows], atol=1e-5)


def test_one_prompt_with_many_candidates():
    lm, slot = model(), slots(2)[1]
    loss, free = search.target_loss(Prompts(lm, [slot])), fillings(9, 3)
    with torch.no_grad():
        for rows in (slice(0, 9), slice(0, 9), slice(0, 2), slice(2, 9)):
            expected = torch.stack([obvious(lm, slot, row) for row in free[rows].tolist()])
            assert torch.allclose(loss(Tokens(free[rows]), torch.zeros(len(expected)).long()), expected, atol=1e-5)


def test_candidates_that_begin_alike_share_what_is_read():
    """One token changed in each: what stands before it is read once, and that must not show."""
    lm, many, start = model(), [*slots(3), Slot((1, 9, 8), (4, 7), (5, 6))], fillings(4, 6)
    loss, owner, read = search.target_loss(Prompts(lm, many, batch_size=100)), torch.arange(160) % 4, []
    free = start[owner].scatter(1, torch.randint(6, (160, 1), generator=seeded()), fillings(160, 1, seed=3))
    with torch.no_grad():
        expected = torch.stack([obvious(lm, many[i], row) for i, row in zip(owner.tolist(), free.tolist(), strict=True)])
        loss(Tokens(start), torch.arange(4))
        counter = lm.register_forward_pre_hook(
            lambda _, given, named: read.append(named["input_ids"].numel()), with_kwargs=True
        )
        assert torch.allclose(loss(Tokens(free), owner), expected, atol=1e-5)
        counter.remove()
        whole = 160 * (1 + 6 + 2 + 1)  # the token before the gap, the gap, what follows at most, and the target but its last
        assert sum(read) < 0.8 * whole
        assert torch.allclose(loss(Tokens(free.flip(0)), owner.flip(0)), expected.flip(0), atol=1e-5)
        one = search.target_loss(Prompts(lm, many[1:2]))
        assert torch.allclose(one(Tokens(free[owner == 1]), 0 * owner[owner == 1]), expected[owner == 1], atol=1e-5)
    onehot = F.one_hot(start, 40).float().requires_grad_(True)
    loss(Tokens(start, onehot), torch.arange(4)).sum().backward()  # a gradient between must not change what is known
    with torch.no_grad():
        assert torch.allclose(loss(Tokens(free), owner), expected, atol=1e-5)


def test_an_item_of_several_prompts_has_their_mean_loss():
    lm, many, free = model(), slots(5), fillings(6, 4)
    loss = search.target_loss(Prompts(lm, [many[:3], many[3:]], batch_size=4))
    with torch.no_grad():
        found = loss(Tokens(free), torch.tensor([0, 1, 0, 1, 0, 1]))
        for i, row in enumerate(free.tolist()):
            group = many[3:] if i % 2 else many[:3]
            assert torch.allclose(found[i], torch.stack([obvious(lm, slot, row) for slot in group]).mean(), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_gradient_and_its_top_k_are_those_of_the_obvious_loss(kind):
    lm, many, free = model(kind), slots(4), fillings(4, 5)
    loss = search.target_loss(Prompts(lm, many))
    onehot = F.one_hot(free, 40).float().requires_grad_(True)
    found = torch.autograd.grad(loss(Tokens(free, onehot), torch.arange(4)).sum(), onehot)[0]
    for i, slot in enumerate(many):
        single = F.one_hot(free[i], 40).float().requires_grad_(True)
        expected = torch.autograd.grad(obvious(lm, slot, free[i].tolist(), single), single)[0]
        assert torch.allclose(found[i], expected, atol=1e-5)
        assert torch.equal(found[i].topk(3, largest=False).indices, expected.topk(3, largest=False).indices)


def test_fluency_is_the_log_perplexity_and_its_gradient_sees_the_choice_itself():
    lm, many, free = model(), slots(3), fillings(3, 4)
    loss = search.fluency_loss(Prompts(lm, many))
    onehot = F.one_hot(free, 40).float().requires_grad_(True)
    found = loss(Tokens(free, onehot), torch.arange(3))
    slope = torch.autograd.grad(found.sum(), onehot)[0]
    for i, slot in enumerate(many):
        ids, start = torch.tensor([[*slot.before, *free[i].tolist()]]), len(slot.before)
        with torch.no_grad():
            scores = lm(input_ids=ids).logits[0].log_softmax(-1)
        assert torch.allclose(found[i], F.nll_loss(scores[start - 1 : -1], ids[0, start:]), atol=1e-5)
        # the last token influences nothing but its own likelihood
        assert torch.allclose(slope[i, -1], -scores[-2] / 4, atol=1e-5)


def test_an_objective_may_read_the_models_thoughts():
    lm, many, free, direction = model(), slots(3), fillings(3, 4), torch.randn(32, generator=seeded())
    found = search.activation_loss(Prompts(lm, many), lambda h: h @ direction, layer=1)(Tokens(free), torch.arange(3))
    for i, slot in enumerate(many):
        ids = torch.tensor([slot.filled(free[i].tolist())])
        states = lm(input_ids=ids, output_hidden_states=True).hidden_states[1]
        assert torch.allclose(found[i], states[0, -1] @ direction, atol=1e-4)


def test_perturbed_copies_give_the_expectation_over_a_defense_that_swaps_tokens():
    lm, slot, free = model(), Slot((1, *some(6, 1), 3), (4, 9), (12, 13)), fillings(1, 4)
    copies = search.perturbed(slot, 6, rate=0.4, length=4, allowed=torch.arange(5, 40), generator=seeded())
    assert all(copy.before[0] == 1 and copy.before[-1] == 3 and copy.after[0] == 4 for copy in copies)  # the marks stay
    assert len({copy.before for copy in copies}) > 1
    assert any(copy.swaps for copy in copies)
    onehot = F.one_hot(free, 40).float().requires_grad_(True)
    loss = search.target_loss(Prompts(lm, [copies]))(Tokens(free, onehot), torch.zeros(1).long())
    expected = torch.stack([obvious(lm, copy, free[0].tolist()) for copy in copies]).mean()
    assert torch.allclose(loss[0], expected, atol=1e-5)
    everything = search.perturbed(slot, 2, rate=1.0, length=4, allowed=torch.arange(5, 40), generator=seeded())
    blind = search.target_loss(Prompts(lm, [everything]))(Tokens(free, onehot), torch.zeros(1).long())
    assert not torch.autograd.grad(blind.sum(), onehot)[0].any()  # nothing of the gap is left to change
    assert search.perturbed(slot, 1, rate=0.0, length=4, allowed=torch.arange(5, 40), generator=seeded())[0] == slot
    many = search.perturbed(slot, 400, rate=0.3, length=4, allowed=torch.arange(5, 40), generator=seeded())
    put = [token for copy in many for _, token in copy.swaps]
    assert len(put) == pytest.approx(0.3 * 1600, rel=0.15)
    assert set(put) == set(range(5, 40)), "a swapped place of the gap may hold any allowed token"


def test_an_empty_gap_is_no_surprise():
    prompts = Prompts(model(), slots(2))
    assert search.fluency_loss(prompts)(Tokens(fillings(2, 0)), torch.arange(2)).tolist() == [0, 0]
    grown = search.beam(
        model(), words(), slots(2), length=3, objective=search.fluency_loss(prompts), early_stop=False, generator=seeded()
    )
    assert grown.history.isfinite().all()


def test_a_beam_goes_on_where_nothing_is_worth_growing_for_another_item():
    grown = search.beam(
        model(), words(), slots(2), length=2, early_stop=False, generator=seeded(),
        objective=lambda tokens, items: torch.where((items == 0) & (tokens.ids.shape[1] > 0), torch.inf, 0.0),
    )  # fmt: skip
    assert grown.ids[0] == ()
    assert grown.steps.tolist() == [2, 2]


# --- what the searches find -----------------------------------------------------------------------------------------


def run(name, items, lm=None, tokenizer=None, *, steps=4, candidates=12, length=4, seed=0, **more):
    budget = {"length": length, "candidates": candidates} | ({} if name == "beam" else {"steps": steps})
    return SEARCHES[name](lm or model(), tokenizer or words(), items, generator=seeded(seed), **budget, **more)


@pytest.mark.parametrize("name", ["gcg", "greedy_random", "genetic"])
def test_a_gap_of_one_token_gets_the_best_token_there_is(name):
    lm, many = model(), slots(3)
    more = {"topk": 35} if name == "gcg" else {}
    found = run(name, many, length=1, steps=6 if name == "genetic" else 1, candidates=60, early_stop=False, **more)
    with torch.no_grad():
        for i, slot in enumerate(many):
            losses = torch.stack([obvious(lm, slot, [token]) for token in range(5, 40)])
            assert found.loss[i] == pytest.approx(losses.min().item(), abs=1e-5)
            assert found.ids[i] == (5 + int(losses.argmin()),)


@every_search
def test_what_is_returned_is_what_was_measured(name):
    lm, many = model(), slots(4)
    found = run(name, many)
    with torch.no_grad():
        for i, slot in enumerate(many):
            assert found.loss[i] == pytest.approx(obvious(lm, slot, found.ids[i]).item(), abs=1e-5)
            ids = torch.tensor([[*slot.filled(found.ids[i]), *slot.target]])
            greedy = lm(input_ids=ids).logits[0, -len(slot.target) - 1 : -1].argmax(-1).tolist() == list(slot.target)
            assert bool(found.success[i]) == (greedy and not found.skipped[i])
    assert list(found.texts) == [words().decode(row) for row in found.ids]
    assert (found.history.diff(dim=0) <= 0).all()
    assert torch.equal(found.history[-1].isfinite(), torch.ones(4, dtype=torch.bool))
    assert not (found.success & found.skipped).any()
    assert (found.steps[found.skipped] == 0).all()


@every_search
def test_the_same_seed_gives_the_same_and_another_does_not(name):
    first, again, other = (run(name, slots(4), seed=s, early_stop=False) for s in (3, 3, 4))
    assert first.ids == again.ids
    assert torch.equal(first.history, again.history)
    assert first.ids != other.ids


@every_search
def test_the_batch_size_changes_nothing(name):
    first, second = run(name, slots(5), batch_size=3, early_stop=False), run(name, slots(5), early_stop=False)
    assert first.ids == second.ids
    assert torch.allclose(first.history, second.history, atol=1e-5)


@every_search
def test_an_item_does_not_depend_on_the_fate_of_the_others(name):
    def first_at_once(items, ids):
        return (items == 0) & torch.tensor([len(row) > 0 for row in ids])

    alone = run(name, slots(4), criterion=first_at_once)
    together = run(name, slots(4), criterion=lambda items, ids: torch.zeros(len(items), dtype=torch.bool))
    assert alone.success.tolist() == [True, False, False, False]
    assert alone.ids[1:] == together.ids[1:]
    assert torch.allclose(alone.history[:, 1:], together.history[:, 1:], atol=1e-5)


@every_search
def test_no_budget_returns_the_start(name):
    nothing = run(name, slots(2), **({"length": 0} if name == "beam" else {"steps": 0}))
    assert nothing.history.shape == (1, 2)
    assert nothing.cost.backwards == 0
    assert (nothing.steps == 0).all()
    assert torch.equal(nothing.history[0], nothing.loss)
    if name in ("gcg", "greedy_random"):
        start = run(name, slots(2), steps=0, init=[[5, 6], [7, 8]])
        assert start.ids == ((5, 6), (7, 8))
        assert run(name, slots(2), steps=0, init=torch.tensor([5, 6])).ids == ((5, 6), (5, 6))
        assert run(name, slots(2), steps=1, init=[5, 6]).history[1].le(start.history[0] + 10).all()


def test_with_enough_budget_every_target_is_reached_and_random_tokens_do_worse():
    many = [Slot((1, *some(4, i)), (4,), some(2, i + 20)) for i in range(8)]
    found = run("gcg", many, length=12, steps=100, candidates=32, topk=24)
    assert found.success.sum() == found.attempted.sum() > 5
    few, control = (run(name, many, length=6, steps=6, candidates=16, early_stop=False) for name in ("gcg", "random_tokens"))
    assert few.history[-1].mean() < control.history[-1].mean()
    assert torch.equal(few.history[0], control.history[0])  # the same start
    assert found.broken_within(100).sum() == found.success.sum() >= found.broken_within(2).sum()


def test_items_leave_when_they_are_broken_and_skipped_ones_are_not_searched():
    asked = []

    def verdict(items, texts):
        asked.append((items.tolist(), texts))
        return [item == 0 or (item == 1 and bool(text)) for item, text in zip(items.tolist(), texts, strict=True)]

    found = run("gcg", slots(3), criterion=search.by_text(words(), verdict), steps=3)
    assert found.skipped.tolist() == [True, False, False]
    assert found.success.tolist() == [False, True, False]
    assert found.survived.tolist() == [False, False, True]
    assert asked[0] == ([0, 1, 2], ["", "", ""])
    assert [items for items, _ in asked[2:]] == [[2]] * 3


def test_the_cost_is_what_the_objective_was_asked():
    calls = {"forwards": 0, "backwards": 0}
    many = [slots(5)[:2], slots(5)[2:]]
    plain = search.target_loss(Prompts(model(), many))

    def counted(tokens, items):
        rows = sum(len(many[i]) for i in items.tolist())
        calls["forwards"] += rows
        calls["backwards"] += rows * (tokens.onehot is not None)
        return plain(tokens, items)

    found = run("gcg", many, objective=counted, early_stop=False)
    assert (found.cost.forwards, found.cost.backwards) == (calls["forwards"], calls["backwards"])
    assert found.cost.queries == 10  # the empty gaps, and the verdict at the end
    calls["forwards"] = 0
    blind = run("random_tokens", many, objective=counted, early_stop=False)
    assert (blind.cost.forwards, blind.cost.queries) == (0, calls["forwards"] + 10)


def test_objectives_add_up_over_terms_and_models():
    many, other = slots(3), model("gpt2")
    losses = [search.target_loss(Prompts(lm, many)) for lm in (model(), other)]
    fluency = search.fluency_loss(Prompts(model(), many))

    def joint(tokens, items):
        return sum(loss(tokens, items) for loss in losses) + 0.5 * fluency(tokens, items)

    found = run("gcg", many, objective=joint, early_stop=False, steps=6)
    with torch.no_grad():
        for i, slot in enumerate(many):
            both = obvious(model(), slot, found.ids[i]) + obvious(other, slot, found.ids[i])
            likely = fluency(Tokens(torch.tensor([found.ids[i]])), torch.tensor([i]))[0]
            assert found.loss[i] == pytest.approx((both + 0.5 * likely).item(), abs=1e-4)
    assert (found.history[-1] < found.history[0]).all()


def test_probe_sampling_asks_the_model_less_the_better_the_draft():
    many = slots(3)
    true = search.target_loss(Prompts(model(), many))
    seen = {"good": 0, "bad": 0}

    def counting(name):
        def counted(tokens, items):
            seen[name] += len(tokens) * (tokens.onehot is None)
            return true(tokens, items)

        return counted

    def draft(sign):
        return lambda tokens, items: sign * true(tokens, items)

    for name, sign in (("good", 1), ("bad", -1)):
        found = run("gcg", many, objective=counting(name), draft=draft(sign), candidates=48, early_stop=False)
        with torch.no_grad():
            for i, slot in enumerate(many):
                assert found.loss[i] == pytest.approx(obvious(model(), slot, found.ids[i]).item(), abs=1e-5)
    assert seen["good"] < seen["bad"] < 4 * 3 * 48
    full = run("gcg", many, candidates=48, early_stop=False)
    helped = run("gcg", many, candidates=48, early_stop=False, draft=true)
    assert torch.allclose(helped.history, full.history, atol=1e-5)  # a perfect draft finds the same winners


def test_beams_are_more_likely_text_than_random_tokens():
    many = slots(4)
    fluency = search.fluency_loss(Prompts(model(), many))
    grown, guessed = (run(name, many, length=5, early_stop=False) for name in ("beam", "random_tokens"))

    def measured(found):
        return sum(float(fluency(Tokens(torch.tensor([row])), torch.tensor([i]))[0]) for i, row in enumerate(found.ids) if row)

    assert measured(grown) < measured(guessed)
    assert (grown.history[-1] < grown.history[0]).all()


def test_genetic_search_writes_with_the_phrases_it_was_given():
    phrases = [[(5,), (6, 7)], [(8,), (9, 10, 11), ()], [(12, 13), (14,)]]
    spellings = {a + b + c: None for a in phrases[0] for b in phrases[1] for c in phrases[2]}
    many = slots(3)
    start = search.genetic(model(), words(), many, phrases=phrases, steps=0, generator=seeded())
    assert set(start.ids) == {(5, 8, 12, 13)}
    found = search.genetic(
        model(), words(), many, phrases=phrases, steps=8, candidates=12, mutation=0.5, early_stop=False, generator=seeded()
    )
    with torch.no_grad():
        for i, slot in enumerate(many):
            losses = {row: obvious(model(), slot, row).item() for row in spellings}
            assert found.ids[i] in spellings
            assert found.loss[i] == pytest.approx(min(losses.values()), abs=1e-5)


# --- what can be typed ----------------------------------------------------------------------------------------------


def typed(slot, free):
    """The obvious check: write the prompt, read it again."""
    tokenizer, ids = pieces(), [*slot.before, *free, *slot.after]  # letters that merge come back as other tokens
    return tokenizer.encode(tokenizer.decode(ids, clean_up_tokenization_spaces=False), add_special_tokens=False) == ids


def sentence(text):
    return tuple(pieces().encode(text, add_special_tokens=False))


BELL = Slot((0, *sentence("the mayor opens the market when the bell of the old tower rings")), sentence(" a baker"), (70,))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 319), min_size=0, max_size=5), min_size=1, max_size=6))
def test_survival_is_writing_and_reading_again(rows):
    assert search.survives(pieces(), [BELL] * len(rows), rows) == [typed(BELL, row) for row in rows]


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(sorted(SEARCHES)))
def test_whatever_a_search_returns_survives(seed, name):
    lm = model(size=320)
    found = run(name, [BELL, Slot((0,), sentence(" the bell"), (71, 72))], lm, pieces(), seed=seed, steps=2, length=2)
    assert typed(BELL, found.ids[0])
    assert typed(Slot((0,), sentence(" the bell"), (71, 72)), found.ids[1])


def test_pieces_that_do_not_survive_are_common_enough_to_matter():
    letters = [pieces().convert_tokens_to_ids(letter) for letter in "abehklmnorst"]  # they merge
    rows = torch.tensor(letters)[torch.randint(12, (100, 4), generator=seeded())].tolist()
    assert 0 < sum(search.survives(pieces(), [BELL] * 100, rows)) < 90
    found = run(
        "gcg", [BELL], model(size=320), pieces(), allowed=torch.tensor(letters), steps=3, candidates=8, early_stop=False
    )
    assert typed(BELL, found.ids[0])
    assert found.cost.forwards == 1 + 3 * 9  # what cannot be typed was not scored, and others were drawn instead


def test_the_vocabulary_is_what_survives_alone():
    assert search.vocabulary(words()).tolist() == list(range(5, 40))
    assert search.vocabulary(words(), 20).tolist() == list(range(5, 20))
    alone = search.vocabulary(pieces()).tolist()
    assert 0 not in alone
    assert all(pieces().encode(pieces().decode([i]), add_special_tokens=False) == [i] for i in alone)
    assert len(alone) < 320


def test_a_chat_with_a_gap_is_the_chat_with_its_text():
    messages = [{"role": "user", "content": "w1 w2 {slot} w3"}]
    slot = search.chat_slot(words(), messages, "w4 w5")
    free = [10, 11]
    filled = search.fill(messages, words().decode(free))
    written = words().apply_chat_template(filled, tokenize=False, add_generation_prompt=True)
    assert list(slot.filled(free)) == words().encode(written, add_special_tokens=False)
    assert slot.target == tuple(words().encode("w4 w5"))
    assert search.survives(words(), [slot], [free]) == [True]
    assert messages[0]["content"] == "w1 w2 {slot} w3"
    begun = search.chat_slot(words(), [*messages, {"role": "assistant", "content": "w7"}], "w4")
    assert begun.after[-2:] == (MARKS.index("<bot>"), words().encode("w7")[0])
    for wrong in ("w1 w2", "{slot} w1 {slot}"):
        with pytest.raises(ValueError, match=r"messages must hold '\{slot\}' exactly once"):
            search.chat_slot(words(), [{"role": "user", "content": wrong}], "w4")


# --- contracts ------------------------------------------------------------------------------------------------------


@every_search
def test_the_model_is_left_as_found(name):
    lm = model(seed=5)
    before = {key: value.clone() for key, value in lm.state_dict().items()}
    weights, stream = list(lm.parameters()), torch.get_rng_state()
    lm.train()
    weights[0].requires_grad_(False)
    try:
        run(name, slots(2), lm)
        assert all(module.training for module in lm.modules())
        assert [weight.requires_grad for weight in weights] == [False] + [True] * (len(weights) - 1)
    finally:
        lm.eval().requires_grad_(True)
    assert all(torch.equal(before[key], value) for key, value in lm.state_dict().items())
    assert all(weight.grad is None for weight in weights)
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("gcg", {"steps": -1}, "steps must be"),
        ("gcg", {"candidates": 0}, "candidates must be"),
        ("gcg", {"topk": 0}, "topk must be"),
        ("gcg", {"length": -1}, "length must be"),
        ("gcg", {"batch_size": 0}, "batch_size must be"),
        ("gcg", {"init": [[5, 6], [7]]}, "init must be one row"),
        ("gcg", {"init": [[5]] * 3}, "init must be one row"),
        ("gcg", {"init": [5, 40]}, "init must hold token ids"),
        ("gcg", {"allowed": torch.tensor([], dtype=torch.int64)}, "allowed must hold"),
        ("greedy_random", {"allowed": torch.tensor([40])}, "allowed must hold"),
        ("greedy_random", {"steps": 1.5}, "steps must be"),
        ("random_tokens", {"candidates": -2}, "candidates must be"),
        ("genetic", {"elite": 1.5}, "elite must lie"),
        ("genetic", {"mutation": -0.1}, "mutation must lie"),
        ("genetic", {"phrases": [[]]}, "phrases must have"),
        ("genetic", {"candidates": 1}, "candidates must be"),
        ("beam", {"beams": 0}, "beams must be"),
        ("beam", {"temperature": 0.0}, "temperature must be"),
    ],
)
def test_bad_input_is_refused_by_name(name, bad, message):
    settings = {"length": 2, "candidates": 4} | ({} if name == "beam" else {"steps": 1})
    with pytest.raises(ValueError, match=message):
        SEARCHES[name](model(), words(), slots(2), generator=seeded(), **(settings | bad))


def test_bad_slots_and_starts_are_refused():
    with pytest.raises(TypeError, match="generator"):
        search.gcg(model(), words(), slots(1), generator=0)
    with pytest.raises(ValueError, match="items must hold"):
        run("gcg", [])
    with pytest.raises(ValueError, match="items must hold"):
        run("gcg", [[]])
    with pytest.raises(ValueError, match="before must hold"):
        Slot((), (1,), (2,))
    with pytest.raises(ValueError, match="target must hold"):
        Slot((1,), (1,), ())
    with pytest.raises(ValueError, match="rate in"):
        search.perturbed(slots(1)[0], 1, rate=2, length=1, allowed=torch.arange(3), generator=seeded())
    split = [pieces().convert_tokens_to_ids(letter) for letter in "the"]
    with pytest.raises(ValueError, match="init must survive"):
        run("gcg", [Slot((0,), (70,), (71,))], model(size=320), pieces(), init=split)


# --- full size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_full_size_configuration_runs_unchanged(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "gpt2":  # GPT-2 small, all of it
            lm = GPT2LMHeadModel(GPT2Config())
        else:  # the width and the attention of Llama 3.2 1B, one of its layers
            shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8}
            lm = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=32000, tie_word_embeddings=True, **shape))
    many = [Slot((1, *some(6, 1)), (4,), (9, 10)), Slot((1, *some(3, 2)), (4,), (11,))]
    found = run("gcg", many, lm.eval(), steps=1, candidates=4, length=3, allowed=torch.arange(5, 40))
    with torch.no_grad():
        for i, slot in enumerate(many):
            assert found.loss[i] == pytest.approx(obvious(lm, slot, found.ids[i]).item(), abs=1e-4)
    assert (found.history[1] <= found.history[0]).all()
