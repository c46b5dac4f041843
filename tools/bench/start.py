"""How soon something happens: `mmssl --help`, and the first update of the demo."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


def run(times: str = "5", within: str = "120") -> dict[str, Any]:
    """Seconds from a command to what is waited for, in fresh processes.

    Args:
        within: seconds after which waiting for the first update ends.
    Returns: `time_ratio` (`mmssl --help` : importing torch), both medians, and `first_update_seconds`: from the command of the
        demo to the line with the losses of its first update; it looks at the untrained network before.
    """
    helped = [_seconds(sys.executable, "-m", "mmssl", "--help") for _ in range(int(times))]
    imported = [_seconds(sys.executable, "-c", "import torch") for _ in range(int(times))]
    return {
        "name": "from a command to its first result",
        "time_ratio": round(statistics.median(helped) / statistics.median(imported), 3),
        "help_seconds": round(statistics.median(helped), 2),
        "import_torch_seconds": round(statistics.median(imported), 2),
        "first_update_seconds": round(first_update(float(within)), 1),
        "peer": "python -c 'import torch'",
        "peer_version": torch.__version__,
    }


def _seconds(*words: str) -> float:
    start = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def first_update(within: float) -> float:
    """Seconds until the demo's first update is told of; it is stopped there.

    Raises: RuntimeError if there is none in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        words = [sys.executable, "-m", "tools.demo", "only=vision", f"out={folder}", "train.log_every=1"]
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            while (passed := time.perf_counter() - start) < within and child.poll() is None:
                for file in Path(folder).rglob("metrics.jsonl"):
                    for line in file.read_text().splitlines(keepends=True):
                        if line.endswith("\n") and "loss" in json.loads(line):
                            return passed
                time.sleep(0.02)
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    raise RuntimeError(f"no update within {within:.0f} s, or the demo ended with {child.returncode}")
