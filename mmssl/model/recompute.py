"""Memory for time: what the backward pass needs and can compute again is not kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def forgetting(function: Callable[[Tensor], Tensor], x: Tensor, then: Callable[[Tensor], Tensor]) -> Tensor:
    """`then(function(x))`, for whose gradient `function(x)` is computed once more instead of kept.

    Args:
        function: cheap, without random numbers; its own gradient should need `x`, so that this is kept anyway.
        then: begins with products, for which autocast would round what it is given.
    """
    device, rounded = x.device.type, rounding(x)
    between = function(x)
    if rounded is not None:  # here, or a copy would be kept
        between = between.to(rounded)
    dtype = between.dtype
    place, count = between.data_ptr(), between.numel()  # not the tensor, which the hook would keep

    def pack(kept: Tensor) -> Tensor | torch.Size:
        return kept.shape if kept.data_ptr() == place and kept.numel() == count else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if not isinstance(kept, torch.Size):
            return kept
        with nullcontext() if rounded is None else torch.autocast(device, rounded):  # which is over by now
            return function(x).to(dtype).view(kept)

    with saved_tensors_hooks(pack, unpack):
        return then(between)


def rounding(x: Tensor) -> torch.dtype | None:
    """The type to which autocast rounds the factors of products with `x`, if it does."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def entering(linear: nn.Module, x: Tensor, norm: nn.Module | None, forgets: bool) -> Tensor:
    """`linear` of `x`, or of what a norm makes of it, which is not kept if `forgets`: the norm keeps what enters it anyway.

    Of tokens in half precision autocast may give the norm a copy in full, which it keeps; then there is nothing to be gained.
    """
    if norm is None:
        return linear(x)
    whole = x.dtype in (torch.float32, torch.float64) or rounding(x) is None
    if forgets and whole and x.requires_grad and not torch.compiler.is_compiling():  # which decides such things by itself
        return forgetting(norm, x, linear)
    return linear(norm(x))


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
