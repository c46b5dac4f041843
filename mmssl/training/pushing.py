"""Pushing a model to the Hub while it is trained: beside the training, and never in its way."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub.utils import disable_progress_bars
from transformers import TrainerCallback

from mmssl.config.blocks import HubOptions
from mmssl.errors import RecipeError, StorageError
from mmssl.hub.push import check, push
from mmssl.training.run_folder import RunFolder, remove
from mmssl.training.saving import warn
from mmssl.training.watchdog import PATIENCE


def reach(options: HubOptions, going_on: bool) -> None:
    """Whether the Hub can be written, before the run begins; a run that goes on is only told.

    Raises: RecipeError that names what is wrong.
    """
    try:
        check(str(options.repo), options.private)
    except RecipeError as error:
        if not going_on:
            raise RecipeError(f"hub.repo: {error} Or leave out hub.repo, and push later: mmssl push RUN ORG/NAME.") from None
        warn(f"hub.repo: {error} The run goes on, and each push tries again.")


class Push(threading.Thread):
    """Sends a folder. Afterwards `error` says why it could not, if so."""

    def __init__(self, folder: Path, step: int, options: HubOptions):
        super().__init__(name="push", daemon=True)
        self.folder, self.step, self.options = folder, step, options
        self.error: str | None = None

    def run(self) -> None:
        """Once; `push` itself tries several times."""
        try:
            push(self.folder, str(self.options.repo), self.options.private)
        except Exception as error:  # whatever it is, the training goes on
            self.error = " ".join(f"{error}".split()) or type(error).__name__


class Pusher(TrainerCallback):
    """Sends what a run saves, one model after the other, on the main process.

    A save that comes while an older one is sent waits for it. Only the main thread writes, warns and reads `model/`; a push
    reads links to its files.
    """

    def __init__(self, folder: RunFolder, options: HubOptions):
        self.folder, self.options, self.saves, self.due = folder, options, 0, False
        self.running: Push | None = None
        disable_progress_bars()  # of files that are sent, which would tear that of the run
        self.saved_at, self.sent = 0, -1  # steps of the model that was saved last, and of the one on the Hub

    def saved(self, step: int) -> None:
        """The run was saved, and its model is in its place."""
        self.saves, self.saved_at = self.saves + 1, step
        self.due |= self.saves % self.options.every == 0
        self.turn()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After each update: what became of a push, and perhaps the next one."""
        self.turn()

    def turn(self) -> None:
        """Tell of a push that has ended, and begin one that is due."""
        if self.running is not None and not self.running.is_alive():
            self._tell(self.running)
            self.running = None
        if self.due and self.running is None:
            self.due = False
            try:
                self.running = Push(_linked(self.folder), self.saved_at, self.options)
                self.running.start()
            except OSError as error:
                self.running = None
                warn(f"hub.repo: the model of step {self.saved_at} is not on the Hub: {error}. {self._again}")

    def finish(self, step: int, patience: float, stopped: Callable[[], bool]) -> None:
        """Send what was saved last, and wait for it: as long as other ranks may wait for this one, and until a signal comes.

        Args:
            patience: `train.hang_timeout`.
        """
        until = time.monotonic() + (PATIENCE - 1) * patience
        self.saved_at = step
        for last in (False, True):
            while self.running is not None and self.running.is_alive() and time.monotonic() < until and not stopped():
                self.running.join(0.1)
            self.turn()
            if not last and self.running is None and self.sent != step:
                self.due = True
                self.turn()
        if self.running is not None:
            warn(f"hub.repo: the last model was not sent in time. {self._again}")

    @property
    def _again(self) -> str:
        return f"The next save tries again; by hand: mmssl push {self.folder.path} {self.options.repo}"

    def _tell(self, ended: Push) -> None:
        remove(ended.folder)
        if ended.error:
            warn(f"hub.repo: the model of step {ended.step} is not on the Hub. {ended.error} {self._again}")
        else:
            self.sent = ended.step
        known = {"repo": self.options.repo, "step": self.sent if self.sent >= 0 else None, "error": ended.error}
        with suppress(StorageError):  # a full disk is for the next save to report
            self.folder.status("running", hub=known)


def _linked(folder: RunFolder) -> Path:
    """The model as it is now, under another name: a later save puts a new folder in the place of `model/`."""
    aside = folder.path / ".tmp-push"
    remove(aside)
    shutil.copytree(folder.model, aside, copy_function=_link)
    return aside


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has links
        shutil.copy2(source, target)
