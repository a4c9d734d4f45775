"""razor-local eval: measure what compression costs in quality, policies side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import RazorError
from .interrupt import stop_on_interrupt
from .params import (
    DEFAULT_MODEL,
    N_GPU_LAYERS,
    PREFILL,
    RPC,
    TEXT,
    THREADS,
    ListOf,
    Number,
    Tokens,
    model_argument,
    model_setup,
    report_kind,
    write_report,
)
from .parser import Group
from .terminal import ProgressBar, echo, progress_of_run

if TYPE_CHECKING:
    from ..common.journal import Journal
    from ..evals.policies import Policy
    from ..evals.questions import Sample
    from ..evals.report import Report
    from ..model_shape import ModelShape

PATH = click.Path(path_type=Path)
MAX_LENGTH = 32768  # of the default lengths

POLICIES_HELP = """
\b
Policies (--policies). A name can end in a KV type (razor-q8_0), one for K and
one for V (full-q8_0/q4_0), or one for retrieval heads and one for local heads
(razor-f16+q8_0). A window in tokens can follow (razor:1024, razor-q8_0:1024):
  full           llama.cpp's own cache
  exact          a full cache with razor_local's attention, which is exact on CPUs
  razor          the profile; razor@0.1: another share of retrieval heads
  razor-no-comp  the same without compensation tokens
  local          every KV head local, with compensation
  streaming      every KV head local, without compensation
  random-heads   as many random retrieval heads; random-heads=3: by another seed
  heads=FILE     the heads of another profile, sidecar, head list or file of scores

\b
Examples:
  razor-local eval needle
  razor-local eval ruler model-razor.gguf --policies full,razor,razor-q8_0
"""


@click.group("eval", cls=Group, epilog=POLICIES_HELP)
def eval() -> None:
    """Measure what compression costs in quality.

    Several KV cache policies answer the same questions on the same weights. Every score is shown
    with the bytes of its cache and a 95 % confidence interval. Without MODEL, the built-in model is
    measured.
    """


def _options(what: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def add(command: Any) -> Any:
        for option in reversed(what):
            command = option(command)
        return command

    return add


_MODEL_OPTIONS = (
    click.option(
        "--policies",
        type=ListOf(click.STRING, "name,..."),
        multiple=True,
        help="Policies to compare; differences are relative to the first.  [default: all except"
        " exact and heads=FILE, with full and razor in f16, q8_0 and q4_0; with --budget: full,"
        " razor and local]",
    ),
    click.option(
        "--budget",
        "budgets",
        type=ListOf(Number(0, 1), "share,..."),
        multiple=True,
        help="Also run each razor policy with these shares of retrieval heads, such as"
        " 0.05,0.1,0.15,0.2,0.3.",
    ),
    click.option("--sidecar", type=PATH, help="Sidecar with the profile of the model."),
    click.option(
        "--retrieval",
        "budget",
        type=Number(0, 1),
        metavar="SHARE",
        help="Share of retrieval heads, chosen by the scores in the profile.  [default: the"
        " profile's]",
    ),
    click.option(
        "--window-min",
        type=int,
        metavar="N",
        help="Minimum window in tokens.  [default: the profile's]",
    ),
    click.option(
        "--window-divisor", type=int, metavar="N", help="Window divisor.  [default: the profile's]"
    ),
    click.option(
        "--sink-tokens",
        "--sinks",
        "sinks",
        type=int,
        metavar="N",
        help="Number of sink tokens.  [default: the profile's]",
    ),
    N_GPU_LAYERS,
    RPC,
    click.option(
        "-t",
        "--threads",
        type=THREADS,
        metavar="N",
        help="Number of CPU threads.  [default: physical cores]",
    ),
    click.option(
        "-s",
        "--seed",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Seed for texts, questions and random heads.",
    ),
    click.option(
        "--resume",
        type=PATH,
        metavar="JOURNAL",
        help="Journal of finished answers; answers already in it are not computed again.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    click.option(
        "-o",
        "--output",
        type=PATH,
        help="Write the report to this file, not to stdout; as JSON if its name ends in .json.",
    ),
)
_HEAT = click.option(
    "--plot", type=PATH, metavar="PICTURE", help="Draw scores as a heat map (.png, .svg, .pdf)."
)
_CURVE = click.option(
    "--plot-curve",
    type=PATH,
    metavar="PICTURE",
    help="Draw quality over bytes of the cache (.png, .svg, .pdf).",
)
_LENGTHS = click.option(
    "-c",
    "--ctx-size",
    "--lengths",
    "lengths",
    type=ListOf(Tokens(), "tokens,..."),
    multiple=True,
    help="Context sizes, filled with text except for the answers, such as 1k,2k,4k."
    "  [default: 1k, 2k, 4k, ... up to the trained length or 32k]",
)
_HAYSTACK = click.option(
    "--haystack",
    type=PATH,
    metavar="DIR",
    help="Folder of .txt files to hide the facts in.  [default: generated sentences]",
)
_PREFILL_OF_PROMPT = click.option(
    "--prefill",
    type=click.Choice(["auto", "full", "razor"]),
    default="auto",
    show_default=True,
    help="How to read prompts; needs --prompt. full: with full attention; the cache is compressed"
    " afterwards. razor: with the compressed cache. auto: full, but razor on GPUs and for models"
    " with sliding windows or recurrent layers.",
)
_PREDICT = click.option(
    "-n",
    "--predict",
    type=click.IntRange(1),
    metavar="N",
    help="Maximum tokens per answer; reasoning models need more.",
)


NEEDLE_EPILOG = """
\b
Examples:
  razor-local eval needle
  razor-local eval needle model-razor.gguf -c 4k,8k,16k --haystack books --plot heat.png
  razor-local eval needle model-razor.gguf --kinds single --samples 20 --resume run.jsonl
  razor-local eval needle model-razor.gguf --budget 0.05,0.1,0.15,0.2,0.3 --plot-curve curve.png
  razor-local eval needle model-razor.gguf --policies full,razor-q8_0,heads=other.tsv --json
