"""razor-local fit: what is planned dry is what is then allocated, and the search is right."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from razor_local import (
    Llama,
    Profile,
    RazorError,
    UnsupportedError,
    available_memory,
    fit,
    make_plan,
    native,
)
from razor_local.bench.shape_file import write_shape_model
from razor_local.bench.shapes import SHAPES
from razor_local.cli import main
from razor_local.cli.chat import DEFAULT_MODEL
from razor_local.fit import RAM, ContextOptions, DryModel, largest_fitting, paper_profile
from tests.support.gguf_bytes import gguf, kv, small_model
from tests.support.other_models import make_other
from tests.support.tiny_models import TinySpec, make_model, make_split_model, model_kv, razor_kv

SPECS = {
    "llama": TinySpec("llama", 6, 4, 4, 64, n_embd=64, n_ff=96, n_vocab=512, n_ctx_train=8192),
    "qwen3": TinySpec("qwen3", 3, 4, 1, 128, n_embd=96, n_ff=128, n_vocab=300, n_ctx_train=4096),
    "gpt2": TinySpec("gpt2", 3, 2, 2, 32, n_ff=128, n_vocab=400, n_ctx_train=4096),
}
PLANS = [(cache, t) for cache in ("full", "razor") for t in ("f16", "q8_0", "q4_0")]


# all layers on the device, where there is one
EVERYWHERE = {"n_gpu_layers": -1, "n_threads": 1, "n_threads_batch": 1}


def profile_of(model: DryModel) -> Profile:
    """As without a profile, with a window that saves something in short contexts."""
    return replace(paper_profile(model.shape), window_min=300, window_divisor=0)


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["fit", *map(str, args)])
    return result.exit_code, result.stdout, result.stderr


def test_a_narrow_terminal_cuts_no_number(monkeypatch) -> None:
    monkeypatch.setattr(
        "razor_local.available_memory.available_ram", lambda *_: 3 << 30
    )  # it changes by itself
    monkeypatch.setenv("COLUMNS", "200")
    commands = [(), ("-c", "4096"), ("-ctlk", "q8_0", "-ctlv", "q4_0")]
    wide = [run(DEFAULT_MODEL, *options) for options in commands]
    monkeypatch.setenv("COLUMNS", "30")
    assert [run(DEFAULT_MODEL, *options) for options in commands] == wide


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fit")
    found = {name: make_model(folder / f"{name}.gguf", spec) for name, spec in SPECS.items()}
    (folder / "split").mkdir()
    found["split"] = make_split_model(folder / "split", SPECS["llama"])
    return found


@pytest.fixture(scope="module")
def model(files):
    with DryModel(files["llama"]) as dry:
        yield dry


# -- against real allocation


def allocated(llama: Llama) -> tuple[int, int, int]:
    """Weights, KV and compute bytes of the buffers of a context that really exists."""
    memory = native.load().memory(llama.ctx)
    return tuple(sum(getattr(m, part) for m in memory) for part in ("weights", "cache", "compute"))


@pytest.mark.parametrize("cache, kv_type", PLANS, ids=[f"{c}-{t}" for c, t in PLANS])
@pytest.mark.parametrize("name", [*SPECS, "split"])
def test_what_is_planned_is_allocated(name, cache, kv_type, files):
    with DryModel(files[name]) as dry:
        profile = profile_of(dry) if cache == "razor" else None
        need = dry.need(3000, ContextOptions(profile, kv_type, kv_type))
        assert (need.n_ctx, need.active) == (3072, cache == "razor")
        plan = make_plan(dry.shape, profile, 3000, kv_type, kv_type)
    types = {"type_k": kv_type, "type_v": kv_type}
    llama = Llama(files[name], razor=profile or False, n_ctx=3000, **types, **EVERYWHERE)
    try:
        for _ in range(2):
            weights, kv_bytes, compute = allocated(llama)
            assert kv_bytes == need.kv == plan.kv_bytes == llama.memory().kv_bytes
            assert compute == pytest.approx(need.compute, rel=0.01)
            assert weights + kv_bytes + compute == pytest.approx(need.total, rel=0.01)
            # and nothing grows while it works: a full step, short ones, a fold
            llama.prefill([i % 300 for i in range(600)])
    finally:
        llama.close()


def test_types_of_local_heads(files):
    """Types of local heads appear in the name of razor's cache, not in that of a full cache."""
    code, stdout, stderr = run(files["llama"], "-c", "4096", "-ctk", "f16", "-ctlk", "q8_0")
    assert (code, stderr) == (0, "")
    rows = table(stdout)
    assert {"full f16", "razor f16 (local q8_0/f16)"} <= set(rows)
    with DryModel(files["llama"]) as dry:
        options = ContextOptions(profile_of(dry), type_k_local="q8_0", type_v_local="q4_0")
        need = dry.need(3000, options)
        assert dry.flash_attention("f16", "f16", "q4_0")
    types = {"type_k_local": "q8_0", "type_v_local": "q4_0"}
    llama = Llama(files["llama"], razor=options.profile, n_ctx=3000, **types, **EVERYWHERE)
    assert allocated(llama)[1] == need.kv == llama.plan.kv_bytes
    assert llama.plan.has_local_types


