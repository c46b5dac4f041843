"""Tables and Hub data sets as sources: one column of content or of file names, perhaps one of labels."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import torch

from mmssl.config import DataOptions
from mmssl.data.sources.columns import classes_of, columns_of, label_column, media_column
from mmssl.data.sources.folders import TABLES
from mmssl.data.sources.loading import load_splits, mended, one_line
from mmssl.data.sources.source import Source, finished, lies_inside, spread
from mmssl.errors import RecipeError
from mmssl.registry import Modality

FILES = ("file_name", "filename", "path", "file", "filepath")  # columns that hold file names whatever these look like
SAMPLED_SHARDS = 32  # of a stream, when only `limit` samples of it are wanted


def from_tables(
    options: DataOptions, kind: Modality, path: Path, suffix: str, found: dict[str, list[Path]], split: str
) -> Source:
    """Table files; those that hold file names may say where these are with `data.root`."""
    for file in (file for files in found.values() for file in files):
        if not os.access(file, os.R_OK):
            raise RecipeError(f"data.path: {file} cannot be read. Give read permission or remove it.")
    more = {"sep": "\t"} if suffix == ".tsv" else {}
    files = {name: [glob.escape(str(file)) for file in files] for name, files in found.items()}
    parts, first = [], 0
    for file in found[split]:
        parts.append((str(file), first))
        first += _length(file) if suffix == ".parquet" else 0
    if suffix != ".parquet" and not options.streaming and len(parts) > 1:
        parts = [(f"{path} {split}", 0)]  # rows of each file are not known
    every = load_splits(options, TABLES[suffix], data_files=files, **more)
    root = Path(options.root).expanduser() if options.root else path if path.is_dir() else path.parent
    if not root.is_dir():
        raise RecipeError(f"data.root: {options.root} is no folder. Give the folder that the file names start from.")
    return from_columns(options, kind, suffix[1:], every, split, str(root), tuple(parts), first)


def _length(file: Path) -> int:
    try:
        return pyarrow.parquet.read_metadata(file).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise RecipeError(
            f"data.path: {file} is no whole parquet file ({one_line(error)}). Fetch it again or remove it."
        ) from None


def from_columns(
    options: DataOptions, kind: Modality, what: str, every: Mapping[str, Any], split: str,
    root: str | None, parts: tuple[tuple[str, int], ...], total: int = 0,
) -> Source:  # fmt: skip
    """A source from the splits of a table or Hub data set."""
    with mended(options):
        features = {name: columns_of(rows) for name, rows in every.items() if not options.streaming or name == split}
    column = media_column(features[split], options, kind)
    rows = every[split]
    feature = features[split][column]
    if hasattr(feature, "decode"):  # images, audio: bytes or path, decoded by the modality
        rows, feature = rows.cast_column(column, replace(feature, decode=False)), None
    label = label_column(features[split], options, column)
    classes, order = classes_of(options, label, features[split], [every[name] for name in features if label in features[name]])
    label = label if order else None
    labels = None
    if options.streaming:
        rows = rows.select_columns([column] + ([label] if label else []))
        if options.limit:
            rows, parts = _sampled(rows, options), (parts[0],)
    if isinstance(rows, datasets.Dataset):
        if not len(rows):
            raise RecipeError(f"data.path: the split {split!r} of {options.path} has no rows.")
        if label:
            labels = torch.tensor([order.get(value, -1) for value in _values(rows, label)])
        rows = rows.select_columns([column])
    names = _holds_names(rows, column, feature, kind, options)
    total = len(rows) if isinstance(rows, datasets.Dataset) else total
    source = Source(rows, column, label, len(order), {}, order, labels, root, names, parts, total)
    if names and isinstance(rows, datasets.Dataset) and root is not None:
        _check_names(source)
    return finished(source, options, what, split, classes)


def _values(rows: Any, column: str) -> list[Any]:
    """A whole column, of which nothing is decoded."""
    return rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()


def _holds_names(rows: Any, column: str, feature: Any, kind: Modality, options: DataOptions) -> bool:
    """Whether a text column holds file names: it is called so, or its first value ends like one.

    Where text itself is learned from, a sentence may end in "README.md": a name is then a single word.
    """
    if not (isinstance(feature, datasets.Value) and "string" in feature.dtype):
        return False
    if column in FILES:
        return True
    with mended(options):
        first = next((row[column] for row in rows.take(100) if row[column]), "")
    one_word = not re.search(r"\s", first) or "text" not in kind.columns
    return "\n" not in first and one_word and first.lower().endswith(kind.suffixes)


def _check_names(source: Source) -> None:
    """Refuse a table that names files outside its root."""
    for name in _values(source.rows, source.column):
        if name and not lies_inside(str(source.root), name):
            raise RecipeError(
                f"data.root: the table names {name!r}, which lies outside {source.root}. If that is meant, set data.root= to "
                "the folder that holds all files."
            )


def _sampled(rows: datasets.IterableDataset, options: DataOptions) -> datasets.Dataset:
    """`limit` rows of a stream, held in memory: the beginnings of evenly spread shards."""
    limit = int(options.limit or 0)
    shards = spread(min(rows.num_shards, SAMPLED_SHARDS, limit), rows.num_shards)
    with mended(options):
        found = [row for s in shards for row in rows.shard(rows.num_shards, s).take(-(-limit // len(shards)))][:limit]
        return datasets.Dataset.from_list(found, features=rows.features) if found else datasets.Dataset.from_list([])
