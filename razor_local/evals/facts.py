"""Planted facts: a text that contains facts, and questions that are scored by teacher forcing.

The model gets the prompt and the answer up to the value ("The secret code of Marlow is"). A fact is
found if each token of the value is the most likely one after the tokens before it. This needs no
instruction following, takes a few tokens per question, and yields a log probability that separates
caches that find the same facts.

Every cache reads the text once, as Llama reads a prompt, and its state is restored for each
question. Questions are read with the compressed cache, like the later turns of a chat.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np

from .. import native
from ..common.machine import free_memory, n_cores
from ..common.progress import Progress, Stop
from ..errors import RazorError, UnsupportedError
from ..model_shape import ModelShape
from ..native.models import load_model, new_context
from ..native.prefill import full_attention, is_on_device, why_compressed
from ..native.probe import AttentionProbe, attention_context
from ..plan import KV_TYPES, N_CTX_PAD, make_plan
from ..profile import Profile
from .haystack import Haystack
from .needle import NAMES
from .questions import Prompts, fit_text, message

MIN_TOKENS = 640  # a shorter text would hold little but the facts
ROOM = 128  # tokens of the context for a question and its answer
MARGIN = 64  # tokens between the last fact and what local heads keep
N_UBATCH = 512
_Types = tuple[str, str, str, str]  # KV types: K, V, K of local heads, V of local heads
SEED = 0  # fixed, so that repeated runs ask the same questions


class Wording(NamedTuple):
    """One kind of fact: the sentence, the question in its words, the question in other words."""

    statement: str
    question: str
    reworded: str


SINGLE = (
    Wording(
        "The secret code of {key} is {value}.",
        "What is the secret code of {key}?",
        "Which secret code belongs to {key}?",
    ),
    Wording(
        "The special magic number for {key} is {value}.",
        "What is the special magic number for {key}?",
        "Which magic number does {key} have?",
    ),
    Wording(
        "The pass key to the house of {key} is {value}.",
        "What is the pass key to the house of {key}?",
        "With which pass key does the house of {key} open?",
    ),
    Wording(
        "The telephone number of {key} is {value}.",
        "What is the telephone number of {key}?",
        "Which number do I dial to call {key}?",
    ),
    Wording(
        "The bank account of {key} is {value}.",
        "What is the bank account of {key}?",
        "Which account does {key} have at the bank?",
    ),
    Wording(
        "The locker number of {key} is {value}.",
        "What is the locker number of {key}?",
        "Which locker belongs to {key}?",
    ),
    Wording(
        "The library card of {key} is {value}.",
        "What is the library card of {key}?",
        "Which card does {key} show in the library?",
    ),
    Wording(
        "The train ticket of {key} is {value}.",
        "What is the train ticket of {key}?",
        "Which ticket does {key} travel with?",
    ),
)
ALIKE = Wording("The house number of {key} is {value}.", "What is the house number of {key}?", "")
N_ALIKE = 4  # facts of this one kind


@dataclass(frozen=True)
class Question:
    """A question about one fact.

    Attributes:
        tokens: i32, question and answer after the common prefix. The last n_value are the value.
        fact: positions [start, end) of the sentence in the prompt.
    """

    tokens: np.ndarray
    n_value: int
    fact: tuple[int, int]


@dataclass(frozen=True)
class Exam:
    """A text with planted facts and the questions about them, in tokens.

    Attributes:
        prefix: i32, the text with which all prompts begin.
        n_ctx: tokens of the context.
    """

    prefix: np.ndarray
    questions: tuple[Question, ...]
    n_ctx: int

    @property
    def n_outputs(self) -> int:
        """The number of tokens whose logits are read at once."""
        return max(question.n_value for question in self.questions)


@dataclass(frozen=True)
class Outcome:
    """The answers to the questions of an exam.

    Attributes:
        found: bool [questions].
        logprob: f64 [questions], of the whole value, in nats.
    """

    found: np.ndarray
    logprob: np.ndarray

    @property
    def n_found(self) -> int:
        return int(self.found.sum())


def make_exam(
    prompts: Prompts, haystack: Haystack, n_tokens: int, reach: int, sink_tokens: int = 0
) -> Exam:
    """Plant facts in a text of the haystack.

    The facts are evenly spaced, and all of them are in the part that local heads have folded.

    Args:
        prompts: the model's tokenizer and template.
        haystack: the text.
        n_tokens: tokens of a prompt, which is the text with a question.
        reach: tokens at the end of the text without facts: a window and a fold block.
        sink_tokens: tokens at the start of the text without facts.

    Raises:
        UnsupportedError: the facts do not fit before the last reach tokens.
    """
    # 1. Choose the facts.
    if n_tokens < MIN_TOKENS:
        raise UnsupportedError(
            f"a text of {max(n_tokens, 0):,} tokens is too short to plant facts in, expected"
            f" {MIN_TOKENS} or more"
        )
    rng = Random(SEED)
    wordings = [*SINGLE, *[ALIKE] * N_ALIKE]
    rng.shuffle(wordings)
    free = [name for name in NAMES if name not in haystack]
    keys = rng.sample(free if len(free) >= len(wordings) else NAMES, len(wordings))
    values = _numbers(rng, len(wordings), haystack)
    statements = [
        wording.statement.format(key=key, value=value)
        for wording, key, value in zip(wordings, keys, values, strict=True)
    ]
    n_facts = sum(prompts.count(f"{statement} ") for statement in statements)
    # 2. Place them. Depths do not count the template and the facts before them.
    n_before, n_around = _template_tokens(prompts)
    first = max(sink_tokens - n_before, 0)
    last = n_tokens - reach - MARGIN - n_facts - n_before
    if last - first < n_facts / 4:
        raise UnsupportedError(
            f"of {n_tokens:,} tokens only {max(last + n_facts - first, 0):,} are outside of the"
            " chat template, the sink tokens and the window, which leaves no room for facts that"
            " are folded; use a larger context"
        )
    depths = np.linspace(first, last, len(statements)) / (n_tokens - n_facts - n_around)
    facts = list(zip(depths.tolist(), statements, strict=True))
    # 3. Write the text and the questions.
    asked = []
    for wording, key, value, statement in zip(wordings, keys, values, statements, strict=True):
        asked += [
            (words.format(key=key), statement, value)
            for words in (wording.question, wording.reworded)
            if words
        ]
    longest = max((words for words, _, _ in asked), key=prompts.count)
    seed = rng.getrandbits(64)
    text, _ = fit_text(prompts, lambda: haystack.pieces(Random(seed)), facts, longest, n_tokens)

    def tokenize(string: str) -> list[int]:
        return prompts.model.tokenize(string.encode(), add_bos=False, special=True)

    # 4. Split the prompts into tokens and find the facts in them.
    prompts_of = [
        prompts.render([{"role": "user", "content": message(text, words)}]) for words, _, _ in asked
    ]
    tokens, n_values, spans = [], [], []
    for prompt, (_, statement, value) in zip(prompts_of, asked, strict=True):
        answer = statement[: statement.index(value)].rstrip()
        whole = tokenize(f"{prompt}{answer} {value}")
        tokens.append(whole)
        n_values.append(len(whole) - _common([whole, tokenize(prompt + answer)]))
        at = prompt.find(statement)
        if at < 0:
            raise UnsupportedError(
                "the model's chat template changes the text of a message, so the planted facts"
                " cannot be found in the prompt"
            )
        before, after = tokenize(prompt[:at]), tokenize(prompt[: at + len(statement)])
        spans.append((_common([whole, before]), _common([whole, after])))
    n_prefix = _common(tokens)
    exam = Exam(
        np.array(tokens[0][:n_prefix], np.int32),
        tuple(
            Question(np.array(whole[n_prefix:], np.int32), n, span)
            for whole, n, span in zip(tokens, n_values, spans, strict=True)
        ),
        n_ctx=-(-max(map(len, tokens)) // N_CTX_PAD) * N_CTX_PAD,
    )
    _check(exam, reach, sink_tokens)
    return exam


def _template_tokens(prompts: Prompts) -> tuple[int, int]:
    """Count the tokens of the chat template before a message, and in total."""
    mark = "Here"
    before = prompts.render([{"role": "user", "content": mark}]).partition(mark)[0]
    n_before = len(prompts.model.tokenize(before.encode(), add_bos=False, special=True))
    return n_before, prompts.n_prompt(mark)


def _check(exam: Exam, reach: int, sink_tokens: int) -> None:
    """Raise UnsupportedError if the questions would not test folded facts."""
    longest = max(len(question.tokens) for question in exam.questions)
    if longest > N_UBATCH:
        raise UnsupportedError(
            f"the chat template adds {longest:,} tokens after the common prefix of the prompts,"
            f" expected at most {N_UBATCH}"
        )
    starts, ends = zip(*(question.fact for question in exam.questions), strict=True)
    if max(ends) > len(exam.prefix) - reach or min(starts) < sink_tokens:
        raise UnsupportedError(
            "the planted facts are not in the folded part of the text: the text has no suitable"
            " sentences, or the chat template repeats the message"
        )


def _numbers(rng: Random, n: int, haystack: Haystack) -> list[str]:
    """Draw different numbers of five digits that the haystack does not contain."""
    found: list[str] = []
    for _ in range(20 * n):
        value = str(rng.randrange(10_000, 100_000))
        if value not in found and value not in haystack:
            found.append(value)
        if len(found) == n:
            return found
    raise UnsupportedError(
        "the haystack contains nearly every five-digit number, so planted values would not be"
        " unique; choose another text"
    )


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Return the length of the longest common prefix."""
    shortest = min(map(len, sequences))
    first = sequences[0]
    for i in range(shortest):
        if any(other[i] != first[i] for other in sequences):
            return i
    return shortest


