"""Defenses of section 3.4 inside the model, by ensembles and by training: they are judged by other checks than an attack on
one picture, see `tests/llm/test_jailbreak_inference.py`, `..._ensemble.py`, `..._tuning.py` and `..._matrix.py`."""

FUNCTIONS = (
    "moving_target", "output_repetition", "activation_boundary", "multi_defense", "model_mixing",
    "vaccine", "booster", "lisa", "antidote", "panacea", "pearl",
)  # fmt: skip
