"""Measured heads: exactly the known ones, with scores that an independent computation confirms."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from razor_local.converters import calibrate as module
from razor_local.converters import write as writer
from razor_local.converters.calibrate import calibrate, draw_tokens, find_copies, plan_memory
from razor_local.converters.write import write_copy

from razor_local import Llama, native
from razor_local.common import files as safe_write
from razor_local.errors import (
    ConvertError,
    ProfileError,
    RazorError,
    Stopped,
    UnsupportedError,
)
from razor_local.model_file import read_model_shape, read_profile
from razor_local.model_shape import ModelShape
from razor_local.native import probe
from razor_local.profile import read_sidecar
from razor_local.scores import Scores, choose_heads, load_scores
from tests.support import embedded_model, known_heads, other_models, reference, tiny_models
from tests.support.cli import run

DEFAULT_MODEL = embedded_model.PATH


def chosen(scores: Scores, **options) -> list[list[int]]:
    return [layer.tolist() for layer in choose_heads(scores, **options)]


def largest_error(a: Scores, b: Scores) -> float:
    return max(np.abs(a.echo - b.echo).max(), np.abs(a.induction - b.induction).max())


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> tuple[Path, known_heads.KnownHeads]:
    spec = known_heads.place_heads(0)
    return known_heads.make_model(tmp_path_factory.mktemp("known") / "model.gguf", spec), spec


# -- models with known heads

KNOWN = [
    (n_head_kv, head_dim, weight_type)
    for n_head_kv in (8, 4, 2)
    for head_dim in (32, 64)
    for weight_type in ("f32", "f16", "q8_0", "q4_0")
]


@pytest.mark.parametrize(("n_head_kv", "head_dim", "weight_type"), KNOWN)
def test_finds_exactly_the_known_heads(tmp_path, n_head_kv, head_dim, weight_type):
    for seed in range(3):
        spec = known_heads.place_heads(
            seed, n_head_kv=n_head_kv, head_dim=head_dim, weight_type=weight_type
        )
        path = known_heads.make_model(tmp_path / "model.gguf", spec)
        scores = calibrate(path, tokens=128, n_threads=1)
        assert chosen(scores) == spec.mask()
        for il, kinds in enumerate(spec.heads):
            row = slice(il * spec.n_head, (il + 1) * spec.n_head)
            for kind, echo, induction in zip(
                kinds, scores.echo[row], scores.induction[row], strict=True
            ):
                assert (induction > 0.95) == (kind == "induction")
                # the token itself is among the equal ones: (1/2 + 2/3 + 3/4) / 3
                assert abs(echo - 0.64) < 0.1 if kind == "echo" else echo < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("weight_type", ["f32", "q4_0"])
def test_finds_exactly_the_known_heads_in_10000_tokens(tmp_path, weight_type):
    spec = known_heads.place_heads(3, weight_type=weight_type)
    path = known_heads.make_model(tmp_path / "model.gguf", spec)
    scores = calibrate(path)
    assert scores.calibration["tokens"] == 2500
    assert chosen(scores) == spec.mask()


def test_only_ordinary_tokens_after_a_bos(tmp_path):
    # the embeddings of all special tokens but BOS are NaN: reading one would show
    spec = known_heads.place_heads(5, tokenizer=True)
    path = known_heads.make_model(tmp_path / "model.gguf", spec)
    scores = calibrate(path, tokens=128)
    assert scores.calibration["bos"] == 1
    assert chosen(scores) == spec.mask()
    echo, induction = reference_scores(
        known_heads.tiny_spec(spec),
        without_nan(known_heads.make_weights(spec)),
        np.arange(len(known_heads.SPECIAL), len(known_heads.SPECIAL) + spec.n_tokens),
        128,
        bos=[known_heads.BOS],
    )
    assert np.abs(scores.echo - echo).max() < 1e-3
    assert np.abs(scores.induction - induction).max() < 1e-3


def test_attention_that_is_not_a_number_is_refused(tmp_path):
    spec = known_heads.place_heads(0)
    weights = known_heads.make_weights(spec)
    weights["blk.2.attn_k.weight"][:] = np.nan
    kv = tiny_models.model_kv(known_heads.tiny_spec(spec))
    tensors = [(name, data, None) for name, data in weights.items()]
    path = tiny_models.write_gguf(tmp_path / "m.gguf", "llama", kv, tensors)
    with pytest.raises(RazorError, match="attention is not a number"):
        calibrate(path, tokens=64)


def without_nan(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.nan_to_num(data) for name, data in weights.items()}


# -- the definition, computed independently


def reference_scores(
    spec: tiny_models.TinySpec,
    weights: dict[str, np.ndarray],
    usable: np.ndarray,
    n_tokens: int,
    repeats: int = 4,
    seed: int = 0,
    bos: list[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Echo and induction scores by the definition, from float64 attention."""
    drawn = draw_tokens(usable, n_tokens, seed)
    text = np.concatenate([np.array(bos, np.int64), *[drawn] * repeats])
    same = np.tril(text[:, None] == text[None, :], -1)  # [query, earlier position]
    after = np.roll(same, 1, axis=1)
    after[:, 0] = False
    first = len(bos) + n_tokens
    echo, induction = (np.zeros((spec.n_layer, spec.n_head)) for _ in range(2))

    def see(il: int, ih: int, attention: np.ndarray) -> None:
        echo[il, ih] = (attention * same).sum(axis=1)[first:].mean()
        induction[il, ih] = (attention * after).sum(axis=1)[first:].mean()

    reference.forward(spec, weights, text, see=see)
    return echo.ravel(), induction.ravel()


