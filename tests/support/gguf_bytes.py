"""Write GGUF files byte by byte, so that tests can make files that no library would write."""

from __future__ import annotations

import struct

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q",
    I64: "q", F64: "d",
}  # fmt: skip


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def scalar(kind: int, value: int | float | str | bytes) -> bytes:
    return string(value) if kind == STRING else struct.pack("<" + FORMATS[kind], value)


def kv(key: str | bytes, kind: int, value) -> bytes:
    return string(key) + u32(kind) + scalar(kind, value)


def kv_array(key: str, element: int, values, count: int | None = None) -> bytes:
    body = b"".join(scalar(element, v) for v in values)
    n = len(values) if count is None else count
    return string(key) + u32(ARRAY) + u32(element) + u64(n) + body


def tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def gguf(
    keys: list[bytes],
    tensors: list[bytes] = (),
    data: bytes = b"",
    version: int = 3,
    n_tensors: int | None = None,
    n_keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """Return a file of these parts, with counts and a version that may be wrong."""
    head = b"GGUF" + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors)
    head += u64(len(keys) if n_keys is None else n_keys)
    head += b"".join(keys) + b"".join(tensors)
    if tensors:
        head += bytes(-len(head) % alignment)
    return head + data


def small_model(extra: list[bytes] = (), n_layer: int = 2, n_kv: int = 2, n_head: int = 4) -> bytes:
    """Return the smallest file that has a model's shape: a few keys and two tensors."""
    keys = [
        kv("general.architecture", STRING, "llama"),
        kv("general.name", STRING, "small"),
        kv("llama.block_count", U32, n_layer),
        kv("llama.embedding_length", U32, 32 * n_head),
        kv("llama.context_length", U32, 4096),
        kv("llama.attention.head_count", U32, n_head),
        kv("llama.attention.head_count_kv", U32, n_kv),
        kv_array("tokenizer.ggml.tokens", STRING, ["a", "b", "", "word"]),
        kv_array("tokenizer.ggml.scores", F32, [0.0, 1.0, 2.0, 3.0]),
    ]
    tensors = [tensor("a.weight", (4, 3)), tensor("b.weight", (32,), 8, 64)]
    data = bytes(range(48)) + bytes(16) + bytes(range(100, 134))
    return gguf(keys + list(extra), tensors, data)


def razor_keys(retrieval: list[int], **changes: bytes | None) -> list[bytes]:
    """Return the keys of a valid profile. changes replace a key (dots as __) or drop it (None)."""
    keys = {
        "version": kv("razor.version", U32, 1),
        "method": kv("razor.method", STRING, "rope"),
        "sink_tokens": kv("razor.sink_tokens", U32, 4),
        "window_min": kv("razor.window_min", U32, 4000),
        "window_divisor": kv("razor.window_divisor", U32, 5),
        "compensation": kv("razor.compensation", BOOL, 1),
        "head__retrieval": kv_array("razor.head.retrieval", U8, retrieval),
    }
    keys.update(changes)
    return [key for key in keys.values() if key is not None]
