"""Prompt injection attacks. They work on a task and data: see `tests/llm/test_prompt_injection_attack.py`."""

FUNCTIONS = (
    "direct_override", "indirect_injection", "houyi", "formalised", "hidden_text",
    "llm_assisted", "universal_injection", "pleak", "poisoned_align", "prompt_fuzz",
)  # fmt: skip
