"""Several methods as one, each for its own kind of data."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from mmssl.methods.method import Guard, Method
from mmssl.parts import Teacher
from mmssl.types import Clock


class Joint(Method):
    """What is asked of a method between forward passes, asked of each; metrics of a member are called MEMBER.METRIC.

    Where the trunk of all students is one, so is that of all teachers that follow it alike.
    """

    def __init__(self, members: Mapping[str, Method]):
        """members: built on encoders that may share a trunk, which is then named after the first."""
        super().__init__()
        self.members = nn.ModuleDict(dict(members))
        self.normal = tuple(  # type: ignore[misc]
            normal for method in members.values() for normal in method.normal
        )
        teachers = [part for method in members.values() for part in method.children() if isinstance(part, Teacher)]
        for teacher in teachers[1:]:
            alike = (teacher.momentum, teacher.lag) == (teachers[0].momentum, teachers[0].lag)
            if alike and _trunk(teacher) is _trunk(teachers[0]):
                teacher.follow(teachers[0])

    def health(self, clock: Clock) -> dict[str, float]:
        """Of each member."""
        return {f"{name}.{metric}": value for name, one in self._each() for metric, value in one.health(clock).items()}

    def judge(self, health: Mapping[str, float]) -> list[str]:
        """Of each member, by its name."""
        found = []
        for name, method in self._each():
            own = {
                f"health/{m.removeprefix(f'health/{name}.')}": v for m, v in health.items() if m.startswith(f"health/{name}.")
            }
            found += [f"{name}: {said}" for said in method.judge(own)]
        return found

    def guards(self) -> tuple[Guard, ...]:
        """Of each member."""
        return tuple(guard._replace(metric=f"{name}.{guard.metric}") for name, one in self._each() for guard in one.guards())

    def _each(self) -> list[tuple[str, Method]]:
        return [(name, method) for name, method in self.members.items() if isinstance(method, Method)]


def _trunk(teacher: Teacher) -> nn.Module:
    """The blocks that a teacher averages; all of an encoder that has no shared transformer."""
    encoder = teacher.student.encoder
    return encoder.transformer.blocks if hasattr(encoder, "transformer") else encoder
