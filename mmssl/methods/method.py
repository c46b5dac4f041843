"""What every method is."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from mmssl.model.encoder import Encoder
from mmssl.parts import Network, Part, Teacher
from mmssl.types import Batch, Clock, StepOutput


class Method(nn.Module):
    """A paper: names its parts in `__init__`, and maps a batch to named loss terms in `forward`.

    `student` is what a teacher copies. Options of the recipe's `method` block are the arguments of `__init__` after `encoder`.
    """

    paper: ClassVar[str]  # arXiv id
    family: ClassVar[Literal["joint embedding", "masked", "predictive"]]
    modalities: ClassVar[tuple[str, ...]]
    coverage: ClassVar[tuple[int, ...]]  # rows of docs/coverage.md
    masks: ClassVar[bool] = False  # whether views must come with masks
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

    def recommended(self, which: Literal["student", "teacher"] | None = None) -> Encoder:
        """The encoder to export. Raises: ValueError if a teacher is asked for and there is none."""
        if (which or self.exports) == "student":
            return self.student.encoder
        teacher = getattr(self, "teacher", None)
        if not isinstance(teacher, Teacher):
            raise ValueError(f"which: {type(self).__name__} has no teacher, use which=student")
        return teacher.encoder