class Examiner:
    """A loaded model that answers the questions of an exam, with one context after the other.

    prefill: how razor contexts read the text, as in Llama.
    """

    def __init__(
        self,
        path: Path,
        shape: ModelShape,
        exam: Exam,
        n_threads: int | None,
        n_gpu_layers: int,
        progress: Progress | None = None,
        stop: Stop | None = None,
        prefill: str = "auto",
    ) -> None:
        from llama_cpp import llama_cpp as C

        self._path, self._shape, self._exam, self._C = path, shape, exam, C
        self._n_threads, self._n_gpu_layers = n_threads or n_cores(), n_gpu_layers
        self._prefill = prefill
        self._sources: dict[_Types, int] = {}  # contexts of full caches
        self._lib = native.load()
        self._probe = _FactProbe(self._lib.lib, C, shape, progress, stop)
        self._stack = ExitStack()

    def __enter__(self) -> Examiner:
        self._C.llama_backend_init()
        self._on_device = is_on_device(self._C, self._n_gpu_layers)
        self._model = self._stack.enter_context(
            load_model(self._lib, self._C, self._path, self._n_gpu_layers, self._probe)
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def full(self) -> tuple[Outcome, np.ndarray]:
        """Ask the full f16 cache, without flash attention.

        Returns:
            The outcome, and the fact score of every query head, f64 [sum of n_head]. That is its
            attention from a question and its answer to the sentence of the fact, averaged over
            these tokens and all questions.
        """
        probe = self._probe
        with attention_context(
            self._lib,
            self._C,
            self._model,
            self._path,
            self._exam.n_ctx,
            N_UBATCH,
            self._n_threads,
            probe,
            self._exam.n_outputs,
        ) as ctx:
            outcome = self._take(ctx, "planting facts: the full cache", read_attention=True)
        per_query_head = probe.flat(probe.sums) / len(self._exam.questions)
        if not np.isfinite(per_query_head).all():
            raise RazorError("the model's attention is not a number; the file may be damaged")
        return outcome, per_query_head

    def ask(
        self,
        profile: Profile | None,
        type_k: str = "f16",
        type_v: str = "f16",
        type_k_local: str | None = None,
        type_v_local: str | None = None,
        what: str = "planting facts",
    ) -> Outcome:
        """Ask a context with flash attention. With profile None it has a full cache.

        type_k_local, type_v_local: KV types of local heads; None: type_k and type_v.
        """
        types = (type_k, type_v, type_k_local or type_k, type_v_local or type_v)
        with self._context(profile, types) as ctx:
            source = None
            if profile is not None and types[:2] == types[2:]:
                source = self._source(ctx, profile, types)
            return self._take(ctx, what, source=source)

    def _source(self, ctx: int, profile: Profile, types: _Types) -> int | None:
        """Return a full cache that has read the text, None if a context cannot take it from there.

        All contexts with the same KV types that read with full attention share this cache, so that
        the text is read only once. A context cannot take the text if it reads with the compressed
        cache, or if there is not enough memory for the full cache.
        """
        lib, exam = self._lib, self._exam
        if not lib.stats(ctx).active or self._why_compressed(ctx) is not None:
            return None
        if types not in self._sources:
            every = Profile(tuple(map(np.ones_like, profile.retrieval)), compensation=False)
            n_bytes = make_plan(self._shape, None, exam.n_ctx, *types[:2]).kv_bytes
            if n_bytes > free_memory() // 4:
                return None
            source = self._stack.enter_context(self._context(every, types))
            if not lib.lib.llama_razor_set_source(ctx, source):
                return None
            lib.lib.llama_razor_set_source(ctx, None)
            self._read(source, lambda _: None)
            self._sources[types] = source
        return self._sources[types]

    def _why_compressed(self, ctx: int) -> str | None:
        return why_compressed(self._lib, ctx, self._prefill, self._on_device)

    def _context(self, profile: Profile | None, types: _Types) -> AbstractContextManager[int]:
        params = self._C.llama_context_default_params()
        params.n_ctx = self._exam.n_ctx
        params.n_batch = params.n_ubatch = N_UBATCH
        params.n_threads = params.n_threads_batch = self._n_threads
        params.n_outputs_max = self._exam.n_outputs
        params.flash_attn_type = self._C.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.type_k, params.type_v = (KV_TYPES[name].ggml_id for name in types[:2])
        params.abort_callback = self._probe.abort_callback
        params.no_perf = True

        def failed(why: str) -> RazorError:
            return UnsupportedError(f"no context could be created for {self._path} ({why})")

        override = native.make_params(profile, type_k_local=types[2], type_v_local=types[3])
        return new_context(self._lib, self._C, self._model, params, override, failed)

    def _read(self, ctx: int, report: Callable[[float], object], source: int | None = None) -> None:
        """Read the text, or take it from a source that has read it.

        Args:
            report: called with the number of tokens read so far.
        """
        prefix, lib = self._exam.prefix, self._lib
        if source is not None:
            lib.lib.llama_razor_set_source(ctx, source)
            try:
                self._decode(ctx, 0, prefix, np.zeros(len(prefix), np.int8))
            finally:
                lib.lib.llama_razor_set_source(ctx, None)
            report(len(prefix))
            return
        if lib.stats(ctx).active and self._why_compressed(ctx) is None:
            with self._probe.during(lambda: report(lib.stats(ctx).prefill_done * len(prefix))):
                with full_attention(lib, ctx):
                    self._decode(ctx, 0, prefix, np.zeros(len(prefix), np.int8))
            report(len(prefix))
            return
        for start in range(0, len(prefix), N_UBATCH):
            part = prefix[start : start + N_UBATCH]
            self._decode(ctx, start, part, np.zeros(len(part), np.int8))
            report(start + len(part))

    def _take(
        self, ctx: int, what: str, read_attention: bool = False, source: int | None = None
    ) -> Outcome:
        """Read the text once, and ask each question after it."""
        # 1. Read the text.
        exam, probe, C = self._exam, self._probe, self._C
        done = n_prefix = len(exam.prefix)
        work = n_prefix + sum(len(question.tokens) for question in exam.questions)
        probe.progress(0, work, what)
        self._read(ctx, lambda n: probe.progress(n, work, what), source)
        # 2. Save the state.
        size = C.llama_state_get_size(ctx)
        state = (ctypes.c_uint8 * size)()
        size = C.llama_state_get_data(ctx, state, size)
        n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self._model))
        # 3. Ask each question, from the restored state.
        found, logprob = [], []
        for i, question in enumerate(exam.questions):
            if i and C.llama_state_set_data(ctx, state, size) != size:
                raise RazorError(f"the state of {self._path} cannot be restored")
            asked, n = question.tokens[:-1], question.n_value
            outputs = np.zeros(len(asked), np.int8)
            outputs[-n:] = 1
            probe.wanted, probe.fact = read_attention, question.fact
            try:
                self._decode(ctx, n_prefix, asked, outputs)
            finally:
                probe.wanted = False
            flat = np.ctypeslib.as_array(C.llama_get_logits(ctx), shape=(n * n_vocab,))
            logits = flat.reshape(n, n_vocab).astype(np.float64)
            if not np.isfinite(logits).all():
                raise RazorError(
                    f"{self._path} computes logits that are not numbers; the file may be damaged"
                )
            value = question.tokens[-n:]
            top = logits.max(axis=1)
            found.append(bool((logits.argmax(axis=1) == value).all()))
            log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
            logprob.append(float((logits[np.arange(n), value] - log_sum).sum()))
            done += len(question.tokens)
            probe.progress(done, work, what)
        return Outcome(np.array(found), np.array(logprob))

    def _decode(self, ctx: int, start: int, part: np.ndarray, outputs: np.ndarray) -> None:
        code = self._probe.decode(ctx, start, part, outputs)
        self._probe.check()
        if code != 0:
            raise RazorError(
                f"computing tokens {start} to {start + len(part)} of {self._path} failed"
                f" ({self._lib.reason(f'llama_decode {code}')})"
            )


class _FactProbe(AttentionProbe):
    """Sum the attention to the fact in question, averaged over the decoded tokens."""

    fact = (0, 0)

    def __init__(
        self,
        lib: ctypes.CDLL,
        C: Any,
        shape: ModelShape,
        progress: Progress | None,
        stop: Stop | None,
    ) -> None:
        super().__init__(lib, C, shape, progress, stop)
        self.sums = [np.zeros(n) for n in self.n_head]
        self._report: Callable[[], object] | None = None
        self._reported = 0.0

    @contextmanager
    def during(self, report: Callable[[], object]) -> Iterator[None]:
        """Call report() every tenth of a second while the block computes."""
        self._report = report
        try:
            yield
        finally:
            self._report = None

    def on_operation(self, data: int | None) -> bool:
        if self._report is not None and time.monotonic() > self._reported + 0.1:
            self._reported = time.monotonic()
            self._report()
        return super().on_operation(data)

    def on_head(self, il: int, ih: int, attention: np.ndarray) -> None:
        start, end = self.fact
        self.sums[il][ih] += float(attention[:, start:end].sum(dtype=np.float64)) / self.n_part
