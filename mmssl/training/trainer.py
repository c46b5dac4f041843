"""transformers' Trainer around an objective, thinly: what self-supervision needs otherwise is here, each with its reason."""

from __future__ import annotations

import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmssl import stage
from mmssl.config import Settings
from mmssl.data.quarantine import Quarantine
from mmssl.distributed import all_max, all_sum, check_world, gather_objects, limit_groups, world
from mmssl.errors import CollapseError, DataError, MmsslError, NonFiniteError, RecipeError
from mmssl.evaluate import health
from mmssl.training.choice import Watched
from mmssl.training.guards import LocalGradients, RunningStatistics, forget_gradients, weights_finite
from mmssl.training.launch import check_deepspeed
from mmssl.training.limits import Limits
from mmssl.training.objective import JointObjective, Objective, inside
from mmssl.training.optim import build_optimizer, check_whole, clip_each, schedule, set_rates
from mmssl.training.order import SameOrder
from mmssl.training.retention import Retention
from mmssl.training.signals import Interrupted
from mmssl.training.state import load_optimizer_state
from mmssl.training.watchdog import PATIENCE
from mmssl.training.writing import Writing
from mmssl.types import Clock

HEALTHY = "healthy"  # verdict of a line in which nothing is wrong
RECENT = 1000  # updates among which those that were left out are counted


class Rates:
    """Stands where the Trainer expects a scheduler. The rate is written before the step, since DeepSpeed steps in backward."""

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer

    def step(self) -> None:
        """Nothing: see `SelfSupervisedTrainer.begin_update`."""

    def get_last_lr(self) -> list[float]:
        """As written."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save: rates are a function of the clock."""
        return {}


class Hooks(TrainerCallback):
    """Calls the trainer back at the moments it needs."""

    def __init__(self, trainer: SelfSupervisedTrainer):
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the first micro-batch."""
        self.trainer.begin_update()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the optimizer, before logging, probes and saving."""
        self.trainer.end_update(control)


