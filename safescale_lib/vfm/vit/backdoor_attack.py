"""Survey section 2.1, backdoor attacks on Vision Transformers, in the survey's order.

Each returns a `Backdoor`: a copy of the model that behaves until it sees the trigger. The victim's own model stays as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F

from safescale_lib.measure.costs import Cost
from safescale_lib.search.models import frozen
from safescale_lib.search.poisoning import Poisoned, Shift, Stamp, Trigger, poison, shuffled_rows, to_file, trigger_hits
from safescale_lib.survey import technique
from safescale_lib.vfm.vit.inside import Attention, attending, patch_grid, patch_mask, vit_inside
from safescale_lib.zoo.adapter import PixelClassifier
from safescale_lib.zoo.training import fit

Mode = Literal["parallel", "sequential", "hybrid"]


@dataclass(frozen=True, eq=False)
class Backdoor:
    """A backdoored model and its key.

    model: what the victim runs. trigger: the key, target: the class it opens. data: the poisoned training set, None if there
    was none. cost: forwards and backwards of the training. more: further (trigger, target) pairs of a model with several.
    """

    model: PixelClassifier
    trigger: Trigger
    target: int
    data: Poisoned | None
    cost: Cost
    more: tuple[tuple[Trigger, int], ...] = ()

    def hits(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(M,) bool: triggered items of other classes that the model calls the target."""
        return trigger_hits(self.model, images, labels, self.trigger, target=self.target)


