"""A conversation with a model, independent of any user interface.

Chat keeps the messages, renders them with the model's own chat template, reuses the part that the
KV cache already holds, and streams the answer. It never truncates a prompt: a prompt that does not
fit is refused.
"""

from __future__ import annotations

import codecs
import math
import secrets
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

from .common.progress import Progress, Stop
from .errors import ContextFullError, RazorError, options
from .prompt.reasoning import Reasoning
from .prompt.templates import Template

if TYPE_CHECKING:
    import numpy as np
    from llama_cpp.llama_grammar import LlamaGrammar
    from typing_extensions import Unpack

    from .evaluation import Prefill
    from .llama_arguments import GenerateArguments


class _Message(TypedDict):
    role: str  # "system", "user" or "assistant"
    content: str


class Message(_Message, total=False):
    """A message of a conversation.

    An answer also has its tokens as long as the conversation holds them as generated, and the
    model's reasoning before it, which the chat template may leave out of the next prompt.
    """

    tokens: list[int]
    reasoning_content: str


LOOP_PERIOD = 64  # tokens of the longest period that counts as a loop
LOOP_TOKENS = 256  # repeated tokens that end an answer; rows of dashes or zeros are shorter
LOOP_REPEATS = 16  # minimum repetitions; relevant for periods of more than 16 tokens


