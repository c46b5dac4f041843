"""A classifier that chooses the tokens it looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.random import key, permutation
from mmssl.schedules import cosine
from mmssl.types import Clock


@dataclass(frozen=True)
class Attentive:
    """One learned query that attends to the tokens of a frozen encoder, and a linear classifier on what it gathers.

    Source: arXiv:2202.03026, attentive probing. Departs from the paper: AdamW, no views, and as many heads as fit with 64
    dimensions each.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    batch: int = 256
    epochs: int = 90


class AttentivePool(nn.Module):
    """Cross-attention of one query. dim: D of the tokens."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(dim) * 0.02)
        self.key, self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """(B, L, D) tokens, (B, L) bool -> (B, D)."""
        k, v = (each(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2) for each in (self.key, self.value))  # (B, h, L, d)
        q = self.query.unflatten(0, (self.heads, 1, -1)).expand(len(tokens), -1, -1, -1)
        found = F.scaled_dot_product_attention(q, k, v, valid[:, None, None])
        return self.out(found.transpose(1, 2).flatten(1))


class AttentiveProbe(nn.Module):
    """Tokens -> logits. Tokens are standardised by those of the training set, which `mean` and `std`, (D,), are of."""

    def __init__(self, mean: Tensor, std: Tensor, classes: int):
        super().__init__()
        dim = len(mean)
        self.mean, self.std = mean, std.clamp(min=1e-6)
        self.pool = AttentivePool(dim, max(h for h in range(1, max(1, dim // 64) + 1) if not dim % h))
        self.classifier = nn.Linear(dim, classes)

    def forward(self, tokens: Tensor, valid: Tensor) -> Tensor:
        """(B, L, D), (B, L) -> (B, classes)."""
        return self.classifier(self.pool((tokens - self.mean) / self.std, valid))


def attentive_accuracy(
    p: Attentive, bank: Mapping[str, Tensor], test: Mapping[str, Tensor], classes: int, seed: int = 0
) -> float:
    """Test accuracy, 0..1, of the classifier of `attentive_right`."""
    return float(attentive_right(p, bank, test, classes, seed).double().mean())


@torch.enable_grad()
def attentive_right(
    p: Attentive, bank: Mapping[str, Tensor], test: Mapping[str, Tensor], classes: int, seed: int = 0
) -> Tensor:
    """(Q,) bool: whether it finds the class of each test sample.

    Args:
        bank, test: `tokens` (N, L, D), `attend` (N, L) bool, `label` (N,). What they are on is what it learns on.
        seed: of the first weights and the order of samples.
    """
    tokens, valid, labels = (bank[name] for name in ("tokens", "attend", "label"))
    real = tokens[valid].float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "attentive"))
        probe = AttentiveProbe(real.mean(0), real.std(0), classes).to(tokens.device)
    steps = -(-len(tokens) // p.batch)
    rate, optimizer = cosine(1.0, 0.0), torch.optim.AdamW(probe.parameters(), p.lr, weight_decay=p.weight_decay)
    for step in range(steps * p.epochs):
        if step % steps == 0:
            order = permutation(len(tokens), seed, "probe-order", step // steps).to(tokens.device).tensor_split(steps)
        rows = order[step % steps]
        optimizer.param_groups[0]["lr"] = p.lr * rate(Clock(step, steps * p.epochs))
        optimizer.zero_grad()
        F.cross_entropy(probe(tokens[rows].float(), valid[rows]), labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        parts = zip(*(test[name].split(p.batch) for name in ("tokens", "attend", "label")))
        return torch.cat([probe(x.float(), v).argmax(1) == y for x, v, y in parts])
