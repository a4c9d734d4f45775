"""razor-local tune on the built-in model: what it measures, chooses, writes, and says."""

from __future__ import annotations

import json
from random import Random

import numpy as np
import pytest

from razor_local import Llama, RazorError, Stopped
from razor_local.cli.params import DEFAULT_MODEL
from razor_local.evals import run as run_module
from razor_local.evals import tune as tune_module
from razor_local.evals.facts import Outcome
from razor_local.evals.haystack import MadeText
from razor_local.evals.perplexity import make_windows, read_text
from razor_local.evals.policies import exact_full
from razor_local.evals.search import Candidate
from razor_local.evals.tune import FULL_TYPES, Goal, Tuner, tune, tuned_profile, window_of
from razor_local.model_file import open_model, read_profile
from razor_local.model_setup import ModelSetup
from razor_local.plan import make_plan
from razor_local.profile import Profile, read_sidecar, tune_line, tune_note
from razor_local.verify.compare import kl_divergence
from tests.support import embedded_model
from tests.support.cli import run
from tests.support.journals import damaged

N_CTX, TOKENS = 1024, 128
N_HEADS = 24  # of the built-in model


@pytest.fixture(autouse=True)
def _commit(monkeypatch) -> None:
    """Fix the commit: someone may commit during the tests, and then journals are refused."""
    monkeypatch.setattr(run_module, "describe_code", lambda: {"version": "1", "commit": "abc"})


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "made.txt"
    pieces = MadeText().pieces(Random(3))
    path.write_text("".join(next(pieces) for _ in range(120)))
    return path


def args(book, *more: object) -> tuple[object, ...]:
    return ("tune", "--text", book, "-c", N_CTX, "--tokens", TOKENS, "-t", 1, *more)


SAME = "--same-window"


