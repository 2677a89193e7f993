"""Survey section 3.4, defenses by training: before, during and after a user's fine-tuning, and against chosen orders.

A provider owns an aligned model and lets users fine-tune it on their own data. A few harmful examples undo the alignment.
The defenses differ in when the provider acts. The last function trains against another choice of the attacker: the order
of the examples in the prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import permutations
from random import Random

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from safescale_lib.llm.jailbreak_defense.inference import altered, decoder_layers
from safescale_lib.search.models import hooked
from safescale_lib.survey import technique
from safescale_lib.world.town.chats import Chat
from safescale_lib.zoo.chat import ChatModel, answer_loss, finished, labelled
from safescale_lib.zoo.training import fit

KEY = "llm.jailbreak_defense.harmful_fine_tuning_defense"


def _some(chats: Sequence[Chat], n: int, draw: Random) -> list[tuple[dict[str, str], ...]]:
    """n finished conversations, without repeats where there are enough."""
    return [finished(chat) for chat in (draw.sample(list(chats), n) if len(chats) >= n else draw.choices(list(chats), k=n))]


def _check(steps: int, batch: int, **data: Sequence[Chat]) -> None:
    for name, chats in data.items():
        if not chats:
            raise ValueError(f"{name} must hold conversations")
    if steps < 0 or batch < 1:
        raise ValueError(f"steps must be >= 0 and batch >= 1, got {steps} and {batch}")


def _trained(chat: ChatModel, loss: Callable[[ChatModel, int], torch.Tensor], steps: int, lr: float) -> ChatModel:
    """A copy of the model after so many steps down loss(copy, step)."""
    student = copy.deepcopy(chat).requires_grad_(True)  # a search in another thread may hold the model's weights
    fit(student, lambda step: loss(student, step), steps=steps, lr=lr, warmup=max(1, steps // 10), weight_decay=0.0,
        progress=False)  # fmt: skip
    return student.eval()


# --- before: the alignment stage --------------------------------------------------------------------------------------


@technique(f"{KEY}.alignment_stage", paper="huang2024vaccine")
def vaccine(
    chat: ChatModel, alignment: Sequence[Chat], *, rho: float = 2.0, steps: int = 60, lr: float = 5e-4, batch: int = 16,
    seed: int = 0,
) -> ChatModel:  # fmt: skip
    """A copy of the model, aligned under the worst small shift of its hidden embeddings [huang2024vaccine].

    Fine-tuning on harmful data makes embeddings drift; a model that answers rightly under the worst drift of size rho is
    harder to move. Each step takes the gradient of the loss with respect to every layer's output e, then the loss again
    with e + rho * gradient / |gradient| (the norm over all layers), and descends on that. alignment: conversations with the
    answers they should have. rho 0 is plain alignment. The paper tunes adapters (LoRA), here all weights move.
    Raises ValueError for no conversations, or a negative rho or number of steps.
    """
    _check(steps, batch, alignment=alignment)
    if rho < 0:
        raise ValueError(f"rho must be >= 0, got {rho}")

    def loss(student: ChatModel, step: int) -> torch.Tensor:
        dialogues = _some(alignment, batch, Random(seed * 1_000_003 + step))
        layers = range(len(decoder_layers(student.lm)))
        seen: list[torch.Tensor] = []
        with altered(student.lm, dict.fromkeys(layers, _keeping(seen))):
            plain = answer_loss(student, dialogues)
        if rho == 0:
            return plain
        slopes = torch.autograd.grad(plain, seen)  # (B, T, d) a layer
        size = torch.stack([slope.norm() for slope in slopes]).norm().clamp_min(1e-12)
        shifts = [rho * slope / size for slope in slopes]
        with altered(student.lm, {layer: shifts[layer].add for layer in layers}):
            return answer_loss(student, dialogues)

    return _trained(chat, loss, steps, lr)


def _keeping(seen: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def keep(states: torch.Tensor) -> torch.Tensor:
        seen.append(states)
        return states

    return keep


@technique(f"{KEY}.alignment_stage", paper="huang2024booster")
def booster(
    chat: ChatModel, alignment: Sequence[Chat], harmful: Sequence[Chat], *, strength: float = 5.0, alpha: float = 0.1,
    steps: int = 60, lr: float = 5e-4, batch: int = 16, seed: int = 0,
) -> ChatModel:  # fmt: skip
    """A copy of the model, aligned so that one harmful step gains an attacker little [huang2024booster].

    Lowers f(w) + strength * (h(w) - h(w - alpha * grad h / |grad h|)): f is the loss on alignment data, h on harmful data
    that the provider simulates. As in the paper the gradients of the two h are taken one by one, without a
    second derivative. strength 0 is plain alignment. Raises ValueError as `vaccine` does, and for an alpha below 0.
    """
    _check(steps, batch, alignment=alignment, harmful=harmful)
    if strength < 0 or alpha < 0:
        raise ValueError(f"strength and alpha must be >= 0, got {strength} and {alpha}")

    def loss(student: ChatModel, step: int) -> torch.Tensor:
        draw = Random(seed * 1_000_003 + step)
        chosen, bad = _some(alignment, batch, draw), _some(harmful, batch, draw)
        weights = [weight for weight in student.parameters() if weight.requires_grad]
        here = torch.autograd.grad(answer_loss(student, bad), weights)
        size = torch.stack([slope.norm() for slope in here]).norm().clamp_min(1e-12)
        with _moved(weights, [-alpha * slope / size for slope in here]):
            there = torch.autograd.grad(answer_loss(student, bad), weights)
        extra = sum(((a - b) * weight).sum() for a, b, weight in zip(here, there, weights, strict=True))
        return answer_loss(student, chosen) + strength * (extra - extra.detach())  # type: ignore[union-attr]

    return _trained(chat, loss, steps, lr)


@contextmanager
def _moved(weights: Sequence[torch.Tensor], by: Sequence[torch.Tensor]) -> Iterator[None]:
    """Inside the block the weights stand elsewhere; then exactly where they were."""
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, shift in zip(weights, by, strict=True):
            weight.add_(shift)
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


# --- during: the fine-tuning stage ------------------------------------------------------------------------------------


@technique(f"{KEY}.fine_tuning_stage", paper="huang2024lisa")
def lisa(
    chat: ChatModel, user: Sequence[Chat], alignment: Sequence[Chat], *, phase: tuple[int, int] = (4, 4), pull: float = 1.0,
    steps: int = 40, lr: float = 1e-3, batch: int = 16, seed: int = 0,
) -> ChatModel:  # fmt: skip
    """Fine-tune a copy on the user's data and on alignment data in turn, each phase tied to where it began [huang2024lisa].

    Lazy safety alignment: `phase[0]` steps on alignment data, `phase[1]` on the user's, and so on, each with
    pull / 2 * |w - w0|^2 added, w0 being the weights at the last switch. steps: of both kinds together. phase (0, n) is plain
    fine-tuning under the pull. Raises ValueError for no conversations, or counts below 0.
    """
    _check(steps, batch, user=user, alignment=alignment)
    if min(phase) < 0 or phase[1] < 1 or pull < 0:
        raise ValueError(f"phase must hold counts >= 0, the user's >= 1, and pull be >= 0; got {phase} and {pull}")
    anchor: list[torch.Tensor] = []

    def loss(student: ChatModel, step: int) -> torch.Tensor:
        weights, place = list(student.parameters()), step % sum(phase)
        if place in (0, phase[0]):
            anchor[:] = [weight.detach().clone() for weight in weights]
        data = alignment if place < phase[0] else user
        away = torch.stack([(w - w0).square().sum() for w, w0 in zip(weights, anchor, strict=True)]).sum()
        return answer_loss(student, _some(data, batch, Random(seed * 1_000_003 + step))) + pull / 2 * away

    return _trained(chat, loss, steps, lr)


# --- after: repair ----------------------------------------------------------------------------------------------------


def harmful_scores(chat: ChatModel, harmful: Sequence[Chat]) -> dict[str, torch.Tensor]:
    """Wanda scores on harmful data: |weight| times the norm of what it multiplies, for each linear layer of the decoder.

    The norm goes over the tokens of all conversations, not over padding.
    """
    norms: dict[str, torch.Tensor] = {}
    dialogues = [finished(conversation) for conversation in harmful]
    ids, _ = labelled(chat, dialogues)  # (B, T)
    real = ids != chat.tokenizer.pad_token_id
    layers = {name: m for name, m in chat.lm.named_modules() if isinstance(m, torch.nn.Linear) and m is not chat.lm.lm_head}

    def noting(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], None]:
        def note(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            norms[name] = given[0][real].norm(dim=0)  # (in,)

        return note

    with torch.no_grad(), hooked(*((layer.register_forward_pre_hook, noting(name)) for name, layer in layers.items())):
        chat.lm(input_ids=ids)
    return {f"{name}.weight": layer.weight.detach().abs() * norms[name] for name, layer in layers.items()}  # (out, in)


@technique(f"{KEY}.post_fine_tuning", paper="huang2024antidote")
def antidote(
    chat: ChatModel, harmful: Sequence[Chat], harmless: Sequence[Chat] = (), *, share: float = 0.05
) -> ChatModel:  # fmt: skip
    """A copy without the weights that matter most for harmful answers [huang2024antidote].

    A weight's score is its size times the norm of its input over harmful conversations (Wanda); in each layer the
    `share` with the highest scores is set to zero, once, however the fine-tuning went. harmless: if given, scores count
    relative to those on harmless conversations, so that weights that all answers need stay; this model is too small
    to lose those. Raises ValueError for no harmful conversations or a share outside [0, 1).
    """
    if not harmful:
        raise ValueError("harmful must hold conversations")
    if not 0 <= share < 1:
        raise ValueError(f"share must lie in [0, 1), got {share}")
    repaired = copy.deepcopy(chat).requires_grad_(True)
    scores = harmful_scores(chat, harmful)
    if harmless:
        needed = harmful_scores(chat, harmless)
        scores = {name: score / needed[name].clamp_min(1e-12) for name, score in scores.items()}
    weights = dict(repaired.lm.named_parameters())
    with torch.no_grad():
        for name, score in scores.items():
            count = int(share * score.numel())
            worst = score.flatten().topk(count).indices
            weights[name].view(-1)[worst] = 0.0
    return repaired


@technique(f"{KEY}.post_fine_tuning", paper="wang2025panacea")
def panacea(
    chat: ChatModel, harmful: Sequence[Chat], harmless: Sequence[Chat], *, rho: float = 1.0, steps: int = 10,
    weight: float = 1.0, batch: int = 16, seed: int = 0,
) -> ChatModel:  # fmt: skip
    """A copy moved by the perturbation of its weights, no longer than rho, that raises the harmful loss most [wang2025panacea].

    Climbs h(w + e) - weight * g(w + e) by `steps` normalised steps, back to length rho after each: h is the loss on harmful
    conversations, g on harmless ones, which keeps the user's task. The paper optimises the perturbation in turn with the
    fine-tuning itself; here it is added afterwards. Raises ValueError for no conversations or a negative rho.
    """
    _check(steps, batch, harmful=harmful, harmless=harmless)
    if rho < 0:
        raise ValueError(f"rho must be >= 0, got {rho}")
    moved = copy.deepcopy(chat).requires_grad_(True).eval()
    weights = [w for w in moved.parameters() if w.requires_grad]
    start = parameters_to_vector(weights).detach()
    shift = torch.zeros_like(start)
    for step in range(steps):
        draw = Random(seed * 1_000_003 + step)
        gain = answer_loss(moved, _some(harmful, batch, draw)) - weight * answer_loss(moved, _some(harmless, batch, draw))
        slope = torch.cat([g.flatten() for g in torch.autograd.grad(gain, weights)])
        shift = shift + 2 * rho / steps * slope / slope.norm().clamp_min(1e-12)
        shift = shift * min(1.0, rho / max(shift.norm().item(), 1e-12))
        vector_to_parameters(start + shift, weights)
    return moved


# --- orders of demonstrations -----------------------------------------------------------------------------------------


def reordered(chat: Chat, order: Sequence[int]) -> Chat:
    """The conversation with its demonstrations, pairs of turns before the request, in another order.

    Raises ValueError unless order names each demonstration once.
    """
    opening = chat.messages[:1] if chat.messages[0]["role"] == "system" else ()
    *turns, last = chat.messages[len(opening) :]
    pairs = [turns[i : i + 2] for i in range(0, len(turns), 2)]
    if sorted(order) != list(range(len(pairs))):
        raise ValueError(f"order must name each of {len(pairs)} demonstrations once, got {list(order)}")
    return replace(chat, messages=(*opening, *(turn for i in order for turn in pairs[i]), last))


def demonstrations(chat: Chat) -> int:
    """How many answered turns stand before the request."""
    return sum(message["role"] == "assistant" for message in chat.messages)


def orders(count: int, most: int, draw: Random) -> list[tuple[int, ...]]:
    """Up to `most` different orders of so many things, the given one first; all of them where there are no more."""
    every = list(permutations(range(count))) if count <= 6 else [tuple(draw.sample(range(count), count)) for _ in range(most)]
    return [tuple(range(count)), *draw.sample(every[1:], min(most, len(every)) - 1)]


def last_answer_loss(model: ChatModel, conversations: Sequence[Chat]) -> torch.Tensor:
    """(B,) mean cross-entropy of each conversation's answer alone: demonstrations are read, not learned."""
    texts = [model.prompt(chat.messages) for chat in conversations]
    likely, tokens = model.log_likelihood(texts, [f"{chat.answer} {model.tokenizer.eos_token}" for chat in conversations])
    return -likely / tokens


