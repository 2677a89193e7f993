"""Searches over the tokens of a gap in a prompt, for any causal language model of `transformers` and its tokenizer.

`prompts` holds what is searched: slots, vocabularies, and objectives over them. `searches` holds the searches.
"""

from safescale_lib.search.tokens.prompts import (
    Objective,
    Prompts,
    Slot,
    Tokens,
    activation_loss,
    chat_slot,
    fill,
    fluency_loss,
    perturbed,
    survives,
    target_loss,
    vocabulary,
)
from safescale_lib.search.tokens.searches import (
    Criterion,
    TokenAttack,
    beam,
    by_text,
    gcg,
    genetic,
    greedy_random,
    random_tokens,
    target_reached,
)

__all__ = [
    "Criterion",
    "Objective",
    "Prompts",
    "Slot",
    "TokenAttack",
    "Tokens",
    "activation_loss",
    "beam",
    "by_text",
    "chat_slot",
    "fill",
    "fluency_loss",
    "gcg",
    "genetic",
    "greedy_random",
    "perturbed",
    "random_tokens",
    "survives",
    "target_loss",
    "target_reached",
    "vocabulary",
]
