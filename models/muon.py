"""Muon: momentum with orthogonalized updates (https://kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


def has_bf16(device: str) -> bool:
    """Return True if matrix products are faster in bf16 than in fp32.

    This is so on CUDA, and on CPUs with instructions for them (1.4 times as many steps).
    """
    return device == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """Approximate U V' of the singular value decomposition of each matrix of g [n, rows, columns].

    This takes Newton-Schulz steps with the coefficients of the post above.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16() if has_bf16(g.device.type) else g.float()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        m = x @ x.mT
        x = a * x + (b * m + c * m @ m) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """The optimizer of matrices. Those of one shape are orthogonalized together."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                shapes[p.shape].append(p)
            for (rows, columns), params in shapes.items():
                ahead = [  # Nesterov
                    p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in params
                ]
                update = orthogonal(torch.stack(ahead))
                scale = -group["lr"] * max(1.0, rows / columns) ** 0.5
                for p, u in zip(params, update, strict=True):
                    p.add_(u, alpha=scale)
