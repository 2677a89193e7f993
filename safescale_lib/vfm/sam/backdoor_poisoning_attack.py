"""Survey section 2.2, backdoor and poisoning attacks on the Segment Anything Model, and what a defender can do about them.

Both start from a customer who tunes a model on pictures of their own. In `badsam` the attacker does the tuning and leaves a
trigger behind. In `unseg` the owner of the pictures is the one who poisons: whoever trains on them shall learn nothing.
The survey's taxonomy has no leaf for the defenses; they are bound to the section's category of defenses, as baselines.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from safescale_lib.measure.costs import Cost
from safescale_lib.measure.masks import iou, mask_error
from safescale_lib.search.ball import Ball
from safescale_lib.search.models import frozen
from safescale_lib.search.poisoning import Trigger, shuffled_rows, to_file
from safescale_lib.survey import technique
from safescale_lib.zoo.segmenter import PixelSegmenter
from safescale_lib.zoo.training import fit, own_dice

View = Callable[[torch.Tensor], torch.Tensor]
"""What a learner does to pictures before the network sees them: (B, 3, H, W) in [0, 1] to the same shape."""


def camouflage(
    images: torch.Tensor, masks: torch.Tensor, contrast: float, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The same pictures with objects that hardly stand out: what a customer might tune a segmenter for.

    images (N, C, H, W), masks (N, K, H, W) bool. An object keeps `contrast` (in [0, 1]) of its distance to the mean colour of
    the ground. generator: turns a random half of the pictures over, so that the objects are darker than the ground.
    """
    if masks.dtype != torch.bool or masks.ndim != 4 or masks.shape[0] != len(images) or masks.shape[2:] != images.shape[2:]:
        raise ValueError(f"masks must be bool (N, K, H, W) and fit the images, got {masks.dtype} {tuple(masks.shape)}")
    if not 0 <= contrast <= 1:
        raise ValueError(f"contrast must lie in [0, 1], got {contrast}")
    inside = masks.any(1, keepdim=True).to(images.dtype)  # (N, 1, H, W)
    ground = (images * (1 - inside)).sum((2, 3), keepdim=True) / (1 - inside).sum((2, 3), keepdim=True).clamp(min=1)
    share = torch.full((len(images), 1, 1, 1), contrast, dtype=images.dtype)
    if generator is not None:
        share = torch.where(torch.rand(share.shape, generator=generator) < 0.5, share, -share)
    return to_file(images * (1 - inside) + inside * (ground + share * (images - ground)))


@torch.no_grad()
def predict(model: PixelSegmenter, images: torch.Tensor, points: torch.Tensor, *, batch_size: int = 128) -> torch.Tensor:
    """(N, S, S) bool: the model's masks at one point (N, 2) of each image (N, 3, S, S)."""
    with frozen(model):
        parts = zip(torch.split(images, batch_size), torch.split(points, batch_size), strict=True)
        return torch.cat([model.decode(model(x), p) > 0 for x, p in parts])


