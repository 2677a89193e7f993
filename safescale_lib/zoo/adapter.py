"""From a Hugging Face classifier to a plain function of pixels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch


class PixelClassifier(torch.nn.Module):
    """Makes any `transformers` image classifier a callable from pixels (B, 3, S, S) in [0, 1] to logits (B, classes).

    A raw Hugging Face model wants normalised pixels and answers with an output object; attack libraries, ours and
    others, want [0, 1] in and a tensor out. Normalisation happens inside, so that an eps is measured in pixels.

    model: the classifier. mean, std: per channel, from the checkpoint's preprocessor_config.json.
    """

    def __init__(self, model: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.mean: torch.Tensor
        self.std: torch.Tensor
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean and std must pair up and std be positive, got {list(mean)} and {list(std)}")
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    @property
    def side(self) -> int:
        """Height and width in pixels that the model expects."""
        size = self.model.config.image_size
        return int(size if isinstance(size, int) else size[0])

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of the logits."""
        names = self.model.config.id2label
        return tuple(names[i] for i in range(len(names)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        wanted = (len(self.mean), self.side, self.side)
        if pixels.ndim != 4 or pixels.shape[1:] != wanted:
            raise ValueError(f"pixels must have shape (B, {', '.join(map(str, wanted))}), got {tuple(pixels.shape)}")
        logits: torch.Tensor = self.model(pixel_values=(pixels - self.mean) / self.std).logits
        return logits


def load_classifier(checkpoint: str | PathLike[str], *, local: bool = False) -> PixelClassifier:
    """Read an image classifier and its normalisation from a directory in Hub layout or, unless local, a Hub name."""
    is_path = isinstance(checkpoint, PathLike) or Path(checkpoint).is_dir()
    if is_path and not (Path(checkpoint) / "config.json").is_file():
        raise FileNotFoundError(f"checkpoint must be a directory with a config.json in it, got {Path(checkpoint).name!r}")
    here = {"local_files_only": local or is_path}
    with quiet():
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

        config = AutoConfig.from_pretrained(checkpoint, **here)
        model = AutoModelForImageClassification.from_pretrained(
            checkpoint, config=config, dtype=torch.float32, use_safetensors=True, **here
        )
        processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil", **here)
    channels = getattr(config, "num_channels", 3)
    normalise = getattr(processor, "do_normalize", True)
    mean = processor.image_mean if normalise else [0.0] * channels
    std = processor.image_std if normalise else [1.0] * channels
    return PixelClassifier(model, mean, std).eval()


def save_classifier(classifier: PixelClassifier, directory: Path) -> None:
    """Write a classifier in Hub layout: config.json, preprocessor_config.json, model.safetensors in half precision."""
    import copy

    from transformers import ViTImageProcessorPil

    side = {"height": classifier.side, "width": classifier.side}
    processor = ViTImageProcessorPil(
        size=side, image_mean=classifier.mean.flatten().tolist(), image_std=classifier.std.flatten().tolist()
    )
    with quiet():
        copy.deepcopy(classifier.model).half().cpu().save_pretrained(directory)
        processor.save_pretrained(directory)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars, and the complaint that a notebook lacks widgets for them, out of a notebook's outputs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        from transformers.utils import logging

        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            if shown:
                logging.enable_progress_bar()
