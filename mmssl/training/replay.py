"""The batch of an update that was not applied: its record, and the same batch once more, sample by sample."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmssl.config import Recipe, check_recipe, read_yaml
from mmssl.data.dataset import KeyedDataset
from mmssl.data.quarantine import Quarantine
from mmssl.data.sampler import Keys
from mmssl.data.sources import Source, open_source
from mmssl.distributed import gather_objects, world
from mmssl.errors import RecipeError
from mmssl.random import row_keys
from mmssl.registry import Modality, Views, modality
from mmssl.training import checkpoint
from mmssl.training.batches import key_batches, key_stream
from mmssl.training.launch import training_arguments
from mmssl.training.objective import Objective
from mmssl.training.run_folder import RunFolder, write_atomic
from mmssl.training.survey import survey
from mmssl.training.trainer import SelfSupervisedTrainer
from mmssl.types import Clock

NAMED = 5  # samples that an error names


def record(trainer: SelfSupervisedTrainer, folder: RunFolder, members: Mapping[str, tuple[Recipe, Source, Views]]) -> str:
    """Write `replay/step-N.json`, from all ranks. Returns: a sentence about it."""
    recipe, step = trainer.recipe, trainer.state.global_step
    mine = [
        {
            "samples": {name: index.tolist() for name, index in indices.items()},
            "losses": {name: number(value) for name, value in terms.items()},
        }
        for indices, terms in trainer.taken
    ]
    ranks = gather_objects(mine)
    for micro in (micro for of_rank in ranks for micro in of_rank):
        micro["names"] = [members[name][1].identity(i) for name, indices in micro["samples"].items() for i in indices]
        micro["samples"] = micro["samples"].get("", micro["samples"])
    length: tuple[int, ...] = ()
    if "" in members and (own := members[""])[1].lengths is not None:
        length = next(iter(key_batches(*own, step, step - 1)))[0][2:]
    facts = {
        "step": step,
        "applied": trainer.applied,
        "steps": trainer.steps,
        "epoch": (step - 1) // trainer.epoch_steps,
        "length": length,
        "seed": recipe.train.seed,
        "world": world(),
        "accumulation": trainer.args.gradient_accumulation_steps,
        "micro_batch": trainer.args.per_device_train_batch_size,
        "norm": None if trainer.norm is None else number(trainer.norm),
        "ranks": ranks,
    }
    path = folder.replay / f"step-{step:08d}.json"
    if folder.is_main:
        try:
            folder.replay.mkdir(exist_ok=True)
            write_atomic(path, json.dumps(facts, indent=1) + "\n")
        except OSError as error:  # what a full disk costs is the record, not the run
            print(f"mmssl: note: {path} could not be written: {error}", file=sys.stderr)
    worst = next((m for of_rank in ranks for m in of_rank if any(isinstance(v, str) for v in m["losses"].values())), None)
    worst = worst or {"names": [n for of_rank in ranks for m in of_rank for n in m["names"]], "losses": {}}
    losses = "".join(f", {name} {value}" for name, value in worst["losses"].items())
    more = ", ..." if len(worst["names"]) > NAMED else ""
    told = f" Its batch, {', '.join(worst['names'][:NAMED])}{more}{losses}, is in {path}"
    return f"{told}: `mmssl replay {folder.path} step={step}` tells the loss of each sample." if "" in members else f"{told}."


def number(value: Any) -> float | str:
    """As JSON can hold it: NaN and infinity as text."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def replay(run: str | Path, step: int | None = None) -> dict[str, Any]:
    """Build the batch of an update that was not applied once more, and look at each sample.

    Args:
        run: run folder.
        step: of the record; the newest one if None.
    Returns: `step`, `weights` (the checkpoint that was used), `recorded` and `batches`: for each micro-batch of each rank
        `losses`, and `samples` with `name`, `loss` and `gradient` (its norm) of each sample alone.
    Raises: RecipeError if there is no such record, or if the data are others.
    """
    folder = RunFolder.open(run)
    facts = read_record(folder, step)
    recipe = check_recipe({**read_yaml(folder.config), "out": str(folder.path)}, str(folder.config))
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{folder.path}: learns from several kinds of data, whose batches are not replayed; the records in "
            f"{folder.replay} name their samples."
        )
    args, kind = training_arguments(recipe), modality(recipe.data.modality)
    views = recipe.build_views()
    source = survey(recipe, args, kind, views, open_source(recipe.data, kind, recipe.data.split)).source
    objective, weights = load_before(recipe, source, folder, facts["step"])
    objective.to(args.device).train()
    clock = Clock(facts["applied"], facts["steps"], facts["epoch"])

    def look(drawn: Drawn, rows: list[int]) -> dict[str, Any]:
        batch = drawn.dataset.collate([drawn.samples[row] for row in rows])
        batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            return examine(objective, batch, tuple(drawn.seeds[row] for row in rows), clock)

    found = []
    for drawn in redraw(facts, recipe, source, kind, views):
        names = [source.identity(sample["index"]) for sample in drawn.samples]
        if names != drawn.recorded["names"]:
            raise RecipeError(f"data.path: the data have changed; {names} stand where {drawn.recorded['names']} were.")
        alone = [look(drawn, repeated(objective, row)) for row in range(len(names))]
        found.append(
            {
                "rank": drawn.rank,
                "micro_batch": drawn.micro,
                "losses": look(drawn, [*range(len(names))])["losses"],
                "recorded": drawn.recorded["losses"],
                "samples": [{"name": n, "loss": one["loss"], "gradient": one["gradient"]} for n, one in zip(names, alone)],
            }
        )
    return {"step": facts["step"], "weights": weights, "batches": found}


