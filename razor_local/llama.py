"""Llama: a llama_cpp.Llama whose KV cache follows a razor profile."""

from __future__ import annotations

import ctypes
import functools
import inspect
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, ParamSpec, TypeVar, overload

import numpy as np

from . import evaluation, native, sampling
from .checkpoints import Checkpoints
from .common.machine import n_cores
from .common.progress import Progress, Stop
from .completion import complete
from .completion_request import read_chat_request, replace_gbnf
from .errors import (
    GGUFError,
    LibraryError,
    MemoryFullError,
    RazorError,
    UnsupportedError,
)
from .evaluation import Prefill
from .llama_options import (
    choose_cache,
    out_of_memory,
    refuse_arguments,
    refuse_prefill,
    type_name,
)
from .memory import Memory, SequenceStats, read_memory, read_sequence
from .model_file import open_model
from .native.callbacks import Callback
from .native.loaded import C, library, llama_cpp
from .native.prefill import is_on_device, why_compressed
from .native.rpc import Servers, lost_sentence, lost_server
from .ownership import Closed, Inside, Requests
from .plan import KV_TYPES, Plan
from .profile import Profile
from .prompt.control_tokens import PlainMessages
from .prompt.templates import isolate_formatters
from .rewind_log import choose_rewind_log, limit_in_ram
from .state import load_state, save_state

if TYPE_CHECKING:
    from llama_cpp.llama_types import (
        ChatCompletionRequestMessage,
        CreateChatCompletionResponse,
        CreateChatCompletionStreamResponse,
        CreateCompletionResponse,
        CreateCompletionStreamResponse,
    )
    from typing_extensions import Unpack

    from .llama_arguments import (
        ChatArguments,
        CompletionArguments,
        GenerateArguments,
        LoadArguments,
        SampleArguments,
    )

P = ParamSpec("P")
T = TypeVar("T")


class _Untouched(nullcontext[None]):
    """In place of what sends stdout and stderr of all threads to /dev/null while a model loads.

    The native log goes to native/log.py, so there is nothing to hide.
    """

    def __init__(self, disable: bool = True) -> None:
        super().__init__()


class _Batch(llama_cpp._internals.LlamaBatch):
    """A batch whose tokens belong to one sequence each.

    llama_cpp.Llama asks for as many sequences as the context has tokens, which takes n_batch times
    n_ctx numbers of address space, and fills in one of them.
    """

    def __init__(self, *, n_seq_max: int = 1, **arguments: Any) -> None:
        super().__init__(n_seq_max=1, **arguments)


# the classes of these names are replaced
llama_cpp._internals.LlamaBatch = _Batch  # type: ignore[misc]
for module in (llama_cpp.llama, llama_cpp._internals):
    vars(module)["suppress_stdout_stderr"] = _Untouched

isolate_formatters()
replace_gbnf()

_CHAT = inspect.signature(llama_cpp.Llama.create_chat_completion)


