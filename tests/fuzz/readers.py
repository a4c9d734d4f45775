"""Fuzz target of all readers of untrusted files.

These are the readers of GGUF headers, razor keys, sidecars, split models, head lists of all kinds,
and files of head scores.

    python -m tests.fuzz.readers -runs=1000000 -timeout=2 -rss_limit_mb=1024 DIR
    python -m tests.fuzz.readers --random 1000000 DIR

The first command needs atheris (uv run --with atheris ...) and takes libFuzzer's options. It
searches inputs that reach new code and keeps them in DIR. The second mutates the seeds and the
files in DIR at random. Its code is not instrumented, so it measures the time that users see, also
with large files. Both stop at an exception other than RazorError, a message that is not one
printable line, more than 2 seconds of CPU time, or 1 GB. The input is written to crash-*. Move it
to found/, where a test runs it.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from tests.support.gguf_bytes import (
    BOOL,
    F32,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    gguf,
    kv,
    kv_array,
    tensor,
    u64,
)
from tests.support.gguf_bytes import razor_keys as keys
from tests.support.gguf_bytes import small_model as model

FOUND = Path(__file__).parent / "found"
SECONDS = 2.0
MEMORY = 1 << 30  # bytes
SPARSE = 700 << 20  # bytes: the file is larger than any size that the header's limits allow


def load() -> None:
    """Import the code under test, after this module so that atheris can instrument it."""
    global np, errors, header, heads, model_file, model_shape, plan, profile, scores, shape, split
    import numpy as np
    from razor_local.converters import heads

    from razor_local import errors, model_file, model_shape, plan, profile, scores
    from razor_local.gguf import header, split

    shape = model_shape.ModelShape("llama", 2, (4, 4), (2, 2), 32, 32, 4096, "small")
    vars(shape)["fingerprint"] = "0" * 64  # there is no file to compute it from


# -- the targets; the first byte of an input selects one


def read_gguf(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    _use(path)


def read_sparse_gguf(path: Path, data: bytes) -> None:
    """Read the input followed by zeros, so that large counts fit the file."""
    path.write_bytes(data)
    os.truncate(path, SPARSE)
    try:
        _use(path)
    finally:
        os.truncate(path, 0)


def _use(path: Path) -> None:
    h = header.read_header(path)
    for key in h.entries:
        for use in (
            lambda key: h.string(key),
            lambda key: h.number(key, (U32, I32, U16)),
            lambda key: h.array(key, U8, 1000),
            lambda key: h.array(key, F32, 1000),
        ):
            _expect_errors(use, key)
    _expect_errors(lambda _: _plan(h), None)


def _plan(h: object) -> None:
    found = model_shape.shape_from_parts(split.read_parts(h))
    model_shape.unsupported_feature(h, found)
    for n_ctx in (0, 32768):
        _expect_errors(
            lambda n: plan.make_plan(found, profile.profile_from_header(h, found), n).to_dict(),
            n_ctx,
        )


def read_sidecar(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    profile.read_sidecar(path, shape)


def read_split(path: Path, data: bytes) -> None:
    """Read two files; the second begins at the second magic."""
    at = data.find(b"GGUF", 4)
    at = len(data) if at < 0 else at
    first = path.with_name("m-00001-of-00002.gguf")
    first.write_bytes(data[:at])
    path.with_name("m-00002-of-00002.gguf").write_bytes(data[at:])
    model_file.read_model_shape(first)


def read_heads(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    for share in (None, 0.3):
        _expect_errors(lambda s: heads.profile_from_heads(path, shape, budget=s), share)
    found = heads.parse_heads(path)
    n = found.n_heads
    if found.kind == "scores":
        assert all(np.isfinite(layer).all() for layer in found.layers)
    read = heads.profile_from_heads(
        path,
        model_shape.ModelShape("llama", len(n), n, n, 32, 32, 4096),
        budget=None if found.kind == "heads" else 0.5,
    )
    assert tuple(map(len, read.retrieval)) == n


def read_scores(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    found = scores.load_scores(path)
    scores.choose_heads(found)
    found.check_model(shape)


TARGETS: tuple[Callable[[Path, bytes], None], ...] = (
    read_gguf,
    read_sparse_gguf,
    read_sidecar,
    read_split,
    read_heads,
    read_scores,
)


def _expect_errors(function: Callable[..., object], argument: object) -> None:
    try:
        function(argument)
    except errors.RazorError as error:
        assert str(error) and str(error).isprintable(), repr(str(error))


# a file system in memory, where there is one
_folder = tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
instrumented = False  # instrumented code is several times slower, so time is not checked
executions: Counter[str] = Counter()
slowest: dict[str, float] = {}


def check(data: bytes) -> None:
    """Run one input. Raises unless there is a result or a RazorError."""
    target = TARGETS[data[0] % len(TARGETS)] if data else read_gguf
    if instrumented and target is read_sparse_gguf:
        target = read_gguf
    started = time.process_time()  # CPU time, because the machine may be busy
    _expect_errors(lambda rest: target(Path(_folder.name) / "x", rest), data[1:])
    took = time.process_time() - started
    name = target.__name__
    executions[name] += 1
    slowest[name] = max(took, slowest.get(name, 0))
    assert took < SECONDS, f"{name} took {took:.1f} s"


# -- inputs to begin with


def seeds() -> Iterator[bytes]:
    razor = keys([1, 0, 0, 1])
    scored = [
        *razor,
        kv_array("razor.head.echo_score", F32, [0.1] * 8),
        kv_array("razor.head.induction_score", F32, [0.5] * 8),
        kv_array("razor.head.scope", U32, [0, 300, 64, 0]),
        kv("razor.calibration.source", STRING, "test"),
        kv("razor.calibration.tokens", U32, 2500),
        kv("razor.model.fingerprint", STRING, "0" * 64),
    ]
    shape_keys = [
        kv("general.architecture", STRING, "llama"),
        kv("llama.block_count", U32, 2),
        kv("llama.embedding_length", U32, 128),
        kv_array("llama.attention.head_count", U32, [4, 4]),
        kv_array("llama.attention.head_count_kv", I32, [2, 2]),
    ]
    more = [
        kv("general.alignment", U32, 64),
        kv("llama.attention.key_length", U32, 32),
        kv("llama.nextn_predict_layers", U16, 1),
        kv("llama.attention.causal", BOOL, 0),
        kv("x", U64, 2**63),
    ]
    split = [kv("split.no", U16, 0), kv("split.count", U16, 2), kv("split.tensors.count", I32, 3)]
    second = gguf([kv("split.no", U16, 1), split[1]], [tensor("c", (8,))], bytes(32))
    ggufs = [
        model(),
        model(razor),
        model(scored),
        gguf(shape_keys + scored),
        gguf(shape_keys + razor + more),
        gguf([], [tensor("t", (256, 2, 1, 1), 12)], bytes(288), version=2),
        gguf([kv_array("s", STRING, ["a"] * 9, count=2_000_000)]),
        gguf([kv_array("n", U64, [], count=60_000_000)]),
        gguf([], n_keys=100_000),
        gguf([], n_tensors=100_000),
    ]
    tables = ["1\t0\n0\t1\n", "1.0 0.0\r\n0 0\r\n\r\n", "0.5\t-0.001\n1\t1e-3\n", "1\n0 1 0\n"]
    objects = [
        {f"{i}-{j}": [0, 0.5] for i in range(2) for j in range(4)},
        {"0-0": 1, "0-1": 2e9, "1-0": -1, "1-1": 0.25},
    ]
    arrays = {"n_head": [4, 4], "n_head_kv": [2, 2], "echo": [0.1] * 8, "induction": [0.5] * 8}
    head = {
        "format": "razor scores",
        "version": 1,
        "calibration": {"model_fingerprint": "0" * 64, "tokens": 5},
    }
    for target in (read_gguf, read_sparse_gguf, read_sidecar):
        for raw in ggufs:
            yield _input(target, raw)
    yield _input(read_split, model(split) + second)
    yield _input(read_split, model(split[:2]) + second)
    for text in (*tables, *map(json.dumps, objects)):
        yield _input(read_heads, text.encode())
    yield _input(read_scores, json.dumps(head | arrays).encode())


def _input(target: Callable[[Path, bytes], None], raw: bytes) -> bytes:
    return bytes([TARGETS.index(target)]) + raw


def mutated(rng: random.Random, inputs: list[bytes]) -> bytes:
    """Make changes of the kinds that break readers: numbers, types, lengths, cuts, splices."""
    raw = bytearray(rng.choice(inputs))
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at = rng.randrange(1, len(raw) + 1)
        edges = (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, len(raw), rng.randrange(300))
        piece = rng.choice(
            (
                u64(rng.choice(edges)),
                u64(rng.choice(edges))[:4],
                bytes([rng.randrange(14), 0, 0, 0]),
                rng.randbytes(rng.randrange(1, 5)),
                rng.choice((b"0", b"9", b"-", b"\t", b"\n", b"[", b"]", b"{", b",", b":", b'"')),
                rng.choice((b"1e999", b"NaN", b"1e-400", b"null", b"true", b"\xff", b"\0")),
            )
        )
        kind = rng.randrange(6)
        if kind == 0:
            del raw[at : at + rng.randrange(1, 20)]
        elif kind == 1:
            raw[at:at] = piece
        elif kind == 2:
            other = rng.choice(inputs)
            start = rng.randrange(len(other))
            raw[at:at] = other[start : start + rng.randrange(1, 60)]
        else:
            raw[at : at + len(piece)] = piece
    return bytes(raw)


def main() -> None:
    folders = [arg for arg in sys.argv[1:] if os.path.isdir(arg)]
    if sys.argv[1:2] == ["--random"]:
        load()
        run_random(int(sys.argv[2]), folders)
    else:
        run_atheris([arg for arg in sys.argv[1:] if arg not in folders], folders)


def run_random(n: int, folders: list[str]) -> None:
    with suppress(ImportError):  # Unix alone
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    rng = random.Random(time.time_ns())
    inputs = [*seeds(), *(path.read_bytes() for folder in folders for path in _files(folder))]
    inputs = [data for data in inputs if data]
    slow = [data for data in inputs if TARGETS[data[0] % len(TARGETS)] is read_sparse_gguf]
    fast = [data for data in inputs if TARGETS[data[0] % len(TARGETS)] is not read_sparse_gguf]
    for i in range(n):
        data = mutated(rng, slow if rng.random() < 0.005 else fast)
        try:
            check(data)
        except BaseException:
            Path(f"crash-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise
        if (i + 1) % 50_000 == 0 or i + 1 == n:
            _report()


def _files(folder: str) -> list[Path]:
    return [path for path in Path(folder).iterdir() if path.is_file()]


def run_atheris(options: list[str], folders: list[str]) -> None:
    global instrumented
    import atheris

    instrumented = True
    with atheris.instrument_imports(include=["razor_local"]):
        load()
    with tempfile.TemporaryDirectory() as corpus:
        for i, data in enumerate(seeds()):
            (Path(corpus) / f"seed-{i}").write_bytes(data)
        atexit.register(_report)
        atheris.Setup([sys.argv[0], *options, *folders, corpus], check)
        atheris.Fuzz()


def _report() -> None:
    for name, n in executions.items():
        print(f"{name}: {n:,} executions, slowest {slowest[name]:.3f} s", file=sys.stderr)
    with suppress(ImportError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
        print(f"{sum(executions.values()):,} in all, peak {peak >> 10} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
