"""What a run would take on other machines: memory of a device, and time of an update, from what one micro-batch costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ENGINES = ("ddp", "zero1", "zero2", "zero3")
FP32 = 4  # bytes: weights, gradients, moments and teachers are float32 in every precision, see docs/recipes.md
NODE = 8  # devices that are linked directly


class Cost(NamedTuple):
    """What a method costs, whatever it runs on."""

    trained: int  # parameters with a gradient
    kept: int  # those of a teacher
    flops: float  # of a sample: forward of student and teacher, and backward
    activations: float  # bytes of a sample that wait for the backward pass
    moments: int = 2  # numbers that the optimizer keeps for a parameter


class Machine(NamedTuple):
    """Devices of one kind."""

    peak: float = 788e12  # FLOP/s of products in bf16; measured on an H200
    use: float = 0.4  # share of it that a whole update reaches
    link: float = 400e9  # bytes/s between the devices of a node
    network: float = 50e9  # bytes/s of a device to those of other nodes


class Need(NamedTuple):
    """A row of a plan."""

    devices: int
    engine: str
    samples: int  # on a device at once
    memory: float  # bytes on each
    compute: float  # seconds an update
    exchange: float  # seconds of communication, none of it hidden behind computing
    volume: float  # bytes that a device sends in an update


def states(cost: Cost, engine: str, devices: int) -> float:
    """Bytes of weights, gradients, moments and teacher on each device.

    ZeRO-1 shards the moments, ZeRO-2 the gradients too, ZeRO-3 all (arXiv:1910.02054, section 5). A teacher stays whole but
    with `train.split_teacher`, which is taken for granted under ZeRO-3.
    """
    sharded_from = {"moments": 1, "gradients": 2, "weights": 3, "teacher": 3}
    numbers = {"moments": cost.moments * cost.trained, "gradients": cost.trained, "weights": cost.trained, "teacher": cost.kept}
    stage = ENGINES.index(engine)
    return sum(FP32 * n / (devices if stage >= sharded_from[name] else 1) for name, n in numbers.items())


def volume(cost: Cost, engine: str, devices: int, micro_batches: int = 1) -> float:
    """Bytes that a device sends in an update, by rings.

    Gradients are summed and weights (or sums) sent back, which is twice the parameters; ZeRO-3 fetches weights for each forward
    and each backward pass and sends gradients once (arXiv:1910.02054, section 7).
    """
    times = 2 * micro_batches + 1 if engine == "zero3" else 2
    return times * FP32 * cost.trained * (devices - 1) / devices


def plan(
    cost: Cost, batch: int, devices: Sequence[int] = (1, 8, 64, 512), micro: int | None = None, machine: Machine = Machine()
) -> list[Need]:
    """Memory and time for each number of devices and each engine.

    Args:
        batch: samples of an update on all devices.  micro: on a device at once; all of its share if not given.
    Returns: a row for each that has a sample for each device; one device needs no engine.
    """
    rows = []
    for count in (n for n in devices if n <= batch):
        share = math.ceil(batch / count)
        at_once = min(share, micro or share)
        for engine in ENGINES if count > 1 else ENGINES[:1]:
            sent = volume(cost, engine, count, math.ceil(share / at_once))
            rate = machine.link if count <= NODE else machine.network
            memory = states(cost, engine, count) + at_once * cost.activations
            rows.append(
                Need(count, engine, at_once, memory, share * cost.flops / (machine.peak * machine.use), sent / rate, sent)
            )
    return rows


def fits(cost: Cost, free: float, share: float = 0.9) -> int:
    """Samples on one device at once for which a share of its free bytes is enough; 0 if it is not even enough for the state."""
    left = share * free - states(cost, "ddp", 1)
    return max(0, int(left // cost.activations)) if cost.activations else 0


def table(rows: Sequence[Need], updates: int | None = None) -> str:
    """A plan in Markdown."""
    head = ["devices", "engine", "samples at once", "GiB a device", "computing, s", "exchange, s", "GB sent"]
    head += ["hours"] if updates else []
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{row.devices}", row.engine, f"{row.samples}", f"{row.memory / 2**30:.1f}"]
        cells += [f"{row.compute:.3g}", f"{row.exchange:.3g}", f"{row.volume / 1e9:.3g}"]
        cells += [f"{(row.compute + row.exchange) * updates / 3600:.3g}"] if updates else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


@contextmanager
def counting_flops() -> Iterator[Callable[[], int]]:
    """Of the products within. Attention is done in parts meanwhile, since its fused form is not counted on every device."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        yield counter.get_total_flops


@contextmanager
def counting_activations(root: nn.Module) -> Iterator[Callable[[], int]]:
    """Bytes of memory that wait for the backward pass, each piece once, without those of parameters and buffers.

    What a layer behind a norm or a GELU keeps besides its input does not count (see `forgetting`): nothing in fp32, a rounded
    copy of its weight under autocast, and what its low-rank update keeps, if it has one.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*root.parameters(), *root.buffers())}
    found: dict[int, int] = {}

    def pack(kept: Tensor) -> Any:
        storage = kept.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return kept

    with saved_tensors_hooks(pack, lambda kept: kept):
        yield lambda: sum(found.values())
