"""Where samples come from: folders, tables and Hub data sets, all as a `datasets` data set of undecoded values."""

from __future__ import annotations

import difflib
import glob
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import datasets.config
import fsspec
import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from mmssl.config import DataOptions
from mmssl.errors import MmsslError, RecipeError, storage_error
from mmssl.registry import Modality
from mmssl.types import Rejected

LABELS = ("label", "labels", "class", "fine_label", "category", "target")  # usual names of label columns
FILES = ("file_name", "filename", "path", "file", "filepath")  # columns that hold file names whatever these look like
TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}  # best first
SPLITS = {  # synonyms as `datasets` knows them
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
    "unlabeled": ("unlabeled", "unlabelled", "unsupervised", "extra"),
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SHARD_ROWS = 1 << 32  # index of a stream's row = shard * SHARD_ROWS + row
SAMPLED_SHARDS = 32  # of a stream, when only `limit` samples of it are wanted


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
            if not _inside(self.root, name):
                raise Rejected("wrong_type", f"{name} lies outside {self.root}; data.root=FOLDER allows another folder")
            return os.path.join(self.root, name)
        if "://" in name:  # a stream from the Hub names its files by address
            opened: Any = fsspec.open(name, "rb")
            with opened as file:
                return file.read()
        return name


def open_source(options: DataOptions, kind: Modality, split: str) -> Source:
    """One split of the data that the recipe names.

    Returns: a map-style source, or a stream if `data.streaming` and neither a folder of files nor `data.limit` is given.
    Raises: RecipeError naming key or file and the mend.
    """
    path = _local(options)
    if path is not None:
        suffix, found = _found(path, kind)
        if suffix is None:
            return _from_files(options, kind, path, found, _chosen(found, split, options))
        return _from_tables(options, kind, path, suffix, found, _chosen(found, split, options))
    every = _loaded(options, str(options.path), options.config, revision=options.revision)
    name = _chosen(every, split, options)
    return _from_columns(options, kind, "hub", every, name, None, ((f"{options.path} {name}", 0),))


def splits(options: DataOptions, kind: Modality) -> list[str]:
    """Names of the splits that exist. Raises: RecipeError as `open_source`."""
    path = _local(options)
    if path is not None:
        return sorted(_found(path, kind)[1])
    with _mended(options):
        return sorted(datasets.get_dataset_split_names(str(options.path), options.config, revision=options.revision))


# Folders and tables -------------------------------------------------------------------------------------------------


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


def _found(path: Path, kind: Modality) -> tuple[str | None, dict[str, list[Path]]]:
    """Suffix of the tables, None for media files, and the files (or the folder) of each split."""
    if path.is_file():
        if path.suffix.lower() in TABLES:
            return path.suffix.lower(), {"train": [path]}
        if path.suffix.lower() in kind.suffixes:
            return None, {"train": [path]}
        raise _nothing(path, [path.name], kind)
    folders = _split_folders(path)
    # Parquet holds the data itself; a csv or json beside media files may be anything, so media come first there.
    if not _parquet_at(path, path / "data", *folders.values()):
        media = {name: [folder] for name, folder in (folders or {"train": path}).items()}
        if any(name.lower().endswith(kind.suffixes) for (folder,) in media.values() for name in _walk(folder)):
            return None, media
    names = list(_walk(path))
    for suffix in TABLES:
        tables = [name for name in names if name.lower().endswith(suffix)]
        if tables:
            return suffix, _by_split(path, tables)
    raise _nothing(path, names, kind)


def _from_files(options: DataOptions, kind: Modality, path: Path, found: dict[str, list[Path]], split: str) -> Source:
    """Media files; sub-folders are classes if every file lies in one and there are two or more."""
    (place,) = found[split]
    root, names = (place.parent, [place.name]) if place.is_file() else (place, list(_walk(place)))
    media = [name for name in names if name.lower().endswith(kind.suffixes)]
    if not media:
        raise _nothing(place, names, kind)
    # The folders of all splits count, so that a class has one number in each.
    classes = sorted({entry.name for (folder,) in found.values() if folder.is_dir() for entry in _folders(folder)})
    order = {name: i for i, name in enumerate(classes)} if len(classes) > 1 and all("/" in name for name in media) else {}
    labels = torch.tensor([order[name.split("/", 1)[0]] for name in media]) if order else None
    # File names are bytes: not every one is valid text.
    rows = datasets.Dataset.from_dict({"file": [os.fsencode(name) for name in media]})
    label = "label" if order else None
    source = Source(rows, "file", label, len(order), {}, order, labels, str(root), names=True, total=len(media))
    return _finished(source, options, "folder", split, classes)


def _from_tables(
    options: DataOptions, kind: Modality, path: Path, suffix: str, found: dict[str, list[Path]], split: str
) -> Source:
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
    every = _loaded(options, TABLES[suffix], data_files=files, **more)
    root = Path(options.root).expanduser() if options.root else path if path.is_dir() else path.parent
    if not root.is_dir():
        raise RecipeError(f"data.root: {options.root} is no folder. Give the folder that the file names start from.")
    return _from_columns(options, kind, suffix[1:], every, split, str(root), tuple(parts), first)


def _length(file: Path) -> int:
    try:
        return pyarrow.parquet.read_metadata(file).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise RecipeError(
            f"data.path: {file} is no whole parquet file ({_line(error)}). Fetch it again or remove it."
        ) from None


def _walk(folder: Path, inside: str = "", above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Names of all files below `folder`, relative to it, sorted; nothing hidden, and no link back to a folder above."""
    real = os.path.realpath(folder / inside)
    if real in above:
        return
    for entry in _entries(folder / inside):
        if entry.is_dir():
            yield from _walk(folder, f"{inside}{entry.name}/", above | {real})
        else:
            yield inside + entry.name


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise RecipeError(f"data.path: {folder} cannot be read ({error.strerror}). Give read permission or move it.") from None


def _folders(folder: Path) -> list[os.DirEntry[str]]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _parquet_at(*folders: Path) -> bool:
    return any(entry.name.lower().endswith(".parquet") for folder in folders if folder.is_dir() for entry in _entries(folder))


def _split_folders(path: Path) -> dict[str, Path]:
    """Split -> sub-folder, if two sub-folders or all of them are named like splits (one alone may be a class: a train)."""
    names = [entry.name for entry in _folders(path)]
    known = [name for name in names if _split(name)]
    if len(known) < 2 and known != names:
        return {}
    found: dict[str, Path] = {}
    for name in sorted(names, key=lambda name: name != _split(name)):  # exact names first: `eval` is `test` only without one
        split = _split(name) or name
        found[name if split in found else split] = path / name
    return found


def _by_split(path: Path, tables: Iterable[str]) -> dict[str, list[Path]]:
    """Tables by the split that a folder or a word of the file name tells; all are `train` if none does."""
    found: dict[str, list[Path]] = {}
    for name in tables:
        *folders, file = name.split("/")
        sharded = re.match(r"(\w+)-\d{5}-of-\d{5}", file)
        words = [*folders, *re.split(r"[^A-Za-z]+", file)]
        split = next(filter(None, map(_split, words)), sharded[1] if sharded else "")
        found.setdefault(split, []).append(path / name)
    rest = found.pop("", [])
    return found or {"train": rest}


def _split(word: str) -> str | None:
    return next((split for split, words in SPLITS.items() if word.lower() in words), None)


def _chosen(every: Iterable[str], split: str, options: DataOptions) -> str:
    """The key of `every` that means `split`. Raises: RecipeError with those that exist."""
    names = list(every)
    for name in (split, _split(split)):
        if name in names:
            return str(name)
    raise RecipeError(f"data.split: {options.path} has no split {split!r}; there {_is(names)} {', '.join(sorted(names))}.")


def _is(names: list[str]) -> str:
    return "are" if len(names) > 1 else "is only"


def _nothing(path: Path, names: list[str], kind: Modality) -> RecipeError:
    wanted = f"files of {kind.name} end in {', '.join(kind.suffixes)}, tables in {', '.join(TABLES)}"
    if not names:
        return RecipeError(f"data.path: {path} is empty; {wanted}.")
    suffixes = Counter(Path(name).suffix.lower() or "no suffix" for name in names).most_common(5)
    there = ", ".join(f"{n} with {suffix}" if suffix == "no suffix" else f"{n} {suffix}" for suffix, n in suffixes)
    return RecipeError(f"data.path: {path} holds nothing usable for data.modality={kind.name} (found {there}); {wanted}.")


# Columns and labels -------------------------------------------------------------------------------------------------


def _from_columns(
    options: DataOptions, kind: Modality, what: str, every: Mapping[str, Any], split: str,
    root: str | None, parts: tuple[tuple[str, int], ...], total: int = 0,
) -> Source:  # fmt: skip
    """A source from the splits of a table or Hub data set."""
    with _mended(options):
        features = {name: _features(rows) for name, rows in every.items() if not options.streaming or name == split}
    column = _column(features[split], options, kind)
    rows = every[split]
    feature = features[split][column]
    if hasattr(feature, "decode"):  # images, audio: bytes or path, decoded by the modality
        rows, feature = rows.cast_column(column, replace(feature, decode=False)), None
    label = _label(features[split], options, column)
    classes, order = _classes(options, label, features[split], [every[name] for name in features if label in features[name]])
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
    return _finished(source, options, what, split, classes)


def _finished(source: Source, options: DataOptions, what: str, split: str, classes: list[str]) -> Source:
    """Evenly spread `limit` samples, and the facts."""
    rows, labels = source.rows, source.labels
    if isinstance(rows, datasets.Dataset) and options.limit is not None and options.limit < len(rows):
        kept = _spread(options.limit, len(rows))
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


def _values(rows: Any, column: str) -> list[Any]:
    """A whole column, of which nothing is decoded."""
    return rows.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()


def _spread(count: int, of: int) -> list[int]:
    return [i * of // count for i in range(count)]


def _features(rows: Any) -> Mapping[str, Any]:
    """Columns and their types; a stream of csv tells them only by its first rows."""
    return rows.features or datasets.Dataset.from_list(list(rows.take(100))).features


def _column(features: Mapping[str, Any], options: DataOptions, kind: Modality) -> str:
    wanted = [options.column] if options.column else kind.columns
    for name in wanted:
        if name in features:
            if not _usable(features[name]):
                raise RecipeError(
                    f"data.column: {name!r} of {options.path} holds {features[name]}, not files, bytes or text. "
                    f"Choose one of {', '.join(features)} with data.column=."
                )
            return name
    raise RecipeError(
        f"data.column: {options.path} has no column {' or '.join(map(repr, wanted))}; its columns are {', '.join(features)}. "
        "Choose one with data.column=."
    )


def _usable(feature: Any) -> bool:
    if isinstance(feature, datasets.Value):
        return feature.dtype in ("string", "large_string", "binary", "large_binary")
    return hasattr(feature, "decode") or (isinstance(feature, dict) and "bytes" in feature)


def _label(features: Mapping[str, Any], options: DataOptions, column: str) -> str | None:
    """The label column: the one named, or the first usual one that holds classes."""
    if options.label is None:
        return next(
            (name for name in LABELS if name in features and name != column and _is_class(features[name], options)), None
        )
    if options.label not in features:
        raise RecipeError(f"data.label: {options.path} has no column {options.label!r}; its columns are {', '.join(features)}.")
    if not _is_class(features[options.label], options):
        raise RecipeError(
            f"data.label: {options.label!r} holds {features[options.label]}, not classes. Labels are names or whole numbers; "
            "those of a stream must be a ClassLabel, since its classes are not known beforehand (or set data.streaming=false)."
        )
    return options.label


def _is_class(feature: Any, options: DataOptions) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    countable = ("string", "large_string", "bool", "int", "uint")
    return not options.streaming and isinstance(feature, datasets.Value) and feature.dtype.rstrip("0123456789") in countable


def _classes(
    options: DataOptions, label: str | None, features: Mapping[str, Any], every: list[Any]
) -> tuple[list[str], dict[Any, int]]:
    """Names of the classes, and label value -> number; of all splits, so that a class has one number in each."""
    if label is None:
        return [], {}
    if isinstance(features[label], datasets.ClassLabel):
        return list(features[label].names), {i: i for i in range(features[label].num_classes)}
    values = {value for rows in every for value in rows.unique(label)} - {None}
    if features[label].dtype.startswith("int"):
        values = {value for value in values if value >= 0}  # -1 means unlabelled
    try:
        found = sorted(values)
    except TypeError:
        raise RecipeError(f"data.label: {label!r} has another type in each split of {options.path}; make them agree.") from None
    if len(found) < 2:
        if options.label is not None:
            raise RecipeError(f"data.label: {label!r} of {options.path} holds fewer than two classes; leave it out.")
        return [], {}
    return [str(value) for value in found], {value: i for i, value in enumerate(found)}


def _holds_names(rows: Any, column: str, feature: Any, kind: Modality, options: DataOptions) -> bool:
    """Whether a text column holds file names: it is called so, or its first value ends like one.

    Where text itself is learned from, a sentence may end in "README.md": a name is then a single word.
    """
    if not (isinstance(feature, datasets.Value) and "string" in feature.dtype):
        return False
    if column in FILES:
        return True
    with _mended(options):
        first = next((row[column] for row in rows.take(100) if row[column]), "")
    one_word = not re.search(r"\s", first) or "text" not in kind.columns
    return "\n" not in first and one_word and first.lower().endswith(kind.suffixes)


def _check_names(source: Source) -> None:
    """Refuse a table that names files outside its root."""
    for name in _values(source.rows, source.column):
        if name and not _inside(str(source.root), name):
            raise RecipeError(
                f"data.root: the table names {name!r}, which lies outside {source.root}. If that is meant, set data.root= to "
                "the folder that holds all files."
            )


def _inside(root: str, name: str) -> bool:
    """By the text alone: links within the root may lead anywhere."""
    root = os.path.abspath(root)
    return os.path.commonpath([root, os.path.abspath(os.path.join(root, name))]) == root


def _sampled(rows: datasets.IterableDataset, options: DataOptions) -> datasets.Dataset:
    """`limit` rows of a stream, held in memory: the beginnings of evenly spread shards."""
    limit = int(options.limit or 0)
    shards = _spread(min(rows.num_shards, SAMPLED_SHARDS, limit), rows.num_shards)
    with _mended(options):
        found = [row for s in shards for row in rows.shard(rows.num_shards, s).take(-(-limit // len(shards)))][:limit]
        return datasets.Dataset.from_list(found, features=rows.features) if found else datasets.Dataset.from_list([])


# Calls of `datasets` -------------------------------------------------------------------------------------------------


def _loaded(options: DataOptions, *what: str | None, **more: Any) -> dict[str, Any]:
    """All splits by name."""
    load: Any = datasets.load_dataset
    with _mended(options):
        return {str(name): rows for name, rows in load(*what, streaming=options.streaming, **more).items()}


@contextmanager
def _mended(options: DataOptions) -> Iterator[None]:
    """One sentence instead of a traceback through `datasets`."""
    try:
        yield
    except MmsslError:
        raise
    except ConnectionError:
        raise RecipeError(
            f"data.path: {options.path} is no local path, and the Hub cannot be reached. Check the connection (and "
            "HF_HUB_OFFLINE), or give a local folder or table."
        ) from None
    except Exception as error:
        cause = error.__cause__ or error
        full = storage_error(cause, datasets.config.HF_DATASETS_CACHE)
        if full is not None:
            raise full from None
        key = "data.config" if re.search(r"[Cc]onfig name|BuilderConfig", str(cause)) else "data.path"
        raise RecipeError(f"{key}: {options.path} cannot be opened: {type(cause).__name__}: {_line(cause)}") from None


def _line(error: BaseException) -> str:
    """The beginning of an error's text, on one line."""
    return " ".join(str(error).split())[:500]