@pytest.mark.parametrize("cache", ["full", "razor"])
def test_without_flash_attention(cache, files):
    """Other buffers, and a V cache padded to the widest layer."""
    with DryModel(files["llama"]) as dry:
        profile = profile_of(dry) if cache == "razor" else None
        need = dry.need(2048, ContextOptions(profile, flash_attn=False, n_batch=256, n_ubatch=64))
    llama = Llama(
        files["llama"],
        razor=profile or False,
        n_ctx=2048,
        flash_attn=False,
        n_batch=256,
        n_ubatch=64,
        n_gpu_layers=-1,
    )
    weights, kv_bytes, compute = allocated(llama)
    llama.close()
    assert kv_bytes == need.kv
    assert weights + kv_bytes + compute == pytest.approx(need.total, rel=0.01)


@pytest.mark.parametrize("quant", ["q4_0", "q8_0"])
def test_weights_of_other_types(quant, tmp_path):
    """Also where the CPU backend repacks them: one copy counts."""
    shape = replace(SHAPES["llama-3.2-1b"], n_layer=1, n_vocab=512)
    path = write_shape_model(tmp_path / "m.gguf", shape, quant=quant)
    with DryModel(path) as dry:
        need = dry.need(512)
    # (the token embedding is the output head, too, and may lie in both places)
    assert path.stat().st_size * 0.99 < need.weights < path.stat().st_size * 1.03
    llama = Llama(path, n_ctx=512, use_mmap=False, **EVERYWHERE)
    assert sum(allocated(llama)) == pytest.approx(need.total, rel=0.01)
    llama.close()


@pytest.mark.parametrize("arch", ["mamba", "deepseek2"])
def test_caches_that_no_plan_describes(arch, tmp_path):
    """States and latents: llama.cpp says what a full cache takes, razor is refused"""
    path = make_other(tmp_path / "m.gguf", arch)
    with DryModel(path) as dry:
        need = dry.need(512)
        if dry.shape is not None:
            with pytest.raises(UnsupportedError, match="not supported, switch razor off"):
                dry.need(512, ContextOptions(paper_profile(dry.shape)))
    llama = Llama(path, n_ctx=512, razor=False, use_mmap=False, **EVERYWHERE)
    weights, kv_bytes, compute = allocated(llama)
    llama.close()
    assert kv_bytes == need.kv
    assert weights + kv_bytes + compute == pytest.approx(need.total, rel=0.01)
    code, stdout, stderr = run(path, "-c", 512)
    assert (code, stderr) == (0, "")
    assert "only full caches are planned" in stdout and "\nfull f16 " in stdout


def test_layers_on_the_gpu_do_nothing_without_one(files):
    needs = []
    for n in (-1, 0, 3):
        with DryModel(files["llama"], n_gpu_layers=n) as dry:
            if dry.devices():
                pytest.skip("this build has a device")
            needs.append(dry.need(2048))
    assert needs[0] == needs[1] == needs[2]
    assert [place.name for place in needs[0].places] == [RAM]