def check_embedded(n_tokens: int) -> None:
    spec, weights, usable = embedded_model.read()
    scores = calibrate(DEFAULT_MODEL, tokens=n_tokens)
    echo, induction = reference_scores(spec, weights, usable, n_tokens)
    assert induction.max() > 0.5
    # products are in F16 and heads are sharp: 1.1e-3 was measured
    assert np.abs(scores.echo - echo).max() <= 3e-3
    assert np.abs(scores.induction - induction).max() <= 3e-3


def test_scores_of_the_embedded_model_are_those_of_float64_attention():
    check_embedded(128)


@pytest.mark.slow
def test_scores_of_the_embedded_model_at_its_full_length():
    check_embedded(512)


@pytest.mark.parametrize(
    "spec",
    [
        tiny_models.TinySpec(),
        tiny_models.TinySpec(still=True),
        tiny_models.TinySpec("qwen3", n_head_kv=4),
        tiny_models.TinySpec("qwen2", n_head_kv=1),
        tiny_models.TinySpec("gpt2", n_head_kv=4),
        tiny_models.TinySpec("deci", n_head_kv=(2, 0, 1)),
    ],
    ids=lambda spec: spec.arch,
)
def test_random_models_of_other_architectures(tiny, spec):
    # 200 tokens of a vocabulary of 128: copies at irregular distances
    scores = calibrate(tiny(spec), tokens=200, repeats=2, seed=3)
    weights = tiny_models.make_weights(spec)
    usable = np.arange(spec.n_vocab)
    echo, induction = reference_scores(spec, weights, usable, 200, repeats=2, seed=3)
    assert scores.n_head_kv == spec.kv_heads
    assert np.abs(scores.echo - echo).max() <= 1e-3
    assert np.abs(scores.induction - induction).max() <= 1e-3


def test_scores_do_not_depend_on_the_ubatch_size():
    shape, whole = read_model_shape(DEFAULT_MODEL), calibrate(DEFAULT_MODEL, tokens=128)
    n_ubatches = set()
    for mib in (60, 20, 10, 5, 3.6):
        n_ubatches.add(plan_memory(shape, 512, int(mib * 2**20)).n_ubatch)
        part = calibrate(DEFAULT_MODEL, tokens=128, max_memory=int(mib * 2**20))
        assert largest_error(whole, part) < 1e-5
        assert chosen(part) == chosen(whole)
    assert len(n_ubatches) == 5 and min(n_ubatches) <= 16


