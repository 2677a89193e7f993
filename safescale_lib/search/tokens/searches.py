"""The searches: by gradient (GCG), by evolution, by growing likely text, by random substitution, and blind guessing.

All take the same items, spend a budget of `steps` rounds of `candidates` each, and return the same result. After every
step the step's winner is shown to the criterion, and a finished item leaves. A filling counts only if the prompt,
written out and tokenised anew, gives the very ids that were scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, compress, islice
from numbers import Integral
from typing import Any

import torch

from safescale_lib.measure.costs import Cost, Meter
from safescale_lib.measure.criteria import Verdicts
from safescale_lib.search.tokens.prompts import (
    Item,
    Objective,
    Prompts,
    Slot,
    Tokens,
    decode,
    survives,
    target_loss,
    vocabulary,
)

Row = tuple[int, ...]
Criterion = Callable[[torch.Tensor, list[Row]], torch.Tensor]
"""When an item is broken: (items (b,), the ids in their gaps) -> (b,) bool. See `target_reached` and `by_text`."""

NEAR = 8  # tokens on each side of the gap with which a candidate is checked before it is scored
POOL = 8  # candidates drawn for one that is scored: some may not survive being typed


@dataclass(frozen=True, eq=False)
class TokenAttack(Verdicts):
    """What a search over tokens returns for N items.

    ids, texts: N fillings of the gap: the one that met the criterion, else the one with the lowest loss. loss: (N,) of
    these. success: (N,) bool, the criterion's verdict on them. skipped: (N,) bool, items that met it with an empty gap.
    steps: (N,) int64 steps taken. history: (most steps + 1, N) lowest loss so far, the start first.
    cost: one forward (or query, for a search without gradients) for each candidate and prompt; the criterion's questions
    count as queries. An objective that asks several models spends that many times as much.
    """

    ids: tuple[Row, ...]
    texts: tuple[str, ...]
    loss: torch.Tensor
    success: torch.Tensor
    skipped: torch.Tensor
    steps: torch.Tensor
    history: torch.Tensor
    cost: Cost

    def broken_within(self, steps: int) -> torch.Tensor:
        """(N,) bool: broken by that many steps."""
        return self.success & (self.steps <= steps)


def target_reached(prompts: Prompts) -> Criterion:
    """The target is what greedy decoding gives, in every prompt of the item."""

    def value(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return ((logits.argmax(-1) == target) | (target < 0)).all(1).float()

    @torch.no_grad()
    def reached(items: torch.Tensor, ids: list[Row]) -> torch.Tensor:
        found = torch.zeros(len(ids))
        for rows in _by_length(ids):
            tokens = Tokens(torch.tensor([ids[i] for i in rows], device=items.device, dtype=torch.int64))
            found[rows] = prompts.per_item(tokens, items[rows], lambda t, s: prompts.on_target(t, s, value)).cpu()
        return found > 1 - 1e-6

    return reached


def by_text(tokenizer: Any, verdict: Callable[[torch.Tensor, list[str]], Any]) -> Criterion:
    """A criterion on what is typed into the gap: verdict(items (b,), texts) -> (b,) booleans, say a judge of the answers."""
    return lambda items, ids: torch.as_tensor(verdict(items, decode(tokenizer, ids)), dtype=torch.bool)


def gcg(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    criterion: Criterion | None = None,
    *,
    length: int = 10,
    init: Sequence[int] | Sequence[Sequence[int]] | None = None,
    steps: int = 50,
    candidates: int = 64,
    topk: int = 64,
    objective: Objective | None = None,
    draft: Objective | None = None,
    allowed: torch.Tensor | None = None,
    early_stop: bool = True,
    batch_size: int = 256,
    generator: torch.Generator,
) -> TokenAttack:
    """Greedy coordinate gradient: one token a step, chosen by gradient and then by trying [zou2023gcg, alg. 1, 2].

    White-box. items: what gets tokens of its own, a `Slot` or several that share them (universal); all items are searched
    side by side. criterion: default, the target is the greedy answer. length: free tokens, drawn at random; init: a start
    instead, one for all or one each. candidates: substitutions tried a step, all different (the paper's batch size B).
    topk: best tokens a place by gradient. objective: what falls, default `target_loss`. draft: a cheaper objective that
    sees all candidates, while the real one sees the most promising only (probe sampling [zhao2024probe]). allowed: (n,)
    ids that may be used, default `vocabulary`. early_stop: an item leaves when its criterion is met. batch_size: prompts a
    forward pass. As in the paper a step's winner is taken even where it is worse; what is returned is the best seen.
    Raises TypeError or ValueError naming the bad argument.
    """
    _guard(steps=(steps, 0), candidates=(candidates, 1), topk=(topk, 1))
    run = _Run(model, tokenizer, items, criterion, objective, allowed, early_stop, batch_size, generator)
    ids = run.begin(length, init)  # a row for each item that is left
    for step in range(steps):
        if not ids:
            break
        dice = run.dice(step)
        slope = run.gradient(ids)  # (b, L, vocabulary): of the loss, with respect to the one-hot tokens
        best = slope.topk(min(topk, slope.shape[-1]), largest=False)  # (b, L, topk)
        pools = _substitutions(ids, best.indices, best.values.isfinite(), dice, POOL * candidates)
        masks = run.surviving(pools, candidates)
        losses = run.score(pools, masks) if draft is None else _probed(run, draft, pools, masks, dice)
        rows, lowest = run.winners(pools, losses, ids)
        ids = list(compress(rows, run.advance(rows, lowest)))
    return run.result(white=True)


def greedy_random(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    criterion: Criterion | None = None,
    *,
    length: int = 10,
    init: Sequence[int] | Sequence[Sequence[int]] | None = None,
    steps: int = 50,
    candidates: int = 64,
    objective: Objective | None = None,
    allowed: torch.Tensor | None = None,
    early_stop: bool = True,
    batch_size: int = 256,
    generator: torch.Generator,
) -> TokenAttack:
    """Hill climbing by random substitution: GCG without its gradient, from scores alone [andriushchenko2024adaptive].

    A step tries `candidates` random changes of one token and keeps the best if it is better. Arguments as for `gcg`.
    """
    _guard(steps=(steps, 0), candidates=(candidates, 1))
    run = _Run(model, tokenizer, items, criterion, objective, allowed, early_stop, batch_size, generator)
    ids = run.begin(length, init)
    for step in range(steps):
        if not ids:
            break
        dice = run.dice(step)
        anything = run.allowed.expand(len(ids), len(ids[0]), -1)  # (b, L, n)
        pools = _substitutions(ids, anything, torch.ones_like(anything, dtype=torch.bool), dice, POOL * candidates)
        rows, lowest = run.winners(pools, run.score(pools, run.surviving(pools, candidates)), ids)
        better = (lowest < run.lowest[run.live]).tolist()
        ids = [row if won else old for row, old, won in zip(rows, ids, better, strict=True)]
        ids = list(compress(ids, run.advance(rows, lowest)))
    return run.result()


def random_tokens(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    criterion: Criterion | None = None,
    *,
    length: int = 10,
    steps: int = 50,
    candidates: int = 64,
    objective: Objective | None = None,
    allowed: torch.Tensor | None = None,
    early_stop: bool = True,
    batch_size: int = 256,
    generator: torch.Generator,
) -> TokenAttack:
    """The control of every search over tokens: fresh random fillings, nothing learned. Arguments as for `gcg`.

    With the same steps and candidates it spends as many scores and shows the criterion as many fillings; with
    candidates = 1 every filling is shown.
    """
    _guard(steps=(steps, 0), candidates=(candidates, 1))
    run = _Run(model, tokenizer, items, criterion, objective, allowed, early_stop, batch_size, generator)
    ids = run.begin(length, None)
    for step in range(steps):
        if not ids:
            break
        pools = run.random_rows(run.dice(step), length, POOL * candidates)
        rows, lowest = run.winners(pools, run.score(pools, run.surviving(pools, candidates)), ids)
        ids = list(compress(rows, run.advance(rows, lowest)))
    return run.result()


def beam(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    criterion: Criterion | None = None,
    *,
    length: int = 10,
    beams: int = 8,
    candidates: int = 64,
    temperature: float = 1.0,
    objective: Objective | None = None,
    allowed: torch.Tensor | None = None,
    early_stop: bool = True,
    batch_size: int = 256,
    generator: torch.Generator,
) -> TokenAttack:
    """Beam search that grows likely text: tokens are drawn from the model's own next-token distribution [sadasivan2024beast].

    A step lengthens each of the `beams` best beginnings by tokens drawn without repetition, `candidates` in all, and keeps
    those after which the objective is lowest. temperature: below 1 for more fluent text. A step is a token, so `length` is
    the number of steps; the filling returned may be shorter. Other arguments as for `gcg`; no gradients are needed.
    """
    _guard(length=(length, 0), beams=(beams, 1), candidates=(candidates, 1))
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")
    run = _Run(model, tokenizer, items, criterion, objective, allowed, early_stop, batch_size, generator)
    grown: list[list[Row]] = [[row] for row in run.begin(0, None)]  # of each item that is left, the best beginnings
    for step in range(length):
        if not grown:
            break
        dice, pools = run.dice(step), []
        noise = dice(beams, len(run.allowed)).clamp(1e-12, 1 - 1e-7)  # (b, beams, n)
        gumbel = -torch.log(-torch.log(noise))  # the top of log-probabilities + gumbel: a draw without repetition
        for rows, scores, g in zip(grown, run.next_scores(grown), gumbel, strict=True):
            each = min(-(-candidates // len(rows)), len(run.allowed))
            drawn = run.allowed[(scores / temperature + g[: len(rows)]).topk(each).indices].tolist()  # (beams, each)
            pools.append([(*row, token) for row, tokens in zip(rows, drawn, strict=True) for token in tokens])
        losses = run.score(pools, run.surviving(pools, candidates))
        kept = [
            [pool[i] for i in loss.argsort()[:beams].tolist() if loss[i] < float("inf")] or rows
            for pool, loss, rows in zip(pools, losses, grown, strict=True)
        ]
        grown = list(compress(kept, run.advance(*run.winners(pools, losses, [rows[0] for rows in grown]))))
    return run.result()


def genetic(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    criterion: Criterion | None = None,
    *,
    length: int = 10,
    phrases: Sequence[Sequence[Sequence[int]]] | None = None,
    steps: int = 20,
    candidates: int = 32,
    elite: float = 0.1,
    mutation: float | None = None,
    objective: Objective | None = None,
    allowed: torch.Tensor | None = None,
    early_stop: bool = True,
    batch_size: int = 256,
    generator: torch.Generator,
) -> TokenAttack:
    """Genetic search over tokens or over the phrases of a template, after AutoDAN [liu2024autodan].

    phrases: for each place of a template, the token sequences that may stand there; the first of each make the prototype,
    the start, of which the first generation are variants. Without, a place is one of `length` tokens. candidates: size of a
    generation; a step is a generation. elite: share that passes on as it is; other parents are drawn with the softmax of
    their score, and a child takes every place from either parent. mutation: chance of a place to be drawn anew, default
    one place a child. Other arguments as for `gcg`; a score is enough, no gradients are needed.
    """
    _guard(steps=(steps, 0), candidates=(candidates, 2), length=(length, 1))
    run = _Run(model, tokenizer, items, criterion, objective, allowed, early_stop, batch_size, generator)
    options: list[list[Row]] = [[(token,) for token in run.allowed.tolist()]] * length
    if phrases is not None:
        options = [[tuple(phrase) for phrase in place] for place in phrases]
    if not options or not all(options):
        raise ValueError("phrases must have at least one place, and every place at least one phrase")
    rate, places = 1 / len(options) if mutation is None else mutation, len(options)
    for name, share in (("elite", elite), ("mutation", rate)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {share}")
    elites, sizes = min(round(elite * candidates), candidates - 1), torch.tensor([len(o) for o in options])

    def spelled(genes: torch.Tensor) -> list[list[Row]]:
        """(b, p, places): which option stands where -> of each item, of each individual, its tokens."""
        return [[_joined(o[g] for o, g in zip(options, one, strict=True)) for one in many] for many in genes.tolist()]

    run.begin(length, None if phrases is None else _joined(o[0] for o in options))
    dice = run.dice(-2)
    genes = (dice(candidates, places) * sizes).long()  # (b, p, places): the first generation
    if phrases is not None:
        genes = torch.where(dice(candidates, places) < 2 * rate, genes, 0)
        genes[:, 0] = 0
    fitness = torch.empty(len(genes), 0)  # (b, elites): known losses of those who come first among the genes
    for step in range(steps):
        if not len(genes):
            break
        dice, fresh = run.dice(step), spelled(genes[:, fitness.shape[1] :])
        losses = run.score(fresh, run.surviving(fresh, candidates))
        left = run.advance(*run.winners(fresh, losses, [rows[0] for rows in fresh]))
        genes, fitness = genes[left], torch.cat([fitness, torch.stack(losses)], 1)[left]  # (b, p, places), (b, p)
        chance = torch.softmax(-fitness.clamp(max=1e6), 1).cumsum(1)
        parents = torch.searchsorted(chance, dice(2 * (candidates - elites))).clamp(max=candidates - 1)
        mothers, fathers = _take(genes, parents).chunk(2, 1)
        children = torch.where(dice(candidates - elites, places) < 0.5, mothers, fathers)
        anew = (dice(candidates - elites, places) * sizes).long()
        children = torch.where(dice(candidates - elites, places) < rate, anew, children)
        best = fitness.argsort(1)[:, :elites]
        genes, fitness = torch.cat([_take(genes, best), children], 1), fitness.gather(1, best)
    return run.result()


class _Run:
    """The book-keeping that the searches share: who is still searched, what was best, what it cost.

    A pool is what one item may try, candidates in order; pools and all else stand in the order of `live`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        items: Sequence[Item],
        criterion: Criterion | None,
        objective: Objective | None,
        allowed: torch.Tensor | None,
        early_stop: bool,
        batch_size: int,
        generator: torch.Generator,
    ) -> None:
        _guard(batch_size=(batch_size, 1))
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
        table = model.get_input_embeddings().weight
        self.size, self.device = len(table), table.device
        self.allowed = vocabulary(tokenizer, self.size) if allowed is None else torch.unique(torch.as_tensor(allowed))
        if not len(self.allowed) or self.allowed.min() < 0 or self.allowed.max() >= self.size:
            raise ValueError(f"allowed must hold token ids from 0 to {self.size - 1}, and at least one")
        self.prompts, self.tokenizer = Prompts(model, items, batch_size=batch_size), tokenizer
        self.objective = objective or target_loss(self.prompts)
        self.criterion, self.early_stop = criterion or target_reached(self.prompts), early_stop
        self.slots = [[item] if isinstance(item, Slot) else list(item) for item in items]
        self.near: list[list[Slot]] = self.slots
        self.meter, self.seed = Meter(), int(torch.randint(2**31 - 2**20, (1,), generator=generator)) + 2
        n = len(self.slots)
        self.live = torch.arange(n)
        self.ids: list[Row] = [()] * n
        self.loss, self.lowest = torch.full((n,), torch.inf), torch.full((n,), torch.inf)
        self.success, self.steps = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int64)
        self.skipped = self.success.clone()
        self.history: list[torch.Tensor] = []

    def dice(self, step: int) -> Callable[..., torch.Tensor]:
        """Random numbers of a step, (b, *shape) in [0, 1): what an item gets does not depend on who else is left."""
        source = torch.Generator().manual_seed(self.seed + step)
        return lambda *shape: torch.rand(len(self.slots), *shape, generator=source)[self.live]

    def random_rows(self, dice: Callable[..., torch.Tensor], length: int, count: int) -> list[list[Row]]:
        drawn = self.allowed[(dice(count, length) * len(self.allowed)).long()]  # (b, count, length)
        return [list(map(tuple, rows)) for rows in drawn.tolist()]

    def begin(self, length: int, init: Any) -> list[Row]:
        """Everybody's start, judged; the rows of those who are left."""
        n = len(self.slots)
        if init is None:
            _guard(length=(length, 0))
            pools = self.random_rows(self.dice(-1), length, 1024 if length else 1)
        else:
            given = init.tolist() if isinstance(init, torch.Tensor) else list(init)
            nested = bool(given) and isinstance(given[0], Sequence)
            rows = [tuple(map(int, row)) for row in (given if nested else [given] * n)]
            if len(rows) != n or len(set(map(len, rows))) != 1:
                raise ValueError(f"init must be one row of tokens, or one for each of the {n} items, all of one length")
            if any(not 0 <= token < self.size for row in rows for token in row):
                raise ValueError(f"init must hold token ids from 0 to {self.size - 1}")
            pools = [[row] for row in rows]
        masks = self.surviving(pools, 1)
        for item, mask in enumerate(masks):
            if not mask.any():
                raise ValueError(
                    f"init must survive being written out and tokenised anew: for item {item} the model would read other "
                    "tokens; choose a start that does, or a narrower `allowed`"
                )
        starts = [pool[int(mask.nonzero()[0])] for pool, mask in zip(pools, masks, strict=True)]
        self.near = [[self._near(slot, row) for slot in slots] for slots, row in zip(self.slots, starts, strict=True)]
        self.skipped = self._asked([()] * n)
        losses = torch.stack(self.score([[row] for row in starts], [torch.ones(1, dtype=torch.bool)] * n))[:, 0]
        left = self.advance(starts, losses)
        self.success &= ~self.skipped
        self.steps.zero_()
        left &= ~self.skipped
        self.live = left.nonzero()[:, 0]
        return list(compress(starts, left))

    def _near(self, slot: Slot, start: Row) -> Slot:
        """The neighbourhood of the gap, with which candidates are checked; all of the prompt where that does not do."""
        near = Slot(slot.before[-NEAR:], slot.after[:NEAR], slot.target)
        shorter = len(near.filled(())) < len(slot.filled(()))
        return near if shorter and survives(self.tokenizer, [near], [start])[0] else slot

    def surviving(self, pools: Sequence[Sequence[Row]], width: int) -> list[torch.Tensor]:
        """Of each pool, which are the first `width` candidates that survive being typed next to the gap."""
        good, near = [[False] * len(pool) for pool in pools], [self.near[item] for item in self.live.tolist()]
        for first in range(0, max(map(len, pools), default=0), width):
            wanting = [i for i, each in enumerate(good) if sum(each) < width]
            asked = [(i, place) for i in wanting for place in range(first, min(first + width, len(pools[i])))]
            if not asked:
                break
            slots = [slot for i, _ in asked for slot in near[i]]
            passed = iter(survives(self.tokenizer, slots, [pools[i][place] for i, place in asked for _ in near[i]]))
            for i, place in asked:
                good[i][place] = all(list(islice(passed, len(near[i]))))
        masks = [torch.tensor(each, dtype=torch.bool) for each in good]
        return [mask & (mask.cumsum(0) <= width) for mask in masks]

    @torch.no_grad()
    def score(
        self, pools: Sequence[Sequence[Row]], masks: Sequence[torch.Tensor], objective: Objective | None = None
    ) -> list[torch.Tensor]:
        """Of each pool, (len(pool),) losses, inf where the mask is false."""
        items, losses = self.live.tolist(), [[float("inf")] * len(pool) for pool in pools]
        asked = [(i, place) for i, mask in enumerate(masks) for place in mask.nonzero()[:, 0].tolist()]
        for rows in _by_length([pools[i][place] for i, place in asked]):
            group = [asked[row] for row in rows]
            tokens = torch.tensor([pools[i][place] for i, place in group], dtype=torch.int64, device=self.device)
            owners = torch.tensor([items[i] for i, _ in group], device=self.device)
            found = (objective or self.objective)(Tokens(tokens.view(len(group), -1)), owners)
            for (i, place), loss in zip(group, found.tolist(), strict=True):
                losses[i][place] = loss
            self.meter.forwards += sum(len(self.slots[items[i]]) for i, _ in group)
        return [torch.tensor(one) for one in losses]

    @torch.enable_grad()
    def gradient(self, ids: list[Row]) -> torch.Tensor:
        """(b, L, vocabulary) slope of the loss along each token, inf for the one that stands there and for the forbidden."""
        tokens = torch.tensor(ids, dtype=torch.int64, device=self.device)  # (b, L)
        weight = self.prompts.model.get_input_embeddings().weight
        onehot = torch.zeros(*tokens.shape, self.size, dtype=weight.dtype, device=self.device)
        onehot = onehot.scatter(2, tokens[..., None], 1.0).requires_grad_(True)
        loss = self.objective(Tokens(tokens, onehot), self.live.to(self.device)).sum()
        (slope,) = torch.autograd.grad(loss, onehot)
        prompts = sum(len(self.slots[item]) for item in self.live.tolist())
        self.meter.forwards += prompts
        self.meter.backwards += prompts
        allowed = torch.full_like(slope, torch.inf)
        allowed[..., self.allowed] = slope[..., self.allowed]
        return allowed.scatter(2, tokens[..., None], torch.inf).float().cpu()

    @torch.no_grad()
    def next_scores(self, grown: Sequence[Sequence[Row]]) -> list[torch.Tensor]:
        """Of each item, (its beginnings, n) log-probabilities of the allowed tokens after them; a mean over its prompts."""
        rows = [row for many in grown for row in many]
        owners = torch.tensor([i for i, many in zip(self.live.tolist(), grown, strict=True) for _ in many])
        scores = torch.empty(len(rows), len(self.allowed))

        def value(tokens: Tokens, slots: torch.Tensor) -> torch.Tensor:
            logits = self.prompts.read(tokens, slots, tail=False, logits_from=tokens.ids.shape[1]).logits
            return logits[:, 0].log_softmax(-1)[:, self.allowed].float()  # type: ignore[no-any-return]

        self.meter.forwards += sum(len(self.slots[i]) for i in owners.tolist())
        for group in _by_length(rows):  # where nothing survived, a beginning stays shorter than others
            ids = torch.tensor([rows[i] for i in group], dtype=torch.int64, device=self.device).view(len(group), -1)
            scores[group] = self.prompts.per_item(Tokens(ids), owners[group].to(self.device), value).cpu()
        return list(torch.split(scores, [len(many) for many in grown]))

    def winners(
        self, pools: Sequence[Sequence[Row]], losses: Sequence[torch.Tensor], otherwise: Sequence[Row]
    ) -> tuple[list[Row], torch.Tensor]:
        """Each pool's best candidate whose whole prompt survives, and its loss; where none does, `otherwise` and inf."""
        rows, lowest = list(otherwise), torch.full((len(pools),), torch.inf)
        for i, (item, pool, loss) in enumerate(zip(self.live.tolist(), pools, losses, strict=True)):
            slots = self.slots[item]
            for place in loss.argsort().tolist():
                if loss[place] == torch.inf:
                    break
                if self.near[item] == slots or all(survives(self.tokenizer, slots, [pool[place]] * len(slots))):
                    rows[i], lowest[i] = pool[place], loss[place]
                    break
        return rows, lowest

    def advance(self, rows: Sequence[Row], losses: torch.Tensor) -> torch.Tensor:
        """A step is done: these rows are its winners. Returns (b,) bool, who goes on."""
        items = self.live
        met = self._asked(rows) & losses.isfinite() if self.early_stop else torch.zeros(len(items), dtype=torch.bool)
        for item, row, loss, hit in zip(items.tolist(), rows, losses, met.tolist(), strict=True):
            if hit or loss < self.lowest[item]:
                self.ids[item], self.loss[item] = row, loss
        self.lowest[items] = torch.minimum(self.lowest[items], losses)
        self.success[items], self.steps[items] = met, self.steps[items] + 1
        self.history.append(self.lowest.clone())
        self.live = items[~met]
        return ~met

    def _asked(self, rows: Sequence[Row]) -> torch.Tensor:
        """(b,) bool, the criterion's verdict on rows of the items that are left."""
        self.meter.queries += sum(len(self.slots[item]) for item in self.live.tolist())
        return torch.as_tensor(self.criterion(self.live.to(self.device), list(rows))).bool().cpu()

    def result(self, *, white: bool = False) -> TokenAttack:
        """white: the search looked inside; else its forwards were queries."""
        if not self.early_stop:
            self.live = (~self.skipped).nonzero()[:, 0]
            if len(self.live):
                self.success[self.live] = self._asked([self.ids[item] for item in self.live.tolist()])
        cost = self.meter.cost
        if not white:
            cost = Cost(queries=cost.queries + cost.forwards, seconds=cost.seconds)
        texts = tuple(decode(self.tokenizer, self.ids))
        history = torch.stack(self.history)
        return TokenAttack(tuple(self.ids), texts, self.loss, self.success, self.skipped, self.steps, history, cost)


