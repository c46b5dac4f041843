"""versions, devices and what can run here

What a bug report should hold. Environment variables are never shown.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from mmssl.cli.options import parse
from mmssl.training.run_folder import environment

OPTIONS = {"json": (bool, False, "print JSON")}


def run(arguments: list[str]) -> int:
    """`mmssl env`."""
    given = parse(arguments, options=OPTIONS)
    facts = environment() | capabilities()
    if given["json"]:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            print(f"{name:12}{_text(value)}")
    return 0


def capabilities() -> dict[str, Any]:
    """Devices, backends that ranks can talk over, and what DeepSpeed needs to build its operators."""
    import torch
    from torch import distributed

    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    backends = ("gloo", "nccl", "mpi") if distributed.is_available() else ()
    return {
        "devices": [name for name, there in usable.items() if there],
        "cuda": torch.version.cuda,
        "backends": [name for name in backends if getattr(distributed, f"is_{name}_available")()],
        "compiler": next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None),
        "ninja": shutil.which("ninja"),
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "".join(f"\n  {name:14}{inner or 'not installed'}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "none"
    return "none" if value is None else str(value)
