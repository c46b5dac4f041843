"""Where samples come from: folders, tables and Hub data sets, all as a `datasets` data set of undecoded values."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import datasets

from mmssl.config import DataOptions
from mmssl.data.sources.folders import TABLES, choose_split, find_files, from_files
from mmssl.data.sources.loading import load_splits, mended
from mmssl.data.sources.source import SHARD_ROWS, Source, content_key
from mmssl.data.sources.tables import from_columns, from_tables
from mmssl.errors import RecipeError
from mmssl.registry import Modality

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

__all__ = ["SHARD_ROWS", "Source", "content_key", "open_source", "splits"]


def open_source(options: DataOptions, kind: Modality, split: str) -> Source:
    """One split of the data that the recipe names.

    Returns: a map-style source, or a stream if `data.streaming` and neither a folder of files nor `data.limit` is given.
    Raises: RecipeError naming key or file and the mend.
    """
    path = _local(options)
    if path is not None:
        suffix, found = find_files(path, kind)
        if suffix is None:
            return from_files(options, kind, path, found, choose_split(found, split, options))
        return from_tables(options, kind, path, suffix, found, choose_split(found, split, options))
    every = load_splits(options, str(options.path), options.config, revision=options.revision)
    name = choose_split(every, split, options)
    return from_columns(options, kind, "hub", every, name, None, ((f"{options.path} {name}", 0),))


def splits(options: DataOptions, kind: Modality) -> list[str]:
    """Names of the splits that exist. Raises: RecipeError as `open_source`."""
    path = _local(options)
    if path is not None:
        return sorted(find_files(path, kind)[1])
    with mended(options):
        return sorted(datasets.get_dataset_split_names(str(options.path), options.config, revision=options.revision))


def _local(options: DataOptions) -> Path | None:
    """The path, or None if `data.path` is a Hub id."""
    if not options.path:
        raise RecipeError("data.path: missing; give a folder, a table or a Hub data set id, for example data=photos/.")
    path = Path(options.path).expanduser()
    if path.exists():
        return path
    if HUB_ID.fullmatch(options.path) and not path.parent.exists():
        return None
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, 1)
    raise RecipeError(
        f"data.path: {options.path} does not exist{f' (did you mean {path.parent / close[0]}?)' if close else ''}. "
        f"Give a folder, a table ({', '.join(TABLES)}) or a Hub id ORG/NAME."
    )