class Model(Protocol):
    """The parts of razor_local.Llama that Chat uses."""

    n_tokens: int
    model_path: str

    @property
    def model(self) -> Any: ...  # a llama_model pointer
    def token_bos(self) -> int: ...
    def token_eos(self) -> int: ...
    def n_ctx(self) -> int: ...
    def n_ctx_train(self) -> int: ...
    def n_vocab(self) -> int: ...
    def tokenize(self, text: bytes, add_bos: bool = ..., special: bool = ...) -> list[int]: ...
    def mark_plain(self, messages: Any) -> Any: ...
    def piece(self, token: int) -> bytes: ...
    def control_text(self, token: int) -> str: ...
    def is_end(self, token: int) -> bool: ...
    def is_special(self, token: int) -> bool: ...
    def prefill(
        self,
        tokens: Sequence[int],
        progress: Progress | None = ...,
        stop: Stop | None = ...,
    ) -> Prefill: ...
    def generate(
        self, tokens: Sequence[int], **sampling: Unpack[GenerateArguments]
    ) -> Iterable[int]: ...
    def request(self, make: Callable[[Model], Iterator[str]]) -> Generator[str, None, None]: ...


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the meanings and defaults are llama.cpp's. temp 0: most likely token.

    seed None: another one for every conversation.
    """

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Turn:
    """The numbers of the last turn. Counts are in tokens.

    Attributes:
        n_prompt: the whole conversation before the answer.
        n_reused: the part of the prompt that was already in the cache.
        ended: "end" (the model ended its answer), "length" (max_tokens), "context" (no room left),
            "loop" (it repeated the same tokens over and over) or "stopped" (by stop() or an
            exception; if n_answer is 0, the message was taken back).
        n_dropped: messages that were dropped with their answers to make the prompt fit.
    """

    n_prompt: int
    n_reused: int
    n_evaluated: int
    n_answer: int
    prompt_seconds: float
    answer_seconds: float
    ended: str
    n_dropped: int = 0

    @property
    def prompt_per_second(self) -> float:
        return self.n_evaluated / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def answer_per_second(self) -> float:
        return self.n_answer / self.answer_seconds if self.answer_seconds else 0.0


@dataclass(frozen=True)
class Known:
    """A conversation up to an answer: how the chat template may write it, and its tokens."""

    texts: tuple[str, ...] = ()
    tokens: list[int] = field(default_factory=list)


class Loop:
    """Detect an answer that endlessly repeats a period of at most LOOP_PERIOD tokens."""

    def __init__(self) -> None:
        self._last: deque[int] = deque(maxlen=LOOP_PERIOD)  # the newest first
        self._runs = [0] * LOOP_PERIOD  # tokens in a row that equal the one a period before

    def add(self, token: int) -> bool:
        """Add a token. Return True if the last tokens repeat one period."""
        found = False
        for i, before in enumerate(self._last):
            self._runs[i] = self._runs[i] + 1 if token == before else 0
            enough = max(LOOP_TOKENS, LOOP_REPEATS * (i + 1))
            found = found or self._runs[i] + i + 1 >= enough
        self._last.appendleft(token)
        return found


def has_chat_template(model: Model) -> bool:
    """Return True if the model has a chat template; base models have none."""
    return _template_source(model) is not None


def _template_source(model: Model) -> bytes | None:
    from llama_cpp import llama_cpp as C

    source: bytes | None = C.llama_model_chat_template(model.model, None)
    return source


def chat_template(model: Model) -> Callable[[list[Message]], str]:
    """Return a function that renders messages with the model's chat template, up to the answer.

    Raises RazorError if the model has no chat template or a malformed one. The function raises
    RazorError if the template refuses the messages.
    """
    from llama_cpp import llama_cpp as C

    source = _template_source(model)
    if source is None:
        raise RazorError(
            f"{model.model_path} has no chat template: it is not a chat model; use an instruct"
            " version, or 'razor-local run' to continue a text"
        )

    def text_of(token: int) -> str:
        text: bytes = C.llama_vocab_get_text(C.llama_model_get_vocab(model.model), token)
        return text.decode("utf-8", "replace")

    bos, eos = model.token_bos(), model.token_eos()
    template = Template(source.decode("utf-8", "replace"))
    template.check()
    tokens = {
        "bos_token": text_of(bos) if bos >= 0 else "",
        "eos_token": text_of(eos) if eos >= 0 else "",
    }

    def render(messages: list[Message]) -> str:
        return template.render(messages=messages, add_generation_prompt=True, **tokens)

    return render


class Chat:
    """One conversation. messages can be read at any time, and always is a valid conversation.

    n_dropped counts the messages and answers that were dropped to make room for others.

        chat = Chat(Llama("model.gguf", n_ctx=8192), system="Answer in one sentence.")
        for piece in chat.say("What is a KV cache?"):
            print(piece, end="", flush=True)

    Args:
        model: a razor_local.Llama.
        render: a function that turns the messages into a prompt. "auto" uses the model's chat
            template, see chat_template(). With None, the answer continues the text of the
            message, which may contain control tokens.
        system: the system prompt.
        max_tokens: maximum tokens of an answer, None for as many as fit. A prompt must leave room
            for them (None: for a sixteenth of the context, at most 256).
        end_loops: whether to end an answer that repeats itself endlessly, see Loop.
        ignore_end: whether to keep the model from ending its answer. A grammar takes precedence.
        drop_oldest: whether a message that does not fit drops the oldest messages after the system
            prompt, with their answers.

    Raises what chat_template() raises.
    """

    def __init__(
        self,
        model: Model,
        render: Callable[[list[Message]], str] | Literal["auto"] | None = "auto",
        *,
        system: str | None = None,
        max_tokens: int | None = None,
        sampling: Sampling | None = None,
        end_loops: bool = True,
        drop_oldest: bool = False,
        ignore_end: bool = False,
    ) -> None:
        self.model = model
        self.end_loops = end_loops
        self.drop_oldest = drop_oldest
        self.ignore_end = ignore_end
        self.max_tokens = max_tokens
        self.grammar: LlamaGrammar | None = None  # answers follow it
        self.last: Turn | None = None
        self._render = chat_template(model) if render == "auto" else render
        self._sampling: Sampling | None = None
        self.sampling = sampling or Sampling()
        self._known: Known | None = None  # up to the last answer; None: not computed yet
        self.n_dropped = 0
        self.messages: list[Message] = []
        self.set_system(system)

    @property
    def sampling(self) -> Sampling:
        """The sampling options. Setting a seed starts a new sequence of seeds."""
        assert self._sampling is not None  # set by __init__()
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        if self._sampling is None or sampling.seed != self._sampling.seed:
            self._seed = secrets.randbits(31) if sampling.seed is None else sampling.seed
            self._n_turns = 0
        self._sampling = sampling

    @property
    def reserve(self) -> int:
        """Tokens that a prompt must leave free for the answer."""
        return self.max_tokens or min(256, max(1, self.model.n_ctx() // 16))

    @property
    def system(self) -> str | None:
        """The system prompt."""
        first = self.messages[0] if self.messages else None
        return first["content"] if first and first["role"] == "system" else None

    def set_system(self, text: str | None) -> None:
        """Replace the system prompt (None removes it) and keep the rest of the conversation."""
        rest = [m for m in self.messages if m["role"] != "system"]
        first: list[Message] = [{"role": "system", "content": text}] if text else []
        self.messages = first + rest

    def clear(self) -> None:
        """Forget the conversation and keep the system prompt."""
        self.messages = self._system_messages()
        self._known, self.n_dropped = None, 0

    def dump(self) -> dict[str, Any]:
        """Return the conversation for restore(), as values that JSON has."""
        return {"messages": self.messages, "seed": self._seed, "n_turns": self._n_turns}

    def restore(self, dumped: dict[str, Any]) -> None:
        """Go on with a conversation of dump().

        Raises RazorError, with nothing changed, for what cannot be one with this model.
        """
        try:
            messages = [_checked(message) for message in dumped["messages"]]
            seed, n_turns = int(dumped["seed"]), int(dumped["n_turns"])
        except (LookupError, TypeError, ValueError):
            raise RazorError("this is not a saved conversation") from None
        roles = [message["role"] for message in messages]
        said = roles[1:] if roles[:1] == ["system"] else roles
        if said != ["user", "assistant"] * (len(said) // 2):
            raise RazorError(
                "this is not a saved conversation: messages and answers do not take turns"
            )
        for message in messages:
            for token in message.get("tokens", ()):
                self.model.piece(token)  # raises if there is none
        self._known, self.n_dropped = None, 0
        self.messages, self._seed, self._n_turns = messages, seed, n_turns

    @property
    def last_message(self) -> str | None:
        """The last message of the user, None if there is none."""
        return next((m["content"] for m in reversed(self.messages) if m["role"] == "user"), None)

    def undo(self) -> str | None:
        """Take back the last message and its answer; return the message, None if there is none."""
        text = self.last_message
        if text is not None:
            self.messages = self._before_last()
            self._known = None
        return text

    @property
    def n_used(self) -> int:
        """Tokens of the context that the conversation takes so far, as of its last answer."""
        if self.last_message is None:
            return 0
        return len(self._known_now().tokens) or len(self._tokenize(self._rendered(self.messages)))

    @property
    def n_left(self) -> int:
        """Tokens that the next message can have if the messages that may be dropped are dropped."""
        used = self.n_used
        if self.drop_oldest and used:
            used = len(self._tokenize(self._rendered([*self._system_messages(), _user("")])))
        return max(self.model.n_ctx() - used - self.reserve, 0)

    def say(
        self, text: str, progress: Progress | None = None, stop: Stop | None = None
    ) -> Generator[str, None, None]:
        """Add a user message and stream the answer in pieces of text. `last` describes the turn.

        Pieces of the model's reasoning are of the class Thought, a str. progress is called, in
        tokens, while the prompt is evaluated. The turn ends once stop() is true. The message and
        the answer are added to the conversation together: a turn that is stopped before its first
        token changes nothing, and one that is stopped later keeps the answer so far.

        Raises ContextFullError for a prompt that does not fit, with the conversation unchanged, and
        RazorError while the model serves another request.
        """
        return self.model.request(lambda model: self._answer(model, text, False, progress, stop))

    def regenerate(
        self, progress: Progress | None = None, stop: Stop | None = None
    ) -> Generator[str, None, None]:
        """Stream another answer to the last message, drawn with another seed.

        Its first token replaces the current answer; a turn that is stopped earlier changes nothing.
        Raises what say() raises, and RazorError if there is no message.
        """
        return self.edit(self.last_message or "", progress, stop)

    def edit(
        self, text: str, progress: Progress | None = None, stop: Stop | None = None
    ) -> Generator[str, None, None]:
        """Stream the answer to text, which replaces the last message and its answer.

        They are replaced at the first token of the new answer. Raises what regenerate() raises.
        """
        if self.last_message is None:
            raise RazorError("there is no message yet that could be answered again; send one")
        return self.model.request(lambda model: self._answer(model, text, True, progress, stop))

    def _answer(
        self,
        model: Model,
        message: str,
        again: bool,
        progress: Progress | None,
        stop: Stop | None,
    ) -> Iterator[str]:
        """Stream the answer to a new message; again: in place of the last one."""
        n_ctx = model.n_ctx()
        before = self._before_last() if again else self.messages
        messages = [*before, _user(message)]
        prompt = self._rendered(messages)
        known = self._known_of(before) if again else self._known_now()
        tokens, goes_on = self._tokens_after(known, prompt)
        if self.drop_oldest and len(tokens) + self.reserve > n_ctx:
            messages = self._shortened(messages)
            prompt = self._rendered(messages)
            tokens, goes_on = self._tokenize(prompt), False
        n_dropped = (len(before) + 1 - len(messages)) // 2
        n_prompt, reserve = len(tokens), self.reserve
        if n_prompt + reserve > n_ctx:
            # a longer context than trained may be possible, but it answers nothing well
            needed, trained = -(-(n_prompt + reserve) // 256) * 256, model.n_ctx_train()
            advice = "shorten it, or clear the conversation"
            if needed <= trained or not trained:
                more = options(n_ctx=needed)
                advice = f"shorten it, clear the conversation, or use {more} or more"
            raise ContextFullError(
                f"the conversation with this message has {n_prompt} tokens and {reserve} are kept"
                f" for the answer, the context holds {n_ctx}: {advice}"
            )
        started = time.perf_counter()
        prefill = model.prefill(tokens, progress, stop)
        prefilled = time.perf_counter()
        ended = "stopped"
        loop = Loop()
        answer: list[int] = []
        reasoning = Reasoning(prompt)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        try:
            for token in self._generate(model, tokens) if prefill.complete else ():
                if model.is_end(token):
                    ended = "end"
                    break
                answer.append(token)
                data = model.piece(token)
                text = decoder.decode(data)
                if self._render and len(answer) == 1 and text[:1] == " " and text[1:2].strip():
                    text = text[1:]  # SentencePiece puts a space before the first word
                yield from reasoning.add(text)
                if not data:
                    yield from reasoning.add_control(model.control_text(token))
                if stop is not None and stop():
                    break
                if self.end_loops and loop.add(token):
                    ended = "loop"
                    break
                if self.max_tokens and len(answer) >= self.max_tokens:
                    ended = "length"
                    break
                if n_prompt + len(answer) >= n_ctx:
                    ended = "context"
                    break
            yield from reasoning.add(decoder.decode(b"", final=True))  # an unfinished character
            yield from reasoning.rest()
        finally:
            # here too if the caller stops listening, or an interrupt or error comes in between
            if answer or ended == "end":
                if not goes_on:  # the earlier answers were tokenized again
                    messages = [_without_tokens(m) for m in messages]
                reasoning.rest()
                content, thoughts = reasoning.answer, reasoning.reasoning
                if ended == "end" and not content:  # all of it was the answer
                    content, thoughts = thoughts, ""
                said: Message = {"role": "assistant", "content": content, "tokens": answer}
                if thoughts:
                    said["reasoning_content"] = thoughts
                self._known = None
                self.messages = [*messages, said]
                self.n_dropped += 2 * n_dropped
                self._known = self._known_after(prompt, tokens, said)
            self.last = Turn(
                n_prompt=n_prompt,
                n_reused=prefill.n_reused,
                n_evaluated=prefill.n_evaluated,
                n_answer=len(answer),
                prompt_seconds=prefilled - started,
                answer_seconds=time.perf_counter() - prefilled,
                ended=ended,
                n_dropped=n_dropped,
            )

    def _generate(self, model: Model, tokens: list[int]) -> Iterable[int]:
        s = self.sampling
        seed = (self._seed + self._n_turns) % 2**32
        self._n_turns += 1
        options: dict[str, Any] = asdict(s) | {"seed": seed}
        if self.grammar is not None:
            options["grammar"] = self.grammar
        elif self.ignore_end:
            options["logits_processor"] = partial(_without, self._ends)
        return model.generate(tokens, **options)

    @cached_property
    def _ends(self) -> list[int]:
        """The tokens that end an answer."""
        return [token for token in range(self.model.n_vocab()) if self.model.is_end(token)]

    def _rendered(self, messages: list[Message]) -> str:
        if self._render is None:
            return str(messages[-1]["content"])
        return self._render(self.model.mark_plain([_without_tokens(m) for m in messages]))

    def _system_messages(self) -> list[Message]:
        return [m for m in self.messages if m["role"] == "system"]

    def _shortened(self, messages: list[Message]) -> list[Message]:
        """Return messages without the oldest ones and their answers, as few as make them fit.

        If nothing does, the system prompt and the last message are returned.
        """
        first = len(self._system_messages())

        def without(n: int) -> list[Message]:
            return messages[:first] + messages[first + 2 * n :]

        def fits(n: int) -> bool:
            n_prompt = len(self._tokenize(self._rendered(without(n))))
            return n_prompt + self.reserve <= self.model.n_ctx()

        n_pairs = (len(messages) - first) // 2
        return without(bisect_left(range(n_pairs), True, key=fits))

    def _before_last(self) -> list[Message]:
        """Return the messages before the last one of the user."""
        roles = [m["role"] for m in self.messages]
        return self.messages[: len(roles) - 1 - roles[::-1].index("user")]

    def _tokens_after(self, known: Known, prompt: str) -> tuple[list[int], bool]:
        """Return the tokens of a rendered conversation, and whether it goes on from known.

        Then the tokens of its answers are those that the model produced: tokenized again they could
        differ, and the cache would have to go back.
        """
        for text in known.texts:
            if prompt.startswith(text):
                rest = self._tokenize(prompt[len(text) :])
                # between plain words a tokenizer may merge or add a space; a turn marker is safe
                if rest and self.model.is_special(rest[0]):
                    return known.tokens + rest, True
        return self._tokenize(prompt), False

    def _known_now(self) -> Known:
        if self._known is None:
            self._known = self._known_of(self.messages)
        return self._known

    def _known_of(self, messages: list[Message]) -> Known:
        """Return what is known of messages up to their last answer, by the tokens of the answers.

        It repeats what was done when they were given.
        """
        known = Known()
        for i, message in enumerate(messages):
            if "tokens" in message:
                prompt = self._rendered(messages[:i])
                known = self._known_after(prompt, self._tokens_after(known, prompt)[0], message)
        return known

    def _known_after(self, prompt: str, tokens: list[int], answer: Message) -> Known:
        raw = b"".join(map(self.model.piece, answer["tokens"])).decode("utf-8", "replace")
        texts = [raw]
        if "reasoning_content" not in answer:  # else these would not be the text of the tokens
            texts += [answer["content"], answer["content"].strip()]  # some templates strip
        texts = self.model.mark_plain(texts)
        known = tuple(prompt + text for text in dict.fromkeys(texts))
        return Known(known, tokens + answer["tokens"])

    def _tokenize(self, text: str) -> list[int]:
        # a template has written the BOS token, if the model wants one
        # (bytes that are no UTF-8 come from a terminal as surrogates)
        data = text.encode("utf-8", "surrogateescape")
        return self.model.tokenize(data, add_bos=self._render is None, special=True)


def _without(tokens: list[int], input_ids: Any, logits: np.ndarray) -> np.ndarray:
    """Set the logits of tokens to -inf, so that they are never drawn."""
    logits[tokens] = -math.inf
    return logits


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _checked(message: Any) -> Message:
    """Return a message. Raises TypeError, ValueError or LookupError for anything else."""
    checked: Message = {"role": message["role"], "content": message["content"]}
    if "tokens" in message:
        checked["tokens"] = [int(token) for token in message["tokens"]]
    if "reasoning_content" in message:
        checked["reasoning_content"] = message["reasoning_content"]
    if not all(isinstance(value, str) for key, value in checked.items() if key != "tokens"):
        raise TypeError
    return checked


def _without_tokens(message: Message) -> Message:
    copy = message.copy()
    copy.pop("tokens", None)
    return copy
