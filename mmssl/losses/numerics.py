"""What all losses do with numbers."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def at_least_fp32(x: Tensor) -> Tensor:
    """float32 for lower precisions, unchanged otherwise."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def without_autocast(loss: F) -> F:
    """A loss whose matrix products autocast leaves alone."""

    @wraps(loss)
    def exact(*args: Any, **kwargs: Any) -> Any:
        tensor = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            return loss(*args, **kwargs)

    return cast(F, exact)


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1, fp32 or higher. A row of zeros stays one and gets the gradient 0. x: (..., D)."""
    x = at_least_fp32(x)
    length = x.norm(dim=-1, keepdim=True)
    # A product, since its gradient takes fewer passes than a quotient's.
    return x * length.masked_fill(length <= 1e-12, torch.inf).reciprocal()


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """(..., D), (..., D) -> (...), as of `unit_rows`, which this need not make."""
    x, y = at_least_fp32(x), at_least_fp32(y)
    lengths = (v.norm(dim=-1) for v in (x, y))
    first, second = (length.masked_fill(length <= 1e-12, torch.inf) for length in lengths)
    return (x * y).sum(-1) / first / second


def same_shape(**tensors: Tensor) -> None:
    """Raises: ValueError that names the tensors if their shapes differ."""
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"{shapes}: must have one shape, a row for each sample of the batch")


def above_zero(**numbers: float) -> None:
    """Raises: ValueError that names the number which is not above 0."""
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name}: {number}, must be above 0")
