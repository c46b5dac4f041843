"""Runs that something befalls, on one rank or two, under a parent that ends the other rank as torchrun's agent does.

python -m tests.launcher FOLDER TRIALS, where TRIALS is a JSON list of [name, ranks, Python code, words of mmssl ...]. Each rank
runs the code first. What was said is in FOLDER/NAME.txt, the exit status is printed. Imports are made once, for all trials.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import mmssl.training.pretrain  # noqa: F401
from mmssl.cli import main
from mmssl.training.trainer import SelfSupervisedTrainer

ROOT = Path(__file__).resolve().parents[1]


def befall(rank: int, step: int, fault: str) -> None:
    """Have a rank meet a Python statement before it makes an update."""
    begin = SelfSupervisedTrainer.begin_update

    def befallen(self):
        if os.environ.get("RANK", "0") == str(rank) and self.state.global_step == step:
            exec(f"import os, signal, time; {fault}")
        begin(self)

    SelfSupervisedTrainer.begin_update = befallen


def start(rank: int, port: int, ranks: int, code: str, words: list[str]) -> int:
    pid = os.fork()
    if not pid:
        os.setsid()
        if ranks > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ |= {"ACCELERATE_USE_CPU": "true", **{name: str(value) for name, value in place.items()}}
        exec(code, {"befall": befall})
        status = main(words)
        sys.stderr.flush()
        os._exit(status)
    return pid


def watch(alive: set[int]) -> int:
    """Wait for all; the first one that fails is the end of the others. Returns: its exit status, negative for a signal."""
    worst = 0
    while alive:
        pid, status = os.wait()
        alive.remove(pid)
        failed = os.waitstatus_to_exitcode(status)
        for other in alive if failed and not worst else ():
            os.kill(other, signal.SIGTERM)
        worst = worst or failed
    return worst


def trial(ranks: int, code: str, words: list[str], said: Path) -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    terminal = os.dup(2)
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    try:
        return watch({start(rank, port, ranks, code, words) for rank in range(ranks)})
    finally:
        os.dup2(terminal, 2)


def befallen(recipe: Path, folder: Path, trials: dict[str, tuple]) -> tuple[dict[str, int], dict[str, str]]:
    """Runs in `folder/NAME`: name -> (ranks, code that each rank runs first, more words). One process imports, for all of them.

    Returns: exit status, and what was said, of each.
    """
    words = lambda name, more: ["pretrain", str(recipe), f"out={folder / name}", *more]  # noqa: E731
    listed = json.dumps([[name, ranks, code, *words(name, more)] for name, (ranks, code, *more) in trials.items()])
    command = [sys.executable, "-m", "tests.launcher", str(folder), listed]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), {name: (folder / f"{name}.txt").read_text() for name in trials}


if __name__ == "__main__":
    folder, trials = Path(sys.argv[1]), json.loads(sys.argv[2])
    print(json.dumps({name: trial(ranks, code, words, folder / f"{name}.txt") for name, ranks, code, *words in trials}))
