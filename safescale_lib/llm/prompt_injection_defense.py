"""Survey section 3.6, prompt injection defenses, in the survey's order: two at the input, three in the weights.

They share one view of an application: what the user asks and what the model should only read arrive in two channels, as
`channels` builds them. A defense returns a `Defended`: a model behind a front end that decides how the two channels
become one prompt. Conversations without a data channel pass as they are, so that harmless requests measure what the
defense costs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from safescale_lib.llm.prompt_injection_attack import Case, InjectionAttack, inject
from safescale_lib.measure.costs import Meter
from safescale_lib.search import tokens
from safescale_lib.search.asking import Responder
from safescale_lib.survey import technique
from safescale_lib.world import town
from safescale_lib.world.town import Chat, Message, user
from safescale_lib.world.town.injections import (
    CLOSED,
    DATA,
    OPENED,
    between_marks,
    bounded,
    data,
    injection_preference,
    one_message,
    structured,
)
from safescale_lib.zoo.chat import ChatModel, add_marks, prefer, tune
from safescale_lib.zoo.training import own_dice

BLOCKED = "sorry , this goes against my rules ."


# --- two channels -----------------------------------------------------------------------------------------------------


def channels(case: Case, text: str) -> tuple[Message, ...]:
    """The application's conversation about some data, its two channels apart: the `front` of every defense here."""
    return user(case.question), data(text)


Render = Callable[[str, str], tuple[Message, ...]]
"""From the question and the data to the messages that the model reads."""


@dataclass(frozen=True)
class Defended:
    """A chat model behind a front end.

    model: what answers. render: how the two channels become its messages. check: what is wrong with the two channels, in
    words, or None; where it finds something the model is not asked and the answer is `BLOCKED`.
    """

    model: ChatModel
    render: Render
    check: Callable[[str, str], Sequence[str]] | None = None

    @property
    def tokenizer(self) -> Any:
        """The model's, marks included."""
        return self.model.tokenizer

    def messages(self, conversation: Sequence[Message]) -> tuple[Message, ...]:
        """What the model reads. Raises ValueError unless a data channel stands last, behind the user's question."""
        if all(message["role"] != DATA for message in conversation):
            return tuple(conversation)
        *before, asked, read = conversation
        if asked["role"] != "user" or [m["role"] for m in (*before, asked)].count(DATA):
            raise ValueError("a conversation must hold its data channel last, behind the user's question")
        return (*before, *self.render(asked["content"], read["content"]))

    def prompt(self, conversation: Sequence[Message], prefill: str = "") -> str:
        """The very text that the model continues."""
        return self.model.prompt(self.messages(conversation), prefill)

    def wrong(self, conversation: Sequence[Message]) -> Sequence[str]:
        """What the check finds in a conversation; nothing where there is no data channel."""
        if self.check is None or conversation[-1]["role"] != DATA:
            return ()
        return self.check(conversation[-2]["content"], conversation[-1]["content"])

    def respond(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        prefill: str | Sequence[str] = "",
        new_tokens: int = 24,
        **options: Any,
    ) -> list[str]:
        """One answer a conversation, as `ChatModel.respond` gives them."""
        starts = [prefill] * len(conversations) if isinstance(prefill, str) else list(prefill)
        if len(starts) != len(conversations):
            raise ValueError(
                f"prefill must be one text or one each: {len(conversations)} conversations, {len(starts)} prefills"
            )
        let_in = [i for i, conversation in enumerate(conversations) if not self.wrong(conversation)]
        sent, begun = [self.messages(conversations[i]) for i in let_in], [starts[i] for i in let_in]
        replies = self.model.respond(sent, prefill=begun, new_tokens=new_tokens, **options) if sent else []
        answers = dict(zip(let_in, replies, strict=True))
        return [answers.get(i, BLOCKED) for i in range(len(conversations))]


def filtered(text: str, reserved: Sequence[str]) -> str:
    """The text without the reserved strings, and without those that taking one out leaves behind [chen2025struq]."""
    while any(mark in text for mark in reserved):
        for mark in reserved:
            text = text.replace(mark, "")
    return text


def marked(chat: ChatModel, marks: Sequence[str], like: str = "text") -> ChatModel:
    """A copy of a chat model with new reserved tokens, see `add_marks`."""
    student = copy.deepcopy(chat)
    add_marks(student, marks, like)
    return student


# --- at the input -----------------------------------------------------------------------------------------------------


def two_turns(question: str, text: str) -> tuple[Message, ...]:
    """The data in a turn of their own, which a reserved mark opens and which typed text cannot leave."""
    return user(question), data(filtered(text, RESERVED))


RESERVED = ("<system>", "<user>", "<assistant>", "<end>", "<s>", "<pad>", "<unk>", OPENED, CLOSED)
"""What the front end takes out of data: every string that the tokenizer would read as a mark."""


