"""What a search over tokens works on: prompts with a gap, which tokens may fill it, and the loss of what was filled in.

Everything before the gap is read once and kept (its keys and values). Of each candidate only what no other shares is read
then: the gap from the first token on that is new, what follows it, and the target.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F

from safescale_lib.search.models import frozen

GAP = "{slot}"
TOGETHER = 8  # candidates in a row of a forward pass, at most


@dataclass(frozen=True)
class Slot:
    """A prompt with a gap: the ids before and after the free tokens, and the ids the model should go on with.

    text: the halves of the prompt as they are typed, where they are known; a filled gap is then judged on the text
    that results, else on the decoded ids. swaps: (place in the gap, id) pairs that overwrite what a search puts there,
    as a perturbation of the prompt would. Raises ValueError where before or target is empty.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    target: tuple[int, ...]
    text: tuple[str, str] | None = None
    swaps: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name in ("before", "after", "target"):
            object.__setattr__(self, name, tuple(int(i) for i in getattr(self, name)))
        if not self.before:
            raise ValueError("before must hold at least one token, such as the one that begins every sequence")
        if not self.target:
            raise ValueError("target must hold at least one token")

    def filled(self, free: Sequence[int]) -> tuple[int, ...]:
        """The prompt's ids with these tokens in the gap."""
        return self.before + tuple(free) + self.after


Item = Slot | Sequence[Slot]
"""What gets tokens of its own: a prompt, or several prompts that share them (a universal search)."""


def chat_slot(tokenizer: Any, messages: Sequence[dict[str, str]], target: str, *, gap: str = GAP) -> Slot:
    """The slot of a chat: one message holds the gap, and the answer should begin with the target.

    messages: dicts with `role` and `content`; where the last one is the assistant's, the answer goes on from it
    (prefilling). Raises ValueError unless the chat as the template writes it holds the gap exactly once.
    """
    begun = messages[-1]["role"] == "assistant"
    written = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
    )
    if written.count(gap) != 1:
        raise ValueError(f"messages must hold {gap!r} exactly once, found it {written.count(gap)} times")
    start, end = written.split(gap)
    before, after, answered = _encode(tokenizer, [start, end, end + target])
    goes_on = answered[: len(after)] == after
    wanted = answered[len(after) :] if goes_on else _encode(tokenizer, [target])[0]
    return Slot(tuple(before), tuple(after), tuple(wanted), (start, end))


def fill(messages: Sequence[dict[str, str]], text: str, *, gap: str = GAP) -> list[dict[str, str]]:
    """The messages with a text in the gap, ready to be sent."""
    return [{**message, "content": message["content"].replace(gap, text)} for message in messages]


def perturbed(slot: Slot, n: int, *, rate: float, length: int, allowed: torch.Tensor, generator: torch.Generator) -> list[Slot]:
    """n copies of a prompt in which each token of the text and of the gap is replaced with probability `rate`.

    As one item they give the expectation over a defense that perturbs its input: an attack through smoothing. The first
    token stays, and so does what is not in `allowed` (a template's marks). length: of the gap.
    Raises ValueError for n below 1 or a rate outside [0, 1].
    """
    if n < 1 or not 0 <= rate <= 1:
        raise ValueError(f"n must be at least 1 and rate in [0, 1], got {n} and {rate}")
    words, copies = set(allowed.tolist()), []

    def swapped(ids: Sequence[int], keep: int = 0) -> list[int]:
        hit = (torch.rand(len(ids), generator=generator) < rate).tolist()
        new = allowed[torch.randint(len(allowed), (len(ids),), generator=generator)].tolist()
        return [b if h and a in words and i >= keep else a for i, (a, b, h) in enumerate(zip(ids, new, hit, strict=True))]

    for _ in range(n):
        gap = allowed[torch.randint(len(allowed), (length,), generator=generator)].tolist()
        hit = (torch.rand(length, generator=generator) < rate).nonzero()[:, 0].tolist()
        copies.append(
            replace(slot, before=tuple(swapped(slot.before, 1)), after=tuple(swapped(slot.after)), text=None,
                    swaps=tuple((place, gap[place]) for place in hit))
        )  # fmt: skip
    return copies


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def decode(tokenizer: Any, rows: Iterable[Sequence[int]]) -> list[str]:
    """The texts of rows of ids, exactly: no token left out and no space tidied up."""
    fast, lists = getattr(tokenizer, "backend_tokenizer", None), [list(row) for row in rows]
    if fast is not None:  # what `tokenizer.decode` does in the end; in some releases it takes ten times as long
        return fast.decode_batch(lists, skip_special_tokens=False)  # type: ignore[no-any-return]
    return [tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in lists]


