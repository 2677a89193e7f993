"""Hand-made jailbreaks and others by words: `tests/llm/test_jailbreak_handcrafted.py` and `..._context.py` judge them."""

FUNCTIONS = (
    "bench", "assemble", "role_play", "distraction", "guessing_game", "cipher", "code_completion", "uncommon_structure",
    "low_resource", "mixed_language", "prefix_injection", "refusal_suppression", "prefilling", "combination", "psychometric",
    "analysis", "many_shot", "improved_few_shot", "multi_turn", "evolve_system", "silent_tokens",
)  # fmt: skip
