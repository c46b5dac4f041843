"""The files below a folder, the splits that their names make, and media files as a source."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import torch

from mmssl.config import DataOptions
from mmssl.data.sources.source import Source, finished
from mmssl.errors import RecipeError
from mmssl.registry import Modality

TABLES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".json": "json"}  # best first
SPLITS = {  # synonyms as `datasets` knows them
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
    "unlabeled": ("unlabeled", "unlabelled", "unsupervised", "extra"),
}


def find_files(path: Path, kind: Modality) -> tuple[str | None, dict[str, list[Path]]]:
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


def from_files(options: DataOptions, kind: Modality, path: Path, found: dict[str, list[Path]], split: str) -> Source:
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
    return finished(source, options, "folder", split, classes)


def choose_split(every: Iterable[str], split: str, options: DataOptions) -> str:
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
