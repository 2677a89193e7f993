"""GCG against nanogcg: from the same start with the same budget, how low the loss gets, and how long that takes.

    .venv-gcg/bin/python -m benchmarks.gcg     # from the repository's root; see benchmarks/README.md

nanogcg collects garbage twice in every step. On a model of gigabytes nobody notices; on a small one it is most of the time.
So it runs as it comes, and once more with `gc.collect` doing nothing. Losses are not taken from the libraries: one judge
reads the prompt with the returned words in it, from beginning to end and without a cache.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer

from benchmarks.common import (
    RESULTS,
    Answer,
    Contender,
    Result,
    echo,
    keep_freed_memory,
    machine,
    negative,
    releases,
    run,
    show,
    spread,
    word,
    write,
)  # fmt: skip
from safescale_lib.measure.intervals import Interval, bootstrap
from safescale_lib.search.tokens import Slot, chat_slot, gcg, vocabulary
from safescale_lib.world import town
from safescale_lib.world.town.chats import Form
from safescale_lib.zoo.chat import ROLES, TEMPLATE
from safescale_lib.zoo.store import check

LENGTH, TOPK = 10, 64
TARGET = " sure , the"
OURS, PEER = "safescale", "nanogcg"
SHIPPED, STUBBED = "as shipped", "without collecting garbage"
FASTER = {SHIPPED: 5.0, STUBBED: 1.2}  # goals: times as fast as each of the two, at least
FORMS: tuple[Form, ...] = ("plain", "few-shot")


def victim(name: str = "chat") -> tuple[Any, Any]:
    """The model and its tokenizer, read here and not by the zoo: nanogcg needs a release of transformers of 2024.

    nanogcg takes the mark that begins a sequence out of the prompt and trusts the tokenizer to add it, so it must.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    folder = check(name)
    model = LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="<end>",
        additional_special_tokens=[f"<{role}>" for role in ROLES], chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    mark = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{mark} $A", special_tokens=[(mark, tokenizer.bos_token_id)]
    )
    return model, tokenizer


