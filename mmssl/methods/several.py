"""Several methods as one."""

from __future__ import annotations

from collections.abc import Mapping

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
        self.normal = tuple(  # type: ignore[misc]
            normal for method in members.values() for normal in method.normal
        )
        share_averages([part for part in self.parts() if isinstance(part, Teacher)])

    def methods(self) -> list[tuple[str, Method]]:
        """In the order they were named."""
        return [(name, method) for name, method in self.members.items() if isinstance(method, Method)]

    def health(self, clock: Clock) -> dict[str, float]:
        """Of each member."""
        return {f"{name}.{metric}": value for name, one in self.methods() for metric, value in one.health(clock).items()}

    def judge(self, health: Mapping[str, float]) -> list[str]:
        """Of each member, by its name."""
        found = []
        for name, method in self.methods():
            own = {
                f"health/{m.removeprefix(f'health/{name}.')}": v for m, v in health.items() if m.startswith(f"health/{name}.")
            }
            found += [f"{name}: {said}" for said in method.judge(own)]
        return found

    def guards(self) -> tuple[Guard, ...]:
        """Of each member."""
        return tuple(guard._replace(metric=f"{name}.{guard.metric}") for name, one in self.methods() for guard in one.guards())
