"""HuBERT."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from mmssl import losses
from mmssl.distributed import all_sum
from mmssl.methods.method import Above0, AtLeast0, AtLeast1, AtLeast2, Method, Normal, masked_share
from mmssl.model.encoder import Encoder
from mmssl.model.listening import Listening
from mmssl.model.positions import take_at
from mmssl.model.token_decoder import hidden_places
from mmssl.parts import Network, Part, Teacher
from mmssl.parts.kmeans import draw_rows, kmeans
from mmssl.random import generator
from mmssl.schedules import constant
from mmssl.types import Batch, Clock, StepOutput, View

BLOCK = 1 << 24  # similarities held at once


class HuBERT(Method):
    """Hsu et al. 2021, arXiv:2106.07447: say the units of hidden frames, which are clusters found beforehand.

    All in one run: before the first pass, MFCCs of all samples are clustered; before each pass in `again`, what a layer of the
    student makes of them. From then on a copy of the student as it was then says the units.

    Departs from the paper: the student is not begun anew with new units, but their vectors are; frames are drawn from all
    samples, not from a tenth of them, for plain k-means; MFCCs are those of the crop, so that every frame has its own.

    Args:
        units: clusters of MFCCs.  units_again: clusters of features of a layer, those of each pass in `again`.
        again: passes before which there are new units, counted from 0.
        layer: of the trunk, from 1, whose features become units.
        frames: to fit clusters to, at least one of each sample.  iterations: of k-means.
        dim: of predictions and of the vectors of units.
        penalty: weight of the mean square of the convolutions' output.
        dropout: of the projected frames.  feature_grad_scale: factor of the gradient that the convolutions get.
    """

    paper, family, modalities, coverage = "arXiv:2106.07447", "masked", ("speech",), ()
    masks = True
    normal = (Normal("unit_use", 0.05, "few units stand for most frames; try method.units of a quarter"),)

    def __init__(
        self,
        encoder: Encoder,
        units: AtLeast2 = 100,
        units_again: AtLeast2 = 500,
        again: tuple[AtLeast1, ...] = (),
        layer: AtLeast1 = 6,
        frames: AtLeast1 = 200_000,
        iterations: AtLeast1 = 50,
        dim: AtLeast1 = 256,
        temperature: Above0 = 0.1,
        penalty: AtLeast0 = 10.0,
        dropout: AtLeast0 = 0.1,
        feature_grad_scale: Above0 = 0.1,
    ):
        super().__init__()
        if list(again) != sorted({*again}):
            raise ValueError(f"again: {list(again)}, must be passes in ascending order, each once")
        self.listening = Listening(encoder, dropout, feature_grad_scale, "hubert")
        depth = len(encoder.transformer.blocks)
        if again and layer > depth:
            raise ValueError(f"layer: {layer}, the trunk has {depth} (model.depth)")
        self.student = Network(encoder=encoder)
        self.snapshot = Snapshot(self.student, layer) if again else None
        width, more = encoder.features.units_width, len(again)
        self.units: Any = nn.ModuleList([Units(units, width), *(Units(units_again, encoder.dim) for _ in range(more))])
        self.predict = nn.Linear(encoder.dim, dim)
        self.vectors = UnitVectors([one.count for one in self.units], dim, temperature)
        self.again, self.layer, self.penalty = again, layer, penalty
        self.frames, self.iterations, self.each, self.seed = frames, iterations, 1, 0
        self.fitted: Tensor
        self.register_buffer("fitted", torch.zeros((), dtype=torch.int64))  # stages whose units are there

    def attach(self, samples: int, seed: int) -> None:
        """How many frames of each sample to cluster."""
        most, length = max(one.count for one in self.units), self.student.encoder.features.length
        if samples * length < most:
            name = "units" if most == self.units[0].count else "units_again"
            raise ValueError(f"{name}: {most}, the data hold at most {samples * length} frames; use fewer units")
        self.each, self.seed = min(length, math.ceil(max(self.frames, most) / samples)), seed

    def stage(self, clock: Clock) -> int:
        """How often there were new units after the first ones."""
        return sum(clock.epoch >= epoch for epoch in self.again)

    def needs_description(self, clock: Clock) -> bool:
        """Before a pass with new units."""
        return clock.epoch in (0, *self.again)

    def describe(self, view: View) -> Tensor:
        """(B, 1 + m*F): how many frames there are, and m of them, of which only so many differ.

        A checksum of the sample says where they begin, so that they come from everywhere, and are the same on any number of
        ranks.
        """
        frames = self._frames(self.student.encoder, view, int(self.fitted))  # (B, L, F)
        all_frames = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
        count = (all_frames if view.pad is None else ~view.pad).sum(1, keepdim=True)
        start = view.x[:, :400].float().contiguous().view(torch.int32).long().sum(1, keepdim=True)  # exact in any order
        step = torch.arange(self.each, device=frames.device)
        step = torch.where(count < self.each, step, step * count // self.each)
        found = take_at(frames, (start + step) % count.clamp(min=1))
        return torch.cat([count.to(found.dtype), found.flatten(1)], 1)

    @torch.no_grad()
    def on_epoch(self, clock: Clock, described: Tensor | None = None) -> None:
        """New units, and the student that will say them."""
        super().on_epoch(clock, described)
        if described is None:
            return
        stage = self.stage(clock)
        count, rows = described[:, 0].long(), described[:, 1:].unflatten(1, (self.each, -1))
        units, draw = self.units[stage], generator(self.seed, "units", stage)
        if int(count.sum()) < units.count:
            name = "units_again" if stage else "units"
            raise ValueError(f"method.{name}: {units.count}, the data hold {int(count.sum())} frames; use fewer units")
        rows = rows[torch.arange(self.each, device=rows.device) < count[:, None]].to(units.centroids.dtype)
        most = max(self.frames, units.count)
        units.fit(draw_rows(rows, most, draw) if len(rows) > most else rows, draw, self.iterations)
        if stage and self.snapshot is not None:
            self.snapshot.take(clock)
        self.fitted.fill_(stage + 1)

    @torch.no_grad()
    def _frames(self, encoder: Encoder, view: View, stage: int) -> Tensor:
        """(B, L, F) what units are clusters of."""
        if not stage:
            return encoder.features.units_input(view.x)
        return encoder.contextualize(encoder.local(view.x), collect="block", pad=view.pad).layers[self.layer - 1]

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Units of hidden frames from all frames, hidden ones replaced."""
        (view,), encoder, stage = batch.views, self.student.encoder, self.stage(clock)
        if view.mask is None:
            raise ValueError("views.mask: hubert needs masks")
        teacher = self.snapshot.encoder if stage and self.snapshot is not None else encoder
        codes = self.units[stage](self._frames(teacher, view, stage))  # (B, L)
        heard = self.listening(encoder, view)
        pad = None if view.pad is None else view.pad.repeat_interleave(view.copies, 0)
        seen = encoder.contextualize(heard.tokens, pad=pad)  # tokens (M*B, L, D)
        places = hidden_places(view.mask)  # (M*B, n)
        wanted, hidden = take_at(codes, places), view.mask.hidden.gather(1, places)
        logits = self.vectors(self.predict(take_at(seen.tokens, places)), stage)  # (M*B, n, K)
        terms = {
            "units": losses.masked_cross_entropy(logits, wanted, hidden),
            "penalty": self.penalty * losses.feature_penalty(heard.raw, view.pad),
        }
        right = (logits.detach().argmax(-1) == wanted) & hidden
        health = {
            "accuracy": right.sum() / hidden.sum().clamp(min=1),
            "unit_use": self.units[stage].use(codes),
            "encoder_std": losses.token_std(seen.tokens, pad=pad),
            "masked_share": masked_share(view),
        }
        pooled = encoder.pool(seen).detach().unflatten(0, (len(batch.index), -1)).mean(1)  # (B, D)
        return StepOutput(terms, health, pooled)


