"""The model in the package: its weights for the reference, and a copy of it without a memory."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType
from gguf.quants import dequantize
from razor_local.converters.write import write_copy

from razor_local.gguf.header import read_header
from razor_local.model_file import read_model_shape, read_profile
from tests.support import known_heads, tiny_models

PATH = Path(str(files("razor_local") / "data" / "razor-default.gguf"))


def read() -> tuple[tiny_models.TinySpec, dict[str, np.ndarray], np.ndarray]:
    """Return the shape, the dequantized weights and the ordinary tokens."""
    reader, header = GGUFReader(PATH), read_header(PATH)
    shape = read_model_shape(PATH)
    get = {key: field.contents() for key, field in reader.fields.items()}
    weights = {
        t.name: dequantize(t.data, t.tensor_type).astype(np.float64).reshape(t.shape[::-1])
        for t in reader.tensors
    }
    spec = tiny_models.TinySpec(
        "llama",
        shape.n_layer,
        shape.n_head[0],
        shape.n_head_kv[0],
        shape.head_dim_k,
        get["llama.embedding_length"],
        get["llama.feed_forward_length"],
        header.entries["tokenizer.ggml.tokens"].count,
        shape.n_ctx_train,
        tied="output.weight" not in weights,
        norm_eps=get["llama.attention.layer_norm_rms_epsilon"],
        rope_base=get["llama.rope.freq_base"],
    )
    normal = np.array(get["tokenizer.ggml.token_type"]) == known_heads.NORMAL
    return spec, weights, np.flatnonzero(normal).astype(np.int32)


def write_variant(path: Path, template: str, named: dict[str, str] | None = None) -> Path:
    """Write a copy with another chat template, and others by name, but without a profile."""
    reader = GGUFReader(PATH)
    kv = _metadata(reader) | {"tokenizer.chat_template": (template, GGUFValueType.STRING)}
    for name, text in (named or {}).items():
        kv[f"tokenizer.chat_template.{name}"] = (text, GGUFValueType.STRING)
    tensors = [(t.name, t.data, t.tensor_type) for t in reader.tensors]
    return tiny_models.write_gguf(path, "llama", kv, tensors)


def write_without_template(path: Path) -> Path:
    """Write a copy without a chat template, like a base model."""
    key = b"tokenizer.chat_template"
    path.write_bytes(PATH.read_bytes().replace(key, key.replace(b"chat", b"none")))
    return path


def _metadata(reader: GGUFReader) -> dict[str, tuple[Any, GGUFValueType]]:
    return {
        key: (field.contents(), field.types[0])
        for key, field in reader.fields.items()
        if not key.startswith(("GGUF.", "razor.", "general.architecture"))
    }


def write_random(path: Path, seed: int = 0) -> Path:
    """Write a model with its shape and tokenizer, but random weights and no profile."""
    reader, rng = GGUFReader(PATH), np.random.default_rng(seed)
    tensors = [
        (
            t.name,
            np.ones(t.shape[::-1], np.float32)
            if "norm" in t.name
            else rng.normal(0, 0.02, t.shape[::-1]).astype(np.float32),
            None,
        )
        for t in reader.tensors
    ]
    return tiny_models.write_gguf(path, "llama", _metadata(reader), tensors)


def no_numbers(path, value=np.nan):
    """Write the built-in model with every element of the final norm set to value."""
    header = read_header(PATH)
    (norm,) = (tensor for tensor in header.tensors if tensor.name == "output_norm.weight")
    data = bytearray(PATH.read_bytes())
    weights = np.frombuffer(data, np.float32, norm.dims[0], header.data_start + norm.offset)
    weights[:] = value
    path.write_bytes(data)
    return path


def model_with_scores(folder):
    """Write a copy of the built-in model in whose profile KV head 5 has the highest score."""
    profile, shape = read_profile(PATH), read_model_shape(PATH)
    n = sum(shape.n_head)
    scores = np.linspace(0.1, 0.4, n, dtype=np.float32)
    scores[5 * n // sum(shape.n_head_kv)] = 0.9
    path = folder / "scored.gguf"
    write_copy(
        PATH,
        path,
        replace(profile, induction_score=scores, echo_score=np.zeros(n, np.float32)),
    )
    return path
