"""Tiny random models of nearly every architecture, as llama.cpp's own test writes them.

test-llama-archs is compiled once from the pinned sdist, linked to the stock library, and its models
are kept in the user's cache folder. gemma_models writes gemma3n and gemma4, which the test does not
save.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

from razor_local.gguf.hyper_parameters import find_fault
from tests.support import gemma_models
from tests.support.gemma_models import write_gemma
from tests.support.native_build import ROOT, cache_dir, locked, pin, run
from tests.support.stock import stock_lib_dir
from tests.support.tiny_models import write_gguf

SOURCES = ("tests/test-llama-archs.cpp", "common/common.cpp", "common/log.cpp", "common/json.cpp")
PARTS = ("common", "include", "src", "ggml/include", "vendor", "tests/test-llama-archs.cpp")
U32, F32, STR, BOOL, ARRAY = (
    GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING, GGUFValueType.BOOL,
    GGUFValueType.ARRAY,
)  # fmt: skip

N_VOCAB = 128


def path_of(arch: str) -> Path:
    """The model of an architecture. KeyError if llama.cpp's test has none."""
    found = models()
    return found[arch]


@functools.cache
def models() -> dict[str, Path]:
    """Architecture -> its model; takes minutes the first time."""
    version, _ = pin()
    folders = (
        _cached(f"archs-{version}", __file__, _make),
        _cached("gemmas", str(gemma_models.__file__), _gemmas),
    )
    found = {}
    for path in sorted(path for folder in folders for path in folder.glob("*.gguf")):
        arch = path.stem.removesuffix("-moe").removesuffix("-dense")
        arch = "ernie4_5-moe" if path.stem == "ernie4_5-moe-moe" else arch
        found.setdefault(arch, path)
    return found


def _cached(name: str, source: str, make: Callable[[Path], Path]) -> Path:
    """The folder that make() has made in a temporary one, for this source file."""
    name += f"-{hashlib.sha256(Path(source).read_bytes()).hexdigest()[:12]}"
    if not (cache_dir() / name).is_dir():
        with locked(name) as folder:
            if not folder.is_dir():  # another process may have made it meanwhile
                with tempfile.TemporaryDirectory(prefix="archs-", dir=folder.parent) as temp:
                    make(Path(temp)).rename(folder)
    return cache_dir() / name


def _gemmas(temp: Path) -> Path:
    ready = temp / "ready"
    ready.mkdir()
    for arch in ("gemma3n", "gemma4"):
        write_gemma(ready / f"{arch}-dense.gguf", arch, letters(N_VOCAB))
    return ready


def _make(temp: Path) -> Path:
    version, _ = pin()
    sdist = cache_dir() / f"llama_cpp_python-{version}.tar.gz"
    sdist = Path(os.environ.get("RAZOR_LOCAL_SDIST") or sdist)
    tree, library = temp / "tree", stock_lib_dir()
    python = shutil.which("python3") or "python3"
    unpack = ROOT / "native/unpack.py"
    run([python, str(unpack), "--sdist", str(sdist), "--tree", str(tree), *PARTS])
    includes = [f"-I{tree / part}" for part in ("common", "include", "src", "ggml/include")]
    includes.append(f"-I{tree / 'vendor'}")
    compiler = os.environ.get("CXX") or "c++"
    objects = [temp / f"{Path(source).stem}.o" for source in SOURCES]

    def compile_one(pair: tuple[str, Path]) -> None:
        source, out = pair
        options = ["-O1", "-std=c++17", "-ffunction-sections", "-fdata-sections"]
        run([compiler, *options, "-c", *includes, "-o", str(out), str(tree / source)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, zip(SOURCES, objects, strict=True)))
    program = temp / "test-llama-archs"
    libraries = [f"-L{library}", "-lllama", "-lggml", "-lggml-base", f"-Wl,-rpath,{library}"]
    run([compiler, "-o", str(program), *map(str, objects), *libraries, "-lpthread",
         "-Wl,--gc-sections"])  # fmt: skip
    written, ready = temp / "written", temp / "ready"
    written.mkdir()
    ready.mkdir()
    subprocess.run(
        [program, "-s", "1", "-o", f"{written}/"], check=True, capture_output=True,
        env=os.environ | {"GGML_BACKEND_PATH": ""},
    )  # fmt: skip
    for path in sorted(written.glob("*.gguf")):
        _with_letters(path, ready / path.name)
    return ready


def _with_letters(source: Path, target: Path) -> None:
    """Copy a model, with a vocabulary and with weights for which attention matters.

    Numbers that razor_local refuses are left out: the test writes every key, also those of other
    architectures.
    """
    reader = GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    kv: dict[str, tuple[Any, GGUFValueType]] = {}
    for key, entry in reader.fields.items():
        if key.startswith(("GGUF.", "tokenizer.")) or key == "general.architecture":
            continue
        if key == "lfm2.attention.sliding_window":
            continue  # it would leave no layer with full attention
        value = entry.contents()
        if entry.types == [GGUFValueType.ARRAY]:
            continue  # empty, which GGUFWriter refuses to write
        if entry.types[0] == GGUFValueType.ARRAY and entry.types[1] != GGUFValueType.STRING:
            value = np.array(value, entry.parts[entry.data[0]].dtype)
        elif entry.types[0] not in (STR, BOOL) and (value == 0 or not math.isfinite(value)):
            if find_fault(arch, {key.removeprefix(f"{arch}."): value}):
                continue
        kv[key] = (value, entry.types[0])
    kv[f"{arch}.attn_logit_softcapping"] = (2.0, F32)
    tensors = [(t.name, _realistic(t.name, t.data), t.tensor_type) for t in reader.tensors]
    n_vocab = max(
        int(t.shape[-1]) for t in reader.tensors if t.name in ("token_embd.weight", "output.weight")
    )
    write_gguf(target, arch, kv | letters(n_vocab), tensors)


def _realistic(name: str, data: np.ndarray) -> np.ndarray:
    """Return norms, scales and sinks of a realistic size.

    Those of the test are so small that attention is nearly uniform, whatever the keys are, and that
    a sink logit weighs as much as one of many tokens.
    """
    if data.dtype != np.float32:
        return data
    if name.endswith((".scale", ".input_scale")):
        return np.ones_like(data)
    if "norm" in name and name.endswith(".weight"):
        return data + np.float32(1)
    return data + np.float32(8) if "attn_sinks" in name else data


def letters(n_vocab: int) -> dict[str, tuple[Any, GGUFValueType]]:
    """A tokenizer of single letters."""
    normal, unknown, control, unused, byte = 1, 2, 3, 5, 6  # enum llama_token_attr of GGUF files
    vocab = [("<unk>", unknown), ("<s>", control), ("</s>", control), ("<0x0A>", byte)]
    vocab += [(c, normal) for c in ["▁", *map(chr, range(33, 127))]]
    vocab += [(f"<unused{i}>", unused) for i in range(n_vocab - len(vocab))]
    return {
        "tokenizer.ggml.model": ("llama", STR),
        "tokenizer.ggml.tokens": ([text for text, _ in vocab], ARRAY),
        "tokenizer.ggml.scores": (np.zeros(n_vocab, np.float32), ARRAY),
        "tokenizer.ggml.token_type": (np.array([kind for _, kind in vocab], np.int32), ARRAY),
        "tokenizer.ggml.bos_token_id": (1, U32),
        "tokenizer.ggml.eos_token_id": (2, U32),
        "tokenizer.ggml.unknown_token_id": (0, U32),
        "tokenizer.ggml.add_bos_token": (True, BOOL),
    }
