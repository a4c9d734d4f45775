"""Automatic measurement of profiles."""

from __future__ import annotations

import json
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from razor_local.converters import calibrate as calibrate_module

from razor_local import Llama, auto_profile, profile_cache
from razor_local.errors import RazorError, Stopped
from razor_local.evals import proof
from razor_local.evals.policies import make_policies
from razor_local.evals.report import head_lines
from razor_local.evals.run import describe_run
from razor_local.model_file import ModelFile, read_profile
from razor_local.model_setup import ModelSetup
from razor_local.scores import Scores, save_scores
from tests.support import embedded_model, known_heads, tiny_models
from tests.support.cli import MAIN, run
from tests.support.texts import FACT, QUESTION, text_with

auto = auto_profile.auto_profile
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def known(tmp_path, monkeypatch) -> tuple[Path, known_heads.KnownHeads]:
    """Return a model with known heads, and make measuring use few tokens."""
    monkeypatch.setattr(calibrate_module, "DEFAULT_TOKENS", 64)
    spec = known_heads.place_heads(0)
    return known_heads.make_model(tmp_path / "model.gguf", spec), spec


@pytest.fixture
def slow(monkeypatch) -> None:
    """Make every model seem to take 12 minutes."""
    monkeypatch.setattr(auto_profile, "estimate_seconds", lambda *_, **__: 720.0)


@pytest.fixture
def unmeasured(monkeypatch) -> None:
    """Fail if a model is measured or timed."""
    for name in ("estimate_seconds", "measure_profile"):
        monkeypatch.setattr(auto_profile, name, None)


def test_a_model_is_measured_once(known, profile_folder, monkeypatch):
    path, spec = known
    seen = []
    first = auto(path, progress=lambda done, total, label: seen.append(label))
    assert [layer.tolist() for layer in first.found.profile.retrieval] == spec.mask()
    assert first.found.source == "measured" and first.why == ""
    assert first.found.where == str(profile_folder / f"{ModelFile(path).shape.fingerprint}.gguf")
    assert {"timing the model", "measuring the heads"} <= set(seen)
    monkeypatch.setattr(auto_profile, "measure_profile", None)
    second = auto(path)
    assert second.found.source == "cache"
    assert second.found.profile.flat().tolist() == first.found.profile.flat().tolist()
    copy = path.with_name("copy.gguf")
    copy.write_bytes(path.read_bytes())
    assert auto(copy, when="never").found.source == "cache"  # found by its content


def test_a_slow_model_is_not_measured_and_timed_once(known, slow, monkeypatch):
    path, _ = known
    monkeypatch.setattr(auto_profile, "measure_profile", None)
    found = auto(path, n_threads=2)
    assert (found.found, found.seconds, found.tried) == (None, 720, False)
    assert found.saving.active and found.saving.n_ctx == 10240
    monkeypatch.setattr(auto_profile, "estimate_seconds", None)
    assert auto(path, n_threads=2).seconds == 720
    monkeypatch.setattr(auto_profile, "estimate_seconds", lambda *_, **__: 800.0)
    assert auto(path, n_threads=1).seconds == 800  # other options may be faster


def test_now_measures_however_long_it_takes(known, slow, profile_folder):
    assert auto(known[0]).found is None
    assert auto(known[0], when="now").found.source == "measured"
    assert [path.suffix for path in profile_folder.iterdir()] == [".gguf"]


def test_nothing_is_measured_where_nothing_can_be_saved(known, unmeasured, tiny, tmp_path):
    path, _ = known
    short = auto(path, n_ctx=4096)
    assert short.found is None and "RazorAttention saves nothing" in short.why
    assert auto(path, when="never").why == "the model has no razor profile"
    mla = tiny(
        tiny_models.TinySpec(n_ctx_train=32768),
        {"llama.attention.key_length_mla": (64, tiny_models.GGUFValueType.UINT32)},
    )
    refused = auto(mla)
    assert refused.why.startswith("razor does not run models with multi-head latent attention")
    assert not (short.tried or refused.tried)


def test_that_no_head_stands_out_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate_module, "DEFAULT_TOKENS", 64)
    spec = known_heads.place_heads(0, induction=0, echo=0)
    path = known_heads.make_model(tmp_path / "m.gguf", spec)
    first = auto(path)
    assert first.found is None and first.tried
    assert first.why.startswith("no head stands out by its scores, and the test with planted facts")
    measure = auto_profile.measure_profile
    monkeypatch.setattr(auto_profile, "measure_profile", None)
    assert auto(path) == first
    monkeypatch.setattr(auto_profile, "measure_profile", measure)
    assert auto(path, when="now") == first


def test_a_profile_that_loses_facts_is_not_used_without_being_asked(chatty, monkeypatch):
    """`convert` writes it anyway, with a note."""
    shape = ModelFile(chatty).shape
    scores = Scores(
        np.zeros(sum(shape.n_head), np.float32),
        np.arange(sum(shape.n_head), dtype=np.float32) == 0,  # no head that finds facts
        shape.n_head,
        shape.n_head_kv,
        {"model_fingerprint": shape.fingerprint, "tokens": 2048},
    )
    monkeypatch.setattr(auto_profile, "calibrate", lambda *_, **__: scores)
    monkeypatch.setattr(proof, "improve", lambda start, _scores, ask, _: (start, ask(start, "x")))
    found = auto(chatty, when="now")
    assert found.found is None and found.tried
    assert re.match(r"razor misses facts with the measured heads \(\d+ of 20 found; ", found.why)
    assert auto(chatty) == found


