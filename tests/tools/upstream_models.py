"""Make the models of upstream's own tests without downloads.

These are the built-in model with and without its razor metadata, and replacements for the models
that the tests of llama-cpp-python and of llama.cpp's server download: models of the same kind
(transformer, embedding, recurrent, hybrid) under the same file name, with other weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

from tests.support.native_build import ROOT
from tests.support.tiny_models import write_gguf

BUILT_IN = ROOT / "razor_local/data/razor-default.gguf"  # has razor.* metadata
STANDS_IN = {  # file that llama-cpp-python's tests want: what it is here
    "stories15M-q4_0.gguf": "the built-in model",
    "bge-small-en-v1.5-q4_k_m.gguf": "the built-in model with mean pooling",
    "mamba-130m-hf.Q2_K.gguf": "mamba-dense.gguf of test-llama-archs",
    "Falcon-H1-Tiny-90M-Instruct-Q2_K.gguf": "falcon-h1-dense.gguf of test-llama-archs",
}

# files that the tests of llama.cpp's server want, by repository
SERVER_MODELS = {
    "ggml-org/test-model-stories260K": "stories260K-F32.gguf",
    "ggml-org/test-model-stories260K-infill": "stories260K-infill-F32.gguf",
    "ggml-org/stories15M_MOE": "stories15M_MOE-F16.gguf",
    "ggml-org/models": "bert-bge-small/ggml-model-f16.gguf",
    "ggml-org/tinygemma3-GGUF": "tinygemma3-Q8_0.gguf",
}
DRAFT_MODEL = "stories15M-q4_0.gguf"

Metadata = dict[str, tuple[Any, GGUFValueType]]


def copy_model(
    source: Path, target: Path, keep: Callable[[str], bool], add: Mapping[str, Any] | None = None
) -> Path:
    """Copy a GGUF with the metadata keys that `keep` accepts, plus `add`; same tensors."""
    reader = GGUFReader(source)
    kv: Metadata = {}
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or not keep(key):
            continue
        if field.types == [GGUFValueType.ARRAY]:
            continue  # empty, which GGUFWriter refuses to write
        value = field.contents()
        if field.types[0] == GGUFValueType.ARRAY and field.types[1] != GGUFValueType.STRING:
            value = np.array(value, field.parts[field.data[0]].dtype)
        kv[key] = (value, field.types[0])
    arch = reader.fields["general.architecture"].contents()
    tensors = [(t.name, t.data, t.tensor_type) for t in reader.tensors]
    return write_gguf(target, arch, kv | dict(add or {}), tensors)


def without_razor(target: Path) -> Path:
    """Write the built-in model without its profile."""
    return copy_model(BUILT_IN, target, lambda key: not key.startswith("razor."))


def with_letters(source: Path, target: Path) -> Path:
    """Copy a model of test-llama-archs, which has no tokenizer, with one of single letters."""
    shapes = {t.name: t.shape for t in GGUFReader(source).tensors}
    n_vocab = int(shapes["token_embd.weight"][-1])
    normal, unknown, control, unused, byte = 1, 2, 3, 5, 6  # enum llama_token_attr of GGUF files
    vocab = [("<unk>", unknown), ("<s>", control), ("</s>", control), ("<0x0A>", byte)]
    vocab += [(c, normal) for c in ["▁", *map(chr, range(33, 127))]]
    vocab += [(f"<unused{i}>", unused) for i in range(n_vocab - len(vocab))]
    string, array = GGUFValueType.STRING, GGUFValueType.ARRAY
    u32 = GGUFValueType.UINT32
    tokenizer = {
        "tokenizer.ggml.model": ("llama", string),
        "tokenizer.ggml.tokens": ([text for text, _ in vocab], array),
        "tokenizer.ggml.scores": (np.zeros(n_vocab, np.float32), array),
        "tokenizer.ggml.token_type": (np.array([kind for _, kind in vocab], np.int32), array),
        "tokenizer.ggml.bos_token_id": (1, u32),
        "tokenizer.ggml.eos_token_id": (2, u32),
        "tokenizer.ggml.unknown_token_id": (0, u32),
        "tokenizer.ggml.add_bos_token": (True, GGUFValueType.BOOL),
    }
    return copy_model(source, target, lambda key: not key.startswith("tokenizer."), tokenizer)


def make_stand_ins(folder: Path, archs: Path, *, razor: bool) -> Path:
    """Write the models of STANDS_IN.

    Args:
        folder: the folder to write to.
        archs: the folder that `test-llama-archs -o` wrote.
        razor: whether the transformer keeps its razor metadata.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    transformer, embedding, recurrent, hybrid = (folder / name for name in STANDS_IN)
    if razor:
        shutil.copy(BUILT_IN, transformer)
    else:
        without_razor(transformer)
    mean_pooling = {"llama.pooling_type": (1, GGUFValueType.UINT32)}
    copy_model(BUILT_IN, embedding, lambda key: not key.startswith("razor."), mean_pooling)
    with_letters(archs / "mamba-dense.gguf", recurrent)
    with_letters(archs / "falcon-h1-dense.gguf", hybrid)
    return folder


def make_server_stand_ins(hub: Path, *, razor: bool) -> Path:
    """Write the models of SERVER_MODELS as files of a Hugging Face cache.

    All are the built-in model: the one for embeddings with mean pooling, the one for infill with
    tokens for it.

    Args:
        hub: the folder of the cache.
        razor: whether the models have a profile, with a window that is small enough for the
            contexts of the tests, 256 tokens and more.
    """
    u32 = GGUFValueType.UINT32
    changes: dict[str, Metadata] = {
        "ggml-org/models": {"llama.pooling_type": (1, u32)},
        "ggml-org/test-model-stories260K-infill": {
            f"tokenizer.ggml.fim_{name}_token_id": (token, u32)
            for name, token in (("pre", 1020), ("suf", 1021), ("mid", 1022))
        },
    }
    windows: Metadata = {"razor.window_min": (32, u32), "razor.window_divisor": (0, u32)}
    shutil.rmtree(hub, ignore_errors=True)
    for repo, name in SERVER_MODELS.items():
        folder, commit = hub / f"models--{repo.replace('/', '--')}", "0" * 40
        file = folder / "snapshots" / commit / name
        file.parent.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)
        added = changes.get(repo, {}) | (windows if razor else {})

        def keep(key: str, added: Metadata = added) -> bool:
            return (razor or not key.startswith("razor.")) and key not in added

        copy_model(BUILT_IN, file, keep, added)
    return hub