class Units(Part):
    """(B, L, F) frames to the numbers of the nearest of K centroids, (B, L)."""

    centroids: Tensor

    def __init__(self, count: int, width: int):
        super().__init__()
        self.count = count
        self.register_buffer("centroids", torch.zeros(count, width))

    def fit(self, rows: Tensor, draw: torch.Generator, iterations: int) -> None:
        """rows: (N, F), the same on all ranks.  draw: on the CPU."""
        self.centroids.copy_(kmeans(rows, draw_rows(rows, self.count, draw), draw, iterations).centroids)

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """int64, without gradient."""
        with torch.autocast(frames.device.type, enabled=False):
            rows, offset = frames.flatten(0, 1).to(self.centroids.dtype), -self.centroids.square().sum(1) / 2
            blocks = rows.split(max(1, BLOCK // self.count))
            found = torch.cat([torch.addmm(offset, block, self.centroids.T).argmax(1) for block in blocks])
        return found.view(frames.shape[:2])

    @torch.no_grad()
    def use(self, found: Tensor) -> Tensor:
        """() how many units are in use, exp of the entropy over the frames of all ranks, as a share of all units."""
        counts = torch.zeros(self.count, device=found.device, dtype=torch.float64)
        counts = all_sum(counts.scatter_add_(0, found.flatten(), torch.ones_like(found.flatten(), dtype=torch.float64)))
        return (torch.special.entr(counts / counts.sum().clamp(min=1)).sum().exp() / self.count).float()


class UnitVectors(nn.Module):
    """A learned vector for each unit of each stage; predictions to cosines with those of one, over the temperature."""

    def __init__(self, counts: list[int], dim: int, temperature: float):
        super().__init__()
        self.counts, self.temperature = counts, temperature
        self.weight = nn.Parameter(torch.empty(sum(counts), dim).uniform_())

    def forward(self, x: Tensor, stage: int) -> Tensor:
        """(..., dim) -> (..., K). Vectors of other stages get gradients of zero, so that DDP and ZeRO never wait."""
        return losses.code_scores(x, self.weight.split(self.counts)[stage], self.temperature)


class Snapshot(Teacher):
    """The student as it was when it was taken, up to a layer; it stands still in between."""

    def __init__(self, student: Network, layer: int):
        super().__init__(student, constant(0.0))
        del self.network.encoder.transformer.blocks[layer:]

    @property
    def pace(self) -> None:
        """None: no other stands still at the same updates."""

    def take(self, clock: Clock) -> None:
        """Equal to the student from now on."""
        super().after_step(clock)

    def after_step(self, clock: Clock) -> None:
        """Nothing."""

    def health(self, clock: Clock) -> dict[str, float]:
        """Nothing changes."""
        return {}
