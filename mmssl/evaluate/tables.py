"""Rows of embeddings as a file: parquet, NumPy or safetensors."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from safetensors.torch import save_file

from mmssl.data.sources import Source

FORMATS = (".parquet", ".npy", ".safetensors")
Shards = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]  # (T, D) rows; (n,) how many each sample has, 0 = unusable


def write_rows(out: Path, shards: Shards, source: Source, ragged: bool) -> None:
    """Write the file, whole or not at all, and what its rows are: columns of a parquet, `NAME.rows.csv` beside others.

    Args:
        ragged: whether a sample may have several rows. Then parquet has lists of them, NumPy (N, L, D), and safetensors
            `embedding` (T, D) with `offsets` (N + 1,), where each sample begins; otherwise all are (N, D).
    """
    aside = out.with_name(f".tmp-{out.name}")
    try:
        if out.suffix == ".parquet":
            _parquet(aside, shards, source, ragged)
        else:
            (_npy if out.suffix == ".npy" else _safetensors)(aside, shards, source.size, ragged)
            _csv(out.with_name(f"{out.name}.rows.csv"), shards, source)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


def _shape(shards: Shards) -> tuple[int, int, np.dtype]:
    """Rows of a sample, D and dtype of the first that has any."""
    return next((int(count.max()), rows.shape[1], rows.dtype) for rows, count in shards() if len(rows))


def _spread(rows: np.ndarray, count: np.ndarray, tokens: int, width: int) -> np.ndarray:
    """(n, tokens, D), NaN for samples without rows."""
    found = np.full((len(count), tokens, width), np.nan, rows.dtype)
    if len(rows):
        found[count > 0] = rows.reshape(-1, tokens, width)
    return found


def _npy(path: Path, shards: Shards, size: int, ragged: bool) -> None:
    tokens, width, dtype = _shape(shards)
    shape = (size, tokens, width) if ragged else (size, width)
    with path.open("wb") as file:  # piece by piece: the whole may not fit into memory
        np.lib.format.write_array_header_1_0(file, {"descr": dtype.str, "fortran_order": False, "shape": shape})
        for rows, count in shards():
            file.write(np.ascontiguousarray(_spread(rows.astype(dtype), count, tokens, width)).tobytes())


def _safetensors(path: Path, shards: Shards, size: int, ragged: bool) -> None:
    """All at once in memory, unlike the others."""
    if ragged:
        counts = np.concatenate([count for _, count in shards()])
        offsets = torch.from_numpy(np.concatenate([[0], counts.cumsum()]))
        rows = np.concatenate([rows for rows, _ in shards() if len(rows)])
        save_file({"embedding": torch.from_numpy(rows), "offsets": offsets}, path)
    else:
        _, width, dtype = _shape(shards)
        whole = [_spread(rows.astype(dtype), count, 1, width)[:, 0] for rows, count in shards()]
        save_file({"embedding": torch.from_numpy(np.concatenate(whole))}, path)


def _facts(source: Source, index: int) -> dict[str, object]:
    label = source.label_at(index)
    names = source.facts.get("classes") or []
    known = 0 <= label < len(names)
    told = {"label": label, "class": names[label]} if known else {"label": None, "class": None}
    return {"row": index, "name": source.identity(index), **told}


def _csv(path: Path, shards: Shards, source: Source) -> None:
    usable = np.concatenate([count > 0 for _, count in shards()])
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, ["row", "name", "label", "class", "usable"])
        table.writeheader()
        table.writerows({**_facts(source, i), "usable": str(bool(usable[i])).lower()} for i in range(source.size))


def _parquet(path: Path, shards: Shards, source: Source, ragged: bool) -> None:
    _, width, dtype = _shape(shards)
    row = pyarrow.list_(pyarrow.from_numpy_dtype(dtype), width)
    columns = {"row": pyarrow.int64(), "name": pyarrow.string(), "label": pyarrow.int64(), "class": pyarrow.string()}
    schema = pyarrow.schema({**columns, "embedding": pyarrow.list_(row) if ragged else row})
    first = 0
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for rows, count in shards():
            facts = [_facts(source, index) for index in range(first, first + len(count))]
            lists = _lists(rows.astype(dtype), count, row, ragged)
            arrays = [pyarrow.array([fact[name] for fact in facts], kind) for name, kind in columns.items()]
            writer.write_table(pyarrow.Table.from_arrays([*arrays, lists], schema=schema))
            first += len(count)


def _lists(rows: np.ndarray, count: np.ndarray, row: pyarrow.DataType, ragged: bool) -> pyarrow.Array:
    """A list of rows, or a row, of each sample; null if it has none."""
    flat = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), type=row)
    if not ragged:
        places = np.where(count > 0, np.cumsum(count > 0) - 1, -1)
        return flat.take(pyarrow.array(places, pyarrow.int64(), mask=count == 0))
    offsets = np.concatenate([[0], count.cumsum()]).astype(np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets, mask=np.append(count == 0, False)), flat)