class Llama(PlainMessages, llama_cpp.Llama):
    """A llama_cpp.Llama with RazorAttention. All arguments of the base class, and:

    razor: True uses the profile in the model file, or llama.cpp's own cache if it has none. "auto"
        uses the first profile of the file, of NAME.razor.gguf beside it, of the profile cache and
        of the package, or measures one if that takes less than two minutes; if it takes longer,
        llama.cpp's own cache runs, and memory().why is the reason. A path uses the profile of that
        sidecar, and a Profile is used as it is. False uses llama.cpp's own cache.
    budget: the share of KV heads that keep every token, instead of the profile's. They are chosen
        by the scores in the profile. retrieval is an alias.
    window, sink_tokens (tokens), compensation: replace the profile's values.
    type_k, type_v: KV cache types by name ("q8_0") or ggml number.
    type_k_local, type_v_local: KV cache types of local heads; by default type_k and type_v.
    rewind: where the rewind log is, with which the cache can go back to any token without
        evaluating again: "disk" (a nameless file in the user's cache folder), "ram" or "off".
        "auto" is "disk", but "off" if the cache is on a device or the folder cannot be used.
        Without the log, the cache can go back by one fold. Layers with sliding windows and
        recurrent states have no log: unless this is "off", copies of them are kept in main memory
        at the beginning and the end of each of the last prompts, and the cache goes back to one of
        these checkpoints.
    rewind_limit: maximum bytes of the log, and separately of all checkpoints. When one of them
        reaches it, its oldest part is dropped. By default it is 4 GiB, or 10 % of what is free (on
        disk or in main memory) if that is less.
    prefill: how prompts are read. "full": with full attention; the cache is compressed afterwards,
        as in the paper. Answers lose less, but reading takes as long as with a full cache, and
        needs temporary buffers for one layer. "razor": with the compressed cache, which is faster
        for long prompts. "auto" is "full", but "razor" if the model does not support "full"
        (sliding windows, recurrent layers and some rare architectures) or if the cache is on a
        device, where the speed of "full" has not been measured. This applies to prompts of
        prefill(), generate(), completions and Chat; eval() always reads with the compressed cache.
    progress: called with the part done (0 to 1) while the model loads and, with razor="auto",
        before that while the heads are measured (0 to 1 for each step). Returning False stops
        either. This is llama.cpp's convention; elsewhere progress= is a common.progress.Progress.
    draft_model: as in the base class. At most 64 tokens of a draft are used, and only the logits
        that are needed are computed.
    wait: whether a request waits for a running one (True) or is refused (False).

    n_ctx: tokens, rounded up to a multiple of 256. 0 is the trained length. "auto" is the largest
        context up to the trained length that leaves fit.MARGIN of the memory free (adapters are
        not counted).

    rpc_servers: the addresses of RPC servers, "HOST:PORT,HOST:PORT" or a list, whose devices get
        layers before those of this machine. If a connection is lost, each later computation raises
        RazorError.

    These defaults differ from the base class: flash_attn=True, n_gpu_layers=-1 (all), n_threads and
    n_threads_batch (physical cores), verbose=False.

    It serves one request at a time: a call, or a generator (also a stream of chunks) from its first
    value until it is exhausted or closed. Meanwhile another request, from any thread, a callback or
    a signal handler, raises RazorError or waits. A request after close(), or in a process that was
    forked after the first computation, raises RazorError.

    Raises:
        GGUFError, ProfileError: a file is damaged.
        UnsupportedError: razor refuses the model or the options.
        MemoryFullError: the memory is too small; the message names contexts that fit.
        RazorError: loading failed, with the native library's reason.
        OSError: a file cannot be read.
    """

    # what the request that owns a Llama calls, where all others call the method of that name
    _UNGUARDED: ClassVar[dict[str, Callable[..., Any]]] = {
        "eval": evaluation.evaluate,
        "eval_logits": evaluation.evaluate_logits,
        "generate": sampling.generate,
        "load_state": load_state,
        "prefill": evaluation.prefill,
        "reset": evaluation.reset,
        "save_state": save_state,
    }

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
        rewind: str = "auto",
        rewind_limit: int | None = None,
        prefill: str = "auto",
        progress: Callable[[float], object] | None = None,
        wait: bool = False,
        n_ctx: int | str = 512,
        type_k: int | str | None = None,
        type_v: int | str | None = None,
        type_k_local: int | str | None = None,
        type_v_local: int | str | None = None,
        flash_attn: bool = True,
        n_gpu_layers: int = -1,
        rpc_servers: str | Sequence[str] | None = None,
        verbose: bool = False,
        **arguments: Unpack[LoadArguments],
    ) -> None:
        kwargs: dict[str, Any] = {**arguments}
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
            "type_k_local": type_k_local,
            "type_v_local": type_v_local,
            "rewind": rewind,
            "rewind_limit": rewind_limit,
            "prefill": prefill,
            "rpc_servers": rpc_servers,
            "wait": wait,
        }
        self._progress = progress
        self._loading: Callback | None = None
        self._requests = Requests("this Llama", wait)
        ids = (C.llama_token * 1)()
        self._one = ids, C.llama_batch_get_one(ids, 1)  # a batch of one token, and that token
        self._pieces: dict[int, bytes] = {}  # by token, as they are asked for
        self._ends: dict[int, bool] = {}  # likewise
        self._is_recurrent = self._needs_checkpoints = False
        self._checkpoints: Checkpoints | None = None
        self._full_prefill = False
        self._source: Llama | None = None  # see evaluation.set_source()
        self._why_no_full_prefill: str | None = None
        self._logits_row = -1  # of the last token, in the logits of the last batch
        self._state_fingerprint: bytes | None = None
        self._abort_callback: Any = None  # of prefill(); lives as long as it may be called
        kwargs["n_gpu_layers"] = n_gpu_layers
        refuse_arguments(os.fspath(model_path), n_ctx, kwargs)
        refuse_prefill(prefill)
        kwargs["n_threads"] = kwargs.get("n_threads") or n_cores()
        kwargs["n_threads_batch"] = kwargs.get("n_threads_batch") or kwargs["n_threads"]
        type_k, type_v = type_name(type_k), type_name(type_v)
        local_types = {
            name: None if value is None else type_name(value)
            for name, value in (("type_k_local", type_k_local), ("type_v_local", type_v_local))
        }
        if kwargs.get("vocab_only"):
            razor = False  # no weights, no cache
            n_ctx = 512 if n_ctx == "auto" else n_ctx
        self._servers = Servers(rpc_servers)
        with self._servers.in_use():
            self._file = open_model(model_path)
            model_path = os.fspath(model_path)
            cache = choose_cache(
                self._file, razor, budget, window, sink_tokens, compensation, n_ctx, type_k, type_v,
                flash_attn, kwargs, progress, **local_types,
            )  # fmt: skip
            self._plan, self._profile, self._why = cache.plan, cache.profile, cache.why
            if cache.plan is not None:
                # llama.cpp does so too, but the base class allocates for n_batch before it
                kwargs["n_batch"] = min(kwargs.get("n_batch", 512), cache.n_ctx)
                if cache.plan.active and kwargs.get("swa_full") is None:
                    kwargs["swa_full"] = False  # else layers with a sliding window keep everything

            on_device = is_on_device(C, n_gpu_layers, kwargs.get("offload_kqv", True))
            log, self._why_no_log = choose_rewind_log(rewind, rewind_limit, on_device)

            native.refuse_after_fork()
            if C.llama_supports_gpu_offload():
                native.computed()
            library.show_log(verbose)
            library.clear_errors()
            refusal: RazorError | None = None
            razor_options: dict[str, Any] = local_types | asdict(log)
            override = native.make_params(cache.profile, cache.own_attention, **razor_options)
            with library.override(override):
                try:
                    super().__init__(
                        model_path,
                        n_ctx=cache.n_ctx,
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
                        f"{model_path}: the vocabulary in its metadata has a token that is not"
                        f" UTF-8 ({error.object[:32]!r}); convert the model again"
                    )
                except (ValueError, RuntimeError, MemoryError) as error:
                    refusal = self._refusal(model_path, error)
                    self.close()
                    if refusal is None:
                        raise
            self._logits_all = bool(kwargs.get("logits_all"))  # draft models need no more logits
            if self._loading is not None:
                self._loading.check()
            if isinstance(refusal, MemoryFullError):  # after the memory of the model was freed
                given = {"type_k": type_k, "type_v": type_v, "flash_attn": flash_attn, **kwargs}
                given |= local_types
                raise out_of_memory(str(refusal), self._file, cache.n_ctx, cache.profile, given)
            if refusal is not None:
                raise refusal
            self._check_plan()
            self._choose_prefill(prefill, on_device)
            if not kwargs.get("vocab_only"):
                model = self._model.model
                hybrid = C.llama_model_is_hybrid(model)
                self._is_recurrent = hybrid or C.llama_model_is_recurrent(model)
                has_windows = C.llama_model_n_swa(model) > 0 and not self.context_params.swa_full
                self._needs_checkpoints = self._is_recurrent or has_windows
            if self._needs_checkpoints and rewind != "off":
                self._checkpoints = Checkpoints(self.ctx, rewind_limit or limit_in_ram())

    # -- what razor does --

    @property
    def plan(self) -> Plan | None:
        """The plan of this context; None for a model whose cache the plan does not describe."""
        return self._plan

    @property
    def profile(self) -> Profile | None:
        """The profile of this context with the options applied, None for a model without one."""
        return self._profile

    def memory(self) -> Memory:
        """Return the memory of the cache and the model, as counted by the native library."""
        memory = read_memory(
            library, self.ctx, self._plan, self._why, self.n_tokens, self._n_ctx, self._why_no_log
        )
        memory = replace(
            memory,
            prefill="razor" if self._why_no_full_prefill else "full",
            prefill_why=self._why_no_full_prefill,
        )
        if not self._needs_checkpoints:
            return memory
        held = self._checkpoints
        n, n_bytes = (0, 0) if held is None else (len(held), held.n_bytes)
        return replace(memory, checkpoints=n, checkpoint_bytes=n_bytes)

    def stats(self, seq_id: int = 0) -> SequenceStats:
        """Return the statistics of a sequence. Raises RazorError if razor is not active."""
        return read_sequence(library, self.ctx, seq_id, self._why)

    # -- evaluation --

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after the first n_tokens, which count as evaluated.

        If the cache cannot go back to n_tokens, because of a fold and without a rewind log that
        reaches so far, everything is evaluated again from the start. Raises ContextFullError, which
        changes nothing, and RazorError if the computation fails. n_tokens is then the number of
        tokens that the cache still holds.
        """
        self._request(evaluation.evaluate, self, tokens)

    # the base class has a property of this name, of the logits that logits_all=True keeps
    def eval_logits(  # type: ignore[override]
        self, tokens: Sequence[int], wanted: Sequence[bool] | None = None
    ) -> Iterator[np.ndarray]:
        """Evaluate like eval(), and yield the logits after each token by batch: f32 [n, n_vocab].

        The arrays are the library's own memory, which the next batch overwrites. Raises what eval()
        raises.

        Args:
            wanted: for each token, whether its logits are wanted; None means all.
        """
        return self._requests.generate(lambda: evaluation.evaluate_logits(self, tokens, wanted))

    def prefill(
        self,
        tokens: Sequence[int],
        progress: Progress | None = None,
        stop: Stop | None = None,
    ) -> Prefill:
        """Bring the cache to exactly these tokens, and reuse those that it already holds.

        progress(n_done, n_tokens, label) is called before each batch and at the end. stop() is
        called often, also during the computation if the backend allows it. Once it returns True,
        evaluation ends, and the cache keeps a valid beginning of tokens. generate(tokens) then
        samples without evaluating again.

        Raises what eval(), progress() and stop() raise.
        """
        return self._request(evaluation.prefill, self, tokens, progress, stop)

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Unpack[GenerateArguments]
    ) -> Generator[int, Sequence[int] | None, None]:
        """Yield the tokens that follow, without end, like the base class.

        Tokens that the cache already holds are not evaluated again (with reset=False, it continues
        after the tokens in the cache). seed replaces that of the Llama. Raises what eval() raises.
        """
        return self._requests.generate(lambda: sampling.generate(self, tokens, *args, **kwargs))

    def sample(self, *args: Any, **kwargs: Unpack[SampleArguments]) -> int:
        """Draw a token from the logits of the last one, like the base class."""
        return self._request(sampling.sample, self, *args, **kwargs)

    def reset(self) -> None:
        """Forget all tokens. The next request evaluates its own from the start."""
        self._request(evaluation.reset, self)

    def embed(
        self, input: str | list[str], *args: Any, **kwargs: Any
    ) -> Any:  # a list or lists of numbers, and with return_count a tuple
        """Embed like the base class. Raises RazorError for a text without tokens."""
        if not self.context_params.embeddings:
            raise UnsupportedError("embed() needs a Llama that was made with embedding=True")
        for text in [input] if isinstance(input, str) else input:
            if not isinstance(text, str) or not self.tokenize(text.encode()):
                # the base class writes outside of its batch for a text without tokens
                raise RazorError(f"{text!r} cannot be embedded; expected a text with tokens")
        inside: Any = Inside(self)
        return self._request(llama_cpp.Llama.embed, inside, input, *args, **kwargs)

    def request(self, make: Callable[[Llama], Iterator[T]]) -> Generator[T, Any, Any]:
        """Run a generator as one request: nothing else uses the model until it is over.

        make(llama) returns the generator; it uses the model through its argument only.
        """
        inside: Any = Inside(self)
        return self._requests.generate(lambda: make(inside))

    # the overloads give type checkers the return type for each value of stream, and accept only
    # messages and prompt by position
    @overload  # type: ignore[override]
    def create_chat_completion(
        self,
        messages: Sequence[ChatCompletionRequestMessage],
        *,
        stream: Literal[False] = False,
        **arguments: Unpack[ChatArguments],
    ) -> CreateChatCompletionResponse: ...

    @overload
    def create_chat_completion(
        self,
        messages: Sequence[ChatCompletionRequestMessage],
        *,
        stream: Literal[True],
        **arguments: Unpack[ChatArguments],
    ) -> Generator[CreateChatCompletionStreamResponse, None, None]: ...

    @functools.wraps(llama_cpp.Llama.create_chat_completion)
    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:
        request = _CHAT.bind(self, *args, **kwargs).arguments
        request = read_chat_request(request, self.chat_handler is not None, self.chat_format or "")
        for name in ("messages", "functions", "tools"):
            request[name] = self.mark_plain(request.get(name))
        return llama_cpp.Llama.create_chat_completion(**request)

    @overload  # type: ignore[override]
    def create_completion(
        self,
        prompt: str | list[int],
        *,
        stream: Literal[False] = False,
        **arguments: Unpack[CompletionArguments],
    ) -> CreateCompletionResponse: ...

    @overload
    def create_completion(
        self,
        prompt: str | list[int],
        *,
        stream: Literal[True],
        **arguments: Unpack[CompletionArguments],
    ) -> Generator[CreateCompletionStreamResponse, None, None]: ...

    @functools.wraps(llama_cpp.Llama.create_completion)
    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        return super().create_completion(*args, **kwargs)

    if TYPE_CHECKING:
        __call__ = create_completion  # type: ignore[assignment]  # as create_completion()

    def n_ctx_train(self) -> int:
        """Return the context size for which the model was trained, in tokens."""
        return self._model.n_ctx_train()

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token, b"" for special tokens."""
        piece = self._pieces.get(token)
        if piece is None:
            self._check_token(token)
            piece = self._pieces[token] = self._read_piece(token)
        return piece

    def detokenize(
        self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False
    ) -> bytes:
        """Detokenize like the base class. Raises RazorError for a token that does not exist."""
        self._check_tokens(tokens)
        return super().detokenize(tokens, prev_tokens, special)

    def is_end(self, token: int) -> bool:
        """Return True if the token ends an answer."""
        end = self._ends.get(token)
        if end is None:
            self._check_token(token)
            end = self._ends[token] = C.llama_vocab_is_eog(self._model.vocab, token)
        return end

    def is_special(self, token: int) -> bool:
        """Return True for a control token, such as a turn marker of the chat template."""
        self._check_token(token)
        return bool(C.llama_vocab_is_control(self._model.vocab, token))

    # -- state --

    def save_state(self) -> llama_cpp.LlamaState:
        """Return a state for load_state()."""
        return self._request(save_state, self)

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Load a state of save_state(), from a context with the same plan.

        Raises StateError for any other state. The context is then unchanged, or empty if the state
        turned out to be damaged halfway.
        """
        self._request(load_state, self, state)

    def close(self) -> None:
        """Free the model and its context. Raises RazorError while another thread computes."""
        if not hasattr(self, "_stack"):  # not there if the arguments were refused
            return
        names = ("_model", "_ctx", "tokenizer_")  # not there yet where loading failed
        kept = {name: vars(self)[name] for name in names if name in vars(self)}
        # first this, so that an open generator that goes on now finds it
        vars(self).update(dict.fromkeys(names, Closed()))
        if self._requests.is_running():
            vars(self).update(kept)
            raise RazorError("this Llama is computing; close it after the call has returned")
        self._requests = Requests("this Llama")  # so that later requests report that it is closed
        if native.is_forked():  # the threads of the library are not in this process
            self._stack.pop_all()
        super().close()
        self._servers.close()

    def __del__(self) -> None:
        if Closed is not None:  # when a frozen application exits, it clears the modules first
            super().__del__()

    def __getstate__(self) -> dict[str, Any]:
        return {**llama_cpp.Llama.__getstate__(self), **self._razor_args}

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

    def _request(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        def open_one() -> T:
            _ = self._ctx.ctx  # raises if it is closed
            return function(*args, **kwargs)

        return self._requests.call(open_one)

    def _last_logits(self) -> np.ndarray:
        """Return the logits of the last token, in the library's own memory: f32 [n_vocab]."""
        logits = self._ctx.get_logits_ith(self._logits_row)
        return np.ctypeslib.as_array(logits, shape=(self._n_vocab,))

    def _init_sampler(
        self, *args: Any, logits_processor: Any = None, seed: int | None = None, **kwargs: Any
    ) -> sampling.Sampler:
        base: Any = Inside(self, _seed=self._seed if seed is None else seed)
        sampler = llama_cpp.Llama._init_sampler(base, *args, **kwargs)
        return sampling.Sampler(self, sampler, logits_processor)

    # the base class passes all arguments by name
    def _create_completion(  # type: ignore[override]
        self, **request: Any
    ) -> Iterator[dict[str, Any]]:
        """Run a request of create_completion() or a similar method. See completion.complete()."""
        return self._requests.generate(lambda: complete(Inside(self), request))

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

    def _refusal(self, model_path: str, error: Exception) -> RazorError | None:
        """Return why loading failed in the library, None for a mistake in the arguments."""
        lost = lost_server()
        if lost is not None:
            return RazorError(lost_sentence(lost))
        if isinstance(error, MemoryError) or library.is_out_of_memory():
            n_ctx = f"{self._plan.n_ctx:,} tokens" if self._plan else "this size"
            return MemoryFullError(
                f"{model_path}: there is not enough memory for a context of {n_ctx}"
            )
        reason = library.reason()
        kind = UnsupportedError if library.last_error() else RazorError
        if hasattr(self, "_model"):
            return kind(f"no context could be created for {model_path}: {reason}")
        if str(error).startswith("Failed to load model"):
            return kind(f"{model_path} could not be loaded: {reason}")
        return None

    def _choose_prefill(self, asked: str, on_device: bool) -> None:
        """Choose how prompts are read, see the argument prefill."""
        if self._plan is None or not self._plan.active:
            return  # a full cache reads everything with full attention
        try:
            self._why_no_full_prefill = why_compressed(library, self.ctx, asked, on_device)
        except UnsupportedError:
            self.close()
            raise
        self._full_prefill = self._why_no_full_prefill is None

    def _check_plan(self) -> None:
        """Check that the plan that all tools print is what the library allocated."""
        stats = library.stats(self.ctx)
        planned = self._plan.kv_bytes if self._plan and self._plan.active else None
        found = stats.kv_bytes if stats.active else None
        if planned != found:
            self.close()
            raise LibraryError(
                f"the library allocated {found} bytes of KV cache, but the plan has {planned}:"
                " the library does not match the Python code; reinstall razor-local"
            )
        if not stats.active and self._plan and self._plan.kv_bytes != stats.kv_bytes:
            self._plan = None  # a cache of another kind, such as sliding windows
