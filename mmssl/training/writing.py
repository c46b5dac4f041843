"""A checkpoint that is written while training goes on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from mmssl.training import checkpoint


class Writing(NamedTuple):
    """What is being written, and what becomes of it."""

    step: int
    outcome: Future[Path]

    @classmethod
    def begin(cls, root: Path, step: int, tensors: dict[str, dict[str, Any]], *rest: Any) -> Writing:
        """As `checkpoint.save`, of a copy of the tensors, by a thread that ends with its work."""
        copies = {group: {name: tensor.clone() for name, tensor in own.items()} for group, own in tensors.items()}
        thread = ThreadPoolExecutor(1, "mmssl-save")
        outcome = thread.submit(checkpoint.save, root, step, copies, *rest)
        thread.shutdown(wait=False)
        return cls(step, outcome)
