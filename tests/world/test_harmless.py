"""Harmless by construction: whatever the world says or a model can answer comes from one closed list of words."""

from __future__ import annotations

import json

from safescale_lib.world.scenes import COLOUR_NAMES, KINDS, scenes
from safescale_lib.zoo import store

ALLOWED = set(COLOUR_NAMES) | {word for kind in KINDS for word in kind.split()} | {"a", "an", "left", "of"}


def test_captions_use_the_worlds_words_only() -> None:
    spoken = {
        word for n in (1, 2) for caption in scenes(2000, split="train", seed=0, objects=n).captions for word in caption.split()
    }
    assert spoken == ALLOWED


def test_models_answer_with_the_worlds_words_only() -> None:
    classifiers = [name for name in store.names() if store.card(name).get("kind", "classifier") == "classifier"]
    assert classifiers
    for name in classifiers:
        labels = json.loads((store.folder(name) / "config.json").read_text())["id2label"]
        assert tuple(labels[str(i)] for i in range(len(labels))) == KINDS
