"""Attacks through the answers alone: scores (Square), labels (HopSkipJump), and the blind guess both must beat.

The attacker sends pictures and reads answers; what counts is how many it sends. Every search here counts its queries
per item and shows the model only pictures that a file can hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from safescale_lib.measure.costs import Cost, Meter
from safescale_lib.measure.criteria import Criterion
from safescale_lib.search.ball import Ball, per_item
from safescale_lib.search.models import Model
from safescale_lib.search.objectives import Objective, margin
from safescale_lib.search.pixels import PixelAttack, _best_of, _guard


@dataclass(frozen=True, eq=False)
class QueryAttack(PixelAttack):
    """A pixel attack that saw answers only.

    queries: (N,) int64, answers the search asked for about each item; the clean picture and the final check are not
    among them but stand in `cost`. trace: (rounds, N) best distance after each round, for a search that shrinks it.
    """

    queries: torch.Tensor
    trace: torch.Tensor | None = None

    def broken_within(self, queries: int) -> torch.Tensor:
        """(N,) bool: broken by that many queries. Its mean over the attempted is a point of the success-query curve."""
        return self.success & (self.queries <= queries)


def _asked(found: PixelAttack, queries: torch.Tensor, trace: torch.Tensor | None = None) -> QueryAttack:
    """The result of a search without gradients: what it calls forwards were queries."""
    cost = Cost(queries=found.cost.forwards, seconds=found.cost.seconds)
    return QueryAttack(found.images, found.success, found.skipped, found.distance, cost, queries, trace)


def _seed(generator: torch.Generator) -> int:
    """A seed of the search's own: what it draws for an item then depends neither on the batch nor on the others' fate."""
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    return int(torch.randint(2**31, (1,), generator=generator))


def _ask_in_turn(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    ball: Ball,
    propose: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    queries: int,
    objective: Objective,
    batch_size: int,
) -> QueryAttack:
    """Random search: one proposal a step for every live item, kept if the objective rose; broken items leave.

    propose(step, rows (b,), best (b, C, H, W)) -> what to ask next about the items in these rows.
    """
    spent = torch.zeros(len(images), dtype=torch.int64, device=images.device)

    @torch.no_grad()
    def search(rows: torch.Tensor, start: torch.Tensor, meter: Meter) -> torch.Tensor:
        done, best, live = start.clone(), start, torch.arange(len(rows), device=rows.device)
        value = start.new_full((len(rows),), float("-inf"))
        for step in range(queries):
            asked = propose(step, rows[live], best)
            logits = model(asked)
            meter.forwards += len(asked)
            spent[rows[live]] += 1
            new, met = objective(criterion, logits, rows[live]), criterion.met(logits, rows[live])
            better = new > value
            best, value = torch.where(per_item(better), asked, best), new.maximum(value)
            if met.any():
                done[live[met]] = asked[met]
                live, best, value = live[~met], best[~met], value[~met]
                if not len(live):
                    break
        return done

    return _asked(_best_of(model, images, criterion, ball, iter([images]), search, batch_size), spent)


def _side(step: int, queries: int, share: float, height: int, width: int) -> int:
    """Side of the window at a step: its area is halved at fixed points of a budget of 10,000, as in the paper.

    Ours walks through them four times more slowly: chosen on validation scenes at budgets of a few hundred queries, where
    the paper's schedule spends most of them on windows that are too small.
    """
    at = 2_500 * step / queries
    halvings = sum(at > mark for mark in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    side = round(math.sqrt(share / 2**halvings * height * width))
    return min(max(side, 1), height, width)


def square(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    eps: float,
    queries: int = 500,
    share: float = 0.8,
    objective: Objective = margin,
    grid: int | None = 255,
    batch_size: int = 256,
    generator: torch.Generator,
) -> QueryAttack:
    """Square attack: random square windows at full budget, kept when the margin shrinks [andriushchenko2020square, alg. 1, 2].

    Black-box: needs logits (or scores that the objective takes), no gradients; linf. It begins with vertical stripes of
    +-eps. queries: most answers asked for about one item. share: part of the image that the first window covers; it
    shrinks with the budget used. Other arguments as for `pgd`. A window that would change nothing gets the opposite
    colour instead of a new draw, and windows shrink four times more slowly than in the paper.
    Raises TypeError or ValueError naming the bad argument.
    """
    ball, seed = Ball(eps, "linf", grid), _seed(generator)
    _guard(images, criterion, queries=queries, batch_size=batch_size)
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    n, channels, height, width = images.shape
    low, high = (ball.settle((images + sign * eps).clamp(0, 1), images) for sign in (-1, 1))  # the two ends of each pixel

    def propose(step: int, rows: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed + step)
        if step == 0:
            up = torch.rand(n, channels, 1, width, generator=g).to(images.device)[rows] < 0.5
            return torch.where(up, high[rows], low[rows])
        side = _side(step, queries, share, height, width)
        place = torch.rand(n, 2, generator=g).to(images.device)[rows]
        up = torch.rand(n, channels, generator=g).to(images.device)[rows, :, None, None] < 0.5  # one colour a window
        top, left = (place * place.new_tensor([height - side + 1, width - side + 1])).long().unbind(1)  # (b,), (b,)
        y, x = torch.arange(height, device=rows.device), torch.arange(width, device=rows.device)
        in_rows = (y >= top[:, None]) & (y < top[:, None] + side)  # (b, H)
        in_columns = (x >= left[:, None]) & (x < left[:, None] + side)  # (b, W)
        inside = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]  # (b, 1, H, W)
        asked = torch.where(inside, torch.where(up, high[rows], low[rows]), best)
        idle = (asked == best).flatten(1).all(1)
        if idle.any():
            again = rows[idle]
            asked[idle] = torch.where(inside[idle], torch.where(up[idle], low[again], high[again]), best[idle])
        return asked

    return _ask_in_turn(model, images, criterion, ball, propose, queries=queries, objective=objective, batch_size=batch_size)


def random_guesses(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    eps: float,
    queries: int = 500,
    grid: int | None = 255,
    batch_size: int = 256,
    generator: torch.Generator,
) -> QueryAttack:
    """The control of every query attack: a fresh random corner of the linf ball for each query, nothing learned.

    `random_noise` with a count of queries per item; arguments as for `square`.
    """
    ball, seed = Ball(eps, "linf", grid), _seed(generator)
    _guard(images, criterion, queries=queries, batch_size=batch_size)

    def propose(step: int, rows: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        g = torch.Generator().manual_seed(seed + step)
        up = torch.randint(2, images.shape, generator=g, dtype=torch.int8).to(images.device)[rows]
        return ball.settle((images[rows] + eps * (2.0 * up - 1)).clamp(0, 1), images[rows])

    return _ask_in_turn(model, images, criterion, ball, propose, queries=queries, objective=margin, batch_size=batch_size)


def hop_skip_jump(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    queries: int = 1000,
    eps: float | None = None,
    start: torch.Tensor | None = None,
    probes: int = 40,
    grid: int | None = 255,
    batch_size: int = 256,
    generator: torch.Generator,
) -> QueryAttack:
    """HopSkipJump: walk along the decision boundary towards the image by labels alone [chen2020hopskipjump, algorithm 2].

    Each round bisects to the boundary, estimates its normal from random probes (eq. 9, 16), and jumps along it.
    queries: most answers asked for about one item. eps: largest L2 distance that counts as success; None for any.
    start: (N, C, H, W) images that already meet the criterion; None tries uniform noise. probes: of the first round,
    growing with the root of the round. A probe is at least one grey level long, and every question is asked of an
    8-bit picture (`grid`); the paper asks of raw floats. Raises TypeError or ValueError naming the bad argument.
    """
    size = images[0].numel() if isinstance(images, torch.Tensor) and images.ndim == 4 and len(images) else 1
    ball, seed = Ball(math.sqrt(size) if eps is None else eps, "l2", grid), _seed(generator)
    _guard(images, criterion, queries=queries, probes=probes, batch_size=batch_size)
    if start is not None:
        _guard(start, criterion)
        if start.shape != images.shape:
            raise ValueError(f"start must have the shape of images, got {tuple(start.shape)} and {tuple(images.shape)}")
    spent = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    trace: list[torch.Tensor] = []

    @torch.no_grad()
    def search(rows: torch.Tensor, _: torch.Tensor, meter: Meter) -> torch.Tensor:
        walk = _Walk(model, criterion, ball, images[rows], rows, queries, batch_size, seed)
        walk.begin(None if start is None else start[rows])
        rounds = 0
        while walk.round(rounds, probes):
            if rounds == len(trace):
                trace.append(images.new_full((len(images),), float("inf")))
            trace[rounds][rows] = walk.distance
            rounds += 1
        spent[rows], meter.forwards = walk.spent, meter.forwards + int(walk.spent.sum())
        return walk.best

    found = _best_of(model, images, criterion, ball, iter([images]), search, batch_size)
    return _asked(found, spent, torch.stack(trace).cummin(0).values if trace else None)


class _Walk:
    """A batch of B items on its way along the decision boundary: where each stands, and what it has asked."""

    def __init__(
        self, model: Model, criterion: Criterion, ball: Ball, origin: torch.Tensor, rows: torch.Tensor,
        queries: int, batch_size: int, seed: int,
    ) -> None:  # fmt: skip
        self.model, self.criterion, self.ball, self.origin, self.rows = model, criterion, ball, origin, rows
        self.queries, self.batch_size = queries, batch_size
        self.dice = [torch.Generator().manual_seed(seed + 7919 * int(row)) for row in rows]  # a stream for each item
        self.x, self.best = origin.clone(), origin.clone()  # the point on the boundary; the nearest success so far
        self.distance = origin.new_full((len(rows),), float("inf"))
        self.spent = torch.zeros_like(rows)
        self.bisections = 8 if ball.grid is None else max(4, math.ceil(math.log2(ball.grid)))

    def met(self, x: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """(b,) bool: do the files of x (b, C, H, W), asked about items (b,), meet the criterion?"""
        pairs = zip(torch.split(x, self.batch_size), torch.split(items, self.batch_size), strict=True)
        self.spent.index_add_(0, items, torch.ones_like(items))
        return torch.cat([self.criterion.met(self.model(part), self.rows[who]) for part, who in pairs])

    def file(self, x: torch.Tensor) -> torch.Tensor:
        grid = self.ball.grid
        return x.clamp(0, 1) if grid is None else (x.clamp(0, 1) * grid).round() / grid

    def move(self, x: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """(b,) bool: ask about one picture an item; what meets the criterion becomes its point, and its best if nearer."""
        x = self.file(x)
        won = self.met(x, items)
        self.x[items[won]] = x[won]
        length = self.ball.size(x - self.origin[items])
        nearer = won & (length < self.distance[items])
        self.best[items[nearer]], self.distance[items[nearer]] = x[nearer], length[nearer]
        return won

    def begin(self, start: torch.Tensor | None) -> None:
        """A first success, however far: the given picture, or uniform noise, at most twenty draws."""
        for _ in range(1 if start is not None else min(20, self.queries)):
            items = self.distance.isinf().nonzero()[:, 0]
            if not len(items):
                return
            noise = [torch.rand(self.origin.shape[1:], generator=self.dice[i], dtype=self.origin.dtype) for i in items.tolist()]
            self.move(torch.stack(noise).to(self.origin.device) if start is None else start[items], items)

    def bisect(self, items: torch.Tensor) -> None:
        """Halve the way between the image and the point, keeping the end that meets the criterion."""
        near, far = self.origin[items], self.x[items]
        for _ in range(self.bisections):
            middle = (near + far) / 2
            won = per_item(self.move(middle, items))
            near, far = torch.where(won, near, middle), torch.where(won, middle, far)

    def normal(self, items: torch.Tensor, probes: int) -> torch.Tensor:
        """(b, C, H, W) unit estimate of the boundary's normal at each point, from labels of random neighbours (eq. 9, 16)."""
        shape, numel = self.origin.shape[1:], self.origin[0].numel()
        length = (self.distance[items] / math.sqrt(numel)).clamp(min=math.sqrt(numel) / self.ball.grid if self.ball.grid else 0)
        slope = torch.zeros_like(self.origin[items])
        for k, i in enumerate(items.tolist()):
            u = torch.randn(probes, *shape, generator=self.dice[i], dtype=slope.dtype).to(slope.device)
            u = u / self.ball.size(u)[:, None, None, None]
            asked = self.file(self.x[i] + length[k] * u)
            u = asked - self.x[i]  # what the model saw, after rounding and clipping
            won = self.met(asked, items[k].repeat(probes)).to(u.dtype) * 2 - 1
            weight = won - won.mean() if won.abs().mean() > won.mean().abs() else won  # all alike: go with or against them
            slope[k] = (per_item(weight) * u).mean(0)
        return self.ball.steepest(slope)

    def round(self, number: int, probes: int) -> bool:
        """Bisect, estimate, jump, for the items that can still pay for it; false when there is none."""
        probes = int(probes * math.sqrt(number + 1))
        can = ~self.distance.isinf() & (self.queries - self.spent >= 2 * self.bisections + probes + 1)
        items = can.nonzero()[:, 0]
        if not len(items):
            return False
        self.bisect(items)
        direction, point = self.normal(items, probes), self.x[items].clone()
        step = self.distance[items] / math.sqrt(number + 1)
        waiting = torch.ones_like(items, dtype=torch.bool)
        for _ in range(self.bisections):  # halve the jump until it lands on the right side
            ahead = point[waiting] + per_item(step[waiting]) * direction[waiting]
            waiting[waiting.clone()] = ~self.move(ahead, items[waiting])
            step = step / 2
            if not waiting.any():
                break
        return True
