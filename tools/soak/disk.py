"""A disk that fails at a random moment of a save: what was saved before stays, and the run can go on."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

from mmssl.training import checkpoint
from tools.soak.runs import EVERY, STEPS, Row, Whole, mmssl, words_of

ERRORS = {"full": errno.ENOSPC, "over quota": errno.EDQUOT, "read-only": errno.EROFS}
CALLED, CALLS = ("fsync", "rename", "mkdir", "chmod"), 16  # functions of `os` that fail, and calls of them in one save, about
SETTING = "folder, no worker"


def campaign(place: Path, times: int, seed: int) -> Row:
    """That many runs, each of which meets one such save; then the disk is well again."""
    draw, whole, wrong, stopped = random.Random(f"{seed} disk"), Whole(SETTING, place), [], 0
    for number in range(times):
        run, what = place / f"run-{number}", draw.choice([*ERRORS])
        save, call = draw.randint(1, STEPS // EVERY), draw.randint(1, CALLS)
        child = mmssl(*words_of(SETTING, place, run), log=place / f"run-{number}.log", before=failing(save, call, ERRORS[what]))
        child.wait()
        stopped += child.code == 6
        if problem := lost(run, child.code or 0, child.said(), (save - 1) * EVERY) or resumed(place, run, whole):
            wrong.append(f"disk {what} at call {call} of save {save}: {problem}")
        shutil.rmtree(run)
    tried = (
        f"{times} saves on a disk that is full, over quota or read-only from a random call on; {stopped} runs stopped with 6"
    )
    return Row(
        "disk", tried, "older checkpoints intact, one sentence, curves identical to the bit after a resume", tuple(wrong)
    )


def failing(save: int, call: int, number: int) -> Callable[[], None]:
    """For a child: the disk fails from the call-th call of the save-th save to the end of that save."""

    def install() -> None:
        whole, saves, calls = checkpoint.save, count(1), count(1)

        def broken(operation: Callable[..., Any]) -> Callable[..., Any]:
            def attempt(*args: Any, **more: Any) -> Any:
                if next(calls) >= call:
                    raise OSError(number, os.strerror(number))
                return operation(*args, **more)

            return attempt

        def saving(*args: Any, **more: Any) -> Path:
            if next(saves) != save:
                return whole(*args, **more)
            with ExitStack() as stack:
                for name in CALLED:
                    stack.enter_context(mock.patch.object(os, name, broken(getattr(os, name))))
                return whole(*args, **more)

        checkpoint.save = saving

    return install


def lost(run: Path, code: int, said: str, least: int) -> str | None:
    """What is wrong after the failure; `least` is the step of the last save that was whole before."""
    newest, _ = checkpoint.find(run / "checkpoints")
    if code not in (0, 6) or "Traceback" in said:
        return f"exit {code}: {said}"
    if code == 6 and str(run) not in said:
        return f"no path is named: {said}"
    if (checkpoint.step_of(newest) if newest else 0) < least:
        return f"step {least} was saved and is lost"
    left = [path.name for path in (run / "checkpoints").glob(".tmp-*")]
    return f"leftovers {left}" if left else None


def resumed(place: Path, run: Path, whole: Whole) -> str | None:
    """What is wrong once the run has gone on to its end."""
    child = mmssl(*words_of(SETTING, place, run), log=place / "resumed.log")
    child.wait()
    return f"resume: exit {child.code}: {child.said()}" if child.code else whole.differs(run)
