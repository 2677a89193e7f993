"""The inside of a ViT that its attacks and defenses reach for: the patch grid, position embeddings, attention scores.

Everything works through hooks on a stock `ViTForImageClassification`, whichever attention kernel it runs with, and
every hook is gone when its block ends, also after an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch

from safescale_lib.search.models import Model


def vit_inside(model: Model) -> Any:
    """The `ViTModel` inside a PixelClassifier (or any module that holds one as `.model.vit`); TypeError if there is none."""
    backbone = getattr(getattr(model, "model", None), "vit", None)
    if backbone is None or not hasattr(backbone, "embeddings") or not hasattr(backbone, "layers"):
        raise TypeError(f"model must be a PixelClassifier around a ViTForImageClassification, got {_describe(model)}")
    return backbone


def _describe(model: Any) -> str:
    inner = getattr(model, "model", None)
    return type(model).__name__ + (f" around a {type(inner).__name__}" if inner is not None else "")


def patch_grid(model: Model) -> tuple[int, int, int, int]:
    """(rows, columns, patch height, patch width) of the grid a ViT cuts its pictures into."""
    patches = vit_inside(model).embeddings.patch_embeddings
    height, width = patches.projection.kernel_size
    return patches.image_size[0] // height, patches.image_size[1] // width, height, width


def patch_mask(model: Model, chosen: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W) bool mask of the pixels in the chosen patches. chosen: (N, k) int64, patches counted row by row from 0."""
    rows, columns, height, width = patch_grid(model)
    if chosen.ndim != 2 or (chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < rows * columns):
        raise ValueError(f"chosen must be (N, k) patch numbers in 0..{rows * columns - 1}, got {tuple(chosen.shape)}")
    flat = torch.zeros(len(chosen), rows * columns, dtype=torch.bool, device=chosen.device)
    grid = flat.scatter(1, chosen, True).view(-1, 1, rows, columns)
    return grid.repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)


def tokens_of(model: Model, images: torch.Tensor) -> torch.Tensor:
    """(B, patches, D) embedded patches of images (B, C, H, W) in [0, 1], before the position embedding is added."""
    embedded: torch.Tensor = vit_inside(model).embeddings.patch_embeddings((images - model.mean) / model.std)  # type: ignore[attr-defined]
    return embedded


def positions_of(model: Model) -> torch.Tensor:
    """(patches, D) position embeddings of the patches, without that of the class token."""
    table: torch.Tensor = vit_inside(model).embeddings.position_embeddings[0, 1:]
    return table


class Attention(local):
    """Queries and keys of the latest forward pass, a pair per layer: each (B, heads, tokens, head width).

    Every thread sees the pass it made itself, so that a search may work on two batches at once.
    """

    def __init__(self, heads: int) -> None:
        self._heads = heads
        self._queries: dict[int, torch.Tensor] = {}
        self._keys: dict[int, torch.Tensor] = {}

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], self._heads, -1).transpose(1, 2)  # (B, T, D) -> (B, heads, T, D / heads)

    @property
    def pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(queries, keys) of every layer, first to last; they carry gradients if the forward pass did."""
        return [(self._split(self._queries[i]), self._split(self._keys[i])) for i in sorted(self._keys)]

    @property
    def maps(self) -> list[torch.Tensor]:
        """Attention of every layer, (B, heads, T queries, T keys), rows sum to 1; token 0 is the class token."""
        return [torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) for q, k in self.pairs]


@contextmanager
def attending(model: Model) -> Iterator[Attention]:
    """Inside the block the yielded `Attention` holds queries and keys of the model's latest forward pass."""
    layers = vit_inside(model).layers
    seen = Attention(layers[0].attention.config.num_attention_heads)

    def keep(what: str, layer: int) -> Callable[..., None]:
        return lambda module, args, output: getattr(seen, what).__setitem__(layer, output)

    handles = []
    try:
        for i, layer in enumerate(layers):
            handles.append(layer.attention.q_proj.register_forward_hook(keep("_queries", i)))
            handles.append(layer.attention.k_proj.register_forward_hook(keep("_keys", i)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def constant_attention(model: Model) -> Iterator[None]:
    """Inside the block no gradient flows through the attention maps: forwards nothing changes, backwards they are constants."""
    handles = []
    try:
        for layer in vit_inside(model).layers:
            for projection in (layer.attention.q_proj, layer.attention.k_proj):
                handles.append(projection.register_forward_hook(lambda module, args, output: output.detach()))
        yield
    finally:
        for handle in handles:
            handle.remove()
