"""Two ranks of a run, one of which something befalls, under a parent that ends the other one as torchrun's agent does.

python -m tests.launcher RANK STEP FAULT [words of mmssl pretrain ...]

FAULT is a Python statement that rank RANK meets before it makes update STEP. Imports are made once, before the ranks part.
"""

import os
import signal
import socket
import sys
import time

import mmssl.training.pretrain  # noqa: F401
from mmssl.cli import main
from mmssl.training.trainer import SelfSupervisedTrainer


def befall(rank: int, step: int, fault: str) -> None:
    begin = SelfSupervisedTrainer.begin_update

    def befallen(self):
        if os.environ["RANK"] == str(rank) and self.state.global_step == step:
            exec(fault, {"os": os, "signal": signal, "time": time})
        begin(self)

    SelfSupervisedTrainer.begin_update = befallen


def start(rank: int, port: int, words: list[str]) -> int:
    pid = os.fork()
    if not pid:
        os.setsid()
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {"ACCELERATE_USE_CPU": "true", **{name: str(value) for name, value in place.items()}}
        code = main(["pretrain", *words])
        sys.stderr.flush()
        os._exit(code)
    return pid


def watch(alive: set[int]) -> int:
    """Wait for all; the first one that fails is the end of the others."""
    worst, told = 0, False
    while alive:
        pid, status = os.wait()
        alive.remove(pid)
        code = os.waitstatus_to_exitcode(status)
        worst = worst or code
        for other in alive if code and not told else ():
            os.kill(other, signal.SIGTERM)
            told = True
    return worst


if __name__ == "__main__":
    rank, step, fault, *words = sys.argv[1:]
    befall(int(rank), int(step), fault)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sys.exit(abs(watch({start(r, port, words) for r in (0, 1)})))
