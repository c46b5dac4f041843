"""Keyed randomness: every draw comes from a generator seeded by what is drawn, never from ambient state.

A sample's augmentation depends on (seed, epoch, index, view) alone, so that it survives a resume and does not change with
the number of workers or ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def key(*parts: int | str) -> int:
    """63 bits that depend on every part and on their order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by `key(*parts)`."""
    return torch.Generator(device=device).manual_seed(key(*parts))


@contextmanager
def drawn(*parts: int | str) -> Iterator[None]:
    """For code of others that draws from torch's ambient generator of the CPU: seeded by `key(*parts)`, and put back after."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(*parts))
        yield


def permutation(n: int, *parts: int | str) -> Tensor:
    """(n,) int64: 0..n-1 in the order that the key gives."""
    return torch.randperm(n, generator=generator(*parts))


def normal(keys: Sequence[int], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Standard normal rows, each a function of its own key alone.

    Args:
        keys: one seed per row.
        shape: of a row.
        like: gives device and dtype.
    Returns: (len(keys), *shape). Drawn row by row, so that a sample gets the same noise on any number of ranks.
    """
    rows = torch.empty((len(keys), *shape), device=like.device, dtype=like.dtype)
    if like.device.type == "meta":
        return rows
    source = torch.Generator(device=like.device)
    for row, seed in zip(rows, keys, strict=True):
        row.normal_(generator=source.manual_seed(seed))
    return rows


def uniform(keys: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Uniform rows in [0, 1), fp32, each a function of its own key alone.

    Args:
        keys: one seed per row.  shape: of a row.
    Returns: (len(keys), *shape).
    """
    rows = torch.empty((len(keys), *shape), device=device)
    if device.type == "meta":
        return rows
    source = torch.Generator(device=device)
    for row, seed in zip(rows, keys, strict=True):
        row.uniform_(generator=source.manual_seed(seed))
    return rows


def row_keys(seed: int, step: int, micro: int, rows: int, rank: int, world: int) -> tuple[int, ...]:
    """One key for each row of a micro-batch, by its place in the global batch: the same sample gets the same key on any world.

    Args:
        step: updates attempted so far.  micro: number of the micro-batch within the update.
    """
    return tuple(key(seed, "model", step, micro * world * rows + row * world + rank) for row in range(rows))
