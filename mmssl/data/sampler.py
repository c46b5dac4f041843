"""The order of samples: a pure function of seed and position, so that resuming is arithmetic."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Sampler

from mmssl.errors import RecipeError
from mmssl.random import permutation

BUCKETS = 16


class Keys(list[tuple[int, ...]]):
    """The keys of a micro-batch, and the update that it belongs to: what is drawn for all samples of an update at once must
    be the same on all ranks.
    """

    def __init__(self, keys: Iterable[tuple[int, ...]], update: int):
        super().__init__(keys)
        self.update = update


class KeyBatches(Sampler[list[tuple[int, ...]]]):
    """Micro-batches of keys of one rank; any number of ranks sees the same global batches.

    Each epoch has a keyed order of samples and places where it is cut into updates, see `Shuffled` and `Buckets`. An update
    is shared by `global_batch / micro_batch` micro-batches of n samples each: row j of micro-batch a of rank r is position
    a*world*n + j*world + r in it. What does not fill an update at the end of an epoch is left out. Keys are `(epoch, index)`,
    or `(epoch, index, length)` where lengths are known: the least length in the whole update, to which views can be cut.
    """

    def __init__(
        self,
        samples: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        steps: int,
        seed: int,
        start_step: int = 0,
        lengths: Tensor | None = None,
        longest: int | None = None,
        buckets: int = BUCKETS,
        budget: int | None = None,
        order: Callable[[int], Tensor | None] | None = None,
    ):
        """Check the sizes.

        Args:
            samples: of the data set.
            global_batch: samples of an update; micro_batch: of one rank at once. With lengths this holds for the longest
                samples, of shorter ones there are more.
            steps: updates of the whole run; start_step: those already made.
            lengths: (samples,) int64, of each sample; those below 1 are never drawn.
            longest: length of the longest view, to which longer samples are cut.
            buckets: groups of like lengths, all of as many samples.
            budget: units of length in a micro-batch; micro_batch times the longest view that occurs if None.
            order: gives the samples of an epoch, at least as many as its updates take, for a method that chooses them; None
                for the keyed order of all.
        Raises: RecipeError if ranks and micro-batches cannot share a global batch, or if the data do not fill one.
        """
        check_batch(samples if lengths is None else None, global_batch, micro_batch, world)
        self.rank, self.world, self.steps, self.seed, self.start_step = rank, world, steps, seed, start_step
        self.shares = global_batch // micro_batch  # micro-batches of an update, of all ranks
        self.accumulation = self.shares // world  # of one rank
        self.plan: Shuffled | Buckets = Shuffled(samples, global_batch, order)
        if lengths is not None:
            if order is not None:
                raise RecipeError(
                    "method.name: it chooses the samples of a pass, which samples of unequal length do not allow; "
                    "use images, or text with views.pack=true."
                )
            self.plan = Buckets(lengths, longest, buckets, self.shares, micro_batch, budget)
        self.epoch_length = len(self.plan.cuts) - 1  # updates

    def __len__(self) -> int:
        """Micro-batches of the whole run, those before `start_step` included."""
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        """Keys from `start_step` on."""
        current, order, turns = -1, torch.empty(0), ()
        for step in range(self.start_step, self.steps):
            epoch, turn = divmod(step, self.epoch_length)
            if epoch != current:
                current, (order, turns) = epoch, self.plan.epoch(self.seed, epoch)
            update = order[self.plan.cuts[turns[turn]] : self.plan.cuts[turns[turn] + 1]]
            length = self.plan.least(update)
            share = len(update) // self.accumulation  # of all ranks at once
            for first in range(0, len(update), share):
                mine = update[first + self.rank : first + share : self.world].tolist()
                yield Keys(((epoch, index, *length) for index in mine), step)


class Shuffled:
    """All samples in the order of (seed, "order", epoch), cut into equal updates."""

    def __init__(self, samples: int, global_batch: int, order: Callable[[int], Tensor | None] | None = None):
        self.samples, self.cuts, self.order = samples, range(0, samples + 1, global_batch), order

    def epoch(self, seed: int, epoch: int) -> tuple[Tensor, Sequence[int]]:
        """The samples in order, and which update comes when."""
        chosen = self.order(epoch) if self.order is not None else None
        return permutation(self.samples, seed, "order", epoch) if chosen is None else chosen, range(len(self.cuts) - 1)

    def least(self, update: Tensor) -> tuple[int, ...]:
        """No length is known."""
        return ()


class Buckets:
    """Samples of like lengths together, as many in a micro-batch as fit into a budget.

    The usable samples are put into buckets by quantiles of their length (not longer than `longest`), where equal lengths stay
    together. An epoch goes through the buckets from short to long, within each in the order of (seed, "order", epoch); it is
    cut from the start into updates of `shares * n` samples with the largest n such that n times the cap of the last sample's
    bucket is within the budget, at least 1. The updates are taken in the order of (seed, "updates", epoch). The cuts depend on
    the lengths alone, so that all epochs are alike. See `KeyBatches` for the arguments.
    """

    def __init__(self, lengths: Tensor, longest: int | None, buckets: int, shares: int, micro_batch: int, budget: int | None):
        self.usable = (lengths > 0).nonzero().squeeze(1)  # (n,) indices
        count = len(self.usable)
        if count < shares:
            mend = f"Set train.global_batch to at most {count * micro_batch}, or add data." if count else "Add data."
            raise RecipeError(
                f"train.global_batch: the data hold {count} usable samples, fewer than the {shares} micro-batches of an update "
                f"(train.global_batch / train.micro_batch). {mend}"
            )
        # A bucket holds at least an update, so that what is left over at the end of an epoch is never the same samples.
        buckets = max(1, min(buckets, count // (shares * micro_batch)))
        self.lengths = lengths if longest is None else lengths.clamp(max=longest)
        capped = self.lengths[self.usable]
        ascending = capped.sort().values
        caps = ascending[[-(-count * (b + 1) // buckets) - 1 for b in range(buckets)]].unique()
        self.bucket = torch.searchsorted(caps, capped)  # (n,) the first whose cap is not below the length
        budget = micro_batch * int(caps[-1]) if budget is None else budget
        self.cuts = cut(caps[self.bucket.sort().values].tolist(), shares, budget)
        if len(self.cuts) == 1:
            raise RecipeError(
                f"data.budget: {shares} micro-batches (train.global_batch / train.micro_batch) of {budget} units hold more "
                f"than the {count} usable samples. Set data.budget to at most {count // shares * int(caps[-1])}, lower "
                "train.global_batch, or add data."
            )

    def epoch(self, seed: int, epoch: int) -> tuple[Tensor, Sequence[int]]:
        """The samples in order, and which update comes when."""
        mixed = permutation(len(self.usable), seed, "order", epoch)
        mixed = mixed[self.bucket[mixed].argsort(stable=True)]
        return self.usable[mixed], permutation(len(self.cuts) - 1, seed, "updates", epoch).tolist()

    def least(self, update: Tensor) -> tuple[int, ...]:
        """The least length in an update, which ends its keys."""
        return (int(self.lengths[update].min()),)


def cut(caps: Sequence[int], shares: int, budget: int) -> list[int]:
    """Where updates begin, and the last one ends, among samples with ascending caps."""
    cuts, total = [0], len(caps)
    while (first := cuts[-1]) < total:

        def cost(n: int, first: int = first) -> int:
            return n * caps[min(first + shares * n, total) - 1]

        n = max(1, bisect_right(range(1, budget // caps[first] + 1), budget, key=cost))
        if first + shares * n > total:
            break
        cuts.append(first + shares * n)
    return cuts


def check_batch(samples: int | None, global_batch: int, micro_batch: int, world: int) -> None:
    """Whether `world` ranks can share a global batch in micro-batches; `samples` is None for a stream.

    Raises: RecipeError with the values that are possible.
    """
    if global_batch % (world * micro_batch):
        unit = world * micro_batch
        near = [n for n in (global_batch // unit * unit, (global_batch // unit + 1) * unit) if n]
        mends = [f"train.global_batch a multiple of {unit}, such as {' or '.join(map(str, near))}"]
        if global_batch % world == 0:
            mends.append(f"train.micro_batch one of {_listed(divisors(global_batch // world))}")
        if global_batch % micro_batch == 0:
            mends.append(f"the number of ranks one of {_listed(divisors(global_batch // micro_batch))}")
        raise RecipeError(
            f"train.global_batch: {global_batch} samples cannot be shared by {world} rank{'s' * (world > 1)} in micro-batches "
            f"of {micro_batch} (train.micro_batch). Make {'; or '.join(mends)}."
        )
    if samples is not None and samples < global_batch:
        raise RecipeError(
            f"train.global_batch: the data hold {samples} samples, fewer than one batch of {global_batch}. "
            f"Set train.global_batch to at most {samples}, or add data."
        )


def divisors(n: int) -> list[int]:
    """Ascending, 1 and n included."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
