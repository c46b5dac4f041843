"""The same training in a plain accelerate loop: no Trainer, nothing hidden. Copy it when the Trainer is in your way.

Without micro-batches, unequal numbers of tokens on several ranks, probes, checkpoints, streams and compilation.

accelerate launch recipes/no_trainer.py RECIPE [key=value ...]
"""

import math
import sys

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.utils.data import DataLoader

from mmssl.config import Recipe
from mmssl.data.dataset import KeyedDataset
from mmssl.data.quarantine import Quarantine
from mmssl.data.sampler import KeyBatches
from mmssl.data.sources import open_source
from mmssl.errors import RecipeError
from mmssl.random import row_keys
from mmssl.registry import modality
from mmssl.training.objective import Objective
from mmssl.training.optim import build_optimizer, clip_each, schedule, set_rates
from mmssl.types import Clock


def train(recipe: Recipe) -> list[float]:
    """Train. Returns: the loss of each step on this process. Raises: RecipeError for what this loop leaves out."""
    accelerator = Accelerator(
        cpu=recipe.train.device == "cpu" or not torch.cuda.is_available(),
        mixed_precision="bf16" if recipe.train.precision == "bf16" else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False, broadcast_buffers=False)],
    )
    rank, world, seed = accelerator.process_index, accelerator.num_processes, recipe.train.seed
    kind, views = modality(recipe.data.modality), recipe.build_views()
    source = open_source(recipe.data, kind, recipe.data.split)
    t = recipe.train
    if source.streaming or recipe.model.init or t.compile or t.recompute or t.encoder_batch:  # type: ignore[attr-defined]
        raise RecipeError(
            "data.streaming, model.init, train.compile, train.recompute and train.encoder_batch are for `mmssl pretrain`."
        )
    if views.ragged and world > 1:
        raise RecipeError(
            f"{recipe.data.modality} on several ranks is for `mmssl pretrain`, which weighs them by their tokens."
        )
    quarantine = Quarantine(None, recipe.data.max_bad, recipe.data.min_bad)
    source = kind.prepare(source, views, quarantine) if kind.prepare else source
    data = KeyedDataset(source, kind, views, seed, quarantine)
    batch, length, d = recipe.train.global_batch, views.longest, recipe.data
    keys = KeyBatches(source.size, batch, batch // world, rank, world, 0, seed, 0, source.lengths, length, d.buckets, d.budget)
    per_epoch = keys.epoch_length
    steps = keys.steps = recipe.train.steps or round((recipe.train.epochs or 1) * per_epoch)
    loader = DataLoader(data, batch_sampler=keys, collate_fn=data.collate, num_workers=recipe.data.workers)

    method = recipe.build()
    if method.chooses or method.needs_description(Clock()):
        raise RecipeError(f"{recipe.method.name} clusters all samples before a pass: it is for `mmssl pretrain`.")  # type: ignore[attr-defined]
    method.attach(source.size, seed)
    objective = Objective(method, finish=views.finish).to(accelerator.device)
    rate = schedule(recipe.optim, recipe.train.global_batch, steps / per_epoch)
    optimizer = build_optimizer(objective, recipe.optim, rate)
    model, optimizer = accelerator.prepare(objective, optimizer)
    losses = []
    for step, batch in enumerate(loader):
        clock = Clock(step, steps, step // per_epoch)
        if step % per_epoch == 0:
            method.on_epoch(clock)
        method.before_step(clock)
        set_rates(optimizer, rate(clock), clock, method)
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        out = model(batch, row_keys(seed, step, 0, len(batch["index"]), rank, world), clock)
        accelerator.backward(out["total"])
        if recipe.optim.clip:
            accelerator.clip_grad_norm_(objective.parameters(), recipe.optim.clip)
        clip_each(objective.parameters(), recipe.optim.clip_each or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(clock._replace(step=step + 1))  # the teacher moves after the student
        losses.append(float(out["loss"]))
        if accelerator.is_main_process and step % recipe.train.log_every == 0:
            print(f"step {step}  loss {losses[-1]:.5f}")
    return losses


if __name__ == "__main__":
    train(Recipe.load(sys.argv[1], *sys.argv[2:]))
