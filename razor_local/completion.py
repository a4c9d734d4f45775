"""Build the responses of completion requests, such as Llama.create_completion().

llama_cpp's own loop assembles the whole answer again and copies the prompt for every token. Here
every byte is processed once, and text that has been returned is forgotten.
"""

from __future__ import annotations

import codecs
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, final

import numpy as np

from .completion_request import read_prompt, read_sampling, read_stops
from .errors import RazorError


def complete(llama: Any, request: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """Yield the chunks of an answer, or the whole answer if request["stream"] is False.

    Args:
        llama: an Inside, the Llama from inside a request.
        request: the arguments of create_completion().

    Raises:
        ContextFullError: the prompt does not fit.
        RazorError: an argument is not understood.
    """
    stops = read_stops(request["stop"])
    if request["logprobs"] is not None and not 0 <= request["logprobs"] <= llama.n_vocab():
        raise RazorError(
            f"logprobs is {request['logprobs']!r}, expected the number of top tokens to return"
        )
    prompt = read_prompt(llama, request["prompt"], request["suffix"])
    options = read_sampling(llama, request, prompt)
    n_max = llama.n_ctx() - len(prompt)
    if request["max_tokens"] is not None and request["max_tokens"] > 0:
        n_max = min(n_max, request["max_tokens"])
    head = {
        "id": f"cmpl-{uuid.uuid4()}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": llama.model_path if request["model"] is None else request["model"],
    }

    def response(
        part: str, finish_reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"text": part, "index": 0, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**head, "choices": [choice]}

    asked = request["prompt"]
    asked = asked if isinstance(asked, str) else _text(llama, asked)
    echo, stream = asked if request["echo"] else "", request["stream"]
    logprobs = None
    if request["logprobs"] is not None:
        logprobs = _Logprobs(llama, request["logprobs"], 0 if echo else len(asked))
        if echo:
            logprobs.add_prompt(prompt)
    if stream and echo:
        yield response(echo, logprobs=logprobs and logprobs.take_all())

    piece_of = _piece_reader(llama, prompt)
    text, answer = TextStream(stops), bytearray()
    n_tokens, finish_reason, end = 0, "length", None
    for token in llama.generate(prompt, **options):
        if llama.is_end(token):
            finish_reason = "stop"
            break
        piece = piece_of(token)
        n_tokens += 1
        answer += piece
        if logprobs is not None:
            logprobs.add(token, llama._last_logits())
        text.add(piece)
        if text.stopped():
            finish_reason = "stop"
            end = min(answer.index(stop) for stop in stops if stop in answer)
            break
        for part, n in text.ready():
            if stream:
                yield response(part, logprobs=logprobs and logprobs.take(n))
        if n_tokens >= n_max:
            break
    criteria = request["stopping_criteria"]
    if criteria is not None and criteria(llama._input_ids, llama._last_logits()):
        finish_reason, end = "stop", None
    if llama.verbose:
        llama._ctx.print_timings()
    if llama.cache is not None:
        llama.cache[llama._input_ids.tolist()] = llama.save_state()
    if stream:
        for part, n in text.rest():
            yield response(part, logprobs=logprobs and logprobs.take(n))
        yield response("", finish_reason)
        return
    whole = echo + answer[:end].decode("utf-8", "ignore")
    usage = {
        "prompt_tokens": len(prompt),
        "completion_tokens": n_tokens,
        "total_tokens": len(prompt) + n_tokens,
    }
    told = logprobs and logprobs.take_all()
    yield {**response(whole, finish_reason, told), "usage": usage}


def _text(llama: Any, tokens: Sequence[int]) -> str:
    data: bytes = llama.detokenize(list(tokens))
    return data.decode("utf-8", "ignore")


def _piece_reader(llama: Any, prompt: list[int]) -> Callable[[int], bytes]:
    """Return a function that gives the bytes of the next token of an answer."""
    from llama_cpp.llama_tokenizer import LlamaTokenizer

    if type(llama.tokenizer_) is LlamaTokenizer:
        of_token: Callable[[int], bytes] = llama.piece
        return of_token
    before = list(prompt)  # tokenizers of other libraries need the tokens before

    def piece(token: int) -> bytes:
        found: bytes = llama.detokenize([token], prev_tokens=before)
        before.append(token)
        return found

    return piece


@final
class _Logprobs:
    """Collect log probabilities of tokens that are not yet returned, in OpenAI's format.

    n_top: most likely tokens to report at each position. offset: characters before the first token.
    """

    def __init__(self, llama: Any, n_top: int, offset: int) -> None:
        self._llama, self._n_top = llama, n_top
        self._offset, self._decoder = offset, codecs.getincrementaldecoder("utf-8")("ignore")
        self._told: list[tuple[str, int, float | None, dict[str, float] | None] | None] = []

    def add_prompt(self, tokens: list[int]) -> None:
        """Evaluate the prompt and add its tokens, except a leading BOS. The first has none."""
        llama = self._llama
        llama.reset()
        first = 1 if tokens[:1] == [llama.token_bos()] else 0
        last, i = None, 0
        for rows in llama.eval_logits(tokens):
            for row in rows:
                if i >= first:
                    self.add(tokens[i], None if i == first else last)
                last, i = row.copy(), i + 1

    def add(self, token: int, logits: np.ndarray | None) -> None:
        """Tell a token. logits: f32 [n_vocab], before it."""
        llama = self._llama
        piece = llama.detokenize([token])
        text, offset = piece.decode("utf-8", "ignore"), self._offset
        self._offset += len(self._decoder.decode(piece))
        if token == llama.token_bos():
            self._told.append(None)
            return
        if logits is None:
            self._told.append((text, offset, None, None))
            return
        logprob = logits.astype(np.float64)
        logprob -= logprob.max()
        logprob -= np.log(np.exp(logprob).sum())
        likeliest = np.argsort(-logprob, kind="stable")[: self._n_top].tolist()
        top = {
            llama.detokenize([i]).decode("utf-8", "ignore"): float(logprob[i]) for i in likeliest
        }
        top[text] = float(logprob[token])
        self._told.append((text, offset, float(logprob[token]), top))

    def take(self, n: int) -> dict[str, Any]:
        """Return the next n tokens, and forget them."""
        told = [one for one in self._told[:n] if one is not None]
        del self._told[:n]
        tokens, offsets, logprobs, tops = zip(*told, strict=True) if told else ((), (), (), ())
        return {
            "tokens": list(tokens),
            "text_offset": list(offsets),
            "token_logprobs": list(logprobs),
            "top_logprobs": list(tops),
        }

    def take_all(self) -> dict[str, Any]:
        return self.take(len(self._told))


class TextStream:
    """Pieces of tokens in, chunks of text out.

    A chunk is the text of one token, or of the few that make up a character. What may be the
    beginning of a stop string is held back. Bytes that are no UTF-8 are dropped.
    """

    def __init__(self, stops: Sequence[bytes] = ()) -> None:
        self._stops = list(stops)
        self._longest = max(map(len, stops), default=0)
        self._beginnings = {stop[:n] for stop in stops for n in range(1, len(stop) + 1)}
        self._held: list[bytes] = []  # pieces that are not given out yet

    def add(self, piece: bytes) -> None:
        """Take the piece of the next token."""
        self._held.append(piece)

    def stopped(self) -> bool:
        """Return True if a stop string is complete."""
        if not self._stops:
            return False
        held = b"".join(self._held)
        return any(stop in held for stop in self._stops)

    def ready(self) -> list[tuple[str, int]]:
        """Return the chunks that cannot be a part of a stop string any more.

        Each comes with the number of its tokens.
        """
        held = self._held
        if not self._stops and len(held) == 1 and held[0].isascii():
            self._held = []
            return [(held[0].decode(), 1)]
        chunks: list[tuple[str, int]] = []
        limit = sum(map(len, held)) - self._overlap()
        end = 0
        for pieces, text, whole in _characters(held):
            end += sum(map(len, pieces))
            if end > limit or not whole:
                break
            self._held = self._held[len(pieces) :]
            chunks.append((text, len(pieces)))
        return chunks

    def rest(self) -> list[tuple[str, int]]:
        """Return the chunks that are left when the answer has ended, up to a stop string."""
        held, self._held = self._held, []
        joined = b"".join(held)
        end = min((joined.index(s) for s in self._stops if s in joined), default=len(joined))
        chunks: list[tuple[str, int]] = []
        for pieces, text, _ in _characters(held):
            size = sum(map(len, pieces))
            if size >= end:
                cut = b"".join(pieces)[:end].decode("utf-8", "ignore")
                chunks.append((cut, len(pieces)))
                break
            end -= size
            chunks.append((text, len(pieces)))
        return chunks

    def _overlap(self) -> int:
        """Bytes at the end that may begin a stop string."""
        held = b"".join(self._held)
        for n in range(min(self._longest, len(held)), 0, -1):
            if held[-n:] in self._beginnings:
                return n
        return 0


def _characters(pieces: list[bytes]) -> Iterator[tuple[list[bytes], str, bool]]:
    """Groups of pieces that end with a character, their text, and whether it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    group: list[bytes] = []
    text = ""
    for piece in pieces:
        group.append(piece)
        text += decoder.decode(piece)
        if not decoder.getstate()[0]:
            yield group, text, True
            group, text = [], ""
    if group:
        yield group, text, False
