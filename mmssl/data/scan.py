"""What a data set holds: counts, sizes and classes; what cannot be read, what is there twice, what two splits share."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from mmssl.config import DataOptions
from mmssl.data.dataset import decoded, start_worker
from mmssl.data.sources import Source, open_source, splits
from mmssl.errors import RecipeError
from mmssl.registry import Modality, modalities, modality
from mmssl.types import Rejected

BATCH = 64  # samples that a worker reads at once
QUANTILES = {"least": 0.0, "5 %": 0.05, "quarter": 0.25, "half": 0.5, "three quarters": 0.75, "95 %": 0.95, "most": 1.0}


class Sample(NamedTuple):
    """What was found out about one."""

    content: str | None  # hash of its bytes; None if they cannot be had
    size: int  # bytes
    sizes: dict[str, float]  # of the decoded sample, see `Modality.sizes`
    kind: str | None  # why it cannot be used, as training would say; None if it can
    reason: str = ""


class Split(NamedTuple):
    """All samples of a split, in their order."""

    source: Source
    samples: list[Sample]


def look(path: str, kind: str | None = None, workers: int = 0, **options: Any) -> tuple[Modality, dict[str, Split]]:
    """Read and decode all samples of a data set, as training would.

    Args:
        path: folder, table or Hub id.
        kind: modality; found by the data if None.
        options: `column`, `label`, `root`, `config`, `revision`.
    Returns: the modality, and split -> what was found.
    Raises: RecipeError.
    """
    of = modality(kind) if kind else modality_of_data(path, options)
    where = DataOptions(path=path, modality=of.name, **options)
    return of, {split: _look(open_source(where, of, split), of, workers) for split in splits(where, of)}


def modality_of_data(path: str, options: Mapping[str, Any]) -> Modality:
    """The kind of data that can be read there. Raises: RecipeError if it is none, or several with decoders of their own."""
    fitting: dict[Any, Modality] = {}
    errors: dict[str, RecipeError] = {}
    for name in modalities():
        try:
            one = modality(name)
            where = DataOptions(path=path, modality=name, **options)
            source = open_source(where, one, splits(where, one)[0])
            if _readable(source, one):
                theirs = one.name in one.decode.__module__.split(".")  # of several with one decoder that whose it is
                fitting[one.decode] = one if theirs else fitting.get(one.decode, one)
        except RecipeError as error:
            errors[name] = error
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    if not fitting and errors and not Path(path).exists():
        raise next(iter(errors.values()))
    found = " and ".join(one.name for one in fitting.values()) or "none"
    raise RecipeError(f"modality: {path} could be {found} of {', '.join(modalities())}; say which with modality=NAME.")


def _readable(source: Source, kind: Modality, tries: int = 20) -> bool:
    """Whether one of the first samples can be read."""
    for index in range(min(tries, source.size)):
        with suppress(Rejected):
            decoded(kind, source.value(index))
            return True
    return False


def stats(found: Mapping[str, Split]) -> dict[str, Any]:
    """Split -> `samples`, `unreadable`, `bytes`, `classes` (name -> samples), `unlabelled`, `sizes` (name -> quantiles ...)."""
    return {name: _stats(split) for name, split in found.items()}


def scan(found: Mapping[str, Split], against: Mapping[str, Split] | None = None) -> dict[str, Any]:
    """What is wrong.

    Args:
        against: splits of another data set, none of whose samples should be among these.
    Returns: `unreadable`: split -> `name`, `kind`, `reason` of each; `duplicates`: split -> names of samples of equal content,
        group by group; `conflicts`: split -> those of these groups whose labels differ; `leaks`: of each two splits that share
        content `first`, `second` and `names`, pairs of a sample of each.
    """
    groups = {name: [group for group in _by_content(split).values() if len(group) > 1] for name, split in found.items()}
    named = {name: [[found[name].source.identity(i) for i in group] for group in own] for name, own in groups.items()}
    unlike = {
        name: [told for told, group in zip(named[name], own) if len({found[name].source.label_at(i) for i in group} - {-1}) > 1]
        for name, own in groups.items()
    }
    names = [*found]
    pairs = [(a, found[a], b, found[b]) for i, a in enumerate(names) for b in names[i + 1 :]]
    pairs += [(a, mine, f"against {b}", theirs) for a, mine in found.items() for b, theirs in (against or {}).items()]
    leaks = [{"first": a, "second": b, "names": shared} for a, x, b, y in pairs if (shared := _shared(x, y))]
    return {"unreadable": {n: _bad(s) for n, s in found.items()}, "duplicates": named, "conflicts": unlike, "leaks": leaks}


def _look(source: Source, kind: Modality, workers: int) -> Split:
    data = _Samples(source, kind)
    more = {"num_workers": workers if source.size > BATCH else 0, "worker_init_fn": start_worker}
    batches = DataLoader(data, batch_size=BATCH, collate_fn=list, **more)
    return Split(source, [sample for batch in batches for sample in batch])


class _Samples(Dataset):
    def __init__(self, source: Source, kind: Modality):
        self.source, self.kind = source, kind

    def __len__(self) -> int:
        return self.source.size

    def __getitem__(self, index: int) -> Sample:
        content, size = None, 0
        try:
            value = self.source.value(index)
            raw = _bytes(value)
            content, size = hashlib.blake2b(raw, digest_size=16).hexdigest(), len(raw)
            sample = decoded(self.kind, value)
        except Rejected as bad:
            return Sample(content, size, {}, bad.kind, bad.reason)
        return Sample(content, size, self.kind.sizes(sample) if self.kind.sizes else {}, None)


def _bytes(value: Any) -> bytes:
    """The content of a row's value. Raises: Rejected."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        return repr(value).encode()
    if not Path(value).is_file():  # a pipe would block for ever
        raise Rejected("unreadable", "no such file")
    try:
        return Path(value).read_bytes()
    except OSError as error:
        raise Rejected("unreadable", str(error.strerror)) from None


def _stats(split: Split) -> dict[str, Any]:
    source, samples = split
    names = source.facts.get("classes") or []
    labels = Counter(source.label_at(i) for i in range(source.size)) if names else Counter()
    measured = defaultdict(list)
    for sample in samples:
        for name, value in sample.sizes.items():
            measured[name].append(value)
    return {
        "samples": len(samples),
        "unreadable": sum(sample.kind is not None for sample in samples),
        "bytes": sum(sample.size for sample in samples),
        "classes": {name: labels[i] for i, name in enumerate(names)},
        "unlabelled": labels[-1],
        "sizes": {name: _quantiles(values) for name, values in measured.items()},
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    found = dict(zip(QUANTILES, np.quantile(values, [*QUANTILES.values()]).tolist()))
    return {**found, "mean": float(np.mean(values)), "sum": float(np.sum(values))}


def _bad(split: Split) -> list[dict[str, str]]:
    return [
        {"name": split.source.identity(i), "kind": sample.kind, "reason": sample.reason}
        for i, sample in enumerate(split.samples)
        if sample.kind is not None
    ]


def _by_content(split: Split) -> dict[str, list[int]]:
    """Hash -> places of the samples that have it; empty and unreachable ones have none."""
    found: dict[str, list[int]] = {}
    for i, sample in enumerate(split.samples):
        if sample.content is not None and sample.size:
            found.setdefault(sample.content, []).append(i)
    return found


def _shared(first: Split, second: Split) -> list[list[str]]:
    """Names of samples of equal content, the first of each side."""
    ours, theirs = _by_content(first), _by_content(second)
    both = [content for content in ours if content in theirs]
    return [[first.source.identity(ours[c][0]), second.source.identity(theirs[c][0])] for c in both]