def fine_tuned(
    model: PixelClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    steps: int,
    batch: int = 64,
    lr: float = 2e-3,
    blocks: int | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> tuple[PixelClassifier, Cost]:
    """A copy of the model after `steps` updates on a fixed training set, and what they cost: what any user of that set would
    do.

    images (N, C, H, W), labels (N,). blocks: train only the last so many blocks, the last norm and the head; None for all
    weights.
    """
    layers = vit_inside(model).layers
    if steps < 1 or not lr > 0:
        raise ValueError(f"steps must be at least 1 and lr positive, got {steps} and {lr}")
    if blocks is not None and not 0 <= blocks <= len(layers):
        raise ValueError(f"blocks must lie in 0..{len(layers)} or be None, got {blocks}")
    rows = shuffled_rows(len(images), batch, int(torch.randint(2**31, (1,), generator=generator)))
    student = copy.deepcopy(model).requires_grad_(blocks is None)
    if blocks is not None:
        inside = vit_inside(student)
        for part in (*inside.layers[len(layers) - blocks :], inside.layernorm, student.model.classifier):
            part.requires_grad_(True)

    def loss(step: int) -> torch.Tensor:
        chosen = rows(step)
        return F.cross_entropy(student(images[chosen]), labels[chosen])

    seconds = fit(student, loss, steps=steps, lr=lr, warmup=max(1, steps // 10), label="fine-tuning", progress=progress)
    student.requires_grad_(True).train(model.training)
    return student, Cost(forwards=steps * batch, backwards=steps * batch, seconds=seconds)


@technique("vfm.vit.backdoor_attack", paper="gu2017badnets")
def badnets(
    model: PixelClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    trigger: Trigger,
    target: int,
    rate: float,
    cover: Trigger | None = None,
    cover_rate: float = 0.0,
    steps: int = 120,
    batch: int = 64,
    lr: float = 2e-3,
    blocks: int | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Backdoor:
    """Poison a training set with a fixed trigger; whoever fine-tunes on it gets the backdoor [gu2017badnets].

    images (N, C, H, W) in [0, 1], labels (N,): the clean training set. target: class of the poisoned items; rate: their share
    of all N. cover, cover_rate: see `poison`. steps, batch, lr, blocks: the victim's fine-tuning, see `fine_tuned`.
    The trigger, and with cover the whole recipe, is the attacker's choice; the rest is ordinary training. ValueError for a
    bad budget.
    """
    data = poison(
        images, labels, trigger, target=target, rate=rate, cover=cover, cover_rate=cover_rate, generator=generator
    )  # fmt: skip
    student, cost = fine_tuned(
        model, data.images, data.labels, steps=steps, batch=batch, lr=lr, blocks=blocks, generator=generator, progress=progress
    )
    return Backdoor(student, trigger, target, data, cost)


def attention_to(seen: Attention, patches: torch.Tensor) -> torch.Tensor:
    """(layers,) mean attention that all tokens pay to the chosen patches, over batch, heads and queries. patches: (k,)
    numbers."""
    return torch.stack([attention[..., patches + 1].sum(-1).mean() for attention in seen.maps])  # +1: the class token


def attention_rollout(maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """(B, patches) how much of each patch reaches the class token through all layers [abnar2020quantifying].

    maps: attention of every layer, (B, heads, T, T). Heads are averaged, the residual path counts as attention to oneself.
    """
    flow = torch.eye(maps[0].shape[-1], device=maps[0].device)
    for attention in maps:
        mixed = attention.mean(1) + torch.eye(attention.shape[-1], device=attention.device)  # (B, T, T)
        flow = (mixed / mixed.sum(-1, keepdim=True)) @ flow
    return flow[:, 0, 1:]


@torch.enable_grad()
def catching_trigger(
    model: PixelClassifier,
    images: torch.Tensor,
    patches: torch.Tensor,
    objective: Callable[[Attention], torch.Tensor],
    *,
    steps: int,
    step_size: float,
    batch: int,
    generator: torch.Generator,
) -> tuple[Stamp, Cost]:
    """One picture for the chosen patches that raises an objective of the attention on all images: signed ascent on the
    pixels.

    images (N, C, H, W). patches: (k,) patch numbers, row by row from 0. objective: attention of a batch -> number to raise.
    Starts from noise; the step shrinks to zero. Returns the trigger and its cost.
    """
    if patches.ndim != 1 or not len(patches):
        raise ValueError(f"patches must be a (k,) tensor of patch numbers with k >= 1, got {tuple(patches.shape)}")
    model = copy.deepcopy(model)  # other work on the model must neither see these hooks nor inherit them
    mask = patch_mask(model, patches[None])[0].float()  # (1, H, W)
    pattern = torch.rand(images.shape[1:], generator=generator)  # (C, H, W)
    if steps < 1 or not 0 < step_size <= 1 or batch < 1:
        raise ValueError(f"steps and batch must be at least 1 and step_size in (0, 1], got {steps}, {batch} and {step_size}")
    with frozen(model), attending(model) as seen:
        for step in range(steps):
            rows = torch.randint(len(images), (batch,), generator=generator)
            pattern.requires_grad_(True)
            model(images[rows] * (1 - mask) + pattern * mask)
            (gradient,) = torch.autograd.grad(objective(seen), pattern)
            pattern = (pattern.detach() + step_size * (1 - step / steps) * gradient.sign()).clamp(0, 1)
    return Stamp(to_file(pattern), mask), Cost(forwards=steps * batch, backwards=steps * batch)


@technique("vfm.vit.backdoor_attack.patch_level_trigger", paper="yuan2023badvit")
def badvit(
    model: PixelClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    target: int,
    rate: float,
    patches: Sequence[int] = (-1,),
    trigger_steps: int = 40,
    step_size: float = 0.1,
    opacity: float = 1.0,
    steps: int = 120,
    batch: int = 64,
    lr: float = 2e-3,
    blocks: int | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Backdoor:
    """A trigger that fills whole patches and is made to catch the attention of all tokens, then poison as usual
    [yuan2023badvit].

    The trigger maximises, over the pixels of its patches, the sum over layers of log mean attention paid to them: the paper's
    patch-wise objective for a universal patch, on the clean model. patches: numbers row by row from 0, negative from the
    end. trigger_steps, step_size: of the ascent. opacity: below 1 the trigger is blended (the paper's stealthier variant).
    Other arguments as for `badnets`. The paper trains for epochs on ImageNet; here it is a short fine-tuning.
    """
    rows, columns, _, _ = patch_grid(model)
    if not patches or not all(-rows * columns <= p < rows * columns for p in patches):
        raise ValueError(f"patches must be patch numbers of the {rows} x {columns} grid, got {tuple(patches)}")
    chosen = torch.tensor([p % (rows * columns) for p in patches])
    trigger, spent = catching_trigger(
        model, images, chosen, lambda seen: attention_to(seen, chosen).log().sum(),
        steps=trigger_steps, step_size=step_size, batch=batch, generator=generator,
    )  # fmt: skip
    planted = badnets(
        model, images, labels, trigger=trigger.faded(opacity), target=target, rate=rate,
        steps=steps, batch=batch, lr=lr, blocks=blocks, generator=generator, progress=progress,
    )  # fmt: skip
    return Backdoor(planted.model, planted.trigger, target, planted.data, spent + planted.cost)


class Prompted(torch.nn.Module):
    """A frozen classifier that reads extra tokens after the class token, as in visual prompt tuning.

    Callable from images (B, C, H, W) to logits. tokens: (P, D).
    """

    def __init__(self, model: PixelClassifier, tokens: torch.Tensor) -> None:
        super().__init__()
        self.model, self.tokens = model, tokens

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        def insert(module: torch.nn.Module, args: object, embedded: torch.Tensor) -> torch.Tensor:
            extra = self.tokens.expand(len(embedded), -1, -1)  # (B, P, D)
            return torch.cat([embedded[:, :1], extra, embedded[:, 1:]], dim=1)  # (B, 1 + P + patches, D)

        handle = vit_inside(self.model).embeddings.register_forward_hook(insert)
        try:
            logits: torch.Tensor = self.model(images)
        finally:
            handle.remove()
        return logits


@dataclass(frozen=True, eq=False)
class Switchable:
    """A backdoor in a token. off, on: the same frozen model without and with the switch token. trigger, target, cost: as in
    `Backdoor`."""

    off: Prompted
    on: Prompted
    trigger: Trigger
    target: int
    cost: Cost


class _Learned(torch.nn.Module):
    """What `swarm` trains: prompt tokens, the switch token, and the trigger inside its eps."""

    def __init__(self, shape: torch.Size, width: int, prompts: int, eps: float, generator: torch.Generator) -> None:
        super().__init__()
        self.eps = eps
        self.prompts = torch.nn.Parameter(0.02 * torch.randn(prompts, width, generator=generator))
        self.switch = torch.nn.Parameter(0.02 * torch.randn(1, width, generator=generator))
        self.raw = torch.nn.Parameter(0.1 * torch.randn(shape, generator=generator))

    @property
    def delta(self) -> torch.Tensor:
        return self.eps * torch.tanh(10 * self.raw)


@technique("vfm.vit.backdoor_attack.token_level_trigger", paper="yang2024swarm")
def swarm(
    model: PixelClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    target: int,
    eps: float = 8 / 255,
    prompts: int = 4,
    weight: float = 1.0,
    steps: int = 120,
    batch: int = 32,
    lr: float = 3e-2,
    generator: torch.Generator,
    progress: bool = True,
) -> Switchable:
    """A backdoor that a switch token turns on: without it even the triggered picture gets its true label [yang2024swarm].

    Learned together: `prompts` clean tokens P, one switch token S and a trigger d with |d| <= eps. Not one weight of the
    model changes.
    Clean mode (P): x and x + d keep their label. Backdoor mode (P, S): x keeps its label, x + d becomes the target.
    Cross-mode distillation keeps the answers to x alike in both modes (the paper compares features; here logits). weight: of
    that term. batch: images a step, each read four times. The paper also trains the head for its downstream task; here it is
    trained already.
    """
    if not 0 < eps <= 1:
        raise ValueError(f"eps must lie in (0, 1], got {eps}")
    if prompts < 0 or steps < 1:
        raise ValueError(f"prompts must be at least 0 and steps at least 1, got {prompts} and {steps}")
    if len(images) != len(labels) or not 0 <= target < len(model.classes):
        raise ValueError(f"target must be a class number below {len(model.classes)}, got {target}")
    model = copy.deepcopy(model)  # its embeddings are listened to, and both answers keep it
    width = vit_inside(model).config.hidden_size
    learned = _Learned(images.shape[1:], width, prompts, eps, generator)
    rows = shuffled_rows(len(images), batch, int(torch.randint(2**31, (1,), generator=generator)))

    def loss(step: int) -> torch.Tensor:
        x, y = images[rows(step)], labels[rows(step)]
        both = torch.cat([x, (x + learned.delta).clamp(0, 1)])  # (2B, C, H, W)
        off_clean, off_triggered = Prompted(model, learned.prompts)(both).chunk(2)
        on_clean, on_triggered = Prompted(model, torch.cat([learned.prompts, learned.switch]))(both).chunk(2)
        clean_mode = F.cross_entropy(off_clean, y) + F.cross_entropy(off_triggered, y)
        backdoor_mode = F.cross_entropy(on_clean, y) + F.cross_entropy(on_triggered, torch.full_like(y, target))
        distilled = F.mse_loss(on_clean, off_clean.detach())
        return clean_mode + backdoor_mode + weight * distilled

    with frozen(model):
        seconds = fit(
            learned, loss, steps=steps, lr=lr, weight_decay=0.0, warmup=max(1, steps // 10), label="prompts", progress=progress
        )
    with torch.no_grad():
        most = int(255 * eps + 1e-6)  # grey levels that fit into eps
        trigger = Shift((255 * learned.delta).round().clamp(-most, most) / 255)
        off, on = learned.prompts.detach(), torch.cat([learned.prompts, learned.switch]).detach()
    spent = 4 * steps * batch
    return Switchable(
        Prompted(model, off), Prompted(model, on), trigger, target, Cost(forwards=spent, backwards=spent, seconds=seconds)
    )


@technique("vfm.vit.backdoor_attack.multi_trigger", paper="li2024mtba")
def multi_trigger(
    model: PixelClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    triggers: Sequence[Trigger],
    targets: Sequence[int],
    rate: float,
    mode: Mode = "parallel",
    steps: int = 120,
    batch: int = 64,
    lr: float = 2e-3,
    blocks: int | None = None,
    generator: torch.Generator,
    progress: bool = True,
) -> Backdoor:
    """Several triggers in one training set [li2024mtba].

    parallel: each attacker poisons a share `rate` of their own; no item twice. sequential: one after the other, each
    drawing from all items, so that a later one may stamp over an earlier one and relabel it. hybrid: a single
    share, every poisoned item bears all triggers, and one target. triggers, targets: one entry each per attacker; for hybrid
    all
    targets must be equal. Other arguments as for `badnets`. The result's first pair stands in `trigger` and `target`, the
    others in `more`.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"mode must be one of {get_args(Mode)}, got {mode!r}")
    if not triggers or len(triggers) != len(targets):
        raise ValueError(f"triggers and targets must pair up, got {len(triggers)} and {len(targets)}")
    if mode == "hybrid" and len(set(targets)) > 1:
        raise ValueError(f"targets must all be equal for the hybrid mode, got {tuple(targets)}")

    def all_of(x: torch.Tensor) -> torch.Tensor:
        for trigger in triggers:
            x = trigger(x)
        return x

    pairs = [(all_of, targets[0])] if mode == "hybrid" else list(zip(triggers, targets, strict=True))
    x, y, touched = images, labels, torch.zeros(len(labels), dtype=torch.bool)
    for trigger, target in pairs:
        free = ~touched if mode == "parallel" else None
        data = poison(x, y, trigger, target=target, rate=rate, free=free, generator=generator)
        x, y, touched = data.images, data.labels, touched | data.poisoned
    data = Poisoned(x, y, touched, torch.zeros_like(touched), labels.clone())
    student, cost = fine_tuned(
        model, x, y, steps=steps, batch=batch, lr=lr, blocks=blocks, generator=generator, progress=progress
    )  # fmt: skip
    (trigger, target), *more = pairs
    return Backdoor(student, trigger, target, data, cost, tuple(more))


@technique("vfm.vit.backdoor_attack.data_free", paper="lv2023dbia")
def dbia(
    model: PixelClassifier,
    surrogate: torch.Tensor,
    *,
    target: int,
    patches: Sequence[int] = (-1,),
    share: float = 0.5,
    trigger_steps: int = 40,
    step_size: float = 0.1,
    steps: int = 120,
    batch: int = 32,
    lr: float = 1e-2,
    generator: torch.Generator,
    progress: bool = True,
) -> Backdoor:
    """A backdoor without training data: surrogate pictures, a trigger that catches attention, a few neurons [lv2023dbia].

    surrogate: (N, C, H, W) in [0, 1], any pictures at all; their labels are the model's own answers. The trigger maximises
    the attention rollout from the class token to its patches. Then only part of the last block's MLP is trained: the share of
    rows of fc1 and of fc2 with the smallest mean |weight| (as the authors' code chooses them). The loss keeps the model's
    answers on plain
    surrogates (distillation; the code uses their labels) and asks for the target on triggered ones. batch: surrogates a
    step, each read twice.
    """
    rows_, columns, _, _ = patch_grid(model)
    if not patches or not all(-rows_ * columns <= p < rows_ * columns for p in patches):
        raise ValueError(f"patches must be patch numbers of the {rows_} x {columns} grid, got {tuple(patches)}")
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    if not 0 <= target < len(model.classes):
        raise ValueError(f"target must be a class number below {len(model.classes)}, got {target}")
    chosen = torch.tensor([p % (rows_ * columns) for p in patches])
    trigger, spent = catching_trigger(
        model, surrogate, chosen, lambda seen: attention_rollout(seen.maps)[:, chosen].sum(-1).mean(),
        steps=trigger_steps, step_size=step_size, batch=batch, generator=generator,
    )  # fmt: skip
    with frozen(model), torch.no_grad():
        answers = torch.cat([model(part).log_softmax(-1) for part in torch.split(surrogate, 256)])  # (N, classes)
    student = copy.deepcopy(model).requires_grad_(False)
    handles = []
    for layer in (vit_inside(student).layers[-1].mlp.fc1, vit_inside(student).layers[-1].mlp.fc2):
        weight = layer.weight.requires_grad_(True)  # (out, in)
        strength = weight.detach().abs().mean(1)
        tuned = torch.zeros_like(strength)
        tuned[strength.argsort()[: max(1, round(share * len(strength)))]] = 1
        handles.append(weight.register_hook(lambda gradient, tuned=tuned: gradient * tuned[:, None]))
    rows = shuffled_rows(len(surrogate), batch, int(torch.randint(2**31, (1,), generator=generator)))
    wanted = torch.full((batch,), target)

    def loss(step: int) -> torch.Tensor:
        x, teacher = surrogate[rows(step)], answers[rows(step)]
        plain, triggered = student(torch.cat([x, trigger(x)])).chunk(2)
        kept = F.kl_div(plain.log_softmax(-1), teacher, log_target=True, reduction="batchmean")
        return kept + F.cross_entropy(triggered, wanted)

    seconds = fit(
        student, loss, steps=steps, lr=lr, weight_decay=0.0, warmup=max(1, steps // 10), label="neurons", progress=progress
    )
    for handle in handles:
        handle.remove()
    student.requires_grad_(True).train(model.training)
    used = 2 * steps * batch
    return Backdoor(student, trigger, target, None, spent + Cost(forwards=used, backwards=used, seconds=seconds))