def test_layers_on_a_device_and_in_ram(files):
    """Each memory by itself, for every number of layers on the device."""
    for n in range(SPECS["llama"].n_layer + 2):
        with DryModel(files["llama"], n_gpu_layers=n) as dry:
            if not dry.devices():
                pytest.skip("this build has no device")
            profile = profile_of(dry)
            need = dry.need(2048, ContextOptions(profile, "q8_0", "q8_0"))
            # a tensor that is too large for the device is refused before it ends the process
            assert dry.largest({}, n_max=1 << 20).n_ctx <= 1 << 20
        options = {"type_k": "q8_0", "type_v": "q8_0"} | EVERYWHERE | {"n_gpu_layers": n}
        llama = Llama(files["llama"], razor=profile, n_ctx=2048, **options)
        places = fit._places(native.load().memory(llama.ctx), 0)
        llama.close()
        assert [place.name for place in places] == [place.name for place in need.places]
        for found, told in zip(places, need.places, strict=True):
            assert found.kv == told.kv
            assert found.total == pytest.approx(told.total, rel=0.01)


@pytest.fixture(scope="module")
def headers_of_8b(tmp_path_factory) -> Path:
    """The shape of Llama 3.1 8B in Q4_K; its tensors are a hole in the file."""
    path = tmp_path_factory.mktemp("8b") / "8b.gguf"
    spec = TinySpec("llama", 32, 32, 8, 128, 4096, 14336, 128256, 131072, rope_base=5e5)
    q4, f32 = GGMLQuantizationType.Q4_K, GGMLQuantizationType.F32
    shapes = {"token_embd": (128256, 4096), "output": (128256, 4096), "output_norm": (4096,)}
    for il in range(32):
        shapes |= {
            f"blk.{il}.{name}": shape
            for name, shape in {
                "attn_q": (4096, 4096),
                "attn_k": (1024, 4096),
                "attn_v": (1024, 4096),
                "attn_output": (4096, 4096),
                "ffn_gate": (14336, 4096),
                "ffn_up": (14336, 4096),
                "ffn_down": (4096, 14336),
                "attn_norm": (4096,),
                "ffn_norm": (4096,),
            }.items()
        }
    writer = GGUFWriter(path, "llama")
    for key, (value, kind) in model_kv(spec).items():
        writer.add_key_value(key, value, kind)
    total = 0
    for name, shape in shapes.items():
        if len(shape) == 1:
            n_bytes = 4 * shape[0]
            writer.add_tensor_info(f"{name}.weight", shape, np.dtype("f4"), n_bytes, f32)
        else:
            rows = (shape[0], shape[1] // 256 * 144)
            n_bytes = rows[0] * rows[1]
            writer.add_tensor_info(f"{name}.weight", rows, np.dtype("u1"), n_bytes, q4)
        total += n_bytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + total)
    with DryModel(path) as dry:
        if dry.devices():
            pytest.skip("what is told of this model is of a build without a device")
    return path


