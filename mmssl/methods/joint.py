"""Several methods as one, each for its own kind of data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mmssl.methods.method import Method
from mmssl.methods.several import Several
from mmssl.parts import Magnitude
from mmssl.types import Clock


class Joint(Several):
    """Members are built on encoders that share a trunk, which is named after the first.

    Args:
        members: of each kind of data.
        magnitudes: of the losses of members that are balanced.
    """

    def __init__(self, members: Mapping[str, Method], magnitudes: Mapping[str, Magnitude] | None = None):
        super().__init__(members)
        self.magnitudes: Any = nn.ModuleDict(dict(magnitudes or {}))

    def health(self, clock: Clock) -> dict[str, float]:
        """Of each member, and what its loss is divided by."""
        found = {f"{name}.{metric}": v for name, one in self.magnitudes.items() for metric, v in one.health(clock).items()}
        return super().health(clock) | found
