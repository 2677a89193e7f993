"""Defenses at a chat model's input and output. They are judged by other checks than an attack on one picture: see
`tests/llm/test_jailbreak_inputs.py` and `tests/llm/test_jailbreak_outputs.py`."""

FUNCTIONS = (
    "smooth_llm", "back_translation", "round_trip_translation", "ib_protector", "self_defend", "curvalid",
    "prompt_shield", "defensive_prompt_patch", "gradient_cuff",
)  # fmt: skip