"""


@eval.command(epilog=NEEDLE_EPILOG)
@model_argument()
@_LENGTHS
@click.option(
    "--depths",
    type=ListOf(Number(0, 100), "percent,..."),
    default="0,25,50,75,100",
    show_default=True,
    help="Depths of the fact, in percent of the text.",
)
@click.option(
    "--kinds",
    type=ListOf(click.STRING, "kind,..."),
    default="single,reworded,keys,values,questions",
    show_default=True,
    help="Kinds of questions. single: one fact; reworded: one fact, asked in other words; keys: one"
    " of several facts; values: all of several numbers; questions: several facts, one after the"
    " other.",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    metavar="N",
    help="Texts per length, depth and kind.",
)
@click.option(
    "--facts",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    metavar="N",
    help="Facts in a text of keys and questions.",
)
@_HAYSTACK
@_PREDICT
@PREFILL
@_options(_MODEL_OPTIONS)
@_HEAT
@_CURVE
def needle(model: Path | None, **options: Any) -> None:
    """Ask for facts hidden at several lengths and depths of a text."""
    from ..evals.needle import MAX_TOKENS, NeedleSettings, make_samples, score
    from ..evals.questions import Prompts

    run = _Run(model, options)
    settings = NeedleSettings(
        lengths=run.lengths(),
        depths=tuple(dict.fromkeys(options["depths"])),
        kinds=tuple(dict.fromkeys(options["kinds"])),
        samples=options["samples"],
        facts=options["facts"],
        max_tokens=options["predict"] or MAX_TOKENS,
        seed=options["seed"],
    )
    haystack = _haystack(options)
    with run.progress() as bar:
        samples = make_samples(settings, haystack, Prompts(run.setup.file), bar)
        described = {
            "tasks": settings.kinds,
            "depths": settings.depths,
            "samples": settings.samples,
            "facts": settings.facts,
            "max_tokens": settings.max_tokens,
        }
        report = run.ask("needle", samples, score, bar, described | _describe_haystack(haystack))
    run.finish(report)


RULER_EPILOG = """
\b
Examples:
  razor-local eval ruler model-razor.gguf -c 4k,8k,16k --resume run.jsonl
  razor-local eval ruler model-razor.gguf --tasks vt,cwe,fwe --samples 50 -o ruler.json
  razor-local eval ruler model-razor.gguf --budget 0.05,0.1,0.2,0.3 --plot-curve curve.png
