"""Survey section 3.4, ensembles: several defenses side by side, and one model mixed from two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from safescale_lib.llm.jailbreak_defense.inference import REFUSAL, Probe, started
from safescale_lib.measure.judges import refused
from safescale_lib.search.asking import Responder
from safescale_lib.survey import technique
from safescale_lib.world.town.chats import Message
from safescale_lib.zoo.chat import ChatModel

KEY = "llm.jailbreak_defense.ensemble_defense"


# --- several defenses -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Panel:
    """See `multi_defense`. experts: the chosen ones, in the order in which they were chosen."""

    experts: Mapping[str, Responder]

    def respond(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        prefill: str | Sequence[str] = "",
        new_tokens: int = 24,
        **options: Any,
    ) -> list[str]:
        starts = started(conversations, prefill)
        replies = [e.respond(conversations, prefill=starts, new_tokens=new_tokens, **options) for e in self.experts.values()]
        vetoed = torch.stack([refused(reply) for reply in replies]).any(0).tolist()
        return [REFUSAL if veto else reply for veto, reply in zip(vetoed, replies[0], strict=True)]


@technique(f"{KEY}.multi_defense", paper="lu2024autojailbreak")
def multi_defense(
    experts: Mapping[str, Responder],
    broken: Mapping[str, np.ndarray],
    *,
    spoilt: Mapping[str, float] | None = None,
    most: int = 3,
    price: float = 1.0,
) -> Panel:
    """Choose defenses that do not fall to the same attacks, and let each of them veto an answer [lu2024autojailbreak].

    The paper draws graphs of which attacks and defenses depend on one another and combines what does not; here the graph is
    a table. broken: for each expert (attacks, n) bool, measured on validation: True where an attack got through.
    Greedily, the next expert is the one that stops most of what still gets through all chosen before, until none adds
    anything or there are `most`. spoilt: for each expert the share of harmless requests it spoils, weighed by `price` against
    the share of attacks it stops. The first expert's reply goes out unless one of them refuses. Raises ValueError where
    names or shapes do not match.
    """
    if not experts or set(broken) != set(experts):
        raise ValueError(f"broken must hold a table for each expert: {sorted(experts)}, got {sorted(broken)}")
    if len({table.shape for table in broken.values()}) > 1:
        raise ValueError("broken must hold tables of one shape: the same attacks on the same requests")
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    through = np.ones_like(next(iter(broken.values())), dtype=bool)
    chosen: list[str] = []

    def gain(name: str) -> float:
        stopped = float((through & ~broken[name]).mean())
        return stopped - price * (spoilt or {}).get(name, 0.0)

    while len(chosen) < most:
        left = [name for name in experts if name not in chosen]
        best = max(left, key=gain, default=None)
        if best is None or (chosen and gain(best) <= 0):
            break
        chosen.append(best)
        through &= broken[best]
    return Panel({name: experts[name] for name in chosen})


# --- a model mixed from two -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Mixed:
    """See `model_mixing`. scale: of the router's scores."""

    glad: ChatModel
    unwilling: ChatModel
    router: Probe
    scale: float

    def shares(self, conversations: Sequence[Sequence[Message]]) -> torch.Tensor:
        """(B,) the unwilling model's share in [0, 1], from the prompts alone."""
        scores = self.router.scores([self.router.model.prompt(messages) for messages in conversations])
        return torch.sigmoid((scores - self.router.threshold) / self.scale)

    @torch.inference_mode()
    def respond(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        prefill: str | Sequence[str] = "",
        new_tokens: int = 24,
        batch: int = 128,
        **options: Any,
    ) -> list[str]:
        starts, shares = started(conversations, prefill), self.shares(conversations)
        texts = [self.glad.prompt(messages, start) for messages, start in zip(conversations, starts, strict=True)]
        order, answers = sorted(range(len(texts)), key=lambda i: len(texts[i])), [""] * len(texts)
        for first in range(0, len(texts), batch):
            chosen = order[first : first + batch]
            some = [texts[i] for i in chosen]
            mix = self._mixing(shares[chosen, None], self.glad.encode(some)[1])
            more = {**options, "logits_processor": [*options.get("logits_processor", []), mix]}
            for i, answer in zip(chosen, self._in_order(some, new_tokens, more), strict=True):
                answers[i] = answer
        return answers

    def _in_order(self, texts: list[str], new_tokens: int, options: dict[str, Any]) -> list[str]:
        """One batch; `texts` are sorted by length already, so that rows stay in place."""
        return self.glad.complete(texts, new_tokens=new_tokens, batch=len(texts), **options)

    def _mixing(self, share: torch.Tensor, mask: torch.Tensor) -> Any:
        """A logits processor: log of (1 - share) glad + share unwilling, (B, V)."""

        memory: list[Any] = []  # the unwilling model's keys and values, once it has read the prompt

        def mix(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen = F.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
            new = slice(-1, None) if memory else slice(None)
            out = self.unwilling.lm(
                input_ids=ids[:, new], attention_mask=seen, position_ids=(seen.cumsum(-1) - 1).clamp(min=0)[:, new],
                past_key_values=memory[0] if memory else None, use_cache=True,
            )  # fmt: skip
            memory[:] = [out.past_key_values]
            mixed: torch.Tensor = (1 - share) * scores.softmax(-1) + share * out.logits[:, -1].softmax(-1)
            return mixed.clamp_min(1e-30).log()

        return mix


@technique(f"{KEY}.model_mixing", paper="du2024mogu")
def model_mixing(
    glad: ChatModel, unwilling: ChatModel, router: Probe, restricted: Sequence[str], harmless: Sequence[str]
) -> Mixed:
    """Blend a variant that answers and one that refuses, by a router that reads the prompt's hidden state [du2024mogu].

    MoGU tunes both variants from one model (LoRA) and mixes the hidden states of their layers, with a router at each; here
    one linear router weighs their next-token probabilities. router: a probe fitted on restricted and harmless prompts.
    restricted, harmless: validation prompts, from whose scores the threshold between the two variants, halfway, and the
    slope of the router are set. Raises ValueError for no prompts, or two models with different vocabularies.
    """
    if not restricted or not harmless:
        raise ValueError("restricted and harmless must hold prompts of both sorts: they set the router's threshold")
    if len(glad.tokenizer) != len(unwilling.tokenizer):
        raise ValueError("unwilling must have the vocabulary of glad: their probabilities are mixed token by token")
    high, low = router.scores(restricted).median().item(), router.scores(harmless).median().item()
    halfway = Probe(router.model, router.layer, router.weight, (high + low) / 2)
    return Mixed(glad, unwilling, halfway, scale=max(abs(high - low) / 8, 1e-6))  # +-4 at the medians: 0.98 and 0.02
