"""Memory for time: what the backward pass needs and can compute again is not kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def forgetting(function: Callable[[Tensor], Tensor], x: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
    """`then(function(x))`, for whose gradient `function(x)` is computed once more instead of kept.

    Args:
        function: cheap, without random numbers; its own gradient should need `x`, so that this is kept anyway.
    """
    between = function(x)
    place, count = between.data_ptr(), between.numel()  # not the tensor, which the hook would keep

    def pack(kept: Tensor) -> Tensor | torch.Size:
        return kept.shape if kept.data_ptr() == place and kept.numel() == count else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return function(x).view(kept) if isinstance(kept, torch.Size) else kept

    with saved_tensors_hooks(pack, unpack):
        return then(between)


def recompute(root: nn.Module, kinds: tuple[type[nn.Module], ...]) -> int:
    """Keep only what enters each module of these kinds, and compute all inside it once more in the backward pass.

    Models of a library do so by their own switch.

    Returns: how many modules and models do so now.
    Source: arXiv:1604.06174.
    """
    found = 0
    for module in root.modules():
        if isinstance(module, kinds):
            forget_nothing(module)
            module.forward = twice(module.forward)
        elif getattr(module, "supports_gradient_checkpointing", False):
            module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        else:
            continue
        found += 1
    return found


def forget_nothing(root: nn.Module) -> None:
    """For what is computed again as a whole, see `twice`: what `forgetting` needs for its own would be kept."""
    for module in root.modules():
        if hasattr(module, "forgets"):
            module.forgets = False  # type: ignore[assignment]


def twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what enters `forward`, which runs again in the backward pass, with the same random numbers."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        return (
            checkpoint(forward, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)
        )

    return checked
