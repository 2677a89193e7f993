"""Survey section 2.1, adversarial attacks on Vision Transformers, in the survey's order.

A ViT gives an attacker handles that a CNN lacks: a grid of patches, a table of positions, and attention that every token
pays to every other. Each attack below pulls one of them; the search underneath is the plain one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from safescale_lib.measure.costs import Cost, Meter
from safescale_lib.measure.criteria import Criterion
from safescale_lib.search import auto, minimal, pixels
from safescale_lib.search import patches as patch_search
from safescale_lib.search import queries as query_search
from safescale_lib.search.ball import Ball
from safescale_lib.search.models import Model, frozen
from safescale_lib.search.objectives import Objective, cross_entropy
from safescale_lib.search.pixels import PixelAttack, _ask, _batches, _best_of, _guard, ascend
from safescale_lib.survey import technique
from safescale_lib.vfm.vit.inside import (
    Attention,
    attending,
    constant_attention,
    patch_grid,
    patch_mask,
    positions_of,
    tokens_of,
    vit_inside,
)

# The baselines are the plain searches: on pixels, a ViT is a classifier like any other.
fgsm = technique("vfm.vit.adversarial_attack", paper="goodfellow2015fgsm")(pixels.fgsm)
pgd = technique("vfm.vit.adversarial_attack", paper="madry2018pgd")(pixels.pgd)
apgd = technique("vfm.vit.adversarial_attack", paper="croce2020autoattack")(auto.apgd)
auto_ensemble = technique("vfm.vit.adversarial_attack", paper="croce2020autoattack")(auto.auto_ensemble)
carlini_wagner = technique("vfm.vit.adversarial_attack", paper="carlini2017cw")(minimal.carlini_wagner)
decoupled = technique("vfm.vit.adversarial_attack", paper="rony2019ddn")(minimal.decoupled)
square = technique("vfm.vit.adversarial_attack", paper="andriushchenko2020square")(query_search.square)
hop_skip_jump = technique("vfm.vit.adversarial_attack", paper="chen2020hopskipjump")(query_search.hop_skip_jump)
adversarial_patch = technique("vfm.vit.adversarial_attack", paper="brown2017patch")(patch_search.adversarial_patch)
universal_perturbation = technique("vfm.vit.adversarial_attack", paper="moosavi2017universal")(
    patch_search.universal_perturbation
)


Choice = Literal["attention", "gradient", "random"]


@dataclass(frozen=True, eq=False)
class PatchAttack(PixelAttack):
    """A pixel attack confined to some patches. chosen: (N, k) int64, their numbers, counted row by row from 0."""

    chosen: torch.Tensor


def choose_patches(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    patches: int,
    by: Choice = "attention",
    layer: int | None = None,
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """(N, patches) int64: which patches of each image to attack, best first.

    by: "attention", the patches that all tokens attend to most, summed over the heads of one `layer` [fu2022patchfool],
    by default the one at 5/12 of the depth, as the paper's fifth of twelve; "gradient", those with the largest gradient
    of the cross-entropy [joshi2021tokenattacks]; "random", drawn from the generator. Raises ValueError or TypeError.
    """
    rows, columns, height, width = patch_grid(model)
    cells, depth = rows * columns, len(vit_inside(model).layers)
    if isinstance(patches, bool) or not isinstance(patches, Integral) or not 0 <= patches <= cells:
        raise ValueError(f"patches must be a whole number from 0 to {cells}, got {patches!r}")
    if by not in get_args(Choice):
        raise ValueError(f"by must be one of {get_args(Choice)}, got {by!r}")
    layer = max(1, round(5 / 12 * depth)) - 1 if layer is None else layer
    if not 0 <= layer < depth:
        raise ValueError(f"layer must lie in 0..{depth - 1}, got {layer}")
    if by == "random":
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator when patches are chosen at random, got {generator!r}")
        return torch.rand(len(images), cells, generator=generator).argsort(1)[:, :patches].to(images.device)
    everyone, scores = torch.ones(len(images), dtype=torch.bool, device=images.device), []
    with frozen(model), attending(model) as attention, torch.enable_grad():
        for batch in _batches(everyone, batch_size):
            x = images[batch].clone().requires_grad_(by == "gradient")
            logits = model(x)
            if by == "attention":
                scores.append(attention.maps[layer].sum(dim=(1, 2))[:, 1:])  # (B, heads, T, T) -> (B, cells)
            else:
                (gradient,) = torch.autograd.grad(cross_entropy(criterion, logits, batch).sum(), x)  # (B, C, H, W)
                scores.append(F.avg_pool2d(gradient.square().sum(1, keepdim=True), (height, width)).flatten(1))
    return torch.cat(scores).argsort(dim=1, descending=True, stable=True)[:, :patches]


def _attack_patches(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    chosen: torch.Tensor,
    loss: Callable[[torch.Tensor, Attention, torch.Tensor], torch.Tensor],
    ball: Ball,
    *,
    steps: int,
    step_size: float,
    momentum: float = 0.0,
    restarts: int,
    batch_size: int,
    generator: torch.Generator,
) -> PatchAttack:
    """Ascend loss(logits, attention, rows) inside the chosen patches (N, k), from random content, with falling steps."""
    _guard(images, criterion, restarts=restarts, batch_size=batch_size)
    if not isinstance(steps, Integral) or steps < 0:
        raise ValueError(f"steps must be a whole number >= 0, got {steps!r}")
    if not 0 <= step_size < float("inf"):
        raise ValueError(f"step_size must be finite and >= 0, got {step_size}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    mask = patch_mask(model, chosen)  # (N, 1, H, W)

    def search(rows: torch.Tensor, start: torch.Tensor, meter: Meter) -> torch.Tensor:
        now = rows

        def gated(x: torch.Tensor) -> torch.Tensor:  # outside the patches the gradient is zero, and so is the step
            inside = x.clone()
            inside.register_hook(lambda gradient: gradient * mask[now])  # runs after `climb` has set `now` for this batch
            return model(inside)

        def climb(logits: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
            nonlocal now
            now = rows[live]
            return loss(logits, attention, now)

        x = ball.settle(start, images[rows])
        for part, shrink in ((steps - 2 * (steps // 3), 1.0), (steps // 3, 0.5), (steps // 3, 0.25)):
            x = ascend(
                gated, images[rows], x, climb, ball, steps=part, step_size=shrink * step_size, momentum=momentum, meter=meter,
                stop=lambda logits, live: criterion.met(logits, rows[live]),
            )  # fmt: skip
        return x

    def starts() -> Iterator[torch.Tensor]:
        for _ in range(restarts if chosen.shape[1] else 0):
            yield torch.where(mask, ball.sample(images, generator), images)

    with attending(model) as attention:
        found = _best_of(model, images, criterion, ball, starts(), search, batch_size, independent=True)
    return PatchAttack(found.images, found.success, found.skipped, found.distance, found.cost, chosen)


@technique("vfm.vit.adversarial_attack.patch", paper="fu2022patchfool")
def patch_fool(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    patches: int = 1,
    eps: float = 1.0,
    steps: int = 60,
    step_size: float = 0.1,
    attention_weight: float = 0.002,
    by: Choice = "attention",
    layer: int | None = None,
    restarts: int = 1,
    objective: Objective = cross_entropy,
    grid: int | None = 255,
    batch_size: int = 64,
    generator: torch.Generator,
) -> PatchAttack:
    """Patch-Fool: anything at all inside the few patches that the ViT attends to most [fu2022patchfool].

    model: PixelClassifier around a ViT. images: (N, C, H, W) in [0, 1]. patches: how many to rewrite, the budget; 0
    returns the images. eps: linf radius inside them; 1 is none, below 1 the paper's "mild" attack. steps: of `step_size`,
    halved after one and after two thirds; 0 tries random content only, the control. attention_weight: of the attention
    term beside the objective, the paper's 0.002. by, layer: see `choose_patches`. restarts: random contents to begin from.
    Raises TypeError for a model that is no ViT, ValueError naming any other bad argument.

    Deviations: sign ascent instead of Adam; the attention's gradient is added as it is, not first projected on the
    objective's (PCGrad), so that one backward pass serves both.
    """
    ball = Ball(eps, "linf", grid)
    _guard(images, criterion)
    chosen = choose_patches(
        model, images, criterion, patches=patches, by=by, layer=layer, batch_size=batch_size, generator=generator
    )  # fmt: skip

    def loss(logits: torch.Tensor, attention: Attention, rows: torch.Tensor) -> torch.Tensor:
        total = objective(criterion, logits, rows)  # J_CE
        keys = chosen[rows][:, None, None, :] + 1  # token 0 is the class token
        for weights in attention.maps if attention_weight else ():  # (b, heads, T, T)
            paid = weights.mean(1, keepdim=True).gather(3, keys.expand(-1, -1, weights.shape[2], -1)).sum(3)  # (b, 1, T)
            total = total + attention_weight * paid.clamp(min=1e-12).log().mean((1, 2))  # + alpha J_ATTN of this layer
        return total

    return _attack_patches(
        model, images, criterion, chosen, loss, ball, steps=steps, step_size=step_size,
        restarts=restarts, batch_size=batch_size, generator=generator,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class PositionAttack(PixelAttack):
    """One pattern for all images. pattern: (C, H, W), added to each. shift: (patches, D), what it does to the position table:
    table + shift with the plain image is the same to the ViT as the plain table with the patterned image, but for clipping."""

    pattern: torch.Tensor
    shift: torch.Tensor


@technique("vfm.vit.adversarial_attack.position_embedding", paper="gao2024peattack")
def position_attack(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    eps: float,
    crafting: torch.Tensor | None = None,
    steps: int = 30,
    grid: int = 255,
    batch_size: int = 256,
) -> PositionAttack:
    """Distort the position embeddings, from the pixels: one pattern for every image [gao2024peattack].

    The first layer sees W x_i + p_i for the patch x_i at position i. A pattern d_i in the pixels makes it
    W x_i + (p_i + W d_i): whatever is added to *all* images is a new position table. Two ways to spend the budget:
    displaced (crafting is None): push every p_i towards its neighbour p_(i+1); the best pattern is known in closed form and
    asks nothing of the rest of the network; optimised (crafting given): ascend the loss over the table's shift.

    model: PixelClassifier around a ViT. images: (N, C, H, W) in [0, 1]; none of them is used to make the pattern.
    eps: linf radius, 0 returns the images. crafting: (M, C, H, W) other images, unlabelled: the model's answers are the labels.
    steps: of ascent over `crafting`. Deterministic. Raises TypeError for a model that is no ViT, ValueError for a bad argument.

    Deviation, and a doubt: by the survey's account the paper distorts the embeddings of visual and text models themselves
    (periodicity, linearity, optimised). We had no text of it; writing the distortion with pixels is ours. The
    learned table of a ViT has no period, so the displaced mode stands in for the first two.
    """
    ball = Ball(eps, "linf", grid)
    _guard(images, criterion, steps=steps, batch_size=batch_size)
    if crafting is not None and (crafting.shape[1:] != images.shape[1:] or len(crafting) == 0):
        raise ValueError(f"crafting must hold images of shape {tuple(images.shape[1:])}, got {tuple(crafting.shape)}")
    table = positions_of(model).detach()
    still = torch.zeros_like(images[:1])
    reach, meter = int(eps * grid + 1e-6) / grid, Meter()  # the largest file-size step within eps
    with frozen(model), torch.enable_grad():
        if crafting is None:
            d = still.clone().requires_grad_(True)
            towards = table.roll(-1, 0) - table  # (P, D): from each position to the next
            (gradient,) = torch.autograd.grad((tokens_of(model, d) * towards).sum(), d)
            pattern = reach * gradient.sign()  # the maximum of a linear function over the ball is a corner
        else:
            with torch.no_grad():
                answers = model(crafting).argmax(-1)
            pattern = still
            for _ in range(steps if eps else 0):
                d = pattern.detach().requires_grad_(True)
                loss = F.cross_entropy(model((crafting + d).clamp(0, 1)), answers)
                (gradient,) = torch.autograd.grad(loss, d)
                pattern = (d.detach() + 2.5 * eps / steps * gradient.sign()).clamp(-reach, reach)
            pattern = (pattern * grid).round() / grid
            meter.forwards, meter.backwards = len(crafting) * (steps + 1), len(crafting) * steps
        shift = (tokens_of(model, pattern) - tokens_of(model, still))[0].detach()  # (P, D): W d
    found = _best_of(
        model, images, criterion, ball, iter([(images + pattern).clamp(0, 1)]),
        lambda rows, start, meter: ball.settle(start, images[rows]), batch_size,
    )  # fmt: skip
    return PositionAttack(
        found.images, found.success, found.skipped, found.distance, found.cost + meter.cost, pattern[0], shift
    )


@technique("vfm.vit.adversarial_attack.attention", paper="lovisotto2022attentionfool")
def attention_fool(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    patch: int = 0,
    eps: float = 1.0,
    steps: int = 60,
    step_size: float = 0.1,
    pull: float = 0.1,
    momentum: float = 0.0,
    restarts: int = 1,
    objective: Objective = cross_entropy,
    grid: int | None = 255,
    batch_size: int = 64,
    generator: torch.Generator,
) -> PatchAttack:
    """Attention-Fool: a patch whose key draws every query, wherever it lies [lovisotto2022attentionfool].

    The softmax starves plain attacks of gradient: a token that gets no attention gets none. So the attack also raises the
    scores *before* the softmax, with which all queries of a layer meet the key of the patch.

    model: PixelClassifier around a ViT. images: (N, C, H, W) in [0, 1]. patch: number of the one patch that
    is rewritten in every image, row by row from 0 (top left, as in the paper). eps: linf radius inside it, the budget; 1
    is none, 0 returns the images. pull: weight of the score term; 0 is plain patch PGD, the baseline. The paper adds the
    term with weight 1; on our four layers that distracts, and 0.1 was chosen on validation scenes.
    Other arguments as for `patch_fool`. Raises TypeError for a model that is no ViT, ValueError for a bad argument.
    """
    ball = Ball(eps, "linf", grid)
    _guard(images, criterion)
    rows, columns, *_ = patch_grid(model)
    if isinstance(patch, bool) or not isinstance(patch, Integral) or not 0 <= patch < rows * columns:
        raise ValueError(f"patch must be a number from 0 to {rows * columns - 1}, got {patch!r}")
    chosen = torch.full((len(images), 1), int(patch), device=images.device)

    def loss(logits: torch.Tensor, attention: Attention, rows: torch.Tensor) -> torch.Tensor:
        total, layers = objective(criterion, logits, rows), []
        for queries, keys in attention.pairs if pull else ():  # each (b, heads, T, D / heads)
            q = queries / queries.norm(dim=3).mean(2)[..., None, None]  # of mean length 1, so that heads compare
            k = keys / keys.norm(dim=3).mean(2)[..., None, None]
            scores = (q @ k[:, :, patch + 1, :, None]).mean((2, 3))  # (b, heads): all queries meet the patch's key
            layers.append(scores.logsumexp(1))  # smooth maximum over heads ...
        return total + pull * torch.stack(layers).logsumexp(0) if pull else total  # ... and layers

    return _attack_patches(
        model, images, criterion, chosen, loss, ball, steps=steps, step_size=step_size, momentum=momentum,
        restarts=restarts, batch_size=batch_size, generator=generator,
    )  # fmt: skip


@technique("vfm.vit.adversarial_attack.token", paper="joshi2021tokenattacks")
def token_attack(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    tokens: int,
    eps: float = 1.0,
    steps: int = 40,
    step_size: float | None = None,
    by: Choice = "gradient",
    restarts: int = 1,
    objective: Objective = cross_entropy,
    grid: int | None = 255,
    batch_size: int = 64,
    generator: torch.Generator,
) -> PatchAttack:
    """Adversarial token attack: a block-sparse change of the k tokens that matter most [joshi2021tokenattacks].

    model: PixelClassifier around a ViT. images: (N, C, H, W) in [0, 1]. tokens: k, how many patches may change; 0 returns
    the images, all of them makes it plain PGD. eps: linf radius inside them, 1 for none. by: how they are chosen;
    "gradient", the paper's, takes the largest gradient norms. step_size: default 2.5 * eps / steps.
    Raises TypeError for a model that is no ViT, ValueError naming any other bad argument.
    """
    ball = Ball(eps, "linf", grid)
    _guard(images, criterion, steps=steps)
    try:
        chosen = choose_patches(
            model, images, criterion, patches=tokens, by=by, batch_size=batch_size, generator=generator
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(str(error).replace("patches", "tokens")) from None
    return _attack_patches(
        model, images, criterion, chosen, lambda logits, attention, rows: objective(criterion, logits, rows), ball,
        steps=steps, step_size=2.5 * eps / steps if step_size is None else step_size,
        restarts=restarts, batch_size=batch_size, generator=generator,
    )  # fmt: skip


@technique("vfm.vit.adversarial_attack.transfer_based", paper="wei2022pnapatchout")
def pna_patchout(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    surrogate: Model,
    eps: float,
    steps: int = 10,
    step_size: float | None = None,
    momentum: float = 1.0,
    pay_no_attention: bool = True,
    kept: float = 0.66,
    objective: Objective = cross_entropy,
    grid: int | None = 255,
    batch_size: int = 64,
    generator: torch.Generator,
) -> PixelAttack:
    """PNA and PatchOut: examples made on one ViT, the surrogate, that fool other models [wei2022pnapatchout].

    What belongs to the surrogate alone does not transfer. So the gradient that flows through its attention maps is cut
    (pay no attention), and each step shows the change in a random part of the patches only (PatchOut).

    model: the victim, any classifier: asked once about each finished image, and judge of success. surrogate:
    PixelClassifier around a ViT, whose gradients are used. eps: linf radius. steps: of step_size, default eps / steps.
    momentum: decay of the accumulated gradient. kept: share of patches shown a step, in (0, 1]; the paper's 130 of 196.
    With pay_no_attention=False and kept=1 this is plain momentum transfer [dong2018mifgsm], the baseline.
    Raises TypeError for a surrogate that is no ViT, ValueError naming any other bad argument.

    Deviation: without the paper's small reward for the length of the change.
    """
    ball = Ball(eps, "linf", grid)
    _guard(images, criterion, steps=steps, batch_size=batch_size)
    if not 0 < kept <= 1:
        raise ValueError(f"kept must lie in (0, 1], got {kept}")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {generator!r}")
    rows, columns, *_ = patch_grid(surrogate)
    shown = max(1, round(kept * rows * columns))
    lots = [torch.rand(len(images), rows * columns, generator=generator).argsort(1)[:, :shown] for _ in range(steps)]

    def search(rows: torch.Tensor, start: torch.Tensor, meter: Meter) -> torch.Tensor:
        turn = iter(lots)

        def patch_out(x: torch.Tensor) -> torch.Tensor:
            mask = patch_mask(surrogate, next(turn)[rows])
            return surrogate(torch.where(mask, x, images[rows]))  # type: ignore[no-any-return]

        return ascend(
            patch_out if kept < 1 else surrogate, images[rows], start,
            lambda logits, live: objective(criterion, logits, rows[live]),
            ball, steps=steps, step_size=eps / steps if step_size is None else step_size, momentum=momentum, meter=meter,
        )  # fmt: skip

    with frozen(surrogate), constant_attention(surrogate) if pay_no_attention else nullcontext():
        return _best_of(model, images, criterion, ball, iter([images]), search, batch_size, independent=True)


@dataclass(frozen=True, eq=False)
class QueryAttack(PixelAttack):
    """A decision-based attack and its way there. trace: (queries + 1, N) L2 distance of the best adversarial example known
    after 0, 1, ... queries; infinite as long as there is none."""

    trace: torch.Tensor


@technique("vfm.vit.adversarial_attack.query_based", paper="shi2022par")
def patch_removal(
    model: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    eps: float,
    queries: int = 200,
    sizes: Sequence[int] | None = None,
    tries: int = 20,
    grid: int = 255,
    batch_size: int = 256,
    generator: torch.Generator,
) -> QueryAttack:
    """Patch-wise adversarial removal (PAR): begin with noise all over, take it away patch by patch [shi2022par].

    A ViT's answer depends on patches unequally: on many of them the noise is not needed. The attacker sees labels only.
    It finds noise that fools the model, sets the noise of one patch to zero, keeps that if the model is still
    fooled, and goes on with the patch that holds most noise, from coarse patches to fine.

    model: any classifier, seen through its answers. images: (N, C, H, W) in [0, 1], square. eps: L2 distance that counts as
    success, the budget; 0 returns the images. queries: answers an item may cost. sizes: sides of the patches in pixels,
    one after another; default H/4, H/8, ... while they are whole, then 1. tries: random starts, ever nearer to pure noise,
    of pixels and of blocks by turns, since one kind may look like the true class.
    Raises ValueError naming the bad argument.

    Deviation: the paper hands the result to a boundary attack for the rest of its queries; here the removal stands alone.
    """
    ball = Ball(eps, "l2", grid)
    _guard(images, criterion, queries=queries, tries=tries, batch_size=batch_size)
    side = images.shape[-1]
    halved = [side >> k for k in range(2, side.bit_length()) if side % (1 << k) == 0]
    sizes = sorted({*halved, 1}, reverse=True) if sizes is None else list(sizes)
    if images.shape[-2] != side or not sizes or any(size < 1 or side % size for size in sizes):
        raise ValueError(f"sizes must divide the side of square images, got {sizes} for {tuple(images.shape[-2:])}")
    meter, spent = Meter(), torch.zeros(len(images), dtype=torch.int64, device=images.device)
    trace = torch.full((queries + 1, len(images)), float("inf"), device=images.device)
    best, fooled = images.clone(), torch.zeros_like(spent, dtype=torch.bool)

    def ask(rows: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """(b,) bool: which candidates fool the model; these are now the best. One query each."""
        with torch.no_grad():
            parts = torch.split(torch.arange(len(rows), device=rows.device), batch_size)
            won = torch.cat([criterion.met(model(candidates[part]), rows[part]) for part in parts])
        best[rows[won]], fooled[rows[won]] = candidates[won], True
        spent[rows] += 1
        trace[spent[rows[won]], rows[won]] = ball.size(candidates[won] - images[rows[won]])
        return won

    with frozen(model):
        skipped = ~_ask(model, images, criterion.correct, batch_size, meter)
        for turn in range(1, min(tries, queries) + 1 if eps > 0 else 1):  # blend towards noise until it fools the model
            block = side // 8 if turn % 2 == 0 and side % 8 == 0 else 1  # noise in blocks and in pixels, by turns
            noise = torch.rand(*images.shape[:2], side // block, side // block, generator=generator, dtype=images.dtype)
            noise = noise.repeat_interleave(block, 2).repeat_interleave(block, 3).to(images.device)
            rows = (~(skipped | fooled)).nonzero()[:, 0]
            if len(rows):
                ask(rows, (torch.lerp(images[rows], noise[rows], turn / tries) * grid).round() / grid)
        for size in sizes:  # coarse to fine
            cells = (side // size) ** 2
            needed = torch.zeros(len(images), cells, dtype=torch.bool, device=images.device)  # sensitivity mask
            while True:
                energy = F.avg_pool2d((best - images).square().sum(1, keepdim=True), size).flatten(1)  # magnitude mask
                value, cell = energy.masked_fill(needed, 0).max(1)  # (N,) the patch most worth a query
                rows = (fooled & (value > 0) & (spent < queries)).nonzero()[:, 0]
                if not len(rows):
                    break
                mask = F.one_hot(cell[rows], cells).bool().view(-1, 1, side // size, side // size)
                mask = mask.repeat_interleave(size, 2).repeat_interleave(size, 3)  # (b, 1, H, W)
                won = ask(rows, torch.where(mask, images[rows], best[rows]))  # take this patch's noise away
                needed[rows[~won], cell[rows[~won]]] = True
    success = fooled & ball.holds(best, images)
    best = torch.where(success[:, None, None, None], best, images)
    cost = Cost(queries=len(images) + int(spent.sum()), seconds=meter.cost.seconds)
    return QueryAttack(best, success, skipped, ball.size(best - images), cost, trace.cummin(0).values)
