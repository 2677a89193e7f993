"""Survey section 2.1, adversarial defenses of Vision Transformers, in the survey's order.

Training against attacks, noticing them, a ViT that leans on no single patch, and washing them out. Input quantisation,
which only hides its gradients, is the standing example of how not to measure robustness. Beside each defense stands
what an attack written against it needs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from threading import local
from typing import Any, Literal

import torch
import torch.nn.functional as F

from safescale_lib.measure import smoothing
from safescale_lib.measure.costs import Meter
from safescale_lib.measure.criteria import Criterion, Misclassified, check_labels
from safescale_lib.search import pixels
from safescale_lib.search.ball import Ball
from safescale_lib.search.models import Model, frozen
from safescale_lib.search.objectives import Objective, cross_entropy, margin
from safescale_lib.survey import technique
from safescale_lib.vfm.vit.inside import attending, patch_grid, patch_mask, vit_inside
from safescale_lib.zoo.adapter import PixelClassifier
from safescale_lib.zoo.denoiser import Denoiser
from safescale_lib.zoo.training import fit


def _guard_training(eps: float, steps: int, inner_steps: int) -> None:
    if not 0 < eps <= 1:
        raise ValueError(f"eps must lie in (0, 1], got {eps}")
    if steps < 1 or inner_steps < 1:
        raise ValueError(f"steps and inner_steps must be at least 1, got {steps} and {inner_steps}")


class _Tokens(local):
    """The class token (B, D) by place; every thread sees the pass it made itself."""

    def __init__(self) -> None:
        self._at: dict[int, torch.Tensor] = {}

    def __setitem__(self, place: int, token: torch.Tensor) -> None:
        self._at[place] = token

    def __getitem__(self, place: int) -> torch.Tensor:
        return self._at[place]

    @property
    def all(self) -> list[torch.Tensor]:
        """The tokens in the order of the places."""
        return [self._at[place] for place in sorted(self._at)]


@contextmanager
def class_token(model: Model, *layers: int) -> Iterator[_Tokens]:
    """Inside the block `yielded[i]` is the class token (B, D) after the i-th of these layers, in the latest pass."""
    seen = _Tokens()

    def keep(place: int) -> Callable[..., None]:
        return lambda module, args, output: seen.__setitem__(place, output[:, 0])

    inside = vit_inside(model).layers
    handles = [inside[layer].register_forward_hook(keep(place)) for place, layer in enumerate(layers)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


smoothed = technique("vfm.vit.adversarial_defense", paper="cohen2019smoothing")(smoothing.smoothed)


@technique("vfm.vit.adversarial_defense.adversarial_training", paper="madry2018pgd")
def adversarial_training(
    model: PixelClassifier,
    batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    *,
    eps: float,
    steps: int,
    inner_steps: int = 2,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> PixelClassifier:
    """Fine-tune a copy of the model on the worst images an attacker finds within eps; the model itself stays.

    min over weights of E[ max over |delta| <= eps of loss(x + delta, y) ], equation 2.1 of [madry2018pgd].
    batch: step number -> images (B, 3, S, S) in [0, 1] and labels (B,) int64. eps: linf radius in pixel units, > 0.
    steps: outer updates, >= 1; inner_steps: PGD steps of the inner maximisation. lr: peak learning rate.
    Raises ValueError for a budget that trains nothing.
    """
    _guard_training(eps, steps, inner_steps)
    student = copy.deepcopy(model)

    def loss(step: int) -> torch.Tensor:
        images, labels = batch(step)  # (B, 3, S, S), (B,)
        generator = torch.Generator().manual_seed(seed * 1_000_000 + step)
        attacked = pixels.worst_case(student, images, labels, eps=eps, steps=inner_steps, generator=generator)  # inner max
        return F.cross_entropy(student(attacked), labels)  # outer min

    fit(student, loss, steps=steps, lr=lr, warmup=max(1, steps // 10), label="adversarial training", progress=progress)
    return student


@contextmanager
def _gradient_around_attention(model: PixelClassifier, share: float, generator: torch.Generator) -> Iterator[None]:
    """Inside the block, each attention block is, in each forward pass and with this probability, a constant to gradients."""

    def hook(module: torch.nn.Module, args: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        dropped = bool(torch.rand((), generator=generator) < share)
        return (output[0].detach(), output[1]) if dropped else output

    handles = [layer.attention.register_forward_hook(hook) for layer in vit_inside(model).layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@technique("vfm.vit.adversarial_defense.adversarial_training", paper="mo2022ardprm")
def ard_prm(
    model: PixelClassifier,
    batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    *,
    eps: float,
    steps: int,
    inner_steps: int = 2,
    ramp: float = 0.25,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> PixelClassifier:
    """Adversarial training made for ViTs: the inner attack starts half blind and opens its eyes [mo2022ardprm].

    Attention random dropping (ARD): in each pass of the inner attack each attention block is, by chance, a constant to
    gradients. Perturbation random masking (PRM): before each inner step the change is taken back on some patches. The
    share of blocks and of patches that stay grows from none to all over the first `ramp` of the steps, as in the authors'
    code, so that the model meets ever harder attacks. Other arguments as for `adversarial_training`, to which it reduces
    at ramp = 0. Raises ValueError; TypeError for a model that is no ViT.

    Deviation: patches are drawn for each image, not once for the batch.
    """
    _guard_training(eps, steps, inner_steps)
    if not 0 <= ramp <= 1:
        raise ValueError(f"ramp must lie in [0, 1], got {ramp}")
    student, ball = copy.deepcopy(model), Ball(eps, "linf", grid=None)
    rows, columns, _, _ = patch_grid(student)

    def loss(step: int) -> torch.Tensor:
        images, labels = batch(step)  # (B, 3, S, S), (B,)
        lost = max(0.0, 1 - step / (ramp * steps)) if ramp else 0.0  # share of blocks and of patches
        generator, dice = (torch.Generator().manual_seed(seed * 1_000_000 + step + jump) for jump in (0, 500_000_000))
        x = ball.sample(images, generator)
        with frozen(student), _gradient_around_attention(student, lost, dice):  # ARD
            for _ in range(inner_steps):
                spared = torch.rand(len(images), rows * columns, generator=dice).argsort(1)[:, : round(lost * rows * columns)]
                x = torch.where(patch_mask(student, spared.to(images.device)), images, x)  # PRM
                x = pixels.ascend(
                    student, images, x, lambda logits, live: F.cross_entropy(logits, labels[live], reduction="none"), ball,
                    steps=1, step_size=1.5 * eps / inner_steps,
                )  # fmt: skip
        return F.cross_entropy(student(x), labels)

    fit(student, loss, steps=steps, lr=lr, warmup=max(1, steps // 10), label="ARD + PRM", progress=progress)
    return student


@dataclass(frozen=True, eq=False)
class ReconstructionDetector:
    """Score of how differently a ViT reads a picture and its reconstruction; made by `vitguard`, call it on images."""

    model: PixelClassifier
    reconstruct: Callable[[torch.Tensor], torch.Tensor]
    layer: int
    part: Literal["attention", "cls"]

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, D): what the class token pays to each patch, or its own embedding, in the detector's layer."""
        if self.part == "attention":
            with attending(self.model) as attention:
                self.model(images)
            paid: torch.Tensor = attention.maps[self.layer][:, :, 0, 1:]  # (B, heads, patches)
            return paid.flatten(1)
        with class_token(self.model, self.layer) as seen:
            self.model(images)
        return seen[0]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(B,) suspicion, larger for more suspicious images; differentiable in the images."""
        before, after = self.features(images), self.features(self.reconstruct(images))
        moved: torch.Tensor = torch.linalg.vector_norm(before - after, dim=1)
        return moved


@technique("vfm.vit.adversarial_defense.adversarial_detection", paper="sun2024vitguard")
def vitguard(
    model: PixelClassifier,
    reconstruct: Callable[[torch.Tensor], torch.Tensor],
    *,
    layer: int,
    part: Literal["attention", "cls"] = "attention",
) -> ReconstructionDetector:
    """Detect attacks by comparing what the ViT sees in a picture and in its reconstruction [sun2024vitguard].

    Of a clean scene a reconstruction changes little that matters; an attack's pattern is not rebuilt, and the class token's
    attention, or its embedding, moves. model: PixelClassifier around a ViT. reconstruct: images (B, 3, S, S) in [0, 1] ->
    the same, rebuilt by a generative model. layer: 0..depth-1, where to compare; part: "attention" or "cls".
    Returns a detector: images (B, 3, S, S) -> (B,) L2 distance. Set its threshold with `threshold_at_fpr` on clean scenes
    that you do not judge it on. Raises ValueError; TypeError where there is no ViT.

    Deviations: the paper rebuilds hidden patches with a masked autoencoder, here any generative model may do it; and it
    combines its two detectors, here one is used at a time.
    """
    depth = len(vit_inside(model).layers)
    if not 0 <= layer < depth:
        raise ValueError(f"layer must lie in 0..{depth - 1}, got {layer}")
    if part not in ("attention", "cls"):
        raise ValueError(f"part must be 'attention' or 'cls', got {part!r}")
    return ReconstructionDetector(model, reconstruct, layer, part)


def guarded(model: Model, score: Callable[[torch.Tensor], torch.Tensor], threshold: float) -> Model:
    """The model behind a detector: images -> (B, classes + 1), the logits and, last, the alarm.

    The alarm is score / threshold - 1: above 0 the input is refused. Judge it with `Unnoticed`. threshold: > 0.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold}")

    def answer(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([model(images), (score(images) / threshold - 1)[:, None]], dim=1)

    return answer


@dataclass(frozen=True, eq=False)
class Unnoticed:
    """A wrong answer and no alarm: the only success against a guarded model. labels: (N,) int64.

    A clean item is right when its class is and no alarm sounds; a false alarm is an error of the defense.
    """

    labels: torch.Tensor

    def __post_init__(self) -> None:
        check_labels("labels", self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def met(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (outputs[:, :-1].argmax(dim=-1) != self.labels[rows]) & (outputs[:, -1] <= 0)

    def correct(self, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return (outputs[:, :-1].argmax(dim=-1) == self.labels[rows]) & (outputs[:, -1] <= 0)


def evading(weight: float, lead: float = 2.0) -> Objective:
    """What an attacker climbs who knows of the detector: the margin of a wrong class, minus weight times the alarm.

    Beyond `lead` logits the margin counts no further, and a silent alarm is as good as a more silent one: the search turns to
    whichever goal is not reached yet [carlini2017detected].
    """

    def objective(criterion: Criterion, outputs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        if not isinstance(criterion, Unnoticed):
            raise TypeError(f"criterion must be Unnoticed for this objective, got {type(criterion).__name__}")
        gain = margin(Misclassified(criterion.labels), outputs[:, :-1], rows)
        return gain.clamp(max=lead) - weight * outputs[:, -1].clamp(min=-0.1)

    return objective


@technique("vfm.vit.adversarial_defense.robust_architecture", paper="guo2023rspc")
def rspc(
    model: PixelClassifier,
    batch: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
    *,
    patches: int,
    steps: int,
    inner_steps: int = 2,
    weight: float = 1.0,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> PixelClassifier:
    """Fine-tune a copy so that ruining a few patches no longer moves the ViT's features [guo2023rspc].

    Each step finds the patches of each image whose replacement by noise would hurt most, to first order; fills them with
    noise that `inner_steps` sign steps make worse; and trains on both pictures, with a penalty on how far the class
    token's features move from clean to ruined in every layer. batch: as for `adversarial_training`. patches: how many are
    ruined, at least 1. weight: of the alignment. Raises ValueError; TypeError for a model that is no ViT.

    Deviation: the paper learns a network that picks the patches, against the alignment; here a gradient does.
    """
    rows, columns, height, width = patch_grid(model)
    if not 1 <= patches < rows * columns:
        raise ValueError(f"patches must lie in 1..{rows * columns - 1}, got {patches}")
    if steps < 1 or inner_steps < 0 or weight < 0:
        raise ValueError(f"steps must be >= 1, inner_steps and weight >= 0, got {steps}, {inner_steps} and {weight}")
    student = copy.deepcopy(model)
    depth = len(vit_inside(student).layers)

    def slope(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with frozen(student), torch.enable_grad():
            x = x.clone().requires_grad_(True)
            return torch.autograd.grad(F.cross_entropy(student(x), labels, reduction="sum"), x)[0]

    def ruined(images: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.rand(images.shape, generator=generator).to(images)
        hurt = ((noise - images) * slope(images, labels)).sum(1, keepdim=True)  # (B, 1, S, S) first-order rise of the loss
        worst = F.avg_pool2d(hurt, (height, width)).flatten(1).topk(patches, dim=1).indices  # (B, patches)
        mask = patch_mask(student, worst)  # (B, 1, S, S)
        found = torch.where(mask, noise, images)
        for _ in range(inner_steps):  # the corruption is adversarial to the alignment below
            found = torch.where(mask, (found + 0.25 * slope(found, labels).sign()).clamp(0, 1), images)
        return found

    def loss(step: int) -> torch.Tensor:
        images, labels = batch(step)  # (B, 3, S, S), (B,)
        bad = ruined(images, labels, torch.Generator().manual_seed(seed * 1_000_000 + step))
        with class_token(student, *range(depth)) as seen:
            good_loss, good = F.cross_entropy(student(images), labels), torch.stack(seen.all)  # (layers, B, D)
            bad_loss, moved = F.cross_entropy(student(bad), labels), torch.stack(seen.all)
        return good_loss + bad_loss + weight * F.mse_loss(moved, good.detach())

    fit(student, loss, steps=steps, lr=lr, warmup=max(1, steps // 10), label="RSPC", progress=progress)
    return student


def purify(denoiser: Denoiser, images: torch.Tensor, *, time: int, steps: int = 1, noise: torch.Tensor) -> torch.Tensor:
    """Drown an attack in noise, then take the noise away: images (B, 3, S, S) in [0, 1] -> the same, washed.

    time: how far to diffuse, 1..T-1. steps: of the way back, at least 1, without new noise (DDIM). noise: standard normal,
    (B, 3, S, S) or one for all (1, 3, S, S). Differentiable.
    """
    if not 1 <= time < denoiser.times:
        raise ValueError(f"time must lie in 1..{denoiser.times - 1}, got {time}")
    if not 1 <= steps <= time:
        raise ValueError(f"steps must lie in 1..time, got {steps}")
    stops = torch.linspace(time, 0, steps + 1).round().long().tolist()  # time, ..., 0
    z = denoiser.noised(2 * images - 1, torch.tensor([time], device=images.device), noise)
    z = z.contiguous(memory_format=torch.channels_last)  # convolutions on a CPU are a fifth faster that way
    for now, after in pairwise(stops):
        clean = denoiser(z, torch.full((len(images),), now, device=images.device))
        a, b = denoiser.a[now], denoiser.a[after]
        rest = (z - a.sqrt() * clean) / (1 - a).sqrt()  # the noise that is left, as the network sees it
        z = b.sqrt() * clean + (1 - b).sqrt() * rest if after else clean
    return (z + 1) / 2


@technique("vfm.vit.adversarial_defense.adversarial_purification", paper="nie2022diffpure")
def diffpure(model: Model, denoiser: Denoiser, *, time: int, steps: int = 1, draws: int = 1, seed: int = 0) -> Model:
    """Show the model pictures that a diffusion model has washed [nie2022diffpure].

    The picture is diffused to `time`, which drowns a small attack in noise, and denoised in `steps`. The noise is random:
    class probabilities are averaged over `draws`. seed: of the noise, the same draws for every picture of every call, so that
    an answer does not depend on a picture's company; the defender keeps it secret, and an attack is to be made with other
    noise. Returns a callable with the model's own call, (B, classes) log probabilities. Raises ValueError.

    Deviation: the paper solves the reverse stochastic equation in many small steps, here few deterministic ones lead back.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    blank = torch.zeros(1, 3, denoiser.side, denoiser.side)
    purify(denoiser, blank, time=time, steps=steps, noise=blank)  # refuse bad numbers now, not at the first image

    def defended(images: torch.Tensor) -> torch.Tensor:
        generator, votes = torch.Generator().manual_seed(seed), []
        for _ in range(draws):
            noise = torch.randn(1, *images.shape[1:], generator=generator).to(images)
            votes.append(model(purify(denoiser, images, time=time, steps=steps, noise=noise)).softmax(-1))
        return torch.stack(votes).mean(0).clamp(min=1e-12).log()  # (draws, B, classes) -> (B, classes)

    return defended


def surrogate_pgd(
    victim: Model,
    surrogate: Model,
    images: torch.Tensor,
    criterion: Criterion,
    *,
    eps: float,
    steps: int,
    step_size: float | None = None,
    momentum: float = 0.0,
    objective: Objective = cross_entropy,
    independent: bool = False,
    batch_size: int = 100,
    generator: torch.Generator,
) -> pixels.PixelAttack:
    """PGD along a surrogate's gradients, judged on the victim: the shape of an adaptive attack [athalye2018obfuscated].

    surrogate: anything differentiable that the attacker puts in the victim's place, such as a straight-through copy
    (BPDA) or, where the victim is random, the same with fresh noise at every call; the gradient then averages over draws
    in the course of the steps (EOT). Items run all their steps. independent: neither of the two keeps a state, so two
    batches may run at once. Other arguments as for `pgd`.
    """
    ball = Ball(eps, "linf")
    pixels._guard(images, criterion, steps=steps, batch_size=batch_size)
    size = 2.5 * eps / steps if step_size is None else step_size
    if not 0 <= size < float("inf"):
        raise ValueError(f"step_size must be finite and >= 0, got {step_size}")

    def search(rows: torch.Tensor, start: torch.Tensor, meter: Meter) -> torch.Tensor:
        return pixels.ascend(
            surrogate, images[rows], start, lambda outputs, live: objective(criterion, outputs, rows[live]), ball,
            steps=steps, step_size=size, momentum=momentum, meter=meter,
        )  # fmt: skip

    with frozen(surrogate):
        return pixels._best_of(
            victim, images, criterion, ball, iter([ball.sample(images, generator)]), search, batch_size, independent=independent
        )


def quantise(images: torch.Tensor, levels: int) -> torch.Tensor:
    """Round pixels in [0, 1] to `levels` evenly spaced values, at least 2. The gradient of rounding is zero."""
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    return (images * (levels - 1)).round() / (levels - 1)


@technique("vfm.vit.adversarial_defense", paper="xu2018squeezing")
def quantised_input(model: Model, *, levels: int) -> Model:
    """Show the model coarse pixels only: small changes are to be rounded away [xu2018squeezing].

    Its gradient is zero almost everywhere, so a white-box attack alone will call it robust whether or not it is.
    levels: grey levels a channel, at least 2. Returns a callable with the model's own call.
    """
    quantise(torch.zeros(1), levels)  # refuse bad levels now, not at the first image

    def defended(images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(quantise(images, levels))
        return logits

    return defended