def test_scores_through_copies_are_those_of_host_buffers(monkeypatch, known):
    direct = calibrate(known[0], tokens=64)
    lib = native.load().lib
    calls = []
    get = lib.ggml_backend_tensor_get
    monkeypatch.setattr(lib, "ggml_backend_buffer_is_host", lambda _buffer: False)
    monkeypatch.setattr(probe, "bind", lambda _lib: None)
    monkeypatch.setattr(lib, "ggml_backend_tensor_get", lambda *a: calls.append(a) or get(*a))
    copied = calibrate(known[0], tokens=64)
    assert calls and largest_error(direct, copied) == 0


def jaccard(a: Scores, b: Scores) -> float:
    x, y = (np.concatenate(choose_heads(s)) for s in (a, b))
    return (x & y).sum() / (x | y).sum()


def test_two_seeds_agree_on_the_known_heads(known):
    assert jaccard(*(calibrate(known[0], tokens=64, seed=seed) for seed in (0, 1))) == 1


@pytest.mark.slow
def test_two_seeds_agree_on_the_heads_of_the_embedded_model():
    measured = [calibrate(DEFAULT_MODEL, seed=seed) for seed in range(4)]
    for other in measured[1:]:
        assert jaccard(measured[0], other) >= 0.9


def test_same_seed_same_scores(known):
    one, two = (calibrate(known[0], tokens=64, seed=7, n_threads=n) for n in (1, 2))
    assert largest_error(one, two) == 0
    other = calibrate(known[0], tokens=64, seed=8)
    assert 0 < largest_error(one, other)


def test_record_says_how_it_was_measured(known):
    scores = calibrate(known[0], tokens=32, repeats=3, seed=9)
    shape = read_model_shape(known[0])
    record = dict(scores.calibration)
    assert record.pop("tool_version").startswith("razor-local ")
    assert record == {
        "source": "measured on the model",
        "tokens": 32,
        "repeats": 3,
        "seed": 9,
        "bos": 0,
        "model_fingerprint": shape.fingerprint,
    }
    assert (scores.n_head, scores.n_head_kv) == (shape.n_head, shape.n_head_kv)


# -- the text


@pytest.mark.parametrize(
    ("n_usable", "n"), [(3, 64), (16, 100), (500, 500), (500, 128), (999, 2500)]
)
def test_drawn_tokens(n_usable, n):
    usable = np.arange(1000, 1000 + n_usable, dtype=np.int32)
    for seed in range(5):
        text = draw_tokens(usable, n, seed)
        assert len(text) == n and np.isin(text, usable).all()
        counts = np.bincount(text - 1000, minlength=n_usable)
        assert counts.max() - counts.min() <= 1
        assert (text != np.roll(text, 1)).all(), "no equal neighbours, at the seam neither"
        assert np.array_equal(text, draw_tokens(usable, n, seed))
    assert not np.array_equal(text, draw_tokens(usable, n, 99))


def test_two_tokens_cannot_be_drawn_from():
    with pytest.raises(ConvertError, match="the vocabulary has only 2 ordinary tokens"):
        draw_tokens(np.arange(2), 16, 0)


def test_copies_are_all_earlier_positions_of_the_token():
    text = np.array([9, 1, 2, 1, 1, 2, 3])
    starts, copies = find_copies(text, 3)
    found = [copies[a:b].tolist() for a, b in zip(starts, starts[1:], strict=False)]
    assert found == [[1], [1, 3], [2], []]


# -- memory


