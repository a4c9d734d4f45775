"""Types of command line options that several commands share."""

from __future__ import annotations

import functools
import math
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RazorError
from ..gguf.hyper_parameters import MAX_N_CTX
from ..model_setup import DEFAULT_MODEL as DEFAULT_MODEL
from ..plan import KV_TYPES, N_CTX_PAD
from ..printable import printable
from .terminal import ProgressBar, echo, say

if TYPE_CHECKING:
    from ..model_file import FoundProfile
    from ..model_file import ModelFile as ModelFileOnDisk
    from ..model_setup import ModelSetup
    from ..models import Download
    from ..models.names import ModelName
    from ..plan import Plan
    from ..profile import Profile

TYPED_MODEL = "razor_local.model"  # key of click's context
RPC_SERVERS = "razor_local.rpc"  # key of click's context: addresses of RPC servers


class Size(click.ParamType[int]):
    """A number of bytes such as 3G, 512M, 8GiB or 1500000000; G and GiB are 1024 MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?)(i?B)?", value.strip(), re.I)
        if match is None:
            self.fail(f"{value!r} is not a size, expected one like 3G or 512M", param, ctx)
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


class ContextSize(click.ParamType[int | str]):
    """A number of tokens such as 8192 or 32k, 0 for the trained length, or "auto"."""

    name = "tokens"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        if isinstance(value, int):
            return value
        if value == "auto":
            return "auto"
        n = _tokens(value)
        if n is None:
            self.fail(
                f"{value!r} is not a context size, expected a number such as 8192 or 32k, or auto",
                param,
                ctx,
            )
        return n


class Tokens(click.ParamType[int]):
    """A number of tokens such as 512, 32k or 1M (k = 1024)."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        n = _tokens(value)
        if n is None or n > MAX_N_CTX:
            self.fail(
                f"{value!r} is not a number of tokens, expected one like 512 or 32k", param, ctx
            )
        return n


def _tokens(text: str) -> int | None:
    """Parse a number of tokens such as 512 or 32k. Return None for any other text."""
    match = re.fullmatch(r"(\d{1,10})([kKmM]?)", text.strip())
    return None if match is None else int(match[1]) << {"k": 10, "m": 20}.get(match[2].lower(), 0)


class Number(click.FloatRange):
    """A finite number in a range; click's own lets nan through."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{value} is not a number", param, ctx)
        return super().convert(number, param, ctx)


class ListOf(click.ParamType[tuple[Any, ...]]):
    """Values of another type, separated by commas."""

    def __init__(self, item: click.ParamType[Any], name: str) -> None:
        self.item, self.name = item, name

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(self.item.convert(part.strip(), param, ctx) for part in value.split(","))


class Whole(click.IntRange):
    """A whole number in a range, which errors call an integer instead of an "integer range"."""

    name = "integer"


class GpuLayers(Whole):
    """A number of layers, or "all"."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, str) and not re.fullmatch(r"\s*[+-]?\d+\s*", value):
            if value != "all":
                self.fail(f"{value!r} is not a number of layers, or all", param, ctx)
            return -1
        return super().convert(value, param, ctx)


