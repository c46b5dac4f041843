"""First in, first out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl.distributed import rank, world
from mmssl.parts.part import Staged, finite_rows
from mmssl.random import generator


def keyed_rows(count: int, dim: int, *key: int | str) -> Tensor:
    """(count, dim) Gaussian rows of length 1, drawn by key; empty on the meta device."""
    rows = torch.empty(count, dim)
    if rows.is_meta:
        return rows
    return F.normalize(rows.normal_(generator=generator(*key, device=rows.device)), dim=1)


class Queue(Staged):
    """The latest rows of length 1 of all ranks with the ids of their samples, equal on all ranks.

    What is pushed in the forward is written after the update, if it is applied: the loss reads the queue as it was. Rows that
    are not finite are not written, their places keep what they held. Until it is full, the rest are Gaussian rows of
    length 1 with id -1.

    Args:
        size: rows.  dim: of a row.
        newest_first: a batch is put before the older ones, as in SwAV, and not behind them, as in MoCo.
        seed: of the rows at the start.
    Source: arXiv:1911.05722, section 3.2; arXiv:2006.09882, section 4.
    """

    rows: Tensor
    ids: Tensor

    def __init__(self, size: int, dim: int, newest_first: bool = False, seed: int = 0):
        super().__init__()
        if size < 1:
            raise ValueError(f"queue: {size} rows, must be at least 1")
        self.newest_first = newest_first
        self.written = 0  # rows since the start; known without asking the device, and saved as extra state
        self.register_buffer("rows", keyed_rows(size, dim, "queue", seed))
        self.register_buffer("ids", torch.full((size,), -1))

    @property
    def pointer(self) -> int:
        """Place of the row that is written next, or, newest first, that was written last."""
        return (-self.written if self.newest_first else self.written) % len(self.rows)

    @property
    def count(self) -> int:
        """Rows that hold samples."""
        return min(self.written, len(self.rows))

    @property
    def is_full(self) -> bool:
        """Whether no row of the start is left."""
        return self.written >= len(self.rows)

    def check_batch(self, samples: int) -> None:
        """Whether a micro-batch of all ranks with that many samples fits. Raises: ValueError."""
        if samples > len(self.rows):
            raise ValueError(
                f"queue: {len(self.rows)} rows, must hold at least the {samples} samples of a micro-batch (of all ranks); "
                "lengthen it or lower train.micro_batch"
            )

    def read(self, own: bool = False) -> Tensor:
        """(size, D) rows, in the order of the ring, or newest first.

        Args:
            own: this rank's share alone, every world-th row, for losses that sum over ranks.
        Raises: ValueError if ranks cannot have equal shares.
        """
        return self._ordered(self.rows, own)

    def read_ids(self, own: bool = False) -> Tensor:
        """(size,) int64 ids of the rows that `read` gives, -1 where there was no sample yet."""
        return self._ordered(self.ids, own)

    def _ordered(self, of: Tensor, own: bool) -> Tensor:
        if own and len(of) % world():
            raise ValueError(f"queue: {len(of)} rows, must be a multiple of the {world()} ranks")
        of = of.roll(-self.pointer, 0) if self.newest_first else of
        return of[rank() :: world()] if own else of

    def push(self, rows: Tensor, ids: Tensor) -> None:
        """Write after the update.

        Args:
            rows: (B, D) of this rank, no gradient; normalised here.  ids: (B,) int64 of their samples.
        Raises: ValueError if the batch of all ranks is longer than the queue.
        """
        self.check_batch(len(rows) * world())
        self.stage(F.normalize(rows.to(self.rows.dtype), dim=1), ids)

    def commit(self, *rows: Tensor) -> None:
        """In one piece, around the end."""
        new, ids = rows
        first = self.pointer - len(new) if self.newest_first else self.pointer
        places = torch.arange(first, first + len(new), device=new.device) % len(self.rows)
        old = self.rows[places]
        kept = finite_rows(new, old)
        self.ids[places] = torch.where(new.isfinite().all(1), ids, self.ids[places])
        self.rows[places] = kept
        self.written += len(new)

    def get_extra_state(self) -> Tensor:
        """() int64 rows written."""
        return torch.tensor(self.written)

    def set_extra_state(self, state: Tensor) -> None:
        """The inverse."""
        self.written = int(state)
