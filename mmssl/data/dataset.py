"""Keyed samples: what a sample looks like depends on seed, epoch and index alone, not on who asks or when."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, count, pairwise
from typing import Any, NamedTuple

import pyarrow
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from mmssl.data.quarantine import Quarantine
from mmssl.data.sampler import Keys
from mmssl.data.sources import SHARD_ROWS, Source, content_key
from mmssl.errors import DataError, RecipeError
from mmssl.random import generator, key, permutation
from mmssl.registry import Modality, Views
from mmssl.types import Batch, Rejected


def start_worker(_: int) -> None:
    """For loader workers: one thread each, and deaf to signals, which reach the whole group, until the parent has saved."""
    torch.set_num_threads(1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


ATTEMPTS = 100  # replacements tried for one bad sample
IDLE_EPOCHS = 100  # of a reader without a row, after which it gives up


def decoded(kind: Modality, value: Any) -> Any:
    """The sample of a row's value. Raises: Rejected."""
    try:
        return kind.decode(value)
    except Rejected:
        raise
    except MemoryError:
        raise Rejected("too_large", "does not fit into memory") from None
    except Exception as error:  # decoders meet arbitrary bytes: whatever they raise is about this sample
        raise Rejected("unreadable", f"{type(error).__name__}: {error}") from None


class _Keyed:
    """Decoding, views and collation, the same for tables and streams."""

    def __init__(self, source: Source, kind: Modality, views: Views, seed: int, quarantine: Quarantine):
        self.source, self.kind, self.views, self.seed, self.quarantine = source, kind, views, seed, quarantine

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """`Batch.tensors()` of the samples' views, label (B,) int64, -1 = none, and of pairs content (B,) int64."""
        apart = ("index", "label", *["content"] * self.source.paired)
        views = self.views.collate([{k: v for k, v in sample.items() if k not in apart} for sample in samples])
        index, *rest = (torch.tensor([sample[name] for sample in samples]) for name in apart)
        return Batch(views, index).tensors() | dict(zip(apart[1:], rest, strict=True))

    def _sample(self, place: Any) -> dict[str, Any]:
        """The sample at that place, or the first good one of its substitutes. Raises: DataError if none is good.

        Only the sample asked for is counted: a bad substitute has its own turn in every epoch.
        """
        self.quarantine.seen()
        failed: list[str] = []
        for candidate in chain((place,), self._substitutes(place)):
            index = self._index(candidate)
            try:
                with self.quarantine.reading(index):
                    return self._at(candidate)
            except Rejected as bad:
                identity = self.source.identity(index)
                if not failed:
                    self.quarantine.record(identity, bad.kind, bad.reason)
                failed.append(f"{identity} ({bad})")
        names = "".join(f"\n  {name}" for name in list(dict.fromkeys(failed))[:10])
        raise DataError(f"data: neither a sample nor {ATTEMPTS} substitutes for it can be used. Among them:{names}")

    def _substitutes(self, place: Any) -> Iterator[Any]:
        """Keyed draws of other places."""
        raise NotImplementedError

    def _index(self, place: Any) -> int:
        """The position that the sample carries."""
        raise NotImplementedError

    def _at(self, place: Any) -> dict[str, Any]:
        """Views, index and label. Raises: Rejected."""
        raise NotImplementedError

    def _viewed(self, value: Any, label: int, index: int, where: tuple[int, ...], length: int | None = None) -> dict[str, Any]:
        """Views of one sample, drawn from the stream (seed, "augment", *where, view). Raises: Rejected."""
        sample = decoded(self.kind, value)
        views = self.views(sample, lambda view: generator(self.seed, "augment", *where, view), length)
        if not all(bool(t.isfinite().all()) for t in views.values() if t.is_floating_point()):
            raise Rejected("non_finite", "a view holds NaN or infinity")
        return {**views, "index": index, "label": label}


