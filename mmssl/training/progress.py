"""What a person sees while it trains: loss, k-NN, samples a second, time left."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from mmssl.errors import StorageError
from mmssl.training.run_folder import RunFolder


class Progress:
    """A bar on the terminal and lines in metrics.jsonl and log.txt.

    Args:
        probed: called after a line of probes.
    """

    def __init__(self, folder: RunFolder, steps: int, start: int, quiet: bool, probed: Callable[[], None] = lambda: None):
        self.folder, self.probed = folder, probed
        self.bar = tqdm(total=steps, initial=start, disable=quiet, unit="step", dynamic_ncols=True, mininterval=1.0)
        self.shown: dict[str, str] = {}
        self.told: str | None = None  # of health, in status.json

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def back(self, step: int) -> None:
        """The run went back."""
        self.bar.update(step - self.bar.n)

    def _note(self, line: dict[str, Any]) -> None:
        """In status.json, if health has changed; a disk that cannot be written is told of elsewhere."""
        told = line["verdict"]
        if self.folder.is_main and told != self.told:
            self.told = told
            with suppress(StorageError):
                self.folder.status("running", step=line["step"], health=told)

    def report(self, line: dict[str, Any]) -> None:
        """One logged step."""
        self.folder.log_metrics(line)
        if "loss" in line:
            self.shown["loss"] = "skipped" if line["loss"] is None else f"{line['loss']:.4g}"
            if "verdict" in line:
                self.shown["health"] = line["verdict"].partition(" (")[0]
                self._note(line)
            self.shown["samples/s"] = f"{line['speed/samples_per_s']:.0f}"
        for name, value in line.items():
            if name.startswith("probe/"):
                self.shown[name.rsplit("/", 1)[1]] = f"{value:.1%}"
        told = "  ".join(f"{name} {value}" for name, value in self.shown.items())
        logging.getLogger("mmssl").info("step %d  %s", line["step"], told)
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update(line["step"] - self.bar.n)
        if "loss" not in line:
            self.probed()