@technique("llm.prompt_injection_defense.input_defense.structured_query", paper="chen2025struq")
def struq(chat: ChatModel, *, steps: int, lr: float = 5e-4, batch: int = 16, seed: int = 0) -> Defended:
    """Structured queries: prompt and data in two channels, and a model tuned to take orders from one [chen2025struq].

    A reserved token, which the front end takes out of the data, opens the data channel. The model is tuned on clean and
    on injected data, half each, with the answer to the *prompt* in either case. The injections are naive ones, faked
    completions and, beyond the paper, some that push the prompt aside: large models learn from the first two to resist the
    third, the town's do not. steps of `batch` conversations: 0 for a model that was tuned before, such as the zoo's
    `chat-struq`. Raises ValueError for a negative number of steps.
    """
    student = marked(chat, (OPENED,))
    if _tuned_before(steps, chat, OPENED):
        return Defended(student, two_turns)
    draw = Random(seed)
    examples = [structured(draw) for _ in range(steps * batch)]
    return Defended(tune(student, examples, steps=steps, lr=lr, batch=batch, seed=seed), two_turns)


def _tuned_before(steps: int, chat: ChatModel, mark: str) -> bool:
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if steps == 0 and mark not in chat.tokenizer.get_vocab():
        raise ValueError(f"steps must be at least 1 for a model that does not know the mark {mark}")
    return steps == 0


@dataclass(frozen=True)
class Specification:
    """What an assistant is for, or what a text wants it to be. role: who it is. duties: what it does. topics: about what.

    An empty field says nothing.
    """

    role: frozenset[str] = frozenset()
    duties: frozenset[str] = frozenset()
    topics: frozenset[str] = frozenset()


READER = """
role : guide
duties : tell
topics : present toy tool prize treasure burden shelter souvenir
"""
"""The specification of an assistant that answers questions about documents."""

LEXICON: dict[str, dict[str, tuple[str, ...]]] = {
    "role": {
        "guide": ("guide",),
        "wizard": ("wizard",),
        "pirate": ("pirate",),
        "spirit": ("spirit",),
        "aunt": ("aunt",),
    },
    "duties": {
        "tell": ("tell", "show", "name", "give", "which one", "what is"),
        "say": ("say", "write only"),
        "repeat": ("repeat", "write again"),
        "reverse": ("backwards", "reverse"),
        "pick": ("first word", "last word"),
        "count": ("count", "how many"),
        "sort": ("sort",),
        "translate": ("translate",),
        "obey": ("ignore the", "forget that", "drop that", "new task"),
    },
    "topics": {
        **{relation: (relation,) for relation in town.words.RELATIONS},
        "secret": ("code", "password", "rules", "instructions"),
        "potion": ("potion",),
        "mockery": ("mock", "rude"),
    },
}
"""Field -> value -> the words by which the compiler knows it, as a developer might have written them down."""


def specification(text: str) -> Specification:
    """Read a specification: a line for each field, "field : values". Raises ValueError for what the language has not."""
    fields: dict[str, frozenset[str]] = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        name, _, values = (part.strip() for part in line.partition(":"))
        strangers = set(values.split()) - set(LEXICON.get(name, ()))
        if name not in LEXICON or name in fields or not values or strangers:
            raise ValueError(f"text must hold a line 'field : values' for fields of {', '.join(LEXICON)}; got {line!r}")
        fields[name] = frozenset(values.split())
    return Specification(**fields)


def compiled(text: str) -> Specification:
    """A text in the language of specifications: what it would have the assistant be, do and talk about."""
    padded = f" {text} "

    def found(field: str) -> frozenset[str]:
        return frozenset(v for v, known in LEXICON[field].items() if any(f" {words} " in padded for words in known))

    return Specification(found("role"), found("duties"), found("topics"))


def contradictions(rules: Specification, wanted: Specification) -> list[str]:
    """What is wanted and not granted, as "field : value"; a field that the rules leave empty grants everything."""
    pairs = [(name, getattr(rules, name), getattr(wanted, name)) for name in LEXICON]
    return [f"{name} : {value}" for name, granted, asked in pairs if granted for value in sorted(asked - granted)]


@technique("llm.prompt_injection_defense.input_defense.prompt_specification", paper="sharma2024spml")
def spml(chat: ChatModel, rules: Specification) -> Defended:
    """System prompts in a formal language: inputs are compiled to it and checked before the model is called [sharma2024spml].

    Question and data are compiled to a `Specification` each and compared with the rules; an input that contradicts them gets
    `BLOCKED` for an answer. Simplified: the paper's compiler is a language model that fills in the fields, ours looks words
    up in a lexicon, so it knows no more words than its author. The chat model stays as it is.
    """

    def check(question: str, text: str) -> list[str]:
        return contradictions(rules, compiled(question)) + contradictions(rules, compiled(text))

    return Defended(chat, one_message, check)


# --- in the weights ---------------------------------------------------------------------------------------------------


