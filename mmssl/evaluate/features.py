"""Embeddings of a labelled set, on one process or many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mmssl import random
from mmssl.config import DataOptions, WatchOptions
from mmssl.data.dataset import start_worker
from mmssl.data.loading import Restarting
from mmssl.data.sources import Source, content_key, open_source, splits
from mmssl.distributed import gather_rows, rank, world
from mmssl.errors import DataError, RecipeError
from mmssl.registry import Modality, Views
from mmssl.types import Batch, Rejected, View

CACHE_BYTES = 256 << 20  # decoded evaluation sets up to this size stay in memory
BATCH, PADDED = 128, 16  # samples at once; fewer where all are padded to the longest


class PlainSet(Dataset):
    """Samples without augmentation. In place of an unreadable one stands a later one, marked as not valid."""

    def __init__(self, source: Source, kind: Modality, views: Views, indices: list[int]):
        self.source, self.kind, self.views, self.indices = source, kind, views, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The decoded `sample`, its `raw` values (n,), `content`, `index`, `label` and `valid`."""
        for attempt in range(100):
            index = self.indices[(position + attempt) % len(self.indices)]
            try:
                value = self.source.value(index)
                sample = self.kind.decode(value)
            except Exception as error:  # whatever a decoder meets, it is about this sample; training quarantines it
                reason = f"{self.source.identity(index)}: {error}"
                continue
            label = self.source.label_at(index)
            known = {"index": index, "label": label, "content": content_key(value), "valid": not attempt}
            return {"sample": sample, "raw": self.kind.raw(sample), **known}
        raise DataError(f"The probes find no readable sample; the last one tried was {reason}.")

    def collate(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Flat tensors of a batch: the plain view, padded where samples differ in length, `raw` (B, n) and what is known.

        A sample that is padding only, too short for a single frame, is not valid.
        """
        try:
            view = self._view(samples)
        except Rejected:  # decoded, yet without a single token: others stand in
            good = [sample for sample in samples if self._fits(sample["sample"])]
            if not good:
                raise DataError(
                    f"The probes find no usable sample, {self.source.identity(samples[0]['index'])} for one."
                ) from None
            samples = [s if self._fits(s["sample"]) else {**good[0], "valid": False} for s in samples]
            view = self._view(samples)
        rest = {name: torch.tensor([sample[name] for sample in samples]) for name in ("index", "label", "content", "valid")}
        if view.pad is not None:
            rest["valid"] &= ~view.pad.all(1)
        return Batch([view], rest["index"]).tensors() | rest | {"raw": torch.stack([sample["raw"] for sample in samples])}

    def _view(self, samples: Sequence[dict[str, Any]]) -> View:
        return self.views.plain([sample["sample"] for sample in samples])

    def _fits(self, sample: Any) -> bool:
        try:
            self.views.plain([sample])
        except Rejected:
            return False
        return True


class DrawnSet(PlainSet):
    """The same samples under random views, drawn by (seed, epoch, index): of images a crop that may be flipped."""

    def __init__(self, plain: PlainSet, seed: int, epoch: int):
        super().__init__(plain.source, plain.kind, plain.views, plain.indices)
        self.seed, self.epoch = seed, epoch

    def _view(self, samples: Sequence[dict[str, Any]]) -> View:
        def drawn(sample: dict[str, Any]) -> dict[str, Tensor]:
            place = self.seed, "probe-views", self.epoch, sample["index"]
            return self.views(sample["sample"], lambda view: random.generator(*place, view))

        return self.views.finish(self.views.collate([drawn(sample) for sample in samples])[:1])[0]


class ChangedSet(PlainSet):
    """The same samples, something done to each of them."""

    def __init__(self, plain: PlainSet, change: Callable[[Any], Any]):
        super().__init__(plain.source, plain.kind, plain.views, plain.indices)
        self.change = change

    def _view(self, samples: Sequence[dict[str, Any]]) -> View:
        return self.views.plain([self.change(sample["sample"]) for sample in samples])


class Sets(NamedTuple):
    """What the probes look at. `test` is None without labels."""

    train: Loaded
    test: Loaded | None
    classes: int
    name: str  # of the set that is classified, as in the metric's name


class Loaded:
    """One set as batches of this rank's share; kept in memory if it is small."""

    def __init__(self, data: PlainSet, batch: int, workers: int):
        self.data, self.batch, self.workers = data, batch, workers
        self.kept: list[dict[str, Tensor]] | None = None

    def drawn(self, seed: int, epoch: int) -> Loaded:
        """The same samples under an epoch's random views."""
        return Loaded(DrawnSet(self.data, seed, epoch), self.batch, self.workers)

    def changed(self, change: Callable[[Any], Any]) -> Loaded:
        """The same samples, something done to each of them."""
        return Loaded(ChangedSet(self.data, change), self.batch, self.workers)

    def some(self, places: Tensor) -> Loaded:
        """The samples at those places, (n,)."""
        indices = [self.data.indices[place] for place in places.sort().values.tolist()]
        return Loaded(PlainSet(self.data.source, self.data.kind, self.data.views, indices), self.batch, self.workers)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.kept is not None:
            yield from self.kept
            return
        # Every rank makes the same number of equal batches: the indices are padded by repeating the last.
        n = len(self.data)
        chunk = self.batch * world()
        order = [min(i, n - 1) for i in range(-(-n // chunk) * chunk)]
        mine = [order[start + rank() : start + chunk : world()] for start in range(0, len(order), chunk)]
        workers = self.workers if len(mine) > 1 else 0  # starting them takes longer than a batch

        def loader(done: int) -> DataLoader:
            some = {"num_workers": workers, "worker_init_fn": start_worker}
            return DataLoader(self.data, batch_sampler=mine[done:], collate_fn=self.data.collate, **some)

        kept, size = [], 0
        for batch in Restarting(loader):
            size += sum(t.numel() * t.element_size() for t in batch.values())
            kept = [*kept, batch] if size * world() <= CACHE_BYTES else []
            yield batch
        if size * world() <= CACHE_BYTES:
            self.kept = kept


@torch.no_grad()
def embed(batches: Loaded, run: Callable[[dict[str, Tensor]], dict[str, Tensor]], bare: bool = False) -> dict[str, Tensor]:
    """Run a model over a set.

    Args:
        run: flat batch -> `embedding` (B, D) and whatever else has B rows. A collective if the model is sharded.
        bare: keep only what `run` gave, with a row for unreadable samples too, that of the one that stands in.
    Returns: the rows of all ranks in order on the CPU: what `run` gave, and `label`, `raw`, `index`, `content`.
    """
    rows: dict[str, list[Tensor]] = {}
    for batch in batches:
        out = {name: tensor.float().cpu() for name, tensor in run(batch).items()}
        if not bare:
            known = {name: batch[name] for name in ("label", "raw", "index", "content")}
            out |= known | {"valid": batch["valid"].to(torch.int64)}
        for name, tensor in out.items():
            rows.setdefault(name, []).append(gather_rows(tensor))
    whole = {name: torch.cat(_as_long(parts))[: len(batches.data)] for name, parts in rows.items()}
    if bare:
        return whole
    keep = whole.pop("valid").bool()
    return {name: tensor[keep] for name, tensor in whole.items()}


def _as_long(parts: list[Tensor]) -> list[Tensor]:
    """Tokens (B, L, ...) of batches that were padded to their own longest sample, with zeros up to the longest of all."""
    if len({part.shape[1:] for part in parts}) < 2:
        return parts
    longest = max(part.shape[1] for part in parts)
    return [torch.cat([part, part.new_zeros(len(part), longest - part.shape[1], *part.shape[2:])], 1) for part in parts]


def open_sets(
    data: DataOptions, watch: WatchOptions, kind: Modality, views: Views, seed: int, few: tuple[float, int] | None = None
) -> Sets:
    """The sets of `watch`: memory and test split, or a keyed tenth of the memory if there is no test split.

    Args:
        few: share and seed of the labelled part that is the memory, see `few_labels`. Raises: RecipeError if it is larger than
            `watch.samples`.
    """
    where = data.model_copy(update={"path": watch.path or data.path, "streaming": False, "limit": None})
    source = open_source(where, kind, watch.train if watch.path or watch.train in splits(where, kind) else data.split)

    batch = BATCH if views.longest is None else PADDED

    def loaded(of: Source, indices: Tensor) -> Loaded:
        return Loaded(PlainSet(of, kind, views, indices.sort().values.tolist()), batch, min(data.workers, 2))

    def remembered(indices: Tensor) -> Loaded:
        if few is not None and source.labels is not None:
            indices = few_labels(indices, source.labels[indices], *few)
            if len(indices) > watch.samples:
                n = len(indices)
                raise RecipeError(f"samples: {watch.samples}, but labels={few[0]:g} takes {n} of them; give samples={n}.")
        return loaded(source, indices[: watch.samples])

    order = labelled(source, random.permutation(source.size, seed, "watch"))
    if source.label is None:
        return Sets(remembered(order), None, 0, watch.train)
    if watch.test in splits(where, kind):
        test = open_source(where, kind, watch.test)
        chosen = labelled(test, random.permutation(test.size, seed, "watch-test"))[: watch.samples]
        return Sets(remembered(order), loaded(test, chosen), source.classes, watch.test)
    held = held_out(source, seed)
    memory = order[~torch.isin(order, held)]
    return Sets(remembered(memory), loaded(source, held[: watch.samples]), source.classes, "heldout")


def labelled(source: Source, indices: Tensor) -> Tensor:
    """Those indices whose samples have a label; all of them if no sample can have one."""
    return indices if source.labels is None else indices[source.labels[indices] >= 0]


def held_out(source: Source, seed: int) -> Tensor:
    """A keyed tenth of the labelled samples, for a data set without a test split."""
    order = labelled(source, random.permutation(source.size, seed, "watch"))
    return order[: max(1, len(order) // 10)]


def few_labels(indices: Tensor, classes: Tensor, share: float, seed: int) -> Tensor:
    """A class-balanced part of a labelled set; a smaller part lies within a larger one of the same seed.

    Args:
        indices: (n,) positions of the samples.  classes: (n,) their classes.
        share: below 1 of the samples, as many of each class; from 1 on, so many samples of each class.
    Returns: positions; at least one of each class, and all of a class that has too few.
    Raises: RecipeError if `share` is neither a share nor a whole number.
    """
    if not (0 < share < 1 or (share >= 1 and share % 1 == 0)):
        raise RecipeError(f"labels: {share:g}, must be a share between 0 and 1 or a whole number of samples of each class.")
    each = int(share) if share >= 1 else max(1, round(share * len(indices) / len(classes.unique())))
    # By position, whatever order the samples come in.
    place = indices.argsort()
    return indices[place][rank_in_class(classes[place], seed, "labels") < each]


def rank_in_class(classes: Tensor, *key: int | str) -> Tensor:
    """(n,) int64: the place of each sample among those of its class, 0 first, in the order that the key gives."""
    order = random.permutation(len(classes), *key)
    grouped = order[classes[order].argsort(stable=True)]  # one class after the other, each in keyed order
    sizes = classes.bincount()
    first = (sizes.cumsum(0) - sizes)[classes[grouped]]
    return torch.empty_like(order).scatter_(0, grouped, torch.arange(len(order)) - first)