class Drawn(NamedTuple):
    """A micro-batch of the record, before it is put together."""

    rank: int
    micro: int
    samples: list[dict[str, Any]]
    seeds: tuple[int, ...]  # one a sample, see `row_keys`
    recorded: dict[str, Any]
    dataset: Any


def redraw(facts: dict[str, Any], recipe: Recipe, source: Source, kind: Modality, views: Views) -> Iterator[Drawn]:
    """The micro-batches of all ranks, from keys alone."""
    quarantine = Quarantine(None, 1.0, 0)
    dataset: Any = KeyedDataset(source, kind, views, recipe.train.seed, quarantine)
    for rank, of_rank in enumerate(facts["ranks"]):
        if source.streaming:
            place, first = (rank, facts["world"]), (facts["step"] - 1) * facts["accumulation"]
            last = first + facts["accumulation"]
            dataset = key_stream(recipe, source, kind, views, quarantine, facts["micro_batch"], last, first, place)
            batches: Iterator[Any] = dataset.samples()
        else:
            keys = [[(facts["epoch"], index, *facts["length"]) for index in micro["samples"]] for micro in of_rank]
            batches = (dataset.__getitems__(Keys(micro, facts["step"] - 1)) for micro in keys)
        for micro, (samples, recorded) in enumerate(zip(batches, of_rank, strict=True)):
            seeds = row_keys(facts["seed"], facts["step"] - 1, micro, len(samples), rank, facts["world"])
            yield Drawn(rank, micro, samples, seeds, recorded, dataset)


def repeated(objective: Objective, row: int) -> list[int]:
    """A sample as a batch of its own; with itself where a method cannot do with one."""
    try:
        objective.method.check_batch(1)
    except ValueError:
        return [row, row]
    return [row, row] if objective.method.family == "joint embedding" else [row]


def examine(objective: Objective, batch: dict[str, Tensor], keys: tuple[int, ...], clock: Clock) -> dict[str, Any]:
    """Loss, its terms and the norm of its gradient."""
    objective.zero_grad()
    objective.method.before_step(clock)
    out = objective(batch, keys, clock)
    out["total"].backward()
    gradients = [p.grad for p in objective.parameters() if p.grad is not None]
    return {
        "loss": number(out["loss"]),
        "losses": {name: number(value) for name, value in out.items() if name.startswith("loss/")},
        "gradient": number(torch.nn.utils.get_total_norm(gradients)),
    }


def read_record(folder: RunFolder, step: int | None) -> dict[str, Any]:
    """Raises: RecipeError naming the steps that there are."""
    paths = {int(path.stem.removeprefix("step-")): path for path in sorted(folder.replay.glob("step-*.json"))}
    if not paths:
        raise RecipeError(f"{folder.path} holds no record of an update that was not applied.")
    step = max(paths) if step is None else step
    if step not in paths:
        raise RecipeError(f"step: found {step}, there are records of {', '.join(map(str, paths))}.")
    try:
        return json.loads(paths[step].read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{paths[step]} cannot be read: {error}.") from None


def load_before(recipe: Recipe, source: Source, folder: RunFolder, step: int) -> tuple[Objective, str]:
    """The module with the newest weights from before that update, and where they are from."""
    method = recipe.build()
    if not source.streaming:
        method.attach(source.size, recipe.train.seed)
    path = checkpoint.find(folder.checkpoints, most=step - 1)[0]
    if path is not None:
        tensors = checkpoint.load(path)[0]["model"]
        method.load_state_dict({n.removeprefix("method."): t for n, t in tensors.items() if n.startswith("method.")})
    return Objective(method, finish=recipe.build_views().finish), "those of the start" if path is None else path.name
