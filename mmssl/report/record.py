"""What a run folder says of its run, whether it is finished, killed or going on."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mmssl.training.run_folder import RunFolder

Line = dict[str, Any]
STEP = re.compile(r"(?P<what>.+?)-(?P<step>\d+)\.png")


class Picture(NamedTuple):
    """A file of `report/`, NAME-STEP.png with a sentence in NAME-STEP.txt or without."""

    path: Path
    what: str
    step: int
    caption: str


class Record(NamedTuple):
    """A run as its folder tells it; what is missing is empty."""

    path: Path
    status: dict[str, Any]
    state: str  # in a word
    lines: list[Line]  # of metrics.jsonl, those that were not torn
    config: dict[str, Any]
    commands: list[str]
    data: dict[str, Any]
    machine: dict[str, Any]
    rejected: list[dict[str, Any]]  # samples of quarantine.jsonl
    pictures: dict[str, list[Picture]]  # what they show -> by step
    card: str  # of the model

    @property
    def members(self) -> list[str]:
        """Kinds of data, where there are several; otherwise one without a name."""
        return [*self.config.get("modalities", {})] or [""]

    def names(self, kind: str, member: str = "") -> list[str]:
        """Metrics `kind/...` of a member, or of the run, in order of appearance."""
        start = f"{kind}/{member}." if member else f"{kind}/"
        return [*dict.fromkeys(name for line in self.lines for name in line if name.startswith(start))]

    def curve(self, name: str) -> list[tuple[int, float | None]]:
        """Steps and values of a metric; None where it was logged and was no number."""
        return [(line["step"], line[name]) for line in self.lines if name in line and "step" in line]


def read(path: str | Path) -> Record:
    """The record of a run folder. Raises: RecipeError if it is none."""
    folder = RunFolder.open(path)
    status = folder.read_status()
    found = status["state"]
    state = "killed" if found == "running" and not folder.is_alive() else found
    config: Any = None
    with suppress(OSError, yaml.YAMLError, UnicodeDecodeError):
        config = yaml.safe_load(folder.config.read_text("utf-8"))
    return Record(
        folder.path,
        status,
        state,
        [line for line in map(_object, _text(folder.metrics).splitlines()) if line],
        config if isinstance(config, dict) else {},
        _text(folder.command).splitlines(),
        _object(_text(folder.data)),
        _object(_text(folder.env)),
        [line for line in map(_object, _text(folder.quarantine).splitlines()) if line],
        _pictures(folder.path / "report"),
        _text(folder.model / "README.md"),
    )


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text("utf-8", "replace")
    return ""


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _pictures(folder: Path) -> dict[str, list[Picture]]:
    found: dict[str, list[Picture]] = {}
    for path in sorted(folder.glob("*.png")):
        if match := STEP.fullmatch(path.name):
            picture = Picture(path, match["what"], int(match["step"]), _text(path.with_suffix(".txt")).strip())
            found.setdefault(picture.what, []).append(picture)
    return {what: sorted(pictures, key=lambda picture: picture.step) for what, pictures in found.items()}