def prompts(n: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """n requests for secrets with a gap at their end, short ones and long ones in turn."""
    draw, made = Random(seed), []
    for i in range(n):
        chat = town.request(town.pick(draw, town.RESTRICTED, "test"), FORMS[i % len(FORMS)], draw, split="test")
        *before, last = chat.messages
        made.append([*before, {**last, "content": f"{last['content']} {{slot}}"}])
    return made


def start(allowed: torch.Tensor, seed: int) -> list[int]:
    """The words both sides begin with."""
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = allowed[torch.randint(len(allowed), (LENGTH,), generator=generator)].tolist()
    return chosen


class Bench:
    """The model, the prompts as both libraries want them, and what both may use."""

    def __init__(self, model: Any, tokenizer: Any, messages: list[list[dict[str, str]]], steps: int, width: int) -> None:
        self.model, self.tokenizer, self.messages, self.steps, self.width = model, tokenizer, messages, steps, width
        self.slots = [chat_slot(tokenizer, each, TARGET) for each in messages]
        self.allowed = vocabulary(tokenizer, len(model.get_input_embeddings().weight))

    def safescale(self) -> Contender:
        def call(which: torch.Tensor, seeds: torch.Tensor) -> Any:
            seed = int(seeds)
            return gcg(
                self.model, self.tokenizer, [self.slots[int(which)]], init=start(self.allowed, seed), steps=self.steps,
                candidates=self.width, topk=TOPK, allowed=self.allowed, early_stop=False,
                generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip

        def unpack(found: Any, which: torch.Tensor, seeds: torch.Tensor) -> Answer:
            return torch.tensor(found.ids), None

        return Contender(OURS, "default", 1, call, unpack)

    def nanogcg(self, setting: str) -> Contender:
        from nanogcg import GCGConfig
        from nanogcg.gcg import GCG

        size = len(self.model.get_input_embeddings().weight)
        forbidden = torch.tensor(sorted(set(range(size)) - set(self.allowed.tolist())))

        def call(which: torch.Tensor, seeds: torch.Tensor) -> Any:
            seed = int(seeds)
            config = GCGConfig(
                num_steps=self.steps, search_width=self.width, topk=TOPK, seed=seed,
                optim_str_init=self.tokenizer.decode(start(self.allowed, seed)),
            )  # fmt: skip
            with _aside(stub=setting == STUBBED):
                peer = GCG(self.model, self.tokenizer, config)
                peer.not_allowed_ids = forbidden
                return peer, peer.run(self._theirs(int(which)), TARGET)

        def unpack(answer: Any, which: torch.Tensor, seeds: torch.Tensor) -> Answer:
            peer, found = answer
            slot, embed = self.slots[int(which)], self.model.get_input_embeddings()
            for ids, given in (
                (slot.before, peer.before_embeds),
                (slot.after, peer.after_embeds),
                (slot.target, peer.target_embeds),
            ):
                if not torch.equal(embed(torch.tensor([ids])), given):
                    raise ValueError("nanogcg must read the same prompt and target, token by token")
            return torch.tensor([self.tokenizer(found.best_string, add_special_tokens=False)["input_ids"]]), None

        return Contender(PEER, setting, 1, call, unpack)

    def _theirs(self, which: int) -> list[dict[str, str]]:
        return [{**each, "content": each["content"].replace("{slot}", "{optim_str}")} for each in self.messages[which]]

    def contenders(self) -> list[Contender]:
        return [self.safescale(), self.nanogcg(SHIPPED), self.nanogcg(STUBBED)]

    def losses(self, returned: torch.Tensor, which: torch.Tensor) -> np.ndarray:
        """The judge: (N,) loss of the target after each prompt with the returned words (N, L) in it."""
        pairs = zip(which.tolist(), returned.tolist(), strict=True)
        return np.array([loss(self.model, self.slots[place], ids) for place, ids in pairs])

    def read(self, contender: Contender, which: torch.Tensor, seeds: torch.Tensor) -> float:
        """Tokens that a contender sends through the model in a step, in the mean."""
        seen = [0]

        def count(module: Any, inputs: Any, named: dict[str, Any]) -> None:
            embeds = named.get("inputs_embeds")  # (rows, tokens, width)
            ids = named.get("input_ids", inputs[0] if inputs else None)  # (rows, tokens)
            seen[0] += ids.numel() if embeds is None else embeds[..., 0].numel()

        counter = self.model.register_forward_pre_hook(count, with_kwargs=True)
        try:
            contender.call(which, seeds)
        finally:
            counter.remove()
        return seen[0] / self.steps


@torch.no_grad()
def loss(model: Any, slot: Slot, ids: list[int]) -> float:
    """Mean cross-entropy of a slot's target: one sequence, from its first token on, no cache."""
    prompt, target = slot.filled(ids), slot.target
    logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return float(F.cross_entropy(logits, torch.tensor(target)))


@contextmanager
def _aside(*, stub: bool) -> Iterator[None]:
    """nanogcg writes to stderr, seeds torch's global stream and asks torch for determinism: kept from the other contenders.

    stub: `gc.collect` does nothing in its two modules; no line of them is changed.
    """
    import nanogcg.gcg
    import nanogcg.utils

    logging.getLogger("nanogcg").setLevel(logging.ERROR)
    modules, real = (nanogcg.gcg, nanogcg.utils), nanogcg.gcg.gc
    try:
        for module in modules if stub else ():
            module.gc = SimpleNamespace(collect=lambda: 0)
        with redirect_stderr(io.StringIO()), torch.random.fork_rng():
            yield
    finally:
        for module in modules:
            module.gc = real
        torch.use_deterministic_algorithms(False)


def excess(ours: np.ndarray, peer: np.ndarray) -> Interval:
    """Our loss minus theirs on the same prompts and starts (N,), bootstrap over them."""
    return bootstrap(ours - peer)


def readings(losses: dict[str, np.ndarray], results: dict[str, Result]) -> list[str]:
    """Whether the loss is level, and how much faster ours is than each of the peer's two settings."""
    own, lines = f"{OURS}, default", []
    apart = excess(losses[own], losses[f"{PEER}, {SHIPPED}"])
    lines.append(
        f"{word(negative(apart), 0.0)}: loss at the end, ours {losses[own].mean():.3f}, {PEER} "
        f"{losses[f'{PEER}, {SHIPPED}'].mean():.3f}: {show(apart)} apart on {apart.n} pairs of prompt and start. "
        "Goal: at most 0."
    )
    holds = apart.low <= 0  # what is fast and worse has won nothing
    for setting, goal in FASTER.items():
        ratio = results[own].ratio_to(results[f"{PEER}, {setting}"])
        lines.append(
            f"{word(ratio, goal, holds=holds)}: ours is {show(ratio)} times as fast as {PEER} {setting}. "
            f"Goal: at least {goal:g}."
        )
    return lines


def table(
    losses: dict[str, np.ndarray], first: dict[str, np.ndarray], results: dict[str, Result], read: dict[str, float]
) -> dict[str, Any]:
    """The site's table without its title and notes."""
    columns = ["library", "setting", "loss at the start", "loss at the end, mean", "tokens read a step"]
    columns += ["seconds a search, median [min, max]", "seconds / ours, median [95 % interval]"]
    rows, own = [], results[f"{OURS}, default"]
    for label, result in results.items():
        rows.append([
            result.contender.library, result.contender.setting, f"{first[label].mean():.3f}", f"{losses[label].mean():.3f}",
            f"{read[label]:.0f}", spread(result.times.ravel()), show(own.ratio_to(result)),
        ])  # fmt: skip
    return {"columns": columns, "rows": rows, "readings": readings(losses, results)}


def notes(bench: Bench, seeds: int, repeats: int) -> list[str]:
    lengths = [len(slot.filled([0] * LENGTH)) for slot in bench.slots]
    return [
        f"GCG on the zoo's `chat`: {LENGTH} free words at the end of {len(lengths)} requests of {min(lengths)} to "
        f"{max(lengths)} tokens, towards `{TARGET.strip()}`, {bench.steps} steps of {bench.width} candidates from the {TOPK} "
        f"best tokens a place, {seeds} starts each. Peer: {releases(PEER)}.",
        f"Both may use the same {len(bench.allowed)} tokens, begin with the same words and read the same prompt, token by "
        "token: nanogcg's list of forbidden tokens is set from outside, and the tokenizer adds the mark that begins a "
        "sequence, which nanogcg takes out of the template. Neither stops early; both take a step's winner even where it is "
        "worse, and return the best.",
        "The losses are the judge's: each prompt with the returned words is read anew, whole and without a cache.",
        "nanogcg draws its candidates with repetition; ours are all different. The tokens of the gradient count, too.",
        f"`{STUBBED}`: `gc.collect` does nothing inside nanogcg's modules; nothing else of it is changed.",
        f"{repeats} repeats; on each pair of request and start all contenders run in turn, in an order shuffled each time.",
    ]


def main(
    seeds: Annotated[int, typer.Option(min=1, help="starts a prompt")] = 5,
    items: Annotated[int, typer.Option(min=1, help="prompts, short and long in turn")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="steps of a search")] = 20,
    width: Annotated[int, typer.Option(min=1, help="candidates a step")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="timed repeats of everything")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="threads of every contender")] = 1,
    out: Annotated[Path, typer.Option(help="where the table goes")] = RESULTS / "gcg.json",
) -> None:
    """Measure, print and write the table."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    about = machine(threads)
    bench = Bench(*victim(), prompts(items), steps, width)
    which, start_of = (grid.flatten() for grid in torch.meshgrid(torch.arange(items), torch.arange(seeds), indexing="ij"))
    read = {each.label: bench.read(each, which[:1], start_of[:1]) for each in bench.contenders()}  # and all is warm
    results = run(bench.model, bench.contenders(), which, start_of, repeats, 1)
    begun = torch.tensor([start(bench.allowed, seed) for seed in start_of.tolist()])
    losses = {label: bench.losses(result.returned, which) for label, result in results.items()}
    first = dict.fromkeys(results, bench.losses(begun, which))
    heading = {"title": "GCG against nanogcg", "machine": about, "notes": notes(bench, seeds, repeats)}
    report = {**heading, **table(losses, first, results, read)}
    write(report, out)
    echo(report)


if __name__ == "__main__":
    typer.run(main)
