"""Survey section 3.1, adversarial attacks on language models, in the survey's order.

Nothing forbidden is asked for here. The model judges a review, types a table's column, answers from a document, and the
attacker changes the text so that the answer turns wrong although people still read the same. What differs between the attacks
is which texts are one edit away; the search, the criterion and the counting are shared (`editing`).
"""

from safescale_lib.llm.adversarial_attack.black_box import (
    LOADED,
    cell_swap,
    demonstration_attack,
    induced_prompt,
    misled,
)
from safescale_lib.llm.adversarial_attack.editing import TextAttack, changed_words, margin, misnamed, opened, owned
from safescale_lib.llm.adversarial_attack.white_box import (
    CONTEXT,
    bad_characters,
    entity_swap,
    gbda,
    random_words,
    rendered,
    text_fooler,
)

__all__ = [
    "CONTEXT",
    "LOADED",
    "TextAttack",
    "bad_characters",
    "cell_swap",
    "changed_words",
    "demonstration_attack",
    "entity_swap",
    "gbda",
    "induced_prompt",
    "margin",
    "misled",
    "misnamed",
    "opened",
    "owned",
    "random_words",
    "rendered",
    "text_fooler",
]