"""


@eval.command(epilog=RULER_EPILOG)
@model_argument()
@_LENGTHS
@click.option(
    "--tasks",
    type=ListOf(click.STRING, "task,..."),
    metavar="TASK,...",
    help="niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, niah_multiquery, vt, cwe, fwe."
    "  [default: all]",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    metavar="N",
    help="Texts per length and task.",
)
@_HAYSTACK
@_PREDICT
@PREFILL
@_options(_MODEL_OPTIONS)
@_HEAT
@_CURVE
def ruler(model: Path | None, **options: Any) -> None:
    """Run the synthetic tasks of RULER.

    Needles, variable tracking, and common and frequent words, with razor-local's own generators.
    """
    from ..evals.questions import Prompts
    from ..evals.ruler import TASKS, RulerSettings, make_samples, score

    run = _Run(model, options)
    settings = RulerSettings(
        lengths=run.lengths(),
        tasks=tuple(dict.fromkeys(options["tasks"] or TASKS)),
        samples=options["samples"],
        max_tokens=options["predict"],
        seed=options["seed"],
    )
    haystack = _haystack(options)
    with run.progress() as bar:
        samples = make_samples(settings, haystack, Prompts(run.setup.file), bar)
        described = {
            "tasks": settings.tasks,
            "samples": settings.samples,
            "max_tokens": settings.max_tokens,
        }
        report = run.ask("ruler", samples, score, bar, described | _describe_haystack(haystack))
    run.finish(report)


PERPLEXITY_EPILOG = """
\b
Examples:
  razor-local eval perplexity --text book.txt
  razor-local eval perplexity model-razor.gguf --text book.txt -c 8k --prompt 7k
  razor-local eval perplexity model-razor.gguf --text book.txt -c 16k --plot positions.png
  razor-local eval perplexity model-razor.gguf --text books --windows 8 -c 8k --prompt 7k \\
      --policies={full,razor}-{f16,q8_0,q4_0} --plot-curve kl.png
