"""Several methods as one, each for its own kind of data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmssl.methods.method import Guard, Method
from mmssl.parts import Magnitude, Teacher
from mmssl.types import Clock


class Joint(Method):
    """What is asked of a method between forward passes, asked of each; metrics of a member are called MEMBER.METRIC.

    The trunk of all students is one, and so is that of all teachers that follow it alike.
    """

    def __init__(self, members: Mapping[str, Method], magnitudes: Mapping[str, Magnitude] | None = None):
        """
        Args:
            members: built on encoders that share a trunk, which is named after the first.
            magnitudes: of the losses of members that are balanced.
        """
        super().__init__()
        self.members = nn.ModuleDict(dict(members))
        self.magnitudes: Any = nn.ModuleDict(dict(magnitudes or {}))
        self.normal = tuple(  # type: ignore[misc]
            normal for method in members.values() for normal in method.normal
        )
        teachers = [part for method in members.values() for part in method.children() if isinstance(part, Teacher)]
        for teacher in teachers[1:]:
            if (teacher.momentum, teacher.lag) == (teachers[0].momentum, teachers[0].lag):
                teacher.follow(teachers[0])

    def health(self, clock: Clock) -> dict[str, float]:
        """Of each member."""
        each = [*self._each(), *self.magnitudes.items()]
        return {f"{name}.{metric}": value for name, one in each for metric, value in one.health(clock).items()}

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
