"""Llama: llama_cpp.Llama whose KV cache follows a razor profile."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from ctypes import c_uint8
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import native
from .common.progress import Progress, Stop, silent
from .completion import complete, read_chat_request
from .errors import (
    ContextFullError,
    GGUFError,
    LibraryError,
    ProfileError,
    RazorError,
    StateError,
    UnsupportedError,
)
from .gguf.header import read_header
from .gguf.hyper_parameters import check_overrides
from .native.callbacks import Callback
from .ownership import Requests
from .plan import KV_TYPES, Plan, make_plan, padded_n_ctx
from .profile import ModelShape, Profile, profile_from_header, read_sidecar, shape_from_header
from .prompt.control_tokens import PlainMessages
from .prompt.templates import isolate_formatters
from .state import fingerprint, seal, unseal

_native = native.load()  # before llama_cpp, which would load a library of its own

import llama_cpp  # noqa: E402
import llama_cpp._internals  # noqa: E402
from llama_cpp import llama_cpp as C  # noqa: E402


class _Untouched(nullcontext):
    """In place of what sends stdout and stderr of all threads to /dev/null while a model loads.

    The native log goes to native.py, so there is nothing to hide.
    """

    def __init__(self, disable: bool = True) -> None:
        super().__init__()


# the classes of that name are replaced
llama_cpp.llama.suppress_stdout_stderr = _Untouched  # type: ignore[misc, assignment]
llama_cpp._internals.suppress_stdout_stderr = _Untouched  # type: ignore[misc, assignment]
# a prompt that begins with BOS twice is run as it is; stderr belongs to the program
warnings.filterwarnings("ignore", 'Detected duplicate leading "', RuntimeWarning)

isolate_formatters()

_TYPE_NAMES = {kv_type.ggml_id: name for name, kv_type in KV_TYPES.items()}
_ABORTED = 2  # llama_decode: stopped by the abort callback
_NO_SLOT = 1  # llama_decode: no room for the batch
_MAX_THREADS = 512  # GGML_MAX_N_THREADS; ggml ends the process above it
_NO_CALLBACK = C.ggml_abort_callback()
_GENERATE = inspect.signature(llama_cpp.Llama.generate)
_CHAT = inspect.signature(llama_cpp.Llama.create_chat_completion)
_SAMPLE = inspect.signature(llama_cpp.Llama.sample)
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
    reason). own_attention: layers whose cache is in host memory run our attention, also with
    llama.cpp's full cache; False: llama.cpp's attention. kv_bytes: sum of the backend buffers.
    kv_bytes_full: llama.cpp's own cache with the same types. kv_bytes_full_f16: a full f16 cache,
    None where the model's cache is of a kind that the plan does not describe. layers: empty where
    not active. n_tokens: in the cache now.
    """

    active: bool
    why: str | None
    own_attention: bool
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


