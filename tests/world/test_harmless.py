"""Harmless by construction: whatever the world says or a model can answer comes from one closed list of words."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from safescale_lib.world import town
from safescale_lib.world.scenes import COLOUR_NAMES, KINDS, scenes
from safescale_lib.zoo import store
from safescale_lib.zoo.chat import build_tokenizer

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


TOWN = set((Path(__file__).parent / "town_words.txt").read_text().split())
"""Every word of the town, read and found harmless; a new one enters here deliberately."""


def test_the_town_speaks_its_own_words_only() -> None:
    draw = Random(0)
    spoken: set[str] = set()
    for _ in range(4000):
        chat = town.conversation(draw, None, typos=0)
        spoken.update(chat.answer.split(), *(message["content"].split() for message in chat.messages))
        spoken.update(town.aligned(draw).answer.split())
    assert spoken <= TOWN


def test_a_chat_models_vocabulary_is_the_towns_words_and_characters() -> None:
    pieces = [piece.removeprefix("##") for piece in build_tokenizer().get_vocab() if not piece.startswith("<")]
    assert {piece for piece in pieces if len(piece) > 1} <= TOWN