MEASURE = """
import resource, sys
from razor_local.fit import ContextOptions, DryModel, paper_profile
def read():
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])
def memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = read(), memory()
with DryModel(sys.argv[1]) as dry:
    profile = paper_profile(dry.shape)
    totals = [dry.need(131072, ContextOptions(p)).total for p in (None, profile)]
print(read() - before[0], memory() - before[1], *totals)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_headers_alone_are_read_and_nothing_is_allocated(headers_of_8b):
    path = headers_of_8b
    assert path.stat().st_size > 4 << 30
    child = [sys.executable, "-c", MEASURE, str(path)]
    out = subprocess.run(child, capture_output=True, text=True, check=True).stdout
    n_read, n_memory, full, razor = map(int, out.split())
    assert n_read < 32 << 20 and n_memory < 256 << 20
    assert full > 20 << 30 > 12 << 30 > razor

    code, stdout, _ = run(path, "-c", 131072, "--json")
    shown = {plan["name"]: plan["needs"][0]["total_bytes"] for plan in json.loads(stdout)["plans"]}
    assert (shown["full f16"], shown["razor f16"]) == (full, razor)


# -- the search


@given(
    st.integers(1, 3000),
    st.integers(0, 2**34),
    st.lists(st.tuples(st.integers(1, 3000), st.integers(0, 2**22)), max_size=5),
    st.lists(st.integers(1, 3000), max_size=5),
)
@settings(deadline=None, max_examples=300)
def test_search_finds_the_largest(top, memory, slopes, tried):
    """On any curve that rises in pieces, the answer of brute force, with few questions."""
    n = np.arange(1, top + 1)
    bytes_of = np.zeros(top, np.int64)
    for start, slope in slopes:
        bytes_of += np.maximum(n - start, 0) * slope + (n >= start) * slope
    asked = []

    def room(tokens: int) -> float:
        assert tokens % 256 == 0 and 0 < tokens <= top * 256
        asked.append(tokens)
        return float(memory - bytes_of[tokens // 256 - 1])

    found = largest_fitting(room, top * 256, [256 * t for t in tried])
    fitting = np.flatnonzero(bytes_of <= memory)
    assert found == (256 * (int(fitting[-1]) + 1) if fitting.size else 0)
    assert len(asked) == len(set(asked)) <= len(set(tried)) + 45


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=60), st.data())
def test_search_on_any_curve_finds_an_edge(rooms, data):
    """Compute buffers do not quite rise: what is found fits, and the next size does not."""
    tried = data.draw(st.lists(st.integers(1, len(rooms)), max_size=4))
    found = largest_fitting(
        lambda n: rooms[n // 256 - 1], 256 * len(rooms), [256 * t for t in tried]
    )
    unit = found // 256
    if unit == 0:
        assert rooms[0] < 0
    else:
        assert rooms[unit - 1] >= 0 and (unit == len(rooms) or rooms[unit] < 0)


@given(
    st.integers(0, 300 << 20),
    st.integers(0, 64 << 20),
    st.sampled_from(PLANS),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_the_largest_context_fits_and_the_next_does_not(model, memory, more, plan, flash_attn):
    cache, kv_type = plan
    kv_type = kv_type if flash_attn else "f16"
    profile = PROFILE_CACHE.setdefault(model, profile_of(model)) if cache == "razor" else None
    options = ContextOptions(profile, kv_type, kv_type, flash_attn)
    n_max, places = 1 << 18, (RAM, *model.devices())
    found = model.largest(dict.fromkeys(places, memory), options, n_max)
    larger = model.largest(dict.fromkeys(places, memory + more), options, n_max)

    def fullest(n_ctx: int) -> int:
        return max(place.total for place in model.need(n_ctx, options).places)

    if found is None:
        assert fullest(256) > memory
        return
    assert found.n_ctx % 256 == 0 and fullest(found.n_ctx) <= memory
    assert found.n_ctx == n_max or fullest(found.n_ctx + 256) > memory
    assert larger.n_ctx >= found.n_ctx and larger.kv >= found.kv


PROFILE_CACHE: dict[DryModel, Profile] = {}


def test_no_limit_and_the_trained_length(model):
    assert model.largest({}).n_ctx == model.n_ctx_train == 8192
    assert model.largest({RAM: 2**40}, n_max=10000).n_ctx == 10240
    assert model.largest({"CUDA7": 1}).n_ctx == 8192  # a memory that nothing goes into
    assert model.need(0).n_ctx == 8192
    assert model.need(1000).room({}) == math.inf


# -- what it is for


def test_paper_shares(model):
    heads = paper_profile(model.shape).flat()
    assert heads.sum() == 5  # 14 % and 1 % of 24, rounded up
    assert max(layer.sum() for layer in paper_profile(model.shape).retrieval) == 1
    assert "planned with the paper's shares, 5 of 24 KV heads" in run(model.path)[1]


def leave(monkeypatch, n_bytes: int) -> None:
    """Lets this machine have n_bytes for a model, beside the margin."""
    monkeypatch.setattr(available_memory, "available_ram", lambda *_: n_bytes + fit.MARGIN)


def test_no_memory_left(model, monkeypatch):
    monkeypatch.setattr(available_memory, "available_ram", lambda *_: fit.MARGIN // 2)
    if model.devices():
        pytest.skip("this build has a device")
    assert "this machine: 0.0 GiB of RAM available" in run(model.path)[1]


def test_auto(model, monkeypatch):
    if model.devices():
        pytest.skip("this build has a device")
    profile = profile_of(model)
    limit = model.need(4096, ContextOptions(profile)).total
    leave(monkeypatch, limit)
    llama = Llama(model.path, razor=profile, n_ctx="auto")
    assert llama.n_ctx() >= 4096 and llama.plan.active
    assert llama.n_ctx() == model.largest({RAM: limit}, ContextOptions(profile)).n_ctx
    assert sum(allocated(llama)) <= limit
    llama.close()
    # the options count: larger caches, smaller computations, another window
    sizes = [
        Llama(model.path, n_ctx="auto", **options).n_ctx()
        for options in (
            {"razor": False},
            {"razor": False, "type_k": "q8_0", "type_v": "q8_0"},
            {"razor": False, "n_ubatch": 32},
            {"razor": profile, "window": 64},
        )
    ]
    assert sizes[0] < sizes[1] and sizes[0] < sizes[2] and llama._n_ctx < sizes[3]
    leave(monkeypatch, 2**40)
    assert Llama(model.path, n_ctx="auto").n_ctx() == 8192  # as trained
    leave(monkeypatch, 100_000)
    with pytest.raises(
        RazorError,
        match="even a context of 1,024 tokens needs .* or pass n_ctx=1024 to use the 1 GiB",
    ):
        Llama(model.path, n_ctx="auto")


def test_auto_refusals(files):
    for options, message in (
        ({"n_ctx": "much"}, "n_ctx is 'much', expected a number of tokens or 'auto'"),
        ({"n_ctx": "auto", "embedding": True}, "pass a number with embedding=True"),
        ({"n_ctx": "auto", "split_mode": fit.C.LLAMA_SPLIT_MODE_TENSOR}, "split mode 'tensor'"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            Llama(files["llama"], razor=False, **options)


def test_chat_auto(monkeypatch):
    with DryModel(DEFAULT_MODEL) as dry:
        if dry.devices():
            pytest.skip("this build has a device")
        options = ContextOptions(dry.file.profile)
        leave(monkeypatch, dry.need(1280, options).total)
    result = CliRunner().invoke(main, ["chat", "-c", "auto", "-n", "1"], input="hello")
    assert result.exit_code == 0 and "/1280 |" in result.stderr
    leave(monkeypatch, 100_000)
    result = CliRunner().invoke(main, ["chat"], input="hello")
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert re.fullmatch(
        r"Error: .*razor-default.gguf: even a context of 1,024 tokens needs \d+\.\d MiB of memory"
        r" \(\d+\.\d MiB of weights\), and 0\.1 MiB are available; take a smaller quantization of"
        r" the model, or pass -c 1024 to use the 1 GiB that is kept free\n",
        result.stderr,
    )
    result = CliRunner().invoke(main, ["chat", "-c", "lots"], input="hello")
    assert result.exit_code == 2
    assert (
        "'lots' is not a context size, expected a number such as 8192 or 32k, or auto"
        in result.stderr
    )


def test_chat_takes_the_largest_context_that_fits(tmp_path, monkeypatch):
    """The limit is 32,768 tokens or the trained length. The header shows if it is lower."""
    from razor_local.cli.chat import chat
    from razor_local.cli.chat_status import describe
    from razor_local.cli.generation import MAX_DEFAULT_CTX, load

    with DryModel(DEFAULT_MODEL) as dry:
        if dry.devices():
            pytest.skip("this build has a device")
        enough = dry.need(2048, ContextOptions(dry.file.profile)).total
    defaults = chat.make_context("chat", []).params

    def header(path, n_bytes, **options):
        leave(monkeypatch, n_bytes)
        llama, chosen = load(path, defaults | options)
        line = describe(llama, chosen).splitlines()[1]
        llama.close()
        return line.partition("context ")[2]

    fits = f"the largest that fits into {(enough + fit.MARGIN) / 2**30:.1f} GiB of free memory"
    smaller = f"2,048 tokens ({fits} with 1 GiB to spare)"
    assert header(DEFAULT_MODEL, enough) == smaller
    assert header(DEFAULT_MODEL, enough, ctx_size="auto") == smaller
    assert header(DEFAULT_MODEL, 2**40) == header(DEFAULT_MODEL, 2**40, ctx_size=0)
    assert header(DEFAULT_MODEL, 2**40) == "8,192 tokens"
    assert header(DEFAULT_MODEL, enough, ctx_size=4096) == "4,096 tokens"
    spec = TinySpec("llama", 1, 2, 1, 64, n_ctx_train=2 * MAX_DEFAULT_CTX)
    long = make_model(tmp_path / "long.gguf", spec)
    assert header(long, 2**40) == "32,768 tokens"
    assert header(long, 2**40, ctx_size="auto") == "65,536 tokens"


def test_available_memory():
    assert 0 < available_memory.available_ram() <= available_memory.device_memory("CPU")[1]
    assert available_memory.device_memory("no such device") == (0, 0)


V2, V1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no control groups")
@pytest.mark.parametrize(
    ("cgroup", "root", "kind", "files", "limits", "left"),
    [
        # the groups below the mount point, with their limits
        ("0::/", "/", "cgroup2", V2, {".": 5}, 2.5),
        ("0::/user/app", "/", "cgroup2", V2, {".": "max", "user": 6, "user/app": 5}, 2.5),
        ("0::/user/app", "/", "cgroup2", V2, {"user": 4, "user/app": "max"}, 1.5),
        ("0::/user/app", "/", "cgroup2", V2, {"user": 4, "user/other": 3.5}, 1.5),
        ("0::/pod/a/app", "/pod/a", "cgroup2", V2, {".": 7, "app": 5}, 2.5),
        ("0::/pod/a", "/pod/b", "cgroup2", V2, {".": 5}, 2.5),
        ("0::/", "/", "cgroup2", V2, {".": 2}, 0),
        ("3:cpu,memory:/job", "/", "cgroup", V1, {".": 9, "job": 5}, 2.5),
        ("3:cpu,memory:/job\n0::/", "/", "cgroup", V1, {"job": 5}, 2.5),
    ],
)
def test_limits_of_control_groups(tmp_path, monkeypatch, cgroup, root, kind, files, limits, left):
    """The least memory left by a group or a group above it counts. Sizes in MB, 3 MB are used."""
    mount = tmp_path / "mount"
    for folder, limit in limits.items():
        (mount / folder).mkdir(parents=True, exist_ok=True)
        n_bytes = limit if limit == "max" else int(limit * 1e6)
        (mount / folder / files[0]).write_text(f"{n_bytes}\n")
        (mount / folder / files[1]).write_text("3000000\n")
        (mount / folder / "memory.stat").write_text("x 1\ninactive_file 500000\n")
    (tmp_path / "cgroup").write_text(f"2:cpuset:/other\n{cgroup}\n")
    (tmp_path / "mountinfo").write_text(
        "22 27 0:21 / /proc rw,relatime - proc proc rw\n"
        f"31 24 0:27 / {tmp_path}/cpuset rw - cgroup cgroup rw,cpuset\n"
        f"32 24 0:28 {root} {mount} rw,nosuid shared:9 - {kind} cgroup rw,memory\n"
    )
    monkeypatch.setattr(available_memory, "_PROC", tmp_path)
    assert available_memory.available_ram() == int(left * 1e6)
    (tmp_path / "mountinfo").write_text("nonsense\n")
    assert available_memory.available_ram() > 10e6


def test_flash_attention_is_on_where_llama_cpp_turns_it_on(files, monkeypatch):
    command = ["inspect", str(files["llama"]), "--json", "-fa"]

    def inspected(choice: str) -> str:
        return CliRunner().invoke(main, [*command, choice]).stdout

    with DryModel(files["llama"]) as dry:
        assert dry.flash_attention() and dry.flash_attention("q8_0", "q8_0")
        assert json.loads(inspected("auto"))["flash_attn"] and inspected("auto") == inspected("on")
        make = fit.C.llama_init_from_model

        def without(model: int, params: object) -> int:  # as on a device that cannot run it
            params.flash_attn_type = fit.C.LLAMA_FLASH_ATTN_TYPE_DISABLED
            return make(model, params)

        monkeypatch.setattr(fit.C, "llama_init_from_model", without)
        assert not dry.flash_attention() and dry.flash_attention("f16", "q8_0")
        assert inspected("auto") == inspected("off") != inspected("on")
        monkeypatch.setattr(fit.C, "llama_init_from_model", lambda model, params: None)
        with pytest.raises(UnsupportedError, match="llama.gguf cannot be planned"):
            dry.flash_attention()
    monkeypatch.undo()
    assert run(files["llama"], "-c", "512", "-fa", "auto") == run(files["llama"], "-c", "512")


# -- the command


def table(stdout: str) -> dict[str, list[str]]:
    """Rows of the table by their first cell."""
    lines = [line.split("  ") for line in stdout.splitlines()]
    return {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}


@pytest.fixture(scope="module")
def cards_of_8b(headers_of_8b) -> dict[str, list[str]]:
    code, stdout, stderr = run(headers_of_8b, "--beyond")
    assert (code, stderr) == (0, "")
    return table(stdout)


def test_cards_side_by_side(headers_of_8b, cards_of_8b):
    rows, cards = cards_of_8b, (8, 12, 16, 24, 32, 48)
    assert rows["memory"] == [f"{cache} {t}" for cache, t in PLANS]
    shown = [[int(n.replace(",", "")) for n in rows[f"{n} GiB"]] for n in cards]
    with DryModel(headers_of_8b) as dry:
        for i, (cache, t) in enumerate(PLANS):
            options = ContextOptions(paper_profile(dry.shape) if cache == "razor" else None, t, t)
            for n, contexts in zip(cards, shown, strict=True):
                limit = (n - 1) << 30
                assert dry.need(contexts[i], options).total <= limit
                assert dry.need(contexts[i] + 256, options).total > limit
    assert all(full < razor for row in shown for full, razor in zip(row, row[3:], strict=False))
    assert len(rows["this machine"]) == 6


def test_the_table_of_the_readme(cards_of_8b):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for memory in ("8 GiB", "12 GiB", "16 GiB", "24 GiB"):
        (line,) = re.findall(rf"^\| {memory} \| (.*) \|$", readme, re.M)
        for told, found in zip(line.split(" | "), cards_of_8b[memory], strict=True):
            numbers = [int(n.replace(",", "")) for n in (told, found)]
            assert numbers[0] == pytest.approx(numbers[1], rel=0.01), (memory, told, found)


def test_cards_end_at_the_trained_length(files):
    stdout = run(files["llama"])[1]
    assert table(stdout)["48 GiB"] == ["8,192"] * 6
    assert "8,192 tokens is the trained length; --beyond searches further" in stdout


def test_a_context_a_memory_and_both(model, files):
    if model.devices():
        pytest.skip("this build has a device")
    code, stdout, _ = run(files["llama"], "-c", 8000, "--ram", "30M", "--json")
    report = json.loads(stdout)
    assert code == 0 and report["memories"] == [{"name": "given", "limits": {RAM: 30 << 20}}]
    fits = {plan["name"]: plan["needs"][0]["fits"] for plan in report["plans"]}
    assert fits["full f16"] is False and fits["razor q4_0"] is True
    for plan in report["plans"]:
        need = plan["needs"][0]
        assert need["n_ctx"] == 8192
        assert need["total_bytes"] == sum(
            need[f"{part}_bytes"] for part in ("weights", "kv", "compute")
        )
        assert need["fits"] == (need["total_bytes"] <= 30 << 20)
    rows = table(run(files["llama"], "-c", 8000, "--ram", "30M")[1])
    assert rows["full f16"][-1] == "no" and rows["razor q4_0"][-1] == "yes"
    assert rows["full f16"][0] == "8,192" and rows["plan"][-1] == "fits"

    report = json.loads(run(files["llama"], "--ram", "45MiB", "-ctk", "f16", "--json")[1])
    assert [plan["name"] for plan in report["plans"]] == ["full f16", "razor f16"]
    full, razor = (plan["needs"][0] for plan in report["plans"])
    assert full["n_ctx"] < razor["n_ctx"] and full["fits"] and razor["fits"]

    inactive = run(files["llama"], "-c", 2048)[1]
    assert (
        "razor f16 runs the full cache: RazorAttention saves nothing up to 4,608 tokens" in inactive
    )


def test_profiles_of_the_file_a_sidecar_and_another_budget(files, tmp_path):
    mask = [[1, 0, 0, 0]] * 6
    path = make_model(tmp_path / "m.gguf", SPECS["llama"], razor_kv(mask))
    assert "in the file: 6 of 24 KV heads" in run(path)[1]
    from razor_local.converters.write import write_sidecar

    sidecar = tmp_path / "side.gguf"
    write_sidecar(files["llama"], sidecar, Profile(tuple(np.zeros(4, np.uint8) for _ in mask)))
    assert "in the sidecar: 0 of 24 KV heads" in run(files["llama"], "--sidecar", sidecar)[1]
    assert "sidecar of another model" in run(files["gpt2"], "--sidecar", sidecar)[2]
    assert "has no head scores" in run(path, "--retrieval", 0.5)[2]
    scores = {
        f"razor.head.{name}_score": (np.linspace(0, 1, 24, dtype=np.float32), GGUFValueType.ARRAY)
        for name in ("echo", "induction")
    }
    scored = make_model(tmp_path / "scored.gguf", SPECS["llama"], razor_kv(mask) | scores)
    assert "in the file: 12 of 24 KV heads" in run(scored, "--retrieval", 0.5)[1]


def test_picture(files, tmp_path):
    picture = tmp_path / "fit.svg"
    code, _, stderr = run(files["llama"], "-c", 4096, "--plot", picture)
    assert (code, stderr) == (0, "")
    assert "<svg" in picture.read_text() and list(tmp_path.iterdir()) == [picture]
    code, _, stderr = run(files["llama"], "--plot", tmp_path / "x.txt")
    assert code == 1 and "is not the name of a picture" in stderr
    code, _, stderr = run(files["llama"], "--plot", tmp_path / "no" / "x.png")
    assert code == 1
    assert stderr == f"Error: the folder {tmp_path}/no does not exist; make it first\n"
    assert list(tmp_path.iterdir()) == [picture]


def test_bad_input_is_one_sentence(files, tmp_path):
    def file(name: str, data: bytes) -> Path:
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    unknown = file("unknown.gguf", small_model().replace(b"llama", b"xyzzy"))
    no_model = file("tok.gguf", gguf([kv("general.name", 8, "x")]))
    half = file("half.gguf", files["llama"].read_bytes()[:-1000])
    for args, code, message in (
        ([tmp_path / "none.gguf"], 1, "none.gguf: No such file or directory"),
        ([tmp_path], 1, "is a folder, expected a GGUF file"),
        ([file("text.gguf", b"hello")], 1, "not a GGUF file"),
        ([unknown], 1, "unknown model architecture: 'xyzzy'"),
        ([no_model], 1, "tok.gguf cannot be planned"),
        ([half], 1, "half.gguf"),
        ([files["split"].with_name("split-00002-of-00005.gguf")], 1, "split"),
        ([files["llama"], "--ram", "100K"], 1, "even a context of 256 tokens needs"),
        ([files["llama"], "--ram", "much"], 2, "'much' is not a size, expected one like 3G"),
        ([files["llama"], "--vram", "-1G"], 2, "'-1G' is not a size"),
        (
            [files["llama"], "-c", "5 or 6"],
            2,
            "is not a context size, expected a number such as 8192 or 32k, or auto",
        ),
        ([files["llama"], "-c", 2**30], 1, "tokens cannot be planned, expected 1 to 4,194,304"),
        ([files["llama"], "-ctk", "q8_0", "-fa", "off"], 1, "requires flash_attn"),
        ([files["llama"], "--retrieval", 0.5], 1, "has no razor profile; make one with"),
        ([files["llama"], "--sidecar", files["gpt2"]], 1, "is not a sidecar"),
    ):
        found, stdout, stderr = run(*args)
        assert (found, stdout) == (code, ""), (args, stderr)
        last = stderr.splitlines()[-1]
        assert last.startswith("Error: ") and message in last and "Traceback" not in stderr
        assert code == 2 or stderr.count("\n") == 1, stderr
    with DryModel(files["llama"]) as dry:
        if not dry.devices():
            found, _, stderr = run(files["llama"], "--vram", "1G", "--ram", "1G")
            assert found == 2 and "there is only one memory; pass --vram or --ram" in stderr
    with pytest.raises(UnsupportedError, match="'q9_9' is not a KV cache type"):
        ContextOptions(type_k="q9_9")


def test_without_a_model_the_built_in_one_is_used():
    assert "MiB of weights" in run("-c", "512")[1]
