"""The order of samples: a pure function of seed and position, so that resuming is arithmetic."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from mmssl.errors import RecipeError
from mmssl.random import permutation


class KeyBatches(Sampler[list[tuple[int, int]]]):
    """Micro-batches of keys `(epoch, index)` of one rank; any number of ranks sees the same global batches.

    Update g of an epoch takes positions [g*B, (g+1)*B) of the epoch's permutation; row j of micro-batch a of rank r is
    position a*world*micro + j*world + r among them. What does not fill a batch at the end of an epoch is left out.
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
    ):
        """Check the sizes.

        Args:
            samples: of the data set.
            global_batch: samples of an update; micro_batch: of one rank at once.
            steps: updates of the whole run; start_step: those already made.
        Raises: RecipeError if ranks and micro-batches cannot share a global batch, or if the data do not fill one.
        """
        check_batch(samples, global_batch, micro_batch, world)
        self.samples, self.global_batch, self.micro_batch = samples, global_batch, micro_batch
        self.rank, self.world, self.steps, self.seed, self.start_step = rank, world, steps, seed, start_step
        self.accumulation = global_batch // (world * micro_batch)  # micro-batches of a rank for each update
        self.epoch_length = samples // global_batch  # updates

    def __len__(self) -> int:
        """Micro-batches of the whole run, those before `start_step` included."""
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """Keys from `start_step` on."""
        share, current, order = self.world * self.micro_batch, -1, None
        for step in range(self.start_step, self.steps):
            epoch, update = divmod(step, self.epoch_length)
            if epoch != current:
                current, order = epoch, permutation(self.samples, self.seed, "order", epoch)
            assert order is not None
            for first in range(update * self.global_batch, (update + 1) * self.global_batch, share):
                yield [(epoch, index) for index in order[first + self.rank : first + share : self.world].tolist()]


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
