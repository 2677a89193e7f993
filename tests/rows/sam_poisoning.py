"""Backdoors and poison of a segmenter. They are judged by other checks than an attack on one picture: see
`tests/vfm/test_sam_backdoor_poisoning_attack.py`."""

from __future__ import annotations

FUNCTIONS = ("badsam", "mirror_disagreement", "unseg", "squeeze")
