"""What a run would need, measured on its first updates."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import find_executable_batch_size
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from mmssl.config import Settings
from mmssl.config.blocks import HubOptions
from mmssl.distributed import world
from mmssl.errors import RecipeError
from mmssl.parts import Teacher
from mmssl.training.plan import Cost, counting_activations, counting_flops, fits, states
from mmssl.training.pretrain import Run, prepare
from mmssl.training.trainer import SelfSupervisedTrainer

UPDATES = 3
SMALLER = "try train.recompute=true or a smaller model"


class Stopwatch(SelfSupervisedTrainer):
    """Notes when each update ends and the samples seen by then, and stops after a few."""

    times: list[tuple[float, int]] = []
    counts = True  # products and memory
    flops = activations = 0.0  # of a sample, from the first micro-batches of the first two updates, which are not timed

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As always; the first counts products, and the first of the second update what waits for its backward pass."""
        counted = self.recipe.train.compile or bool(self.flops and (self.activations or not self.times))
        if counted or not self.counts:
            return super().training_step(model, inputs, num_items_in_batch)
        before = self.samples
        with counting_activations(self.objective) if self.flops else counting_flops() as found:
            loss = super().training_step(model, inputs, num_items_in_batch)
        each = found() / max(self.samples - before, 1)
        self.flops, self.activations = (self.flops, each) if self.flops else (each, 0.0)
        return loss

    def end_update(self, control: Any) -> None:
        """As always, then stop."""
        super().end_update(control)
        self.times = [*self.times, (time.perf_counter(), self.samples)]
        control.should_log = control.should_evaluate = control.should_save = False
        control.should_training_stop = len(self.times) > UPDATES + 1


class Uncounted(Stopwatch):
    """Takes no more memory than a run does."""

    counts = False


def updates(recipe: Settings, trainer: type[Stopwatch] = Stopwatch) -> Run:
    """A run of a few updates in a temporary folder, pushed and reported nowhere."""
    with tempfile.TemporaryDirectory() as temporary:
        quiet = recipe.train.model_copy(update={"report_to": []})
        own = {"out": str(Path(temporary) / "run"), "train": quiet, "hub": HubOptions()}  # type: ignore[call-arg]
        run = prepare(recipe.model_copy(update=own), trainer=trainer)
        run.trainer.train()
    return run


def check(recipe: Settings) -> dict[str, Any]:
    """Decode samples, make five updates, count what the first two do, time the others.

    Returns: parameters, samples, losses, seconds a step, samples a second, peak memory in MiB, hours for the whole run; and of
        a sample, but for compiled runs, products (GFLOP) and memory that waits for the backward pass (MiB).
    Raises: MmsslError as `pretrain` would.
    """
    run = updates(recipe)
    trainer: Any = run.trainer
    if len(trainer.times) < 3:
        raise RecipeError("train.steps: check needs a run of at least three updates: it counts in two, and times the others.")
    facts = [member.source.facts for member in run.members]
    _, (begin, before), *_, (end, after) = trainer.times
    step = (end - begin) / (len(trainer.times) - 2)
    cuda = run.args.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    parts = run.objective.method.parts()
    teachers = [tensor for part in parts if isinstance(part, Teacher) for tensor in part.state_dict().values()]
    losses = {n: float(v) / trainer.terms for n, v in trainer.sums.items() if n.startswith("loss")} if trainer.terms else {}
    return {
        "data": "; ".join(f"{one.get('path')}, {one.get('count', 'unknown number of')} samples" for one in facts),
        "samples": min((one["count"] for one in facts if one.get("count")), default=None),
        "unreadable": run.quarantine.summary(),
        "trained_parameters": sum(p.numel() for p in run.objective.method.parameters() if p.requires_grad),
        "teacher_parameters": sum(t.numel() for t in teachers),
        "encoder_parameters": sum(p.numel() for p in {p for m in run.members for p in m.method.student.parameters()}),
        "updates": run.steps,
        **{name: round(value, 4) for name, value in losses.items()},
        "seconds_per_update": round(step, 4),
        "samples_per_second": round(trainer.seen_by_all(after - before) / (end - begin), 1),
        "peak_memory_mib": peak >> 20,
        "gflop_per_sample": float(f"{trainer.flops / 1e9:.5g}"),
        "activation_mib_per_sample": float(f"{trainer.activations / 2**20:.5g}"),
        "hours_for_the_run": round(step * run.steps / 3600, 2),
    }


def cost(facts: dict[str, Any]) -> Cost:
    """What a plan is made from. Raises: RecipeError if it was not counted."""
    if not facts["gflop_per_sample"]:
        raise RecipeError("train.compile: what is compiled is not counted; plan with train.compile=false.")
    trained, kept = facts["trained_parameters"], facts["teacher_parameters"]
    return Cost(trained, kept, facts["gflop_per_sample"] * 1e9, facts["activation_mib_per_sample"] * 2**20)


def largest(recipe: Settings, facts: dict[str, Any]) -> int:
    """Samples of a micro-batch that the device has memory for: computed from what `check` counted, and tried on a GPU.

    Nine tenths of what is free are used, and no more samples than the data hold. On a GPU five updates are made with so many,
    and with a tenth less as long as memory does not suffice.

    Raises: RecipeError if not even one fits, or in a run of several processes.
    """
    if world() > 1:
        raise RecipeError("largest: is found on one device; leave out accelerate launch.")
    of, cuda = cost(facts), recipe.train.device == "auto" and torch.cuda.is_available()
    clear_device_cache(garbage_collection=True)  # of what `check` leaves behind
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    most = fits(of, free) if facts["samples"] is None else min(fits(of, free), facts["samples"])
    if not most:
        raise RecipeError(
            f"largest: no sample fits: {free / 2**30:.1f} GiB are free, weights, gradients, moments and teachers take "
            f"{states(of, 'ddp', 1) / 2**30:.1f} and a sample {of.activations / 2**30:.2f}; {SMALLER}."
        )
    return tried(most, lambda samples: updates(_with(recipe, samples), Uncounted)) if cuda else most


def tried(most: int, attempt: Callable[[int], Any]) -> int:
    """The first of `most`, a tenth less and so on at which memory suffices. Raises: RecipeError if there is none."""

    def search(samples: int) -> int:
        attempt(samples)
        return samples

    try:
        return find_executable_batch_size(search, starting_batch_size=most)()
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise RecipeError(f"largest: memory suffices for no sample; {SMALLER}.") from None


def _with(recipe: Settings, samples: int) -> Settings:
    """Updates of one micro-batch."""
    return recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"micro_batch": samples, "global_batch": samples})}
    )
