"""Diffusion models of scenes: given a picture with a known amount of noise, they estimate the clean one.

Chapter 2 washes attacked pictures with one of them. The network is unconditional: it knows pictures, not classes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from safescale_lib.measure.intervals import bootstrap
from safescale_lib.world.scenes import scenes
from safescale_lib.zoo.adapter import quiet
from safescale_lib.zoo.kinds import Run, Training
from safescale_lib.zoo.training import own_dice

PIPELINE_TAG, LIBRARY = "unconditional-image-generation", "diffusers"
GREY = 127.5  # one unit of the network's pixel range [-1, 1], in grey levels of 255


class Denoiser(torch.nn.Module):
    """A `diffusers` UNet2DModel with the schedule it was trained on, as a function from noisy to clean pictures.

    Pictures here live in [-1, 1]. At time t a picture x has become z = sqrt(a_t) x + sqrt(1 - a_t) noise, equation 4 of
    [ho2020ddpm]; a_0 is nearly 1 and a_T nearly 0. unet: the network. scheduler: any `diffusers` scheduler with
    alphas_cumprod and a prediction type "epsilon", "v_prediction" or "sample".
    """

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.a: torch.Tensor
        self.kind = scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"scheduler must predict epsilon, v_prediction or sample, got {self.kind!r}")
        self.unet, self.scheduler = unet, scheduler
        self.register_buffer("a", scheduler.alphas_cumprod.clone(), persistent=False)  # (T,)

    @property
    def side(self) -> int:
        """Height and width in pixels."""
        size = self.unet.config.sample_size
        return int(size if isinstance(size, int) else size[0])

    @property
    def times(self) -> int:
        """Number of noise levels T; times run from 0 to T - 1."""
        return len(self.a)

    def noised(self, x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x (B, 3, S, S) in [-1, 1] at times t (B,) -> z of the same shape."""
        a = self.a[t][:, None, None, None]
        return a.sqrt() * x + (1 - a).sqrt() * noise

    def target(self, x: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """What the network is trained to answer for z = noised(x, t, noise)."""
        a = self.a[t][:, None, None, None]
        return {"epsilon": noise, "sample": x, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x}[self.kind]

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """z (B, 3, S, S) at times t (B,) int64 -> the estimate of the clean picture, in [-1, 1]."""
        answer: torch.Tensor = self.unet(z, t).sample
        a = self.a[t][:, None, None, None]
        if self.kind == "epsilon":
            answer = (z - (1 - a).sqrt() * answer) / a.sqrt()
        elif self.kind == "v_prediction":
            answer = a.sqrt() * z - (1 - a).sqrt() * answer
        return answer.clamp(-1, 1)


def build(options: Mapping[str, Any], seed: int) -> Denoiser:
    """A fresh denoiser of 32 px pictures. options: entries of UNet2DModel's configuration, and "prediction_type"."""
    from diffusers import DDPMScheduler, UNet2DModel

    given: dict[str, Any] = {
        "sample_size": 32,
        "layers_per_block": 1,
        "block_out_channels": (16, 32, 48),
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "prediction_type": "epsilon",
        **options,
    }
    scheduler = DDPMScheduler(num_train_timesteps=1000, prediction_type=given.pop("prediction_type"))
    depth = len(given["block_out_channels"])
    plain = {"down_block_types": ("DownBlock2D",) * depth, "up_block_types": ("UpBlock2D",) * depth}
    with own_dice(seed):  # diffusers draws initial weights from the global stream
        return Denoiser(UNet2DModel(**{**plain, **given}), scheduler)


def loss(model: Denoiser, training: Training, run: Run) -> Callable[[int], torch.Tensor]:
    """Mean squared error of the network's answer on noised scenes, the simple loss of [ho2020ddpm].

    Times are drawn as T u^2 with u uniform, not uniformly: purification lives at small times, and a short training
    should spend itself there.
    """

    def at(step: int) -> torch.Tensor:
        x = 2 * scenes(training.batch, split="train", seed=training.batch_seed(run, step)).images - 1  # (B, 3, S, S)
        generator = torch.Generator().manual_seed(training.batch_seed(run, step))
        t = (model.times * torch.rand(len(x), generator=generator) ** 2).long().clamp(max=model.times - 1)
        noise = torch.randn(x.shape, generator=generator)
        x, t, noise = (tensor.to(run.device) for tensor in (x, t, noise))
        return F.mse_loss(model.unet(model.noised(x, t, noise), t).sample, model.target(x, t, noise))

    return at


def save(model: Denoiser, directory: Path) -> None:
    """Write config.json, scheduler_config.json and diffusion_pytorch_model.safetensors in half precision."""
    with quiet():
        copy.deepcopy(model.unet).half().cpu().save_pretrained(directory)
        model.scheduler.save_pretrained(directory)


def load(checkpoint: str | PathLike[str], *, local: bool = False) -> Denoiser:
    """Read an unconditional UNet2DModel and its schedule: a directory, or unless local, a Hub name.

    The files lie side by side, as in google/ddpm-cifar10-32.
    """
    is_path = isinstance(checkpoint, PathLike) or Path(checkpoint).is_dir()
    if is_path and not (Path(checkpoint) / "config.json").is_file():
        raise FileNotFoundError(f"checkpoint must be a directory with a config.json in it, got {Path(checkpoint).name!r}")
    here = {"local_files_only": local or is_path}
    with quiet():
        from diffusers import DDPMScheduler, UNet2DModel

        unet = UNet2DModel.from_pretrained(
            checkpoint, torch_dtype=torch.float32, use_safetensors=True, low_cpu_mem_usage=False, **here
        )
        scheduler = DDPMScheduler.from_pretrained(checkpoint, **here)
    return Denoiser(unet, scheduler).eval()


@torch.no_grad()
def metrics(model: Denoiser, n: int = 500) -> list[dict[str, Any]]:
    """Error of the clean estimate on noised test scenes at four times, with bootstrap intervals over scenes."""
    x = 2 * scenes(n, split="test", seed=0).images - 1
    rows = []
    for time in (100, 50, 200, 400):
        t = torch.full((n,), time)
        z = model.noised(x, t, torch.randn(x.shape, generator=torch.Generator().manual_seed(time)))
        clean = torch.cat([model(*pair) for pair in zip(torch.split(z, 100), torch.split(t, 100), strict=True)])
        error = GREY * (clean - x).square().mean(dim=(1, 2, 3)).sqrt()  # (n,)
        noise = GREY * float(((1 - model.a[time]) / model.a[time]).sqrt())
        name = f"error of the clean estimate in grey levels, noise {noise:.0f} (time {time})"
        rows.append({"metric": name, **bootstrap(error.numpy())._asdict()})
    return rows


def describe(model: Denoiser) -> str:
    """The architecture in one line."""
    c = model.unet.config
    widths = "-".join(map(str, c.block_out_channels))
    return f"{type(model.unet).__name__}: {model.side} px, widths {widths}, predicts {model.kind}, {model.times} noise levels"
