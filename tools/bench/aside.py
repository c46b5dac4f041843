"""A side of a comparison in a process of its own, where neither memory nor settings of the other reach it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any


class Aside:
    """A module run as a program, asked by name for what it has to do; see `serve`.

    Args:
        module, words: what runs, and its arguments.
        environment: what it finds beside ours.
    """

    def __init__(self, module: str, *words: str, environment: Mapping[str, str] | None = None):
        command = [sys.executable, "-m", module, *words]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | dict(environment or {})
        )

    def __enter__(self) -> Aside:
        return self

    def __exit__(self, *of: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, name: str) -> Any:
        """The answer. Raises: RuntimeError if the process has ended; it has said why."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(name, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise RuntimeError(f"{' '.join(self.process.args)} ended; see above") from None  # type: ignore[arg-type]


def serve(answers: Mapping[str, Callable[[], Any]]) -> None:
    """Do what is asked for, until nobody asks any more."""
    for line in sys.stdin:
        print(json.dumps(answers[line.strip()]()), flush=True)
