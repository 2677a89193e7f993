"""Prompt injection defenses. They are judged by other checks than an attack on one prompt: see
`tests/llm/test_prompt_injection_defense.py`."""

FUNCTIONS = ("struq", "spml", "jatmo", "boundary_tuning", "secalign")
