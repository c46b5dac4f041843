"""Several methods on the same samples."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmssl.methods.method import Guard, Method
from mmssl.methods.several import Several
from mmssl.model.encoder import Encoder
from mmssl.parts import Teacher, shared_passes
from mmssl.types import Batch, Clock, Rebuilt, StepOutput, View

FLAGS = ("masks", "drops", "crops", "slots", "chooses", "pairs")  # of which one member is enough


class Combined(Several):
    """A weighted sum of methods with one student. Terms and metrics of a member are called MEMBER.NAME.

    Each member is what it would be alone: it is given the first full-size views, as many as it takes, with masks if it hides
    tokens, and smaller views if it takes them. A view is passed once, and once for each mask, whoever asks. Members have heads,
    decoders and projectors of their own; what their teachers average alike is averaged once, and the first teacher and the
    first student give the exported encoder.

    Where micro-batches hold unequal numbers of terms, they are weighed by those of the first member that counts them.

    Args:
        encoder: of all members.
        options: member -> its options, and `weight`, the factor of its loss; 1 if unset.
    Raises: ValueError that begins with the option that is wrong, within that of its member.
    """

    kinds: ClassVar[dict[str, type[Method]]] = {}

    def __init__(self, encoder: Encoder, **options: Mapping[str, Any]):
        members: dict[str, Method] = {}
        for name, kind in self.kinds.items():
            own = {key: value for key, value in options.get(name, {}).items() if key != "weight"}
            with _told(name, kind):
                members[name] = kind(encoder, **own)
        first, *_ = members.values()
        common: dict[str, Any] = {"student": first.student}
        common |= next(({"teacher": one.teacher} for one in members.values() if hasattr(one, "teacher")), {})
        super().__init__(members, **common)
        self.weights = {name: float(options.get(name, {}).get("weight", 1.0)) for name in self.kinds}
        if not any(self.weights.values()):
            raise ValueError(f"{next(iter(self.weights))}.weight: 0, and so are all others; one at least must be above 0")
        describing = [name for name, one in members.items() if one.needs_description(Clock())]
        if len(describing) > 1:
            raise ValueError(
                f"method.name: {' and '.join(describing)} describe all samples before a pass, each in its own way; take one of "
                "them"
            )
        self.describing = describing[0] if describing else None
        for part in self.parts():  # a member may have drawn weights of the encoder anew after another copied it
            part.restart()

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """All members, which share the passes of the student, and those of the teacher if they share it."""
        losses: dict[str, Tensor] = {}
        health: dict[str, Tensor] = {}
        embedding = bound = None
        with shared_passes(self.student.encoder, *self._common()):
            for name, method in self.methods():
                found = method(self._given(batch, method), clock)
                losses |= {f"{name}.{term}": self.weights[name] * value for term, value in found.losses.items()}
                health |= {f"{name}.{metric}": value for metric, value in found.health.items()}
                if found.losses:  # what binds pairs has its loss elsewhere
                    health[f"{name}.loss"] = torch.stack([term.detach().float() for term in found.losses.values()]).sum()
                embedding = found.embedding if embedding is None else embedding
                bound = found.bound if bound is None else bound
        return StepOutput(losses, health, embedding, bound)

    def bound(self, embedding: Tensor) -> Tensor:
        """By the member that has pairs."""
        return next(method.bound(embedding) for _, method in self.methods() if method.pairs)

    def _common(self) -> list[Encoder]:
        """Teachers' encoders that are those of several members."""
        encoders = [part.encoder for part in self.parts() if isinstance(part, Teacher)]
        return [one for i, one in enumerate(encoders) if any(one is other for other in encoders[:i])]

    def _given(self, batch: Batch, method: Method) -> Batch:
        """What the method would be given if it were alone."""
        full, small = batch.views[: method.views], batch.views[self.views :]
        full = full if method.masks else [view._replace(mask=None) for view in full]
        return batch._replace(views=full + (small if method.crops else []))

    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt | None:
        """Of the first member that says it."""
        each = (method.rebuild(self._given(batch, method), clock) for _, method in self.methods())
        return next((found for found in each if found is not None), None)

    def terms(self, batch: Batch) -> Tensor | None:
        """Of the first member that counts them."""
        each = (method.terms(self._given(batch, method)) for _, method in self.methods())
        return next((found for found in each if found is not None), None)

    def judge(self, line: Mapping[str, Any], first: Mapping[str, Any] = {}) -> list[str]:
        """Of each member; options are named as in the recipe."""
        return [_placed(said, said.partition(":")[0]) for said in super().judge(line, first)]

    def guards(self) -> tuple[Guard, ...]:
        """So, too."""
        return tuple(guard._replace(advice=_placed(guard.advice, guard.metric.partition(".")[0])) for guard in super().guards())

    def attach(self, samples: int, seed: int) -> None:
        """Tell each."""
        for name, method in self.methods():
            with _told(name, type(method)):
                method.attach(samples, seed)

    def check_batch(self, samples: int) -> list[str]:
        """Of each."""
        notes = []
        for name, method in self.methods():
            with _told(name, type(method)):
                notes += [_placed(note, name, type(method)) for note in method.check_batch(samples)]
        return notes

    def on_epoch(self, clock: Clock, described: Tensor | None = None) -> None:
        """Tell each; the description is for the one that asked."""
        for name, method in self.methods():
            with _told(name, type(method)):
                method.on_epoch(clock, described if name == self.describing else None)

    def needs_description(self, clock: Clock) -> bool:
        """Whether the one that may ask asks."""
        return any(method.needs_description(clock) for _, method in self.methods())

    def describe(self, view: View) -> Tensor:
        """By the one that asks."""
        return next(method.describe(view) for name, method in self.methods() if name == self.describing)

    def order(self, clock: Clock) -> Tensor | None:
        """Of the first member that chooses."""
        each = (method.order(clock) for _, method in self.methods())
        return next((found for found in each if found is not None), None)