def test_ubatch_fits_the_budget():
    shape = ModelShape("llama", 16, (32,) * 16, (8,) * 16, 64, 64, 131072)
    for budget in (500 << 20, 1 << 30, 2 << 30, 8 << 30):
        memory = plan_memory(shape, 10001, budget)
        assert memory.total <= budget
        assert memory.n_ubatch == 512 or 2 * (memory.total - memory.kv_cache) > (
            budget - memory.kv_cache
        )
    assert memory.kv_cache == 16 * 10240 * 2 * 8 * (64 + 64)
    assert memory.attention == 2 * 4 * 32 * 512 * 10240
    with pytest.raises(ConvertError) as error:
        plan_memory(shape, 10001, 300 << 20)
    assert str(error.value) == (
        "10,001 tokens need 323 MiB beside the model (320 MiB of it for the KV cache),"
        " but 300 MiB are allowed; allow more with --max-memory or take fewer --tokens"
    )


MEASURE = """
import sys
from razor_local.converters.calibrate import calibrate

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

calibrate(sys.argv[1], tokens=16)  # loads all there is to load
open("/proc/self/clear_refs", "w").write("5")  # VmHWM starts again
before = status("VmRSS")
calibrate(sys.argv[1], tokens=250, max_memory=int(sys.argv[2]))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_really_stays_within_the_budget(tmp_path):
    spec = known_heads.place_heads(0, n_layer=3, n_head=32, n_head_kv=8, n_tokens=600)
    path = known_heads.make_model(tmp_path / "model.gguf", spec)

    def growth(max_memory: int) -> int:
        command = [sys.executable, "-c", MEASURE, path, str(max_memory)]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=tmp_path)
        return int(done.stdout)

    # 512 tokens per ubatch need 200 MiB, 64 need 28
    small, large = growth(40 << 20), growth(210 << 20)
    slack = 8 << 20  # the interpreter's own
    assert small <= (40 << 20) + slack and large <= (210 << 20) + slack
    assert large > 2 * small, "the larger budget is used, so the smaller one was needed"


# -- refusals, all before anything is computed


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tokens": 5000}, "4 x 5,000 tokens are more than the 10,240 that the model was trained"),
        ({"tokens": 15}, "15 tokens are too few to measure heads, expected 16 or more"),
        ({"repeats": 1}, "1 is not a number of repeats; expected 2 or more"),
        ({"repeats": 5000}, "2 tokens are too few.*5000 repeats of them do not fit into 10,240"),
        ({"seed": -1}, "the seed is -1, expected 0 to 4294967295"),
        ({"max_memory": 1 << 20}, "2.048 tokens need|10,000 tokens need .* MiB beside the model"),
    ],
)
def test_options_out_of_range(known, options, text):
    with pytest.raises(ConvertError, match=text):
        calibrate(known[0], **options)


@pytest.mark.parametrize("arch", ["deepseek2"])
def test_models_that_razor_cannot_run_are_not_measured(tmp_path, arch):
    path = other_models.make_other(tmp_path / "model.gguf", arch)
    with pytest.raises(UnsupportedError, match="are not measured: .*not supported"):
        calibrate(path, tokens=16)


def test_a_file_that_llama_cpp_refuses(tmp_path):
    spec = tiny_models.TinySpec()
    tensors = [(n, d, None) for n, d in tiny_models.make_weights(spec).items() if "blk.1" not in n]
    path = tiny_models.write_gguf(tmp_path / "m.gguf", "llama", tiny_models.model_kv(spec), tensors)
    with pytest.raises(RazorError, match="could not be loaded .*blk.1"):
        calibrate(path, tokens=16)


# -- interruptions


def test_an_error_in_progress_is_raised(known):
    class Oops(Exception):
        pass

    def progress(_done, _total, label):
        if label == "measuring the heads":
            raise Oops

    with pytest.raises(Oops):
        calibrate(known[0], tokens=64, progress=progress)
    assert chosen(calibrate(known[0], tokens=64)) == known[1].mask(), "and the next one works"


def test_an_error_in_the_callback_is_raised(known, monkeypatch):
    def fails(*_):
        raise MemoryError("no memory for the kernel")

    monkeypatch.setattr(module, "_kernel", lambda: fails)
    with pytest.raises(MemoryError, match="no memory for the kernel"):
        calibrate(known[0], tokens=64)


def test_progress_goes_from_0_to_1(known):
    seen = {"loading the model": [], "measuring the heads": []}

    def progress(done, total, label):
        seen[label].append(done / total)

    calibrate(known[0], tokens=500, max_memory=32 << 20, progress=progress)
    loading, measuring = seen.values()
    assert loading[0] == 0 and loading[-1] == 1 and loading == sorted(loading)
    assert len(measuring) > 10 and 0 < measuring[0] < 0.2 and measuring[-1] == pytest.approx(1)
    assert measuring == sorted(measuring)


def test_a_terminal_shows_a_bar_and_the_time_left(known, tmp_path):
    ours, theirs = pty.openpty()
    args = ["convert", known[0], "-o", tmp_path / "o.gguf", "--tokens", "1000", "-t", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT, *args],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
        cwd=tmp_path,
    )
    os.close(theirs)
    text = b""
    with contextlib.suppress(OSError):  # the terminal goes away with the process
        while data := os.read(ours, 65536):
            text += data
    os.close(ours)
    assert process.wait() == 0 and b"4 of 16 KV heads" in process.stdout.read()
    shown = re.findall(r" (\d+)% (?:(\d+):(\d\d) left)? *measuring the heads", clean(text))
    parts = [int(part) for part, _, _ in shown]
    assert len(parts) > 10 and parts == sorted(parts) and parts[-1] == 100
    left = [60 * int(minutes) + int(seconds) for _, minutes, seconds in shown if minutes]
    # no time is shown in the first second, in which fast machines are done
    assert not left or (left[-1] == 0 and max(left) < 60)


def clean(output: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output.decode())


@pytest.mark.parametrize("n_calls", [0, 1, 30, 1000])
def test_stop_ends_it(known, n_calls):
    calls = iter(range(n_calls))
    with pytest.raises(Stopped):
        calibrate(known[0], n_threads=1, stop=lambda: next(calls, None) is None)
    assert next(calls, None) is None
    assert chosen(calibrate(known[0], tokens=64)) == known[1].mask(), "and the next one works"


@pytest.mark.parametrize("when", [0.02, 0.1, 0.3])
def test_a_signal_is_not_lost_in_a_callback(known, when, capfd):
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(when, os.kill, (os.getpid(), signal.SIGINT))
    started = time.monotonic()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        calibrate(known[0], n_threads=1)  # takes many seconds
    assert time.monotonic() - started < when + 5
    assert signal.getsignal(signal.SIGINT) is before
    assert "ignored" not in capfd.readouterr().err
    gc.collect()


CONVERT = "from razor_local.cli import main; main(prog_name='razor-local')"

# tells when the computation is under way
TELLING = f"""
from razor_local.converters.calibrate import _Probe
report = _Probe._report