"""


@eval.command(epilog=PERPLEXITY_EPILOG)
@model_argument()
@TEXT
@click.option(
    "-c",
    "--ctx-size",
    type=Tokens(),
    default=0,
    metavar="TOKENS",
    help="Window size in tokens.  [default: trained length, up to 8k]",
)
@click.option(
    "--stride",
    type=Tokens(),
    metavar="TOKENS",
    help="Distance between windows in tokens; in overlapping windows, repeated tokens only give"
    " context.  [default: the window size]",
)
@click.option("--windows", type=click.IntRange(1), metavar="N", help="Maximum number of windows.")
@click.option(
    "--prompt",
    type=Tokens(),
    metavar="TOKENS",
    help="Read the first tokens of each window as a prompt, and measure only the tokens after it,"
    " like an answer.  [default: no prompt; the compressed cache reads every token]",
)
@_PREFILL_OF_PROMPT
@_options(_MODEL_OPTIONS)
@click.option(
    "--plot",
    type=PATH,
    metavar="PICTURE",
    help="Draw the KL divergence by position (.png, .svg, .pdf).",
)
@_CURVE
def perplexity(model: Path | None, text: Path, **options: Any) -> None:
    """Measure perplexity, KL divergence and planted facts.

    The divergence is from the full f16 cache, by position in the context. Neither measure shows
    lost facts, so each policy is also asked for facts planted in a second text that fills the
    context.

    With --prompt, each window resembles a chat: --prefill sets how the prompt is read, and the
    tokens after it are predicted from the compressed cache, like an answer.
    """
    from ..evals.perplexity import (
        context_size,
        describe_text,
        read_text,
        run_facts,
        run_perplexity,
        text_files,
    )
    from ..evals.perplexity_report import (
        PerplexityReport,
        format_report,
        plot_curve,
        plot_positions,
    )
    from ..evals.run import describe_run, open_journal

    prompt = options["prompt"] or 0
    source = click.get_current_context().get_parameter_source("prefill")
    if not prompt and source is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError(
            "--prefill needs --prompt TOKENS: without a prompt, the compressed cache reads every"
            " token"
        )
    run = _Run(model, options, [text, *text_files(text)])
    n_ctx = context_size(run.shape, options["ctx_size"])
    stride = options["stride"] or n_ctx
    described = {"prompt": prompt} if prompt else {}
    with run.progress() as bar:
        bar(0, 1, "reading the text")
        content = read_text(run.setup, text)
        windows = content.windows(n_ctx, stride, options["windows"], prompt)
        head = describe_run(
            "perplexity",
            run.setup,
            run.shape,
            run.policies,
            seed=options["seed"],
            **describe_text(content, text),
            n_ctx=n_ctx,
            stride=stride,
            n_windows=len(windows),
            **described,
        )
        with open_journal(options["resume"], head) as journal, stop_on_interrupt() as stop:
            run_perplexity(
                run.setup, run.shape, run.policies, content, windows, n_ctx, journal, head, bar,
                stop, prompt,
            )  # fmt: skip
            prefill = options["prefill"] if prompt else "razor"
            try:
                run_facts(run.setup, run.shape, run.policies, n_ctx, journal, bar, stop, prefill)
            except RazorError as error:  # all windows are read
                echo(f"Note: no facts were planted: {error}.", err=True)
    assert journal.head is not None
    report = PerplexityReport(journal.head, journal.records)
    run.write(format_report(report, run.kind))
    if options["plot"] is not None:
        plot_positions(report, options["plot"])
    if options["plot_curve"] is not None:
        plot_curve(report, options["plot_curve"])


LONGBENCH_EPILOG = """
\b
Examples:
  razor-local eval longbench model-razor.gguf --data LongBench/data -c 32k --resume run.jsonl
  razor-local eval longbench model-razor.gguf --data LongBench/data -c 8k --cut-middle \\
      --datasets hotpotqa,qasper --samples 50
