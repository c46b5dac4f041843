"""What every method is."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mmssl.model.encoder import Encoder
from mmssl.parts import Network, Part
from mmssl.types import Batch, Clock, StepOutput, View


class Method(nn.Module):
    """A paper: names its parts in `__init__`, and maps a batch to named loss terms in `forward`.

    `student` is what a teacher copies. Options of the recipe's `method` block are the arguments of `__init__` after `encoder`.
    """

    paper: ClassVar[str]  # arXiv id
    family: ClassVar[Literal["joint embedding", "masked", "predictive"]]
    modalities: ClassVar[tuple[str, ...]]
    coverage: ClassVar[tuple[int, ...]]  # rows of docs/coverage.md
    masks: ClassVar[bool] = False  # whether views must come with masks
    views: ClassVar[int] = 1  # full-size views of each sample
    crops: ClassVar[bool] = False  # whether smaller views may follow them
    exports: ClassVar[Literal["student", "teacher"]] = "student"  # what the paper uses downstream

    student: Network

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Losses of one micro-batch."""
        raise TypeError(f"{type(self).__name__} defines no forward")

    def parts(self) -> list[Part]:
        """All parts, in the order they were named."""
        return [module for module in self.modules() if isinstance(module, Part)]

    def after_step(self, clock: Clock) -> None:
        """Update every part after an applied optimizer step; `clock.step` counts that step."""
        for part in self.parts():
            part.after_step(clock)

    def on_epoch(self, clock: Clock) -> None:
        """Tell every part that a pass over the data begins."""
        for part in self.parts():
            part.on_epoch(clock)

    def terms(self, batch: Batch) -> Tensor | None:
        """() how many terms the losses of a micro-batch are means over, for an exact mean over an update whose micro-batches
        differ; None if all count the same.
        """
        masks = [view.mask for view in batch.views if view.mask is not None]
        return sum((mask.hidden.sum() for mask in masks), torch.zeros((), dtype=torch.int64)) if masks else None


def check_error(scale: float | None, beta: float) -> None:
    """Raises: ValueError if that is no factor or width of a regression error."""
    if beta < 0 or (scale is not None and scale <= 0):
        raise ValueError(f"beta: {beta} must be at least 0 and loss_scale: {scale} above 0")


def check_layers(encoder: Encoder, top_k: int) -> None:
    """Raises: ValueError if the trunk has fewer than `top_k` layers."""
    if not 0 < top_k <= len(encoder.transformer.blocks):
        raise ValueError(f"top_k: {top_k} layers to average, the trunk has {len(encoder.transformer.blocks)} (model.depth)")


def masked_share(view: View) -> Tensor:
    """() share of the tokens that are not padding which the masks of a view hide."""
    assert view.mask is not None
    hidden = view.mask.hidden
    return hidden.sum() / (hidden.numel() if view.pad is None else (~view.pad).sum() * view.copies)
