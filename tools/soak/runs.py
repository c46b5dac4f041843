"""Tiny runs, each in a process of its own that is forked from one that has imported everything and done nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from mmssl.training import checkpoint

STEPS, EVERY, IMAGES = 16, 2, 48  # updates, updates between saves, and three updates to a pass
RECIPE = f"""\
data: {{path: DATA, modality: vision, workers: 0, readers: 2, block: 8}}
model: {{image_size: 16, patch_size: 4, hidden_size: 16, depth: 2, heads: 2, prenet_depth: 1}}
method: {{name: data2vec2, top_k: 2, momentum: 0.5, decoder: {{dim: 16, groups: 4, kernel: 3, layers: 2}}}}
views: {{mask: {{ratio: 0.75, adjust: 0.1, width: 2, copies: 2}}}}
optim: {{warmup: 2}}
train: {{steps: {STEPS}, global_batch: 16, device: cpu, log_every: 1, threads: 1}}
watch: {{every: 0, samples: 20}}
save: {{every: {EVERY}, keep: 2}}
"""
SETTINGS: dict[str, tuple[str, ...]] = {  # of every run: name -> what differs
    "folder, no worker": ("data=FOLDER/images",),
    "folder, 2 workers": ("data=FOLDER/images", "data.workers=2"),
    "folder, accumulation": ("data=FOLDER/images", "train.micro_batch=4"),
    "folder, saves off the pass": ("data=FOLDER/images", "save.every=5", "data.workers=1"),
    "folder, saves in the background": ("data=FOLDER/images", "save.background=true"),
    "parquet, 2 workers": ("data=FOLDER/parquet", "data.workers=2"),
    "stream, no worker": ("data=FOLDER/parquet", "data.streaming=true"),
    "stream, 2 workers": ("data=FOLDER/parquet", "data.streaming=true", "data.workers=2"),
}


class Row(NamedTuple):
    """Of the table of results."""

    what: str
    tried: str
    result: str  # if nothing was wrong
    wrong: tuple[str, ...] = ()


class Child:
    """A forked process that runs a function in a session of its own.

    Args:
        work: what it does; an int that it returns is the exit status.
        log: file for all that it says.
    """

    def __init__(self, work: Callable[[], Any], log: Path):
        self.log, self.code = log, None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setsid()
                handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(handle, 1)
                os.dup2(handle, 2)
                code = work() or 0
                sys.stdout.flush()
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)

    def ended(self) -> bool:
        """Whether it has ended by itself."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is not None

    def wait(self, ready: Callable[[], bool] = lambda: False, seconds: float = 300) -> bool:
        """Until it ends or something else has happened, and whether that has. Raises: TimeoutError."""
        deadline = time.monotonic() + seconds
        while not ready():
            if self.ended():
                return False
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"nothing happened for {seconds:.0f} s:\n{self.said()}")
            time.sleep(0.003)
        return True

    def kill(self) -> bool:
        """SIGKILL to it and its workers; False if it had ended before."""
        if self.ended():
            return False
        os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)
        return self.code == -signal.SIGKILL

    def said(self) -> str:
        """The end of its log."""
        with suppress(OSError):
            return self.log.read_text("utf-8", "replace")[-2000:]
        return ""


def mmssl(*words: str, log: Path, before: Callable[[], None] = lambda: None) -> Child:
    """`mmssl WORDS` in a child; `before` is called in it first."""

    def work() -> int:
        from mmssl.cli import main

        sys.argv = ["mmssl", *words]
        before()
        return main(words)

    return Child(work, log)


def free_port() -> int:
    """For ranks to meet at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def launch(rank: int, port: int, deepspeed: Path | None) -> None:
    """One of two ranks, as `accelerate launch` sets it."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    if deepspeed is None:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    else:
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(deepspeed)}


