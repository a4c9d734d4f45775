"""Llama: llama_cpp.Llama whose KV cache follows a razor profile."""

from __future__ import annotations

import ctypes
import functools
import inspect
import os
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from ctypes import c_uint8
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from . import native
from .completion import TextStream
from .errors import (
    ContextFullError,
    GGUFError,
    LibraryError,
    ProfileError,
    RazorError,
    StateError,
    UnsupportedError,
)
from .gguf_header import read_header
from .plan import KV_TYPES, Plan, make_plan, padded_n_ctx
from .profile import ModelShape, Profile, profile_from_header, read_sidecar, shape_from_header
from .prompts import PlainMessages

_native = native.load()  # before llama_cpp, which would load a library of its own

import jinja2  # noqa: E402
import llama_cpp  # noqa: E402
from llama_cpp import llama_cpp as C  # noqa: E402
from llama_cpp.llama_tokenizer import LlamaTokenizer  # noqa: E402

_TYPE_NAMES = {kv_type.ggml_id: name for name, kv_type in KV_TYPES.items()}
_ABORTED = 2  # llama_decode: stopped by the abort callback
_NO_SLOT = 1  # llama_decode: no room for the batch
_MAX_THREADS = 512  # GGML_MAX_N_THREADS; ggml ends the process above it
_loading = threading.RLock()  # the base class redirects the process's stdout and stderr meanwhile
_BASE_OPTIONS = frozenset(inspect.signature(llama_cpp.Llama.__init__).parameters) - {"kwargs"}


@dataclass(frozen=True)
class LayerMemory:
    """KV heads and bytes of one layer's cache, as the library reports them."""

    il: int
    retrieval_kv_heads: int
    local_kv_heads: int
    kv_bytes: int


@dataclass(frozen=True)
class Memory:
    """What the KV cache takes. All sizes in bytes, allocated when the context was created.

    active: local heads hold less than every token (False: llama.cpp's own cache runs, why says the
    reason). kv_bytes: sum of the backend buffers. kv_bytes_full: llama.cpp's own cache with the
    same types. kv_bytes_full_f16: a full f16 cache, None where the model's cache is of a kind that
    the plan does not describe. layers: empty where not active. n_tokens: in the cache now.
    """

    active: bool
    why: str | None
    kv_bytes: int
    kv_bytes_full: int
    kv_bytes_full_f16: int | None
    layers: tuple[LayerMemory, ...]
    n_tokens: int
    n_ctx: int

    @property
    def share(self) -> float:
        """kv_bytes / kv_bytes_full; 1.0 for a model without a KV cache."""
        return self.kv_bytes / self.kv_bytes_full if self.kv_bytes_full else 1.0


@dataclass(frozen=True)
class SequenceStats:
    """One sequence of the cache, in tokens.

    Positions [sink_tokens, frontier) are folded into the compensation tokens of the local heads,
    n_folded of them. n_rollback: this many can be taken back from the end without evaluating again.
    """

    n_tokens: int
    frontier: int
    n_folded: int
    n_rollback: int


class Prefill(NamedTuple):
    """n_reused: tokens already in the cache. n_evaluated: tokens run. complete: not stopped."""

    n_reused: int
    n_evaluated: int
    complete: bool