class Llama(PlainMessages, llama_cpp.Llama):
    """A llama_cpp.Llama with RazorAttention. All arguments of the base class, and:

    razor: True, use the profile in the model file, and llama.cpp's own cache where it has none; a
        path, the profile of that sidecar; a Profile; False, llama.cpp's own cache.
    budget: the share of KV heads that keep every token, instead of the profile's; they are chosen
        by the scores in the profile. retrieval is an alias.
    window, sink_tokens (tokens), compensation: instead of the profile's.
    type_k, type_v: KV cache types by name ("q8_0") or ggml number.
    progress: called while the model loads with the part done (0 to 1); False stops loading. This
        is llama.cpp's own form; progress= elsewhere is a common.progress.Progress.
    wait: a request that comes while another is not over: True, waits for it; False, is refused.

    n_ctx: tokens, rounded up to a multiple of 256; 0, as trained; "auto", the largest up to the
        trained length for the memory that is free now, of which fit.MARGIN stays free (adapters
        are not counted).

    Other defaults than the base class: flash_attn=True, verbose=False.

    One request at a time: a call, or a generator (a stream of chunks too) from its first value
    until it is exhausted or closed. Another request meanwhile, from any thread, a callback or a
    signal handler, raises RazorError or waits. So does a request after close(), and in a process
    that was forked after the first computation.

    Raises GGUFError or ProfileError (bad file), UnsupportedError (model or options that razor
    refuses), RazorError (loading failed; with the native library's reason), OSError.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        razor: bool | str | os.PathLike[str] | Profile = True,
        budget: float | None = None,
        retrieval: float | None = None,
        window: int | None = None,
        sink_tokens: int | None = None,
        compensation: bool | None = None,
        progress: Callable[[float], object] | None = None,
        wait: bool = False,
        n_ctx: int | str = 512,
        type_k: int | str | None = None,
        type_v: int | str | None = None,
        flash_attn: bool = True,
        verbose: bool = False,
        **kwargs: Any,
    ) -> None:
        if retrieval is not None:
            if budget is not None:
                raise UnsupportedError(
                    "budget and retrieval are the same option; pass budget alone"
                )
            budget = retrieval
        self._razor_args = {
            "razor": razor,
            "budget": budget,
            "window": window,
            "sink_tokens": sink_tokens,
            "compensation": compensation,
            "wait": wait,
        }
        self._progress = progress
        self._loading: Callback | None = None
        self._requests = Requests("this Llama", wait)
        ids = (C.llama_token * 1)()
        self._one = ids, C.llama_batch_get_one(ids, 1)  # a batch of one token, and that token
        self._pieces: dict[int, bytes] = {}  # by token, as they are asked for
        self._ends: dict[int, bool] = {}  # likewise
        self._state_fingerprint: bytes | None = None
        model_path = os.fspath(model_path)
        _refuse_arguments(model_path, n_ctx, kwargs)
        type_k, type_v = _type_name(type_k), _type_name(type_v)
        if kwargs.get("vocab_only"):
            razor = False  # no weights, no cache
            n_ctx = 512 if n_ctx == "auto" else n_ctx

        own_attention = razor is not False and not native.is_disabled()
        shape, profile, why = _resolve(model_path, razor, budget, window, sink_tokens, compensation)
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

        native.refuse_after_fork()
        if C.llama_supports_gpu_offload():
            native.computed()
        _native.show_log(verbose)
        _native.clear_errors()
        refusal: RazorError | None = None
        with _native.override(native.make_params(profile, own_attention)):
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
        if self._loading is not None:
            self._loading.check()
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
        layers: tuple[LayerMemory, ...] = ()
        if stats.active:
            rows = [_native.layer(self.ctx, il) for il in range(stats.n_layer)]
            layers = tuple(
                LayerMemory(il, r.n_retrieval, r.n_local, r.bytes_k + r.bytes_v + r.bytes_sums)
                for il, r in enumerate(rows)
            )
        return Memory(
            active=bool(stats.active),
            why=self._why,
            own_attention=bool(stats.own_attention),
            kv_bytes=stats.kv_bytes,
            kv_bytes_full=(
                self._plan.kv_bytes_full if self._plan and stats.active else stats.kv_bytes
            ),
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

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluates tokens after the n_tokens that count as evaluated.

        Where the cache cannot go back to n_tokens (a fold lies in between), everything is evaluated
        again from the start. Raises ContextFullError with nothing changed, and RazorError if the
        computation fails; n_tokens then says what the cache still holds.
        """
        self._request(self._eval, tokens)

    # the base class has a property of this name, of the logits that logits_all=True keeps
    def eval_logits(  # type: ignore[override]
        self, tokens: Sequence[int], wanted: Sequence[bool] | None = None
    ) -> Iterator[np.ndarray]:
        """The same, batch by batch, with the logits behind each token: f32 [n, n_vocab].

        What is yielded is the library's own memory, which the next batch overwrites. wanted: for
        each token, whether its logits are; None: all. Raises as eval().
        """
        return self._requests.generate(lambda: self._eval_logits(tokens, wanted))

    def prefill(
        self,
        tokens: Sequence[int],
        progress: Progress | None = None,
        stop: Stop | None = None,
    ) -> Prefill:
        """Brings the cache to exactly these tokens, reusing what it already holds of them.

        progress(n_done, n_tokens, label) is called before each batch and at the end. stop() is
        asked often, from inside the computation where the backend allows it; once it is true,
        evaluation ends and the cache keeps a valid beginning of tokens. generate(tokens) then
        samples without evaluating again.
        Raises as eval(), and what progress() or stop() raises.
        """
        return self._request(self._prefill, tokens, progress, stop)

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """As the base class: yields the tokens that follow, without end.

        What the cache holds of tokens already is not evaluated again (reset=False: continues from
        what is in the cache). seed: instead of that of the Llama. Raises as eval().
        """
        return self._requests.generate(lambda: self._generate(tokens, *args, **kwargs))

    @functools.wraps(llama_cpp.Llama.sample)
    def sample(self, *args: Any, **kwargs: Any) -> int:  # type: ignore[override]  # by wraps()
        return self._request(self._sample, *args, **kwargs)

    def reset(self) -> None:
        """Forget all tokens. The next request evaluates its own from the start."""
        self._request(self._reset)

    def embed(self, input: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """As the base class. Raises RazorError for a text without tokens."""
        if not self.context_params.embeddings:
            raise UnsupportedError("embed() needs a Llama that was made with embedding=True")
        for text in [input] if isinstance(input, str) else input:
            if not isinstance(text, str) or not self.tokenize(text.encode()):
                # the base class writes outside of its batch for a text without tokens
                raise RazorError(
                    f"{text!r} cannot be embedded, expected a text with a token or more"
                )
        return self._request(llama_cpp.Llama.embed, _Inside(self), input, *args, **kwargs)

    def request(self, make: Callable[[Llama], Iterator[Any]]) -> Generator[Any, Any, Any]:
        """Run a generator as one request: nobody else uses the model until it is over.

        make(llama) returns the generator; it uses the model through its argument only.
        """
        inside: Any = _Inside(self)
        return self._requests.generate(lambda: make(inside))

    @functools.wraps(llama_cpp.Llama.create_chat_completion)
    def create_chat_completion(  # type: ignore[override]  # by wraps()
        self, *args: Any, **kwargs: Any
    ) -> Any:
        request = _CHAT.bind(self, *args, **kwargs).arguments
        request = read_chat_request(request, self.chat_handler is not None)
        for name in ("messages", "functions", "tools"):
            request[name] = self.mark_plain(request.get(name))
        return llama_cpp.Llama.create_chat_completion(**request)

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

    def save_state(self) -> llama_cpp.LlamaState:
        """Return a state that load_state() goes on from."""
        return self._request(self._save_state)

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Continues from a state of save_state(), of a context with the same plan.

        Raises StateError for another state; the context is then as it was, or empty where the
        state turned out to be damaged half-way.
        """
        self._request(self._load_state, state)

    def close(self) -> None:
        """Free the model and its context. Raises RazorError while another thread computes."""
        if not hasattr(self, "_stack"):  # not there if the arguments were refused
            return
        names = ("_model", "_ctx", "tokenizer_")  # not there yet where loading failed
        kept = {name: vars(self)[name] for name in names if name in vars(self)}
        # first this, so that an open generator that goes on now finds it
        vars(self).update(dict.fromkeys(names, _Closed()))
        if self._requests.is_running():
            vars(self).update(kept)
            raise RazorError("this Llama is computing; close it after the call has returned")
        self._requests = Requests("this Llama")  # so that later requests report that it is closed
        if native.is_forked():  # the threads of the library are not in this process
            self._stack.pop_all()
        super().close()

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
            self._loading = Callback(self._goes_on_loading, on_error=False)
            of_one_argument = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_float)
            self._progress_callback = of_one_argument(self._loading.call)  # ignores the second
            params.progress_callback = ctypes.cast(
                self._progress_callback, C.llama_progress_callback
            )

    def _goes_on_loading(self, part: float) -> bool:
        assert self._progress is not None
        if self._progress(part) is False:
            raise RazorError(f"loading {self.model_path} was stopped: progress() returned False")
        return True

    def _request(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def open_one() -> Any:
            _ = self._ctx.ctx  # raises if it is closed
            return function(*args, **kwargs)

        return self._requests.call(open_one)

    def _eval(self, tokens: Sequence[int]) -> None:
        tokens = self._after_cached(tokens)
        for i in range(0, len(tokens), self.n_batch):
            self._eval_batch(tokens[i : i + self.n_batch])

    def _eval_logits(
        self, tokens: Sequence[int], wanted: Sequence[bool] | None = None
    ) -> Generator[np.ndarray, None, None]:
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

    def _prefill(
        self,
        tokens: Sequence[int],
        progress: Progress | None = None,
        stop: Stop | None = None,
    ) -> Prefill:
        tokens = list(tokens)
        report = progress or silent
        if not tokens:
            raise RazorError("there is nothing to evaluate: the prompt has no tokens")
        if len(tokens) > self._n_ctx:
            raise ContextFullError(
                f"the prompt has {len(tokens)} tokens, the context {self._n_ctx}; use a larger"
                " n_ctx or a shorter text"
            )
        keep = self._rewind(tokens)
        asked = Callback(lambda _data: stop is not None and bool(stop()), on_error=True)
        self._abort_callback = C.ggml_abort_callback(
            asked.call
        )  # lives as long as it may be called
        try:
            if stop is not None:
                C.llama_set_abort_callback(self._ctx.ctx, self._abort_callback, None)
            while self.n_tokens < len(tokens):
                if stop is not None and stop():
                    return Prefill(keep, self.n_tokens - keep, False)
                report(self.n_tokens, len(tokens), "reading the prompt")
                try:
                    self._eval(tokens[self.n_tokens : self.n_tokens + self.n_batch])
                except _AbortedError:
                    asked.check()
                    return Prefill(keep, max(self.n_tokens - keep, 0), False)
                asked.check()
            report(self.n_tokens, len(tokens), "reading the prompt")
        finally:
            if stop is not None:
                C.llama_set_abort_callback(self._ctx.ctx, _NO_CALLBACK, None)
        return Prefill(keep, len(tokens) - keep, True)

    def _generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        seed = kwargs.pop("seed", None)
        options = dict(_GENERATE.bind(self, tokens, *args, **kwargs).arguments)
        del options["self"], options["tokens"]
        if self.draft_model is not None:
            inside: Any = _Inside(self)
            yield from llama_cpp.Llama.generate(inside, tokens, **options)
            return
        tokens, reset = list(tokens), options.pop("reset", True)
        criteria = options.pop("stopping_criteria", None)
        if reset and not tokens:
            raise RazorError("there is nothing to go on from: the prompt has no tokens")
        with closing(self._init_sampler(seed=seed, **options)) as sampler:
            self._begin(tokens, reset)
            while True:
                token = sampler.sample(self._ctx)
                if criteria is not None and criteria(self._input_ids, self._last_logits()):
                    return
                more = yield token
                if more is None and self._n_cached() == self.n_tokens < self._n_ctx:
                    self._eval_batch([token])  # all that eval() would do
                else:
                    self._eval([token, *(more or ())])

    def _begin(self, tokens: list[int], reset: bool) -> None:
        self._eval(tokens[self._rewind(tokens) :] if reset else tokens)
        self._refresh_logits()
        if not np.isfinite(self._last_logits().max()):  # nan, if any of them is
            raise RazorError(
                f"{self.model_path} computes logits that are not numbers, so it cannot answer;"
                " the file is damaged, or its values are too large for their types"
            )

    def _refresh_logits(self) -> None:
        """Evaluate the last token again where the logits in memory are not known to be its."""
        if self.n_tokens == 0:
            raise RazorError("there is nothing to go on from: no token was evaluated")
        if self._requires_eval:
            tokens = self._input_ids.tolist()
            self._eval(tokens[self._rewind(tokens) :])

    def _last_logits(self) -> np.ndarray:
        """The logits of the last token in the library's own memory: f32 [n_vocab]."""
        return np.ctypeslib.as_array(self._ctx.get_logits_ith(-1), shape=(self._n_vocab,))

    def _sample(self, *args: Any, **kwargs: Any) -> int:
        options = dict(_SAMPLE.bind(self, *args, **kwargs).arguments)
        del options["self"]
        idx = options.pop("idx", None)
        self._refresh_logits()
        with closing(self._init_sampler(**options)) as sampler:
            return sampler.sample(self._ctx, -1 if idx is None else idx - self.n_tokens)

    def _init_sampler(
        self, *args: Any, logits_processor: Any = None, seed: int | None = None, **kwargs: Any
    ) -> _Sampler:
        base: Any = _Inside(self, _seed=self._seed if seed is None else seed)
        sampler = llama_cpp.Llama._init_sampler(base, *args, **kwargs)
        return _Sampler(self, sampler, logits_processor)

    def _reset(self) -> None:
        llama_cpp.Llama.reset(self)

    def _save_state(self) -> llama_cpp.LlamaState:
        state = llama_cpp.Llama.save_state(self)
        input_ids = self._input_ids
        state.llama_state = seal(state.llama_state, input_ids, self._fingerprint())
        state.llama_state_size = len(state.llama_state)
        return state

    def _load_state(self, state: llama_cpp.LlamaState) -> None:
        n = state.n_tokens
        if n > self._n_ctx:
            raise StateError(
                f"the state holds {n} tokens, the context only {self._n_ctx}; use a larger n_ctx"
            )
        sealed = state.llama_state
        if len(sealed) != state.llama_state_size:
            raise StateError(
                f"the state cannot be loaded: it has {len(sealed)} of its"
                f" {state.llama_state_size} bytes"
            )
        content = unseal(sealed, n, state.input_ids, self._fingerprint())
        _native.clear_errors()
        data = (c_uint8 * len(content)).from_buffer_copy(content)
        before = self.n_tokens
        self._requires_eval = True
        self.n_tokens = 0  # until it is known what the cache holds
        if C.llama_state_set_data(self._ctx.ctx, data, len(content)) != len(content):
            reason = _native.reason()
            if self._n_cached() == before:
                self.n_tokens = before
            else:
                self._clear_cache()
                reason += "; the context is empty now"
            raise StateError(f"the state cannot be loaded: {reason}")
        self.input_ids[:n] = state.input_ids[:n]
        rows = min(len(self.scores), len(state.scores))
        self.scores[:rows] = state.scores[:rows]
        self._seed = state.seed
        self.n_tokens = n

    def _fingerprint(self) -> bytes:
        if self._state_fingerprint is None:
            params = self.context_params
            options = (
                params.rope_scaling_type, params.rope_freq_base, params.rope_freq_scale,
                params.yarn_ext_factor, params.yarn_attn_factor, params.yarn_beta_fast,
                params.yarn_beta_slow, params.yarn_orig_ctx, self.lora_scale, self.kv_overrides,
                self.lora_path and hashlib.blake2b(Path(self.lora_path).read_bytes()).digest(),
            )  # fmt: skip
            self._state_fingerprint = fingerprint(self.model_path, options)
        return self._state_fingerprint

    # the base class passes all arguments by name
    def _create_completion(  # type: ignore[override]
        self, **request: Any
    ) -> Iterator[dict[str, Any]]:
        """What create_completion() and the like are made of. See completion.complete()."""
        return self._requests.generate(lambda: complete(_Inside(self), request))

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
        n_cached = self._n_cached()
        if n_cached < self.n_tokens or (
            n_cached > self.n_tokens and not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        ):
            tokens = [*self._input_ids.tolist(), *tokens]
            self._clear_cache()
        return tokens

    def _eval_batch(self, batch: list[int], wanted: list[bool] | None = None) -> None:
        """wanted: the tokens whose logits are computed, None: the last, or all with logits_all."""
        n_past, n = self.n_tokens, len(batch)
        _native.clear_errors()
        native.computed()
        # an interrupt may come at any time: the logits count, and n_tokens grows, at the very end
        self._requires_eval = True
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
            reason = _native.reason("")
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
        self._requires_eval = True
        self.n_tokens = 0
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
        if keep > 0:
            self._requires_eval = True
            self.n_tokens = keep  # before the cache, which may hold more but not less
            if self._ctx.kv_cache_seq_rm(-1, keep, -1):
                return keep
        self._reset()
        return 0

    def _common_prefix(self, tokens: list[int]) -> int:
        n = min(self.n_tokens, len(tokens))
        differs = np.flatnonzero(self.input_ids[:n] != np.asarray(tokens[:n], dtype=np.intc))
        return int(differs[0]) if differs.size else n

    def _refusal(self, model_path: str, error: Exception) -> RazorError | None:
        """Why loading failed, by the library; None for a mistake in the arguments."""
        reason = _native.reason()
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


class _Inside:
    """A Llama as the request that owns it sees it: what it asks for belongs to that request.

    instead: attributes that differ from those of the Llama.
    """

    _UNGUARDED = frozenset(
        ("eval", "eval_logits", "generate", "load_state", "prefill", "reset", "save_state")
    )

    def __init__(self, llama: Llama, **instead: Any) -> None:
        vars(self).update(_llama=llama, **instead)

    def __getattr__(self, name: str) -> Any:
        if name == "sample":  # of the base class, which goes on with the sampler of its generate()
            inside: Any = self
            return functools.partial(llama_cpp.Llama.sample, inside)
        return getattr(self._llama, f"_{name}" if name in self._UNGUARDED else name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._llama, name, value)


class _Sampler:
    """A sampler of the library, and logits processors that run in Python before it.

    The base class calls these from native code, which swallows what they raise.
    """

    def __init__(self, llama: Llama, sampler: Any, processors: Any) -> None:
        if callable(processors) and not isinstance(processors, list):
            processors = [processors]
        self._llama: Any = weakref.proxy(llama)
        self._sampler, self._processors = sampler, list(processors or ())

    def close(self) -> None:
        self._sampler.close()

    def sample(self, ctx: Any, idx: int = -1) -> int:
        if not self._processors:
            return self._sampler.sample(ctx, idx)
        llama = self._llama
        logits = np.ctypeslib.as_array(ctx.get_logits_ith(idx), shape=(llama._n_vocab,))
        original = logits.copy()
        changed = original.copy()
        for processor in self._processors:
            changed = _checked_logits(processor(llama._input_ids, changed), len(original))
        llama._requires_eval = True  # while the library's logits are not the model's
        logits[:] = changed
        token = self._sampler.sample(ctx, idx)
        logits[:] = original
        llama._requires_eval = False
        return token


def _checked_logits(logits: Any, n_vocab: int) -> np.ndarray:
    """Return the logits of a logits processor. Raises RazorError unless they are valid."""
    try:
        changed = np.asarray(logits, np.float32)
    except (TypeError, ValueError):
        changed = np.empty(0, np.float32)
    if changed.shape != (n_vocab,):
        found = type(logits).__name__
        if isinstance(logits, np.ndarray):
            found = f"an array of shape {list(logits.shape)}"
        raise RazorError(
            f"a logits processor returned {found}, expected an array of {n_vocab} numbers"
        )
    if np.isnan(changed).any() or changed.max() in (np.inf, -np.inf):
        raise RazorError(
            "a logits processor returned numbers that no token can be chosen by: one is NaN or"
            " +inf, or all are -inf"
        )
    return changed


def _resolve(
    model_path: str,
    razor: bool | str | os.PathLike[str] | Profile,
    budget: float | None,
    window: int | None,
    sink_tokens: int | None,
    compensation: bool | None,
) -> tuple[ModelShape | None, Profile | None, str]:
    """Shape and profile of a model, and why there is no profile. Shape None: not understood."""
    overridden = not (budget is window is sink_tokens is compensation is None)
    disabled = native.is_disabled()
    if razor is False or disabled:
        why = "razor=False" if razor is False else f"{native.DISABLE_ENV} is set"
        if overridden and not disabled:
            raise ProfileError(
                "budget, window, sink_tokens and compensation change a razor profile, which"
                " razor=False switches off; leave one or the other out"
            )
        header = read_header(model_path)
        try:
            return shape_from_header(header), None, why
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
                f"{model_path} has no razor profile that budget, window, sink_tokens or"
                " compensation could change; make one with 'razor-local convert MODEL.gguf -o"
                " OUT.gguf', or pass razor=SIDECAR"
            )
    else:
        shape = shape_from_header(header)
        profile = razor if isinstance(razor, Profile) else read_sidecar(razor, shape)
    if budget is not None and profile is not None and shape is not None:
        from .scores import with_budget

        profile = with_budget(profile, shape, budget)
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
        value: Any = numbers.get(name)
        if value is None and (name not in numbers or instead == " or None"):
            continue
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            raise UnsupportedError(
                f"{name} is {value!r}, expected a whole number from {low} to {high}{instead}"
            )
    check_overrides(kwargs.get("kv_overrides"))
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
