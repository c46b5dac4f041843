"""What a run leaves on disk, and what never gets there: secrets, torn files, a NaN that looks like a number.

Imports no torch, so that `mmssl status` answers at once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from mmssl import __version__
from mmssl.errors import RecipeError, StorageError, storage_error
from mmssl.redaction import HIDDEN, redact

STATES = ("running", "finished", "preempted", "failed")
FILES = ("config.yaml", "command.txt", "env.json", "data.json", "metrics.jsonl", "log.txt", "README.md", "quarantine.jsonl",
         "results.json")  # fmt: skip
PREPARED = ("status.json", "config.yaml", "command.txt", "env.json", "data.json", "log.txt", "quarantine.jsonl", ".ranks")
FOLDERS = ("model", "best", "heads", "report", "replay")
TRACES = (
    ".tmp-*",
    ".del-*",
    "traceback-*.txt",
    "stacks-*.txt",
    ".ranks",
    "tensorboard",
    "checkpoints/step-*",
    "checkpoints/checkpoint-*",
    "checkpoints/.tmp-*",
    "checkpoints/.del-*",
)
SILENCE = 900.0  # seconds; a run on another host that wrote nothing for so long is taken for dead (hangs end after 600)
PACKAGES = (
    *("torch", "torchvision", "torchaudio", "transformers", "accelerate", "deepspeed", "datasets"),
    *("safetensors", "pydantic", "numpy", "pillow", "soundfile"),
)


# Secrets ------------------------------------------------------------------------------------------------------------

_SECRET_WORD = re.compile(r"(?i)^(?:--?)?[\w.-]*(?:token|secret|passw(?:or)?d|key)$")


def redact_command(argv: Sequence[str]) -> str:
    """A command line for the shell; besides what `redact` finds, no value of `token=`, `key=`, `--token` and the like."""
    words: list[str] = []
    for word in argv:
        name, equals, _ = word.partition("=")
        if equals and _SECRET_WORD.match(name):
            word = f"{name}={HIDDEN}"
        elif words and words[-1].startswith("-") and _SECRET_WORD.match(words[-1]):
            word = HIDDEN
        words.append(redact(word))
    return shlex.join(words)


class LogFile(logging.FileHandler):
    """log.txt. What finds no space there is lost, without a traceback for each line."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing."""


class Redacted(logging.Formatter):
    """A log formatter whose records hold no secrets, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        return redact(super().format(record))


# Files --------------------------------------------------------------------------------------------------------------


@contextmanager
def storing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns what a full, read-only or broken disk raises into a StorageError that names `path` and the bytes `needed`."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise storage_error(error, path, needed) or StorageError(f"{path} cannot be written: {error}.") from error


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """A file, a folder with all in it, or a link, whatever that leads to. Raises: OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Replace a file at once: a reader, or a crash, sees the old text or the new one. Raises: OSError."""
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, text: str) -> None:
    """Add to the end of a file, all or nothing. Raises: OSError."""
    data = memoryview(text.encode())
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(before)
            raise


def plain(value: Any) -> Any:
    """What JSON can hold: numbers of any library become Python's, what is not finite null, since 0.0 would be a lie."""
    if isinstance(value, dict):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(inner) for inner in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (bool, int, float, type(None))) else redact(str(value))


# The machine --------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that matter, None where one is missing."""
    found: dict[str, str | None] = {"mmssl": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str | None:
    """The git commit of this code, `-dirty` if it was edited; None where it is not a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed copy may lie in somebody else's repository
        return None
    command = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    return None


def environment() -> dict[str, Any]:
    """Versions, Python, platform, processors, GPU names, commit. Never environment variables: they hold secrets."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": gpus,
        "commit": commit(),
        "packages": versions(),
    }