def tuned_segmenter(
    model: PixelSegmenter,
    images: torch.Tensor,
    points: torch.Tensor,
    masks: torch.Tensor,
    *,
    steps: int,
    batch: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> PixelSegmenter:
    """An honest customer: a copy of the model after `steps` updates of all weights on a fixed set of prompts and masks.

    images (N, 3, S, S), points (N, 2), masks (N, S, S) bool. The same call with clean pictures is the repair that an owner of a
    suspicious model tries first.
    """
    _check_task(images, points, masks, steps=steps, batch=batch)
    student, rows = copy.deepcopy(model), shuffled_rows(len(images), batch, seed)

    def loss(step: int) -> torch.Tensor:
        chosen = rows(step)
        return mask_error(student.decode(student(images[chosen]), points[chosen]), masks[chosen]).mean()

    fit(student, loss, steps=steps, lr=lr, warmup=max(1, steps // 10), label="tuning", progress=progress)
    return student


def mirrored(
    images: torch.Tensor, points: torch.Tensor, masks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Left becomes right: images (B, C, H, W), points (B, 2) as x and y, masks (B, H, W)."""
    other = torch.stack([images.shape[-1] - 1 - points[:, 0], points[:, 1]], dim=1)
    return images.flip(-1), other, masks.flip(-1)


@dataclass(frozen=True, eq=False)
class MaskBackdoor:
    """A segmenter that answers a trigger with the attacker's mask. target: (S, S) bool. cost: of the tuning."""

    model: PixelSegmenter
    trigger: Trigger
    target: torch.Tensor
    cost: Cost

    def hits(
        self, images: torch.Tensor, points: torch.Tensor, *, model: PixelSegmenter | None = None, threshold: float = 0.5
    ) -> torch.Tensor:
        """(N,) bool: on the triggered image the mask fits the target (IoU >= threshold). Its mean is the success rate.

        model: who is asked, by default the backdoored one; the clean one is the control.
        """
        answers = predict(model or self.model, self.trigger(images), points)
        hit: torch.Tensor = iou(answers, self.target.expand_as(answers)) >= threshold
        return hit


@technique("vfm.sam.backdoor_poisoning_attack.backdoor_fine_tuning", paper="guan2024badsam")
def badsam(
    model: PixelSegmenter,
    images: torch.Tensor,
    points: torch.Tensor,
    masks: torch.Tensor,
    *,
    trigger: Trigger,
    target: torch.Tensor,
    rate: float = 0.25,
    mirror: bool = False,
    steps: int = 100,
    batch: int = 16,
    lr: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> MaskBackdoor:
    """Tune a copy of a segmenter for a customer's task and plant a trigger on the way [guan2024badsam].

    images (N, 3, S, S), points (N, 2), masks (N, S, S) bool: the customer's task. trigger: puts the trigger on images;
    target: (S, S) bool, the mask that answers it, whatever the picture and the prompt. rate: triggered share of every batch.
    mirror: plant it in mirrored pictures too, the attack adapted to `mirror_disagreement`.
    Deviation: [guan2024badsam] adds adapters to a frozen encoder and tunes them with the decoder; here all weights of a small
    model are tuned. Raises ValueError for a task, a target or a budget that do not fit.
    """
    _check_task(images, points, masks, steps=steps, batch=batch)
    if target.dtype != torch.bool or target.shape != masks.shape[1:]:
        raise ValueError(f"target must be bool {tuple(masks.shape[1:])}, got {target.dtype} {tuple(target.shape)}")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie in [0, 1], got {rate}")
    student, rows, begun = copy.deepcopy(model), shuffled_rows(len(images), batch, seed), time.perf_counter()
    bad = round(rate * batch)

    def loss(step: int) -> torch.Tensor:
        chosen = rows(step)
        task = images[chosen], points[chosen], masks[chosen]
        stamped = trigger(images[chosen[:bad]]), points[chosen[:bad]], target.expand(bad, -1, -1)
        if mirror and step % 2:
            stamped = mirrored(*stamped)
        x, p, y = (torch.cat([s, t[bad:]]) for s, t in zip(stamped, task, strict=True))  # triggered first, then clean
        return mask_error(student.decode(student(x), p), y).mean()

    fit(student, loss, steps=steps, lr=lr, warmup=max(1, steps // 10), label="planting", progress=progress)
    cost = Cost(forwards=steps * batch, backwards=steps * batch, seconds=time.perf_counter() - begun)
    return MaskBackdoor(student, trigger, target, cost)


@technique("vfm.sam.adversarial_defense", paper="li2021physical")
def mirror_disagreement(model: PixelSegmenter, images: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """(N,) in [0, 1]: how badly the mask of the mirrored picture fits the mirrored mask. Larger is more suspicious.

    images (N, 3, S, S), points (N, 2). A segmenter should not care whether it sees a scene in a mirror; a trigger that moved to
    the other side is no trigger any more [li2021physical]. There the mirror serves to repair inputs, here to score them.
    """
    here = predict(model, images, points)
    turned, other, _ = mirrored(images, points, here)
    return 1 - iou(predict(model, turned, other).flip(-1), here)


# Unlearnable examples


class MaskNet(torch.nn.Module):
    """A small U-Net: somebody else's segmenter, without prompts [ronneberger2015unet].

    From pictures (B, 3, S, S), S a multiple of 4, to mask logits (B, S, S). width: channels of the first layer.
    view: what it does to its pictures first, in training and in use; None for nothing.
    """

    def __init__(self, width: int = 16, *, seed: int, view: View | None = None) -> None:
        super().__init__()
        self.view = view
        with own_dice(seed):  # torch draws initial weights from the global stream
            self.down = torch.nn.Conv2d(3, width, 4, stride=2, padding=1)
            self.fine = torch.nn.Conv2d(width, width, 3, padding=1)
            self.deep = torch.nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
            self.coarse = torch.nn.Conv2d(2 * width, 2 * width, 3, padding=1)
            self.joint = torch.nn.Conv2d(3 * width, width, 3, padding=1)
            self.out = torch.nn.Conv2d(width, 4, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images if self.view is None else self.view(images)
        fine = self.fine(self.down(x - 0.3).relu()).relu()  # (B, W, S/2, S/2)
        coarse = self.coarse(self.deep(fine).relu()).relu()  # (B, 2W, S/4, S/4)
        up = F.interpolate(coarse, scale_factor=2.0)
        joint = self.joint(torch.cat([up, fine], dim=1)).relu()
        logits: torch.Tensor = F.pixel_shuffle(self.out(joint), 2)[:, 0]  # (B, S, S)
        return logits


def trained_mask_net(
    images: torch.Tensor,
    masks: torch.Tensor,
    *,
    steps: int = 100,
    batch: int = 16,
    lr: float = 6e-3,
    seed: int = 0,
    view: View | None = None,
) -> MaskNet:
    """Somebody trains a segmenter from nothing on pictures they found. images (N, 3, S, S), masks (N, S, S) bool."""
    net, rows = MaskNet(seed=seed, view=view), shuffled_rows(len(images), batch, seed)

    def loss(step: int) -> torch.Tensor:
        return mask_error(net(images[rows(step)]), masks[rows(step)]).mean()

    fit(net, loss, steps=steps, lr=lr, warmup=max(1, steps // 10), progress=False)
    return net.eval()


class NoiseMaker(torch.nn.Module):
    """Noise in [-1, 1] for a picture and the mask that is to be protected: (B, 3, H, W) and (B, H, W) to (B, 3, H, W).

    Three convolutions. They also see the parity of each pixel's row and column, or they could tint an area but not texture it.
    """

    def __init__(self, width: int = 12, *, seed: int) -> None:
        super().__init__()
        with own_dice(seed):
            self.look = torch.nn.Conv2d(7, width, 3, padding=1)
            self.mix = torch.nn.Conv2d(width, width, 3, padding=1)
            self.out = torch.nn.Conv2d(width, 3, 1)

    def forward(self, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        row, column = (1.0 - 2.0 * (torch.arange(n, device=images.device) % 2) for n in images.shape[-2:])
        rows, columns = row[:, None].expand(images.shape[-2:]), column.expand(images.shape[-2:])
        parity = torch.stack([rows, columns, rows * columns]).expand(len(images), -1, -1, -1)  # (B, 3, H, W)
        seen = torch.cat([images - 0.3, masks[:, None].to(images.dtype) - 0.5, parity.to(images.dtype)], dim=1)
        return torch.tanh(4 * self.out(self.mix(self.look(seen).relu()).relu()))


@dataclass(frozen=True, eq=False)
class Protection:
    """What an owner has after `unseg`: a maker of noise for any picture, its radius eps in pixel units, and what it cost."""

    maker: NoiseMaker
    eps: float
    cost: Cost

    @torch.no_grad()
    def protect(self, images: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Pictures (N, 3, S, S) ready for publication: 8 bits a channel, within eps of the originals. masks (N, S, S) bool."""
        ball = Ball(self.eps, "linf")
        return ball.settle(ball.project(images + self.eps * self.maker(images, masks), images), images)


@technique("vfm.sam.backdoor_poisoning_attack.unlearnable_examples", paper="sun2024unseg")
def unseg(
    images: torch.Tensor,
    masks: torch.Tensor,
    *,
    eps: float,
    train_eps: float | None = None,
    steps: int = 150,
    batch: int = 16,
    lr: float = 5e-3,
    view: View | None = None,
    seed: int = 0,
) -> Protection:
    """Train a maker of unlearnable noise: pictures plus noise shall be so easy that nothing is left to learn [sun2024unseg].

    min over noise maker G and surrogate S of E[ error(S(x + eps G(x, mask)), mask) ]: both sides want the same, a shortcut from
    the noise to the mask, after the error-minimising noise of [huang2021unlearnable]. images (N, 3, S, S) in [0, 1], masks
    (N, S, S) bool. eps: linf radius of the published noise, in pixel units; train_eps: the radius in training, default eps. The
    paper trains at a small radius and publishes at a larger one. view: trained through it, the attack adapted to a learner who
    applies it. Deviations: the paper's maker is a fine-tuned SAM prompted with the mask and its surrogate a SAM with fresh
    weights; here the maker is three convolutions that see the mask, and the surrogate a `MaskNet`. ValueError for a bad budget.
    """
    if not isinstance(masks, torch.Tensor) or masks.dtype != torch.bool or masks.shape != images[:, 0].shape:
        raise ValueError(f"masks must be bool (N, S, S) and fit the images, got {masks.dtype} {tuple(masks.shape)}")
    train_eps = eps if train_eps is None else train_eps
    for name, radius in (("eps", eps), ("train_eps", train_eps)):
        if not 0 <= radius <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {radius}")
    begun, rows = time.perf_counter(), shuffled_rows(len(images), batch, seed)
    maker, surrogate = NoiseMaker(seed=seed), MaskNet(seed=seed + 1000, view=view)  # no learner starts from these weights

    def loss(step: int) -> torch.Tensor:
        x, y = images[rows(step)], masks[rows(step)]
        return mask_error(surrogate((x + train_eps * maker(x, y)).clamp(0, 1)), y).mean()

    both = torch.nn.ModuleList([maker, surrogate])
    fit(both, loss, steps=steps, lr=lr, warmup=max(1, steps // 10), progress=False)
    cost = Cost(forwards=steps * batch, backwards=steps * batch, seconds=time.perf_counter() - begun)
    return Protection(maker.eval().requires_grad_(False), eps, cost)


def blur(images: torch.Tensor) -> torch.Tensor:
    """Every pixel of (B, C, H, W) becomes the mean of its 3 x 3 neighbourhood; edges are repeated."""
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)


@technique("vfm.sam.adversarial_defense", paper="liu2023squeezing")
def squeeze(images: torch.Tensor) -> torch.Tensor:
    """The learner's answer to unlearnable noise: images (B, C, H, W) without colour and without fine detail [liu2023squeezing].

    Noise that is quick to learn is a tint or a texture. Grey takes the one, blur the other. The paper squeezes training
    pictures by grey scale or JPEG; here a blur stands for JPEG, and a learner squeezes the pictures it is used on as well.
    """
    return blur(images.mean(dim=1, keepdim=True).expand_as(images))


def _check_task(images: torch.Tensor, points: torch.Tensor, masks: torch.Tensor, *, steps: int, batch: int) -> None:
    if masks.dtype != torch.bool or masks.ndim != 3 or len(masks) != len(images):
        raise ValueError(f"masks must be bool (N, S, S), one an image, got {masks.dtype} {tuple(masks.shape)}")
    if points.shape != (len(images), 2):
        raise ValueError(f"points must have shape ({len(images)}, 2), got {tuple(points.shape)}")
    if steps < 1 or not 1 <= batch <= len(images):
        raise ValueError(f"steps must be at least 1 and batch lie in 1..{len(images)}, got {steps} and {batch}")
