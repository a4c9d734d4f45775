"""Capture the inputs and outputs of the attention of each layer while a model runs."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass

import numpy as np

from ..errors import UnsupportedError
from ..model_shape import ModelShape
from ..native.callbacks import Control
from ..native.structs import CustomParams, Tensor
from ..native.tensors import F32, check_layout, read
from ..plan import Plan
from . import reference

KEYS_COMPARED = 8  # tokens of each ubatch whose keys show which heads are stored

_CACHE = re.compile(r"cache_(razor_)?([kv])_(local_)?l(\d+)\b")  # of both caches
# where the output has a gate, the model gives it another name
_OUTPUT = re.compile(r"(?:kqv_out|attn_pregate|attn_out)-(\d+)$")
_MOVED = re.compile(r"[^#]+#(.+)#\d+$")  # a copy of a tensor on another backend
_SAME_DATA = ("VIEW", "RESHAPE", "CONT", "PERMUTE", "TRANSPOSE", "PAD")


@dataclass(frozen=True)
class Layer:
    """The inputs and outputs of one layer's attention.

    Attributes:
        q: f32 [n_rows, n_head, d_k], after RoPE.
        positions: int [n_rows], the positions of q.
        k, v: the rows of all tokens, packed in the KV types of the plan after rotation
            (reference.pack_rows): first those of retrieval heads, then those of local heads.
        out: f32 [n_rows, n_head, d_v], rotated if V is (reference.rotation_sizes).
        scale: factor of q.k.
        cap: soft cap of the logits, 0 for none.
        sinks: f32 [n_head], logits without a value; None if there are none.
    """

    q: np.ndarray
    positions: np.ndarray
    k: tuple[np.ndarray, np.ndarray]
    v: tuple[np.ndarray, np.ndarray]
    out: np.ndarray
    scale: float
    cap: float = 0.0
    sinks: np.ndarray | None = None


class Capture:
    """Collect the inputs and outputs of the attention of each layer in the eval callback.

    Tensors are not recognized by their names, which differ from model to model, but by their use: a
    tensor stored in a cache is k or v, and the first input of flash attention (or of the product
    with K) is q. These are followed back through views, the rotation and the gathering of heads to
    the tensors that the model computed before razor changed them.

    ggml reuses memory, so all tensors of a fitting shape are copied when they are computed. Once
    the output of the layer is there, the three that count are kept.
    """

    def __init__(
        self,
        lib: ctypes.CDLL,
        shape: ModelShape,
        plan: Plan,
        positions: np.ndarray,
        control: Control,
    ) -> None:
        self.lib, self.shape, self.plan, self.control = lib, shape, plan, control
        self.positions = positions
        self.eval_callback = control.watch(self._is_wanted, self._take)
        self.sizes = {
            (d, n)
            for il in range(shape.n_layer)
            if shape.n_head_kv[il]
            for d, n in (
                (shape.head_dim_k, shape.n_head[il]),
                (shape.head_dim_k, shape.n_head_kv[il]),
                (shape.head_dim_v, shape.n_head_kv[il]),
            )
        }
        self.copies: dict[int, np.ndarray] = {}  # by address of the tensor
        self.named: dict[str, int] = {}  # the last tensor of each name: address
        self.found: dict[str, int] = {}  # q, k, v of the layer under way: address
        self.scale = self.cap = 0.0
        self.out_scale = 1.0  # of Grok
        self.sinks: np.ndarray | None = None
        self.il = -1
        self.layers: dict[int, dict[str, list[np.ndarray]]] = {}
        # (scale, cap, sinks) of each layer
        self.logits: dict[int, tuple[float, float, np.ndarray | None]] = {}
        self.n_seen: dict[int, int] = {}
        # (layer, window or 0 for the whole context) -> bool [heads stored, KV heads]: same keys
        self.stored: dict[tuple[int, int], np.ndarray] = {}
        self.checked = False

    def layer(self, il: int) -> Layer:
        """Return the captured data of a layer and forget it. Raises UnsupportedError."""
        parts = self.layers.pop(il, None)
        n_rows = sum(map(len, parts["q"])) if parts else 0
        if parts is None or n_rows != len(self.positions):
            raise UnsupportedError(
                f"layer {il} of this model ({self.shape.arch}) shows its attention for {n_rows} of"
                f" {len(self.positions)} rows"
            )
        q, k, k_local, v, v_local, out = map(np.concatenate, parts.values())
        return Layer(q, self.positions, (k, k_local), (v, v_local), out, *self.logits[il])

    def misplaced(self, windows: Sequence[Sequence[int]]) -> tuple[str, ...]:
        """Return a sentence for each layer whose keys are not stored as the profile says.

        Args:
            windows: the window of each KV head of each layer, 0 for retrieval heads.
        """
        sentences = []
        for il in self.n_seen:
            layer, wrong = np.asarray(windows[il], np.int64), False
            found, wanted = [], []
            several = len(self.plan.groups) > 1
            for window in (0, *(group.window for group in self.plan.groups)):
                expected = np.flatnonzero(layer == window)
                same = self.stored.get((il, window), np.zeros((0, len(layer)), bool))
                if several and window and not len(expected) and not len(same):
                    continue
                right = len(same) == len(expected) and same[range(len(same)), expected].all()
                heads = _names(expected.tolist() if right else [_which(row) for row in same])
                size = f" of {window:,}" if several else ""
                found.append(f"a window{size} for {heads}" if window else heads)
                wanted.append(_names(expected.tolist()))
                wrong = wrong or not right
            if wrong:
                sentences.append(
                    f"layer {il} keeps the whole context for the KV heads {' and '.join(found)},"
                    f" but the profile says {' and '.join(wanted)}"
                )
        return tuple(sentences)

    def _take(self, pointer: int) -> None:
        tensor, output = Tensor.from_address(pointer), _OUTPUT.match(self._name(pointer))
        if output:
            self._finish(int(output[1]), pointer)
        elif self._op(pointer) == "SET_ROWS":
            self._note_stored(tensor.src[0], tensor.src[1], tensor.view_src)
        elif self._op(pointer) == "CUSTOM":
            self._note_stored(tensor.src[0], tensor.src[4], tensor.src[2])
        else:
            self.copies[pointer] = read(self.lib, pointer)[0]

    def _is_wanted(self, pointer: int) -> bool:
        if not self.checked:
            check_layout(self.lib, pointer)
            self.checked = True
        self.copies.pop(pointer, None)  # of a tensor that was in the same memory
        self.named[self._name(pointer)] = pointer
        is_input = self._is_input(pointer, Tensor.from_address(pointer))
        return is_input or _OUTPUT.match(self._name(pointer)) is not None

    def _is_input(self, pointer: int, tensor: Tensor) -> bool:
        """Return True if a tensor may be an input of a layer's attention."""
        op = self._op(pointer)
        name = tensor.name.decode("utf-8", "replace")
        if op == "SET_ROWS":
            cache = _CACHE.match(self._name(tensor.view_src))
            if cache:
                ours, what, _, il = cache.groups()
                self.il = int(il)
                if not self._is_compared(self.il):
                    return False
                d = self.shape.head_dim_k if what == "k" else self.shape.head_dim_v
                self._find(what, tensor.src[0], d, self.shape.n_head_kv[self.il])
                return bool(ours) and what == "k"
        elif op == "FLASH_ATTN_EXT":
            self._find("q", tensor.src[0], self.shape.head_dim_k, self.shape.n_head[self.il])
            self._parameters(tensor, cap=2)
            self._find_sinks(tensor)
        elif op == "CUSTOM":
            return self._custom(tensor)
        elif op == "MUL_MAT" and name.startswith("kq-"):
            self._find("q", tensor.src[1], self.shape.head_dim_k, self.shape.n_head[self.il])
        elif op == "SOFT_MAX" and name.startswith("kq_soft_max-"):
            self._parameters(tensor)
            self.scale *= self.out_scale
            self._find_sinks(tensor)
        elif name.startswith("kq_scaled_2-"):
            self.cap = _float_parameter(tensor)
        elif name.startswith("kq_scaled-"):  # Grok: cap * tanh(q.k * out_scale / cap)
            tanh = Tensor.from_address(tensor.src[0])
            self.cap = _float_parameter(tensor)
            self.out_scale = _float_parameter(Tensor.from_address(tanh.src[0])) * self.cap
        elif op not in ("GET_ROWS", "FLASH_ATTN_EXT", "CUSTOM", "REPEAT") and tensor.type == F32:
            d, n, _, rest = tensor.ne
            seen = op in _SAME_DATA and tensor.src[0] in self.copies
            return (d, n) in self.sizes and rest == 1 and not seen
        return False

    def _custom(self, tensor: Tensor) -> bool:
        """Handle an operation of native/src/ggml-razor.h: attention, storing K and V, folding."""
        if _CACHE.match(self._name(tensor.src[0])):
            return False  # a fold
        if _CACHE.match(self._name(tensor.src[1])):  # attention; without k it only combines parts
            self._find("q", tensor.src[0], self.shape.head_dim_k, self.shape.n_head[self.il])
            parameters = (c_float * 2).from_address(CustomParams.from_buffer(tensor.op_params).data)
            self.scale, self.cap = parameters
            self._find_sinks(tensor)
        elif tensor.src[1] and "attn_sinks" in self._name(tensor.src[1]):
            self._find_sinks(tensor)  # partial sums are added up
        elif cache := _CACHE.match(self._name(tensor.src[2])):
            self.il = int(cache[4])
            n_heads = self.shape.n_head_kv[self.il]
            self._find("k", tensor.src[0], self.shape.head_dim_k, n_heads)
            self._find("v", tensor.src[1], self.shape.head_dim_v, n_heads)
            return True
        return False

    def _find(self, what: str, pointer: int | None, d: int, n_heads: int) -> None:
        """Follow data back to the model's tensor of shape [d, n_heads, n_tokens]."""
        found = None
        while pointer:
            moved = _MOVED.match(self._name(pointer))
            pointer = self.named.get(moved[1], pointer) if moved else pointer
            tensor = Tensor.from_address(pointer)
            if tuple(tensor.ne[:2]) == (d, n_heads) and tensor.ne[3] == 1:
                if pointer in self.copies:
                    found = pointer
            op = self._op(pointer)
            if op in _SAME_DATA:
                pointer = tensor.src[0]
            elif op == "GET_ROWS" and "razor_inp_heads" in self._name(tensor.src[1]):
                pointer = tensor.src[0]
            elif op == "MUL_MAT" and re.search("attn_inp_[kv]_rot", self._name(tensor.src[0])):
                pointer = tensor.src[1]
            else:
                break
        if found is not None:  # otherwise the mean of a fold is being stored
            self.found[what] = found

    def _note_stored(self, stored: int, places: int, cache: int) -> None:
        """Note the KV heads whose keys were just written into a cache tensor.

        Args:
            stored: the tensor that was written.
            places: the tensor of its row numbers in the cache.
            cache: the cache tensor.
        """
        k = self.copies.get(self.found.get("k", 0))
        if k is None:
            return  # the mean of a fold
        n_tokens, n_heads, d = k.shape
        rows = read(self.lib, stored).reshape(n_tokens, -1, d)[:KEYS_COMPARED]
        k = k[:KEYS_COMPARED]
        size_k, _ = rotation_sizes(self.plan)
        if size_k is not None:
            k = reference.rotate(k, size_k)
        off = np.abs(rows[:, :, None] - k[:, None]).max(axis=(0, 3))
        same = off <= 1e-3 * np.abs(k).max()  # [heads in the order of the rows, KV heads]
        for window, order in self._places(places, cache, n_heads, rows.shape[1]).items():
            if len(order) == 0:
                continue  # heads with other types are in another tensor
            place = (self.il, window)
            before = self.stored.get(place)
            fits = before is not None and before.shape == same[order].shape
            self.stored[place] = same[order] & before if fits else same[order]

    def _places(
        self, places: int, cache: int, n_heads: int, n_stored: int
    ) -> dict[int, np.ndarray]:
        """Return the heads of a token's rows in the order of the cache.

        The key is the window of the heads, 0 for those stored for the whole context. Heads with
        different types are in different tensors, so n_stored of n_heads are in this one.
        """
        rows = read(self.lib, places).reshape(-1)[:n_stored]
        windows = [0, *(group.window for group in self.plan.groups)]
        sizes = [self.plan.n_ctx, *(group.cells for group in self.plan.groups)]
        if n_stored < n_heads:
            kind = slice(1, None) if _is_local(self._name(cache)) else slice(1)
            windows, sizes = windows[kind], sizes[kind]
        if len(windows) == 1:
            counts = [n_stored]
        elif (
            n_stored == n_heads and len(windows) == 2
        ):  # their numbers follow from the size of the cache
            n_rows = Tensor.from_address(cache).ne[1]
            n_retrieval = (n_rows - n_heads * sizes[1]) // (sizes[0] - sizes[1])
            counts = [n_retrieval, n_heads - n_retrieval]
        else:
            counts = [self.plan.layers[self.il].windows.count(window) for window in windows]
        edges = np.cumsum(np.multiply(counts, sizes))
        order = np.argsort(rows)
        group = np.searchsorted(edges, rows[order], side="right")
        return {window: order[group == i] for i, window in enumerate(windows)}

    def _parameters(self, tensor: Tensor, cap: int | None = None) -> None:
        values = ctypes.cast(tensor.op_params, ctypes.POINTER(c_float))
        self.scale = values[0]
        if cap is not None:
            self.cap = values[cap]

    def _find_sinks(self, tensor: Tensor) -> None:
        """Read the weights that are added as logits, which may be gathered for some heads."""
        for pointer in tensor.src:
            for _ in range(8):
                if not pointer:
                    break
                if self._name(pointer).endswith("attn_sinks.weight"):
                    self.sinks = read(self.lib, pointer).reshape(-1).copy()
                    return
                pointer = Tensor.from_address(pointer).src[0]

    def _is_compared(self, il: int) -> bool:
        """Return whether a layer has full attention with a cache of its own."""
        return il < self.shape.n_layer and self.shape.n_head_kv[il] > 0

    def _finish(self, il: int, pointer: int) -> None:
        """Keep the inputs and outputs of a layer in this ubatch."""
        if self._name(pointer).startswith("attn_out") and len(self.found) < 3:
            return  # after the output projection
        if not self._is_compared(il):
            self.copies.clear()
            self.found.clear()
            return
        if il != self.il or set(self.found) != {"q", "k", "v"}:
            raise UnsupportedError(
                f"layer {il} of this model ({self.shape.arch}) does not show what its attention"
                f" reads (found {', '.join(sorted(self.found)) or 'nothing'})"
            )
        q, k, v = (self.copies[self.found[name]] for name in "qkv")
        out = read(self.lib, pointer).reshape(len(q), self.shape.n_head[il], self.shape.head_dim_v)
        start = self.n_seen.get(il, 0)
        self.n_seen[il] = start + len(q)
        low, high = np.searchsorted(self.positions, (start, start + len(q)))
        chosen = self.positions[low:high] - start
        size_k, size_v = rotation_sizes(self.plan)
        names = ("q", "k", "k_local", "v", "v_local", "out")
        parts = self.layers.setdefault(il, {name: [] for name in names})
        parts["q"].append(q[chosen])
        for name, data, size in (("k", k, size_k), ("v", v, size_v)):
            rows = data if size is None else reference.rotate(data, size)
            for kind, heads in zip((name, f"{name}_local"), self.plan.heads(il), strict=True):
                parts[kind].append(
                    reference.pack_rows(rows[:, heads], getattr(self.plan, f"type_{kind}"))
                )
        parts["out"].append(out[chosen])
        self.logits[il] = self.scale, self.cap, self.sinks
        self.cap, self.out_scale, self.sinks = 0.0, 1.0, None
        self.copies.clear()
        self.found.clear()

    def _op(self, pointer: int) -> str:
        name: bytes = self.lib.ggml_op_desc(pointer)
        return name.decode()

    def _name(self, pointer: int | None) -> str:
        return Tensor.from_address(pointer).name.decode("utf-8", "replace") if pointer else ""


def _float_parameter(tensor: Tensor) -> float:
    """Return the first parameter of an operation."""
    value: float = ctypes.cast(tensor.op_params, ctypes.POINTER(c_float))[0]
    return value


def _which(same: np.ndarray) -> int | None:
    """Return the only head with the same keys; None if there is none or more than one."""
    return int(np.argmax(same)) if same.sum() == 1 else None


def _names(heads: Sequence[int | None]) -> str:
    return ", ".join("?" if head is None else str(head) for head in heads) or "none"


def _is_local(cache: str) -> bool:
    found = _CACHE.match(cache)
    return found is not None and found[3] is not None


def rotation_sizes(plan: Plan) -> tuple[int | None, int | None]:
    """Return the rotation of K and V, which is the same for all heads of a cache."""
    shape = plan.shape
    sizes = [
        reference.rotation_sizes(k, v, shape.head_dim_k, shape.head_dim_v)
        for k, v in ((plan.type_k, plan.type_v), (plan.type_k_local, plan.type_v_local))
    ]
    (k, v), (k_local, v_local) = sizes
    return k or k_local, v or v_local