def born(pid: int) -> int | None:
    """When a process began, in clock ticks since boot, or None if it is gone.

    With the pid it names a process for good: pids are used again, in containers within seconds. 0 where there is no /proc.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # alive, and somebody else's
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return None if fields[0] in "ZX" else int(fields[19])  # a zombie is dead, its parent has just not looked


# The folder ---------------------------------------------------------------------------------------------------------


def _inside(name: str) -> Any:
    return property(lambda folder: folder.path / name)


class RunFolder:
    """The folder of one run. Every rank may hold one; only the main one writes.

    Args:
        path: the folder.
        is_main: whether this process is rank 0; the writing methods of the others do nothing.
    """

    current: ClassVar[Path | None] = None  # the run that this process writes: where a traceback belongs

    config = _inside("config.yaml")  # the resolved recipe
    command = _inside("command.txt")  # one line for each start
    env = _inside("env.json")
    data = _inside("data.json")  # what the data set is: rows, columns, labels
    metrics = _inside("metrics.jsonl")  # one object for each logged step
    log = _inside("log.txt")
    checkpoints = _inside("checkpoints")
    replay = _inside("replay")  # step-N.json: the batch of an update that was not applied
    model = _inside("model")  # the encoder, for AutoModel
    best = _inside("best")  # the encoder of the best checkpoint, by save.best
    heads = _inside("heads")  # all else that was trained
    card = _inside("README.md")
    status_file = _inside("status.json")
    quarantine = _inside("quarantine.jsonl")  # samples that could not be read

    def __init__(self, path: str | Path, is_main: bool = True):
        self.path, self.is_main = Path(path), is_main
        self.unwritten, self.muted = "", False  # lines of metrics.jsonl that found no space; whether that was said

    @classmethod
    def create(cls, path: str | Path, overwrite: bool = False, is_main: bool = True) -> RunFolder:
        """Start a new run.

        Args:
            path: a folder that is missing, empty, that of a run which ended before it had learned anything, or with
                `overwrite` that of any earlier run.
            overwrite: remove what that run left, and nothing else.
            is_main: the other ranks neither check nor write; let them wait for rank 0.
        Raises: RecipeError if the folder is taken, StorageError if it cannot be written.
        """
        folder = cls(path, is_main)
        if is_main:
            folder._claim(overwrite)
            folder.status("running", step=0, steps=None, rollbacks=0, tracker=None, health=None)
        cls.current = folder.path
        return folder

    @classmethod
    def open(cls, path: str | Path, is_main: bool = True) -> RunFolder:
        """The folder of an existing run. Raises: RecipeError if there is none."""
        folder = cls(path, is_main)
        if not folder.is_run():
            found = "no run" if folder.path.is_dir() else "no such folder"
            raise RecipeError(f"{path}: {found}. Give the folder that mmssl pretrain wrote, the one with status.json in it.")
        return folder

    def is_run(self) -> bool:
        """Whether mmssl has written here."""
        return self.read_status().get("state") in STATES

    def check_idle(self) -> None:
        """Raises: RecipeError if another process is training here."""
        if self.is_alive() and self.read_status().get("pid") != os.getpid():
            status = self.read_status()
            raise RecipeError(
                f"{self.path}: a run is going on here, as process {status.get('pid')} on {status.get('host')}. Stop it first."
            )

    def is_alive(self) -> bool:
        """Whether the run goes on: its process lives on this host, or it wrote lately from another one."""
        status = self.read_status()
        if status.get("state") != "running":
            return False
        if status.get("host") == socket.gethostname():
            began = born(status.get("pid", 0))
            return began is not None and began == status.get("born")
        return self.silence() < SILENCE

    def silence(self) -> float:
        """Seconds since the run last wrote its status or its metrics."""
        return max(0.0, time.time() - max(p.stat().st_mtime for p in (self.status_file, self.metrics) if p.exists()))

    def _claim(self, overwrite: bool) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise RecipeError(f"out: {self.path} is a file, expected a folder.")
        with storing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not any(self.path.iterdir()):
                return
            if not self.is_run():
                raise RecipeError(
                    f"out: {self.path} is not empty and is not a run of mmssl; it is left as it is. "
                    "Choose another folder with out=FOLDER."
                )
            if not overwrite and not self._is_barren():
                raise RecipeError(
                    f"out: {self.path} holds a run. Continue it with 'mmssl resume {self.path}', "
                    "replace it with overwrite=true, or choose another folder with out=FOLDER."
                )
            self.check_idle()
            self._clear()

    def _is_barren(self) -> bool:
        """Whether a run ended here that has left no more than what is written before the first update.

        Of one on another host that says that it runs, silence is no proof.
        """
        status = self.read_status()
        ended = status["state"] != "running" or (status.get("host") == socket.gethostname() and not self.is_alive())
        return ended and {path.name for path in self.path.iterdir()} <= {*PREPARED}

    def _clear(self) -> None:
        """Remove what a run leaves. The status stays until the new one replaces it: it tells that the folder is ours."""
        traces = [path for pattern in TRACES for path in self.path.glob(pattern)]
        for item in (*(self.path / name for name in (*FILES, *FOLDERS)), *traces):
            remove(item)

    def write_identity(self, recipe_yaml: str, argv: Sequence[str], data_facts: dict[str, Any]) -> None:
        """Write what the run is: recipe, command line, machine, data. At a resume the new command line is added.

        Raises: StorageError.
        """
        type(self).current = self.path
        if not self.is_main:
            return
        with storing(self.path):
            write_atomic(self.config, redact(recipe_yaml))
            write_atomic(self.env, json.dumps(environment(), indent=2) + "\n")
            write_atomic(self.data, json.dumps(plain(data_facts), indent=2) + "\n")
            append(self.command, redact_command(argv) + "\n")

    def log_handler(self) -> logging.Handler:
        """A handler that appends to log.txt, without secrets; it drops everything on the other ranks."""
        if not self.is_main:
            return logging.NullHandler()
        with storing(self.log):
            handler = LogFile(self.log, encoding="utf-8")
        handler.setFormatter(Redacted("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        return handler

    def log_metrics(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl at once; if the disk is full or read-only, together with a later one.

        Args:
            record: `step` and numbers (of Python, NumPy, or () tensors); what is not finite is written as null.
        """
        if not self.is_main:
            return
        self.unwritten += json.dumps(plain(record), allow_nan=False) + "\n"
        try:
            append(self.metrics, self.unwritten)
            self.unwritten = ""
        except OSError as error:
            if not self.muted:
                print(f"mmssl: note: {storage_error(error, self.metrics) or error} Lines are kept for later.", file=sys.stderr)
            self.muted = True

    def truncate_metrics(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed run writes again, and what a crash tore. Raises: StorageError."""
        if not self.is_main or not self.metrics.exists():
            return
        with storing(self.metrics):
            records = filter(None, map(_parse, self.metrics.read_text("utf-8", "replace").splitlines()))
            kept = [record for record in records if record.get("step", 0) <= step]
            write_atomic(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))

    def last_metrics(self) -> dict[str, Any]:
        """The last whole line of metrics.jsonl, {} if there is none. Reads the end of the file only."""
        with suppress(OSError), self.metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
            return next(filter(None, map(_parse, reversed(file.read().decode("utf-8", "replace").splitlines()))), {})
        return {}

    def first_metrics(self) -> dict[str, Any]:
        """The first line of metrics.jsonl of an update that was applied, {} if there is none."""
        with suppress(OSError), self.metrics.open(encoding="utf-8", errors="replace") as file:
            return next((line for line in map(_parse, file) if line and line.get("loss") is not None), {})
        return {}

    def status(self, state: str, **facts: Any) -> None:
        """Replace status.json at once.

        Args:
            state: running, finished, preempted or failed.
            facts: step, steps, launch, rollbacks, tracker (its id there), health (in words), hub (what was pushed), error
                (text), code, ...; the first seven stay as they were if not given.
        Raises: StorageError.
        """
        if state not in STATES:
            raise ValueError(f"state: found {state!r}, expected one of {', '.join(STATES)}")
        if not self.is_main:
            return
        before = self.read_status()
        who = {"pid": os.getpid(), "born": born(os.getpid()), "host": socket.gethostname(), "time": time.time()}
        kept = {name: before.get(name) for name in ("step", "steps", "launch", "rollbacks", "tracker", "health", "hub")}
        known = {**kept, **who, "error": None, **facts}
        with storing(self.status_file):
            write_atomic(self.status_file, json.dumps(plain({"state": state, **known}), indent=2) + "\n")

    def read_status(self) -> dict[str, Any]:
        """What status.json says; {} if there is none or it is not ours."""
        with suppress(OSError, UnicodeDecodeError):
            return _parse(self.status_file.read_text("utf-8")) or {}
        return {}


def _parse(text: str) -> dict[str, Any] | None:
    """A JSON object, None if it is anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def save_traceback(text: str) -> Path | None:
    """Keep a traceback where the run is, else in a temporary file; None if nothing can be written."""
    import tempfile

    with suppress(OSError):
        if RunFolder.current is not None:
            path = RunFolder.current / f"traceback-{os.environ.get('RANK', '0')}.txt"
            path.write_text(redact(text), encoding="utf-8")
            return path
    with suppress(OSError):
        handle, name = tempfile.mkstemp(prefix="mmssl-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(redact(text))
        return Path(name)
    print(redact(text), file=sys.stderr)
    return None
