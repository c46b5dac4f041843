"""Directions that embeddings are compared with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.model.heads import mlp
from mmssl.parts.part import Part
from mmssl.parts.queue import keyed_rows
from mmssl.types import Clock


class Prototypes(Part):
    """Scores (B, K) = z times K directions of length 1.

    The rows of `weight` are normalised in the forward: written in place, as in the authors' code, they would be undone by an
    engine that holds masters. Their lengths grow with training, which slows their turning.

    While frozen, directions do not move: gradients are zeros, and the optimizer uses a rate and a weight decay of 0 for the
    parameters of a module whose `is_frozen` says so.

    Args:
        dim: D.  count: K.
        freeze_epochs: passes over the data before they are trained.
        learned_gain: whether a learned factor of each direction multiplies its scores, as in a weight-normalised layer.
        trained: if not, directions are a buffer that starts with Gaussian rows and that `set` replaces, as in DeepCluster v2.
    Source: arXiv:2006.09882, section 3.1; weight normalisation arXiv:1602.07868.
    """

    matrices = ("weight", "gain")

    weight: Tensor

    def __init__(self, dim: int, count: int, freeze_epochs: int = 0, learned_gain: bool = False, trained: bool = True):
        super().__init__()
        if count < 2:
            raise ValueError(f"prototypes: {count}, must be at least 2")
        self.freeze_epochs, self.frozen = freeze_epochs, False
        if trained:
            self.weight = nn.Parameter(F.normalize(torch.randn(count, dim), dim=1))
        else:
            self.register_buffer("weight", keyed_rows(count, dim, "prototypes"))
        self.gain = nn.Parameter(torch.ones(count, 1)) if learned_gain else None

    def is_frozen(self, clock: Clock) -> bool:
        """Whether the update that comes next must not move them."""
        return clock.epoch < self.freeze_epochs

    def before_step(self, clock: Clock) -> None:
        """Freeze or not."""
        self.frozen = self.is_frozen(clock)

    def set(self, directions: Tensor) -> None:
        """Replace the directions, (K, D), that are not trained."""
        self.weight.copy_(F.normalize(directions, dim=1))

    def forward(self, z: Tensor) -> Tensor:
        """(B, D), normalised by the caller, to (B, K); fp32 or higher, since codes and temperatures magnify rounding."""
        with torch.autocast(z.device.type, enabled=False):
            directions = F.normalize(self._now(self.weight), dim=1)
            directions = directions if self.gain is None else directions * self._now(self.gain)
            return F.linear(z.to(directions.dtype), directions)

    def _now(self, parameter: Tensor) -> Tensor:
        """While frozen with gradients of zero, which momentum and engines need to see."""
        return parameter.detach() + 0 * parameter if self.frozen else parameter


class DinoHead(nn.Module):
    """MLP with GELU to a narrow width, length 1, cosines with prototypes.

    Args:
        dim: of the embedding.  count: K prototypes.
        hidden, bottleneck: widths of the hidden layers and of what is compared.
        layers: of the MLP.
        norm: whether hidden layers have batch normalisation.
        normed_gain: whether gains stay 1, so that scores are cosines.
        freeze_epochs: of the prototypes.
    Source: arXiv:2104.14294, section 3.1 and appendix C; initial weights as in the authors' code.
    """

    def __init__(
        self,
        dim: int,
        count: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        norm: bool = False,
        normed_gain: bool = True,
        freeze_epochs: int = 1,
    ):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers: {layers}, must be at least 1")
        self.mlp = mlp(dim, *[hidden] * (layers - 1), bottleneck, norm=norm, activation="gelu")
        self.prototypes = Prototypes(bottleneck, count, freeze_epochs, learned_gain=not normed_gain)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        nn.init.kaiming_uniform_(self.prototypes.weight, a=math.sqrt(5))  # lengths set how fast directions turn

    def forward(self, h: Tensor) -> Tensor:
        """(B, D) -> (B, K), fp32 or higher."""
        z = self.mlp(h)
        return self.prototypes(F.normalize(z if z.dtype == torch.float64 else z.float(), dim=-1))
