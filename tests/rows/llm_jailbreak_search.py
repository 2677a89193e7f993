"""Searched and learned jailbreaks, steered decoding and harmful fine-tuning; see `tests/llm/test_jailbreak_*.py`."""

FUNCTIONS = (
    "suffix_attack", "easy_to_hard", "universal_suffix", "template_attack", "fuzz_templates", "fuzzed", "universal_hijack",
    "train_attacker", "tree_attack", "red_team", "policy_attack",
    "weak_to_strong", "refusal_ablated",
    "harmful_fine_tuning", "identity_shift", "benign_fine_tuning", "virus", "encoded_fine_tuning", "matched_benign",
)  # fmt: skip
