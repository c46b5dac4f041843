"""Samples that could not be used: counted over all workers, named in a ledger, tolerated up to a budget."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import get_worker_info

from mmssl.errors import storage_error
from mmssl.redaction import redact
from mmssl.types import Rejected

SLOTS, NAMES, WIDTH = 65, 10, 512  # processes counted apart, names kept for each, bytes of a name
LINES = 10_000  # of a ledger, for each process
STRIKES = 2  # workers that one sample may cost


class Quarantine:
    """Counts and names of rejected samples, shared with the workers of one loader, forked or spawned.

    Each process writes a row of its own in shared memory, so that no lock is needed.
    """

    def __init__(self, path: str | Path | None, share: float, least: int):
        """Start at zero.

        Args:
            path: ledger, one JSON object per line; other processes may append to it too. None writes no ledger.
            share: of the samples seen that may be bad; `data.max_bad`.
            least: bad samples that are always tolerated; `data.min_bad`. With both 0 the first one is too many.
        """
        self.path, self.share, self.least = path, share, least
        self._counts = torch.zeros(SLOTS, 1 + len(Rejected.kinds), dtype=torch.int64).share_memory_()  # seen, then by kind
        self._names = torch.zeros(SLOTS, NAMES, WIDTH, dtype=torch.uint8).share_memory_()
        self._reading = torch.full((SLOTS,), -1, dtype=torch.int64).share_memory_()  # index of the sample, -1 for none
        self._strikes: dict[int, int] = {}  # index -> workers that died while they read it, known to those started later

    def seen(self, n: int = 1) -> None:
        """Count samples asked for, good or bad."""
        self._counts[_slot(), 0] += n

    @contextmanager
    def reading(self, index: int) -> Iterator[None]:
        """Around what may end this process: that sample is read. Raises: Rejected if it has cost two workers before."""
        if self._strikes.get(index, 0) >= STRIKES:
            raise Rejected("crash", f"{STRIKES} workers died while they read it")
        slot = _slot()
        self._reading[slot] = index
        try:
            yield
        finally:
            self._reading[slot] = -1

    def strike(self, worker: int) -> int | None:
        """Note that a worker has died. Returns: the index of the sample that it was reading, None if it read none."""
        index = int(self._reading[1 + worker % (SLOTS - 1)])
        self._reading[1 + worker % (SLOTS - 1)] = -1
        if index < 0:
            return None
        self._strikes[index] = self._strikes.get(index, 0) + 1
        return index

    def record(self, identity: str, kind: str, reason: str = "") -> None:
        """Count a bad sample and name it. Raises: StorageError if the ledger cannot be written."""
        slot, identity, reason = _slot(), redact(identity), redact(" ".join(reason.split()))[:200]
        before = int(self._counts[slot, 1:].sum())
        self._counts[slot, 1 + Rejected.kinds.index(kind)] += 1
        self._remember(slot, f"{identity} ({Rejected(kind, reason)})".encode(errors="replace")[:WIDTH])
        if self.path is not None and before <= LINES:
            line = {"identity": identity, "kind": kind, "reason": reason}
            self._append(line if before < LINES else {"more": "further rejections of this process are counted, not listed"})

    def totals(self) -> tuple[int, int]:
        """Bad and seen samples of all workers of this rank; what ranks add up."""
        counts = self._counts.sum(0)
        return int(counts[1:].sum()), int(counts[0])

    def over(self, bad: int | None = None, seen: int | None = None) -> bool:
        """Whether more is bad than the budget allows, for the totals given or for this rank's own."""
        own = self.totals()
        bad, seen = own[0] if bad is None else bad, own[1] if seen is None else seen
        return bad > max(self.least, self.share * seen)

    def summary(self) -> dict[str, Any]:
        """`seen`, `bad`, `kinds` (count of each kind found) and `first` (at most ten names with their reasons)."""
        bad, seen = self.totals()
        kinds = {kind: n for kind, n in zip(Rejected.kinds, self._counts[:, 1:].sum(0).tolist()) if n}
        first = list(dict.fromkeys(name for slot in range(SLOTS) for name in self._kept(slot)))[:NAMES]
        return {"seen": seen, "bad": bad, "kinds": kinds, "first": first}

    def message(self, bad: int | None = None, seen: int | None = None) -> str:
        """The sentence for a DataError, with the totals given or this rank's own."""
        own, found = self.totals(), self.summary()
        bad, seen = own[0] if bad is None else bad, own[1] if seen is None else seen
        kinds = ", ".join(f"{n} {kind.replace('_', ' ')}" for kind, n in found["kinds"].items())
        names = "".join(f"\n  {name}" for name in found["first"])
        return (
            f"data: {bad} of {seen} samples cannot be used ({kinds or 'none'}); tolerated are {self.least} (data.min_bad) "
            f"or a share of {self.share:g} (data.max_bad), whichever is more."
            + (f" The first are:{names}" if names else "")
            + (f"\nAll are listed in {self.path}." if self.path is not None else "")
        )

    def _kept(self, slot: int) -> list[str]:
        if not self._counts[slot, 1:].any():
            return []
        rows = (bytes(row.tolist()).rstrip(b"\0") for row in self._names[slot])
        return [row.decode(errors="ignore") for row in rows if row]

    def _remember(self, slot: int, name: bytes) -> None:
        for row in self._names[slot]:
            kept = bytes(row.tolist()).rstrip(b"\0")
            if kept == name:
                return
            if not kept:
                row[: len(name)] = torch.tensor(list(name), dtype=torch.uint8)
                return

    def _append(self, line: dict[str, str]) -> None:
        text = json.dumps(line) + "\n"
        try:  # one write in append mode is not torn by other processes
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)  # type: ignore[arg-type]
            try:
                os.write(file, text.encode())
            finally:
                os.close(file)
        except OSError as error:
            raise storage_error(error, self.path) or error from None


class Quarantines(Quarantine):
    """Those of several kinds of data, counted together; each goes on by itself."""

    def __init__(self, members: Sequence[Quarantine]):
        """Tolerates as many as they do together, or the largest of their shares."""
        super().__init__(members[0].path, max(one.share for one in members), sum(one.least for one in members))
        self.members = members

    def totals(self) -> tuple[int, int]:
        """As of one."""
        bad, seen = zip(*(one.totals() for one in self.members))
        return sum(bad), sum(seen)

    def summary(self) -> dict[str, Any]:
        """As of one."""
        each = [one.summary() for one in self.members]
        kinds = Counter[str]()
        for one in each:
            kinds.update(one["kinds"])
        first = [name for one in each for name in one["first"]][:NAMES]
        return {"seen": self.totals()[1], "bad": self.totals()[0], "kinds": dict(kinds), "first": first}


def _slot() -> int:
    """The row of this process: 0 for the main one, then one for each worker."""
    info = get_worker_info()
    return 0 if info is None else 1 + info.id % (SLOTS - 1)
