"""SIGKILL at random moments: every run goes on, and ends with the curve and the weights of one that was left alone."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import NamedTuple

from mmssl.training import checkpoint
from tools.soak.runs import STEPS, Child, Row, Whole, curve, mmssl, words_of

CHAIN = 5  # kills of one run at most
SAVING = 0.4  # share of kills that are to fall into a save
LATE = 0.15  # of the others, when the last checkpoint is there
FSYNC = 0.02  # seconds that a slow disk takes more


class Tally(NamedTuple):
    """What was done to the runs of a setting."""

    kills: int = 0
    saving: int = 0  # kills that left half a checkpoint behind
    early: int = 0  # kills before the first checkpoint
    late: int = 0  # kills after the last one
    runs: int = 0  # that went on to the end
    wrong: tuple[str, ...] = ()  # what was lost, "" if nothing


def campaign(place: Path, kills: int, seed: int, settings: list[str]) -> dict[str, Tally]:
    """Spread kills evenly over settings; `place` is an empty folder that `runs.prepare` has filled."""
    found = {}
    for number, setting in enumerate(settings):
        share = kills * (number + 1) // len(settings) - kills * number // len(settings)
        folder = place / f"setting-{number}"
        folder.mkdir()
        for name in ("recipe.yaml", "images", "parquet"):
            (folder / name).symlink_to(place / name)
        found[setting] = attack(setting, folder, share, random.Random(f"{seed} {setting}"))
        shutil.rmtree(folder)
    return found


def attack(setting: str, place: Path, kills: int, draw: random.Random) -> Tally:
    """That many kills of runs of one setting, several of one run after the other."""
    whole, tally = Whole(setting, place), Tally()
    while tally.kills < kills and len(tally.wrong) < 5:
        run = place / f"run-{tally.runs}"
        for _ in range(draw.randint(1, CHAIN)):
            if tally.kills == kills:
                break
            saving = tally.saving < SAVING * (tally.kills + 1) and draw.random() < 0.8
            before = slow_disk if saving else (lambda: None)
            child = mmssl(*words_of(setting, place, run), log=place / "run.log", before=before)
            if not strike(child, run, whole, saving, draw):
                break  # it came to its end before
            tally = tally._replace(
                kills=tally.kills + 1,
                saving=tally.saving + half_saved(run),
                early=tally.early + (not checkpoint.written(run / "checkpoints")),
                late=tally.late + done(run),
            )
        tally = ended(setting, place, run, whole, tally)
    return tally


def ended(setting: str, place: Path, run: Path, whole: Whole, tally: Tally) -> Tally:
    """Let a run go on to its end and compare it."""
    child = mmssl(*words_of(setting, place, run), log=place / "run.log")
    child.wait()
    wrong = f"exit {child.code}: {child.said()}" if child.code else whole.differs(run)
    shutil.rmtree(run)
    return tally._replace(runs=tally.runs + 1, wrong=(*tally.wrong, wrong) if wrong else tally.wrong)


def strike(child: Child, run: Path, whole: Whole, saving: bool, draw: random.Random) -> bool:
    """Kill a run: from its first moment on, in a save, or after the last one. False if it had ended before."""
    if not saving and draw.random() < LATE:
        child.wait(lambda: done(run))
        child.wait(after(draw.uniform(0, 5 * FSYNC)))
        return child.kill()
    if not saving and draw.random() < 0.3:
        child.wait(after(draw.uniform(0, whole.startup)))
        return child.kill()
    at = min(max(curve(run), default=0), STEPS - 1)  # all steps are there if it was killed in its last save
    target = draw.randint(at, STEPS - 1)
    child.wait(lambda: max(curve(run), default=0) >= target and bool(curve(run)))
    if saving:
        child.wait(lambda: writing(run))
    child.wait(after(draw.uniform(0, 5 * FSYNC if saving else whole.step)))
    return child.kill()


def after(seconds: float):
    """Whether so long has passed since this was called."""
    then = time.monotonic() + seconds
    return lambda: time.monotonic() >= then


def writing(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    return next((run / "checkpoints").glob(".tmp-step-*"), None) is not None


def done(run: Path) -> bool:
    """Whether the last checkpoint is there."""
    return (run / "checkpoints" / f"step-{STEPS:08d}").exists()


def half_saved(run: Path) -> bool:
    """Whether a kill fell into a save or into the removal of old checkpoints."""
    names = [path.name for path in (run / "checkpoints").glob("*step-*")]  # hidden ones as well
    return any(name.startswith((".tmp-", ".del-")) or name.endswith(".old") for name in names)


def slow_disk() -> None:
    """In a child: a save takes longer, and is easier to hit."""
    fsync = os.fsync

    def slow(handle: int) -> None:
        time.sleep(FSYNC)
        fsync(handle)

    os.fsync = slow


def rows(found: dict[str, Tally]) -> list[Row]:
    """Of the table, all together last."""
    every = [*found.values()]
    everything = Tally(
        sum(tally.kills for tally in every),
        sum(tally.saving for tally in every),
        sum(tally.early for tally in every),
        sum(tally.late for tally in every),
        sum(tally.runs for tally in every),
        tuple(wrong for tally in every for wrong in tally.wrong),
    )
    found = found | {"all": everything}
    return [
        Row(
            f"kills: {setting}",
            f"{tally.kills} kills, {tally.saving} in a save, {tally.early} before the first checkpoint, "
            f"{tally.late} after the last one",
            f"{tally.runs} runs resumed after each, curves and weights identical to the bit",
            tally.wrong,
        )
        for setting, tally in found.items()
    ]
