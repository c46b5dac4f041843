"""SIGKILL to one of two ranks, at a random moment: how long the other one stays, what it says, and whether the run goes on."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from math import isclose
from pathlib import Path

from mmssl.training import checkpoint
from mmssl.training.run_folder import RunFolder
from tools.soak.engines import zero_file
from tools.soak.kills import after, half_saved, slow_disk, writing
from tools.soak.runs import STEPS, Child, Row, Whole, curve, free_port, launch, mmssl, words_of

SECONDS = 60.0  # in which a rank must have ended after the other
SETTING = "folder, no worker"


def campaign(place: Path, times: int, seed: int, engine: str = "ddp") -> Row:
    """That many runs on two ranks, half of the kills in a save. place: a folder that `runs.prepare` has filled."""
    draw, whole, wrong, stayed, saving, number = random.Random(f"{seed} {engine}"), Whole(SETTING, place), [], [], 0, 0
    profile = None if engine == "ddp" else zero_file(place, engine, "fp32")
    while len(stayed) < times and len(wrong) < 5:
        run, number = place / f"run-{number}", number + 1
        victim, in_save = draw.randrange(2), draw.random() < 0.5
        ranks = start(place, run, profile, slow_disk if in_save else (lambda: None))
        if not strike(ranks[victim], run, in_save, draw):
            for rank in ranks:
                rank.wait()
            continue  # it came to its end before
        saving, killed = saving + half_saved(run), time.monotonic()
        ranks[1 - victim].wait()
        stayed.append(time.monotonic() - killed)
        if problem := told(run, ranks[1 - victim], victim, stayed[-1]) or resumed(place, run, whole):
            wrong.append(f"rank {victim}: {problem}")
        shutil.rmtree(run)
    tried = f"one of two ranks killed {times} times, {saving} in a save"
    result = "the other ended with 7 and a sentence that names it after {:.1f} s at most, {:.1f} s in the mean; all went on"
    return Row(f"ranks: {engine}", tried, result.format(max(stayed), sum(stayed) / len(stayed)), tuple(wrong))


def start(place: Path, run: Path, profile: Path | None, before: Callable[[], None]) -> list[Child]:
    """Two ranks under nobody who would end one for the other's sake."""
    port = free_port()

    def ready(rank: int) -> None:
        launch(rank, port, profile)
        before()

    return [
        mmssl(*words_of(SETTING, place, run), log=place / f"{run.name}-{rank}.log", before=lambda rank=rank: ready(rank))
        for rank in range(2)
    ]


def strike(victim: Child, run: Path, in_save: bool, draw: random.Random) -> bool:
    """Kill a rank some time after the first update, or in a save. False if it had ended before."""
    target = draw.randint(1, STEPS - 2)
    victim.wait(lambda: max(curve(run), default=0) >= target)
    if in_save:
        victim.wait(lambda: writing(run))
    victim.wait(after(draw.uniform(0, 0.1)))
    return victim.kill()


def told(run: Path, other: Child, victim: int, seconds: float) -> str | None:
    """What is wrong with the way in which the other rank ended."""
    status = RunFolder.open(run).read_status()
    if status.get("state") == "finished":
        return None  # the last update was done
    if other.code != 7 or f"rank {victim} has gone" not in other.said() or "Traceback" in other.said():
        return f"exit {other.code}: {other.said()}"
    if (status.get("state"), status.get("code")) != ("failed", 7):
        return f"status.json says {status}"
    return f"the other stayed for {seconds:.0f} s" if seconds > SECONDS else None


def resumed(place: Path, run: Path, whole: Whole) -> str | None:
    """What is wrong once one process has gone on to the end: the curve of one process, but for the order of sums."""
    before = checkpoint.newest(run / "checkpoints")
    child = mmssl("resume", str(run), log=place / "resumed.log")
    child.wait()
    if child.code:
        return f"resume: exit {child.code}: {child.said()}"
    found = curve(run)
    apart = [step for step, loss in whole.curve.items() if not isclose(found.get(step) or 0.0, loss or 0.0, rel_tol=1e-4)]
    return f"resumed from {before}, the loss at {apart[0]} differs" if apart else None
