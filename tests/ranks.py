"""Two processes for a test."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ["torch", "mmssl.methods", "modalities.vision"]  # by a server that has computed nothing, from which ranks fork


def on_two_ranks(function: Callable[..., Any], *args: Any, folder: Path) -> list[Any]:
    """What `function(rank, *args)` returns on each of two processes of a gloo group, each with one thread.

    Args:
        function: one of a module, so that the processes can import it. Arguments and result go through pickle.
        folder: to meet in, such as `tmp_path`; a second call may name the same.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    place = tempfile.mkdtemp(dir=folder)
    mp.start_processes(_work, (function, args, place), nprocs=2, start_method="forkserver")
    return [torch.load(f"{place}/{rank}.pt", weights_only=False) for rank in range(2)]


def _work(rank: int, function: Callable[..., Any], args: tuple[Any, ...], place: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=rank, world_size=2)
    try:
        torch.save(function(rank, *args), f"{place}/{rank}.pt")
    finally:
        dist.destroy_process_group()
