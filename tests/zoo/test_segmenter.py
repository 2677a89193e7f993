"""The segmenter: it answers as the stock SamModel does, trains every weight it uses, and survives the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from safescale_lib import zoo
from safescale_lib.measure.masks import iou, mask_error
from safescale_lib.world.scenes import points_inside, scenes
from safescale_lib.zoo import segmenter
from safescale_lib.zoo.kinds import Run, Training
from safescale_lib.zoo.segmenter import PixelSegmenter, mixed, prompted, worst_masks

SMALL = {"width": 16, "layers": 2, "heads": 2, "decoder": 16}


@pytest.fixture(scope="module")
def small() -> PixelSegmenter:
    return segmenter.build(SMALL, seed=0).eval()


def test_encoder_and_decoder_answer_as_the_whole_model(small: PixelSegmenter) -> None:
    images, points, _ = mixed(4, split="train", seed=0)
    with torch.no_grad():
        ours = small.decode(small(images), points)
        stock = small.model(pixel_values=(images - 0.5) / 0.5, input_points=points[:, None, None], multimask_output=False)
    assert ours.shape == (4, 32, 32)
    torch.testing.assert_close(ours, stock.pred_masks[:, 0, 0])


def test_several_prompts_are_answered_one_by_one(small: PixelSegmenter) -> None:
    images = scenes(3, split="train", seed=1).images
    points = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0)) * 31
    with torch.no_grad():
        together, embeddings = small.decode(small(images), points), small(images)
        apart = torch.stack([small.decode(embeddings, points[:, k]) for k in range(5)], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_a_full_size_decoder_is_brought_to_pixel_resolution() -> None:
    model = segmenter.build({**SMALL, "side": 64, "patch": 16, "window": 0}, seed=0)
    assert model.decode(model(torch.rand(2, 3, 64, 64)), torch.zeros(2, 2)).shape == (2, 64, 64)


def test_every_weight_that_learns_is_used(small: PixelSegmenter) -> None:
    model = segmenter.build(SMALL, seed=1)
    segmenter.loss(model, Training(steps=10, batch=4), Run(progress=False))(3).backward()  # type: ignore[no-untyped-call]
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    assert len(learning) > 50
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in learning if weight.ndim > 1)


def test_the_loss_depends_on_seed_and_step_alone() -> None:
    model = segmenter.build(SMALL, seed=1)
    first, second = (segmenter.loss(model, Training(steps=10, batch=4), Run(seed=s)) for s in (0, 1))
    torch.rand(7)
    assert first(3).item() == first(3).item()
    assert len({first(3).item(), first(4).item(), second(3).item()}) == 3


def test_adversarial_tuning_moves_the_image_encoder_only() -> None:
    model = segmenter.build(SMALL, seed=1)
    training = Training(steps=10, batch=4, eps=8 / 255, inner_steps=1)
    segmenter.loss(model, training, Run())(0).backward()  # type: ignore[no-untyped-call]
    moved = {name.split(".")[0] for name, weight in model.model.named_parameters() if weight.grad is not None}
    assert moved == {"vision_encoder"}


def test_the_worst_masks_are_worse_and_within_the_ball(small: PixelSegmenter) -> None:
    images, points, truth = mixed(6, split="train", seed=2)
    generator = torch.Generator().manual_seed(0)
    worst = worst_masks(small, images, points, truth, eps=0.1, steps=4, generator=generator)
    with torch.no_grad():
        before, after = (mask_error(small.decode(small(x), points), truth) for x in (images, worst))
    assert (after > before).all()
    assert (worst - images).abs().max() <= 0.1 + 1e-6


def test_it_survives_the_disk_in_hub_layout(small: PixelSegmenter, tmp_path: Path) -> None:
    segmenter.save(small, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "preprocessor_config.json", "model.safetensors"}
    again = segmenter.load(tmp_path, local=True)
    images, points, _ = mixed(4, split="train", seed=0)
    with torch.no_grad():
        torch.testing.assert_close(again.decode(again(images), points), small.decode(small(images), points), rtol=0, atol=0.05)
    assert not again.training
    assert again.side == 32
    assert next(again.parameters()).dtype == torch.float32
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        segmenter.load(tmp_path / "nowhere")


def test_building_touches_no_global_stream() -> None:
    before = torch.get_rng_state()
    first, again, other = (segmenter.build(SMALL, seed=s) for s in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_bad_shapes_are_refused(small: PixelSegmenter) -> None:
    with pytest.raises(ValueError, match="pixels"):
        small(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match="points"):
        small.decode(torch.zeros(2, 16, 8, 8), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="n must"):
        mixed(1, split="train", seed=0)


def test_prompts_lie_on_the_object_they_ask_for() -> None:
    images, points, truth = prompted(40, split="test", seed=3, objects=2)
    x, y = points.long().T
    assert truth[torch.arange(40), y, x].all()
    left = truth.float().mean(1) @ torch.arange(32.0) / truth.float().mean(1).sum(1) < 16
    assert 5 < left.sum() < 35  # the seed points at either object
    assert torch.equal(images, scenes(40, split="test", seed=3, objects=2).images)


def test_points_inside_reach_every_pixel_of_a_mask_and_no_other() -> None:
    mask = torch.zeros(6, 9, dtype=torch.bool)
    mask[2, 3] = mask[5, 0] = mask[0, 8] = True
    points = points_inside(mask.expand(300, -1, -1), generator=torch.Generator().manual_seed(0))
    assert {(int(x), int(y)) for x, y in points} == {(3, 2), (0, 5), (8, 0)}
    with pytest.raises(ValueError, match="none of them empty"):
        points_inside(torch.zeros(2, 4, 4, dtype=torch.bool), generator=torch.Generator())


@pytest.mark.parametrize("name", ["sam", "sam-robust", "sam-b"])
def test_the_shipped_segmenters_follow_the_prompt(name: str) -> None:
    model = zoo.load(name)
    two = scenes(60, split="validation", seed=9, objects=2)
    points = points_inside(two.masks, generator=torch.Generator().manual_seed(0))  # (N, 2 objects, 2)
    with torch.no_grad():
        masks = model.decode(model(two.images), points) > 0
    own, other = iou(masks, two.masks).mean().item(), iou(masks, two.masks.flip(1)).mean().item()
    assert own > 0.6
    assert other < 0.1
