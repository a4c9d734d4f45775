"""Which kind of cache each layer of a model has, by its metadata.

llama.cpp decides this in the code of each architecture (src/models/). The tables below repeat it,
and tests/native/test_architectures.py compares them with the library for every architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .gguf.header import ARRAY, BOOL, I32, U16, U32, Header

SLIDING_KEY = "attention.sliding_window"
PATTERN_KEY = "attention.sliding_window_pattern"


@dataclass(frozen=True)
class Pattern:
    """Every period-th layer has full attention, the others a sliding window.

    Attributes:
        period: 0: no layer has full attention. The metadata may have another one, or a list.
        dense_first: the first layer of a period has full attention, not the last.
        optional: the windows are off unless the metadata have their size.
        window: tokens, where the metadata do not have it.
        fixed: tokens, whatever the metadata have.
    """

    period: int
    dense_first: bool = False
    optional: bool = False
    window: int = 0
    fixed: int = 0


LISTED = Pattern(1)  # the metadata always have a list

SLIDING = {
    "afmoe": Pattern(4, optional=True),
    "cohere2": Pattern(4),
    "cohere2moe": Pattern(4, dense_first=True),
    "exaone-moe": Pattern(4, window=128),
    "exaone4": Pattern(4, window=4096),  # with 64 layers
    "gemma2": Pattern(2, window=4096),
    "gemma3": Pattern(6, optional=True),
    "gemma3n": Pattern(5),
    "gemma4": LISTED,
    "gpt-oss": Pattern(2),
    "granite_swa": LISTED,
    "laguna": Pattern(4, dense_first=True, optional=True),
    "lfm2": Pattern(0, optional=True),
    "llama4": Pattern(4, fixed=8192),  # unless the size is 0
    "maple": LISTED,
    "mellum": Pattern(4, optional=True),
    "mimo2": LISTED,
    "muse-glimmer": Pattern(4),
    "olmo2": Pattern(4, optional=True),
    "plamo3": Pattern(8, optional=True),
    "smallthinker": Pattern(4, dense_first=True, optional=True, fixed=4096),
    "spark2_5": LISTED,
    "step35": LISTED,
}

# hybrid architectures: in these, layers without KV heads are recurrent or have neither
HYBRID_BY_HEADS = (
    "granitehybrid", "jamba", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe", "plamo2",
)  # fmt: skip
# in these, every n-th layer has full attention, or the metadata have a list of recurrent layers
HYBRID_BY_INTERVAL = {"minimax-01": 8, "qwen35": 4, "qwen35moe": 4, "qwen3next": 4}
# in these, every layer has attention and a recurrent state
HYBRID_IN_PARALLEL = ("falcon-h1",)

HYBRID = (*HYBRID_BY_HEADS, *HYBRID_BY_INTERVAL, *HYBRID_IN_PARALLEL)

GEMMA3N_OWN_CACHES = 20  # layers; the later ones read the caches of these


@dataclass(frozen=True)
class LayerCaches:
    """The caches of each layer.

    Attributes:
        full: a KV cache of the whole context.
        sliding: a KV cache of the last `window` tokens.
        recurrent: a state of constant size.
        shared: layer -> the earlier layer whose full cache it reads.
        window: tokens.
    """

    full: tuple[bool, ...]
    sliding: tuple[bool, ...]
    recurrent: tuple[bool, ...]
    shared: dict[int, int]
    window: int


def find_layer_caches(
    header: Header, arch: str, n_layer: int, n_layer_all: int, n_head_kv: tuple[int, ...]
) -> LayerCaches:
    """The caches of the first n_layer layers. Raises GGUFError for a key of another type.

    Args:
        n_layer_all: layers, with those that only predict further tokens.
        n_head_kv: by the metadata, for each of the n_layer layers.
    """

    def number(key: str, default: int) -> int:
        found = header.number(f"{arch}.{key}", (U32, I32, U16))
        return default if found is None else int(found)

    sliding, window = _sliding(header, arch, n_layer, number)
    n_ff = _feed_forward(header, arch, n_layer, number)
    recurrent = _recurrent(header, arch, n_layer, n_head_kv, n_ff, number)
    if arch in HYBRID_IN_PARALLEL:
        attention = [True] * n_layer
    else:
        attention = [not r and ff == 0 for r, ff in zip(recurrent, n_ff, strict=True)]

    n_own = n_layer_all
    if arch == "gemma3n":
        n_own = GEMMA3N_OWN_CACHES
    elif arch == "gemma4":
        n_own -= number("attention.shared_kv_layers", 0)
    own = [il < n_own for il in range(n_layer)]
    if arch == "lfm2" and window:
        sliding = attention
    full = [a and o and not s for a, o, s in zip(attention, own, sliding, strict=True)]
    return LayerCaches(
        full=tuple(full),
        sliding=tuple(a and o and s for a, o, s in zip(attention, own, sliding, strict=True)),
        recurrent=tuple(recurrent),
        shared={il: n_own - 1 for il in range(n_layer) if not own[il] and not sliding[il]},
        window=window,
    )


def recurrent_state_size(header: Header, arch: str, n_embd: int, n_head: int) -> tuple[int, int]:
    """Elements of the two states of a recurrent layer: of its convolution, and the other."""

    def number(key: str) -> int:
        found = header.number(f"{arch}.{key}", (U32, I32, U16))
        return 0 if found is None else int(found)

    if arch in ("lfm2", "lfm2moe"):
        return n_embd * max(number("shortconv.l_cache") - 1, 0), 0
    if arch == "minimax-01":
        head_dim = number("attention.key_length") or n_embd // max(n_head, 1)
        return 0, head_dim * head_dim * n_head
    inner, state = number("ssm.inner_size"), number("ssm.state_size")
    width = inner + 2 * number("ssm.group_count") * state
    return max(number("ssm.conv_kernel") - 1, 0) * width, state * inner


def _sliding(
    header: Header, arch: str, n_layer: int, number: Callable[[str, int], int]
) -> tuple[list[bool], int]:
    """The layers with a sliding window, and its tokens (0: there are none)."""
    none: tuple[list[bool], int] = [False] * n_layer, 0
    pattern = SLIDING.get(arch)
    if pattern is None or (arch == "exaone4" and n_layer != 64):
        return none
    found = number(SLIDING_KEY, -1)
    if (pattern.optional and found <= 0) or (arch == "llama4" and found == 0):
        return none
    window = pattern.fixed or (found if found >= 0 else pattern.window)
    layers = _flags(header, f"{arch}.{PATTERN_KEY}", n_layer)
    if layers is None:
        period = pattern.period if pattern is LISTED else number(PATTERN_KEY, pattern.period)
        dense = 0 if pattern.dense_first else period - 1
        layers = [period == 0 or il % period != dense for il in range(n_layer)]
    return layers, window


def _recurrent(
    header: Header,
    arch: str,
    n_layer: int,
    n_head_kv: tuple[int, ...],
    n_ff: list[int],
    number: Callable[[str, int], int],
) -> list[bool]:
    if arch in HYBRID_IN_PARALLEL:
        return [True] * n_layer
    if arch in HYBRID_BY_INTERVAL:
        listed = _flags(header, f"{arch}.attention.recurrent_layers", n_layer)
        interval = number("full_attention_interval", HYBRID_BY_INTERVAL[arch])
        return listed or [(il + 1) % max(interval, 1) != 0 for il in range(n_layer)]
    if arch not in HYBRID_BY_HEADS:
        return [False] * n_layer
    return [n == 0 and ff == 0 for n, ff in zip(n_head_kv, n_ff, strict=True)]


def _feed_forward(
    header: Header, arch: str, n_layer: int, number: Callable[[str, int], int]
) -> list[int]:
    """The width of layers that are feed-forward alone, 0 for the others."""
    if not arch.startswith("nemotron_h"):
        return [0] * n_layer
    key = f"{arch}.feed_forward_length"
    entry = header.entries.get(key)
    if entry is None or entry.kind != ARRAY:
        return [number("feed_forward_length", 0)] * n_layer
    array = header.array(key, entry.element if entry.element == I32 else U32, 1024)
    widths = [] if array is None else [int(n) for n in array[:n_layer]]
    return widths + [0] * (n_layer - len(widths))


def _flags(header: Header, key: str, n_layer: int) -> list[bool] | None:
    """A list of a flag per layer; layers after its end have none. None: it is not a list."""
    entry = header.entries.get(key)
    if entry is None or entry.kind != ARRAY:
        return None
    element = entry.element if entry.element in (BOOL, I32) else U32
    array = header.array(key, element, 1024)
    flags = [] if array is None else [bool(n) for n in array[:n_layer]]
    return flags + [False] * (n_layer - len(flags))