class SelfSupervisedTrainer(Trainer):
    """Trains an `Objective`.

    Args:
        steps: optimizer updates of the whole run.
        epoch_steps: updates of one pass over the data.
        loader: first update -> batches of this rank from there to the end of the run.
        start: update to begin at; `applied`, `counted` (bad and seen samples) and `optimizer_state` are those of a
            checkpoint.
        report: called with a metrics dict at each logged step, on the main process.
        probe: called every `watch.every` updates on all ranks; returns metrics.
        save: called at each save with the step, on all ranks.
        describe: gives what the method makes of every sample of the data, on all ranks.
        skipped: called after an update that was left out, on all ranks, while `taken` and `norm` still tell of it; returns
            what an error should say about its samples.
        rewind: goes back to a checkpoint because of that error, on all ranks; None where there is nothing to go back to.
        quarantine: counts unreadable samples.
        conclude: what is measured in addition when the run ends; on all ranks.
    """

    def __init__(
        self,
        objective: Objective | JointObjective,
        recipe: Settings,
        args: TrainingArguments,
        steps: int,
        epoch_steps: int,
        loader: Callable[[int], Any],
        report: Callable[[dict[str, Any]], None],
        probe: Callable[[SelfSupervisedTrainer], dict[str, float]],
        save: Callable[[SelfSupervisedTrainer], None],
        quarantine: Quarantine,
        start: int = 0,
        applied: int = 0,
        counted: tuple[int, int] = (0, 0),
        optimizer_state: dict[str, Tensor] | None = None,
        describe: Callable[[SelfSupervisedTrainer], Tensor] | None = None,
        skipped: Callable[[SelfSupervisedTrainer], str] = lambda _: "",
        rewind: Callable[[SelfSupervisedTrainer, MmsslError], None] | None = None,
        rollbacks: int = 0,
        conclude: Callable[[SelfSupervisedTrainer], dict[str, float]] = lambda _: {},
    ):
        super().__init__(model=objective, args=args, callbacks=[Hooks(self)])
        self.remove_callback(PrinterCallback)  # a bar and metrics.jsonl say it better
        check_world(self.accelerator.num_processes)
        if self.is_deepspeed_enabled:
            plugin: Any = self.accelerator.state.deepspeed_plugin
            check_deepspeed(plugin.deepspeed_config, recipe)
            check_whole(recipe.optim)
        self.objective, self.recipe = objective, recipe
        self.steps, self.epoch_steps, self.loader = steps, epoch_steps, loader
        self.report, self.probe, self.save_run, self.quarantine = report, probe, save, quarantine
        self.start, self.applied, self._optimizer_state = start, applied, optimizer_state
        self.counted, (self.bad, self.seen) = counted, counted
        self.rate = schedule(recipe.optim, recipe.train.global_batch, steps / epoch_steps)
        self.lr = 0.0  # of the last update
        self.limits = Limits(objective.method.guards(), recipe.watch, objective.method.judge)
        self._describe = describe
        self.weights: list[dict[str, Tensor]] = []  # of the micro-batches of this update
        self.micro, self.spoilt, self.skips = 0, False, 0
        self.amiss: Tensor  # () bool: whether this rank saw what is not finite in this update; ranks agree on it once
        self.recent: list[int] = []  # steps of the last thousand whose update was left out
        self.taken: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []  # samples, loss terms
        self.norm: float | None = None  # of its gradients, if it came to them
        self.told = ""  # about the samples of the last update that was left out
        self.note_skip, self.rewind, self.rollbacks = skipped, rewind, rollbacks
        self.conclude = conclude
        self.chosen: dict[str, Watched] = {}  # "best", "stop": metrics that decide what is kept, and when to end
        self.warned: set[str] = set()  # metrics below the guard
        self.retention = Retention(steps, recipe.save)
        self.failed_saves = 0  # in a row
        self.writing: Writing | None = None  # on the main process
        self.stop_signal: int | None = None
        self.pending: list[dict[str, Tensor]] = []  # of this update, counted once it is applied
        self.sums: dict[str, Tensor] = {}
        self.terms = 0
        self.skipped_since_log = 0
        self._done = -1  # step that was logged, probed and saved last
        self.samples = 0  # of this rank, since it was started
        self.last_log = (time.perf_counter(), 0)  # and samples by then
        self.metrics: dict[str, float] = {}
        self.first: dict[str, Any] = {}  # line of metrics.jsonl, which later ones are judged against
        self.module_parameters = [p for p in objective.method.parameters() if p.requires_grad]
        self.statistics = RunningStatistics(objective.method)
        self.gradients = LocalGradients(objective.method) if self.is_deepspeed_enabled else None

    @property
    def clock(self) -> Clock:
        """Updates applied, updates planned, pass over the data."""
        return Clock(self.applied, self.steps, self.state.global_step // self.epoch_steps)

    # Data: the loader yields keys from an absolute position; the Trainer must neither re-shard nor skip -----------------

    def get_train_dataloader(self) -> Any:
        """Batches of this rank, from the update that comes next to the end."""
        return Onward(self)

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        """A pass of the Trainer ends early where the run goes back, and the next one begins there."""
        _, *rest = super().set_initial_training_values(*args, **kwargs)
        return 1 + self.recipe.watch.max_rollbacks, *rest

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[Any, None]:
        """Lazily: the Trainer would hold all micro-batches of an update in memory.

        Ragged ones are held after all, as what each of them counts is known only when all are there. None if a signal came.
        """
        try:
            self._begin_epoch()  # before the first batch is fetched, since a method may choose the samples
        except Interrupted:  # the state is still that after the last update
            self._stop(self.control)
            self._done = self.state.global_step
            self._save_checkpoint()
            return [], None
        batches = LazyBatches(epoch_iterator, num_batches, lambda: self._enter("data"))
        if not self.objective.ragged:
            return batches, None
        held = list(batches)
        self.weights = self._weights([self.objective.terms(inputs) for inputs in held])
        return held, None

    def _weights(self, terms: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """What each micro-batch counts, by member, 1 on average over the update and all ranks; of those that differ."""
        weights: list[dict[str, Tensor]] = [{} for _ in terms]
        for name in terms[0] if terms else ():
            mine = torch.stack([one[name] for one in terms]).to(self.args.device, torch.float32)
            shares = mine * (len(terms) * world()) / all_sum(mine.sum()).clamp(min=1)
            for weight, share in zip(weights, shares, strict=True):
                weight[name] = share
        return weights

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        super()._init_training_state(*args, **kwargs)
        self.state.global_step = self.start
        return 0, 0

    # Optimizer -------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with our own parameter groups."""
        self.optimizer = build_optimizer(self.objective, self.recipe.optim, self.rate)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A stand-in."""
        self.lr_scheduler = Rates(self.optimizer)  # type: ignore[assignment]
        return self.lr_scheduler

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        limit_groups(PATIENCE * self.recipe.train.hang_timeout)  # should the watchdog itself be stopped
        if self._optimizer_state is not None:
            load_optimizer_state(self.objective, self.optimizer, self._optimizer_state)
            self._optimizer_state = None
        return prepared

    def describe(self) -> Tensor:
        """(n, F). Raises: RecipeError for a stream, whose samples cannot be gone through beforehand."""
        if self._describe is None:
            raise RecipeError("data.streaming: this method goes through all samples before each pass, which a stream cannot.")
        self._enter("describe")
        return self._describe(self)

    def _begin_epoch(self) -> None:
        """Tell the method if a pass over the data begins, with a description of all samples if it needs one."""
        method, clock = self.objective.method, self.clock
        if self.state.global_step % self.epoch_steps == 0:
            then = time.perf_counter()
            described = self.describe() if method.needs_description(clock) else None
            try:
                method.on_epoch(clock, described)
            except ValueError as error:  # the recipe was checked: what is wrong now is what was learned
                raise CollapseError(f"At step {self.state.global_step}, before a new pass: {error}.") from error
            self._pause(then)

    # One update ------------------------------------------------------------------------------------------------------

    def begin_update(self) -> None:
        """Rates and passes for this update."""
        self.micro, self.spoilt, self.pending, self.taken, self.norm = 0, False, [], [], None
        self.amiss = torch.zeros((), dtype=torch.bool, device=self.args.device)
        assert self.optimizer is not None
        self.lr = self.rate(self.clock) * self.recipe.watch.rollback_factor**self.rollbacks
        self.statistics.keep()
        self.objective.method.before_step(self.clock)
        set_rates(self.optimizer, self.lr, self.clock, self.objective.method)

    def _prepare_input(self, data: Any) -> Any:
        """To the device: what is pinned goes there while the host goes on."""
        return super()._prepare_input(data.to(self.args.device, non_blocking=True) if isinstance(data, Tensor) else data)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of a micro-batch, without a wait for the device: ranks vote once an update on what is finite."""
        self._enter("forward")
        model.train()
        inputs = self._prepare_inputs(inputs)
        keys = self.objective.keys(inputs, self.recipe.train.seed, self.state.global_step, self.micro)
        weights = self.weights[self.micro] if self.weights else None
        indices = self.objective.indices(inputs)
        self.micro += 1
        self.samples += sum(map(len, indices.values()))
        first = self.state.global_step == self.start and self.micro == 1
        with self.compute_loss_context_manager(), SameOrder(self.objective, self.args.device) if first else nullcontext():
            out = model(inputs, keys, self.clock, weights=weights)
        total = out.pop("total") / self.args.gradient_accumulation_steps
        self.taken.append((indices, {name: value for name, value in out.items() if name.startswith("loss/")}))
        for value in (total.detach(), *(value for name, value in out.items() if name.startswith("loss"))):
            self.amiss = self.amiss | ~value.isfinite()
        self._enter("backward")
        self._backward(total)
        self.pending.append(out)
        return torch.zeros_like(total)  # the Trainer's own sum is not logged; see `log`

    def _backward(self, total: Tensor) -> None:
        """Under DeepSpeed the optimizer would step within accelerate's backward; here ranks vote on their gradients first."""
        if self.gradients is None:
            return self.accelerator.backward(total)
        engine: Any = self.model_wrapped
        last = self.accelerator.sync_gradients
        engine.set_gradient_accumulation_boundary(is_boundary=last)
        engine.backward(total, scale_wrt_gas=False)
        self.amiss = self.amiss | self.gradients.take(total.device)
        if last:
            self.spoilt = bool(all_max(self.amiss.float()))
            if not self.spoilt:
                engine.step()

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """The method's gradients only: labels reach the probe, and must not reach the encoder through a shared norm."""
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(self.module_parameters, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Checks the norm on its way: a finite loss can have a non-finite gradient, or one micro-batch may have been bad."""
        self._enter("update")
        if self.is_deepspeed_enabled:
            return super()._get_grad_norm(model, grad_norm)
        if grad_norm is None:
            grad_norm = self.accelerator.clip_grad_norm_(self.module_parameters, math.inf)
        found = torch.as_tensor(grad_norm, device=self.args.device).float()
        amiss, norm = torch.stack([all_max(self.amiss.float()), found]).tolist()
        self.norm = norm
        self.spoilt = bool(amiss) or not math.isfinite(norm)
        if self.spoilt:
            model.zero_grad(set_to_none=True)  # optimizers leave parameters without gradient alone
        if self.recipe.optim.clip_each:
            clip_each(self.module_parameters, self.recipe.optim.clip_each)
        return grad_norm

    def end_update(self, control: TrainerControl) -> None:
        """Teacher and other parts, if the update was applied; decide what happens next."""
        # A weight may be lost in the step itself, or be of use to few samples, so that no loss shows it.
        whole = weights_finite(self.objective.method).to(self.args.device)
        told = torch.tensor([float(self.stop_signal is not None), *self.quarantine.totals()], dtype=torch.float64)
        mine = torch.cat([~whole[None], told.to(self.args.device, non_blocking=True)])
        lost, stop, *counts = all_sum(mine).tolist()
        if lost or self.spoilt or self.accelerator.optimizer_step_was_skipped:
            self._leave_out()
            if error := self._unbearable(bool(lost)):
                return self._retreat(error, control)
        else:
            self.skips = 0
            self.applied += 1
            for out in self.pending:
                for name, value in out.items():
                    self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
            self.terms += len(self.pending)
            self.objective.method.after_step(self.clock)
        self.bad, self.seen = (int(now) + before for now, before in zip(counts, self.counted))
        if self.quarantine.over(self.bad, self.seen):
            raise DataError(self.quarantine.message(self.bad, self.seen))
        last = self.state.global_step >= self.steps
        stop = bool(stop) and not last  # a run that has just ended needs no other end
        if stop:
            self._stop(control)
        if self.skips and not stop and not last:
            control.should_save = False  # in a streak of skipped updates older checkpoints must not rotate away
        every = self.recipe.watch.every
        control.should_evaluate = not stop and bool(last or (every and self.state.global_step % every == 0))
        control.should_log = last or self.state.global_step % self.recipe.train.log_every == 0

    # What was not applied --------------------------------------------------------------------------------------------

    def _leave_out(self) -> None:
        """Of an update that is not applied nothing stays but a record and its place in the order of samples."""
        self.skips += 1
        self.skipped_since_log += 1
        step = self.state.global_step
        self.recent = [*(s for s in self.recent if s > step - RECENT), step]
        self.retention.trouble()
        self.statistics.restore()
        if self.is_deepspeed_enabled:
            inner: Any = self.optimizer
            forget_gradients(inner.optimizer)
        self.told = self.note_skip(self)

    def _unbearable(self, lost: bool) -> NonFiniteError | None:
        """Why the run cannot simply go on with the next batch, if it cannot."""
        train, step = self.recipe.train, self.state.global_step
        mend = "Nothing of it was applied or saved. Lower optim.lr, lengthen optim.warmup, or set optim.clip."
        mend += self.told
        if lost:
            return NonFiniteError(f"Weights are not finite since step {step}; the teacher has not followed them. {mend}")
        if self.skips > train.max_skips:
            return NonFiniteError(
                f"Loss or gradients were not finite in {self.skips} updates in a row, the last one at step {step}. {mend}"
            )
        if len(self.recent) > max(train.max_skips, train.max_skip_share * RECENT):
            return NonFiniteError(
                f"Loss or gradients were not finite in {len(self.recent)} of the last {min(step, RECENT)} updates, "
                f"more than train.max_skip_share allows. {mend}"
            )
        return None

    def _retreat(self, error: MmsslError, control: TrainerControl) -> None:
        """Go back with a lower rate if the recipe wants that, and has not yet too often. Raises: the error otherwise."""
        watch = self.recipe.watch
        policy = watch.on_collapse if isinstance(error, CollapseError) else watch.on_nonfinite
        if policy != "rollback" or self.rewind is None:
            raise error
        if self.rollbacks == watch.max_rollbacks:
            raise type(error)(f"{error} The run went back {self.rollbacks} times already (watch.max_rollbacks).")
        self.rollbacks += 1
        self.rewind(self, error)
        control.should_epoch_stop, control.should_training_stop = True, False
        control.should_log = control.should_evaluate = control.should_save = False

    @property
    def ending(self) -> bool:
        """Whether nothing comes after this save."""
        return self.stop_signal is not None or self.state.global_step >= self.steps or self.early

    def stand_at(self, state: dict[str, Any]) -> None:
        """Take the counters of a checkpoint that was loaded, and forget what came after it.

        Samples stay counted as seen, those that will be seen again too.
        """
        self.state.global_step = self._done = int(state["step"])
        self.applied, self.metrics = int(state["applied"]), state["metrics"]
        self.recent = [*state.get("skipped", [])]
        self.retention = Retention(self.steps, self.recipe.save, state.get("retention"))
        self.take_choices(state)
        self.skips, self.spoilt, self.pending, self.weights = 0, False, [], []
        self.sums, self.terms, self.skipped_since_log = {}, 0, 0
        self.last_log = (time.perf_counter(), self.samples)

    def take_choices(self, state: dict[str, Any]) -> None:
        """What a checkpoint says of the metrics that decide."""
        for name, one in self.chosen.items():
            one.load(state.get("chosen", {}).get(name))

    # Logging, probes, saving -----------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step <= self._done:  # the Trainer calls once more when the loop ends
            return
        self._done = self.state.global_step
        grad_norm = args[1]
        if self.control.should_log:
            collapsed = self._guard(self._log_terms(grad_norm))
            if collapsed is not None:
                return self._retreat(collapsed, self.control)
        if self.control.should_evaluate:
            self._probe()
        if self.control.should_save:
            self._save_checkpoint()
            self.control.should_save = False

    def _probe(self) -> None:
        """Measure and report, unless a signal comes."""
        self._enter("probe")
        then = time.perf_counter()
        try:
            self.metrics = self.probe(self)
            if self.chosen:
                self._choose()
            if self.state.global_step >= self.steps or self.early:
                self.metrics = self.metrics | self.conclude(self)
        except Interrupted:
            return self._stop(self.control)
        self._pause(then)
        self._emit({"step": self.state.global_step, **self.metrics})

    def _choose(self) -> None:
        """Keep this state if it is the best, and end the run if it has not been for long, as the main process sees it."""
        self.metrics = gather_objects(self.metrics)[0]
        if self.skips:
            return  # the weights are those of the measurement before, and nothing is saved
        better = {name for name, one in self.chosen.items() if one.take(self.state.global_step, self.metrics)}
        if "best" in better:
            self.control.should_save = True
        if self.early:
            self.control.should_training_stop = self.control.should_save = True

    @property
    def early(self) -> bool:
        """Whether the run ends before its last update because a metric stopped getting better."""
        watch = self.recipe.watch.stop
        return watch is not None and "stop" in self.chosen and self.chosen["stop"].waited >= watch.patience

    def _log_terms(self, grad_norm: Any) -> dict[str, Any]:
        """Means over the updates since the last line; null, never 0.0, if none of them was applied."""
        names = sorted(self.sums)
        now, (then, before) = time.perf_counter(), self.last_log
        line: dict[str, Any] = {"step": self.state.global_step, "loss": None}
        if self.terms:
            means = all_sum(torch.stack([self.sums[name].float() for name in names])) / (self.terms * world())
            line |= dict(zip(names, means.tolist()))
            line |= {f"health/{name}": value for name, value in self.objective.method.health(self.clock).items()}
            line |= self._outputs()
            self.first = self.first or line
            line["verdict"] = "; ".join(self.objective.method.judge(line, self.first)) or HEALTHY
        line["lr"] = self.lr
        line["epoch"] = round(self.state.global_step / self.epoch_steps, 3)
        if grad_norm is not None:
            line["grad_norm"] = float(grad_norm)
        line["skipped"] = self.skipped_since_log
        line["speed/samples_per_s"] = self.seen_by_all(self.samples - before) / max(now - then, 1e-9)
        self.sums, self.terms, self.skipped_since_log, self.last_log = {}, 0, 0, (now, self.samples)
        self._emit(line)
        return line

    def _outputs(self) -> dict[str, float]:
        """How the pooled outputs of the last update differ, as a mean over the ranks that have enough of them."""
        found: dict[str, float] = {}
        for member, rows in self.objective.outputs.items():
            mine = health.of_outputs(torch.cat(rows)) if rows else {}
            counted = [[mine.get(name, 0.0), float(name in mine)] for name in health.OUTPUTS]
            sums = all_sum(torch.tensor(counted, device=self.args.device)).tolist()
            each = zip(health.OUTPUTS, sums, strict=True)
            found |= {inside(f"health/{name}", member): total / ranks for name, (total, ranks) in each if ranks}
        return found

    def seen_by_all(self, samples: int) -> int:
        """The sum over ranks."""
        return int(all_sum(torch.tensor(samples, device=self.args.device)))

    def _guard(self, line: dict[str, Any]) -> CollapseError | None:
        """Why a run cannot go on whose health is below what `watch.guard` or its method asks for."""
        for name, error in self.limits.breached(line).items():
            self.retention.trouble()
            if self.recipe.watch.on_collapse != "warn":
                return error
            if name not in self.warned and self.is_world_process_zero():
                logging.getLogger("mmssl").warning(str(error))
                print(f"mmssl: note: {error}", file=sys.stderr)
            self.warned.add(name)
        return None

    def _emit(self, line: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            self.report(line)
        self.log({name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """To the trackers of `train.report_to`; the Trainer's own summary at the end is left out."""
        if "train_runtime" not in logs:
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def _save_checkpoint(self, model: Any = None, trial: Any = None) -> None:
        """Our own format, see `training/checkpoint.py`."""
        self._enter("save")
        then = time.perf_counter()
        self.save_run(self)
        self._pause(then)

    def _pause(self, since: float) -> None:
        """Probes and saves do not count as training time."""
        self.last_log = (self.last_log[0] + time.perf_counter() - since, self.last_log[1])

    def _enter(self, name: str) -> None:
        """Where the watchdog finds this rank. The first update may compile, or pass over much data, and is told apart."""
        first = self.state.global_step == self.start and name in ("data", "forward", "backward", "update")
        stage.enter(f"first {name}" if first else name, self.state.global_step)

    # Stopping early --------------------------------------------------------------------------------------------------

    def hear(self, number: int) -> None:
        """Take note of a signal: all ranks stop after this update, or in the middle of what takes longer than one."""
        self.stop_signal = number

    def heed(self) -> None:
        """For loops that take long; a collective. The probes of the last update are finished in any case.

        Raises: Interrupted on all ranks if one of them has heard a signal.
        """
        told = torch.tensor(float(self.stop_signal is not None), device=self.args.device)
        if self.state.global_step < self.steps and float(all_max(told)):
            raise Interrupted

    def _stop(self, control: TrainerControl) -> None:
        """Save, and make no further update."""
        self.stop_signal = self.stop_signal or signal.SIGTERM  # it may be another rank that was told
        control.should_training_stop = control.should_save = True


class Onward:
    """The loader of the Trainer: each time it is gone through, it begins where the run stands."""

    def __init__(self, trainer: SelfSupervisedTrainer):
        self.trainer = trainer

    def __len__(self) -> int:
        """Micro-batches of the whole run."""
        return self.trainer.steps * self.trainer.args.gradient_accumulation_steps

    def __iter__(self) -> Iterator[Any]:
        return iter(self.trainer.loader(self.trainer.state.global_step))


class LazyBatches:
    """The next micro-batches, fetched when they are asked for."""

    def __init__(self, source: Iterator, count: int, begin: Callable[[], None]):
        self.source, self.count, self.begin = source, count, begin

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.count):
            self.begin()
            try:
                yield next(self.source)
            except StopIteration:
                return
