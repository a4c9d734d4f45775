"""Encode the razor keys of a profile as bytes of a GGUF file."""

from __future__ import annotations

import struct

import numpy as np

from ..gguf.header import ARRAY, BOOL, F32, I32, STRING, U8, U32
from ..profile import (
    KEY_CALIBRATION_PREFIX,
    KEY_COMPENSATION,
    KEY_ECHO,
    KEY_INDUCTION,
    KEY_METHOD,
    KEY_RETRIEVAL,
    KEY_SCOPE,
    KEY_SINK_TOKENS,
    KEY_VERSION,
    KEY_WINDOW_DIVISOR,
    KEY_WINDOW_MIN,
    Profile,
)


def profile_keys(profile: Profile) -> list[bytes]:
    """Encode the razor keys of a profile, in the order of docs/format.md."""
    keys = [
        encode(KEY_VERSION, U32, profile.version),
        encode(KEY_METHOD, STRING, profile.method),
        encode(KEY_SINK_TOKENS, U32, profile.sink_tokens),
        encode(KEY_WINDOW_MIN, U32, profile.window_min),
        encode(KEY_WINDOW_DIVISOR, U32, profile.window_divisor),
        encode(KEY_COMPENSATION, BOOL, profile.compensation),
        encode_array(KEY_RETRIEVAL, U8, profile.flat()),
    ]
    for key, score in ((KEY_ECHO, profile.echo_score), (KEY_INDUCTION, profile.induction_score)):
        if score is not None:
            keys.append(encode_array(key, F32, score))
    if profile.scope is not None:
        keys.append(encode_array(KEY_SCOPE, U32, np.concatenate(profile.scope)))
    for key, value in profile.calibration.items():
        kind = STRING if isinstance(value, str) else U32
        keys.append(encode(KEY_CALIBRATION_PREFIX + key, kind, value))
    return keys


def encode(key: str, kind: int, value: int | float | str | bool) -> bytes:
    """Encode one key with a u32, f32, bool or string value."""
    if kind == STRING:
        assert isinstance(value, str)
        raw = encode_string(value)
    else:
        raw = struct.pack({BOOL: "<?", F32: "<f", U32: "<I"}[kind], value)
    return encode_string(key) + struct.pack("<I", kind) + raw


def encode_array(key: str, element: int, values: np.ndarray) -> bytes:
    """Encode one key with an array of bool, u8, i32, u32 or f32."""
    dtype = {BOOL: "<u1", U8: "<u1", I32: "<i4", U32: "<u4", F32: "<f4"}[element]
    raw = np.ascontiguousarray(values, dtype).tobytes()
    return encode_string(key) + struct.pack("<IIQ", ARRAY, element, len(values)) + raw


def encode_string(text: str) -> bytes:
    """Encode a string with its length before it."""
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw
