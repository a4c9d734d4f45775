"""What is tried with the tiny model of an architecture (arch_models)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from razor_local.converters.write import write_sidecar

from razor_local.model_file import ModelFile
from razor_local.profile import Profile, split_heads
from razor_local.verify.run import verify
from tests.support import runner
from tests.support.runner import OFF, Override

WINDOW = 64
N_CTX = 2048


def n_tokens(path: Path) -> int:
    """Tokens to run: more than the model was trained for, unless it has learned positions."""
    learned = any("position_embd" in tensor.name for tensor in ModelFile(path).header.tensors)
    return 250 if learned else 400


def tokens_of(path: Path) -> list[int]:
    return runner.random_tokens(n_tokens(path), 100, 7)


def mask_of(layers: list[int] | tuple[int, ...]) -> bytes:
    """One local head in each layer with full attention, the last one."""
    return b"".join(bytes([1] * (n - 1) + [0]) for n in layers if n)


def compensates(path: Path) -> bool:
    """Return whether local heads have a compensation token, which ALiBi models do not support."""
    return ModelFile(path).shape.max_alibi_bias == 0


def layers_of(path: Path) -> list[int]:
    """KV heads of each layer, by the library."""
    with runner.Model(path) as model:
        return model.layers()


def refusal(path: Path) -> str | None:
    """The sentence with which the library refuses razor; None if it does not."""
    n = sum(layers_of(path))
    razor = Override(bytes(max(n, 1)), window=WINDOW, compensation=compensates(path))
    return runner.refusal(str(path), razor, n_ctx=N_CTX)


def full_logits(path: Path, flash_attn: bool) -> np.ndarray:
    """Logits of llama.cpp's own cache, of this or of the stock library."""
    razor = OFF if runner.is_patched() else None
    return _logits(path, razor, flash_attn)


def razor_logits(path: Path, flash_attn: bool, window: int) -> np.ndarray:
    razor = Override(mask_of(layers_of(path)), window=window, compensation=compensates(path))
    return _logits(path, razor, flash_attn)


def _logits(path: Path, razor: Override | None, flash_attn: bool) -> np.ndarray:
    params: dict[str, Any] = {"type_k": "f16", "type_v": "f16", "n_ctx": N_CTX, "swa_full": False}
    return runner.logits(path, tokens_of(path), razor, 100, flash_attn=flash_attn, **params)


def attention_error(
    path: Path,
    flash_attn: bool,
    kv_type: str = "f32",
    windows: tuple[int, ...] = (WINDOW,),
    n_gpu_layers: int = runner.GPU_LAYERS,
) -> float:
    """The worst relative error of a head's output against the reference (verify).

    Several windows are assigned to the local heads in turn, and the first head is a retrieval head
    if there are more heads than windows. Raises AssertionError if keys are stored for the wrong
    heads.
    """
    file = ModelFile(path)
    layers = file.shape.n_head_kv
    compensation = compensates(path)
    if len(windows) == 1:
        mask = split_heads(np.frombuffer(mask_of(layers), np.uint8), layers)
        profile = Profile(mask, window_min=WINDOW, window_divisor=0, compensation=compensation)
    else:
        scopes = np.resize(np.uint32(windows), sum(layers))
        scopes[0] = 0 if len(scopes) > len(windows) else windows[0]
        mask = split_heads((scopes == 0).astype(np.uint8), layers)
        profile = Profile(mask, scope=split_heads(scopes, layers), compensation=compensation)
    with tempfile.TemporaryDirectory() as folder:
        sidecar = Path(folder) / "sidecar.gguf"
        write_sidecar(file, sidecar, profile)
        result = verify(
            path, n_ctx=1024, n_tokens=n_tokens(path), sidecar=sidecar, rows=100,
            type_k=kv_type, type_v=kv_type, flash_attn=flash_attn, n_threads=1,
            n_gpu_layers=n_gpu_layers,
        )  # fmt: skip
    assert result.misplaced == (), result.misplaced
    n_local = len({group.group for group in result.groups if group.group.startswith("local")})
    assert n_local == len(windows), "windows that save nothing become full caches"
    return max(group.errors.worst_rms for group in result.groups)
