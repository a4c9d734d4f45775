"""razor-local convert: write a razor profile into a copy of a model, or into a sidecar."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .interrupt import stop_on_interrupt
from .params import (
    DEFAULT_MODEL,
    THREADS,
    GpuLayers,
    Number,
    Size,
    Tokens,
    cache_text,
    command_word,
    duration_text,
    model_argument,
)
from .parser import Command
from .terminal import ProgressBar, echo

if TYPE_CHECKING:
    from ..evals.haystack import Haystack
    from ..model_file import ModelFile
    from ..model_shape import ModelShape
    from ..profile import Profile
    from ..scores import Scores

PATH = click.Path(path_type=Path)
LENGTHS = (8192, 32768)  # contexts whose KV cache size is shown, in tokens

EPILOG = """
\b
Examples:
  razor-local convert model.gguf
  razor-local convert model.gguf -o model-razor.gguf
  razor-local convert model.gguf -o model-razor.gguf --budget 0.25 --save-scores scores.json
  razor-local convert model.gguf -o model-razor.gguf --select paper --no-proof
  razor-local convert model.gguf -o model.razor.gguf --scores scores.json --sidecar
  razor-local convert model.gguf -o model-razor.gguf --heads heads.tsv
  razor-local convert model.gguf -o model-razor.gguf --heads gates.tsv --budget 0.25
  razor-local convert model.gguf -o model-razor.gguf --scopes scopes.tsv
  razor-local convert model.gguf -o model-razor.gguf --scope-by score -c 32768
  razor-local convert bloom.gguf -o bloom-razor.gguf --epsilon 0.01
"""

# all that says how heads are measured or chosen, or what is kept beside their scopes
NOT_FOR_ALIBI = (
    "heads", "select", "induction", "echo", "budget", "scores", "save_scores", "tokens", "repeats",
    "seed", "max_memory", "threads", "n_gpu_layers", "haystack", "no_proof", "sinks", "window_min",
    "window_divisor", "no_compensation", "scopes", "scope_by", "ctx_size",
)  # fmt: skip


@click.command(cls=Command, epilog=EPILOG)
@model_argument(DEFAULT_MODEL)
@click.option(
    "-o",
    "--output",
    type=PATH,
    help="File to write.  [default: a sidecar in the profile cache, which all commands use]",
)
@click.option(
    "--heads",
    type=PATH,
    help="Use a published head list instead of measuring: 0/1 table, DuoAttention gates,"
    " Retrieval_Head or HeadKV JSON.",
)
@click.option(
    "--select",
    type=click.Choice(["score", "paper"]),
    help="How to choose heads. score: every head that stands out by its scores; paper: the shares"
    " of the RazorAttention paper (14 % by induction score, 1 % by echo score).  [default: score]",
)
@click.option(
    "--induction",
    type=Number(0, 1),
    metavar="SHARE",
    help="Share of KV heads to take by induction score; implies --select paper.  [default: 0.14]",
)
@click.option(
    "--echo",
    type=Number(0, 1),
    metavar="SHARE",
    help="Share of KV heads to take by echo score; implies --select paper.  [default: 0.01]",
)
@click.option(
    "--budget",
    "--retrieval",
    "budget",
    type=Number(0, 1),
    metavar="SHARE",
    help="Share of the KV heads to take, those with the highest scores.",
)
@click.option(
    "--scores",
    type=PATH,
    help="Use the scores in this file (from --save-scores) instead of measuring.",
)
@click.option("--save-scores", type=PATH, help="Write the measured scores to this JSON file.")
@click.option(
    "--tokens",
    type=int,
    help="Number of random tokens per repetition.  [default: 2500, or as many as fit the trained"
    " context]",
)
@click.option("--repeats", type=int, help="Number of repetitions.  [default: 4]")
@click.option("--seed", type=int, help="Seed of the random tokens.  [default: 0]")
@click.option(
    "--max-memory",
    type=Size(),
    help="Maximum memory for measuring, without the model.  [default: 3G]",
)
@click.option(
    "-t",
    "--threads",
    type=THREADS,
    metavar="N",
    help="Number of CPU threads for measuring and for planted facts.",
)
@click.option(
    "-ngl",
    "--n-gpu-layers",
    "--gpu-layers",
    type=GpuLayers(-1),
    metavar="N",
    help="Layers to offload to the GPU for measuring and for planted facts (-1 or all: all)."
    "  [default: -1]",
)
@click.option(
    "--haystack",
    type=PATH,
    metavar="DIR",
    help="Folder of .txt files to plant the facts in.  [default: generated sentences]",
)
@click.option("--no-proof", is_flag=True, help="Skip the test with planted facts.")
@click.option(
    "--scopes",
    type=PATH,
    help="Read how many tokens each KV head keeps from this file: a row per layer and a column per"
    " KV head, 0 for retrieval heads.",
)
@click.option(
    "--scope-by",
    type=click.Choice(["score"]),
    help="Give each local head a window of its own that grows with its score, at no more memory"
    " than one window for all.",
)
@click.option(
    "-c",
    "--ctx-size",
    type=Tokens(),
    metavar="N",
    help="Context size for which --scope-by chooses the windows.  [default: the trained length]",
)
@click.option(
    "--epsilon",
    type=Number(0, 1, min_open=True, max_open=True),
    help="For ALiBi models: maximum attention to any token beyond a head's scope."
    "  [default: 0.001]",
)
@click.option("--sidecar", is_flag=True, help="Write the profile alone, without the model.")
@click.option(
    "--sink-tokens", "--sinks", "sinks", type=int, default=4, show_default=True, help="Sink tokens."
)
@click.option(
    "--window-min", type=int, default=4000, show_default=True, help="Minimum window in tokens."
)
@click.option(
    "--window-divisor",
    type=int,
    default=5,
    show_default=True,
    help="The window is at least the context size divided by this (0: use only --window-min).",
)
@click.option("--no-compensation", is_flag=True, help="Drop tokens instead of averaging them.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
def convert(
    model: Path,
    output: Path | None,
    heads: Path | None,
    epsilon: float | None,
    sidecar: bool,
    sinks: int,
    window_min: int,
    window_divisor: int,
    no_compensation: bool,
    force: bool,
    scopes: Path | None,
    scope_by: str | None,
    ctx_size: int | None,
    **measuring: Any,
) -> None:
    """Make a razor profile for MODEL, so that its KV cache takes less memory.

    Without -o, the profile goes to the profile cache, where all commands find it. With -o, it goes
    into a copy of MODEL, or with --sidecar into a small separate file.

    Without a head list or scores, convert measures the heads: the model reads random tokens several
    times over, and the heads that attend to the earlier copies become retrieval heads. It then
    plants facts in a text. If razor misses facts that the full cache finds, convert adds heads and
    removes others.

    ALiBi models are not measured: the weights determine how far back each head can attend.

    The tensors of the copy are byte-identical to the model's.
    """
    _check_options(heads, measuring)
    _check_scope_options(scopes, scope_by, heads, ctx_size)
    from .. import profile_cache
    from ..common.files import check_outputs
    from ..converters.heads import profile_from_heads, profile_from_scopes
    from ..converters.write import check_output, write_copy, write_sidecar
    from ..errors import ConvertError, NoProfileError, UnsupportedError
    from ..model_file import ModelFile
    from ..model_shape import unsupported_feature
    from ..profile import MAX_WINDOW, check_parameters, facts_line, scopes_text
    from ..scores import check_scopes_by_score, with_scopes_by_score

    into_cache = output is None
    options: dict[str, Any] = {
        "sink_tokens": sinks,
        "window_min": window_min,
        "window_divisor": window_divisor,
    }
    # refuse wrong options before anything is measured
    check_parameters(**options)
    file = ModelFile(model)
    shape = file.shape
    alibi = shape.max_alibi_bias > 0
    measured = _Measured()
    _check_method(shape, alibi, epsilon)
    options["compensation"] = not no_compensation
    if scope_by is not None:
        check_scopes_by_score(shape, ctx_size or shape.n_ctx_train, **options)
    if output is None:
        output = cache_path(file)
        force = True  # replace an earlier measurement
    texts = measuring["haystack"].glob("*.txt") if measuring["haystack"] is not None else ()
    check_outputs([output, measuring["save_scores"]], [heads, scopes, measuring["scores"], *texts])
    check_output(file, output, force, sidecar or into_cache)
    haystack = None
    if measuring["haystack"] is not None:
        from ..evals.haystack import FolderText

        haystack = FolderText(measuring["haystack"])
    feature = unsupported_feature(file.header, shape)
    if feature:
        raise UnsupportedError(f"{file}: the model has {feature}, which razor does not support")
    if alibi:
        profile = _profile_from_weights(file, epsilon)
    elif scopes is not None:
        profile = profile_from_scopes(
            scopes, shape, sink_tokens=sinks, compensation=not no_compensation
        )
    else:
        if heads is not None:
            profile = profile_from_heads(heads, shape, budget=measuring["budget"], **options)
            if "ties" in profile.calibration:
                echo(
                    f"Note: took {profile.calibration['ties']}, spread evenly over the layers.",
                    err=True,
                )
        else:
            if measuring["save_scores"] is not None:
                check_output(file, measuring["save_scores"], force, sidecar=True)
            if into_cache and measuring["scores"] is None:
                _announce(file, measuring)
            profile = _profile_from_scores(file, measuring | {"force": force}, options, measured)
        try:
            profile = _prove(file, profile, measuring, haystack)
        except NoProfileError as error:
            if into_cache and _is_default():
                profile_cache.write_note(shape, profile_cache.Note(why=str(error)))
            raise ConvertError(
                f"{model}: {error}, so no profile was written; run the model with its full cache,"
                " or force a choice with --budget 0.15"
            ) from error
        if scope_by is not None:
            with measured.kept_if_it_fails():
                profile = with_scopes_by_score(profile, shape, ctx_size or shape.n_ctx_train)
    with measured.kept_if_it_fails():
        if into_cache:
            from ..auto_profile import save_profile

            save_profile(file, profile)
        elif sidecar:
            write_sidecar(file, output, profile, force)
        else:
            with ProgressBar() as bar:
                output = write_copy(file, output, profile, force, bar)
    if alibi:
        from ..converters.head_map import scope_line

        echo(f"{output}: {scope_line(profile, shape.n_ctx_train or MAX_WINDOW)}")
    else:
        n_retrieval, n_heads = int(profile.flat().sum()), sum(shape.n_head_kv)
        has_scopes = profile.scope is not None and n_retrieval < n_heads
        echo(
            f"{output}: {n_retrieval} of {n_heads} KV heads are retrieval heads"
            f" ({n_retrieval / max(n_heads, 1):.1%})"
            + (f", the others have {scopes_text(profile)}" if has_scopes else "")
        )
    proof = facts_line(profile)
    if proof is not None:
        echo(proof[0].upper() + proof[1:])
    _print_sizes(shape, profile)
    next_model = command_word(file.path) if into_cache or sidecar else shlex.quote(str(output))
    if sidecar and not into_cache and output != file.sidecar_path:
        next_model += f" --sidecar {shlex.quote(str(output))}"
    echo(f"Next: razor-local chat {next_model}")
    if measured.failed:
        click.get_current_context().exit(1)


def cache_path(file: ModelFile) -> Path:
    """Return the path in the profile cache. Raises ConvertError if it would not be used."""
    from .. import profile_cache
    from ..errors import ConvertError

    why = None
    if file.profile is not None:
        why = f"{file} has a profile of its own, which comes first"
    elif file.sidecar_path.is_file():
        why = f"{file.sidecar_path} comes first"
    if why is not None:
        raise ConvertError(
            f"a profile in the profile cache would not be used, because {why}; name an output file"
            " with -o"
        )
    profile_cache.make_folder()
    return profile_cache.path_of(file.shape)


def _is_default() -> bool:
    """Return whether the heads are measured and tested as auto_profile() does it."""
    ctx = click.get_current_context()
    free = ("threads", "n_gpu_layers", "save_scores")  # change nothing in the result
    return all(
        ctx.get_parameter_source(name) is click.core.ParameterSource.DEFAULT
        for name in NOT_FOR_ALIBI
        if name not in free
    )


def _check_options(heads: Path | None, given: dict[str, Any]) -> None:
    """Refuse options that would be ignored."""
    measure = ("tokens", "repeats", "seed", "max_memory", "save_scores")
    unmeasured = heads is not None or given["scores"] is not None
    run = ("threads", "n_gpu_layers") if unmeasured else ()
    for source, name, excluded in (
        (heads, "heads", (*measure, "select", "induction", "echo", "scores")),
        (given["scores"], "scores", measure),
        (given["budget"], "budget", ("select", "induction", "echo")),
        (given["no_proof"] or None, "no-proof", ("haystack", *run)),
    ):
        for other in excluded if source is not None else ():
            if given[other] is not None:
                raise click.UsageError(
                    f"--{name} and --{other.replace('_', '-')} exclude each other"
                )
    if given["select"] == "score":
        for name in ("induction", "echo"):
            if given[name] is not None:
                raise click.UsageError(
                    f"--{name} is a share of the paper's choice; leave --select score out"
                )


def _check_scope_options(
    scopes: Path | None, scope_by: str | None, heads: Path | None, ctx_size: int | None
) -> None:
    """Refuse options that would be ignored."""
    ctx = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    excluded: tuple[str, ...] = ()
    if scopes is not None:  # the file determines the scope of each head
        kept = ("scopes", "epsilon", "sinks", "no_compensation")
        excluded = tuple(name for name in (*NOT_FOR_ALIBI, "ctx_size") if name not in kept)
    for name in excluded:
        if ctx.get_parameter_source(name) is not default:
            raise click.UsageError(f"--scopes and --{name.replace('_', '-')} exclude each other")
    if scope_by is not None and heads is not None:
        raise click.UsageError(
            "--scope-by and --heads exclude each other: head lists hold no scores of all heads"
        )
    if ctx_size is not None and scope_by is None:
        raise click.UsageError("--ctx-size needs --scope-by")


def _check_method(shape: ModelShape, alibi: bool, epsilon: float | None) -> None:
    """Refuse options that do not apply to the model."""
    if not alibi:
        if epsilon is not None:
            raise click.UsageError(
                f"--epsilon applies only to ALiBi models; this model is {shape.arch}"
            )
        return
    ctx = click.get_current_context()
    for name in NOT_FOR_ALIBI:
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--{name.replace('_', '-')} does not apply to an ALiBi model ({shape.arch}), whose"
                " scopes follow from the weights and --epsilon"
            )


def _profile_from_weights(model: ModelFile, epsilon: float | None) -> Profile:
    from ..converters.alibi import DEFAULT_EPSILON, profile_from_weights

    with ProgressBar() as bar:
        return profile_from_weights(
            model, epsilon=DEFAULT_EPSILON if epsilon is None else epsilon, progress=bar
        )


class _Measured:
    """Measured scores, and whether they are saved.

    Attributes:
        saved: whether a file holds them.
        failed: whether they could not be written to the requested file.
    """

    scores: Scores | None = None
    saved = False
    failed = False

    def save(self, path: Path, replace: bool) -> None:
        """Save the scores. If that fails, save them elsewhere, and the conversion continues."""
        from ..errors import RazorError
        from ..scores import save_scores

        assert self.scores is not None  # they are measured before they are saved
        try:
            save_scores(self.scores, path, replace)
            self.saved = True
        except (RazorError, OSError) as error:
            self.failed = True
            reason = error.strerror if isinstance(error, OSError) else error
            self._keep(f"{path} could not be written ({reason})")

    @contextmanager
    def kept_if_it_fails(self) -> Iterator[None]:
        """Save the scores if the block raises an error and no file holds them yet."""
        from ..errors import RazorError

        try:
            yield
        except (RazorError, OSError):
            if self.scores is not None and not self.saved:
                self._keep("the output could not be written")
            raise

    def _keep(self, why: str) -> None:
        import tempfile

        from ..errors import RazorError
        from ..scores import save_scores

        assert self.scores is not None
        name = None
        try:
            fd, name = tempfile.mkstemp(prefix="razor-scores-", suffix=".json")
            os.close(fd)
            save_scores(self.scores, name)
        except (RazorError, OSError):
            if name is not None:
                os.unlink(name)
            echo(f"Note: {why}; the measured scores are lost.", err=True)
            return
        self.saved = True
        echo(
            f"Note: {why}; the measured scores were saved to {name} (pass it with --scores).",
            err=True,
        )


def _profile_from_scores(
    model: ModelFile,
    given: dict[str, Any],
    options: dict[str, Any],
    measured: _Measured,
) -> Profile:
    from ..scores import ECHO, INDUCTION, load_scores, profile_from_scores

    shares = {n: given[n] for n in ("induction", "echo", "budget") if given[n] is not None}
    if given["select"] == "paper":
        shares = {"induction": INDUCTION, "echo": ECHO} | shares
    if given["scores"] is not None:
        scores = load_scores(given["scores"])
        scores.check_model(model.shape)
    else:
        scores = measured.scores = _measure(model, given)
        if given["save_scores"] is not None:
            measured.save(given["save_scores"], given["force"])
    return profile_from_scores(scores, **shares, **options)


def _prove(
    model: ModelFile, profile: Profile, given: dict[str, Any], haystack: Haystack | None
) -> Profile:
    """Test the heads on planted facts, see auto_profile.prove_profile()."""
    from ..auto_profile import prove_profile

    options = _measuring_options(given)
    with ProgressBar() as bar, stop_on_interrupt() as stop:
        return prove_profile(
            model,
            profile,
            skip=given["no_proof"],
            haystack=haystack,
            note=lambda sentence: echo(f"Note: {sentence}", err=True),
            progress=bar,
            stop=stop,
            **options,
        )


def _measure(model: ModelFile, given: dict[str, Any]) -> Scores:
    from ..converters.calibrate import calibrate

    options = _measuring_options(given, "tokens", "repeats", "seed", "max_memory")
    with ProgressBar() as bar, stop_on_interrupt() as stop:
        return calibrate(model, progress=bar, stop=stop, **options)


def _announce(model: ModelFile, given: dict[str, Any]) -> None:
    """Show how long measuring will take."""
    from ..auto_profile import estimate_seconds

    options = _measuring_options(given, "tokens", "repeats", "max_memory")
    with ProgressBar() as bar, stop_on_interrupt() as stop:
        seconds = estimate_seconds(
            model, proof=not given["no_proof"], progress=bar, stop=stop, **options
        )
    echo(f"Measuring the heads takes about {duration_text(seconds)}.", err=True)


def _measuring_options(given: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the given options of these names and those of the machine."""
    names_there = {"threads": "n_threads", "n_gpu_layers": "n_gpu_layers"} | {n: n for n in names}
    return {to: given[name] for name, to in names_there.items() if given[name] is not None}


def _print_sizes(shape: ModelShape, profile: Profile) -> None:
    """Print what the profile saves at 8k, 32k and the trained length."""
    from ..errors import UnsupportedError
    from ..plan import make_plan

    trained = shape.n_ctx_train
    sizes = {n for n in LENGTHS if n <= (trained or n)} | ({trained} if trained else set())
    for n_ctx in sorted(sizes):
        try:
            plan = make_plan(shape, profile, n_ctx, "f16", "f16")
        except UnsupportedError:
            return
        nothing = f"KV cache at {n_ctx:,} tokens: RazorAttention saves nothing"
        echo(cache_text(plan) if plan.active else nothing)
