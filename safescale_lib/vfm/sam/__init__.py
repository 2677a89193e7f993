"""Survey section 2.2: attacks on and defenses of the Segment Anything Model, a module for each category of the taxonomy."""

from safescale_lib.vfm.sam.adversarial_attack import (
    attack_sam,
    dark_sam,
    feature_attack,
    region_attack,
    umi_grat,
    universal_perturbation,
)
from safescale_lib.vfm.sam.adversarial_defense import adversarial_tuning
from safescale_lib.vfm.sam.backdoor_poisoning_attack import badsam, camouflage, mirror_disagreement, squeeze, unseg

__all__ = [
    "adversarial_tuning",
    "attack_sam",
    "badsam",
    "camouflage",
    "dark_sam",
    "feature_attack",
    "mirror_disagreement",
    "region_attack",
    "squeeze",
    "umi_grat",
    "universal_perturbation",
    "unseg",
]