def survives(tokenizer: Any, slots: Sequence[Slot], free: Sequence[Sequence[int]]) -> list[bool]:
    """For each slot and its filling: does the prompt, written out and tokenised anew, give the very same ids?

    What does not survive cannot be typed: the model would read other tokens than those that were searched.
    """
    whole = [slot.filled(ids) for slot, ids in zip(slots, free, strict=True)]
    written = decode(tokenizer, (ids if slot.text else all_ for slot, ids, all_ in zip(slots, free, whole, strict=True)))
    texts = [part.join(slot.text) if slot.text else part for slot, part in zip(slots, written, strict=True)]
    return [tuple(again) == ids for again, ids in zip(_encode(tokenizer, texts), whole, strict=True)]


def vocabulary(tokenizer: Any, size: int | None = None) -> torch.Tensor:
    """(n,) int64: the tokens a search may use by default, those that are no marks and survive on their own.

    size: ids from here on do not exist for the model.
    """
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    ids = [i for i in range(min(len(tokenizer), size or len(tokenizer))) if i not in special]
    texts = decode(tokenizer, ([i] for i in ids))
    again = _encode(tokenizer, texts)
    return torch.tensor([i for i, text, back in zip(ids, texts, again, strict=True) if back == [i] and text.strip()])


@dataclass(frozen=True, eq=False)
class Tokens:
    """Fillings of gaps. ids: (rows, length) int64. onehot: (rows, length, vocabulary) where a gradient is wanted."""

    ids: torch.Tensor
    onehot: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: torch.Tensor) -> Tokens:
        return Tokens(self.ids[rows], None if self.onehot is None else self.onehot[rows])

    def embedded(self, model: Any) -> torch.Tensor:
        """(rows, length, width): what a model reads. The gradient flows to the one-hot vectors."""
        layer = model.get_input_embeddings()
        embedded: torch.Tensor = layer(self.ids)
        if self.onehot is not None:  # adds nothing forwards: the layer may scale what it looks up
            embedded = embedded + (self.onehot - self.onehot.detach()) @ layer.weight
        return embedded

    def pick(self, scores: torch.Tensor) -> torch.Tensor:
        """(rows, length) of scores (rows, length, vocabulary): each token's own. The gradient sees the choice too."""
        if self.onehot is not None:
            return (scores * self.onehot).sum(-1)
        return scores.gather(-1, self.ids[..., None])[..., 0]


Objective = Callable[[Tokens, torch.Tensor], torch.Tensor]
"""What a search lowers: (tokens of `rows` fillings, items (rows,) they belong to) -> (rows,) losses.

`gcg` needs a gradient with respect to `tokens.onehot`; the other searches need numbers only. Objectives add up:
lambda tokens, items: target(tokens, items) + 0.1 * fluency(tokens, items).
"""


