"""Binding of several kinds of data by their pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmssl import losses
from mmssl.distributed import all_sum, gather_rows
from mmssl.methods.families import JointEmbedding
from mmssl.methods.method import AtLeast1, Natural
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.parts import Network, Part
from mmssl.types import Batch, Clock, StepOutput

WARMEST = math.log(100)  # of the logarithm of the scale, as CLIP has it
TEMPERATURES = {"infonce": 0.07, "sigmoid": 0.1}  # of CLIP and of SigLIP


class Bind(JointEmbedding):
    """Radford et al. 2021, arXiv:2103.00020: an encoder and a projection, one side of pairs.

    What both sides have to do with each other is in `Binding`, where all kinds of data of a run are at hand; by itself this
    has no loss. A frozen encoder (`model.freeze`) stays in eval mode, as the locked tower of arXiv:2111.07991.
    """

    paper, coverage = "arXiv:2103.00020", ()
    modalities = ("vision", "speech", "spectrogram", "text")
    views = 1
    pairs = True

    def __init__(self, encoder: Encoder, dim: AtLeast1 = 512, hidden: Natural = 0):
        """dim: of what is compared.  hidden: width of a hidden layer of the projection; 0 leaves it linear."""
        super().__init__()
        widths = (encoder.dim, *[hidden] * bool(hidden), dim)
        projector = mlp(*widths, norm=False, last_bias=False, activation="gelu", std=encoder.dim**-0.5)
        self.student = Network(encoder=encoder, projector=projector)

    def train(self, mode: bool = True) -> Bind:
        """As always, but for an encoder that is not trained."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.student.encoder.parameters()):
            self.student.encoder.eval()
        return self

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """The projection of the view; its loss needs other kinds of data."""
        h = self.student.embed(batch.views[0])
        z = self.bound(h)
        return self.output({}, h, z)._replace(bound=z)

    def bound(self, embedding: Tensor) -> Tensor:
        """(B, dim)."""
        return self.student.project(embedding)


class Binding(Part):
    """Contrast between each two of the kinds of data whose rows belong together, with one learned scale.

    Args:
        loss: `infonce`, arXiv:2103.00020, or `sigmoid`, arXiv:2303.15343.
        temperature: at the start; that of the paper if None. What cosines are divided by never falls below 0.01 with infonce.
        bias: of sigmoid, at the start; it is learned.
        weight: what the loss is multiplied by, above 0.
        same: what rows are to each other that have the same content on one side: not compared, positives, or negatives.
    Raises: ValueError that begins with the option that is wrong.
    """

    decays = False

    def __init__(
        self,
        loss: Literal["infonce", "sigmoid"] = "infonce",
        temperature: float | None = None,
        bias: float = -10.0,
        weight: float = 1.0,
        same: Literal["leave_out", "positive", "negative"] = "leave_out",
    ):
        super().__init__()
        start = -math.log(temperature or TEMPERATURES[loss])
        if loss == "infonce" and start > WARMEST + 1e-6:
            raise ValueError(f"temperature: {temperature}, infonce keeps it at 0.01 or above")
        self.loss, self.weight, self.same = loss, weight, same
        self.scale = nn.Parameter(torch.full((1,), start))  # its logarithm; no 0-dimensional one, which DeepSpeed cannot take
        self.bias = nn.Parameter(torch.full((1,), bias)) if loss == "sigmoid" else None

    def forward(self, z: Mapping[str, Tensor], index: Mapping[str, Tensor], content: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compare.

        Args:
            z: (B, D) projections of each kind of data, at least two.
            index: (B,) the rows of the table that they are made of. Where two differ, since one that could not be read was
                replaced, there is no pair.
            content: (B,) int64, equal for equal content.
        Returns: `loss/NAME-NAME`, times the weight; `health/scale`, `health/bias` and `health/pairs`, the share of the rows
            that are pairs.
        """
        scale = (_Capped.apply(self.scale) if self.loss == "infonce" else self.scale).exp()
        out, shares = {}, []
        for one, other in combinations(z, 2):
            pairs = index[one] == index[other]
            alike = None if self.same == "negative" else _alike(content[one]) | _alike(content[other])
            how: Any = {"pairs": pairs, "alike": alike, "positive": self.same == "positive"}
            if self.bias is None:
                loss = losses.clip(z[one], z[other], scale, **how)
            else:
                loss = losses.siglip(z[one], z[other], scale, self.bias, **how)
            out[f"loss/{one}-{other}"] = self.weight * loss
            shares.append(pairs.float().mean())
        out = {name: loss / len(out) for name, loss in out.items()}
        out |= {"health/scale": scale.detach().squeeze(), "health/pairs": torch.stack(shares).mean()}
        return out if self.bias is None else out | {"health/bias": self.bias.detach().squeeze()}


def _alike(content: Tensor) -> Tensor:
    """(B, N) bool: own rows and those of all ranks with the same content."""
    return content[:, None] == gather_rows(content)


class _Capped(torch.autograd.Function):
    """A logarithm of at most `WARMEST`. Above it only a gradient of all ranks that lowers it comes through.

    CLIP writes the parameter back after each update, which engines with masters undo; without any gradient it would never
    come back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(max=WARMEST)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return upstream * ((x < WARMEST) | (all_sum(upstream) > 0))