def prepare(place: Path) -> None:
    """Import what a run needs, and write its data. This process must not compute anything: threads do not survive a fork."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("mmssl.cli.pretrain", "mmssl.cli.resume", "mmssl.training.pretrain", "mmssl.cli.options", "modalities.vision"):
        import_module(name)
    import_module("mmssl.training.launch").import_deepspeed()
    config: Any = import_module("datasets.config")
    config.HF_DATASETS_CACHE = place / "cache"
    (place / "recipe.yaml").write_text(RECIPE)
    child = Child(lambda: write_data(place), place / "data.log")
    child.wait()
    if child.code:
        raise RuntimeError(child.said())


def write_data(place: Path) -> None:
    """The same images as a folder and as four tables."""
    import datasets
    import numpy as np
    from PIL import Image

    draw = np.random.default_rng(0)
    for i in range(IMAGES):
        folder = place / "images" / "train" / ("dark", "light")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((draw.integers(0, 128, (18, 20, 3)) + 127 * (i % 2)).astype(np.uint8)).save(folder / f"{i:02}.png")
    files = sorted((place / "images").rglob("*.png"))
    (place / "parquet").mkdir()
    for i in range(4):
        rows = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files[i::4]]}
        features = datasets.Features({"image": datasets.Image(decode=False)})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(place / "parquet" / f"train-{i}.parquet")


def words_of(setting: str, place: Path, run: Path) -> list[str]:
    """Of `mmssl pretrain`, or of `mmssl resume` if the run got so far."""
    if (run / "config.yaml").exists():
        return ["resume", str(run)]
    words = (word.replace("FOLDER", str(place)) for word in SETTINGS[setting])
    return ["pretrain", str(place / "recipe.yaml"), *words, f"out={run}", "overwrite=true"]


def curve(run: Path) -> dict[int, float | None]:
    """Step -> loss, as written."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        with suppress(ValueError):  # a line that is being written
            record = json.loads(line)
            found |= {record["step"]: record["loss"]} if "loss" in record else {}
    return found


def results(run: Path) -> dict[str, Path]:
    """All tensors that a run leaves: of its newest checkpoint, its encoder and its heads; {} if there is no checkpoint."""
    path = checkpoint.newest(run / "checkpoints")
    folders = (path, run / "model", run / "heads") if path else ()
    return {str(file.relative_to(run)): file for folder in folders for file in folder.glob("*" + checkpoint.SUFFIX)}


def apart(one: Path, other: Path) -> list[str]:
    """Names of the tensors of two files that are not the same to the bit."""
    from safetensors.torch import load_file

    a, b = load_file(one), load_file(other)
    return sorted(n for n in {*a, *b} if n not in a or n not in b or a[n].numpy().tobytes() != b[n].numpy().tobytes())


def leftovers(run: Path) -> list[str]:
    """What an interrupted save left behind."""
    return [str(p.relative_to(run)) for p in run.rglob("*") if p.name.startswith((".tmp-", ".del-")) or p.name.endswith(".old")]


class Whole:
    """The run of a setting that nothing disturbs, and how long its parts take."""

    def __init__(self, setting: str, place: Path):
        run = place / "whole"
        child, start = mmssl(*words_of(setting, place, run), log=place / "whole.log"), time.monotonic()
        child.wait(lambda: bool(curve(run)))
        self.startup = time.monotonic() - start  # seconds until the first update
        child.wait()
        if child.code:
            raise RuntimeError(f"{setting}: exit {child.code}\n{child.said()}")
        self.step = (time.monotonic() - start - self.startup) / STEPS
        self.curve, self.results = curve(run), results(run)
        if [*self.curve] != [*range(1, STEPS + 1)]:
            raise RuntimeError(f"{setting}: the undisturbed run logged {[*self.curve]}")

    def differs(self, run: Path) -> str | None:
        """In what a run that was disturbed is not the same to the bit, or not tidy; None if it is."""
        if (found := curve(run)) != self.curve:
            steps = [step for step in {*found, *self.curve} if found.get(step) != self.curve.get(step)]
            return f"the loss at {min(steps)}"
        found = results(run)
        if {*found} != {*self.results}:
            return f"files {sorted({*found} ^ {*self.results})}"
        for name, file in found.items():
            if file.read_bytes() != self.results[name].read_bytes():
                return f"{name}: {', '.join(apart(file, self.results[name])[:5]) or 'all but the tensors'}"
        return f"leftovers {left}" if (left := leftovers(run)) else None
