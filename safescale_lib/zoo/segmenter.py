"""The segmenter: a Segment Anything Model whose image encoder is a plain function of pixels.

SAM answers in two parts: an image encoder that sees no prompt, and a light decoder that turns the embedding and a point into
a mask. `PixelSegmenter` keeps the parts apart. To a pixel search the encoder is the model; prompt, truth and decoder live in
the criterion (`safescale_lib.measure.masks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from safescale_lib.measure.intervals import bootstrap, rate
from safescale_lib.measure.masks import MaskLost, iou, mask_error
from safescale_lib.search.ball import Ball
from safescale_lib.search.models import frozen
from safescale_lib.search.pixels import ascend, pgd, random_noise
from safescale_lib.world.scenes import Split, points_inside, scenes
from safescale_lib.zoo.adapter import quiet
from safescale_lib.zoo.training import own_dice

if TYPE_CHECKING:
    from safescale_lib.zoo.kinds import Run, Training

PIPELINE_TAG = "mask-generation"


class PixelSegmenter(torch.nn.Module):
    """Makes a `transformers` SamModel a callable from pixels (B, 3, S, S) in [0, 1] to image embeddings (B, C, h, w).

    `decode` turns embeddings and point prompts into mask logits. Normalisation happens inside, so that an eps is
    measured in pixels. model: the SamModel. mean, std: per channel, from the checkpoint's preprocessor_config.json.
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
        return int(self.model.config.vision_config.image_size)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        wanted = (len(self.mean), self.side, self.side)
        if pixels.ndim != 4 or pixels.shape[1:] != wanted:
            raise ValueError(f"pixels must have shape (B, {', '.join(map(str, wanted))}), got {tuple(pixels.shape)}")
        embeddings: torch.Tensor = self.model.vision_encoder((pixels - self.mean) / self.std).last_hidden_state
        return embeddings

    def decode(self, embeddings: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Mask logits at pixel resolution; a pixel belongs to the mask where its logit is above 0.

        embeddings: (B, C, h, w). points: (B, 2) for one prompt an image, giving (B, S, S), or (B, K, 2) for K separate
        prompts an image, giving (B, K, S, S); x and y in pixels, (0, 0) the centre of the top left one.
        """
        if points.ndim not in (2, 3) or points.shape[0] != len(embeddings) or points.shape[-1] != 2:
            raise ValueError(f"points must have shape ({len(embeddings)}, 2) or (.., K, 2), got {tuple(points.shape)}")
        prompts = points.reshape(len(points), -1, 1, 2)  # (B, K, 1, 2): K prompts of one foreground point
        answer = self.model(image_embeddings=embeddings, input_points=prompts, multimask_output=False)
        masks: torch.Tensor = answer.pred_masks[:, :, 0]  # (B, K, s, s)
        if masks.shape[-1] != self.side:  # full-size SAM answers at a quarter of the resolution
            masks = F.interpolate(masks, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return masks[:, 0] if points.ndim == 2 else masks


def prompted(
    n: int, *, split: Split, seed: int, objects: int = 1, side: int = 32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scenes as a segmenter's task: images (n, 3, S, S), a point on an object (n, 2), that object's mask (n, S, S) bool.

    objects: 1 or 2 a scene; of two, the seed decides which is pointed at. Arguments as for `scenes`.
    """
    drawn = scenes(n, split=split, seed=seed, objects=objects, side=side)
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(objects, (n,), generator=generator)
    masks = drawn.masks[torch.arange(n), which]  # (n, S, S)
    return drawn.images, points_inside(masks, generator=generator), masks


def mixed(n: int, *, split: Split, seed: int, side: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `prompted`: n // 2 scenes with one object, then the rest with two."""
    if n < 2:
        raise ValueError(f"n must be at least 2, got {n}")
    one = prompted(n // 2, split=split, seed=seed, objects=1, side=side)
    two = prompted(n - n // 2, split=split, seed=seed, objects=2, side=side)
    images, points, masks = (torch.cat(pair) for pair in zip(one, two, strict=True))
    return images, points, masks


def worst_masks(
    model: PixelSegmenter,
    images: torch.Tensor,
    points: torch.Tensor,
    truth: torch.Tensor,
    *,
    eps: float,
    steps: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """The inner maximisation of adversarial training: raise the mask error from a random start [madry2018pgd].

    images (B, 3, S, S) in [0, 1], points (B, 2), truth (B, S, S) bool. Returns raw floats, whether the mask is lost or not.
    """
    ball = Ball(eps, "linf", grid=None)

    def loss(embeddings: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        return mask_error(model.decode(embeddings, points[live]), truth[live])

    with frozen(model):
        return ascend(model, images, ball.sample(images, generator), loss, ball, steps=steps, step_size=1.5 * eps / steps)


# The kind of a zoo member: what `zoo.recipes` asks of it.


def build(options: Mapping[str, Any], seed: int) -> PixelSegmenter:
    """A fresh SamModel with random weights. options: side, patch, width, layers, heads, decoder (width), window."""
    from transformers import SamConfig, SamModel, SamVisionConfig
    from transformers.models.sam.configuration_sam import SamMaskDecoderConfig, SamPromptEncoderConfig

    o = {"side": 32, "patch": 4, "width": 64, "layers": 4, "heads": 4, "decoder": 64, "window": 4, **options}
    spread = 0.06
    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=o["width"],
            output_channels=o["decoder"],
            num_hidden_layers=o["layers"],
            num_attention_heads=o["heads"],
            image_size=o["side"],
            patch_size=o["patch"],
            window_size=o["window"],
            global_attn_indexes=list(range(1, o["layers"], 2)),  # every other layer sees the whole picture
            num_pos_feats=o["decoder"] // 2,
            initializer_range=spread,
            scale=1.0,  # of the random frequencies that encode a position; the default, half the width, hides the prompt
        ),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=o["decoder"], image_size=o["side"], patch_size=o["patch"], mask_input_channels=4
        ),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=o["decoder"],
            mlp_dim=2 * o["decoder"],
            num_hidden_layers=2,
            num_attention_heads=4,
            num_multimask_outputs=1,
            iou_head_depth=2,
            iou_head_hidden_dim=16,
        ),
        initializer_range=spread,
    )
    with own_dice(seed):  # transformers draws initial weights from the global stream
        model = SamModel(config)
    return PixelSegmenter(model, mean=(0.5,) * 3, std=(0.5,) * 3)


# Parts that a single point with a single mask never uses: they keep their first weights.
_UNUSED = (
    "prompt_encoder.mask_embed.",
    "prompt_encoder.point_embed.0.",
    "prompt_encoder.point_embed.2.",
    "prompt_encoder.point_embed.3.",
    "mask_decoder.iou_prediction_head.",
    "mask_decoder.output_hypernetworks_mlps.1.",
    "shared_image_embedding.",
    "prompt_encoder.shared_embedding.",
)


def loss(model: PixelSegmenter, training: Training, run: Run) -> Callable[[int], torch.Tensor]:
    """The loss of step t: fresh scenes with one and with two objects, a point on each object, error of its mask.

    With eps > 0, adversarial tuning: one point a scene, the scenes are attacked first, and only the image encoder learns.
    """
    for name, weight in model.model.named_parameters():
        weight.requires_grad_(name.startswith("vision_encoder.") if training.eps else not name.startswith(_UNUSED))

    def at(step: int) -> torch.Tensor:
        seed = training.batch_seed(run, step)
        generator = torch.Generator().manual_seed(seed)
        if training.eps:
            batch = (t.to(run.device) for t in mixed(training.batch, split="train", seed=seed, side=model.side))
            images, points, truth = batch
            images = worst_masks(
                model, images, points, truth, eps=training.eps_at(step), steps=training.inner_steps, generator=generator
            )
            return mask_error(model.decode(model(images), points), truth).mean()
        errors = []
        for objects, n in ((1, training.batch // 2), (2, training.batch - training.batch // 2)):
            drawn = scenes(n, split="train", seed=seed, objects=objects, side=model.side)
            points = points_inside(drawn.masks, generator=generator)  # (n, K, 2)
            logits = model.decode(model(drawn.images.to(run.device)), points.to(run.device))  # (n, K, S, S)
            errors.append(mask_error(logits.flatten(0, 1), drawn.masks.flatten(0, 1).to(run.device)))
        return torch.cat(errors).mean()

    return at


def save(model: PixelSegmenter, directory: Path) -> None:
    """Write a segmenter in Hub layout: config.json, preprocessor_config.json, model.safetensors in half precision."""
    import copy

    from transformers import SamImageProcessorPil

    low = model.side * 4 // int(model.model.config.vision_config.patch_size)
    processor = SamImageProcessorPil(
        size={"longest_edge": model.side},
        pad_size={"height": model.side, "width": model.side},
        mask_size={"longest_edge": low},
        mask_pad_size={"height": low, "width": low},
        image_mean=model.mean.flatten().tolist(),
        image_std=model.std.flatten().tolist(),
    )
    with quiet():
        copy.deepcopy(model.model).half().cpu().save_pretrained(directory)
        processor.save_pretrained(directory)


def load(checkpoint: str | PathLike[str], *, local: bool = False) -> PixelSegmenter:
    """Read a SamModel and its normalisation from a directory in Hub layout or, unless local, a Hub name."""
    is_path = isinstance(checkpoint, PathLike) or Path(checkpoint).is_dir()
    if is_path and not (Path(checkpoint) / "config.json").is_file():
        raise FileNotFoundError(f"checkpoint must be a directory with a config.json in it, got {Path(checkpoint).name!r}")
    here = {"local_files_only": local or is_path}
    with quiet():
        from transformers import SamImageProcessorPil, SamModel

        model = SamModel.from_pretrained(checkpoint, dtype=torch.float32, use_safetensors=True, **here)
        processor = SamImageProcessorPil.from_pretrained(checkpoint, **here)
    return PixelSegmenter(model, processor.image_mean, processor.image_std).eval()


def metrics(model: PixelSegmenter, n: int = 1000, n_attacked: int = 200) -> list[dict[str, Any]]:
    """Mean IoU on test scenes, and under attack, with 95 % bootstrap intervals; success rates with Wilson's."""
    images, points, truth = mixed(n, split="test", seed=0, side=model.side)
    clean = _ious(model, images, points, truth)
    rows = [
        ("mean IoU", bootstrap(clean)),
        ("mean IoU, one object", bootstrap(clean[: n // 2])),
        ("mean IoU, two objects", bootstrap(clean[n // 2 :])),
        ("share of masks with IoU >= 0.5", rate((clean >= 0.5).numpy())),
    ]
    images, points, truth = mixed(n_attacked, split="test", seed=1, side=model.side)
    criterion = MaskLost(model, points, truth)
    noise = random_noise(model, images, criterion, eps=32 / 255, generator=torch.Generator().manual_seed(0))
    rows.append(("masks kept under random noise, eps 32/255", rate(noise.survived.numpy())))
    for level in (8, 16, 32):
        generator = torch.Generator().manual_seed(0)
        attack = pgd(model, images, criterion, eps=level / 255, steps=20, objective=mask_objective, generator=generator)
        rows.append((f"masks kept under PGD-20, eps {level}/255", rate(attack.survived.numpy())))
    return [{"metric": name, **interval._asdict()} for name, interval in rows]


def mask_objective(criterion: Any, embeddings: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """For `pgd`: the error (B,) of the mask at each item's prompt, to raise. criterion: a MaskLost or of its fields."""
    return mask_error(criterion.segmenter.decode(embeddings, criterion.points[rows]), criterion.truth[rows])


@torch.no_grad()
def _ious(model: PixelSegmenter, images: torch.Tensor, points: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    parts = zip(*(torch.split(each, 250) for each in (images, points, truth)), strict=True)
    return torch.cat([iou(model.decode(model(x), p) > 0, t) for x, p, t in parts])


def describe(model: PixelSegmenter) -> str:
    """The architecture in a line, for the card."""
    vision, decoder = model.model.config.vision_config, model.model.config.mask_decoder_config
    return (
        f"{vision.image_size} px, patch {vision.patch_size}, image encoder width {vision.hidden_size} with "
        f"{vision.num_hidden_layers} layers and {vision.num_attention_heads} heads, window {vision.window_size}, "
        f"mask decoder width {decoder.hidden_size}; answers one foreground point with one mask"
    )
