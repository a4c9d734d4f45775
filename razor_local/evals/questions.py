"""Questions about a text, and prompts with a given number of tokens."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..chat import Chat, Message, Sampling, chat_template
from ..common.progress import Progress, Stop
from ..errors import RazorError, Stopped, UnsupportedError
from ..llama import Llama

N_FIT = 6  # attempts to reach a length, because the tokens of pieces do not quite add up
MAX_PIECES = 1000  # pieces of a text beyond its tokens; a broken tokenizer gives 0 tokens
TURN_SLACK = 8  # tokens that an answer may take in a conversation beyond those the model wrote


@dataclass(frozen=True)
class Question:
    """A question and the texts that its answer must contain (see the score of the task)."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Sample:
    """One text and the questions about it, asked one after the other in one conversation.

    Attributes:
        length: tokens of the context that holds the prompts and all answers.
        depth: position of the fact in percent of the text, None for tasks without depths.
        text: the text, which may be empty.
        max_tokens: maximum tokens of an answer.
        n_prompt: tokens of the first prompt.
        raw: whether the model continues text and question directly, without a chat template.
    """

    task: str
    length: int
    depth: float | None
    index: int
    text: str
    questions: tuple[Question, ...]
    max_tokens: int
    n_prompt: int
    raw: bool = False

    def key(self) -> dict[str, object]:
        """Return the fields that identify the sample within a run."""
        return {
            "task": self.task,
            "length": self.length,
            "depth": self.depth,
            "index": self.index,
        }


class Prompts:
    """A model's tokenizer and chat template, without its weights.

    A model without a template gets plain text that ends in "Answer:".
    """

    def __init__(self, model: str | os.PathLike[str]) -> None:
        self.model = load_vocabulary(model)
        self._render = renderer(self.model)
        self._bos = bos_text(self.model)
        self._count = lru_cache(1 << 16)(self._count_uncached)

    def count(self, text: str) -> int:
        """Count the tokens of a piece of text."""
        return self._count(text)

    def _count_uncached(self, text: str) -> int:
        return len(self.model.tokenize(text.encode(), add_bos=False, special=False))

    def render(self, messages: list[Message]) -> str:
        """Render the prompt, with marks around the texts of control tokens in messages."""
        return self._render(self.model.mark_plain(messages))

    def n_prompt(self, content: str) -> int:
        """Count the tokens of the prompt whose only message is content."""
        prompt = self.render([{"role": "user", "content": content}])
        return len(self.model.tokenize(prompt.encode(), add_bos=False, special=True))

    def n_raw(self, content: str) -> int:
        """Count the tokens of content without a template."""
        prompt = (self._bos + self.model.mark_plain(content)).encode()
        return len(self.model.tokenize(prompt, add_bos=False, special=True))

    def n_turn(self, question: str) -> int:
        """Count the tokens that another question adds to a conversation, without its answer."""
        turns = [("user", "a"), ("assistant", "b"), ("user", question)]
        messages: list[Message] = [{"role": role, "content": text} for role, text in turns]
        prompt = self.render(messages)
        n = len(self.model.tokenize(prompt.encode(), add_bos=False, special=True))
        return n - self.n_prompt("a") + TURN_SLACK


def load_vocabulary(model: str | os.PathLike[str]) -> Llama:
    """Load the model without its weights. Raises UnsupportedError if it has no tokenizer."""
    llama = Llama(model, vocab_only=True)
    refuse_without_tokenizer(llama)
    return llama


def refuse_without_tokenizer(model: Llama) -> None:
    """Raise UnsupportedError for a model whose tokenizing would end the process."""
    from llama_cpp import llama_cpp as C

    vocab = C.llama_model_get_vocab(model.model)
    if C.llama_vocab_type(vocab) == C.LLAMA_VOCAB_TYPE_NONE:
        raise UnsupportedError(
            f"{model.model_path} has no tokenizer, so that it cannot read a text"
        )


def renderer(model: Llama) -> Callable[[list[Message]], str]:
    """Return chat.chat_template(), or a plain renderer for a model without a template."""
    from llama_cpp import llama_cpp as C

    if C.llama_model_chat_template(model.model, None) is not None:
        return chat_template(model)
    bos = bos_text(model)

    def render(messages: list[Message]) -> str:
        parts = [
            f"{m['content']}\nAnswer:" if m["role"] == "user" else f"{m['content']}\n\n"
            for m in messages
        ]
        return bos + "".join(parts)

    return render