@technique("llm.prompt_injection_defense.parameter_defense.task_specific_fine_tuning", paper="piet2023jatmo")
def jatmo(
    base: ChatModel,
    teacher: Responder,
    question: str,
    texts: Sequence[str],
    *,
    steps: int,
    lr: float = 1e-3,
    batch: int = 16,
    seed: int = 0,
) -> Defended:
    """A model for one task, which never reads an instruction [piet2023jatmo].

    An instruction-following teacher answers one question about many texts; the base model is tuned to go straight from
    the text to the answer. From then on the question is not sent at all: there is nothing an injection could stand in for.
    base: should never have learned to follow instructions, as the paper's; the zoo's `chat-base` has, see `untrained`.
    Simplified: the paper has the texts generated by a model, too. Raises ValueError for no texts or no steps.
    """
    if not texts or steps < 1:
        raise ValueError(f"texts must not be empty and steps at least 1, got {len(texts)} texts and {steps} steps")
    outputs = teacher.respond([[user(f"{question} {text}")] for text in texts])
    examples = [Chat(only_data("", text), output, output, "task") for text, output in zip(texts, outputs, strict=True)]
    student = tune(base, examples, steps=steps, lr=lr, batch=batch, seed=seed)
    return Defended(student, only_data)


def untrained(chat: ChatModel, *, layers: int = 1, seed: int = 0) -> ChatModel:
    """A model of the same kind with a chat model's tokenizer and word embeddings, and random weights in a few layers.

    It knows which words are alike and has followed no instruction in its life.
    """
    config = copy.deepcopy(chat.lm.config)
    config.num_hidden_layers = layers
    with own_dice(seed):
        lm = type(chat.lm)(config)
    lm.get_input_embeddings().load_state_dict(chat.lm.get_input_embeddings().state_dict())
    return ChatModel(lm, copy.deepcopy(chat.tokenizer)).eval()


def only_data(question: str, text: str) -> tuple[Message, ...]:
    """The data alone, as a message that cannot end itself."""
    return (user(filtered(text, RESERVED)),)


@technique("llm.prompt_injection_defense.parameter_defense.boundary_aware_fine_tuning", paper="yi2023bipia")
def boundary_tuning(chat: ChatModel, *, steps: int, lr: float = 5e-4, batch: int = 16, seed: int = 0) -> Defended:
    """Mark where external content begins and ends, and tune the model not to act on what lies inside [yi2023bipia].

    Two new tokens enclose the data in the user's message; the model is tuned on injected and on clean data with right answers.
    Marks that somebody typed stay in the data. steps: 0 for a model that was tuned before, such as the zoo's `chat-bounded`.
    Simplified: the paper mixes in a general instruction corpus, ours is the town's alignment corpus.
    """
    student = marked(chat, (OPENED, CLOSED))
    if _tuned_before(steps, chat, CLOSED):
        return Defended(student, between_marks)
    draw = Random(seed)
    examples = [bounded(draw) for _ in range(steps * batch)]
    return Defended(tune(student, examples, steps=steps, lr=lr, batch=batch, seed=seed), between_marks)


@technique("llm.prompt_injection_defense.parameter_defense.preference_optimization", paper="chen2025secalign")
def secalign(chat: ChatModel, *, steps: int, lr: float = 2e-4, beta: float = 0.1, batch: int = 16, seed: int = 0) -> Defended:
    """Prefer the answer to the prompt over the answer to the injection [chen2025secalign].

    The format is that of `struq`. Each pair holds an injected query with the right answer, chosen, and the one that the
    injection asks for, rejected; direct preference optimisation pushes the two apart, where tuning only raises the first.
    The chosen answers' likelihood is held up as in `preference_loss`. chat: a model that knows the format, such as one
    `struq` tuned; the paper's was tuned in it on clean queries only. steps: 0 for a model that was tuned before, such as
    the zoo's `chat-secalign`.
    """
    student = marked(chat, (OPENED,))
    if _tuned_before(steps, chat, OPENED):
        return Defended(student, two_turns)
    draw = Random(seed)
    pairs = [injection_preference(draw) for _ in range(steps * batch)]
    tuned = prefer(student, pairs, steps=steps, lr=lr, batch=batch, beta=beta, seed=seed)
    return Defended(tuned, two_turns)


# --- attacks with the defense in view ---------------------------------------------------------------------------------


def searched(
    defended: Defended,
    cases: Sequence[Case],
    *,
    length: int = 10,
    steps: int = 30,
    candidates: int = 64,
    batch_size: int = 256,
    generator: Any,
) -> InjectionAttack:
    """The injected task behind words that a gradient-guided search finds through the defense [zou2023gcg].

    White-box, each case its own words. The prompt is the one that the front end makes, the target the answer to the
    injected task. steps: 0 sends random words in their place.
    """
    meter = Meter()
    slots = [
        tokens.chat_slot(
            defended.tokenizer,
            defended.messages(channels(case, case.text(f"{tokens.prompts.GAP} {case.task.ask}"))),
            f" {case.task.answer}",
        )
        for case in cases
    ]
    found = tokens.gcg(
        defended.model.lm, defended.tokenizer, slots, length=length, steps=steps, candidates=candidates,
        batch_size=batch_size, generator=generator,
    )  # fmt: skip
    meter.forwards, meter.backwards = found.cost.forwards, found.cost.backwards
    payloads = {id(case): f"{text} {case.task.ask}" for case, text in zip(cases, found.texts, strict=True)}
    return inject(defended, cases, lambda case, _: payloads[id(case)], front=channels, meter=meter)
