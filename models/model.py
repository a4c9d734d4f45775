"""The model in PyTorch: the llama architecture as llama.cpp runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    n_vocab: int
    n_layer: int = 6
    n_embd: int = 256
    n_head: int = 8
    n_head_kv: int = 4
    head_dim: int = 64
    n_ff: int = 512
    norm_eps: float = 1e-5
    rope_base: float = 1e4


BIAS = 4.0  # the constant dimension of the embeddings
HEAD = 0.02  # of the embeddings, at the start


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        d, hd = shape.n_embd, shape.head_dim
        self.attn_norm = nn.RMSNorm(d, shape.norm_eps)
        self.q = nn.Linear(d, shape.n_head * hd, bias=False)
        self.k = nn.Linear(d, shape.n_head_kv * hd, bias=False)
        self.v = nn.Linear(d, shape.n_head_kv * hd, bias=False)
        self.o = nn.Linear(shape.n_head * hd, d, bias=False)
        self.ffn_norm = nn.RMSNorm(d, shape.norm_eps)
        self.gate = nn.Linear(d, shape.n_ff, bias=False)
        self.up = nn.Linear(d, shape.n_ff, bias=False)
        self.down = nn.Linear(shape.n_ff, d, bias=False)

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v [batch, query heads, tokens, head_dim], k and v repeated per group."""
        s = self.shape
        b, n, _ = x.shape
        x = self.attn_norm(x)
        q = self.q(x).view(b, n, s.n_head, s.head_dim).transpose(1, 2)
        k = self.k(x).view(b, n, s.n_head_kv, s.head_dim).transpose(1, 2)
        v = self.v(x).view(b, n, s.n_head_kv, s.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = s.n_head // s.n_head_kv
        return q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.heads(x, cos, sin)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to halves. export.py reorders the rows of q and k for llama.cpp's pairs."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Llama(nn.Module):
    def __init__(self, shape: Shape, seed: int = 0):
        super().__init__()
        self.shape = shape
        self.embed = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.norm = nn.RMSNorm(shape.n_embd, shape.norm_eps)
        self.head = nn.Linear(shape.n_embd, shape.n_vocab, bias=False)
        self.initialize(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """Initialize the parameters.

        Embeddings are N(0, 1) with one constant dimension, which lets attention depend on positions
        alone. Without it previous-token heads form very slowly. Layers that write to the residual
        stream start small. The head starts as small embeddings, so that copying a token already
        raises its logit: induction forms earlier than with a head of 0.
        """
        self.embed.weight.normal_(generator=generator)
        self.embed.weight[:, 0] = BIAS
        self.head.weight.copy_(HEAD * self.embed.weight)
        self.head.weight[:, 0] = 0
        for block in self.blocks:
            for linear in (block.q, block.k, block.v, block.o, block.gate, block.up, block.down):
                linear.weight.normal_(0, linear.in_features**-0.5, generator=generator)
            for linear in (block.o, block.down):
                linear.weight.mul_((2 * self.shape.n_layer) ** -0.5)

    @torch.no_grad()
    def seed_previous(self, offsets: tuple[int, ...]) -> None:
        """Initialize query heads of layer 0 to attend `offsets` tokens back.

        They use the constant direction and the fast half of RoPE.
        """
        shape, block = self.shape, self.blocks[0]
        half, group = shape.head_dim // 2, shape.n_head // shape.n_head_kv
        fast = torch.arange(half // 2)
        frequency = shape.rope_base ** (-fast.double() / half)
        strength = 2.2
        q = block.q.weight.view(shape.n_head, shape.head_dim, shape.n_embd)
        k = block.k.weight.view(shape.n_head_kv, shape.head_dim, shape.n_embd)
        for head, offset in enumerate(offsets):
            q[head] = 0
            q[head, fast, 0] = strength * (offset * frequency).cos().float()
            q[head, half + fast, 0] = -strength * (offset * frequency).sin().float()
            k[head // group] = 0
            k[head // group, fast, 0] = strength

    def rope(self, n: int, device=None) -> tuple[Tensor, Tensor]:
        """Return cos and sin [tokens, head_dim / 2].

        The faster half of the pairs makes a full turn within 500 tokens, and the other half does
        not rotate. Longer texts than those of the training therefore have no new angles, and half
        of a head compares contents at any distance.
        """
        half, base = self.shape.head_dim // 2, self.shape.rope_base
        frequency = base ** (-torch.arange(half, dtype=torch.float64, device=device) / half)
        frequency[half // 2 :] = 0
        angle = torch.arange(n, dtype=torch.float64, device=device)[:, None] * frequency
        return angle.cos().float(), angle.sin().float()

    def forward(self, ids: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the states before the head, [batch, tokens, n_embd]. cos, sin: from rope()."""
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.norm(x)

    def loss(self, ids: Tensor, weights: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return the weighted mean cross-entropy of ids[:, 1:]; both are [batch, tokens + 1]."""
        logits = self.head(self(ids[:, :-1], cos, sin)).float()
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        return (losses * weights).sum() / weights.sum().clamp(min=1.0)

    @torch.no_grad()
    def attention(self, ids: Tensor, see: Callable[[int, Tensor], None]) -> None:
        """Call see(layer, attention) with the attention, [batch, heads, tokens, tokens]."""
        n = ids.shape[1]
        cos, sin = self.rope(n, ids.device)
        future = torch.ones(n, n, dtype=torch.bool, device=ids.device).triu(1)
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            q, k, _ = block.heads(x, cos, sin)
            score = (q @ k.transpose(-1, -2)).float() * self.shape.head_dim**-0.5
            see(i, score.masked_fill(future, float("-inf")).softmax(-1))
            x = block(x, cos, sin)

    def parts(self) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
        """Return the matrices, the embeddings and all other parameters."""
        matrices = [p for block in self.blocks for p in block.parameters() if p.ndim == 2]
        known = {id(p) for p in matrices} | {id(self.embed.weight)}
        return (
            matrices,
            [self.embed.weight],
            [p for p in self.parameters() if id(p) not in known],
        )
