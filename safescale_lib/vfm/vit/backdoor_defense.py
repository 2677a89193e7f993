"""Survey section 2.1, backdoor defenses of Vision Transformers, in the survey's order, after the classics they start from.

A detector returns scores, larger for more suspicious inputs; its threshold is set on clean inputs held out for that. The
classics look
at the training set (activation clustering, spectral signatures) or mend the model (fine-tuning, fine-pruning).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from safescale_lib.measure import poison_detection
from safescale_lib.search.models import Model, frozen
from safescale_lib.survey import technique
from safescale_lib.vfm.vit.backdoor_attack import attention_rollout, fine_tuned
from safescale_lib.vfm.vit.inside import attending, patch_grid, patch_mask, vit_inside
from safescale_lib.zoo.adapter import PixelClassifier

CATEGORY = "vfm.vit.backdoor_defense"

activation_clustering = technique(CATEGORY, paper="chen2018activation")(poison_detection.activation_clustering)
spectral_signature = technique(CATEGORY, paper="tran2018spectral")(poison_detection.spectral_signature)


def last_features(model: PixelClassifier, images: torch.Tensor, *, batch_size: int = 256) -> torch.Tensor:
    """(N, D) what the classification head reads, for the detectors. images: (N, C, H, W) in [0, 1]."""
    caught: list[torch.Tensor] = []
    handle = model.model.classifier.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0].detach()))
    try:
        with frozen(model), torch.no_grad():
            for part in torch.split(images, batch_size):
                model(part)
    finally:
        handle.remove()
    return torch.cat(caught)


@technique(CATEGORY, paper="liu2018finepruning")
def clean_fine_tuning(
    model: PixelClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    steps: int = 60,
    batch: int = 64,
    lr: float = 2e-3,
    generator: torch.Generator,
    progress: bool = True,
) -> PixelClassifier:
    """Train a copy on clean data and hope that the backdoor is forgotten: the baseline of [liu2018finepruning].

    images (N, C, H, W), labels (N,): clean data of the defender's own. Arguments as for `fine_tuned`.
    """
    mended, _ = fine_tuned(model, images, labels, steps=steps, batch=batch, lr=lr, generator=generator, progress=progress)
    return mended


def pruned(model: PixelClassifier, images: torch.Tensor, *, share: float, batch_size: int = 256) -> PixelClassifier:
    """A copy without the neurons of the last block's MLP that clean images use least (mean |activation|).

    share: of the neurons, in [0, 1). A neuron is cut on both sides, so that later training cannot revive it.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share must lie in [0, 1), got {share}")
    slim = copy.deepcopy(model)
    mlp = vit_inside(slim).layers[-1].mlp
    sums: list[torch.Tensor] = []
    handle = mlp.fc2.register_forward_pre_hook(lambda module, inputs: sums.append(inputs[0].detach().abs().mean((0, 1))))
    with frozen(slim), torch.no_grad():
        for part in torch.split(images, batch_size):
            slim(part)
    handle.remove()
    idle = torch.stack(sums).mean(0).argsort()[: int(share * mlp.fc1.out_features)]
    with torch.no_grad():
        mlp.fc1.weight[idle], mlp.fc1.bias[idle], mlp.fc2.weight[:, idle] = 0, 0, 0
    return slim


@technique(CATEGORY, paper="liu2018finepruning")
def fine_pruning(
    model: PixelClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    share: float = 0.5,
    steps: int = 60,
    batch: int = 64,
    lr: float = 2e-3,
    generator: torch.Generator,
    progress: bool = True,
) -> PixelClassifier:
    """First cut the neurons that clean data leaves idle, where a backdoor may hide, then fine-tune what is left
    [liu2018finepruning].

    The paper prunes the last convolution until accuracy falls; a ViT's counterpart is the last block's MLP, and the share is
    fixed.
    """
    slim = pruned(model, images, share=share)
    mended, _ = fine_tuned(slim, images, labels, steps=steps, batch=batch, lr=lr, generator=generator, progress=progress)
    return mended


