"""What a run does when it is told to stop: SIGTERM, SIGINT and SIGUSR1, which schedulers, people and clusters send."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from mmssl.errors import RankError

NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ONE_BLOW = 1.0  # seconds; a scheduler may tell a process and its launcher, which passes it on: that is one signal


class Interrupted(Exception):
    """Raised on all ranks at once, within what takes long, when one of them was told to stop."""


class Signals:
    """Calls `heard(number)` at the first signal; a second one ends the process at once, as if there were no handler.

    In a process that was forked from this one signals have their usual effect. Outside the main thread it does nothing.
    """

    def __init__(self, heard: Callable[[int], None]):
        self.heard, self.pid = heard, os.getpid()
        self.first: float | None = None  # when it came
        self.before: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if os.getpid() != self.pid or (self.first is not None and now - self.first >= ONE_BLOW):
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif self.first is None:
            self.first = now
            self.heard(number)

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in NUMBERS:
                self.before[number] = signal.signal(number, self._handle)

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # The launcher ends all ranks when one is lost: this one has yet to say which, and then ends by itself.
        lost = kind is not None and issubclass(kind, RankError)
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if lost else handler)
