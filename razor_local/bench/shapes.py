"""The shapes of well-known models: their sizes, their tensors and their metadata."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import UnsupportedError


@dataclass(frozen=True)
class Sliding:
    """Layers with a sliding window. Every period-th layer has full attention.

    Attributes:
        window: window in tokens.
        n_head_kv, head_dim: KV heads and head size of these layers; 0: as in the layers with full
            attention.
    """

    window: int
    period: int
    n_head_kv: int = 0
    head_dim: int = 0


@dataclass(frozen=True)
class DeltaNet:
    """Recurrent layers (gated delta net). Every period-th layer has full attention.

    Attributes:
        head_dim: size of the heads of queries, keys and values.
        n_conv: width of the convolution in tokens.
    """

    period: int
    n_head_qk: int
    n_head_v: int
    head_dim: int = 128
    n_conv: int = 4


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: n_used of n for each token, and a shared one if n_ff_shared > 0."""

    n: int
    n_used: int
    n_ff: int
    n_ff_shared: int = 0


@dataclass(frozen=True)
class Shape:
    """The shape of a model, in elements (n_ctx_train in tokens).

    n_head_kv and head_dim are those of layers with full attention.

    Attributes:
        tied: whether the output head is the token embedding.
        qk_norm: whether queries and keys pass an RMS norm.
        rope_dim: rotated elements of a head; 0: all of them.
        keys_are_values: whether layers with full attention use keys as values, without a projection
            for values.
    """

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_ctx_train: int
    rope_base: float
    tied: bool = False
    qk_norm: bool = False
    rope_dim: int = 0
    keys_are_values: bool = False
    sliding: Sliding | None = None
    delta_net: DeltaNet | None = None
    experts: Experts | None = None

    @property
    def full_layers(self) -> tuple[bool, ...]:
        """Whether each layer has full attention [n_layer]."""
        other = self.sliding or self.delta_net
        period = other.period if other else 1
        return tuple(il % period == period - 1 for il in range(self.n_layer))

    @property
    def heads_in_full_layers(self) -> tuple[int, ...]:
        """KV heads of each layer [n_layer], 0 without full attention."""
        return tuple(self.n_head_kv if full else 0 for full in self.full_layers)


