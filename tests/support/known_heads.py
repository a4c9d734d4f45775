"""Models with known retrieval heads, whose weights are constructed by hand.

Each is a llama without feed-forward layers. The residual stream [N_EMBD] holds the token's code
(CODE dimensions of +-1; the codes of two tokens agree in at most 3/4 of them), a constant, and,
after the layer of the previous-token head, the code of the token before. A head is one of these:

  previous   q and k come from the constant and are rotated so that RoPE makes them agree one token
             apart. Writes the code of that token.
  induction  q: code of this token, k: code of the token before the key. Attends to the tokens that
             followed earlier occurrences of this token.
  echo       q and k: code of the token. Attends to the same token, including itself.
  local      q and k come from the constant. Attends to the last tokens.
  blurred    small random q and k. Attends to all tokens about equally.

Codes use the slow dimensions of RoPE, which barely rotate in 10,000 tokens, and the constant uses
the fast ones. Almost all weights are one number per row, which quantization preserves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.quants import quantize

from tests.support import tiny_models

CODE = 24
N_EMBD = 64
TOKEN, CONSTANT, PREVIOUS, REST = slice(0, CODE), 24, slice(32, 32 + CODE), slice(56, 64)
CONSTANT_VALUE = 2.0
ROPE_BASE = 1e24
KINDS = ("previous", "induction", "echo", "local", "blurred")
TYPES = {
    "f32": None,
    "f16": GGMLQuantizationType.F16,
    "q8_0": GGMLQuantizationType.Q8_0,
    "q4_0": GGMLQuantizationType.Q4_0,
}
# types of tokens in a GGUF: normal, unknown, control, user-defined, unused, byte
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)
SPECIAL = [
    ("<unk>", UNKNOWN),
    ("<s>", CONTROL),
    ("</s>", CONTROL),
    ("<tool>", USER),
    ("<pad>", UNUSED),
] + [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
BOS = 1


@dataclass(frozen=True)
class KnownHeads:
    """The shape and heads of a model.

    Attributes:
        heads: kind of each query head, a row per layer. Others are local or blurred.
        tokenizer: whether there is a tokenizer. Then the vocabulary begins with SPECIAL, a BOS
            token is added, and the embeddings of all special tokens except BOS are NaN, so that
            using one is noticed.
    """

    heads: tuple[tuple[str, ...], ...]
    n_head_kv: int
    head_dim: int = 32
    n_tokens: int = 512  # ordinary ones
    n_ctx_train: int = 10240
    weight_type: str = "f32"
    tokenizer: bool = False
    seed: int = 0

    @property
    def n_head(self) -> int:
        return len(self.heads[0])

    @property
    def group(self) -> int:
        return self.n_head // self.n_head_kv

    def kv_kinds(self, il: int) -> list[str]:
        """Return the kind of each KV head: that of the query head that needs its keys."""
        kinds = []
        for ih in range(0, self.n_head, self.group):
            named = {k for k in self.heads[il][ih : ih + self.group] if k not in KINDS[3:]}
            assert len(named) <= 1, "two kinds of heads in one group"
            kinds.append(named.pop() if named else self.heads[il][ih])
        return kinds

    def mask(self, kinds: tuple[str, ...] = ("induction", "echo")) -> list[list[int]]:
        """Return 1 for each KV head of these kinds, a row per layer."""
        return [[int(kind in kinds) for kind in self.kv_kinds(il)] for il in range(len(self.heads))]


def place_heads(
    seed: int,
    n_layer: int = 4,
    n_head: int = 8,
    n_head_kv: int = 4,
    induction: float = 0.14,
    echo: float = 0.01,
    **options: Any,
) -> KnownHeads:
    """Place these shares of induction and echo heads at random.

    The previous-token head is in layer 0 or 1, and the induction heads are in later layers. Each
    group has at most one query head that is not local or blurred.
    """
    rng = np.random.default_rng(seed)
    kinds = rng.choice(["local", "blurred"], (n_layer, n_head)).tolist()
    group, total = n_head // n_head_kv, n_layer * n_head_kv
    first = int(rng.integers(0, 2))
    free = [(il, kv) for il in range(n_layer) for kv in range(n_head_kv)]

    def place(kind: str, places: list[tuple[int, int]]) -> None:
        il, kv = places[rng.integers(len(places))]
        free.remove((il, kv))
        kinds[il][kv * group + int(rng.integers(group))] = kind

    place("previous", [p for p in free if p[0] == first])
    for _ in range(math.ceil(induction * total)):
        place("induction", [p for p in free if p[0] > first])
    for _ in range(math.ceil(echo * total)):
        place("echo", free)
    return KnownHeads(tuple(map(tuple, kinds)), n_head_kv, seed=seed, **options)


def token_codes(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n rows of CODE times +-1 that differ pairwise in at least 6 places: f32."""
    assert n <= 1000, "there are hardly more such codes"
    codes = np.empty((0, CODE), np.float32)
    while len(codes) < n:
        code = rng.choice(np.float32([-1, 1]), CODE)
        if not len(codes) or (codes @ code).max() <= CODE - 12:
            codes = np.vstack([codes, code])
    return codes