@torch.no_grad()
def hardest_orders(model: ChatModel, conversations: Sequence[Chat], most: int, draw: Random) -> list[Chat]:
    """Each conversation in that of up to `most` orders of its demonstrations under which its answer is least likely."""
    tried = [[reordered(chat, order) for order in orders(demonstrations(chat), most, draw)] for chat in conversations]
    losses = torch.split(last_answer_loss(model, [chat for group in tried for chat in group]), [len(group) for group in tried])
    return [group[int(loss.argmax())] for group, loss in zip(tried, losses, strict=True)]


@technique("llm.jailbreak_defense.robust_training.permutation_robust", paper="chen2025pearl")
def pearl(
    chat: ChatModel, conversations: Sequence[Chat], *, most: int = 6, steps: int = 40, lr: float = 5e-4, batch: int = 8,
    seed: int = 0,
) -> ChatModel:  # fmt: skip
    """A copy of the model, tuned on the hardest order of each prompt's demonstrations [chen2025pearl].

    Lowers over the weights what is highest over the orders: the answer's loss. The paper's second player is a small network
    that proposes an order through Sinkhorn iterations; demonstrations are few here, so the hardest of `most` random orders
    is found by trying. most 1 is plain tuning in the given order. conversations: with demonstrations, and the answers
    they should have. Raises ValueError for no conversations or most below 1.
    """
    _check(steps, batch, conversations=conversations)
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")

    def loss(student: ChatModel, step: int) -> torch.Tensor:
        draw = Random(seed * 1_000_003 + step)
        chosen = draw.choices(list(conversations), k=batch)
        return last_answer_loss(student, hardest_orders(student, chosen, most, draw)).mean()

    return _trained(chat, loss, steps, lr)