def test_the_smallest_plan_is_written_with_what_it_was_measured_at(book, tmp_path) -> None:
    out, journal = tmp_path / "out.gguf", tmp_path / "run.jsonl"
    more = ["--plans", 6, "--same-window", "-o", out, "--resume", journal, "--max-kl", 0.02]
    code, stdout, stderr = run(*args(book, *more, "--json", "--plot", tmp_path / "p.svg"))
    assert code == 0, stderr
    report = json.loads(stdout)
    rows = report["rows"]
    assert len(rows) == len(FULL_TYPES) + 6 and "chosen" in (tmp_path / "p.svg").read_text()
    (chosen,) = (row for row in rows if row["chosen"])
    good = [r for r in rows if r["kl"] <= 0.02 and not r["lost_facts"]]
    assert chosen["kv_bytes"] == min(r["kv_bytes"] for r in good) and chosen["front"]
    # the profile, and its figures measured in another way
    shape = open_model(DEFAULT_MODEL).shape
    profile = read_sidecar(out, shape)
    types = dict(zip(*[iter(chosen["options"].split())] * 2, strict=True))
    kv_types = {
        "type_k": types.get("-ctk", "f16"),
        "type_v": types.get("-ctv", "f16"),
        "type_k_local": types.get("-ctlk"),
        "type_v_local": types.get("-ctlv"),
    }
    plan = make_plan(shape, profile, N_CTX, **kv_types)
    assert plan.kv_bytes == chosen["kv_bytes"] == int(profile.calibration["tune_kv_bytes"])
    tokens = read_text(ModelSetup(str(DEFAULT_MODEL)), book).tokens[:N_CTX].copy()
    bos = read_text(ModelSetup(str(DEFAULT_MODEL)), book).bos
    tokens[0] = tokens[0] if bos is None else bos
    logits = []
    every = exact_full(shape, "f16").profile
    for razor, options in ((every, {}), (profile, kv_types)):
        llama = Llama(DEFAULT_MODEL, razor=razor, n_ctx=N_CTX, n_threads=1, **options)
        llama.prefill(tokens[: N_CTX - TOKENS - 1].tolist())
        rest = tokens[N_CTX - TOKENS - 1 : -1].tolist()
        logits.append(np.concatenate([x.copy() for x in llama.eval_logits(rest)]))
        llama.close()
    kl = kl_divergence(*logits)
    assert len(kl) == profile.calibration["tune_tokens"] == TOKENS
    assert chosen["kl"] == pytest.approx(kl.mean(), rel=1e-2)
    worst = np.sort(kl)[::-1][: TOKENS // 10].mean()
    assert chosen["kl_worst"] == pytest.approx(worst, rel=1e-2)
    # what the commands say
    line = tune_line(profile)
    assert line is not None and f"{chosen['kl']:.4f} nats" in line
    shown = run("inspect", DEFAULT_MODEL, "--sidecar", out)[1]
    assert f"tuned    {line}\n" in shown
    assert tune_note(profile, plan) is None
    other = make_plan(shape, profile, 2 * N_CTX, **kv_types)
    assert (
        tune_note(profile, other)
        == f"note: the profile was tuned with -c {N_CTX} " + (chosen["options"])
    )
    # the journal: nothing is measured again, also with another goal, and damaged ones are refused
    lines = journal.read_text()
    code, _, stderr = run(*args(book, *more[:-1], 0.03, "--force"))
    assert code == 0 and "from another run" not in stderr
    journal.write_text(lines)
    code, stdout, stderr = run(*args(book, *more, "--force"))
    assert code == 0 and journal.read_text() == lines
    assert "chosen" in stdout and f"-c {N_CTX} {chosen['options']} --sidecar {out}" in stderr
    for changed in list(damaged(lines.splitlines(keepends=True)))[:12]:
        journal.write_text("".join(changed))
        code, _, stderr = run(*args(book, *more[:-2], "--max-kl", 0.01, "--force"))
        assert code == 1 and "Traceback" not in stderr


def test_if_nothing_holds_the_best_is_named_and_nothing_is_written(
    book, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(tune_module, "TYPES", (("f16", "q4_0"),))
    out = tmp_path / "out.gguf"
    code, stdout, stderr = run(*args(book, "--max-kl", 1e-7, "--plans", 2, "-o", out))
    assert code == 1 and not out.exists()
    assert (
        "none of the plans that are smaller than the full f16 cache has a KL divergence" in stderr
    )
    assert "the best one has 0.0" in stderr and "no profile was written" in stderr
    assert "full" in stdout and "Traceback" not in stderr


def test_a_memory_bound(book, tmp_path) -> None:
    out = tmp_path / "out.gguf"
    full = make_plan(open_model(DEFAULT_MODEL).shape, None, N_CTX).kv_bytes
    size = full // 5
    code, stdout, stderr = run(
        *args(book, "--memory", size, "--plans", 5, SAME, "-o", out, "--json")
    )
    assert code == 0, stderr
    rows = json.loads(stdout)["rows"]
    razor = [row for row in rows if row["plan"] == "razor"]
    assert len(razor) == 5 and all(row["kv_bytes"] <= size for row in razor)
    (chosen,) = (row for row in rows if row["chosen"])
    assert chosen["kl"] == min(row["kl"] for row in razor if not row["lost_facts"])
    code, _, stderr = run(*args(book, "--memory", "1K", "--plans", 1, "-o", out, "--force"))
    assert code == 1 and "the smallest plan takes" in stderr
    code, _, stderr = run(*args(book, "--windows", 99, "-o", out, "--force"))
    assert code == 1 and "--windows is 99, but" in stderr and "use fewer" in stderr
    code, _, stderr = run(*args(book, "--vram", "1M", "--plans", 1, "-o", out, "--force"))
    assert code == 1 and "weights and buffers take" in stderr


def test_the_files_of_a_folder_are_not_overwritten(book, tmp_path) -> None:
    folder = tmp_path / "books"
    folder.mkdir()
    (folder / "a.txt").write_text(book.read_text())
    given = ("tune", "--text", folder, *args(book)[3:])
    for more in (
        ["-o", folder / "a.txt", "--force"],
        ["-o", "o.gguf", "--report", folder / "a.txt"],
    ):
        code, _, stderr = run(*given, *more)
        assert code == 1 and "a.txt is read by this command" in stderr
    assert (folder / "a.txt").read_text() == book.read_text()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--max-kl", 0.1, "--memory", "1M"], "--max-kl and --memory exclude each other"),
        (["--max-kl", 0], "0.0 is not in the range 0<x<=100"),
        (["-c", "64k"], "tokens, expected at least the context"),
        (["--tokens", 1], "--tokens is 1, expected 2 to"),
        (["--plot", "a.bmp"], "is not the name of a picture"),
        (["-o", "/nowhere/out.gguf"], "the folder /nowhere does not exist"),
        (["-c", 256], "a context of 256 tokens is too small to tune"),
    ],
)
def test_mistakes_are_one_sentence(book, more, text, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = args(book, "-o", "out.gguf", *more)
    if more[0] == "-c":
        given = (*given, "--tokens", 100)
    code, stdout, stderr = run(*given)
    assert code != 0 and text in stderr and "Traceback" not in stderr and stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_the_default_place_is_refused_where_it_would_not_be_used(book) -> None:
    code, _, stderr = run(*args(book))
    assert code == 1 and "has a profile of its own, which comes first" in stderr


class Scripted(Tuner):
    """A tuner with a formula instead of a model."""

    def __init__(self, facts: bool, tries: int = 50, by_layer: bool = False) -> None:
        setup = ModelSetup(str(DEFAULT_MODEL))
        journal = run_module.open_journal(None, {})
        windows = make_windows(8192, 8192, 8192, 1, 7680)
        base = read_profile(DEFAULT_MODEL)
        assert base is not None
        super().__init__(
            setup, setup.file.shape, base, None, windows, 8192, tries, journal, by_layer=by_layer
        )  # type: ignore[arg-type]
        self.asked: list[Candidate] = []
        self._facts = facts

    def _compare(self, policy):
        from razor_local.evals.tune import Figures

        plan = policy.plan(self.shape, self.n_ctx)
        share = plan.kv_bytes / plan.kv_bytes_full_f16
        return Figures(0.03 * (1 - share) ** 2, 0.1, 0.9, plan.kv_bytes, "full")

    def facts(self, candidate):
        self.asked.append(candidate)
        found = np.ones(20, bool)
        if self._facts and candidate.n_heads < 8:
            found[:5] = False
        return Outcome(found, np.zeros(20))


def test_facts_change_the_choice() -> None:
    free, bound = Scripted(False), Scripted(True)
    small, large = (tune(tuner, Goal(0.025, None)) for tuner in (free, bound))
    assert small.best is not None and small.best.n_heads < 8 and not small.lost_facts
    assert len(free.asked) == 2, "the full cache and the chosen plan"
    assert large.best is not None and large.best.n_heads >= 8
    assert small.best in large.lost_facts
    assert large.measured[large.best].kv_bytes > small.measured[small.best].kv_bytes
    assert not set(large.front()) & large.lost_facts
    best = tune(Scripted(True), Goal(None, 20_000_000)).best
    assert best is not None and best.n_heads >= 8


@pytest.mark.parametrize("tries", [9, 14])
def test_every_measured_plan_is_asked_for_facts_before_new_ones(tries) -> None:
    """With few questions, a plan can keep facts that a larger plan loses by chance."""
    first = tune(Scripted(False, tries), Goal(0.025, None))
    held = [c for c, f in first.measured.items() if f.kl <= 0.025 and c.n_heads < N_HEADS]
    smallest, keeper, *_ = sorted(held, key=lambda c: first.measured[c].kv_bytes)
    assert smallest == first.best

    class KeptByOne(Scripted):
        def facts(self, candidate):
            outcome = super().facts(candidate)
            outcome.found[:5] = candidate in (keeper, self.full("f16"))
            return outcome

    tuned = tune(KeptByOne(False, tries), Goal(0.025, None))
    assert tuned.best == keeper and smallest in tuned.lost_facts


LAYERS = (1.0, 0.01, 0.2, 0.01, 0.5, 0.01)  # made-up weights of the six layers' losses


class Layered(Scripted):
    """A tuner with made-up losses: a narrow window costs much in some layers, little in others."""

    def _compare(self, policy):
        from razor_local.evals.tune import Figures

        plan = policy.plan(self.shape, self.n_ctx)
        kl = 0.0
        for weight, layer in zip(LAYERS, plan.layers, strict=True):
            kl += sum(weight / window for window in layer.windows if window)
        return Figures(kl, 0.1, 0.9, plan.kv_bytes, "full")


@pytest.mark.parametrize("goal", [Goal(0.01, None), Goal(None, 8_000_000)])
def test_layers_that_lose_little_get_narrow_windows(goal) -> None:
    one = tune(Layered(False), goal)
    tuner = Layered(False, by_layer=True)
    tuned = tune(tuner, goal)
    assert one.best is not None and tuned.best is not None and tuned.best.windows
    windows, local = tuned.best.windows, tuner.profile(tuned.best).retrieval
    assert set(windows) <= set(tuner.layer_windows)
    ranked = [windows[i] for i in (0, 4, 2, 1, 3, 5) if not local[i].all()]
    assert ranked == sorted(ranked, reverse=True) and ranked[0] > ranked[-1]
    figures, before = tuned.measured[tuned.best], one.measured[one.best]
    if goal.max_kl is not None:
        assert figures.kl <= goal.max_kl and figures.kv_bytes < before.kv_bytes
    else:
        assert figures.kv_bytes <= goal.max_bytes and figures.kl < before.kl
    assert tuned.best in tuner.asked, "its facts were asked for"
    # the profile is that of the plan
    profile = tuned_profile(tuner, tuned, goal, "book.txt")
    plan = make_plan(tuner.shape, profile, 8192, **tuner.policy(tuned.best).types)
    assert plan.kv_bytes == figures.kv_bytes == int(profile.calibration["tune_kv_bytes"])
    assert profile.calibration["facts_window"] == max(windows)


def test_windows_by_layer_are_written_and_shown(book, tmp_path) -> None:
    out, report = tmp_path / "out.gguf", tmp_path / "report.json"
    more = ["--max-kl", 0.02, "--plans", 3, "-o", out, "--report", report]
    code, _, stderr = run(*args(book, *more))
    assert code == 0, stderr
    rows = json.loads(report.read_text())["rows"]
    (chosen,) = (row for row in rows if row["chosen"])
    one = [row["kv_bytes"] for row in rows if row["window"] and row["kl"] <= 0.02]
    assert chosen["windows"] is not None and chosen["kv_bytes"] < min(one) and chosen["kl"] <= 0.02
    shape = open_model(DEFAULT_MODEL).shape
    profile = read_sidecar(out, shape)
    for heads, scopes, window in zip(
        profile.retrieval, profile.scope, chosen["windows"], strict=True
    ):
        assert scopes.tolist() == [0 if head else window for head in heads]
    shown = run("inspect", DEFAULT_MODEL, "--sidecar", out, "-c", N_CTX)[1]
    assert "scopes of" in shown and "tuned" in shown


def test_a_full_cache_that_is_as_good_is_named() -> None:
    tuned = tune(Scripted(False), Goal(None, 60_000_000))
    assert tuned.best is None and tuned.why == (
        "the full cache full-f16 fits in these bytes and is as close or closer"
    )


def test_stop_and_tries() -> None:
    tuner = Scripted(False, tries=3)
    assert len(tune(tuner, Goal(0.02, None)).measured) == len(FULL_TYPES) + 3

    class Interrupted(Scripted):
        def _compare(self, policy):
            if len(self._journal.records) == 4:
                raise Stopped
            return super()._compare(policy)

    tuner = Interrupted(False)
    with pytest.raises(Stopped):
        tune(tuner, Goal(0.02, None))
    assert len(tuner._journal.records) == 4


def test_windows_use_all_cells() -> None:
    profile = read_profile(DEFAULT_MODEL)
    assert profile is not None
    shape = open_model(DEFAULT_MODEL).shape
    for cells in range(256, 4097, 256):
        window = window_of(cells, profile)
        groups = [
            make_plan(shape, profile.with_options(w, None, None), 8192).groups[0].cells
            for w in (window, window + 1)
        ]
        assert groups == [cells, cells + 256]
    assert window_of(64, profile) == 0


@pytest.mark.parametrize(
    "changes",
    [{"tune_kl": "x"}, {"tune_tokens": "8"}, {"tune_options": "; rm"}, {"tune_kv_bytes": "-1"}],
)
def test_records_with_other_values_are_not_shown(changes) -> None:
    record = {
        "tune_kl": "0.01", "tune_kl_worst": "0.1", "tune_tokens": 512, "tune_context": 8192,
        "tune_kv_bytes": "1048576", "tune_kv_bytes_full": "4194304", "tune_options": "",
    }  # fmt: skip
    profile = Profile((np.ones(1, np.uint8),), calibration=record)
    assert tune_line(profile) == (
        "KL divergence 0.0100 nats from the full f16 cache (0.1000 in the worst tenth of 512"
        " tokens), 1.0 of 4.0 MiB at 8,192 tokens in f16"
    )
    assert tune_line(Profile((np.ones(1, np.uint8),), calibration=record | changes)) is None


def test_heads_without_scores_are_measured(book, tmp_path, monkeypatch) -> None:
    """The journal keeps them, so that they are measured once."""
    from razor_local.converters import calibrate

    from razor_local.scores import profile_scores

    template = open_model(DEFAULT_MODEL).header.string("tokenizer.chat_template", 1 << 20)
    model = embedded_model.write_variant(tmp_path / "model.gguf", template)
    profile = read_profile(DEFAULT_MODEL)
    assert profile is not None
    scores = profile_scores(profile, open_model(DEFAULT_MODEL).shape)
    calls = []
    monkeypatch.setattr(tune_module, "TYPES", (("f16", "q4_0"),))
    monkeypatch.setattr(calibrate, "calibrate", lambda *_, **__: calls.append(1) or scores)
    more = [model, "--plans", 1, "--max-kl", 1e-7, "--resume", tmp_path / "run.jsonl"]
    for _ in range(2):
        code, _, stderr = run("tune", *more, *args(book)[1:], "-o", tmp_path / "o.gguf", "--force")
        assert code == 1 and "the best one has" in stderr, stderr
    assert calls == [1] and '"kind": "heads"' in (tmp_path / "run.jsonl").read_text()


def test_alibi_models_are_refused() -> None:
    from razor_local.cli.tune import _base

    class Shape:
        max_alibi_bias = 8.0

    class File:
        shape = Shape

    class Setup:
        file = File

    with pytest.raises(RazorError, match="there is nothing to tune"):
        _base(Setup, {"sinks": None}, None, None, None)  # type: ignore[arg-type]
