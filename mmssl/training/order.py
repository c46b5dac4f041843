"""Whether all ranks run the same modules in the same order, which engines take for granted."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

import torch
from torch import nn

from mmssl.distributed import all_max, gather_objects, world
from mmssl.errors import RankError

END = "the end of the forward pass"


class SameOrder:
    """While it is open, ranks agree on each module before one of them runs it.

    Where they do not, ZeRO-3 waits for ever, and DDP, ZeRO-1 and ZeRO-2 may add gradients of one parameter to those of another
    without a word. Each agreement is a small collective, so this is for the first micro-batch of a run. What `train.compile`
    has compiled is left out with all that is below it: hooks would be compiled in.

    Raises: RankError naming the first module that is not the same, on all ranks; nothing hangs.
    """

    def __init__(self, root: nn.Module, device: torch.device):
        self.root, self.device = root, device
        self.handles: list[Any] = []

    def __enter__(self) -> SameOrder:
        if world() > 1:
            compiled = [name for name, module in self.root.named_modules() if module._compiled_call_impl is not None]
            for name, module in self.root.named_modules():
                if not any(name == other or name.startswith(f"{other}.") for other in compiled):
                    hook = partial(self._before, name)  # ahead of those of ZeRO-3, which gather weights
                    self.handles.append(module.register_forward_pre_hook(hook, prepend=True))
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
        if self.handles and kind is None:
            self.agree(END)

    def _before(self, name: str, *_: Any) -> None:
        self.agree(name or "the whole module")

    def agree(self, name: str) -> None:
        """Compare what comes next with what comes next on the other ranks; a collective."""
        digest = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
        most, least = all_max(torch.tensor([digest, -digest], device=self.device)).tolist()
        if most == -least:
            return
        names = gather_objects(name)
        other = next(rank for rank, theirs in enumerate(names) if theirs != names[0])
        raise RankError(
            f"Rank {other} comes to {names[other]} where rank 0 comes to {names[0]}: all ranks must run the same modules in "
            "the same order, or gradients of different weights are mixed. Let the forward of the method depend on nothing that "
            "differs between ranks; what has no data on one of them runs on a dummy whose loss is multiplied by 0."
        )
