"""One run, from a checked recipe to a folder with a model."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from mmssl import random
from mmssl.config import Recipe, keyed
from mmssl.data.dataset import KeyedDataset, KeyedStream, start_worker
from mmssl.data.quarantine import Quarantine
from mmssl.data.sampler import KeyBatches
from mmssl.data.sources import Source, open_source
from mmssl.distributed import all_sum, barrier, rank, world
from mmssl.errors import CheckpointError, DataError, MmsslError, NonFiniteError, RecipeError, storage_error
from mmssl.evaluate import collapse, knn
from mmssl.evaluate.features import Loaded, PlainSet, Sets, embed, held_out, open_sets
from mmssl.hub.export import export_encoder, export_heads, load_weights
from mmssl.methods import Method
from mmssl.parts import Teacher
from mmssl.registry import Modality, Views, modality
from mmssl.schedules import Schedule
from mmssl.training import checkpoint
from mmssl.training.launch import batch_split, launched, out, training_arguments
from mmssl.training.objective import Objective
from mmssl.training.progress import Progress
from mmssl.training.run_folder import RunFolder, write_atomic
from mmssl.training.state import load_model_state, model_state, optimizer_state
from mmssl.training.trainer import SelfSupervisedTrainer
from mmssl.types import Clock

T = TypeVar("T")

THIN = 1.5  # effective dimensions of local features below which a run is warned


def pretrain(recipe: Recipe, overwrite: bool = False, resume: bool = False) -> Path:
    """Train as the recipe says.

    Args:
        recipe: checked; `recipe.out` is the run folder.
        overwrite: remove an earlier run in that folder.
        resume: go on from the newest complete checkpoint in that folder.
    Returns: the run folder; `model/` in it is the encoder.
    Raises: MmsslError with the exit status of the contract.
    """
    run = prepare(recipe, overwrite, resume)
    log, handler = logging.getLogger("mmssl"), run.folder.log_handler()
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    try:
        run.train()
    except BaseException as error:
        log.error("stopped: %s: %s", type(error).__name__, error)
        record_failure(run.folder, error, step=run.trainer.state.global_step, steps=run.steps)
        known = storage_error(error, run.folder.path) if isinstance(error, Exception) else None
        if known and not isinstance(error, MmsslError):
            raise known from error
        raise
    finally:
        log.removeHandler(handler)
    return run.folder.path


def prepare(
    recipe: Recipe, overwrite: bool = False, resume: bool = False, trainer: type[SelfSupervisedTrainer] = SelfSupervisedTrainer
) -> Run:
    """Everything up to the first step: processes, data, folder, model. Raises: MmsslError."""
    args = training_arguments(recipe)
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    kind = modality(recipe.data.modality)
    # All this before the folder: a wrong path leaves no trace.
    views = _said("views", recipe.build_views)
    data = survey(recipe, args, kind, views, open_source(recipe.data, kind, recipe.data.split))
    check_method(recipe, data.source, views)
    folder = _first(lambda: reopen(out(recipe)) if resume else RunFolder.create(out(recipe), overwrite), args)
    folder = folder or RunFolder(out(recipe), is_main=False)
    try:
        return Run(recipe, args, kind, views, data, folder, resume, trainer)
    except BaseException as error:
        record_failure(folder, error)
        raise


class Early(Quarantine):
    """What is rejected before there is a folder for the ledger."""

    def __init__(self, share: float, least: int):
        super().__init__(None, share, least)
        self.rejected: list[tuple[str, str, str]] = []

    def record(self, identity: str, kind: str, reason: str = "") -> None:
        """Count and keep."""
        super().record(identity, kind, reason)
        self.rejected.append((identity, kind, reason))

    def hand_over(self, later: Quarantine) -> None:
        """Count and name in `later` what was counted and kept here."""
        later.seen(self.totals()[1])
        for rejected in self.rejected:
            later.record(*rejected)


class Survey(NamedTuple):
    """The data after the modality has looked at all of them."""

    source: Source
    rejected: Early
    same_rows: bool = True  # whether row numbers still mean the same as without the survey


def survey(recipe: Recipe, args: TrainingArguments, kind: Modality, views: Views, source: Source) -> Survey:
    """Let the modality find out what it must know of all samples first.

    The main process goes first, so that the others find what it left on disk. Raises: RecipeError; DataError if more samples
    are bad than the recipe tolerates.
    """
    quarantine, prepare = Early(recipe.data.max_bad, recipe.data.min_bad), kind.prepare
    if prepare is None:
        return Survey(source, quarantine)

    def measured() -> Source:
        found = _said("data", lambda: prepare(source, views, quarantine))
        if quarantine.over():
            raise DataError(quarantine.message())
        return found

    found = _first(measured, args)
    found = measured() if found is None else found
    return Survey(found, quarantine, found.rows is source.rows)


def _said(block: str, make: Callable[[], T]) -> T:
    """What `make` makes; its ValueErrors are about the recipe."""
    try:
        return make()
    except ValueError as error:
        raise RecipeError(keyed(block, error)) from None


def reopen(path: Path) -> RunFolder:
    """A run to go on with, which no other process is training. Raises: RecipeError."""
    folder = RunFolder.open(path)
    folder.check_idle()
    checkpoint.clean(folder.checkpoints)
    for stale in (*folder.path.glob(".tmp-model-*"), *folder.path.glob(".del-model")):
        shutil.rmtree(stale, ignore_errors=True)
    return folder


def record_failure(folder: RunFolder, error: BaseException, **facts: Any) -> None:
    """Leave the cause in status.json, if the folder can still be written."""
    code = error.code if isinstance(error, MmsslError) else (6 if storage_error(error, "") else 8)
    try:
        folder.status("failed", error=f"{type(error).__name__}: {error}", code=code, **facts)
    except (OSError, MmsslError) as second:  # a full disk must not hide the first cause
        print(f"mmssl: status.json could not be written: {second}", file=sys.stderr)


def finish(folder: Path) -> int:
    """Say where the results are; the exit status."""
    if rank() == 0:
        status = RunFolder.open(folder).read_status()["state"]
        if status == "preempted":
            print(f"Stopped by a signal and saved. Go on with: mmssl resume {folder}")
        else:
            scores = {n.split("/", 1)[1]: v for n, v in summary(folder).items() if n.startswith("probe/")}
            told = ", ".join(f"{name} {value:.1%}" for name, value in scores.items())
            print(f"The encoder is in {folder / 'model'}" + (f" ({told})." if told else "."))
    return 0


def _first(make: Callable[[], T], args: TrainingArguments) -> T | None:
    """What `make` makes on the main process, None on the others, which wait for it; its error reaches all ranks."""
    error, made = None, None
    if args.process_index == 0:
        try:
            made = make()
        except Exception as problem:  # whatever it is, the other ranks must hear of it
            error = problem
    failed = float(all_sum(torch.tensor(float(error is not None), device=args.device)))
    if error is not None:
        raise error
    if failed:
        raise RecipeError("The main process could not prepare the run; its message says why.")
    return made


def steps_per_epoch(recipe: Recipe, source: Source, views: Views) -> int:
    """Updates in one pass over the data; of a stream, in the whole run. Raises: RecipeError if the data do not fill a batch."""
    return (recipe.train.steps or 1) if source.streaming else key_batches(recipe, source, views).epoch_length


def key_batches(
    recipe: Recipe,
    source: Source,
    views: Views,
    steps: int = 0,
    start: int = 0,
    order: Callable[[int], torch.Tensor | None] | None = None,
) -> KeyBatches:
    """The order of samples on this rank. Raises: RecipeError if the data do not fill a batch."""
    return KeyBatches(
        source.size,
        recipe.train.global_batch,
        batch_split(recipe, world())[0],
        rank(),
        world(),
        steps,
        recipe.train.seed,
        start,
        source.lengths,
        views.longest,
        recipe.data.buckets,
        recipe.data.budget,
        order,
    )


def check_method(recipe: Recipe, source: Source, views: Views) -> None:
    """Whether the method can learn from these data in such batches, found without memory. Raises: RecipeError."""
    with torch.device("meta"):
        method = recipe.build()
        if source.streaming:
            check_stream(method, recipe)
        else:
            _said("method", lambda: method.attach(source.size, recipe.train.seed))
    sizes = {batch_split(recipe, world())[0] * world()}
    if not source.streaming:
        keys = key_batches(recipe, source, views)
        sizes = {(last - first) // keys.accumulation for first, last in pairwise(keys.plan.cuts)}
    notes = [note for size in sorted(sizes) for note in _said("method", lambda size=size: method.check_batch(size))]
    for note in notes[:1] if rank() == 0 else []:
        print(f"mmssl: note: {note}.", file=sys.stderr)


def check_stream(method: Method, recipe: Recipe) -> None:
    """Whether a method can do without passes over the data and their size. Raises: RecipeError."""
    if method.chooses or method.slots or method.needs_description(Clock()):
        raise RecipeError("data.streaming: this method keeps something for every sample; it needs data of known size.")
    for name, module in method.named_modules():
        for key, value in vars(module).items():
            if key in ("freeze_epochs", "queue_from_epoch") and value:
                where = f", and {name} would never be trained" if key == "freeze_epochs" else ""
                raise RecipeError(f"method.{key}: {value}, a stream has no passes{where}; set it to 0.")
            if isinstance(value, Schedule) and value.by == "epoch" and value.start != value.end:
                raise RecipeError(
                    f"method.{key}: changes by the epoch, and a stream has none; set it to a number, or by: step."
                )
    if recipe.optim.by == "epoch":
        raise RecipeError("optim.by: epoch, and a stream has none; set it to step, with warmup and hold in updates.")


class PassByPass:
    """Loaders of one pass after the other, each made when the pass begins: its order may depend on what was learned before."""

    def __init__(self, make: Callable[[int, int], DataLoader], start: int, steps: int, epoch_steps: int):
        self.make, self.start, self.steps, self.epoch_steps = make, start, steps, epoch_steps

    def __len__(self) -> int:
        """Micro-batches of the whole run."""
        return len(self.make(0, self.steps))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        first = self.start
        while first < self.steps:
            last = min(self.steps, (first // self.epoch_steps + 1) * self.epoch_steps)
            yield from self.make(first, last)
            first = last


class Run:
    """The pieces of one run and what happens at its turning points."""

    def __init__(
        self,
        recipe: Recipe,
        args: TrainingArguments,
        kind: Modality,
        views: Views,
        data: Survey,
        folder: RunFolder,
        resume: bool = False,
        trainer: type[SelfSupervisedTrainer] = SelfSupervisedTrainer,
    ):
        self.recipe, self.args, self.views, self.folder = recipe, args, views, folder
        self.source = source = data.source
        self.micro, self.accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        self.epoch_steps = steps_per_epoch(recipe, source, views)
        self.steps = recipe.train.steps or max(1, round((recipe.train.epochs or 1) * self.epoch_steps))
        args.max_steps = self.steps
        whole = -(-self.steps // self.epoch_steps) if recipe.optim.by == "epoch" else self.steps
        if recipe.optim.warmup + recipe.optim.hold >= whole and folder.is_main:
            reached = "the rate never reaches optim.lr" if recipe.optim.warmup >= whole else "the rate never falls"
            hold = f" and optim.hold={recipe.optim.hold}" if recipe.optim.hold else ""
            print(
                f"mmssl: note: optim.warmup={recipe.optim.warmup}{hold} fill the run of {whole} {recipe.optim.by}s; {reached}.",
                file=sys.stderr,
            )
        self.quarantine = Quarantine(folder.quarantine, recipe.data.max_bad, recipe.data.min_bad)
        if folder.is_main and not resume:  # each rank has surveyed the same samples, and a checkpoint has counted them
            data.rejected.hand_over(self.quarantine)
        self.sets: Sets | None = None
        self.warned = False
        if not source.streaming or recipe.watch.path:
            self.sets = open_sets(recipe.data, recipe.watch, kind, self.views, recipe.train.seed)
        classes, source = self._probed(data)
        if source.streaming:
            self.dataset: Any = None
            self.stream = lambda first: KeyedStream(
                source,
                kind,
                self.views,
                recipe.train.seed,
                self.quarantine,
                micro_batch=self.micro,
                batches=self.steps * self.accumulation,
                start=first,
                rank=rank(),
                world=world(),
                readers=recipe.data.readers,
                block=recipe.data.block,
            )
        else:
            self.dataset = KeyedDataset(source, kind, self.views, recipe.train.seed, self.quarantine)
        method = recipe.build()
        if not source.streaming:
            method.attach(source.size, recipe.train.seed)
        if recipe.model.init and not resume:  # type: ignore[attr-defined]
            load_weights(method.student.encoder, recipe.model.init)  # type: ignore[attr-defined]
            for part in method.parts():
                part.restart()
        if recipe.train.compile:
            encoders = [method.student.encoder, *(part.encoder for part in method.parts() if isinstance(part, Teacher))]
            for block in (b for e in encoders for b in e.compilable()):
                block.compile()
        self.objective = Objective(method, classes)
        tensors, state = self._resume() if resume else ({}, {})
        folder.write_identity(recipe.dump(), sys.argv, source.facts)
        self.start = int(state.get("step", 0))
        self.progress = Progress(folder, self.steps, self.start, quiet=not folder.is_main)
        self.trainer = trainer(
            self.objective,
            recipe,
            args,
            self.steps,
            self.epoch_steps,
            self._loader,
            self.progress.report,
            self._probe,
            self._save,
            self.quarantine,
            self.start,
            state.get("applied", 0),
            tuple(state.get("samples", (0, 0))),
            tensors.get("optimizer"),
            self.views.ragged,
            None if self.source.streaming else self._describe,
        )
        self.trainer.metrics = state.get("metrics", {})

    def _probed(self, data: Survey) -> tuple[int, Source]:
        """Classes of the online linear probe, 0 for none, and the data with the labels that it may learn from."""
        source = data.source
        if not self.recipe.watch.linear or source.labels is None or self.sets is None or self.sets.test is None:
            return 0, source
        measured = self.sets.test.data.source
        if measured.facts.get("classes") != source.facts.get("classes"):
            return 0, source  # of another data set, with other classes
        if self.sets.name != "heldout":
            return source.classes, source
        if self.recipe.data.limit is not None or not data.same_rows:
            return 0, source  # the held-out samples are not to be found among these
        labels = source.labels.clone()
        labels[held_out(source, self.recipe.train.seed)] = -1
        return source.classes, source._replace(labels=labels)

    def _loader(self, start: int) -> DataLoader | PassByPass:
        """Batches of this rank from update `start` to the end."""
        workers = self.recipe.data.workers
        common: dict[str, Any] = {
            "num_workers": workers,
            "pin_memory": self.args.device.type == "cuda",
            "persistent_workers": False,
            "prefetch_factor": 4 if workers else None,
            "worker_init_fn": start_worker if workers else None,
        }
        if self.source.streaming:
            return DataLoader(self.stream(start * self.accumulation), batch_size=None, **common)

        def keyed(first: int, last: int) -> DataLoader:
            keys = key_batches(self.recipe, self.source, self.views, last, first, self._order if self._chooses else None)
            return DataLoader(self.dataset, batch_sampler=keys, collate_fn=self.dataset.collate, **common)

        return PassByPass(keyed, start, self.steps, self.epoch_steps) if self._chooses else keyed(start, self.steps)

    @property
    def _chooses(self) -> bool:
        return self.objective.method.chooses

    def _order(self, epoch: int) -> torch.Tensor | None:
        """The samples of a pass, which the method chooses."""
        return self.objective.method.order(Clock(epoch * self.epoch_steps, self.steps, epoch))

    def launch(self) -> dict[str, Any]:
        """How the run was really started, as seen from inside."""
        plugin = getattr(self.trainer.accelerator.state, "deepspeed_plugin", None)
        return {
            "distributed": self.trainer.accelerator.distributed_type.name,
            "processes": {"accelerate": self.trainer.accelerator.num_processes, "torch": world(), "launcher": launched()},
            "zero_stage": plugin.zero_stage if plugin else None,
            "clip": plugin.deepspeed_config["gradient_clipping"] if plugin else self.args.max_grad_norm,
            "device": str(self.args.device),
        }

    def train(self) -> None:
        """To the end, or to a signal."""
        self.folder.status("running", step=self.trainer.start, steps=self.steps, launch=self.launch())
        with self.progress:
            try:
                self.trainer.run()
            except DataError as error:  # from a worker it comes with a traceback before its text
                raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from None
        step = self.trainer.state.global_step
        self.folder.status("preempted" if step < self.steps else "finished", step=step, steps=self.steps)

    def _describe(self, trainer: SelfSupervisedTrainer) -> torch.Tensor:
        """(n, F) what the method makes of every sample, in the order of the data set; a collective.

        Gone through in a shuffled order: a method may use batch statistics, and folders are sorted by class.
        """
        order = random.permutation(self.source.size, self.recipe.train.seed, "describe")
        data = PlainSet(self.source, self.dataset.kind, self.views, order.tolist())
        batches = Loaded(data, self.micro, self.recipe.data.workers)
        model: Any = trainer.model_wrapped
        was_training = model.training
        model.eval()

        def run(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            inputs = {name: tensor for name, tensor in batch.items() if name not in ("raw", "valid", "label")}
            return model(trainer._prepare_inputs(inputs), describe=True)

        with trainer.compute_loss_context_manager():
            found = embed(batches, run, bare=True)["described"]
        model.train(was_training)
        return torch.empty_like(found).index_copy_(0, order, found).to(self.args.device)

    # Probes ----------------------------------------------------------------------------------------------------------

    def _probe(self, trainer: SelfSupervisedTrainer) -> dict[str, float]:
        """Metrics of the student on the sets of `watch`; a collective."""
        if self.sets is None:
            return {}
        model: Any = trainer.model_wrapped
        was_training = model.training
        model.eval()

        def run(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            inputs = {name: tensor for name, tensor in batch.items() if name not in ("raw", "valid", "label")}
            return model(trainer._prepare_inputs(inputs))

        with trainer.compute_loss_context_manager():
            bank = embed(self.sets.train, run)
            if self.objective.probe is not None:
                self.objective.standardise.calibrate(bank["embedding"])
            test = embed(self.sets.test, run) if self.sets.test else None
        model.train(was_training)
        metrics = {
            "health/rankme": collapse.rankme(bank["embedding"]),
            "health/embedding_std": collapse.dimension_std(bank["embedding"]),
            "health/feature_rankme": collapse.rankme(bank["local"]),
        }
        self._warn(metrics["health/feature_rankme"])
        if test is not None:
            name, k = self.sets.name, self.recipe.watch.neighbours
            metrics[f"probe/{name}/knn"] = knn.knn_accuracy(
                bank["embedding"], bank["label"], test["embedding"], test["label"], k
            )
            if "logits" in test:
                metrics[f"probe/{name}/linear"] = float((test["logits"].argmax(1) == test["label"]).float().mean())
        return metrics

    def _warn(self, rank_of_features: float) -> None:
        """Say once that local features degenerate, which neither loss nor the variance of targets shows."""
        if self.warned or not self.folder.is_main or rank_of_features >= THIN:
            return
        self.warned = True
        text = (
            f"local features use {rank_of_features:.1f} dimensions (health/feature_rankme): the feature encoder may be "
            "collapsing although targets vary. Lower optim.lr, raise method.momentum, or lengthen optim.warmup."
        )
        logging.getLogger("mmssl").warning(text)
        print(f"mmssl: note: {text}", file=sys.stderr)

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def _save(self, trainer: SelfSupervisedTrainer) -> None:
        """Checkpoint and `model/`, written by the main process from whole tensors."""
        tensors = {"model": model_state(self.objective), "optimizer": optimizer_state(self.objective, trainer.optimizer)}
        broken = [n for part in tensors.values() for n, t in part.items() if not bool(t.isfinite().all())]
        if broken:
            raise NonFiniteError(f"{broken[0]} is not finite at step {trainer.state.global_step}; nothing was saved.")
        problem: Exception | None = None
        if self.folder.is_main:
            step = trainer.state.global_step
            state = {
                "step": step,
                "applied": trainer.applied,
                "steps": self.steps,
                "world": world(),
                "samples": [trainer.bad, trainer.seen],
                "metrics": trainer.metrics,
            }
            try:
                checkpoint.save(self.folder.checkpoints, step, tensors, state, self.recipe.save.keep)
                export_encoder(self.recipe, self.views, tensors["model"], self.folder.model, metrics=trainer.metrics, step=step)
                export_heads(tensors["model"], self.folder.heads)
                write_atomic(self.folder.card, (self.folder.model / "README.md").read_text("utf-8"))
                self.folder.status("running", step=step, steps=self.steps)
            except Exception as error:  # whatever it is, the other ranks must hear of it
                problem = error
        failed = float(all_sum(torch.tensor(float(problem is not None), device=self.args.device)))
        if problem is not None:
            raise problem
        if failed:
            raise CheckpointError("The main process could not save; its message says why.")
        barrier()

    def _resume(self) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
        """Tensors and state of the newest usable checkpoint; the weights are loaded already. Raises: CheckpointError."""
        path, reasons = checkpoint.find(self.folder.checkpoints)
        for reason in reasons if self.folder.is_main else []:
            print(f"mmssl: checkpoint left out: {reason}", file=sys.stderr)
        if path is None:
            raise CheckpointError(f"{self.folder.path} holds no usable checkpoint. Start again with overwrite=true.")
        tensors, state = checkpoint.load(path)
        if self.source.streaming and state["world"] != world():
            raise CheckpointError(f"A stream resumes on as many processes as it was saved on: {state['world']}, not {world()}.")
        load_model_state(self.objective, tensors["model"])
        self.folder.truncate_metrics(int(state["step"]))
        return tensors, state


def summary(folder: Path) -> dict[str, Any]:
    """The last value of every metric of a run."""
    last: dict[str, Any] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        last |= json.loads(line)
    return last