def tell(*args):
    print(".", flush=True)
    report(*args)

_Probe._report = tell
{CONVERT}
"""


@pytest.mark.parametrize("delay", [0, 0.5])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_conversion_leaves_nothing(known, tmp_path, how, delay):
    out, kept = tmp_path / "out.gguf", tmp_path / "scores.json"
    args = ["convert", known[0], "-o", out, "--save-scores", kept, "-t", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", TELLING, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    assert process.stdout.read(1) == b"."
    time.sleep(delay)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode != 0
    assert list(tmp_path.iterdir()) == []
    if how == signal.SIGINT:
        assert stderr.decode().strip() == "Aborted!"


# -- the command


def test_convert_finds_the_heads_and_keeps_all_scores(known, tmp_path):
    path, spec = known
    out, side, kept = (tmp_path / name for name in ("out.gguf", "side.gguf", "scores.json"))
    code, stdout, stderr = run(
        "convert", path, "-o", out, "--tokens", 64, "--seed", 5, "--save-scores", kept
    )
    assert code == 0 and stderr == (
        f"Note: the heads were not tested on planted facts: {path} has no tokenizer, so that it"
        " cannot read a text.\n"
    )
    assert stdout == (
        f"{out}: 4 of 16 KV heads are retrieval heads (25.0%)\n"
        "KV cache at 8,192 tokens: 10.8 MiB instead of 16.0 MiB (-33 %)\n"
        "KV cache at 10,240 tokens: 11.8 MiB instead of 20.0 MiB (-41 %)\n"
        f"Next: razor-local chat {out}\n"
    )
    profile, scores = read_profile(out), load_scores(kept)
    assert [layer.tolist() for layer in profile.retrieval] == spec.mask()
    assert (profile.echo_score == scores.echo).all()
    assert (profile.induction_score == scores.induction).all()
    assert profile.calibration == scores.calibration | {"select": "score"}
    assert (profile.calibration["tokens"], profile.calibration["seed"]) == (64, 5)

    # another budget from the same scores, for the copy of the model too
    for model in (path, out):
        code, stdout, stderr = run(
            "convert", model, "-o", side, "--scores", kept, "--budget", 0.5, "--sidecar",
            "--force", "--no-proof",
        )  # fmt: skip
        assert (code, stderr) == (0, "") and "8 of 16 KV heads" in stdout
    profile = read_sidecar(side, read_model_shape(path))
    assert profile.calibration["budget"] == "0.5"
    assert [layer.tolist() for layer in profile.retrieval] == chosen(scores, budget=0.5)

    # the paper's shares by name
    args = ("convert", path, "-o", side, "--scores", kept, "--sidecar", "--force", "--no-proof")
    for more in (["--select", "paper"], ["--induction", 0.14], ["--echo", 0.01]):
        assert run(*args, *more)[0] == 0
        profile = read_sidecar(side, read_model_shape(path))
        assert profile.calibration["select"] == "paper"
        wanted = chosen(scores, induction=0.14, echo=0.01)
        assert [layer.tolist() for layer in profile.retrieval] == wanted


def test_scores_of_another_model_are_refused(known, tmp_path):
    kept, other = tmp_path / "scores.json", tmp_path / "other.gguf"
    run("convert", known[0], "-o", tmp_path / "o.gguf", "--tokens", 16, "--save-scores", kept)
    known_heads.make_model(other, known_heads.place_heads(1))
    code, _, stderr = run("convert", other, "-o", tmp_path / "x.gguf", "--scores", kept)
    assert code == 1 and "Error: the scores were measured on another model file" in stderr
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--scores", "s.json", "--tokens", 5], "--scores and --tokens exclude each other"),
        (["--scores", "s.json", "--save-scores", "t"], "--scores and --save-scores exclude"),
        (["--heads", "h.tsv", "--seed", 5], "--heads and --seed exclude each other"),
        (["--heads", "h.tsv", "--scores", "s.json"], "--heads and --scores exclude each other"),
        (["--budget", 0.2, "--induction", 0.1], "--budget and --induction exclude"),
        (["--retrieval", 0.2, "--select", "paper"], "--budget and --select exclude"),
        (["--select", "score", "--echo", 0.1], "--echo is a share of the paper's choice"),
        (["--no-proof", "--haystack", "x"], "--no-proof and --haystack exclude each other"),
        (["--no-proof", "--scores", "s.json", "-t", 1], "--no-proof and --threads exclude"),
        (["--budget", 1.5], "Invalid value for '--budget'"),
        (["--max-memory", "much"], "'much' is not a size, expected one like 3G or 512M"),
    ],
)
def test_options_that_would_be_ignored_are_refused(known, tmp_path, args, text):
    code, stdout, stderr = run("convert", known[0], "-o", tmp_path / "o.gguf", *args)
    assert code == 2 and stdout == "" and text in stderr
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused_before_measuring(known, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "calibrate", None)  # calling it would fail otherwise
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    code, _, stderr = run("convert", known[0], "-o", out)
    assert code == 1 and "exists; choose another name or pass --force" in stderr
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--sinks", 5000], "--sink-tokens is 5000"),
        (["--window-min", 0], "--window-min is 0"),
        (["--save-scores", "no/folder/scores.json"], "the folder no/folder does not exist"),
        (["--save-scores", "MODEL"], "is the model itself"),
        (["--save-scores", "OUT"], "is named for two results; choose another name"),
        (["--save-scores", "KEPT"], "exists; choose another name or pass --force"),
        (["--save-scores", "/proc/scores.json"], "the folder /proc cannot be written to"),
        (["--scope-by", "score", "-c", 999999999999], "999999999999"),
        (["--scope-by", "score", "-c", 1], "so there are no windows to share; use a larger -c"),
        (["-o", "/proc/x.gguf"], "the folder /proc cannot be written to"),
        (["-o", "x" * 300], "File name too long"),
    ],
)
def test_what_could_go_wrong_at_the_end_is_refused_at_the_start(
    known, tmp_path, monkeypatch, args, text
):
    monkeypatch.setattr(module, "calibrate", None)
    kept = tmp_path / "kept.json"
    kept.write_text("mine")
    names = {"MODEL": known[0], "OUT": tmp_path / "o.gguf", "KEPT": kept}
    args = [names.get(arg, arg) for arg in args]
    code, _, stderr = run("convert", known[0], "-o", tmp_path / "o.gguf", *args)
    assert code != 0 and text in stderr
    assert kept.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_seen_before_measuring(known, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "calibrate", None)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    code, _, stderr = run("convert", known[0], "-o", tmp_path / "o.gguf")
    assert code == 1 and "has 1 KiB free, o.gguf needs" in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def kept_in(tmp_path, monkeypatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "kept"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def failing_write(at: Path, monkeypatch) -> None:
    """Makes writing the file at fail, as on a full disk."""
    publish = safe_write.publish

    def full(part: Path, path: Path, replace: bool) -> None:
        if Path(path) == at:
            raise OSError(28, "No space left on device")
        publish(part, path, replace)

    for place in (safe_write, writer):
        monkeypatch.setattr(place, "publish", full)


def test_scores_that_cannot_be_saved_are_kept_elsewhere(known, tmp_path, kept_in, monkeypatch):
    out, wanted = tmp_path / "o.gguf", tmp_path / "scores.json"
    failing_write(wanted, monkeypatch)
    args = ("convert", known[0], "-o", out, "--tokens", 64, "--no-proof")
    code, stdout, stderr = run(*args, "--save-scores", wanted)
    (kept,) = kept_in.iterdir()
    assert stderr == (
        f"Note: {wanted} could not be written (No space left on device); the measured scores were"
        f" saved to {kept} (pass it with --scores).\n"
    )
    assert code == 1 and "KV heads are retrieval heads" in stdout  # the conversion went on
    record = read_profile(out)
    assert np.array_equal(load_scores(kept).induction, record.induction_score)
    assert not wanted.exists() and not list(tmp_path.glob(".*"))


def test_scores_are_kept_when_the_copy_cannot_be_written(known, tmp_path, kept_in, monkeypatch):
    out = tmp_path / "o.gguf"
    failing_write(out, monkeypatch)
    args = ("convert", known[0], "-o", out, "--no-proof")
    code, stdout, stderr = run(*args, "--tokens", 64)
    (kept,) = kept_in.iterdir()
    assert (code, stdout) == (1, "") and not out.exists()
    note, error = stderr.splitlines()
    assert note == (
        f"Note: the output could not be written; the measured scores were saved to {kept} (pass it"
        " with --scores)."
    )
    assert error.endswith("No space left on device")
    monkeypatch.undo()
    monkeypatch.setattr(module, "calibrate", None)
    assert run(*args, "--scores", kept)[0] == 0


def test_a_model_that_looks_for_nothing_gets_no_profile(tiny, tmp_path):
    out = tmp_path / "o.gguf"
    args = ("convert", tiny(tiny_models.TinySpec()), "-o", out, "--tokens", 64)
    for more in ([], ["--no-proof"]):
        code, stdout, stderr = run(*args, *more)
        assert (code, stdout) == (1, "") and not out.exists()
        assert stderr.startswith("Error: ") and ": no head stands out by its scores" in stderr
        assert stderr.endswith(
            "so no profile was written; run the model with its full cache, or force a choice with"
            " --budget 0.15\n"
        )
    code, stdout, stderr = run(*args, "--budget", 0.5, "--no-proof")
    assert (code, stderr) == (0, "") and "3 of 6 KV heads" in stdout


@pytest.mark.parametrize(
    ("size", "n_bytes"), [("3G", 3 << 30), ("512M", 512 << 20), ("1.5GiB", 3 << 29), ("9", 9)]
)
def test_sizes(known, tmp_path, monkeypatch, size, n_bytes):
    seen = {}

    def stop(_model, **options):
        seen.update(options)
        raise ConvertError("stopped")

    monkeypatch.setattr(module, "calibrate", stop)
    code, _, stderr = run(
        "convert", known[0], "-o", tmp_path / "o.gguf", "--max-memory", size, "-t", 3, "-ngl", 5
    )
    assert code == 1 and "Error: stopped" in stderr
    del seen["progress"], seen["stop"]
    assert seen == {"max_memory": n_bytes, "n_threads": 3, "n_gpu_layers": 5}


# -- another budget at load


@pytest.fixture(scope="module")
def converted(known, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "out.gguf"
    args = ("convert", known[0], "-o", out, "--tokens", 64, "--window-min", 100)
    assert run(*args, "--window-divisor", 0)[0] == 0
    return out


def test_llama_chooses_the_heads_again(known, converted):
    for retrieval, n in ((None, 4), (0.25, 4), (0.5, 8), (1 / 16, 1), (0, 0)):
        llama = Llama(converted, n_ctx=1024, retrieval=retrieval)
        memory = llama.memory()
        assert sum(layer.retrieval_kv_heads for layer in memory.layers) == n
        assert llama.plan.retrieval_kv_heads == n
        llama.close()


@pytest.fixture(scope="module")
def unscored(tmp_path_factory) -> Path:
    """The built-in model with a profile without scores."""
    out = tmp_path_factory.mktemp("unscored") / "out.gguf"
    profile = replace(read_profile(DEFAULT_MODEL), echo_score=None, induction_score=None)
    return write_copy(DEFAULT_MODEL, out, profile)


def test_a_budget_needs_scores_and_razor(known, converted, unscored):
    with pytest.raises(ProfileError, match="has no razor profile that budget"):
        Llama(known[0], retrieval=0.5)
    with pytest.raises(ProfileError, match="leave one or the other out"):
        Llama(converted, razor=False, retrieval=0.5)
    with pytest.raises(ProfileError, match="budget is 2, expected a share"):
        Llama(converted, retrieval=2)
    with pytest.raises(ProfileError, match="has no head scores.*measure them with"):
        Llama(unscored, retrieval=0.5)


def test_inspect_shows_another_budget(known, converted):
    for retrieval, n in ((0.5, 8), (0.1, 2)):
        code, stdout, _ = run("inspect", converted, "-c", 1024, "--retrieval", retrieval, "--json")
        assert code == 0 and json.loads(stdout)["retrieval_kv_heads"] == n
    code, _, stderr = run("inspect", known[0], "--retrieval", 0.5)
    assert code == 1 and "has no razor profile; make one with" in stderr


def test_chat_takes_a_budget(converted, unscored):
    command = [sys.executable, "-c", CONVERT, "chat"]
    for model, args, text in (
        (unscored, ["--retrieval", "0.5"], "has no head scores"),
        (converted, ["--retrieval", "0.5", "--no-razor"], "--budget and --no-razor exclude"),
    ):
        done = subprocess.run(
            [*command, model, *args],
            input="hello",
            capture_output=True,
            text=True,
            cwd=converted.parent,
        )
        assert done.returncode != 0 and text in done.stderr
