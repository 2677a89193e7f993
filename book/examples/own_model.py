"""Attack an image classifier of your own on pictures of your own: python own_model.py CHECKPOINT PICTURE..."""

import sys

import numpy as np
import torch
from PIL import Image

from safescale_lib import zoo
from safescale_lib.measure.criteria import Misclassified
from safescale_lib.measure.intervals import rate
from safescale_lib.measure.outcomes import Outcome
from safescale_lib.search.pixels import pgd, random_noise


def picture(path, side):
    """A file as pixels (3, side, side) in [0, 1]."""
    pixels = np.asarray(Image.open(path).convert("RGB").resize((side, side)), dtype=np.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def attacked(checkpoint, paths, eps=4 / 255, steps=20):
    """How many pictures keep their answer under PGD. checkpoint: a folder that transformers saved, or a name on the Hub."""
    model = zoo.load("vit", checkpoint=checkpoint)  # any image classifier of transformers
    images = torch.stack([picture(path, model.side) for path in paths])  # (N, 3, S, S)
    with torch.no_grad():
        answers = model(images).argmax(-1)  # what it says now counts as right: you need no labels
    changed = Misclassified(answers)
    attack = pgd(model, images, changed, eps=eps, steps=steps, generator=torch.Generator().manual_seed(0))
    noise = random_noise(model, images, changed, eps=eps, generator=torch.Generator().manual_seed(0))
    return Outcome(
        "vfm.vit.adversarial_attack",
        f"PGD-{steps}, eps {eps * 255:.0f}/255",
        "unchanged answers",
        rate(attack.survived.numpy()),
        control=noise.survived.float().mean().item(),
        cost=attack.cost,
        seed=0,
    )


if __name__ == "__main__":
    print(attacked(sys.argv[1], sys.argv[2:]))