def drop_patches(model: Model, images: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Images (N, C, H, W) with `count` patches of the model's grid blackened, other ones for each image."""
    rows, columns, _, _ = patch_grid(model)
    if not 1 <= count <= rows * columns:
        raise ValueError(f"count must lie in 1..{rows * columns}, got {count}")
    order = torch.rand(len(images), rows * columns, generator=generator).argsort(1)  # (N, patches)
    return images.masked_fill(patch_mask(model, order[:, :count]), 0.0)


def shuffle_patches(model: Model, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images (N, C, H, W) with the patches of the model's grid in a random order, another one for each image."""
    rows, columns, height, width = patch_grid(model)
    n, channels = images.shape[:2]
    order = torch.rand(n, rows * columns, generator=generator).argsort(1)  # (N, patches)
    tiles = images.reshape(n, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    mixed = tiles[torch.arange(n)[:, None], order].view(n, rows, columns, channels, height, width)
    return mixed.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)


def _changed(
    model: Model, images: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor], tries: int, batch_size: int
) -> torch.Tensor:
    """(N,) share of `tries` random changes after which the model's answer is another one."""
    if tries < 1:
        raise ValueError(f"tries must be at least 1, got {tries}")

    def answers(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([model(part).argmax(-1) for part in torch.split(x, batch_size)])

    with frozen(model), torch.no_grad():
        before = answers(images)
        return torch.stack([answers(change(images)) != before for _ in range(tries)]).float().mean(0)


@technique("vfm.vit.backdoor_defense.patch_processing", paper="doan2023patchdrop")
def patch_drop(
    model: Model, images: torch.Tensor, *, drop: int, tries: int = 10, batch_size: int = 256, generator: torch.Generator
) -> torch.Tensor:
    """(N,) suspicion by PatchDrop: how often the answer changes when patches go missing [doan2023patchdrop].

    The reasoning: a clean object survives a few lost patches, a patch trigger that is lost takes its target along. drop:
    patches
    blackened a try (the paper drops them from the input; black is what is left of a dropped patch here). tries: random draws
    an image.
    """
    return _changed(model, images, lambda x: drop_patches(model, x, drop, generator), tries, batch_size)


@technique("vfm.vit.backdoor_defense.patch_processing", paper="doan2023patchdrop")
def patch_shuffle(
    model: Model, images: torch.Tensor, *, tries: int = 10, batch_size: int = 256, generator: torch.Generator
) -> torch.Tensor:
    """(N,) suspicion by PatchShuffle: how often the answer stays although the patches are in disorder [doan2023patchdrop].

    The reasoning: an object in disorder is no object any more, but a trigger that fills every patch, or one patch, still is
    one.
    """
    return 1 - _changed(model, images, lambda x: shuffle_patches(model, x, generator), tries, batch_size)


@technique("vfm.vit.backdoor_defense.image_blocking", paper="subramanya2024imageblocking")
def attention_blocked(model: PixelClassifier, *, blocked: int = 1, fill: float = 0.0) -> Model:
    """The model behind a blindfold: the patches it attends to most are painted over, then it is asked again
    [subramanya2024imageblocking].

    A patch trigger must be looked at to work, so the map of attention gives it away. The map is the attention rollout of the
    picture; `blocked` patches with the largest value are set to `fill`. Returns a callable with the model's own call.
    """
    rows, columns, _, _ = patch_grid(model)
    if not 0 <= blocked <= rows * columns:
        raise ValueError(f"blocked must lie in 0..{rows * columns}, got {blocked}")
    if not 0 <= fill <= 1:
        raise ValueError(f"fill must lie in [0, 1], got {fill}")

    def defended(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), attending(model) as seen:
            model(images)
            chosen = attention_rollout(seen.maps).topk(blocked, dim=1).indices  # (B, blocked)
        logits: torch.Tensor = model(images.masked_fill(patch_mask(model, chosen), fill))
        return logits

    return defended