def _one_thread(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an open Llama; only one thread at a time may be in any of them."""

    @functools.wraps(method)
    def alone(self: Llama, *args: Any, **kwargs: Any) -> Any:
        if not self._in_use.acquire(blocking=False):
            raise RazorError(
                "another thread is using this Llama; use one at a time, or make a Llama for each"
            )
        try:
            _ = self._ctx.ctx  # raises if it is closed
            return method(self, *args, **kwargs)
        finally:
            self._in_use.release()

    return alone


class Llama(PlainMessages, llama_cpp.Llama):
    """A llama_cpp.Llama with RazorAttention. All arguments of the base class, and:

    razor: True, use the profile in the model file, and llama.cpp's own cache where it has none; a
        path, the profile of that sidecar; a Profile; False, llama.cpp's own cache.
    retrieval: another budget than the profile's, the share of KV heads that keep every token; they
        are chosen by the scores in the profile.
    window, sink_tokens (tokens), compensation: instead of the profile's.
    type_k, type_v: KV cache types by name ("q8_0") or ggml number.
    progress: called while the model loads with the part done (0 to 1); False stops loading.

    n_ctx: tokens, rounded up to a multiple of 256; 0, as trained; "auto", the largest up to the
        trained length for the memory that is free now, of which fit.MARGIN stays free (adapters
        are not counted).

    Other defaults than the base class: flash_attn=True, verbose=False.

    One thread at a time may use it; a second one gets a RazorError. So does who uses it after
    close().

    Raises GGUFError or ProfileError (bad file), UnsupportedError (model or options that razor
    refuses), RazorError (loading failed; with the native library's reason), OSError.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        razor: bool | str | os.PathLike[str] | Profile = True,
        retrieval: float | None = None,
        window: int | None = None,
        sink_tokens: int | None = None,
        compensation: bool | None = None,
        progress: Callable[[float], object] | None = None,
        n_ctx: int | str = 512,
        type_k: int | str | None = None,
        type_v: int | str | None = None,
        flash_attn: bool = True,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        self._razor_args = {
            "razor": razor,
            "retrieval": retrieval,
            "window": window,
            "sink_tokens": sink_tokens,
            "compensation": compensation,
        }
        self._progress = progress
        self._in_use = threading.RLock()
        ids = (C.llama_token * 1)()
        self._one = ids, C.llama_batch_get_one(ids, 1)  # a batch of one token, and that token
        self._pieces: dict[int, bytes] = {}  # by token, as they are asked for
        self._ends: dict[int, bool] = {}  # likewise
        self._progress_error: BaseException | None = None
        model_path = os.fspath(model_path)
        _refuse_arguments(model_path, n_ctx, kwargs)
        type_k, type_v = _type_name(type_k), _type_name(type_v)
        if kwargs.get("vocab_only"):
            razor = False  # no weights, no cache
            n_ctx = 512 if n_ctx == "auto" else n_ctx

        shape, profile, why = _resolve(
            model_path, razor, retrieval, window, sink_tokens, compensation
        )
        if isinstance(n_ctx, str):
            options = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn, **kwargs}
            run = profile and profile.with_options(window, sink_tokens, compensation)
            n_ctx = _auto_n_ctx(model_path, n_ctx, run, options)
        self._plan: Plan | None = None
        if shape is not None:
            n_ctx = padded_n_ctx(shape, n_ctx)
            if n_ctx:  # llama.cpp does so too, but the base class allocates for n_batch before it
                kwargs["n_batch"] = min(kwargs.get("n_batch", 512), n_ctx)
            plan = make_plan(
                shape, profile, n_ctx, type_k, type_v, flash_attn, window, sink_tokens, compensation
            )
            self._plan = plan if profile is not None else replace(plan, why_inactive=why)
        self._why = self._plan.why_inactive if self._plan else why
        if self._plan is not None and self._plan.active:
            _refuse_options(kwargs)
        if self._plan is not None:
            _refuse_too_large(self._plan)
        if profile is not None:
            profile = profile.with_options(window, sink_tokens, compensation)
        self._profile = profile

        native.clear_errors()
        refusal = None
        with _loading, _native.override(native.make_params(profile)):
            try:
                super().__init__(
                    model_path,
                    n_ctx=n_ctx,
                    type_k=KV_TYPES[type_k].ggml_id,
                    type_v=KV_TYPES[type_v].ggml_id,
                    flash_attn=flash_attn,
                    verbose=verbose,
                    **kwargs,
                )
            except RazorError:
                self.close()
                raise
            except UnicodeDecodeError as error:
                self.close()
                refusal = GGUFError(
                    f"{model_path}: the vocabulary in its metadata has a token that is not UTF-8"
                    f" ({error.object[:32]!r}); convert the model again"
                )
            except (ValueError, RuntimeError) as error:
                refusal = self._refusal(model_path, error)
                self.close()
                if refusal is None:
                    raise
            except jinja2.TemplateError as error:
                self.close()
                refusal = GGUFError(
                    f"{model_path}: the chat template in its metadata is malformed: {error}; mend"
                    " tokenizer.chat_template, for example with gguf-new-metadata"
                )
        if self._progress_error is not None:
            raise self._progress_error
        if refusal is not None:
            raise refusal
        self._check_plan()

    # -- what razor does --

    @property
    def plan(self) -> Plan | None:
        """The plan of this context; None for a model whose cache the plan does not describe."""
        return self._plan

    @property
    def profile(self) -> Profile | None:
        """The profile of this context, options applied; None for a model without one."""
        return self._profile

    def memory(self) -> Memory:
        """What the KV cache takes, from the native library's own count."""
        stats = _native.stats(self.ctx)
        layers = ()
        if stats.active:
            rows = [_native.layer(self.ctx, il) for il in range(stats.n_layer)]
            layers = tuple(
                LayerMemory(il, r.n_retrieval, r.n_local, r.bytes_k + r.bytes_v + r.bytes_sums)
                for il, r in enumerate(rows)
            )
        return Memory(
            active=bool(stats.active),
            why=self._why,
            kv_bytes=stats.kv_bytes,
            kv_bytes_full=self._plan.kv_bytes_full if stats.active else stats.kv_bytes,
            kv_bytes_full_f16=self._plan.kv_bytes_full_f16 if self._plan else None,
            layers=layers,
            n_tokens=self.n_tokens,
            n_ctx=self._n_ctx,
        )

    def stats(self, seq_id: int = 0) -> SequenceStats:
        """Tokens, frontier and folded tokens of a sequence. Raises RazorError if not active."""
        if not _native.stats(self.ctx).active:
            raise RazorError(f"razor is not active in this context ({self._why})")
        try:
            seq = _native.seq(self.ctx, seq_id)
        except IndexError:
            raise RazorError(f"the context has no sequence {seq_id}") from None
        return SequenceStats(seq.n_tokens, seq.frontier, seq.n_folded, seq.n_rollback)

    # -- evaluation --

    @_one_thread
    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluates tokens after the n_tokens that count as evaluated.

        Where the cache cannot go back to n_tokens (a fold lies in between), everything is evaluated
        again from the start. Raises ContextFullError with nothing changed, and RazorError if the
        computation fails; n_tokens then says what the cache still holds.
        """
        tokens = self._after_cached(tokens)
        for i in range(0, len(tokens), self.n_batch):
            self._eval_batch(tokens[i : i + self.n_batch])

    def eval_logits(
        self, tokens: Sequence[int], wanted: Sequence[bool] | None = None
    ) -> Iterator[np.ndarray]:
        """The same, batch by batch, with the logits behind each token: f32 [n, n_vocab].

        What is yielded is the library's own memory, which the next batch overwrites. wanted: for
        each token, whether its logits are; None: all. Raises as eval().
        """
        tokens = list(tokens)
        rows = [True] * len(tokens) if wanted is None else list(map(bool, wanted))
        again = self._after_cached(tokens)
        rows = [False] * (len(again) - len(tokens)) + rows
        for i in range(0, len(again), self.n_batch):
            some = rows[i : i + self.n_batch]
            self._eval_batch(again[i : i + self.n_batch], some)
            n = sum(some)
            if n:
                flat = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(n * self._n_vocab,))
                yield flat.reshape(n, self._n_vocab)

    @_one_thread
    def prefill(
        self,
        tokens: Sequence[int],
        progress: Callable[[int, int], object] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Prefill:
        """Brings the cache to exactly these tokens, reusing what it already holds of them.

        progress(n_done, n_tokens) is called after each batch. stop() is asked often, from inside
        the computation where the backend allows it; once it is true, evaluation ends and the cache
        keeps a valid beginning of tokens. generate(tokens) then samples without evaluating again.
        Raises as eval().
        """
        tokens = list(tokens)
        if not tokens:
            raise RazorError("there is nothing to evaluate: the prompt has no tokens")
        if len(tokens) > self._n_ctx:
            raise ContextFullError(
                f"the prompt has {len(tokens)} tokens, the context {self._n_ctx}; use a larger"
                " n_ctx or a shorter text"
            )
        keep = self._rewind(tokens)

        @C.ggml_abort_callback
        def abort(_data: Any) -> bool:
            return bool(stop())

        if stop is not None:
            C.llama_set_abort_callback(self.ctx, abort, None)
        try:
            while self.n_tokens < len(tokens):
                if stop is not None and stop():
                    return Prefill(keep, self.n_tokens - keep, False)
                try:
                    self.eval(tokens[self.n_tokens : self.n_tokens + self.n_batch])
                except _AbortedError:
                    return Prefill(keep, max(self.n_tokens - keep, 0), False)
                if progress is not None:
                    progress(self.n_tokens, len(tokens))
        finally:
            if stop is not None:
                C.llama_set_abort_callback(self.ctx, C.ggml_abort_callback(), None)
        return Prefill(keep, len(tokens) - keep, True)

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """As the base class: yields the tokens that follow, without end.

        What the cache holds of tokens already is not evaluated again (reset=False: continues from
        what is in the cache). Raises as eval().
        """
        criteria = kwargs.pop("stopping_criteria", None)
        if not (args or len(tokens)) and kwargs.get("reset", True):
            raise RazorError("there is nothing to go on from: the prompt has no tokens")
        if args or self._logits_all or criteria is not None:
            return super().generate(tokens, *args, stopping_criteria=criteria, **kwargs)
        return self._generate(list(tokens), **kwargs)

    def n_ctx_train(self) -> int:
        """Tokens of the context that the model was trained for."""
        return self._model.n_ctx_train()

    def piece(self, token: int) -> bytes:
        """The bytes of a token, of any length; b"" for special tokens."""
        piece = self._pieces.get(token)
        if piece is None:
            self._check_token(token)
            piece = self._pieces[token] = self._read_piece(token)
        return piece

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """As the base class. Raises RazorError for a token that the vocabulary does not have."""
        self._check_tokens(tokens)
        return super().detokenize(tokens, prev_tokens, special)

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""
        end = self._ends.get(token)
        if end is None:
            self._check_token(token)
            end = self._ends[token] = C.llama_vocab_is_eog(self._model.vocab, token)
        return end

    def is_special(self, token: int) -> bool:
        """Whether the token is a control token, such as a turn marker of the chat template."""
        self._check_token(token)
        return C.llama_vocab_is_control(self._model.vocab, token)

    # -- state --

    @_one_thread
    def save_state(self) -> llama_cpp.LlamaState:
        return super().save_state()

    @_one_thread
    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Continues from a state of save_state(), of a context with the same plan.

        Raises StateError for another state; the context is then as it was, or empty where the
        state turned out to be damaged half-way.
        """
        if state.n_tokens > self._n_ctx:
            raise StateError(
                f"the state holds {state.n_tokens} tokens, the context only {self._n_ctx}; use a"
                " larger n_ctx"
            )
        size = state.llama_state_size
        if len(state.llama_state) < size:
            raise StateError(
                f"the state cannot be loaded: it has {len(state.llama_state)} of its {size} bytes"
            )
        native.clear_errors()
        data = (c_uint8 * size).from_buffer_copy(state.llama_state)
        self._requires_eval = True
        if C.llama_state_set_data(self.ctx, data, size) != size:
            reason = self._reason()
            if self._n_cached() != self.n_tokens:
                self._clear_cache()
                reason += "; the context is empty now"
            raise StateError(f"the state cannot be loaded: {reason}")
        n = state.n_tokens
        self.n_tokens = n
        self.input_ids[:n] = state.input_ids[:n]
        rows = min(len(self.scores), len(state.scores))
        self.scores[:rows] = state.scores[:rows]
        self._seed = state.seed

    def close(self) -> None:
        if hasattr(self, "_stack"):  # not there if the arguments were refused
            super().close()
            self._model = self._ctx = self.tokenizer_ = _Closed()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **self._razor_args}

    # -- internals --

    @property
    def model_params(self) -> Any:
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        # the base class offers no other place between creating these and loading the model
        self._model_params = params
        if self._progress is not None:
            self._progress_callback = C.llama_progress_callback(self._on_progress)
            params.progress_callback = self._progress_callback

    def _on_progress(self, part: float, _data: Any) -> bool:
        try:
            return self._progress(part) is not False
        except BaseException as error:  # ctypes would print it and go on
            self._progress_error = error
            return False

    def _generate(
        self, tokens: list[int], reset: bool = True, **sampling: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        self._sampler = sampler = self._init_sampler(**sampling)
        self._begin(tokens, reset)
        if self._requires_eval:
            raise RazorError("there is nothing to go on from: the prompt has no tokens")
        while True:
            token = sampler.sample(self._ctx)
            more = yield token
            if more is None and self._n_cached() == self.n_tokens < self._n_ctx:
                self._eval_batch([token])  # all that eval() would do
            else:
                self.eval([token, *(more or ())])

    @_one_thread
    def _begin(self, tokens: list[int], reset: bool) -> None:
        self.eval(tokens[self._rewind(tokens) :] if reset else tokens)
        if not self._requires_eval:
            last = np.ctypeslib.as_array(self._ctx.get_logits_ith(-1), shape=(self._n_vocab,))
            if not np.isfinite(last.max()):  # nan, if any of them is
                raise RazorError(
                    f"{self.model_path} computes logits that are not numbers, so it cannot answer;"
                    " the file is damaged, or its values are too large for their types"
                )

    def _create_completion(self, **request: Any) -> Iterator[dict[str, Any]]:
        """The chunks of an answer, or the whole: what create_completion() and the like are made of.

        The base class puts the whole answer together again, and copies the prompt, for every token.
        It is left what is rare.
        """
        if request["logit_bias"]:
            self._read_logit_bias(request)
        if (
            not request["prompt"]
            or request["logprobs"] is not None
            or self.cache is not None
            or type(self.tokenizer_) is not LlamaTokenizer
        ):
            yield from super()._create_completion(**request)
            return
        prompt, options = self._read_request(request)
        n_max = self._n_ctx - len(prompt)
        if request["max_tokens"] is not None and request["max_tokens"] > 0:
            n_max = min(n_max, request["max_tokens"])
        stops = [request["stop"]] if isinstance(request["stop"], str) else request["stop"]
        stops = [stop.encode() for stop in stops] if isinstance(stops, list) else []
        head = {
            "id": f"cmpl-{uuid.uuid4()}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.model_path if request["model"] is None else request["model"],
        }

        def response(part: str, finish_reason: str | None = None) -> dict[str, Any]:
            choice = {"text": part, "index": 0, "logprobs": None, "finish_reason": finish_reason}
            return {**head, "choices": [choice]}

        stream, text, answer = request["stream"], TextStream(stops), bytearray()
        n_tokens, finish_reason, end = 0, "length", None
        for token in self.generate(prompt, **options):
            if self.is_end(token):
                finish_reason = "stop"
                break
            piece = self.piece(token)
            n_tokens += 1
            answer += piece
            if not text.add(piece):
                continue
            if text.stopped():
                finish_reason = "stop"
                end = next(answer.index(stop) for stop in stops if stop in answer)
                break
            for part in text.ready():
                if stream:
                    yield response(part)
            if n_tokens >= n_max:
                break
        criteria = request["stopping_criteria"]
        if criteria is not None and criteria(self._input_ids, self._scores[-1, :]):
            finish_reason, end = "stop", None
        if self.verbose:
            self._ctx.print_timings()
        if stream:
            for part in text.rest():
                yield response(part)
            yield response("", finish_reason)
            return
        whole = answer[:end].decode("utf-8", "ignore")
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": n_tokens,
            "total_tokens": len(prompt) + n_tokens,
        }
        echo = request["prompt"] if request["echo"] else ""
        yield {**response(echo + whole, finish_reason), "usage": usage}

    def _read_logit_bias(self, request: dict[str, Any]) -> None:
        """Makes a request's logit_bias the last of its logits_processor, its tokens checked.

        The base class fails at such tokens while it samples, and drops both beside each other.
        """
        tokens = [int(token) for token in request["logit_bias"]]
        bias = np.array([float(value) for value in request["logit_bias"].values()], np.float32)
        self._check_tokens(tokens)

        def add_bias(input_ids: np.ndarray, logits: np.ndarray) -> np.ndarray:
            logits = logits.copy()
            logits[tokens] += bias
            return logits

        processors = llama_cpp.LogitsProcessorList([*(request["logits_processor"] or ()), add_bias])
        request.update(logit_bias=None, logits_processor=processors)

    def _read_request(self, request: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
        """Checks a request as the base class does: what it calls generate() with.

        That is the prompt's tokens and the arguments of the sampler; the seed is set.
        """

        def generate(tokens: list[int], **sampling: Any) -> None:
            raise _ReadRequest(tokens, sampling)

        self.generate = generate
        try:
            next(super()._create_completion(**request))
        except _ReadRequest as read:
            return read.args
        finally:
            del self.generate
        raise AssertionError("llama_cpp answers without generating")

    def _check_token(self, token: int) -> None:
        self._check_tokens((token,))

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        n_vocab = self._model.n_vocab()
        for token in (min(tokens), max(tokens)) if len(tokens) else ():
            if not 0 <= token < n_vocab:
                raise RazorError(
                    f"there is no token {token}: the vocabulary has 0 to {n_vocab - 1}"
                )

    def _read_piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = C.llama_token_to_piece(self._model.vocab, token, buffer, size, 0, False)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def _after_cached(self, tokens: Sequence[int]) -> list[int]:
        """The tokens to evaluate where the cache ends now, so that they follow n_tokens."""
        tokens = list(tokens)
        if self._model_params.vocab_only:
            raise UnsupportedError("vocab_only=True loads no weights, nothing can be evaluated")
        self._check_tokens(tokens)
        if self.n_tokens + len(tokens) > self._n_ctx:
            raise ContextFullError(
                f"{self.n_tokens} tokens are in the context and {len(tokens)} more do not fit its"
                f" {self._n_ctx}; use a larger n_ctx or a shorter text"
            )
        # asked first: taking nothing back looks at all cells of a cache of llama.cpp's own
        if self._n_cached() != self.n_tokens and not self._ctx.kv_cache_seq_rm(
            -1, self.n_tokens, -1
        ):
            tokens = self._input_ids.tolist() + tokens
            self._clear_cache()
        return tokens

    @_one_thread
    def _eval_batch(self, batch: list[int], wanted: list[bool] | None = None) -> None:
        """wanted: the tokens whose logits are computed, None: the last, or all with logits_all."""
        n_past, n = self.n_tokens, len(batch)
        native.clear_errors()
        if n == 1 and wanted is None:
            ids, native_batch = self._one
            ids[0] = batch[0]
        else:
            ids = (C.llama_token * n)(*batch)  # the native batch only points to them
            native_batch = C.llama_batch_get_one(ids, n)
            if wanted is not None or self._logits_all:
                native_batch.logits = (ctypes.c_int8 * n)(*(wanted or [True] * n))
        code = C.llama_decode(self._ctx.ctx, native_batch)
        if code != 0:
            reason = self._reason()
            self._after_failed_decode(batch, n_past)
            if code == _ABORTED:
                raise _AbortedError("the computation was stopped")
            full = code == _NO_SLOT and reason in ("", "the context is full")
            what = f"{n} tokens after {n_past} in a context of {self._n_ctx}"
            if full:
                raise ContextFullError(f"there is no room for {what}; use a larger n_ctx")
            raise RazorError(f"evaluating {what} failed: {reason or f'llama_decode {code}'}")
        if n == 1:
            self.input_ids[n_past] = batch[0]  # in a third of the time
        else:
            self.input_ids[n_past : n_past + n] = batch
        if self._logits_all and wanted is None:
            logits = np.ctypeslib.as_array(self._ctx.get_logits(), shape=(n * self._n_vocab,))
            self.scores[n_past : n_past + n, :].reshape(-1)[:] = logits
        self.n_tokens += n
        self._requires_eval = wanted is not None and not wanted[-1]

    def _after_failed_decode(self, batch: list[int], n_past: int) -> None:
        """Sets n_tokens to what the cache holds: part of the batch may have been evaluated."""
        self._requires_eval = True
        if self._logits_all:  # the logits of that part were not kept
            return
        n = self._n_cached()
        if n_past <= n <= n_past + len(batch) and self._ctx.kv_cache_seq_rm(-1, n, -1):
            self.input_ids[n_past:n] = batch[: n - n_past]
            self.n_tokens = n
        else:
            self._clear_cache()

    def _n_cached(self) -> int:
        """Tokens in the cache itself."""
        return C.llama_memory_seq_pos_max(self._ctx.memory, 0) + 1

    def _clear_cache(self) -> None:
        self.n_tokens = 0
        self._requires_eval = True
        self._ctx.kv_cache_clear()

    def _rewind(self, tokens: list[int]) -> int:
        """Takes the cache back to what it has of tokens; how many these are.

        One at least is left to evaluate, for its logits, unless they are those of the last token.
        """
        self._check_tokens(tokens)
        same = self._common_prefix(tokens)
        if same == len(tokens) == self.n_tokens and not self._requires_eval:
            return same
        keep = min(same, len(tokens) - 1)
        if keep > 0 and self._ctx.kv_cache_seq_rm(-1, keep, -1):
            self.n_tokens = keep
            self._requires_eval = True
            return keep
        self.reset()
        return 0

    def _common_prefix(self, tokens: list[int]) -> int:
        n = min(self.n_tokens, len(tokens))
        differs = np.flatnonzero(self.input_ids[:n] != np.asarray(tokens[:n], dtype=np.intc))
        return int(differs[0]) if differs.size else n

    def _reason(self) -> str:
        """Why the last native call failed, "" if it gave no reason."""
        razor = _native.last_error() if self._profile is not None else ""
        return razor or "; ".join(native.error_lines()[-2:])

    def _refusal(self, model_path: str, error: Exception) -> RazorError | None:
        """Why loading failed, by the library; None for a mistake in the arguments."""
        reason = self._reason() or "the native library gives no reason"
        kind = UnsupportedError if _native.last_error() else RazorError
        if hasattr(self, "_model"):
            return kind(f"no context could be created for {model_path}: {reason}")
        if str(error).startswith("Failed to load model"):
            return kind(f"{model_path} could not be loaded: {reason}")
        return None

    def _check_plan(self) -> None:
        """The plan that every tool prints must be what the library allocated."""
        stats = _native.stats(self.ctx)
        planned = self._plan.kv_bytes if self._plan and self._plan.active else None
        found = stats.kv_bytes if stats.active else None
        if planned != found:
            self.close()
            raise LibraryError(
                f"the library allocated {found} bytes of KV cache, the plan says {planned}:"
                " library and Python code do not belong together; reinstall razor-local"
            )
        if not stats.active and self._plan and self._plan.kv_bytes != stats.kv_bytes:
            self._plan = None  # a cache of another kind, such as sliding windows


class _AbortedError(RazorError):
    pass


class _Closed:
    """Stands for what close() has freed."""

    def __getattr__(self, name: str) -> Any:
        raise RazorError("this Llama is closed; make a new one")


class _ReadRequest(Exception):
    """Leaves the base class where it would begin to generate."""


def _resolve(
    model_path: str,
    razor: bool | str | os.PathLike[str] | Profile,
    retrieval: float | None,
    window: int | None,
    sink_tokens: int | None,
    compensation: bool | None,
) -> tuple[ModelShape | None, Profile | None, str]:
    """Shape and profile of a model, and why there is no profile. Shape None: not understood."""
    overridden = not (retrieval is window is sink_tokens is compensation is None)
    disabled = os.environ.get(native.DISABLE_ENV, "") not in ("", "0")
    if razor is False or disabled:
        why = "razor=False" if razor is False else f"{native.DISABLE_ENV} is set"
        if overridden and not disabled:
            raise ProfileError(
                "retrieval, window, sink_tokens and compensation change a razor profile, which"
                " razor=False switches off; leave one or the other out"
            )
        try:
            return shape_from_header(read_header(model_path)), None, why
        except (GGUFError, ProfileError):
            return None, None, why  # llama.cpp may know better

    header = read_header(model_path)
    if razor is True:
        try:
            shape = shape_from_header(header)
        except ProfileError:
            if any(key.startswith("razor.") for key in header.entries):
                raise
            shape = None
        profile = profile_from_header(header, shape) if shape else None
        if profile is None and overridden:
            raise ProfileError(
                f"{model_path} has no razor profile that retrieval, window, sink_tokens or"
                " compensation could change; make one with 'razor-local convert MODEL.gguf -o"
                " OUT.gguf', or pass razor=SIDECAR"
            )
    else:
        shape = shape_from_header(header)
        profile = razor if isinstance(razor, Profile) else read_sidecar(razor, shape)
    if retrieval is not None and profile is not None:
        from .converters.scores import with_budget

        profile = with_budget(profile, shape, retrieval)
    return shape, profile, "the model file has no razor profile"


def _auto_n_ctx(
    model_path: str, n_ctx: str, profile: Profile | None, options: dict[str, Any]
) -> int:
    from .fit import ContextOptions, auto_n_ctx

    if n_ctx != "auto":
        raise UnsupportedError(f"n_ctx is {n_ctx!r}, expected a number of tokens or 'auto'")
    if options.get("embedding"):
        raise UnsupportedError("n_ctx='auto' plans for text; pass a number with embedding=True")

    def chosen(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names if name in options}

    names = [f.name for f in fields(ContextOptions) if f.name != "profile"]
    return auto_n_ctx(
        model_path,
        ContextOptions(profile=profile, **chosen(*names)),
        # the base class's own default is 0
        **{"n_gpu_layers": 0} | chosen("n_gpu_layers", "split_mode", "main_gpu", "tensor_split"),
    )


def _refuse_arguments(model_path: str, n_ctx: int | str, kwargs: dict[str, Any]) -> None:
    """Refuses what the base class would swallow, or hand on to crash the native library."""
    try:
        model_path.encode()
    except UnicodeEncodeError:
        raise UnsupportedError(
            f"the name {model_path!r} is not UTF-8, which llama.cpp's bindings expect; rename the"
            " file or its folder"
        ) from None
    for name in kwargs:
        if name not in _BASE_OPTIONS:
            raise TypeError(f"Llama() has no argument {name!r}")
    numbers = {"n_ctx": 0 if isinstance(n_ctx, str) else n_ctx} | kwargs
    for name, low, high, instead in (
        ("n_ctx", 0, 2**31 - 1, " or 'auto'"),
        ("n_batch", 1, 2**31 - 1, ""),
        ("n_ubatch", 1, 2**31 - 1, ""),
        ("n_threads", 0, _MAX_THREADS, " or None"),
        ("n_threads_batch", 0, _MAX_THREADS, " or None"),
    ):
        value = numbers.get(name)
        if value is None and (name not in numbers or instead == " or None"):
            continue
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            raise UnsupportedError(
                f"{name} is {value!r}, expected a whole number from {low} to {high}{instead}"
            )
    lora = kwargs.get("lora_path")
    if lora is not None and not os.path.isfile(lora):
        raise UnsupportedError(f"lora_path is {lora!r}, which is no file; name a LoRA adapter")


def _refuse_options(kwargs: dict[str, Any]) -> None:
    if kwargs.get("draft_model") is not None:
        raise UnsupportedError(
            "draft_model cannot be used with razor: taking rejected drafts back can fail once"
            " tokens are folded, and that path would not notice; pass razor=False"
        )
    if kwargs.get("embedding"):
        raise UnsupportedError(
            "embedding=True needs a cache of several sequences, razor serves one yet; pass"
            " razor=False"
        )


def _refuse_too_large(plan: Plan) -> None:
    # allocating it would succeed and filling it end the process, where memory is overcommitted
    if C.llama_supports_gpu_offload() or not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if plan.kv_bytes > memory:
        raise RazorError(
            f"the KV cache of {plan.n_ctx} tokens takes {plan.kv_bytes / 2**30:.1f} GiB, this"
            f" machine has {memory / 2**30:.1f} GiB; use a smaller n_ctx or q8_0 for type_k and"
            " type_v"
        )


def _type_name(kv_type: int | str | None) -> str:
    if kv_type is None:
        return "f16"
    name = _TYPE_NAMES.get(kv_type) if isinstance(kv_type, int) else kv_type
    if name not in KV_TYPES:
        raise UnsupportedError(
            f"{kv_type!r} is not a KV cache type, expected one of {', '.join(KV_TYPES)}"
        )
    return name