def bos_text(model: Llama) -> str:
    """Return the text of the model's BOS token, "" if it adds none."""
    from llama_cpp import llama_cpp as C

    vocab = C.llama_model_get_vocab(model.model)
    if not C.llama_vocab_get_add_bos(vocab) or model.token_bos() < 0:
        return ""
    text: bytes = C.llama_vocab_get_text(vocab, model.token_bos())
    return text.decode("utf-8", "replace")


def message(text: str, question: str) -> str:
    """Join text and question. The text comes first, so that more questions can reuse its cache."""
    return "\n\n".join(part for part in (text, question) if part)


def fit_text(
    prompts: Prompts,
    pieces: Callable[[], Iterator[str]],
    facts: Sequence[tuple[float, str]],
    question: str,
    n_tokens: int,
) -> tuple[str, int]:
    """Make the longest text of whole pieces, with facts in it, whose prompt fits n_tokens.

    Args:
        prompts: the model's tokenizer and template.
        pieces: yields sentences with the white space after them, the same at each call.
        facts: (depth, sentence), with the depth from 0 to 1 in tokens of the text.
        question: the question of the prompt.
        n_tokens: maximum tokens of the prompt.

    Returns:
        The text, and the number of tokens of its prompt.

    Raises:
        RazorError: the pieces are too short for n_tokens, or the facts alone are too long.
    """
    facts = sorted(facts, key=lambda fact: fact[0])
    bare = "".join(_spaced(fact) for _, fact in facts)
    empty = prompts.n_prompt(message(bare.strip(), question))
    if empty > n_tokens:
        raise RazorError(
            f"the facts and the question alone take {empty:,} tokens, but the answers leave"
            f" {max(n_tokens, 0):,}; use larger lengths"
        )
    budget = n_tokens - empty
    best: tuple[str, int] | None = None
    attempt = 0
    while best is None or attempt < N_FIT:
        attempt += 1
        chosen: list[str] = []
        counts: list[int] = []
        ended, total = True, 0
        for piece in pieces():
            n = prompts.count(piece)
            if len(chosen) > MAX_PIECES + total:
                raise RazorError(
                    f"the tokenizer makes only {total:,} tokens of {len(chosen):,} pieces of text;"
                    " is its vocabulary complete?"
                )
            if total + n > budget:
                ended = False
                break
            chosen.append(piece)
            counts.append(n)
            total += n
        if ended:
            raise RazorError(
                f"the texts have {total:,} tokens, expected {n_tokens:,}; use a folder with more"
                " text, or smaller lengths"
            )
        text = _insert(chosen, counts, facts)
        found = prompts.n_prompt(message(text, question))
        if found <= n_tokens and (best is None or found > best[1]):
            best = text, found
        missing = n_tokens - found
        if 0 <= missing <= max((*counts, 16)):
            break
        budget = max((total if missing < 0 else budget) + missing, 0)
    assert best is not None  # the loop ends only with a text that fits
    return best


def _insert(pieces: list[str], counts: list[int], facts: Sequence[tuple[float, str]]) -> str:
    """Insert each fact before the piece whose start is nearest to its depth."""
    total, done, parts, left = sum(counts), 0, [], list(facts)
    for piece, n in zip(pieces, counts, strict=True):
        while left and left[0][0] * total <= done + n / 2:
            parts.append(_spaced(left.pop(0)[1]))
        parts.append(piece)
        done += n
    parts += [_spaced(fact) for _, fact in left]
    return "".join(parts).strip()


def _spaced(fact: str) -> str:
    return fact if fact.endswith("\n") else f"{fact} "


class Answerer:
    """A context that answers the questions of samples by greedy decoding."""

    def __init__(self, llama: Llama) -> None:
        self.llama = llama
        self._render = renderer(llama)
        bos = bos_text(llama)
        self._raw = lambda messages: bos + "".join(m["content"] for m in messages)

    def ask(
        self, sample: Sample, progress: Progress | None = None, stop: Stop | None = None
    ) -> list[str]:
        """Answer the sample's questions. The part of its text that is in the cache is reused.

        Raises Stopped instead of returning unfinished answers.
        """
        chat = Chat(
            self.llama,
            self._raw if sample.raw else self._render,
            max_tokens=sample.max_tokens,
            sampling=Sampling(temp=0, seed=0),
            end_loops=False,  # compare the answers as the model gives them
        )
        answers = []
        for i, question in enumerate(sample.questions):
            text = sample.text if i == 0 else ""
            answers.append("".join(chat.say(message(text, question.text), progress, stop)))
            if chat.last is not None and chat.last.ended == "stopped":
                raise Stopped
        return answers
