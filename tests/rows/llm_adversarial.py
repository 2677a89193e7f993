"""Adversarial attacks on language models and the defenses of section 3.2. They are judged by other checks than an attack on a
picture: see `tests/llm/test_adversarial_attack.py` and `tests/llm/test_adversarial_defense.py`."""

FUNCTIONS = (
    "bad_characters", "text_fooler", "gbda", "entity_swap",
    "demonstration_attack", "induced_prompt", "cell_swap",
    "perplexity_filter", "erase_and_check", "circuit_breakers",
)  # fmt: skip
