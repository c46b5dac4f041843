"""A checkpoint that is written while training goes on."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

from mmssl.training import checkpoint


class Writing(NamedTuple):
    """What is being written, and what becomes of it."""

    step: int
    outcome: Future[Path]

    @classmethod
    def begin(cls, root: Path, step: int, tensors: Mapping[str, Mapping[str, Any]], *rest: Any) -> Writing:
        """As `checkpoint.save`, by a thread that nobody waits for at the end. tensors: that nothing changes meanwhile."""
        outcome: Future[Path] = Future()

        def write() -> None:
            try:
                outcome.set_result(checkpoint.save(root, step, tensors, *rest))
            except BaseException as error:
                outcome.set_exception(error)

        Thread(target=write, name="mmssl-save", daemon=True).start()
        return cls(step, outcome)

    def problem(self, patience: float | None = None) -> BaseException | None:
        """What went wrong, when it has ended; it holds on to no tensor. Raises: TimeoutError after `patience` seconds."""
        found = cause = self.outcome.exception(patience)
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        return found


def copied(tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same, each tensor in memory of its own."""
    return {group: {name: tensor.clone() for name, tensor in own.items()} for group, own in tensors.items()}
