"""A model class for lm-evaluation-harness, to run its suites on razor_local.

    python -m razor_local.evals.lm_eval --model razor --tasks hellaswag \\
        --model_args model=model-razor.gguf,policy=razor-q8_0,n_ctx=8192

This is the command line of the harness with one more model, `razor`. In Python, importing this
module registers it. See docs/evaluation.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..chat import Message
from ..common.machine import n_cores
from ..errors import UnsupportedError, option
from ..model_setup import DEFAULT_MODEL, ModelSetup
from .perplexity import log_softmax
from .policies import make_policies
from .questions import bos_text, refuse_without_tokenizer, renderer
from .run import open_llama

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise UnsupportedError(
        f"this needs lm-evaluation-harness ({error}); install it with"
        " 'pip install razor-local[lm-eval]'"
    ) from None

MAX_GEN_TOKENS = 256  # default for tasks without a limit
log = logging.getLogger(__name__)


@register_model("razor")
class RazorLM(TemplateLM):  # type: ignore[misc]  # it has no types
    """A GGUF model that runs with one policy.

    Prompts longer than the context lose their beginning, with a warning, as in the harness's other
    models.

    Args:
        model: a GGUF file, by default the built-in one.
        policy: see razor_local.evals.policies.
        n_ctx: tokens, by default the trained context up to 8,192.
        sidecar, retrieval, window_min, window_divisor, sinks, n_threads, n_gpu_layers: as in
            `razor-local eval`.
        seed: seed of random-heads.
        batch_size, max_batch_size, device: passed by the harness, and ignored.
    """

    def __init__(
        self,
        model: str = str(DEFAULT_MODEL),
        policy: str = "razor-f16",
        n_ctx: int = 0,
        sidecar: str | None = None,
        retrieval: float | None = None,
        window_min: int | None = None,
        window_divisor: int | None = None,
        sinks: int | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int = -1,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        setup = ModelSetup(
            model=str(model),
            sidecar=sidecar,
            retrieval=retrieval,
            window_min=window_min,
            window_divisor=window_divisor,
            sink_tokens=sinks,
            n_threads=n_threads or n_cores(),
            n_gpu_layers=n_gpu_layers,
        )
        shape, (chosen,) = make_policies(setup, [policy], seed=seed)
        n_ctx = n_ctx or min(shape.n_ctx_train or 8192, 8192)
        self.llama = open_llama(setup, chosen, n_ctx)
        refuse_without_tokenizer(self.llama)
        self.max_length = self.llama.n_ctx()
        self._name = f"{shape.name or shape.arch}-{shape.fingerprint[:16]}"
        self._render = renderer(self.llama)
        self._bos = bos_text(self.llama)
        self._warned = False

    @property
    def eot_token_id(self) -> int:
        return self.llama.token_eos()

    @property
    def prefix_token_id(self) -> int:
        bos = self.llama.token_bos()
        return bos if bos >= 0 else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return self._name

    def get_model_info(self) -> dict[str, Any]:
        """Return the bytes of the cache, which the harness writes with its results."""
        memory = self.llama.memory()
        return {
            "kv_bytes": memory.kv_bytes,
            "kv_bytes_full_f16": memory.kv_bytes_full_f16,
            "n_ctx": memory.n_ctx,
            "razor": memory.active,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not (self._bos and string.startswith(self._bos))
        text = self._bos + string if add_special_tokens else string
        return self.llama.tokenize(text.encode(), add_bos=False, special=True)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        from llama_cpp import llama_cpp as C

        source = C.llama_model_chat_template(self.llama.model, None)
        return source.decode("utf-8", "replace") if chat_template and source else ""

    def apply_chat_template(
        self, chat_history: list[Message], add_generation_prompt: bool = True
    ) -> str:
        if add_generation_prompt:
            return self._render(chat_history)
        # Here the last message is the beginning of an answer.
        return self._render(chat_history[:-1]) + chat_history[-1]["content"]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        found = []
        for key, context, continuation in _progress(requests, "log likelihoods", disable_tqdm):
            answer = self._score(context, continuation)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
            found.append(answer)
        return found

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Return the log likelihood of continuation after context.

        The second result is whether each of its tokens is the most likely one.
        """
        if len(continuation) > self.max_length:
            raise UnsupportedError(
                f"a continuation of {len(continuation):,} tokens is longer than the context"
                f" ({self.max_length:,}); use a larger {option('n_ctx')}"
            )
        tokens = self._fitting(context + continuation, self.max_length + 1)[:-1]
        n = len(continuation)
        before = tokens[: len(tokens) - n + 1][:-1]  # tokens before the first row that counts
        if before:
            self.llama.prefill(before)
        else:
            self.llama.reset()
        total, greedy, done = 0.0, True, 0
        for logits in self.llama.eval_logits(tokens[len(before) :]):
            rows = log_softmax(logits)
            wanted = np.array(continuation[done : done + len(rows)])
            total += float(rows[np.arange(len(rows)), wanted].sum())
            greedy = greedy and bool((rows.argmax(axis=1) == wanted).all())
            done += len(rows)
        return total, greedy

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in _progress(requests, "rolling log likelihoods", disable_tqdm):
            (string,) = request.args
            windows = get_rolling_token_windows(
                self.tok_encode(string, add_special_tokens=False),
                self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            total = sum(self._score(*make_disjoint_window(window))[0] for window in windows)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            found.append(total)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        found = []
        for request in _progress(requests, "answers", disable_tqdm):
            context, options = request.args
            text = self._generate(context, dict(options))
            self.cache_hook.add_partial("generate_until", request.args, text)
            found.append(text)
        return found

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        """Generate an answer up to the first of options["until"], which is left out."""
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        most = int(options.get("max_gen_toks") or MAX_GEN_TOKENS)
        sampling: dict[str, Any] = {"temp": 0.0}
        if options.get("do_sample", False):
            sampling = {
                "temp": float(options.get("temperature", 1.0)),
                "top_p": float(options.get("top_p", 1.0)),
                "top_k": int(options.get("top_k", 0)),
                "min_p": float(options.get("min_p", 0.0)),
            }
        if most >= self.max_length:
            raise UnsupportedError(
                f"an answer of {most:,} tokens leaves no room for the question in a context of"
                f" {self.max_length:,}; use a larger {option('n_ctx')}"
            )
        tokens = self._fitting(self.tok_encode(context), self.max_length - most)
        self.llama.prefill(tokens)
        data = b""
        for n, token in enumerate(self.llama.generate(tokens, **sampling), 1):
            if self.llama.is_end(token):
                break
            data += self.llama.piece(token)
            text = data.decode("utf-8", "ignore")
            ends = [text.index(stop) for stop in until if stop and stop in text]
            if ends:
                return text[: min(ends)]
            if n >= most:
                break
        return data.decode("utf-8", "replace")

    def _fitting(self, tokens: list[int], most: int) -> list[int]:
        if len(tokens) > most and not self._warned:
            log.warning(
                "a prompt of %d tokens does not fit the context, so its beginning is left out"
                " (further prompts are cut without a warning); use a larger %s",
                len(tokens),
                option("n_ctx"),
            )
            self._warned = True
        return tokens[-most:]


def _progress(items: list[Any], what: str, disable: bool) -> Iterator[Any]:
    from tqdm import tqdm

    return iter(tqdm(items, desc=what, disable=disable))


def main() -> None:
    """Run the command line of the harness with the model razor."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
