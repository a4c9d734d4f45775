"""The parts that chat and run share: options, loading a model, and reading the prompt."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..common.inputs import read_text_file
from ..errors import MemoryFullError, ProfileError, RazorError
from .interrupt import stop_on_interrupt
from .params import (
    BATCH_SIZE,
    CACHE_TYPE_K,
    CACHE_TYPE_LOCAL_K,
    CACHE_TYPE_LOCAL_V,
    CACHE_TYPE_V,
    CALIBRATE,
    FLASH_ATTN,
    N_GPU_LAYERS,
    PREFILL,
    REWIND,
    REWIND_LIMIT,
    RPC,
    SEED,
    THREADS,
    UBATCH_SIZE,
    ContextSize,
    Number,
    OnOffAuto,
    Prediction,
    Whole,
    cache_text,
    command_word,
    duration_text,
    flash_attention,
    model_argument,
    note_damaged_profile,
)
from .terminal import ProgressBar, say

if TYPE_CHECKING:
    from ..chat import Sampling
    from ..fit import AutoContext
    from ..llama import Llama
    from ..model_file import ModelFile
    from ..profile import Profile

MAX_DEFAULT_CTX = 32768  # tokens, if --ctx-size is not given
MAX_SCHEMA = 1 << 20  # bytes
MAX_TEXT = 256 << 20  # bytes; a context of ten million tokens is about 40 MiB of text

# llama.cpp's environment variables, by parameter
ENVVARS = {
    "model_option": "LLAMA_ARG_MODEL",
    "hf_repo": "LLAMA_ARG_HF_REPO",
    "ctx_size": "LLAMA_ARG_CTX_SIZE",
    "n_gpu_layers": "LLAMA_ARG_N_GPU_LAYERS",
    "rpc": "LLAMA_ARG_RPC",
    "threads": "LLAMA_ARG_THREADS",
    "batch_size": "LLAMA_ARG_BATCH",
    "ubatch_size": "LLAMA_ARG_UBATCH",
    "cache_type_k": "LLAMA_ARG_CACHE_TYPE_K",
    "cache_type_v": "LLAMA_ARG_CACHE_TYPE_V",
    "flash_attn": "LLAMA_ARG_FLASH_ATTN",
    "predict": "LLAMA_ARG_N_PREDICT",
    "temp": "LLAMA_ARG_TEMPERATURE",
    "top_k": "LLAMA_ARG_TOP_K",
    "top_p": "LLAMA_ARG_TOP_P",
    "min_p": "LLAMA_ARG_MIN_P",
    "repeat_penalty": "LLAMA_ARG_REPEAT_PENALTY",
}


def _set_color(ctx: click.Context, param: click.Parameter, value: str) -> None:
    if value != "auto":
        os.environ["NO_COLOR"] = "1" if value == "off" else ""


CTX_SIZE = click.option(
    "-c",
    "--ctx-size",
    type=ContextSize(),
    metavar="N",
    help="Context size in tokens, such as 8192 or 32k (0: trained length, auto: largest that fits"
    " the free memory).  [default: the largest up to 32768 and the trained length"
    " that fits]",
)


def _prompt_argument(command: Any) -> Any:
    """Add PROMPT and -p to a command. Its function receives the text of either as prompt."""

    @functools.wraps(command)
    def run(*args: Any, words: tuple[str, ...], prompt: str | None, **options: Any) -> Any:
        if words and prompt is not None:
            raise click.UsageError("PROMPT and --prompt exclude each other")
        return command(*args, prompt=" ".join(words) if words else prompt, **options)

    option = click.option("-p", "--prompt", metavar="TEXT", help="Another way to give PROMPT.")
    return click.argument("words", nargs=-1, metavar="[PROMPT]...")(option(run))


OPTIONS: tuple[Callable[[Any], Any], ...] = (
    model_argument(),
    _prompt_argument,
    click.option(
        "-e", "--escape/--no-escape", default=False,
        help="Replace \\n, \\r, \\t, \\', \\\", \\\\ and \\xHH in the prompt.  [default:"
        " --no-escape]",
    ),
    click.option(
        "-f", "--file", type=click.Path(path_type=Path), metavar="FILE",
        help="Text file that precedes the prompt.",
    ),
    click.option(
        "-sys", "--system-prompt", "--system", "system", metavar="TEXT", help="System prompt."
    ),
    CTX_SIZE,
    N_GPU_LAYERS,
    RPC,
    click.option(
        "-t", "--threads", type=THREADS, metavar="N",
        help="Number of CPU threads.  [default: physical cores]",
    ),
    BATCH_SIZE,
    UBATCH_SIZE,
    CACHE_TYPE_K,
    CACHE_TYPE_V,
    CACHE_TYPE_LOCAL_K,
    CACHE_TYPE_LOCAL_V,
    PREFILL,
    REWIND,
    REWIND_LIMIT,
    FLASH_ATTN,
    click.option(
        "--no-mmap", is_flag=True, help="Load the model into memory instead of mapping it."
    ),
    click.option("--mlock", is_flag=True, help="Keep the model in RAM."),
    click.option(
        "-n", "--predict", "--n-predict", type=Prediction(), default=-1, metavar="N",
        show_default=True, help="Maximum tokens to generate (-1: unlimited).",
    ),
    click.option(
        "-s", "--seed", type=SEED, default=-1, metavar="N", help="Sampling seed (-1: random)."
    ),
    click.option(
        "--temp", "--temperature", type=Number(0), metavar="T",
        help="Sampling temperature (0: greedy).  [default: 0.8; 0 for the built-in model]",
    ),
    click.option(
        "--top-k", type=Whole(0, 2**31 - 1), default=40, metavar="N", show_default=True,
        help="Top-k sampling (0: off).",
    ),
    click.option(
        "--top-p", type=Number(0, 1), default=0.95, show_default=True,
        help="Top-p threshold (1: off).",
    ),
    click.option(
        "--min-p", type=Number(0, 1), default=0.05, show_default=True,
        help="Min-p threshold (0: off).",
    ),
    click.option(
        "--repeat-penalty", type=Number(0, min_open=True), default=1.0, metavar="X",
        show_default=True, help="Penalty for recently generated tokens (1: off).",
    ),
    click.option(
        "--ignore-eos", is_flag=True, help="Do not let the model end its answer.",
    ),
    click.option(
        "--grammar", metavar="GRAMMAR", help="Grammar (GBNF) that the answer follows.",
    ),
    click.option(
        "--grammar-file", type=click.Path(path_type=Path), metavar="FILE",
        help="File with a grammar that the answer follows.",
    ),
    click.option(
        "--sidecar", type=click.Path(path_type=Path), metavar="FILE",
        help="Sidecar with the profile of the model.",
    ),
    click.option(
        "--budget", "--retrieval", "budget", type=Number(0, 1), metavar="SHARE",
        help="Share of retrieval heads, chosen by the scores in the profile.",
    ),
    click.option(
        "--razor/--no-razor", default=True,
        help="Use RazorAttention, or a full cache.  [default: --razor]",
    ),
    CALIBRATE,
    click.option("--hide-thinking", is_flag=True, help="Hide the reasoning of the model."),
    click.option(
        "--jinja", is_flag=True, expose_value=False,
        help="No effect: chat templates are always Jinja templates.",
    ),
    click.option(
        "-co", "--color", type=OnOffAuto(["on", "off", "auto"]), is_flag=False, flag_value="on",
        default="auto", show_default=True, expose_value=False, callback=_set_color,
        help="Colors on a terminal; auto: unless NO_COLOR is set.",
    ),
    click.option("-v", "--verbose", is_flag=True, help="Show the log of llama.cpp on stderr."),
)  # fmt: skip


def generation_options(command: Any) -> Any:
    """Add the arguments of chat and run to a command. Its function gets the path of the model."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def check_options(options: dict[str, Any]) -> None:
    """Refuse options that exclude each other, and closed streams."""
    for name in ("sidecar", "budget", "cache_type_local_k", "cache_type_local_v"):
        if options[name] is not None and not options["razor"]:
            raise click.UsageError(f"--{name.replace('_', '-')} and --no-razor exclude each other")
    if options["calibrate"] == "now" and (options["sidecar"] or not options["razor"]):
        other = "sidecar" if options["sidecar"] else "no-razor"
        raise click.UsageError(f"--calibrate now and --{other} exclude each other")
    grammars = [
        name
        for name in ("grammar", "grammar_file", "json_schema", "json_schema_file")
        if options.get(name) is not None
    ]
    for name in (*grammars[1:], *["ignore_eos"] * options["ignore_eos"]):
        if grammars:
            first, second = (n.replace("_", "-") for n in (grammars[0], name))
            raise click.UsageError(f"--{first} and --{second} exclude each other")
    if sys.stdin is None or sys.stdout is None:
        command = click.get_current_context().info_name
        raise click.UsageError(
            f"stdin or stdout is closed; {command} reads from one and writes to the other"
        )
    # The locale may lack some characters. TextIO does not declare reconfigure().
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]


