"""A thread that ends the job, with a sentence that names the rank, when one of the ranks hangs or is gone."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from mmssl.errors import RankError
from mmssl.stage import Stage
from mmssl.training.peers import Cause, Peers
from mmssl.training.run_folder import RunFolder

TICK = 1.0  # seconds between looks at what is near, and between words of where this rank stands
PATIENCE = 6  # times as long may last what is long by nature
LONG = ("preparation", "save", "probe", "describe")
LEAVE = 10.0  # seconds for the main thread to leave by itself, where the broken connection has told it


def limit(timeout: float, at: Stage) -> float:
    """Seconds that a rank may stay in a place."""
    return timeout * (PATIENCE if at.name.startswith("first ") or at.name in LONG else 1)


class Judge:
    """Tells which ranks hang: those furthest behind, once they have stood still for too long.

    The others wait for them in some collective, so that how long those have stood still says nothing.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.least: tuple[int, list[int]] = (-1, [])  # places passed by the ranks furthest behind, and which those are
        self.since = 0.0
        self.beats: dict[int, tuple[int, float]] = {}  # how often each rank has said where it stands, and when it last did

    def hanging(self, stages: dict[int, tuple[int, Stage]], now: float) -> list[int]:
        """Ranks that hang, [] if none does.

        Args:
            stages: of `Peers.stages`.  now: seconds, of any clock.
        """
        for rank, (beats, _) in stages.items():
            if self.beats.get(rank, (-1, 0.0))[0] != beats:
                self.beats[rank] = (beats, now)
        least = min(at.passed for _, at in stages.values())
        behind = {rank: at for rank, (_, at) in sorted(stages.items()) if at.passed == least}
        if (least, [*behind]) != self.least:
            self.least, self.since = (least, [*behind]), now
        silent = self.silent([*behind], now)  # what they do is known from long ago
        allowed = max(self.timeout if rank in silent else limit(self.timeout, at) for rank, at in behind.items())
        return [*behind] if now - self.since > allowed else []

    def silent(self, ranks: list[int], now: float) -> list[int]:
        """Those that have not said for long where they stand: their processes are stopped, or their hosts lost."""
        return [rank for rank in ranks if now - self.beats[rank][1] > self.timeout / 2]


class Watchdog:
    """Watches from its start to its end.

    Args:
        peers: who is there.
        folder: where stacks are left.
        timeout: seconds without progress; `train.hang_timeout`.
        record: leaves the cause in status.json.
    """

    def __init__(self, peers: Peers, folder: RunFolder, timeout: float, record: Callable[[RankError], None]):
        self.peers, self.folder, self.timeout, self.record = peers, folder, timeout, record
        self.judge, self.period = Judge(timeout), min(15.0, timeout / 20)  # between looks at the others
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def _watch(self) -> None:
        awake, last, due = 0.0, time.monotonic(), 0.0
        while not self.over.wait(min(TICK, self.period)):
            now = time.monotonic()
            awake, last = awake + min(now - last, 2 * TICK), now  # a job that was stopped and goes on has not hung meanwhile
            cause = self.peers.found()
            if cause is None and awake >= due:
                due = awake + self.period
                cause = self._hanging(awake)
            self.peers.beat()
            if cause is not None:
                return self._end(cause)

    def _hanging(self, now: float) -> Cause | None:
        behind = self.judge.hanging(self.peers.stages(), now)
        if not behind:
            return None
        silent = self.judge.silent(behind, now)
        cause = self.peers.claim(RankError.code, str(self.peers.stand_still(behind, now - self.judge.since, silent)))
        self._dump()
        for rank in silent:
            self.peers.kill(rank)
        return cause

    def _end(self, cause: Cause) -> None:
        """The main thread leaves by itself where its connection breaks, and knows more; where it hangs it cannot."""
        if self.over.wait(LEAVE):
            return
        self._dump()
        with suppress(Exception):  # nothing may keep the process
            self.record(cause.error())
        print(f"mmssl: {cause.text}", file=sys.stderr, flush=True)
        os._exit(cause.code)

    def _dump(self) -> None:
        with suppress(OSError), (self.folder.path / f"stacks-{self.peers.rank}.txt").open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
