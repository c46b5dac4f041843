"""What this process is doing and how far it has come, for whoever must say where a run stands still.

All ranks go through the same stages and collectives in the same order, so the one that has passed the fewest is the one that
the others wait for.
"""

from __future__ import annotations

from typing import NamedTuple


class Stage(NamedTuple):
    """A place in a run."""

    name: str = "preparation"  # then data, forward, backward, update, probe, describe, save
    step: int = 0  # updates made
    passed: int = 0  # stages and collectives that lie behind


_now = Stage()


def now() -> Stage:
    """Where this process is; safe to ask from any thread."""
    return _now


def enter(name: str, step: int) -> None:
    """Begin a stage."""
    global _now
    _now = Stage(name, step, _now.passed + 1)


def proceed() -> None:
    """Come further within a stage, in the same way on all ranks."""
    global _now
    _now = _now._replace(passed=_now.passed + 1)
