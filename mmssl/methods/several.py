"""Several methods as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmssl.methods.method import Guard, Method
from mmssl.parts import Teacher, share_averages
from mmssl.types import Clock


class Several(Method):
    """What is asked of a method between forward passes, asked of each; metrics of a member are called MEMBER.METRIC.

    What their teachers average alike is averaged once.
    """

    def __init__(self, members: Mapping[str, Method], **shared: nn.Module):
        """shared: what members have in common, by the names that it is to have; those in members are other names for it."""
        super().__init__()
        for name, module in shared.items():
            self.add_module(name, module)
        self.members = nn.ModuleDict(dict(members))
        share_averages([part for part in self.parts() if isinstance(part, Teacher)])

    def methods(self) -> list[tuple[str, Method]]:
        """In the order they were named."""
        return [(name, method) for name, method in self.members.items() if isinstance(method, Method)]

    def health(self, clock: Clock) -> dict[str, float]:
        """Of each member."""
        return {f"{name}.{metric}": value for name, one in self.methods() for metric, value in one.health(clock).items()}

    def judge(self, line: Mapping[str, Any], first: Mapping[str, Any] = {}) -> list[str]:
        """Of each member, by its name."""
        each = ((name, method.judge(own(line, name), own(first, name))) for name, method in self.methods())
        return [f"{name}: {said}" for name, told in each for said in told]

    def guards(self) -> tuple[Guard, ...]:
        """Of each member."""
        return tuple(guard._replace(metric=f"{name}.{guard.metric}") for name, one in self.methods() for guard in one.guards())


def own(line: Mapping[str, Any], member: str) -> dict[str, Any]:
    """The part of a line of metrics.jsonl that is about a member, as if it were alone."""
    start = f"health/{member}."
    found = {f"health/{name[len(start) :]}": value for name, value in line.items() if name.startswith(start)}
    return found | {name: line[name] for name in ("step",) if name in line}