def make_weights(spec: KnownHeads) -> dict[str, np.ndarray]:
    """Make the tensors of the model by GGUF name: f32, rows = outputs."""
    rng = np.random.default_rng(spec.seed)
    n_special = len(SPECIAL) if spec.tokenizer else 0
    embedding = np.zeros((n_special + spec.n_tokens, N_EMBD), np.float32)
    embedding[:, TOKEN] = token_codes(len(embedding), rng)
    embedding[:, CONSTANT] = CONSTANT_VALUE
    special = np.arange(len(embedding)) < n_special
    special[BOS] = False
    embedding[special] = np.nan
    weights = {"token_embd.weight": embedding}
    previous_known = False
    for il in range(len(spec.heads)):
        energy = CODE * (1 + previous_known) + CONSTANT_VALUE**2
        layer = _attention(spec, il, math.sqrt(N_EMBD / energy), rng)
        weights |= {f"blk.{il}.{name}.weight": data for name, data in layer.items()}
        previous_known |= "previous" in spec.heads[il]
    weights["output_norm.weight"] = np.ones(N_EMBD, np.float32)
    return weights


def _attention(
    spec: KnownHeads, il: int, scale: float, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Make the weights of one layer. scale is the factor of its norm."""
    d, n_kv = spec.head_dim, spec.n_head_kv
    q = np.zeros((spec.n_head, d, N_EMBD), np.float32)
    k, v = (np.zeros((n_kv, d, N_EMBD), np.float32) for _ in range(2))
    out = np.zeros((N_EMBD, spec.n_head, d), np.float32)
    code = slice(d - CODE, d)  # the slow dimensions
    match = math.sqrt(40 * math.sqrt(d) / CODE) / scale  # equal codes: a logit of 40

    def turned(lag: int, logit: float) -> np.ndarray:
        """Return rows for the 4 fastest pairs with which this lag gets a logit of 4 * logit."""
        rows = np.zeros((d, N_EMBD), np.float32)
        size = math.sqrt(logit * math.sqrt(d)) / (scale * CONSTANT_VALUE)
        for i in range(4):
            angle = -lag * ROPE_BASE ** (-2 * i / d)
            rows[2 * i : 2 * i + 2, CONSTANT] = size * math.cos(angle), size * math.sin(angle)
        return rows

    def select(rows: np.ndarray, dims: slice, weight: float) -> None:
        rows[code, dims] = weight * np.eye(CODE)

    def blur() -> np.ndarray:
        return (0.3 / scale * rng.standard_normal((d, N_EMBD)) / N_EMBD**0.5).astype(np.float32)

    for kv, kind in enumerate(spec.kv_kinds(il)):
        if kind == "previous":
            k[kv] = turned(0, 150)
            select(v[kv], TOKEN, 1 / scale)
        elif kind in ("induction", "echo"):
            select(k[kv], PREVIOUS if kind == "induction" else TOKEN, match)
        elif kind == "local":
            k[kv] = turned(0, 20)
        else:
            k[kv] = blur()
        if kind != "previous":
            v[kv] = blur()
    for ih, kind in enumerate(spec.heads[il]):
        if kind == "previous":
            q[ih] = turned(1, 150)
            out[PREVIOUS, ih, code] = np.eye(CODE)
            continue
        out[REST, ih] = 0.05 * rng.standard_normal((8, d))
        if kind in ("induction", "echo"):
            select(q[ih], TOKEN, match)
        elif kind == "local" and spec.kv_kinds(il)[ih // spec.group] == "local":
            q[ih] = turned(0, 20)
        else:
            q[ih] = blur()
    ones, zeros = np.ones(N_EMBD, np.float32), np.zeros((32, N_EMBD), np.float32)
    return {
        "attn_norm": ones,
        "attn_q": q.reshape(-1, N_EMBD),
        "attn_k": k.reshape(-1, N_EMBD),
        "attn_v": v.reshape(-1, N_EMBD),
        "attn_output": out.reshape(N_EMBD, -1),
        "ffn_norm": ones,
        "ffn_gate": zeros,
        "ffn_up": zeros,
        "ffn_down": zeros.T.copy(),
    }


def tiny_spec(spec: KnownHeads) -> tiny_models.TinySpec:
    """Return the model's shape for model_kv() and the float64 reference."""
    n_vocab = spec.n_tokens + (len(SPECIAL) if spec.tokenizer else 0)
    return tiny_models.TinySpec(
        "llama", len(spec.heads), spec.n_head, spec.n_head_kv, spec.head_dim, N_EMBD, 32, n_vocab,
        spec.n_ctx_train, tied=True, rope_base=ROPE_BASE,
    )  # fmt: skip


def make_model(
    path: str | Path, spec: KnownHeads, extra_kv: dict[str, tuple[Any, GGUFValueType]] | None = None
) -> Path:
    """Write the model with matrices of spec.weight_type."""
    kv = tiny_models.model_kv(tiny_spec(spec)) | (_vocabulary(spec) if spec.tokenizer else {})
    kind = TYPES[spec.weight_type]
    tensors = []
    for name, data in make_weights(spec).items():
        if kind is None or data.ndim == 1 or np.isnan(data).any():
            tensors.append((name, data, None))
        else:
            tensors.append((name, quantize(data, kind), kind))
    return tiny_models.write_gguf(path, "llama", kv | (extra_kv or {}), tensors)


def _vocabulary(spec: KnownHeads) -> dict[str, tuple[Any, GGUFValueType]]:
    tokens = SPECIAL + [(f"w{i}", NORMAL) for i in range(spec.n_tokens)]
    array, u32 = GGUFValueType.ARRAY, GGUFValueType.UINT32
    return {
        "tokenizer.ggml.model": ("llama", GGUFValueType.STRING),
        "tokenizer.ggml.tokens": ([text for text, _ in tokens], array),
        "tokenizer.ggml.scores": (np.zeros(len(tokens), np.float32), array),
        "tokenizer.ggml.token_type": (np.int32([kind for _, kind in tokens]), array),
        "tokenizer.ggml.unknown_token_id": (0, u32),
        "tokenizer.ggml.bos_token_id": (BOS, u32),
        "tokenizer.ggml.eos_token_id": (2, u32),
        "tokenizer.ggml.add_bos_token": (True, GGUFValueType.BOOL),
    }


def with_weights(spec: KnownHeads, weight_type: str) -> KnownHeads:
    return replace(spec, weight_type=weight_type)
