"""The diffusion model of scenes: its algebra against diffusers' own, its files, and that a short training teaches it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from safescale_lib import zoo
from safescale_lib.vfm.vit.adversarial_defense import purify
from safescale_lib.world.scenes import scenes
from safescale_lib.zoo import denoiser
from safescale_lib.zoo.kinds import Run, Training
from safescale_lib.zoo.training import fit

TINY = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 16}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_targets_and_estimates_are_those_of_diffusers(prediction: str) -> None:
    model = denoiser.build({**TINY, "prediction_type": prediction}, seed=0).eval()
    x = torch.rand(6, 3, 16, 16, generator=seeded()) * 2 - 1
    noise, t = torch.randn(x.shape, generator=seeded(1)), torch.tensor([0, 1, 50, 200, 600, 999])
    z = model.noised(x, t, noise)
    reference = DDPMScheduler(num_train_timesteps=1000, prediction_type=prediction)
    torch.testing.assert_close(z, reference.add_noise(x, noise, t))
    if prediction == "v_prediction":
        torch.testing.assert_close(model.target(x, t, noise), reference.get_velocity(x, noise, t))
    with torch.no_grad():
        answer, estimates = model.unet(z, t).sample, model(z, t)
    for i, time in enumerate(t.tolist()):
        step = reference.step(answer[i : i + 1], time, z[i : i + 1], generator=seeded())
        torch.testing.assert_close(estimates[i : i + 1], step.pred_original_sample, atol=2e-4, rtol=1e-4)


def test_a_perfect_answer_gives_back_the_clean_picture() -> None:
    x = torch.rand(3, 3, 16, 16, generator=seeded()) * 2 - 1
    noise, t = torch.randn(x.shape, generator=seeded(1)), torch.tensor([10, 100, 300])
    for prediction in ("epsilon", "v_prediction", "sample"):
        model = denoiser.build({**TINY, "prediction_type": prediction}, seed=0)
        wanted = model.target(x, t, noise)
        model.unet.forward = lambda z, time, wanted=wanted: type("Answer", (), {"sample": wanted})()  # type: ignore[method-assign]
        torch.testing.assert_close(model(model.noised(x, t, noise), t), x, atol=1e-4, rtol=1e-4)


def test_purify_walks_back_as_ddim_does() -> None:
    model = denoiser.build({**TINY, "prediction_type": "v_prediction"}, seed=0).eval()
    images, time = torch.rand(2, 3, 16, 16, generator=seeded()), 400
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, prediction_type="v_prediction", set_alpha_to_one=False, beta_schedule="linear"
    )
    noise = torch.randn(images.shape, generator=seeded(3))
    with torch.no_grad():
        z = scheduler.add_noise(2 * images - 1, noise, torch.tensor([time]))
        scheduler.num_inference_steps = 5  # steps of 200: 400 -> 200 -> 0
        halfway = scheduler.step(
            model.unet(z, torch.tensor([400, 400])).sample, 400, z, use_clipped_model_output=True
        ).prev_sample
        end = scheduler.step(model.unet(halfway, torch.tensor([200, 200])).sample, 200, halfway).pred_original_sample
        ours = purify(model, images, time=time, steps=2, noise=noise)
    torch.testing.assert_close(ours, (end + 1) / 2, atol=1e-4, rtol=1e-4)


def test_files_are_half_precision_in_hub_layout_and_read_back(tmp_path: Path) -> None:
    model = denoiser.build(TINY, seed=3).eval()
    denoiser.save(model, tmp_path)
    assert {"config.json", "scheduler_config.json", "diffusion_pytorch_model.safetensors"} == {
        f.name for f in tmp_path.iterdir()
    }
    read = denoiser.load(tmp_path, local=True)
    assert (read.training, read.kind, read.side) == (False, model.kind, 16)
    for name, weight in read.state_dict().items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, model.state_dict()[name].half().float())
    assert next(model.parameters()).dtype == torch.float32  # saving did not touch the model
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        denoiser.load(tmp_path / "nowhere", local=True)


def test_building_is_seeded_and_draws_nothing_from_the_global_stream() -> None:
    before = torch.get_rng_state()
    first, same, other = (denoiser.build(TINY, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [torch.cat([w.flatten() for w in model.parameters()]) for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_loss_of_a_step_is_seeded_and_falls_with_training() -> None:
    training = Training(steps=30, batch=8, lr=3e-3)
    model = denoiser.build({**TINY, "sample_size": 32}, seed=0)
    at = denoiser.loss(model, training, Run(progress=False))
    assert torch.equal(at(4), at(4))
    assert not torch.equal(at(4), at(5))
    before = sum(at(1000 + i).item() for i in range(4))
    fit(model, at, steps=30, lr=3e-3, warmup=3, progress=False)
    assert sum(at(1000 + i).item() for i in range(4)) < 0.8 * before


def test_the_shipped_member_removes_most_of_the_noise() -> None:
    model = zoo.load("denoiser")
    x = 2 * scenes(32, split="validation", seed=0).images - 1
    noise, t = torch.randn(x.shape, generator=seeded()), torch.full((32,), 100)
    z = model.noised(x, t, noise)
    with torch.no_grad():
        error = (model(z, t) - x).square().mean().sqrt()
    assert error < 0.4 * (z / model.a[100].sqrt() - x).square().mean().sqrt()