class KeyedDataset(_Keyed, Dataset):
    """Samples of a table or folder. Use with `batch_sampler=KeyBatches(...)` and `collate_fn=dataset.collate`."""

    def __len__(self) -> int:
        return self.source.size

    def __getitem__(self, place: tuple[int, ...]) -> dict[str, Any]:
        """Tensors of the sample's views, `index` and `label`, for a key `(epoch, index)` or `(epoch, index, length)`.

        A bad sample is replaced by draws from (seed, "replace", epoch, index, attempt), among those not shorter than the
        key's length if it has one; a substitute carries its own index. Raises: DataError if all substitutes are bad too.
        """
        return self._sample(place)

    def __getitems__(self, keys: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
        """The samples of a micro-batch. Where views draw something for all samples of an update, each carries its seed,
        `shared` () int64, if the keys tell which update that is, see `Keys`.
        """
        samples = [self[one] for one in keys]
        if isinstance(keys, Keys) and getattr(self.views, "shares", False):
            seed = torch.tensor(key(self.seed, "shared", keys.update))
            samples = [{**sample, "shared": seed} for sample in samples]
        return samples

    def _substitutes(self, place: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        epoch, index, *length = place
        pool = (self.source.lengths >= length[0]).nonzero() if length and self.source.lengths is not None else None
        for attempt in range(ATTEMPTS):
            draw = generator(self.seed, "replace", epoch, index, attempt)
            if pool is None:
                yield epoch, int(torch.randint(self.source.size, (), generator=draw))
            else:
                yield epoch, int(pool[torch.randint(len(pool), (), generator=draw)]), *length

    def _index(self, place: tuple[int, ...]) -> int:
        return place[1]

    def _at(self, place: tuple[int, ...]) -> dict[str, Any]:
        epoch, index, *length = place
        value = self.source.value(index)
        found = self._viewed(value, self.source.label_at(index), index, (epoch, index), *length)
        return found | {"content": content_key(value)} if self.source.paired else found


class _Row(NamedTuple):
    """A row of a stream within the block that was read with it."""

    epoch: int  # of its reader
    shard: int
    first: int  # row number of the block's first row
    place: int  # in the block
    block: pyarrow.Table | None  # None if it could not be read


class KeyedStream(_Keyed, IterableDataset):
    """Whole batches of a stream, the same for any number of workers. Use with `DataLoader(..., batch_size=None)`.

    The stream is read by `world * readers` logical readers. Batch n of a rank comes from its reader n % readers, and worker i
    of w serves batches i, i+w, ..., so that each reader belongs to one worker. Each epoch deals the shards anew; readers
    that must share a shard take turns in its rows. A reader permutes its rows within blocks, and when it runs out it begins
    its next epoch. To resume at batch n is to pass over rows; none is decoded.
    """

    def __init__(
        self, source: Source, kind: Modality, views: Views, seed: int, quarantine: Quarantine, *,
        micro_batch: int, batches: int, start: int = 0, rank: int = 0, world: int = 1, readers: int = 8, block: int = 1024,
    ):  # fmt: skip
        """Set the place in the stream.

        Args:
            micro_batch: samples of a batch.
            batches: micro-batches of this rank in the whole run; start: those already made.
            readers: logical readers of a rank, `data.readers`.
            block: rows that are permuted together, `data.block`.
        """
        super().__init__(source, kind, views, seed, quarantine)
        self.micro_batch, self.batches, self.start = micro_batch, batches, start
        self.rank, self.world, self.readers, self.block = rank, world, readers, block
        self.shards: int = source.rows.num_shards
        # Of a remote shard an OSError says that the connection broke, not that the shard is bad.
        self._broken = (pyarrow.ArrowException,) if source.root is None else (pyarrow.ArrowException, OSError)
        # Rows of each shard as far as known, so that a resume need not read it.
        bounds = [first for _, first in source.parts] + [source.total]
        self.lengths = {s: end - first for s, (first, end) in enumerate(pairwise(bounds))} if source.total else {}

    def __len__(self) -> int:
        """Batches of the whole run, those before `start` included."""
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """This worker's batches, from `start` on. Raises: RecipeError if workers cannot share the readers; DataError."""
        return map(self.collate, self.samples())

    def samples(self) -> Iterator[list[dict[str, Any]]]:
        """The samples of these batches."""
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if self.readers % workers:
            raise RecipeError(f"data.readers: {self.readers} is no multiple of data.workers={workers}.")
        opened: dict[int, Iterator[_Row]] = {}
        for n in range(self.start + worker, self.batches, workers):
            turn, reader = divmod(n, self.readers)
            if reader not in opened:
                opened[reader] = self._read(reader, turn * self.micro_batch)
            yield [self._sample(next(opened[reader])) for _ in range(self.micro_batch)]

    def _read(self, reader: int, skip: int) -> Iterator[_Row]:
        """All rows of a reader, for ever, without the first `skip`."""
        idle = 0
        for epoch in count():
            rows = 0
            for shard, turn, turns in self._owned(reader, epoch):
                if shard in self.lengths and skip >= (n := self._share(self.lengths[shard], turn, turns)):
                    skip, rows = skip - n, rows + n
                    continue
                first = 0
                for number, (size, block) in enumerate(self._blocks(shard)):
                    order = permutation(size, self.seed, "block", epoch, shard, number)[turn::turns]
                    for place in order[skip:].tolist():
                        yield _Row(epoch, shard, first, place, block)
                    skip, rows, first = max(0, skip - len(order)), rows + len(order), first + size
                self.lengths[shard] = first
            idle = 0 if rows else idle + 1
            if idle == IDLE_EPOCHS:
                raise DataError(f"data.readers: reader {reader} of {self.source.facts.get('path')} finds no rows; use fewer.")

    def _owned(self, reader: int, epoch: int) -> list[tuple[int, int, int]]:
        """Shards of a reader: (shard, turn, turns), where it takes every turns-th row from turn on."""
        order = permutation(self.shards, self.seed, "shards", epoch).tolist()
        number, readers = self.rank * self.readers + reader, self.world * self.readers
        if self.shards >= readers:
            return [(shard, 0, 1) for shard in order[number::readers]]
        turn, place = divmod(number, self.shards)
        return [(order[place], turn, len(range(place, readers, self.shards)))]

    def _share(self, length: int, turn: int, turns: int) -> int:
        """Rows that fall to a turn in a shard of that length."""
        whole, rest = divmod(length, self.block)
        return whole * len(range(turn, self.block, turns)) + len(range(turn, rest, turns))

    def _blocks(self, shard: int) -> Iterator[tuple[int, pyarrow.Table | None]]:
        """(rows, undecoded block) of a shard.

        If the shard breaks off, its other rows are bad ones, with None for a block, so that its length does not depend on what
        was read before; where that length is unknown, the shard is one bad sample and ends.
        """
        first = 0
        try:
            for block in self._tables(shard):
                yield len(block), block
                first += len(block)
        except self._broken as error:
            if shard not in self.lengths:
                self.quarantine.record(self.source.identity(shard * SHARD_ROWS + first), "unreadable", f"from here on: {error}")
            for start in range(first, self.lengths.get(shard, first), self.block):
                yield min(self.block, self.lengths[shard] - start), None

    def _tables(self, shard: int) -> Iterator[pyarrow.Table]:
        return self.source.rows.shard(self.shards, shard).with_format("arrow").iter(self.block)

    def _spare(self, row: _Row) -> _Row:
        """In the block that stands in for an unreadable one: the first of this shard, or of the next that has one."""
        for other in (*range(row.shard, self.shards), *range(row.shard)):
            with suppress(*self._broken):
                for block in self._tables(other):
                    return _Row(row.epoch, other, 0, 0, block)
        raise DataError(f"data.path: no shard of {self.source.facts.get('path')} can be read.")

    def _substitutes(self, place: _Row) -> Iterator[_Row]:
        """Rows of the same block, if that could be read."""
        near = self._spare(place) if place.block is None else place
        rows = len(near.block)  # type: ignore[arg-type]
        for attempt in range(ATTEMPTS):
            draw = generator(self.seed, "replace", *_where(place), attempt)
            yield near._replace(place=int(torch.randint(rows, (), generator=draw)))

    def _index(self, place: _Row) -> int:
        return place.shard * SHARD_ROWS + place.first + place.place

    def _at(self, place: _Row) -> dict[str, Any]:
        if place.block is None:
            raise Rejected("unreadable", "its shard breaks off before it")
        (row,) = place.block.slice(place.place, 1).to_pylist()
        return self._viewed(self.source.content(row), self.source.label_of(row), self._index(place), _where(place))


def _where(row: _Row) -> tuple[int, int, int]:
    return row.epoch, row.shard, row.first + row.place