class Prompts:
    """The prompts of a search as one model reads them, each up to its gap once. Made anew when the weights change.

    items: one entry per search, a slot or several that share their tokens. batch_size: prompts in a forward pass.
    """

    def __init__(self, model: Any, items: Sequence[Item], *, batch_size: int = 256) -> None:
        groups = [[item] if isinstance(item, Slot) else list(item) for item in items]
        if not groups or not all(groups):
            raise ValueError("items must hold at least one item, and every item at least one slot")
        self.model, self.batch_size = model, batch_size
        self.slots = [slot for group in groups for slot in group]
        device, number = model.get_input_embeddings().weight.device, count()
        self.members = _padded([[next(number) for _ in group] for group in groups], -1).to(device)  # (items, most slots)
        self.last = torch.tensor([slot.before[-1:] for slot in self.slots], device=device)  # (S, 1)
        self.tail = _padded([slot.after + slot.target[:-1] for slot in self.slots], 0).to(device)  # (S, A)
        self.target = _padded([slot.target for slot in self.slots], -1).to(device)  # (S, T)
        self.after = torch.tensor([len(slot.after) for slot in self.slots], device=device)  # (S,)
        self.stem = torch.tensor([len(slot.before) - 1 for slot in self.slots], device=device)  # (S,)
        swaps = [tuple(dict(slot.swaps).get(i, -1) for i in range(_reach(slot))) for slot in self.slots]
        self.swaps = _padded(swaps, -1).to(device) if any(swaps) else None
        accepted = inspect.signature(model.forward).parameters
        self._masked = getattr(model.config, "_attn_implementation", None) in ("eager", "sdpa")  # who sees whom may be said
        self._keep = next((name for name in ("logits_to_keep", "num_logits_to_keep") if name in accepted), None)
        self._kept: tuple[Any, list[tuple[torch.Tensor, ...]]] | None = None
        self._seen: tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]] | None = None
        self._memory = self._read_stems(_padded([slot.before[:-1] for slot in self.slots], 0).to(device))

    @torch.no_grad()
    def _read_stems(self, stems: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of what stands before the gaps, (S, heads, P, width) each, a layer at a time.

        Padding stands behind the words: no word looks at it, and later readers are told not to.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        if not stems.shape[1]:
            return []
        with frozen(self.model):
            self.model(input_ids=stems, past_key_values=cache, use_cache=True, **({self._keep: 1} if self._keep else {}))
        return [(layer[0], layer[1]) for layer in cache]

    def _growing(self, slots: torch.Tensor) -> Any:
        """A cache of the usual kind that knows what stands before the gaps of these slots."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for number, (keys, values) in enumerate(self._memory):
            cache.update(keys[slots], values[slots], number)
        return cache

    def _recall(self, slots: torch.Tensor, room: int) -> Any:
        """A cache that knows what stands before the gaps of these slots.

        Keys and values are written into space that is kept for the next call: to copy all that stands before the gaps for
        every forward pass would take a third of a search's time.
        """
        key = (room, slots.tolist() if len(self.slots) > 1 else len(slots))
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # first free, then take
            self._kept = (key, [tuple(F.pad(part[slots], (0, 0, 0, room)) for part in pair) for pair in self._memory])
        return _written_into(self._kept[1], self._memory[0][0].shape[2])

    def read(
        self,
        tokens: Tokens,
        slots: torch.Tensor,
        *,
        tail: bool = True,
        logits_from: int = 0,
        remember: bool = False,
        **options: Any,
    ) -> Any:
        """The model's output over the rest of these prompts: the last token before the gap, the gap, what follows.

        tokens: fillings (r, L). slots: (r,) which prompts. tail: with what follows the gap and the target's tokens but
        the last, else the gap is the end. logits_from: the first place whose logits are needed. The logits at place k
        foretell the token at place k + 1 of this rest. remember: keep what the model makes of the gap for those that begin
        alike. options: passed on, such as output_hidden_states.
        """
        embed, free = self.model.get_input_embeddings(), tokens.embedded(self.model)
        if self.swaps is not None:
            swapped = self._swapped(tokens.ids, slots)
            free = torch.where((swapped != tokens.ids)[..., None], embed(swapped), free)
        end = self._end(slots) if tail else 0
        rest = torch.cat([embed(self.last[slots]), free, embed(self.tail[slots, :end])], dim=1)  # (r, 1 + L + A, width)
        stem, extra = self.stem[slots], dict(options)
        where = stem[:, None] + torch.arange(rest.shape[1], device=stem.device)  # (r, 1 + L + A)
        if self._memory and len(self.slots) > 1:
            there = torch.arange(self._memory[0][0].shape[2], device=stem.device) < stem[:, None]  # (r, P)
            if not there.all():
                extra["attention_mask"] = F.pad(there, (0, rest.shape[1]), value=True).long()
        if self._keep:
            extra[self._keep] = rest.shape[1] - logits_from
        remember = remember or torch.is_grad_enabled()  # the gradient is taken where most candidates begin
        cache = self._growing(slots) if remember or not self._memory else self._recall(slots, rest.shape[1])
        output = self.model(inputs_embeds=rest, position_ids=where, past_key_values=cache, use_cache=True, **extra)
        if remember:
            begin, asked = cache.get_seq_length() - rest.shape[1], torch.cat([slots[:, None], tokens.ids], 1)
            end = begin + asked.shape[1]
            self._seen = asked, [(layer[0][:, :, begin:end].detach(), layer[1][:, :, begin:end].detach()) for layer in cache]
        if not self._keep:
            output.logits = output.logits[:, logits_from:]
        return output

    def _swapped(self, ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """(r, L): the tokens in the gaps, after the slots' swaps."""
        if self.swaps is None:
            return ids
        swap = F.pad(self.swaps, (0, max(0, ids.shape[1] - self.swaps.shape[1])), value=-1)[slots, : ids.shape[1]]
        return torch.where(swap >= 0, swap, ids)

    def _end(self, slots: torch.Tensor) -> int:
        """How many tokens follow the gap at most, with the target's but the last."""
        return int((self.after + (self.target >= 0).sum(1) - 1)[slots].max())

    def on_target(
        self, tokens: Tokens, slots: torch.Tensor, value: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """(r,) value of the logits (r, T, vocabulary) that foretell the target, and of its tokens (r, T), -1 for padding."""
        after, target = self.after[slots], self.target[slots]
        target = target[:, : int((target >= 0).sum(1).max())]
        first = tokens.ids.shape[1] + int(after.min())
        if self._masked and not torch.is_grad_enabled():
            logits = self._read_together(tokens, slots, first)
        else:
            logits = self.read(tokens, slots, logits_from=first).logits
        if (after == after[0]).all():
            return value(logits[:, : target.shape[1]], target)
        places = (after - after.min())[:, None] + torch.arange(target.shape[1], device=after.device)
        places = places.clamp(max=logits.shape[1] - 1)  # (r, T); past the end there is only padding
        return value(logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1])), target)

    def _read_together(self, tokens: Tokens, slots: torch.Tensor, first: int) -> torch.Tensor:
        """(r, E - first, vocabulary) logits from place `first` on, as `read` gives them, for less.

        The fillings of a prompt sit side by side in few rows, and none sees another (tree attention). All see what is known:
        the prompt up to its gap, and of a gap read before as many tokens as those of a seat begin with.
        """
        from transformers import DynamicCache

        which, whose = torch.unique(slots, return_inverse=True)  # (s,), (r,)
        known, common = self._common(tokens.ids, which, whose)
        grid, prompts = _seated(whose, known)  # (R, seats), (R,)
        own, tail = self._swapped(tokens.ids, slots), self.tail[slots, : self._end(slots)]
        rest = torch.cat([self.last[slots], own, tail], 1)  # (r, E)
        begin = torch.where(grid < 0, first, known[grid]).amin(0)  # (seats,) from where on a seat is read
        places = [(seat, place) for seat, start in enumerate(begin.tolist()) for place in range(start, first)]
        asked = [(seat, place) for seat in range(len(begin)) for place in range(first, rest.shape[1])]
        seat, place = torch.tensor(places + asked, device=slots.device).T  # (M,) each: a row's tokens, the asked ones last

        cache, of = DynamicCache(), which[prompts]  # (R,) slots
        for layer, gap in enumerate(common):
            stem = self._memory[layer] if self._memory else tuple(part[:, :, :0] for part in gap)
            cache.update(*(torch.cat([s[of], g[prompts]], 2) for s, g in zip(stem, gap, strict=True)), layer)
        held = torch.arange(cache.get_seq_length(), device=of.device)  # (C,)
        in_gap = held - (len(held) - 1 - own.shape[1])  # (C,) its place, below 0 before the gap's rest
        stems = (in_gap < 0) & (held < self.stem[of, None])  # (R, C)
        gaps = (in_gap >= 0) & (in_gap < begin[seat, None])  # (M, C)
        selves = (seat[:, None] == seat) & (place[:, None] >= place)  # (M, M)
        sees = torch.cat([stems[:, None] | gaps, selves.expand(len(of), -1, -1)], 2)  # (R, M, C + M)
        dtype = self.model.get_input_embeddings().weight.dtype
        mask = torch.zeros(sees.shape, device=of.device, dtype=dtype).masked_fill(~sees, -torch.inf)

        output = self.model(
            input_ids=rest[grid[:, seat], place],  # (R, M); an empty seat reads another's tokens
            attention_mask=mask[:, None],
            position_ids=self.stem[of, None] + place,
            past_key_values=cache,
            use_cache=True,
            **({self._keep: len(asked)} if self._keep else {}),
        )
        logits = output.logits[:, -len(asked) :].unflatten(1, (len(begin), -1))[grid >= 0]  # (r, E - first, vocabulary)
        sorted_back: torch.Tensor = logits[grid[grid >= 0].argsort()]
        return sorted_back

    def _common(
        self, ids: torch.Tensor, which: torch.Tensor, whose: torch.Tensor
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """How much of what was read last each filling begins with, and what a model made of that.

        ids: (r, L). which: (s,) slots. whose: (r,) index into these. Returns (r,) places from 0 to L, and keys and values
        (s, heads, 1 + L, width) of the last token before the gap and of the gap, a layer at a time. The fillings of a step
        differ in one token each; where those read last are of little use, their most frequent tokens are read.
        """
        length = ids.shape[1]

        def shared(gaps: torch.Tensor) -> torch.Tensor:  # (s, L) -> (r,)
            return (1 + (ids == gaps[whose]).long().cumprod(1).sum(1)).clamp(max=length)

        usual = torch.stack([ids[whose == i].mode(0).values for i in range(len(which))])  # (s, L)
        seen = self._seen
        if (
            seen is None
            or seen[0].shape != (len(which), 1 + length)
            or not torch.equal(seen[0][:, 0], which)
            or shared(usual).sum() - shared(seen[0][:, 1:]).sum() > 2 * usual.numel()
        ):
            self.read(Tokens(usual), which, tail=False, logits_from=length, remember=True)
            seen = self._seen
        assert seen is not None
        return shared(seen[0][:, 1:]), seen[1]

    def per_item(
        self, tokens: Tokens, items: torch.Tensor, value: Callable[[Tokens, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """(rows, ...) mean over the slots of each row's item of value(tokens (r,), slots (r,)) -> (r, ...)."""
        members = self.members[items]  # (rows, most slots)
        row, place = (members >= 0).nonzero(as_tuple=True)
        slots = members[row, place]
        with frozen(self.model):
            parts = [value(tokens[row[part]], slots[part]) for part in torch.split(torch.arange(len(row)), self.batch_size)]
        values = torch.cat(parts)
        sums = values.new_zeros(len(items), *values.shape[1:]).index_add(0, row, values)
        return sums / (members >= 0).sum(1).view(-1, *[1] * (values.ndim - 1))


def _written_into(spaces: list[tuple[torch.Tensor, ...]], begin: int) -> Any:
    """A cache of `begin` tokens that writes what is added behind them, into the spaces, instead of copying it all.

    spaces: keys and values (r, heads, P, width) of a layer at a time.
    """
    from transformers import DynamicCache

    class Written(DynamicCache):  # type: ignore[misc]
        def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            end = begin + keys.shape[2]
            for space, new in zip(spaces[layer_idx], (keys, values), strict=True):
                space[:, :, begin:end] = new
            return tuple(space[:, :, :end] for space in spaces[layer_idx])

    cache, length = Written(), spaces[0][0].new_zeros(1, 1, begin, 1)
    for number in range(len(spaces)):
        DynamicCache.update(cache, length, length, number)  # all that is asked of it is how long it is
    return cache


def target_loss(prompts: Prompts) -> Objective:
    """Mean negative log-likelihood of the target after the prompt [zou2023gcg, eq. 3]."""

    def value(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        losses = F.cross_entropy(logits.transpose(1, 2), target, ignore_index=-1, reduction="none")  # (r, T)
        return losses.sum(1) / (target >= 0).sum(1)

    return lambda tokens, items: prompts.per_item(tokens, items, lambda t, s: prompts.on_target(t, s, value))


def fluency_loss(prompts: Prompts) -> Objective:
    """Mean negative log-likelihood of the free tokens themselves: the logarithm of their perplexity after the prompt."""

    def value(tokens: Tokens, slots: torch.Tensor) -> torch.Tensor:
        scores = prompts.read(tokens, slots, tail=False).logits[:, :-1].log_softmax(-1)  # (r, L, vocabulary)
        losses: torch.Tensor = -tokens.pick(scores).sum(1) / max(1, scores.shape[1])  # an empty gap is no surprise
        return losses

    return lambda tokens, items: prompts.per_item(tokens, items, value)


def activation_loss(prompts: Prompts, read: Callable[[torch.Tensor], torch.Tensor], *, layer: int) -> Objective:
    """A loss on what the model thinks at the end of the prompt, where the answer begins.

    read: hidden states (r, width) -> (r,) to lower, such as a probe's score or a projection on a refusal direction.
    layer: index into the model's hidden states, 0 for the embeddings.
    """

    def value(tokens: Tokens, slots: torch.Tensor) -> torch.Tensor:
        states = prompts.read(tokens, slots, output_hidden_states=True).hidden_states[layer]  # (r, 1 + L + A, width)
        end = tokens.ids.shape[1] + prompts.after[slots]
        return read(states[torch.arange(len(slots), device=states.device), end])

    return lambda tokens, items: prompts.per_item(tokens, items, value)


def _seated(whose: torch.Tensor, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fillings (r,) of the prompts `whose`, in rows of at most `TOGETHER`: (R, seats) which ones, -1 for none; (R,) of whom.

    Those in a seat know about as much, so that what is left of them is about as long.
    """
    seated: list[list[int]] = []
    prompts: list[int] = []
    for prompt in range(int(whose.max()) + 1):
        those = (whose == prompt).nonzero()[:, 0]
        here = those[known[those].argsort()].tolist()
        rows = -(-len(here) // TOGETHER)
        seated += [here[row::rows] for row in range(rows)]
        prompts += [prompt] * rows
    return _padded(seated, -1).to(whose.device), torch.tensor(prompts, device=whose.device)


def _reach(slot: Slot) -> int:
    return max((place + 1 for place, _ in slot.swaps), default=0)


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """(rows, longest) int64, short rows filled up with the value."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.int64).view(len(rows), longest)
