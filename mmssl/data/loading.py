"""Batches from worker processes that may die: killed, crashed in a decoder, or ended by the system for want of memory."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import DataLoader

from mmssl.data.quarantine import Quarantine
from mmssl.distributed import rank
from mmssl.errors import DataError

RESTARTS = 10  # of one process, after which a run does not go on
NOTICED = 5.0  # seconds after a broken pipe until the worker must be known to be dead


class Fallen(NamedTuple):
    """A worker that died."""

    worker: int  # of its loader
    pid: int
    status: int  # negative: the signal

    def __str__(self) -> str:
        how = f"exited with {self.status}"
        if self.status < 0:
            how = f"was killed by {signal.Signals(-self.status).name}"
        if self.status == -signal.SIGKILL:
            how += ", which the system sends when memory runs out"
        return f"data worker {self.worker} of rank {rank()} (process {self.pid}) {how}"


class Restarting:
    """The batches of a loader. When a worker dies, a new loader goes on with the batch that is due.

    What a batch holds depends on its place alone, so that nothing changes.

    Args:
        make: number of batches to leave out -> loader of the others.
        quarantine: knows what each worker reads. A sample that has cost two workers is bad and gets a substitute.
        identity: index of a sample -> its name.
    """

    left = RESTARTS  # of this process

    def __init__(
        self,
        make: Callable[[int], DataLoader],
        quarantine: Quarantine | None = None,
        identity: Callable[[int], str] = str,
    ):
        self.make, self.quarantine, self.identity = make, quarantine, identity

    def __len__(self) -> int:
        """Batches of the loader that leaves none out."""
        return len(self.make(0))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises: DataError if workers keep dying."""
        done = 0
        while True:
            batches = _begin(self.make(done))
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError):
                    fallen = _fallen(batches)
                    if not fallen:
                        raise
                    self._mourn(fallen)
                    break
                done += 1
                yield batch

    def _mourn(self, fallen: list[Fallen]) -> None:
        read = [self.quarantine.strike(each.worker) for each in fallen] if self.quarantine else []
        files = ", ".join(self.identity(index) for index in read if index is not None)
        text = "; ".join(map(str, fallen)) + (f", while it read {files}" if files else "")
        mend = "Set data.workers=0, or to fewer, and look at what it read."
        if not Restarting.left:
            raise DataError(f"{text}. Workers were started again {RESTARTS} times before. {mend}")
        Restarting.left -= 1
        told = f"{text}. They are started again ({RESTARTS - Restarting.left} of {RESTARTS}); the samples stay the same."
        logging.getLogger("mmssl").warning("%s", told)
        print(f"mmssl: note: {told} If it happens again: {mend}", file=sys.stderr)


def _begin(loader: DataLoader) -> Any:
    """The loader's iterator.

    torch's handler of dead children, which raises an error wherever the program happens to be, in the middle of a save for
    one, is taken away: the iterator notices them itself.
    """
    batches = iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "").startswith("torch."):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches


def _fallen(batches: Any) -> list[Fallen]:
    """Workers that died, if that is why the iterator failed."""
    workers = getattr(batches, "_workers", [])
    deadline = time.monotonic() + NOTICED
    while workers and time.monotonic() < deadline:
        dead = [(i, w) for i, w in enumerate(workers) if not w.is_alive() and w.exitcode]
        if dead:
            return [Fallen(i, w.pid, w.exitcode) for i, w in dead]
        time.sleep(0.05)
    return []