class OnOffAuto(click.Choice[str]):
    """On, off or auto. It also accepts 1, 0 and the other words that llama.cpp accepts."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        on, off = ("1", "true", "enabled"), ("0", "false", "disabled")
        value = "on" if value in on else "off" if value in off else value
        return super().convert(value, param, ctx)


class Prediction(click.ParamType[int | None]):
    """A number of tokens to generate; -1 becomes None."""

    name = "tokens"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        n = -1 if value is None else click.INT.convert(value, param, ctx)
        if n == 0 or n < -1:
            self.fail(f"{n} is not a number of tokens, or -1 for unlimited", param, ctx)
        return None if n == -1 else n


KV_TYPE = click.Choice(list(KV_TYPES))
SEED = Whole(-1, 2**31 - 1)  # -1: random
THREADS = Whole(1, 512)  # ggml ends the process above it


def _keep_servers(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    if value is not None:
        from ..native.rpc import parse_servers

        ctx.meta[RPC_SERVERS] = parse_servers(value)


@contextmanager
def _rpc_servers() -> Iterator[None]:
    """Offload layers of all models that the command loads to the servers of --rpc."""
    addresses = click.get_current_context().meta.get(RPC_SERVERS)
    if addresses is None:
        yield
        return
    from ..native.rpc import Servers

    with closing(Servers(addresses)) as servers, servers.in_use():
        yield


# for commands with model_argument()
RPC = click.option(
    "--rpc", metavar="HOST:PORT,...", expose_value=False, callback=_keep_servers,
    help="RPC servers that compute layers on other machines.",
)  # fmt: skip
N_GPU_LAYERS = click.option(
    "-ngl", "--n-gpu-layers", "--gpu-layers", type=GpuLayers(-1), default=-1, show_default=True,
    metavar="N",
    help="Layers to offload to GPUs and RPC servers (-1 or all: all). No effect if there are none.",
)  # fmt: skip
BATCH_SIZE = click.option(
    "-b", "--batch-size", type=Whole(1), default=512, show_default=True, metavar="N",
    help="Logical batch size: prompt tokens per call.",
)  # fmt: skip
UBATCH_SIZE = click.option(
    "-ub", "--ubatch-size", type=Whole(1), default=512, show_default=True, metavar="N",
    help="Physical batch size: prompt tokens per graph.",
)  # fmt: skip
CACHE_TYPE_K = click.option(
    "-ctk", "--cache-type-k", type=KV_TYPE, default="f16", show_default=True,
    help="Type of the K cache.",
)  # fmt: skip
CACHE_TYPE_V = click.option(
    "-ctv", "--cache-type-v", type=KV_TYPE, default="f16", show_default=True,
    help="Type of the V cache.",
)  # fmt: skip
CACHE_TYPE_LOCAL_K = click.option(
    "-ctlk", "--cache-type-local-k", type=KV_TYPE,
    help="Type of the K cache of local heads.  [default: same as -ctk]",
)  # fmt: skip
CACHE_TYPE_LOCAL_V = click.option(
    "-ctlv", "--cache-type-local-v", type=KV_TYPE,
    help="Type of the V cache of local heads.  [default: same as -ctv]",
)  # fmt: skip
REWIND = click.option(
    "--rewind", type=click.Choice(["auto", "disk", "ram", "off"]), default="auto",
    show_default=True,
    help="Where to keep what the cache drops, so that it can go back without evaluating again;"
    " auto: on disk, off if the cache is on a GPU.",
)  # fmt: skip
TEXT = click.option(
    "--text",
    type=click.Path(path_type=Path),
    required=True,
    metavar="PATH",
    help="UTF-8 text to read, or a folder of .txt files to read in turns, a window at a time.",
)
PREFILL = click.option(
    "--prefill", type=click.Choice(["auto", "full", "razor"]), default="auto", show_default=True,
    help="How to read prompts. full: with full attention; the cache is compressed afterwards."
    " razor: with the compressed cache, which is faster for long prompts but finds fewer facts."
    " auto: full, but razor on GPUs and for models with sliding windows or recurrent layers.",
)  # fmt: skip
REWIND_LIMIT = click.option(
    "--rewind-limit", type=Size(), metavar="SIZE",
    help="Maximum size of --rewind, such as 512M or 3G.  [default: 4G, at most 10 % of what is"
    " free]",
)  # fmt: skip
FLASH_ATTN = click.option(
    "-fa",
    "--flash-attn",
    type=OnOffAuto(["on", "off", "auto"]),
    default="on",
    show_default=True,
    help="Flash attention; auto: if the device of every layer can run it.",
)
CALIBRATE = click.option(
    "--calibrate",
    type=click.Choice(["auto", "now", "never"]),
    default="auto",
    show_default=True,
    help="Whether to first measure a model that has no razor profile; auto: if that takes less than"
    " two minutes.",
)


def flash_attention(
    choice: str,
    model: Path,
    type_k: str,
    type_v: str,
    type_v_local: str | None = None,
    n_gpu_layers: int = -1,
) -> bool:
    """Return whether a context uses flash attention, given the value of FLASH_ATTN.

    Raises:
        RazorError: the choice is auto, and llama.cpp refuses the model.
        OSError: as RazorError.
    """
    if choice != "auto":
        return choice == "on"
    from ..fit import DryModel

    with DryModel(model, n_gpu_layers=n_gpu_layers) as dry:
        return dry.flash_attention(type_k, type_v, type_v_local)


def report_kind(as_json: bool, output: Path | None) -> str:
    """Return "json" if --json or the name of the output asks for it, else "md"."""
    is_json = output is not None and output.suffix.lower() == ".json"
    return "json" if as_json or is_json else "md"


PROMPT_ALONE = "without MODEL before it, a prompt needs -p"


class ModelFile(click.ParamType["Path | ModelName"]):
    """A path of a GGUF file, or a name of a model; prefix: what is put before the name."""

    name = "model"

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | ModelName:
        if not isinstance(value, str):
            chosen: Path | ModelName = value  # the default
            return chosen
        from ..models import parse

        takes_prompt = ctx is not None and any(p.name == "prompt" for p in ctx.command.params)
        if takes_prompt and re.search(r"\s", value) and not value.endswith(".gguf"):
            if not Path(value).exists():
                self.fail(f"'{value}' is not a model; {PROMPT_ALONE}", param, ctx)
        try:
            return parse(self.prefix + value)
        except RazorError as error:
            hint = f"; {PROMPT_ALONE}" if takes_prompt and value.isalpha() else ""
            self.fail(f"{error}{hint}", param, ctx)


def model_argument(default: Path | None = None) -> Callable[[Any], Any]:
    """Add MODEL, -m and -hf to a command. Its function gets the path of the model.

    A named model that is not on this machine is downloaded before the function runs.

    Args:
        default: the path if no model is given
    """

    def add(command: Any) -> Any:
        @functools.wraps(command)
        def run(
            *args: Any,
            model: Path | ModelName | None,
            model_option: Path | ModelName | None,
            hf_repo: ModelName | None,
            **options: Any,
        ) -> Any:
            named = _one_model(model=model, model_option=model_option, hf_repo=hf_repo)
            if named is not None:
                click.get_current_context().meta[TYPED_MODEL] = str(named)
            with _rpc_servers():
                path = default if named is None else model_file(named)
                _note_changed(options)
                return command(*args, model=path, **options)

        run = click.option(
            "-hf", "--hf-repo", type=ModelFile("hf:"), metavar="OWNER/REPO[:QUANT]",
            help="Use a Hugging Face repository instead of MODEL.  [default quant: Q4_K_M]",
        )(run)  # fmt: skip
        run = click.option(
            "-m", "--model", "model_option", type=ModelFile(), metavar="MODEL",
            help="Another way to give MODEL.",
        )(run)  # fmt: skip
        return click.argument("model", type=ModelFile(), required=False)(run)

    return add


def _note_changed(options: dict[str, Any]) -> None:
    """Print notes on the options that this build ignores, and on a context that is rounded up."""
    ignored = {}
    if options.get("vram") is not None:
        ignored["vram"] = "counts as main memory"
    if options.get("n_gpu_layers") and _is_given("n_gpu_layers"):
        ignored["n_gpu_layers"] = "has no effect"
    if ignored:
        from ..native.loaded import C

        for name, effect in () if C.llama_supports_gpu_offload() else ignored.items():
            say(f"note: there is no GPU that this build can use, so {_written(name)} {effect}")
    if options.get("mlock"):
        from ..native.loaded import C

        if not C.llama_supports_mlock():
            say("note: this build cannot keep a model in RAM, so --mlock has no effect")
    n_ctx = options.get("ctx_size")
    if isinstance(n_ctx, int) and n_ctx % N_CTX_PAD and n_ctx < MAX_N_CTX:
        padded = -(-n_ctx // N_CTX_PAD) * N_CTX_PAD
        say(
            f"note: the context has {padded:,} tokens, because llama.cpp rounds {n_ctx:,} up to a"
            f" multiple of {N_CTX_PAD}"
        )


def _is_given(name: str) -> bool:
    """Return whether an option was given on the command line or in the environment."""
    source = click.get_current_context().get_parameter_source(name)
    return source not in (None, click.core.ParameterSource.DEFAULT)


def _written(name: str) -> str:
    """Return an option as it is written, or the environment variable that set it."""
    ctx = click.get_current_context()
    param = next(param for param in ctx.command.params if param.name == name)
    if ctx.get_parameter_source(name) is click.core.ParameterSource.ENVIRONMENT:
        return str(param.envvar)
    return param.opts[0]


def _one_model(**given: Path | ModelName | None) -> Path | ModelName | None:
    """Return the model that was given, on the command line or else in the environment."""
    ctx = click.get_current_context()
    params = {param.name: param for param in ctx.command.params}
    environment = click.core.ParameterSource.ENVIRONMENT
    found = {name: model for name, model in given.items() if model is not None}
    from_line = [name for name in found if ctx.get_parameter_source(name) is not environment]
    chosen = from_line or list(found)
    if len(chosen) > 1:
        shown = [
            str(params[name].opts[-1] if from_line else params[name].envvar) for name in chosen
        ]
        shown = ["MODEL" if name == "model" else name for name in shown]
        raise click.UsageError(f"{' and '.join(shown)} exclude each other")
    return found[chosen[0]] if chosen else None


def model_file(model: Path | ModelName) -> Path:
    """Return the path of a model, downloading it if it is not on this machine."""
    from ..models.local import find

    return model if isinstance(model, Path) else find(model) or download_model(model)


def download_model(model: ModelName) -> Path:
    """Download a model with a progress bar."""
    from ..models import download
    from ..models.hub import unfinished

    def announce(what: Download) -> None:
        license_name = f", license {what.license}" if what.license else ""
        line = f"{what.name} ({what.source}, {size_text(what.n_bytes)}{license_name})"
        echo(printable(f"downloading {line} to {what.folder}", one_line=True), err=True)

    with ProgressBar() as bar:
        try:
            return download(model, bar, announce)
        except KeyboardInterrupt:
            bar.close()
            if unfinished(model.repo):
                echo("Interrupted; run the same command again to continue.", err=True)
            raise


def note_damaged_profile(model: ModelFileOnDisk, found: FoundProfile | None) -> None:
    """Name the file in the profile cache on stderr that should be used and is damaged."""
    from .. import profile_cache

    if found is not None and found.source != "list":  # comes before the cache, or from it
        return
    path = profile_cache.damaged(model.shape)
    if path is not None:
        instead = f" or run 'razor-local convert {command_word(model.path)}'"
        remedy = "remove it" + (instead if path.is_file() else "")  # convert replaces files alone
        echo(printable(f"note: the profile {path} is damaged; {remedy}", one_line=True), err=True)


def command_word(path: Path) -> str:
    """Return MODEL as it was typed, for use in a command; the path if that is unknown."""
    ctx = click.get_current_context(silent=True)
    return shlex.quote(str(path if ctx is None else ctx.meta.get(TYPED_MODEL, path)))


def cache_text(plan: Plan, about: str = "") -> str:
    """Return the size of a KV cache with and without razor. about: text before the first size."""
    size, full = size_text(plan.kv_bytes), size_text(plan.kv_bytes_full)
    return (
        f"KV cache at {plan.n_ctx:,} tokens: {about}{size} instead of {full}"
        f" (-{1 - plan.share:.0%})".replace("%", " %")
    )


def say_tuned(profile: Profile | None, plan: Plan | None) -> None:
    """Print the measurements of a tuned profile, and a note if the plan runs differently."""
    from ..profile import tune_line, tune_note

    if profile is None or plan is None or not plan.active:
        return
    for line in (tune_line(profile), tune_note(profile, plan)):
        if line is not None:
            say(line if line.startswith("note") else f"tuned: {line}")


def duration_text(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours, for example "3 minutes"."""
    for unit, length in (("hour", 3600), ("minute", 60), ("second", 1)):
        if seconds >= 1.5 * length or length == 1:
            n = max(round(seconds / length), 1)
            return f"{n} {unit}{'s' if n > 1 else ''}"
    raise AssertionError