def test_measuring_can_be_stopped(known, profile_folder):
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 20

    with pytest.raises(Stopped):
        auto(known[0], stop=stop)
    assert not profile_folder.exists()


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(known, profile_folder):
    profile_folder.parent.mkdir(exist_ok=True)
    profile_folder.write_text("a file")
    found = auto(known[0]).found
    assert (found.source, found.where) == ("measured", "")


def test_llama_measures(known, tmp_path):
    path, spec = known
    parts = []
    llama = Llama(path, razor="auto", n_ctx=8192, progress=parts.append)
    assert llama.plan.active and llama.profile.flat().tolist() == np.ravel(spec.mask()).tolist()
    assert parts and all(0 <= part <= 1 for part in parts)
    llama.close()
    llama = Llama(path, n_ctx=8192)  # razor=True reads the file alone
    assert llama.memory().why == "the model file has no razor profile"
    llama.close()


def test_llama_stops_and_says_why_there_is_no_profile(known, slow):
    path, _ = known
    llama = Llama(path, razor="auto", n_ctx=8192)
    assert llama.memory().why == (
        "the model has no razor profile, and measuring one takes about 720 seconds"
    )
    llama.close()
    llama = Llama(path, razor="auto", n_ctx=1024)
    assert "RazorAttention saves nothing" in llama.memory().why
    llama.close()


def test_llama_stops_where_progress_says_so(known):
    with pytest.raises(RazorError, match="measuring the heads of .* was stopped"):
        Llama(known[0], razor="auto", n_ctx=8192, progress=lambda part: part < 0.3)


# -- convert without an output


def test_convert_into_the_cache(known, profile_folder):
    path, spec = known
    code, stdout, stderr = run("convert", path, "--no-proof", "--tokens", 64)
    assert code == 0
    assert re.fullmatch(r"Measuring the heads takes about \d+ \w+\.\n", stderr)
    cached = profile_folder / f"{ModelFile(path).shape.fingerprint}.gguf"
    lines = stdout.splitlines()
    assert lines[0] == f"{cached}: 4 of 16 KV heads are retrieval heads (25.0%)"
    assert re.fullmatch(
        r"KV cache at 8,192 tokens: \d+\.\d MiB instead of \d+\.\d MiB \(-\d\d %\)", lines[1]
    )
    assert lines[2].startswith("KV cache at 10,240 tokens: ")
    assert lines[3] == f"Next: razor-local chat {path}" and len(lines) == 4
    assert ModelFile(path).find_profile().source == "cache"
    assert stat.S_IMODE(cached.stat().st_mode) == 0o600
    # measured again, it replaces the profile
    assert run("convert", path, "--no-proof", "--tokens", 64, "--budget", 0.5)[0] == 0
    assert ModelFile(path).find_profile().profile.flat().mean() == 0.5


def test_convert_refuses_a_profile_that_would_not_be_used(known, tmp_path):
    code, _, stderr = run("convert", embedded_model.PATH)
    assert code == 1 and "has a profile of its own, which comes first; name an output" in stderr
    side = tmp_path / "model.razor.gguf"
    code, stdout, _ = run(
        "convert", known[0], "-o", side, "--sidecar", "--tokens", 64, "--no-proof"
    )
    assert code == 0 and stdout.endswith(f"Next: razor-local chat {known[0]}\n")
    code, _, stderr = run("convert", known[0])
    assert code == 1 and f"{side} comes first" in stderr


def test_convert_remembers_that_no_head_stands_out(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrate_module, "DEFAULT_TOKENS", 64)
    spec = known_heads.place_heads(0, induction=0, echo=0)
    path = known_heads.make_model(tmp_path / "m.gguf", spec)
    shape = ModelFile(path).shape
    # what another choice, a file or a skipped test led to says nothing about the default
    scores = np.zeros(sum(shape.n_head), np.float32)
    record = {"model_fingerprint": shape.fingerprint, "tokens": 64}
    file = tmp_path / "s.json"
    save_scores(Scores(scores, scores, shape.n_head, shape.n_head_kv, record), file)
    for args in (["--scores", file, "--no-proof"], ["--tokens", 64], ["--no-proof"]):
        code, _, stderr = run("convert", path, *args)
        assert code == 1 and "no head stands out" in stderr
        assert profile_cache.read_note(shape) == profile_cache.Note()
    assert run("convert", path, "--threads", 2)[0] == 1
    assert "no head stands out" in profile_cache.read_note(shape).why


# -- chat


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    """Return the built-in model without its profile."""
    template = ModelFile(embedded_model.PATH).header.string("tokenizer.chat_template", 1 << 20)
    return embedded_model.write_variant(tmp_path_factory.mktemp("chatty") / "m.gguf", template)


