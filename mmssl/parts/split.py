"""A network of which each rank keeps a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmssl.distributed import rank, world
from mmssl.model.transformer import Block


class Split:
    """Parameters of which each rank keeps one of `world` equal parts; they are whole while a unit that has them runs.

    A unit is a transformer block, or the own parameters of any other module. Outside a forward pass a parameter is empty, so
    that reading it there fails instead of giving stale values. Nothing is kept whole, however small, and no gradient flows.

    Args:
        network: all ranks have the same weights in it.
        names: parameters of it to split.
    """

    def __init__(self, network: nn.Module, names: Iterator[str] | list[str]):
        self.parameters = {name: p for name, p in network.named_parameters() if name in {*names}}
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        self.parts = {name: self.part(p.detach()).clone() for name, p in self.parameters.items()}
        names_of = {p: name for name, p in self.parameters.items()}
        for unit, held in units(network):
            mine = [names_of[p] for p in held if p in names_of]
            if mine:
                unit.register_forward_pre_hook(partial(self._gather, mine))
                unit.register_forward_hook(partial(self._free, mine), always_call=True)
        self._free([*self.parts])

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a tensor, flat; the last one is shorter, and may be empty."""
        size = -(-whole.numel() // world())
        return whole.flatten()[rank() * size : (rank() + 1) * size]

    def whole(self, names: list[str]) -> dict[str, Tensor]:
        """Those tensors, of all ranks; a collective."""
        sizes = [-(-self.shapes[name].numel() // world()) for name in names]
        padded = [nn.functional.pad(self.parts[name], (0, n - self.parts[name].numel())) for name, n in zip(names, sizes)]
        mine = torch.cat(padded)
        everyone = torch.empty(world() * mine.numel(), dtype=mine.dtype, device=mine.device)
        dist.all_gather_into_tensor(everyone, mine)
        rows, found, offset = everyone.view(world(), -1), {}, 0
        for name, n in zip(names, sizes):
            shape = self.shapes[name]
            found[name] = rows[:, offset : offset + n].reshape(-1)[: shape.numel()].view(shape)
            offset += n
        return found

    def _gather(self, names: list[str], *_: Any) -> None:
        for name, tensor in self.whole(names).items():
            self.parameters[name].data = tensor

    def _free(self, names: list[str], *_: Any) -> None:
        for name in names:
            self.parameters[name].data = self.parts[name].new_empty(0)

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take over this rank's part of whole tensors."""
        for name in self.parts.keys() & saved.keys():
            self.parts[name].copy_(self.part(saved[name]))

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the parts as the module is moved."""
        self.parts = {name: fn(part) for name, part in self.parts.items()}


def units(network: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Modules that run as one, each with the parameters that it needs."""
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    inside = {inner for block in blocks for inner in block.modules()}
    yield from ((block, [*block.parameters()]) for block in blocks)
    for module in network.modules():
        if module not in inside and (own := [*module.parameters(recurse=False)]):
            yield module, own