def read_text(options: dict[str, Any]) -> str | None:
    """Return the content of stdin, the file and the prompt, in this order.

    Empty lines separate them. Return None if nothing was given and stdin is a terminal.
    """
    texts = []
    if not sys.stdin.isatty():
        texts.append(_read_stdin())
    if options["file"] is not None:
        texts.append(read_text_file(options["file"], MAX_TEXT).strip("\r\n"))
    if options["prompt"] is not None:
        prompt = options["prompt"]
        texts.append(_unescaped(prompt) if options["escape"] else prompt)
    if not texts:
        return None
    given = [text for text in texts if text.strip()]
    if not given:
        raise RazorError(_nothing(options))
    return "\n\n".join(given)


def _unescaped(text: str) -> str:
    """Replace the escape sequences of a text, as llama.cpp does."""
    simple = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}

    def replaced(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes.fromhex(code[1:].decode()) if len(code) == 3 else simple.get(code, code)

    data = text.encode("utf-8", "surrogateescape")
    data = re.sub(rb"""\\([nrt'"\\]|x[0-9A-Fa-f]{2})""", replaced, data)
    return data.decode("utf-8", "surrogateescape")


def _nothing(options: dict[str, Any]) -> str:
    if options["prompt"] is not None:
        return "the prompt is empty: pass a text with -p"
    if options["file"] is not None:
        return f"{options['file']} is empty"
    return "stdin is empty: pipe a text into it, or pass one with -p"


def _read_stdin() -> str:
    data = sys.stdin.buffer.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise RazorError(
            f"stdin has more than {MAX_TEXT >> 20} MiB, more than any context holds; pipe in less"
        )
    try:
        return data.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        raise RazorError(f"stdin is not UTF-8 text (byte {error.start})") from error


def load(path: Path, options: dict[str, Any]) -> tuple[Llama, AutoContext | None]:
    """Load a model with a progress bar.

    Return it, and the choice of its context if --ctx-size is not a number.
    """
    from ..common.progress import check_stop
    from ..llama_options import choose_profile
    from ..model_file import ModelFile

    n_ctx, chosen, model = options["ctx_size"], None, ModelFile(path)
    try:
        trained = model.shape.n_ctx_train
    except ProfileError:  # no plan describes this shape, but llama.cpp may run it
        trained = 0
    use_flash_attn = flash_attention(
        options["flash_attn"],
        path,
        options["cache_type_k"],
        options["cache_type_v"],
        options["cache_type_local_v"],
        options["n_gpu_layers"],
    )
    razor = options["sidecar"] or options["razor"]
    if razor is True:
        wanted = min(trained, MAX_DEFAULT_CTX) if n_ctx is None else n_ctx
        razor = find_profile(model, wanted, use_flash_attn, options)
    profile = choose_profile(model, razor, options["budget"])[1]
    if n_ctx is None or n_ctx == "auto":
        chosen = _choose_context(model, profile, options, use_flash_attn)
        n_ctx = chosen.n_ctx if chosen else min(trained, MAX_DEFAULT_CTX)
    elif trained and n_ctx > trained:
        say(f"note: the model was trained for {trained} tokens, -c {n_ctx} goes beyond that")
    from ..llama import Llama

    with ProgressBar() as bar, stop_on_interrupt() as stop:

        def progress(part: float) -> None:
            bar(part, 1.0, "loading the model")
            check_stop(stop)

        progress(0.0)
        llama = Llama(
            model,
            razor=options["razor"] if profile is None else profile,
            progress=progress,
            n_ctx=n_ctx,
            n_gpu_layers=options["n_gpu_layers"],
            n_threads=options["threads"],
            n_threads_batch=options["threads"],
            n_batch=options["batch_size"],
            n_ubatch=options["ubatch_size"],
            type_k=options["cache_type_k"],
            type_v=options["cache_type_v"],
            **local_types(options),
            prefill=options["prefill"],
            rewind=options["rewind"],
            rewind_limit=options["rewind_limit"],
            flash_attn=use_flash_attn,
            use_mmap=not options["no_mmap"],
            use_mlock=options["mlock"],
            verbose=options["verbose"],
        )
    return llama, chosen


def local_types(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "type_k_local": options["cache_type_local_k"],
        "type_v_local": options["cache_type_local_v"],
    }


def _choose_context(
    model: ModelFile, profile: Profile | None, options: dict[str, Any], use_flash_attn: bool
) -> AutoContext | None:
    """Return the context that fits the free memory, None for a model that loading will refuse.

    Raises MemoryFullError.
    """
    from ..fit import ContextOptions, auto_context

    context = ContextOptions(
        profile=profile,
        type_k=options["cache_type_k"],
        type_v=options["cache_type_v"],
        **local_types(options),
        flash_attn=use_flash_attn,
        n_batch=options["batch_size"],
        n_ubatch=options["ubatch_size"],
    )
    n_max = MAX_DEFAULT_CTX if options["ctx_size"] is None else 0
    try:
        return auto_context(model, context, n_max, n_gpu_layers=options["n_gpu_layers"])
    except MemoryFullError:
        raise
    except RazorError:
        return None


def sampling(options: dict[str, Any], default_temp: float) -> Sampling:
    """Return the sampling options.

    Args:
        default_temp: the temperature if none is given
    """
    from ..chat import Sampling

    return Sampling(
        temp=default_temp if options["temp"] is None else options["temp"],
        top_k=options["top_k"],
        top_p=options["top_p"],
        min_p=options["min_p"],
        repeat_penalty=options["repeat_penalty"],
        seed=options["seed"] if options["seed"] >= 0 else None,
    )


def grammar(options: dict[str, Any]) -> Any:
    """Return the grammar that answers follow from the start, None if they are free text.

    Raises RazorError for an empty or malformed grammar.
    """
    for name in ("json_schema", "json_schema_file"):
        if options.get(name) is not None:
            return schema_grammar(options[name], "--json-schema")
    text, file = options["grammar"], options["grammar_file"]
    if file is not None:
        text = read_text_file(file, max_bytes=MAX_SCHEMA)
    if text is None:
        return None
    if not text.strip():
        raise RazorError(f"{file or '--grammar'} is empty, expected a grammar with a rule 'root'")
    from llama_cpp.llama_grammar import LlamaGrammar

    return LlamaGrammar.from_string(text, verbose=False)


def schema_grammar(schema: str | Path, name: str) -> Any:
    """Return the grammar of answers that follow a JSON schema.

    Args:
        schema: the schema as text, or the path of its file
        name: the name of the text in errors
    """
    from ..completion_request import grammar_of

    what = name if isinstance(schema, str) else str(schema)
    text = schema if isinstance(schema, str) else read_text_file(schema, max_bytes=MAX_SCHEMA)
    try:
        schema = json.loads(text)
    except RecursionError:
        raise RazorError(f"{what} is nested too deeply for a JSON schema") from None
    except ValueError as error:
        raise RazorError(f"{what} is not JSON: {error}") from None
    return grammar_of(what, schema)


def default_temp(model: Path | None) -> float:
    """Return the default temperature of a model; None is the built-in model."""
    return 0.8 if model is not None else 0.0


def find_profile(
    model: ModelFile, n_ctx: int | str, flash_attn: bool, options: dict[str, Any]
) -> Profile | bool:
    """Return the profile of the model, measured if there is none, or True for a full cache.

    Show where the profile comes from, or why there is none.
    """
    try:
        _ = model.shape
    except ProfileError:  # no plan describes this shape; Llama decides
        return True
    found = model.find_profile()
    note_damaged_profile(model, found)
    when = options["calibrate"]
    if found is not None and not (found.source == "list" and when == "now"):
        if options["budget"] is not None:
            found.check_budget(model)
        if found.source != "file":
            say(f"profile: {found}")
        return found.profile
    if when == "never":
        return True
    from ..auto_profile import auto_profile

    with ProgressBar() as bar:
        try:
            with stop_on_interrupt() as stop:
                auto = auto_profile(
                    model,
                    when=when,
                    n_ctx=0 if n_ctx == "auto" else int(n_ctx),
                    type_k=options["cache_type_k"],
                    type_v=options["cache_type_v"],
                    **local_types(options),
                    flash_attn=flash_attn,
                    n_threads=options["threads"],
                    n_gpu_layers=options["n_gpu_layers"],
                    progress=bar,
                    stop=stop,
                )
        except KeyboardInterrupt:
            bar.close()
            say("measuring was interrupted and nothing was saved; --calibrate never skips it")
            raise
    if auto.seconds is not None and auto.saving is not None:
        say(
            f"note: the model has no razor profile, so the full cache runs;"
            f" 'razor-local convert {command_word(model.path)}' measures one in about"
            f" {duration_text(auto.seconds)} ({cache_text(auto.saving, 'about ')})"
        )
    elif auto.tried:
        runs = "the full cache" if auto.found is None else "the profile below"
        say(f"note: {runs} runs: {auto.why}")
    if auto.found is None:
        return True
    say(f"profile: {auto.found}")
    return auto.found.profile