SHAPES = {
    "30m": Shape("llama", 8, 512, 8, 4, 64, 1536, 8192, 131072, 500000.0, tied=True),
    "llama-3.2-1b": Shape("llama", 16, 2048, 32, 8, 64, 8192, 128256, 131072, 500000.0, tied=True),
    "llama-3.2-3b": Shape("llama", 28, 3072, 24, 8, 128, 8192, 128256, 131072, 500000.0, tied=True),
    "llama-3.1-8b": Shape("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, 500000.0),
    "llama-2-7b": Shape("llama", 32, 4096, 32, 32, 128, 11008, 32000, 4096, 10000.0),
    "mistral-7b-v0.3": Shape("llama", 32, 4096, 32, 8, 128, 14336, 32768, 32768, 1000000.0),
    "qwen3-0.6b": Shape(
        "qwen3", 28, 1024, 16, 8, 128, 3072, 151936, 40960, 1000000.0, tied=True, qk_norm=True
    ),
    "qwen3-4b": Shape(
        "qwen3", 36, 2560, 32, 8, 128, 9728, 151936, 40960, 1000000.0, tied=True, qk_norm=True
    ),
    "qwen3-8b": Shape("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 40960, 1000000.0, qk_norm=True),
    "qwen3.6-27b": Shape(
        "qwen35", 64, 5120, 24, 4, 256, 17408, 248320, 262144, 1e7, qk_norm=True, rope_dim=64,
        delta_net=DeltaNet(4, 16, 48),
    ),
    "qwen3.6-35b-a3b": Shape(
        "qwen35moe", 40, 2048, 16, 2, 256, 512, 248320, 262144, 1e7, qk_norm=True, rope_dim=64,
        delta_net=DeltaNet(4, 16, 32), experts=Experts(256, 8, 512, 512),
    ),
    "gemma-3-270m": Shape(
        "gemma3", 18, 640, 4, 1, 256, 2048, 262144, 32768, 1e6, tied=True, qk_norm=True,
        sliding=Sliding(512, 6),
    ),
    "gemma-3-12b": Shape(
        "gemma3", 48, 3840, 16, 8, 256, 15360, 262208, 131072, 1e6, tied=True, qk_norm=True,
        sliding=Sliding(1024, 6),
    ),
    "gemma-4-31b": Shape(
        "gemma4", 60, 5376, 32, 4, 512, 21504, 262144, 262144, 1e6, tied=True, qk_norm=True,
        keys_are_values=True, sliding=Sliding(1024, 6, 16, 256),
    ),
    "gpt-oss-20b": Shape(
        "gpt-oss", 24, 2880, 64, 8, 64, 2880, 201088, 131072, 150000.0,
        sliding=Sliding(128, 2), experts=Experts(32, 4, 2880),
    ),
}  # fmt: skip


def find_shape(name: str) -> Shape:
    """Return the shape of that name. Raises UnsupportedError if there is none."""
    if name not in SHAPES:
        raise UnsupportedError(f"{name!r} is not a known shape; expected {', '.join(SHAPES)}")
    return SHAPES[name]


# -- tensors


@dataclass(frozen=True)
class Tensor:
    """A tensor of a model.

    Attributes:
        dims: elements, innermost first as in GGUF: (inputs, outputs) for a matrix.
        value: the value of every element, in F32; None for random weights.
    """

    name: str
    dims: tuple[int, ...]
    value: float | None = None


def tensors_of(shape: Shape) -> Iterator[Tensor]:
    """Yield the tensors of a model, as llama.cpp expects them (src/models/)."""
    d = shape.n_embd
    yield Tensor("token_embd.weight", (d, shape.n_vocab))
    if shape.arch == "gemma4":
        yield Tensor("rope_freqs.weight", (shape.head_dim // 2,), 1.0)
    for il, full in enumerate(shape.full_layers):
        recurrent = shape.delta_net is not None and not full
        mixer = _delta_net(shape) if recurrent else _attention(shape, full)
        for tensor in (*mixer, *_norms(shape), *_feed_forward(shape)):
            yield Tensor(f"blk.{il}.{tensor.name}", tensor.dims, tensor.value)
    yield Tensor("output_norm.weight", (d,), 1.0)
    if not shape.tied:
        yield Tensor("output.weight", (d, shape.n_vocab))


def _attention(shape: Shape, full: bool) -> Iterator[Tensor]:
    d, n_head_kv, dim = shape.n_embd, shape.n_head_kv, shape.head_dim
    if shape.sliding and not full:
        n_head_kv = shape.sliding.n_head_kv or n_head_kv
        dim = shape.sliding.head_dim or dim
    n_q, n_kv = shape.n_head * dim, n_head_kv * dim
    gates = 2 if shape.delta_net else 1  # attn_q also computes a gate for each query
    yield Tensor("attn_q.weight", (d, gates * n_q))
    yield Tensor("attn_k.weight", (d, n_kv))
    if not (full and shape.keys_are_values):
        yield Tensor("attn_v.weight", (d, n_kv))
    yield Tensor("attn_output.weight", (n_q, d))
    if shape.qk_norm:
        yield Tensor("attn_q_norm.weight", (dim,), 1.0)
        yield Tensor("attn_k_norm.weight", (dim,), 1.0)
    if shape.arch == "gpt-oss":
        yield Tensor("attn_sinks.weight", (shape.n_head,), 0.0)
        for name, size in (("q", n_q), ("k", n_kv), ("v", n_kv), ("output", d)):
            yield Tensor(f"attn_{name}.bias", (size,), 0.0)


def _delta_net(shape: Shape) -> Iterator[Tensor]:
    net, d = shape.delta_net, shape.n_embd
    assert net is not None
    n_v = net.n_head_v * net.head_dim
    n_qkv = 2 * net.n_head_qk * net.head_dim + n_v
    yield Tensor("attn_qkv.weight", (d, n_qkv))
    yield Tensor("attn_gate.weight", (d, n_v))
    yield Tensor("ssm_conv1d.weight", (net.n_conv, n_qkv), 1 / net.n_conv)
    yield Tensor("ssm_dt.bias", (net.n_head_v,), 0.0)
    yield Tensor("ssm_a", (net.n_head_v,), -1.0)
    yield Tensor("ssm_beta.weight", (d, net.n_head_v))
    yield Tensor("ssm_alpha.weight", (d, net.n_head_v))
    yield Tensor("ssm_norm.weight", (net.head_dim,), 1.0)
    yield Tensor("ssm_out.weight", (n_v, d))


def _norms(shape: Shape) -> Iterator[Tensor]:
    names = ["attn_norm"]
    if shape.arch in ("gpt-oss", "qwen35", "qwen35moe"):
        names.append("post_attention_norm")
    elif shape.arch in ("gemma3", "gemma4"):
        names += ["post_attention_norm", "ffn_norm", "post_ffw_norm"]
    else:
        names.append("ffn_norm")
    for name in names:
        yield Tensor(f"{name}.weight", (shape.n_embd,), 1.0)
    if shape.arch == "gemma4":
        yield Tensor("layer_output_scale.weight", (1,), 1.0)


def _feed_forward(shape: Shape) -> Iterator[Tensor]:
    d, experts = shape.n_embd, shape.experts
    if experts is None:
        yield Tensor("ffn_gate.weight", (d, shape.n_ff))
        yield Tensor("ffn_up.weight", (d, shape.n_ff))
        yield Tensor("ffn_down.weight", (shape.n_ff, d))
        return
    yield Tensor("ffn_gate_inp.weight", (d, experts.n))
    for name, n_in, n_out in (
        ("gate", d, experts.n_ff),
        ("up", d, experts.n_ff),
        ("down", experts.n_ff, d),
    ):
        yield Tensor(f"ffn_{name}_exps.weight", (n_in, n_out, experts.n))
        if shape.arch == "gpt-oss":
            yield Tensor(f"ffn_{name}_exps.bias", (n_out, experts.n), 0.0)
    if shape.arch == "gpt-oss":
        yield Tensor("ffn_gate_inp.bias", (experts.n,), 0.0)
    if experts.n_ff_shared:
        yield Tensor("ffn_gate_inp_shexp.weight", (d,), 0.0)
        yield Tensor("ffn_gate_shexp.weight", (d, experts.n_ff_shared))
        yield Tensor("ffn_up_shexp.weight", (d, experts.n_ff_shared))
        yield Tensor("ffn_down_shexp.weight", (experts.n_ff_shared, d))


# -- metadata


def metadata_of(shape: Shape) -> dict[str, int | float | list[int] | list[bool]]:
    """Return the metadata of the shape. Keys are without the prefix of the architecture."""
    head_count_kv: int | list[int] = shape.n_head_kv
    keys: dict[str, int | float | list[int] | list[bool]] = {
        "block_count": shape.n_layer,
        "context_length": shape.n_ctx_train,
        "embedding_length": shape.n_embd,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "rope.dimension_count": shape.rope_dim or shape.head_dim,
        "vocab_size": shape.n_vocab,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": shape.rope_base,
    }
    if shape.sliding:
        keys["attention.sliding_window"] = shape.sliding.window
        if shape.arch.startswith("gemma"):
            keys["rope.freq_base_swa"] = 10000.0
        if shape.arch == "gemma4":
            dim = shape.sliding.head_dim or shape.head_dim
            n_kv = shape.sliding.n_head_kv or shape.n_head_kv
            head_count_kv = [shape.n_head_kv if full else n_kv for full in shape.full_layers]
            keys["attention.sliding_window_pattern"] = [not full for full in shape.full_layers]
            keys["attention.key_length_swa"] = keys["attention.value_length_swa"] = dim
            keys["rope.dimension_count_swa"] = dim
            keys["embedding_length_per_layer_input"] = 0
    keys["attention.head_count_kv"] = head_count_kv
    if shape.delta_net:
        net = shape.delta_net
        keys |= {
            "full_attention_interval": net.period,
            "rope.dimension_sections": [11, 11, 10, 0],
            "ssm.conv_kernel": net.n_conv,
            "ssm.state_size": net.head_dim,
            "ssm.group_count": net.n_head_qk,
            "ssm.time_step_rank": net.n_head_v,
            "ssm.inner_size": net.n_head_v * net.head_dim,
        }
    if shape.experts:
        keys |= {
            "expert_count": shape.experts.n,
            "expert_used_count": shape.experts.n_used,
            "expert_feed_forward_length": shape.experts.n_ff,
        }
        if shape.experts.n_ff_shared:
            keys["expert_shared_feed_forward_length"] = shape.experts.n_ff_shared
    return keys