def size_text(n_bytes: int) -> str:
    """A number of bytes in GiB or MiB."""
    return f"{n_bytes / 2**30:.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"


def count_text(n: int, noun: str) -> str:
    """Return a number with its noun, such as "1 message" or "2 messages"."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def write_report(text: str, output: Path | None) -> None:
    """Write a report of what was measured to a file, or to stdout if output is None.

    Where the file cannot be written the report goes to stdout, and the error is raised.
    """
    from ..common.markdown import save_text

    text = text.encode("utf-8", "replace").decode()  # names of files can be other bytes
    try:
        if output is not None:
            return save_text(text, output)
    except (RazorError, OSError):
        echo(text, nl=False)
        raise
    echo(text, nl=False)


def model_setup(model: Path, options: dict[str, Any]) -> ModelSetup:
    """Return the setup of a model.

    Args:
        options: sidecar, budget, window_min, window_divisor, sinks, threads and n_gpu_layers, which
            bench and eval share, rpc of bench, and prefill of eval.
    """
    from ..common.machine import n_cores
    from ..model_setup import ModelSetup

    return ModelSetup(
        model=str(model),
        sidecar=str(options["sidecar"]) if options["sidecar"] else None,
        retrieval=options["budget"],
        window_min=options["window_min"],
        window_divisor=options["window_divisor"],
        sink_tokens=options["sinks"],
        n_threads=options["threads"] or n_cores(),
        n_gpu_layers=options["n_gpu_layers"],
        rpc=options.get("rpc"),
        prefill=options.get("prefill", "auto"),
    )