class Methods(dict[str, type[Method]]):
    """Methods by name. NAME+NAME is several of them on the same samples: it is found here as others are, but not listed."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self.members(name))

    def __missing__(self, name: str) -> type[Method]:
        members = self.members(name)
        if not members:
            raise KeyError(name)
        return combination(tuple(members.items()))

    def members(self, name: str) -> dict[str, type[Method]]:
        """Those of which that one is made, or itself; none if the name means nothing."""
        names = name.split("+")
        known = len({*names}) == len(names) and all(super(Methods, self).__contains__(one) for one in names)
        return {one: self[one] for one in names} if known else {}


@cache
def combination(members: tuple[tuple[str, type[Method]], ...]) -> type[Combined]:
    """The class of methods together, in that order."""
    first, kinds = members[0][1], [kind for _, kind in members]
    joint = any(kind.family == "joint embedding" for kind in kinds)
    return type(
        "And".join(kind.__name__ for kind in kinds),
        (Combined,),
        {
            "__doc__": f"{' and '.join(name for name, _ in members)} on the same samples.",
            "kinds": dict(members),
            "paper": ", ".join(dict.fromkeys(kind.paper for kind in kinds)),
            "family": "joint embedding" if joint else first.family,  # what compares samples says how large batches must be
            "modalities": tuple(one for one in first.modalities if all(one in kind.modalities for kind in kinds)),
            "coverage": tuple(dict.fromkeys(row for kind in kinds for row in kind.coverage)),
            "views": max(kind.views for kind in kinds),
            "exports": first.exports,
            **{flag: any(getattr(kind, flag) for kind in kinds) for flag in FLAGS},
        },
    )


@contextmanager
def _told(name: str, kind: type[Method]) -> Iterator[None]:
    """Within, what a member finds wrong with its options is said with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(_placed(str(error), name, kind)) from error


def _placed(text: str, name: str, kind: type[Method] | None = None) -> str:
    """A message of a member in which its options are named as in the recipe, `method.NAME.key`, or `NAME.key` in front."""
    text = re.sub(r"\bmethod\.(?=\w)", f"method.{name}.", text)
    options = inspect.signature(kind).parameters if kind is not None else ()
    return f"{name}.{text}" if re.split(r"\W", text, maxsplit=1)[0] in options else text
