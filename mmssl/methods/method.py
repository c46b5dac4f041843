"""What every method is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from mmssl.methods.normal import NORMAL, Normal
from mmssl.model.encoder import Encoder
from mmssl.model.norm import is_batch_norm
from mmssl.parts import Network, Part
from mmssl.types import Batch, Clock, Rebuilt, StepOutput, View

# Options that the recipe checks by their type.
Above0 = Annotated[float, Field(gt=0)]
AtLeast0 = Annotated[float, Field(ge=0)]
Natural = Annotated[int, Field(ge=0)]
AtLeast1 = Annotated[int, Field(ge=1)]
AtLeast2 = Annotated[int, Field(ge=2)]


class Guard(NamedTuple):
    """Below what a health metric says that a method learns nothing any more, and what mends it."""

    metric: str
    least: float
    advice: str


class Method(nn.Module):
    """A paper: names its parts in `__init__`, and maps a batch to named loss terms in `forward`.

    `student` is what a teacher copies. Options of the recipe's `method` block are the arguments of `__init__` after `encoder`.
    """

    paper: ClassVar[str]  # arXiv id
    family: ClassVar[Literal["joint embedding", "masked", "predictive"]]
    modalities: ClassVar[tuple[str, ...]]
    coverage: ClassVar[tuple[int, ...]]  # rows of docs/coverage.md
    masks: ClassVar[bool] = False  # whether views must come with masks
    drops: ClassVar[bool] = False  # whether hidden tokens are left out of the encoder, so that rows must hide equally many
    views: ClassVar[int] = 1  # full-size views of each sample
    crops: ClassVar[bool] = False  # whether smaller views may follow them
    slots: ClassVar[bool] = False  # whether there is state for each sample of the data set
    chooses: ClassVar[bool] = False  # whether `order` chooses the samples of a pass
    pairs: ClassVar[bool] = False  # whether its rows are compared with the same rows of other kinds of data
    alone: ClassVar[bool] = True  # whether it teaches anything without another method beside it
    exports: ClassVar[Literal["student", "teacher"]] = "student"  # what the paper uses downstream

    smallest: float = math.inf  # samples of a micro-batch of all ranks, once a run has said so
    normal: ClassVar[tuple[Normal, ...]] = ()  # what differs from the classes it extends, and from `NORMAL`

    student: Network

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Losses of one micro-batch."""
        raise TypeError(f"{type(self).__name__} defines no forward")

    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt | None:
        """What the method made of what it did not see of a batch; None if it does not say it in raw values or ids."""
        return None

    def methods(self) -> list[tuple[str, Method]]:
        """The methods it is made of, by name; itself without one."""
        return [("", self)]

    @classmethod
    def check_mask(cls, mask: Any) -> None:
        """Whether it can learn from such masks.

        Args:
            mask: options of the masks of the modality.
        Raises: ValueError that begins with the key.
        """

    def parts(self) -> list[Part]:
        """All parts, in the order they were named."""
        return [module for module in self.modules() if isinstance(module, Part)]

    def health(self, clock: Clock) -> dict[str, float]:
        """What the parts say of themselves; a collective."""
        return {name: value for part in self.parts() for name, value in part.health(clock).items()}

    def normals(self) -> list[Normal]:
        """What is normal of each metric: as declared in its class, those it extends, and `NORMAL`."""
        declared = [normal for kind in reversed(type(self).__mro__) for normal in vars(kind).get("normal", ())]
        return [*{normal.metric: normal for normal in (*NORMAL, *declared, *vars(self).get("normal", ()))}.values()]

    def judge(self, line: Mapping[str, Any], first: Mapping[str, Any] = {}) -> list[str]:
        """In words, what is not normal.

        Args:
            line: of metrics.jsonl, with `step` and `health/<metric>`.
            first: the first such line of the run.
        """
        step, dim = line.get("step", math.inf), self.student.encoder.dim
        each = ((f"health/{normal.metric}", normal) for normal in self.normals())
        known = ((line[m], first.get(m), normal) for m, normal in each if line.get(m) is not None)
        told = (normal.told(value, before, step, dim, self.smallest) for value, before, normal in known)
        return [said for said in told if said]

    def guards(self) -> tuple[Guard, ...]:
        """What stops a run after `watch.guard_after` updates, unless `watch.guard` names the metric itself."""
        return ()

    def before_step(self, clock: Clock) -> None:
        """Tell every part that an update begins, whether the one before was applied or not."""
        for part in self.parts():
            part.before_step(clock)

    def after_step(self, clock: Clock) -> None:
        """Update every part after an applied optimizer step; `clock.step` counts that step."""
        for part in self.parts():
            part.after_step(clock)

    def attach(self, samples: int, seed: int) -> None:
        """Told the size of the data set before training and before a checkpoint is read, for state with a slot per sample.

        Args:
            seed: of the run, for draws that belong to no sample.
        Raises: ValueError that begins with the option that does not fit.
        """

    def check_batch(self, samples: int) -> list[str]:
        """Whether a micro-batch of all ranks may hold that many samples; asked before training for each number that occurs.

        Returns: what will work, but may not work well, in words that begin with an option.
        Raises: ValueError that begins with the option that does not fit, and names what does.
        """
        if samples < 2 and any(is_batch_norm(module) for module in self.modules()):
            raise ValueError(
                "train.global_batch: a micro-batch of 1 sample, batch normalisation compares samples; take at least 2 (of all "
                "ranks, see also train.micro_batch and data.budget)"
            )
        return []

    def on_epoch(self, clock: Clock, described: Tensor | None = None) -> None:
        """Tell every part that a pass over the data begins.

        Args:
            described: (n, F) what `describe` makes of every sample of the data set, if `needs_description`.
        """
        for part in self.parts():
            part.on_epoch(clock)

    def needs_description(self, clock: Clock) -> bool:
        """Whether the pass that begins needs `describe` of the whole data set first."""
        return False

    def describe(self, view: View) -> Tensor:
        """(B, F): what a method that clusters its data set clusters."""
        return self.student.embed(view)

    def bound(self, embedding: Tensor) -> Tensor:
        """(B, F) what is compared with other kinds of data, of (B, D) pooled embeddings; where there are `pairs`."""
        raise TypeError(f"{type(self).__name__} binds nothing")

    def order(self, clock: Clock) -> Tensor | None:
        """(m,) indices of the samples of a pass, in order, for a method that chooses them; None for all, shuffled."""
        return None

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


def check_raw(encoder: Encoder, ids: bool = True) -> None:
    """Raises: ValueError if what tokens are made of cannot be a target. ids: whether it may be an id."""
    if not hasattr(encoder.features, "raw") or (encoder.features.input_name == "input_ids" and not ids):
        raise ValueError(f"data.modality: {encoder.modality} has no values of single tokens that could be a target")


def check_layers(encoder: Encoder, top_k: int) -> None:
    """Raises: ValueError if the trunk has fewer than `top_k` layers."""
    if not 0 < top_k <= len(encoder.transformer.blocks):
        raise ValueError(f"top_k: {top_k} layers to average, the trunk has {len(encoder.transformer.blocks)} (model.depth)")


def masked_share(view: View) -> Tensor:
    """() share of the tokens that are not padding which the masks of a view hide."""
    assert view.mask is not None
    hidden = view.mask.hidden
    return hidden.sum() / (hidden.numel() if view.pad is None else (~view.pad).sum() * view.copies)