def _substitutions(
    ids: Sequence[Row], tokens: torch.Tensor, usable: torch.Tensor, dice: Callable[..., torch.Tensor], most: int
) -> list[list[Row]]:
    """Of each row, at most so many copies with one token changed, all different, in random order.

    tokens, usable: (b, L, k), what may stand at a place and whether it really may.
    """
    b, _, k = tokens.shape
    real = usable & (tokens != torch.tensor(ids)[..., None])
    rank = torch.where(real.flatten(1), dice(real[0].numel()), -1.0)
    order = rank.topk(min(most, rank.shape[1])).indices  # (b, most)
    chosen, good = tokens.flatten(1).gather(1, order).tolist(), (rank.gather(1, order) >= 0).tolist()
    return [
        [
            (*row[: i // k], token, *row[i // k + 1 :])
            for i, token, fine in zip(order[r].tolist(), chosen[r], good[r], strict=True)
            if fine
        ]
        for r, row in zip(range(b), ids, strict=True)
    ]


def _probed(
    run: _Run, draft: Objective, pools: list[list[Row]], masks: list[torch.Tensor], dice: Callable[..., torch.Tensor]
) -> list[torch.Tensor]:
    """Losses where the draft and a probe set say they are worth having, else inf [zhao2024probe].

    The draft scores all. The model scores a random sixteenth; the better the two agree on it, the fewer of the draft's
    best the model is asked about as well: (1 - agreement) / 8 of all.
    """
    guesses, lots = run.score(pools, masks, draft), dice(max(map(len, pools)))
    probes = [_smallest(lot[: len(mask)], mask, int(mask.sum()) // 16) for lot, mask in zip(lots, masks, strict=True)]
    seen = run.score(pools, probes)
    promising = []
    for guess, loss, probe, mask in zip(guesses, seen, probes, masks, strict=True):
        ranks = torch.stack([values[probe].argsort().argsort().double() for values in (guess, loss)])
        agreement = (1 + float(torch.corrcoef(ranks)[0, 1].nan_to_num(nan=-1.0))) / 2  # Spearman's, in [0, 1]
        promising.append(_smallest(guess, mask, int((1 - agreement) * int(mask.sum()) / 8)) & ~probe)
    more = run.score(pools, promising)
    return [torch.minimum(*both) for both in zip(seen, more, strict=True)]


def _smallest(values: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
    """Of the values where the mask is true the `count` smallest, at least one: as a mask."""
    places = torch.where(mask, values, torch.inf).argsort()[: max(1, count)]
    return torch.zeros_like(mask).index_fill(0, places, True) & mask


def _joined(parts: Iterable[Row]) -> Row:
    return tuple(chain.from_iterable(parts))


def _take(genes: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """genes (b, p, places), which (b, q) -> (b, q, places)."""
    return genes.gather(1, which[..., None].expand(-1, -1, genes.shape[2]))


def _by_length(rows: Sequence[Row]) -> list[list[int]]:
    """Positions of the rows, those of one length together."""
    groups: dict[int, list[int]] = {}
    for position, row in enumerate(rows):
        groups.setdefault(len(row), []).append(position)
    return list(groups.values())


def _guard(**counts: tuple[int, int]) -> None:
    for name, (count, least) in counts.items():
        if not isinstance(count, Integral) or count < least:
            raise ValueError(f"{name} must be a whole number >= {least}, got {count!r}")