def chat(*args: object):
    from click.testing import CliRunner

    from razor_local.cli import main

    message = f"{text_with(FACT)}\n\n{QUESTION}\n"
    return CliRunner().invoke(main, ["chat", *map(str, args), "--temp", "0"], input=message)


def test_chat_measures_the_built_in_model(chatty, profile_folder):
    """This uses the default number of tokens, and planted facts."""
    result = chat(chatty, "--calibrate", "now")
    assert result.exit_code == 0 and "48213" in result.stdout
    (cached,) = profile_folder.iterdir()
    notes = result.stderr.splitlines()
    assert notes[-2] == f"profile: measured now ({cached})"
    saved = re.search(r"KV cache \d+\.\d MiB instead of \d+\.\d MiB \(−(\d+) %\)", notes[-1])
    assert saved and int(saved[1]) > 30
    profile = ModelFile(chatty).find_profile().profile
    assert profile.flat().tolist() == read_profile(embedded_model.PATH).flat().tolist()
    again = chat(chatty)
    assert again.stderr.splitlines()[0] == f"profile: the profile cache ({cached})"


def test_chat_says_what_measuring_would_take(chatty, slow, monkeypatch):
    result = chat(chatty)
    assert result.exit_code == 0 and "48213" in result.stdout
    note = result.stderr.splitlines()[0]
    assert re.fullmatch(
        "note: the model has no razor profile, so the full cache runs; 'razor-local convert"
        rf" {re.escape(str(chatty))}' measures one in about 12 minutes \(KV cache at 8,192 tokens:"
        r" about \d+\.\d MiB instead of 48\.0 MiB \(-\d\d %\)\)",
        note,
    ), note
    assert result.stderr.splitlines()[1].endswith("KV cache 48.0 MiB (full)")
    for quiet in (["--calibrate", "never"], ["--no-razor"], ["-c", "4096"]):
        result = chat(chatty, *quiet)
        assert result.stderr.count("\n") == 1 and "MiB (full)" in result.stderr
    for args in (["--no-razor"], ["--sidecar", chatty]):
        result = chat(chatty, "--calibrate", "now", *args)
        assert result.exit_code == 2 and "exclude each other" in result.stderr


def test_chat_says_why_a_model_has_no_profile(chatty, unmeasured):
    shape = ModelFile(chatty).shape
    profile_cache.write_note(shape, profile_cache.Note(why="no head stands out"))
    note = chat(chatty).stderr.splitlines()[0]
    assert note == "note: the full cache runs: no head stands out"


def test_chat_names_a_damaged_profile(chatty, slow):
    path = profile_cache.path_of(ModelFile(chatty).shape)
    profile_cache.make_folder()
    path.write_bytes(b"GGUF")
    result = chat(chatty, "--calibrate", "never")
    assert result.exit_code == 0 and "48213" in result.stdout
    assert result.stderr.splitlines()[0] == (
        f"note: the profile {path} is damaged; remove it or run 'razor-local convert {chatty}'"
    )
    assert "is damaged" not in chat(chatty, "--no-razor").stderr


def test_other_commands_use_the_profile_cache(chatty):
    file = ModelFile(chatty)
    auto_profile.save_profile(file, read_profile(embedded_model.PATH))
    result = json.loads(run("verify", chatty, "-n", 5000, "--rows", 64, "--json")[1])
    assert result["passed"] and result["profile"].startswith("the profile cache (")
    setup = ModelSetup(str(chatty))
    shape, policies = make_policies(setup, ["full", "razor"])
    head = describe_run("needle", setup, shape, policies, seed=0)
    assert head["profile"] == "the profile cache"
    assert list(head_lines(head))[-1].endswith(" of 24 KV heads; profile: the profile cache")
    full = describe_run("needle", setup, shape, policies[:1], seed=0)
    assert full["profile"] is None
    fitted = json.loads(run("fit", chatty, "-c", 8192, "--json")[1])
    assert fitted["profile"] == {"source": "cache", "retrieval_kv_heads": 4, "kv_heads": 24}


def test_ctrl_c_while_measuring_leaves_nothing(chatty, tmp_path):
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\n"
        "from razor_local import profile_cache\n"
        f"profile_cache.folder = lambda: Path({str(tmp_path / 'profiles')!r})\n"
        "from razor_local.converters import calibrate\n"
        "report = calibrate._Probe._report\n"
        "def reported(self, part):\n"
        "    print('measuring', flush=True)\n"
        "    report(self, part)\n"
        "calibrate._Probe._report = reported\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code + MAIN, "chat", chatty, "--calibrate", "now"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    child.stdin.write("hello")
    child.stdin.close()
    assert child.stdout.readline() == "measuring\n", child.stderr.read()
    child.send_signal(signal.SIGINT)
    child.stdout.read()
    error = child.stderr.read()
    assert child.wait(timeout=60) == 1
    assert error == (
        "measuring was interrupted and nothing was saved; --calibrate never skips it\n\nAborted!\n"
    )
    assert not (tmp_path / "profiles").exists()