"""


@eval.command(epilog=LONGBENCH_EPILOG)
@model_argument()
@click.option(
    "--data",
    "folder",
    type=PATH,
    required=True,
    metavar="DIR",
    help="Folder with LongBench's .jsonl files.",
)
@click.option(
    "-c",
    "--ctx-size",
    type=Tokens(),
    default=0,
    metavar="TOKENS",
    help="Context size in tokens.  [default: trained length, up to 32k]",
)
@click.option(
    "--datasets",
    type=ListOf(click.STRING, "name,..."),
    metavar="NAME,...",
    help="Data sets to run.  [default: all files there that belong to LongBench]",
)
@click.option(
    "--samples",
    type=click.IntRange(1),
    metavar="N",
    help="Maximum questions per data set, drawn at random.  [default: all]",
)
@click.option(
    "--cut-middle",
    is_flag=True,
    help="Cut texts that are too long in the middle, instead of leaving them out.",
)
@PREFILL
@_options(_MODEL_OPTIONS)
@_HEAT
@_CURVE
def longbench(model: Path | None, folder: Path, **options: Any) -> None:
    """Run LongBench from local files.

    Some metrics need libraries: pip install razor-local[eval].
    """
    from ..evals.longbench import LongBench
    from ..evals.questions import Prompts
    from ..plan import padded_n_ctx

    run = _Run(model, options, folder.glob("*.jsonl"))
    trained = min(run.shape.n_ctx_train or MAX_LENGTH, MAX_LENGTH)
    n_ctx = padded_n_ctx(run.shape, options["ctx_size"] or trained)
    with run.progress() as bar:
        bench = LongBench(
            folder,
            Prompts(run.setup.file),
            n_ctx,
            names=tuple(dict.fromkeys(options["datasets"])) if options["datasets"] else None,
            n_samples=options["samples"],
            cut=options["cut_middle"],
            seed=options["seed"],
            progress=bar,
        )
        notes = [
            f"{n} questions of {name} do not fit and are left out"
            for name, n in bench.left_out.items()
        ]
        notes += [f"{n} texts of {name} were cut in the middle" for name, n in bench.n_cut.items()]
        for note in notes:
            echo(f"Note: {note}", err=True)
        described = {
            "tasks": bench.names,
            "samples": options["samples"],
            "cut_middle": options["cut_middle"],
            "files_sha256": bench.digest,
            "notes": notes,
        }
        report = run.ask("longbench", bench.samples, bench.score, bar, described)
    run.finish(report)


class _Run:
    """The setup that all evals share. Options are checked before anything runs."""

    def __init__(
        self, model: Path | None, options: dict[str, Any], texts: Iterable[Path] = ()
    ) -> None:
        """Check the options. texts: files to read in addition to those that options name."""
        from ..common.files import check_outputs
        from ..evals.policies import make_policies

        self.options = options
        output = options["output"]
        self.kind = report_kind(options["as_json"], output)
        self.plots = [p for p in (options.get("plot"), options.get("plot_curve")) if p]
        names = [name for some in options["policies"] for name in some] or None
        read = [model or DEFAULT_MODEL, options["sidecar"], *texts]
        read += [name.removeprefix("heads=") for name in names or () if name.startswith("heads=")]
        if options.get("haystack") is not None:
            read += options["haystack"].glob("*.txt")
        check_outputs([options["resume"], output, *self.plots], read)
        self._check_pictures()
        self.setup = model_setup(model or DEFAULT_MODEL, options)
        budgets = sorted({share for some in options["budgets"] for share in some})
        self.shape: ModelShape
        self.policies: tuple[Policy, ...]
        self.shape, self.policies = make_policies(self.setup, names, budgets, options["seed"])

    def _check_pictures(self) -> None:
        """Refuse pictures that could not be drawn, before the run."""
        from ..common.figure import make_figure

        for path in self.plots:
            make_figure(path, (1, 1), "leave out the plot")

    def lengths(self) -> tuple[int, ...]:
        chosen = sorted({n for some in self.options["lengths"] for n in some})
        if not chosen:
            longest = min(self.shape.n_ctx_train or 4096, MAX_LENGTH)
            chosen = [n for i in range(6) if (n := 1024 << i) <= longest] or [longest]
        trained = self.shape.n_ctx_train
        if trained and chosen[-1] > trained:
            echo(
                f"Note: {chosen[-1]:,} tokens exceed the trained context of {trained:,}",
                err=True,
            )
        return tuple(chosen)

    def progress(self) -> AbstractContextManager[ProgressBar]:
        return progress_of_run(self.options["resume"])

    def ask(
        self,
        what: str,
        samples: Sequence[Sample],
        score: Callable[[Sample, list[str]], float],
        bar: ProgressBar,
        settings: dict[str, Any],
    ) -> Report:
        from ..evals.report import Report
        from ..evals.run import describe_run, open_journal, run_questions

        settings = {"seed": self.options["seed"], "n_samples": len(samples)} | settings
        settings["lengths"] = sorted({sample.length for sample in samples})
        head = describe_run(what, self.setup, self.shape, self.policies, **settings)
        journal: Journal
        with open_journal(self.options["resume"], head) as journal, stop_on_interrupt() as stop:
            run_questions(
                self.setup, self.shape, self.policies, samples, score, journal, head, bar, stop
            )
        assert journal.head is not None
        return Report(journal.head, journal.records)

    def finish(self, report: Report) -> None:
        from ..evals.report import format_report, plot_curve, plot_heat

        self.write(format_report(report, self.kind))
        if self.options["plot"] is not None:
            plot_heat(report, self.options["plot"])
        if self.options["plot_curve"] is not None:
            plot_curve(report, self.options["plot_curve"])

    def write(self, text: str) -> None:
        write_report(text, self.options["output"])


def _haystack(options: dict[str, Any]) -> Any:
    from ..evals.haystack import FolderText, MadeText

    return MadeText() if options["haystack"] is None else FolderText(options["haystack"])


def _describe_haystack(haystack: Any) -> dict[str, str]:
    return {"haystack": haystack.name, "haystack_sha256": haystack.digest}
