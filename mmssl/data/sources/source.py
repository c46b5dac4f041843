"""One split of the data as undecoded values, whatever they came from."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, NamedTuple

import datasets
import datasets.config
import fsspec
import numpy as np
import pyarrow
import pyarrow.compute
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from torch import Tensor

from mmssl.config import DataOptions
from mmssl.types import Rejected

ARCHIVES = {"zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4"}  # that an address may look into
SHARD_ROWS = 1 << 32  # index of a stream's row = shard * SHARD_ROWS + row


class Source(NamedTuple):
    """One split: undecoded values, labels if there are any."""

    rows: Any  # datasets.Dataset of the media column; datasets.IterableDataset of a stream, with its label column
    column: str  # holds the media
    label: str | None = None  # label column, of a folder "label"
    classes: int = 0  # distinct labels in all splits
    facts: dict[str, Any] = {}  # path, kind, split, count, column, label, classes; for data.json
    order: dict[Any, int] = {}  # label value -> 0..classes-1
    labels: Tensor | None = None  # (n,) int64, -1 = none; not for streams
    root: str | None = None  # folder that file names must not leave; None for the Hub
    names: bool = False  # whether the column holds file names
    parts: tuple[tuple[str, int], ...] = ()  # name and first row of each table
    total: int = 0  # rows before `data.limit`; 0 for a stream of unknown length
    paired: bool = False  # whether row i belongs to row i of another source: none may be cut, joined or left out
    lengths: Tensor | None = None  # (n,) int64 in the unit of `Views.longest`, -1 = never drawn; set by `Modality.prepare`

    @property
    def streaming(self) -> bool:
        """Whether rows come in order only."""
        return isinstance(self.rows, datasets.IterableDataset)

    @property
    def size(self) -> int:
        """Samples. Raises: TypeError for a stream, whose length is unknown."""
        return len(self.rows)

    def value(self, index: int) -> str | bytes:
        """What `Modality.decode` takes: a path, or content in bytes. Raises: Rejected if there is none."""
        return self.content(self.rows[index])

    def content(self, row: Mapping[str, Any]) -> str | bytes:
        """The same, from a row. Text in a table is content: a str is always a path."""
        value = row[self.column]
        if isinstance(value, dict):
            inside = value.get("bytes")
            return self._file(value.get("path")) if inside is None else inside
        if value is None:
            raise Rejected("empty", "no value")
        if self.names:
            return self._file(value)
        return value.encode() if isinstance(value, str) else value

    def absent(self) -> Tensor:
        """(n,) bool: rows without content, found without reading any. Raises: TypeError for a stream."""
        compute: Any = pyarrow.compute
        column = self.rows.data.column(self.column)
        struct = pyarrow.types.is_struct(column.type)
        names = [field.name for field in column.type if field.name in ("bytes", "path")] if struct else []
        parts = [compute.struct_field(column, name) for name in names] or [column]
        sizes = [compute.fill_null(compute.binary_length(part), 0).to_numpy() for part in parts]
        none = torch.from_numpy(np.sum(sizes, 0) == 0)
        kept = self.rows._indices  # of a limit
        return none if kept is None else none[torch.from_numpy(kept.column(0).to_numpy().astype(np.int64))]

    def label_at(self, index: int) -> int:
        """Class of a sample, 0..classes-1; -1 if it has none."""
        return -1 if self.labels is None else int(self.labels[index])

    def label_of(self, row: Mapping[str, Any]) -> int:
        """The same, from a row of a stream."""
        return -1 if self.label is None else self.order.get(row[self.label], -1)

    def identity(self, index: int) -> str:
        """A name to find the sample by: its file, or `train.parquet row 17`."""
        if self.streaming:
            shard, row = divmod(index, SHARD_ROWS)
            name = self.parts[shard][0] if shard < len(self.parts) else f"{self.facts.get('path')} shard {shard}"
            return f"{name} row {row}"
        if self.names:
            name = self.rows[index][self.column]
            return os.fsencode(os.path.join(self.root or "", os.fsdecode(name))).decode(errors="replace")
        row = index * self.total // self.size
        name, first = self.parts[bisect_right(self.parts, row, key=lambda part: part[1]) - 1]
        return f"{name} row {row - first}"

    def _file(self, name: str | bytes | None) -> str | bytes:
        if not name:
            raise Rejected("empty", "no file name")
        name = os.fsdecode(name)
        if self.root is not None:
            if not lies_inside(self.root, name):
                raise Rejected("wrong_type", f"{name} lies outside {self.root}; data.root=FOLDER allows another folder")
            return os.path.join(self.root, name)
        if not _fetched(name):
            raise Rejected("wrong_type", f"{name} is no file of the Hub")
        if "://" in name:  # a stream from the Hub names its files by address
            opened: Any = fsspec.open(name, "rb")
            with opened as file:
                return file.read()
        return name


def content_key(value: Any) -> int:
    """63 bits, equal for equal content: text, bytes, or the name of a file."""
    content = value if isinstance(value, bytes) else os.fsencode(value) if isinstance(value, str) else repr(value).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little") >> 1


def finished(source: Source, options: DataOptions, what: str, split: str, classes: list[str]) -> Source:
    """Evenly spread `limit` samples, and the facts."""
    rows, labels = source.rows, source.labels
    if isinstance(rows, datasets.Dataset) and options.limit is not None and options.limit < len(rows):
        kept = spread(options.limit, len(rows))
        rows, labels = rows.select(kept), None if labels is None else labels[kept]
    facts = {
        "path": options.path,
        "kind": what,
        "split": split,
        "count": len(rows) if isinstance(rows, datasets.Dataset) else None,
        "column": source.column,
        "label": source.label,
        "classes": [os.fsencode(name).decode(errors="replace") for name in classes] if source.label else [],
    }
    return source._replace(rows=rows, labels=labels, facts=facts)


def spread(count: int, of: int) -> list[int]:
    """As many of the positions below `of`, at even distances."""
    return [i * of // count for i in range(count)]


def _fetched(name: str) -> bool:
    """Whether a Hub data set names a file of its own: one that was fetched from there, or an address there.

    Addresses may be chained, such as `zip://a.png::hf://...`; a row could name any file of this machine otherwise.
    """
    if "://" in name:
        schemes = [link.partition("://")[0] for link in name.split("::")]
        return schemes[-1] in ("hf", "https") and {*schemes[:-1]} <= ARCHIVES
    caches = (datasets.config.HF_DATASETS_CACHE, datasets.config.DOWNLOADED_DATASETS_PATH, HF_HUB_CACHE)
    return any(lies_inside(str(cache), name) for cache in caches)


def lies_inside(root: str, name: str) -> bool:
    """By the text alone: links within the root may lead anywhere."""
    root = os.path.abspath(root)
    return os.path.commonpath([root, os.path.abspath(os.path.join(root, name))]) == root
