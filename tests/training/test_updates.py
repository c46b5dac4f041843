"""What the trainer does with the micro-batches of an update: what each counts, what is logged, when it stops."""

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader

from mmssl.config import Recipe
from mmssl.data.quarantine import Quarantine
from mmssl.errors import CollapseError, RecipeError
from mmssl.methods import Method
from mmssl.parts import Part
from mmssl.training import checkpoint
from mmssl.training import trainer as module
from mmssl.training.launch import training_arguments
from mmssl.training.objective import Objective
from mmssl.training.pretrain import pretrain
from mmssl.training.trainer import SelfSupervisedTrainer
from mmssl.types import Batch, StepOutput, View

# Eight samples of unlike length: valid tokens of each.
VALID = torch.tensor([7, 1, 3, 2, 6, 5, 1, 4])


class Meter(Part):
    def health(self, clock):
        return {"applied": float(clock.step)}


class MeanOverTokens(Method):
    """Mean squared error over the valid tokens of a micro-batch: its denominator depends on what is in it."""

    masks = False

    def __init__(self):
        super().__init__()
        self.student = nn.Module()
        self.student.encoder = nn.Module()
        self.student.encoder.dim = 3
        self.linear, self.meter = nn.Linear(3, 1), Meter()
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[0.5, -1.0, 2.0]]))
            self.linear.bias.fill_(0.25)

    def forward(self, batch, clock):
        (view,) = batch.views
        error = self.linear(view.x).squeeze(-1).square()[~view.pad]
        return StepOutput({"a": error.mean(), "b": 2 * error.mean()}, {"rows": torch.tensor(float(len(batch.index)))})

    def terms(self, batch):
        return (~batch.views[0].pad).sum()


def batch_of(rows: list[int]) -> dict[str, torch.Tensor]:
    values = torch.randn(8, 7, 3, generator=torch.Generator().manual_seed(0))
    pad = torch.arange(7) >= VALID[rows, None]
    return Batch([View(values[rows], "fake", pad)], torch.tensor(rows)).tensors()


class Spy(SelfSupervisedTrainer):
    gradient = None

    def _get_grad_norm(self, model, grad_norm=None):
        self.gradient = torch.cat([p.grad.flatten().clone() for p in self.objective.method.parameters()])
        return super()._get_grad_norm(model, grad_norm)


def one_update(folder, batches: list[list[int]], ragged: bool = True, method=None):
    """An update of those micro-batches of this rank: trainer, logged lines."""
    micro = len(batches[0])
    recipe = Recipe.load(
        "vision/data2vec2-demo",
        f"out={folder}",
        f"train={{steps: 1, global_batch: {micro * len(batches) * int(os.environ.get('WORLD_SIZE', '1'))}, "
        f"micro_batch: {micro}, device: cpu, log_every: 1}}",
        "optim={lr: 0.1}",
    )
    lines = []
    trainer = Spy(
        Objective(method or MeanOverTokens(), ragged=ragged),
        recipe,
        training_arguments(recipe),
        steps=1,
        epoch_steps=1,
        loader=lambda first: DataLoader([batch_of(rows) for rows in batches], batch_size=None),
        report=lines.append,
        probe=lambda _: {},
        save=lambda _: None,
        quarantine=Quarantine(None, 1.0, 0),
    )
    trainer.train()
    return trainer, [line for line in lines if "loss" in line]


def by_hand():
    """Gradient and loss of the mean over all valid tokens of the eight samples."""
    batch, (weight, bias) = Batch.from_tensors(batch_of([*range(8)])), MeanOverTokens().linear.parameters()
    total, slope, offset = 0.0, torch.zeros(3), 0.0
    for row, valid in enumerate(VALID.tolist()):
        for token in batch.views[0].x[row, :valid]:
            guess = float((weight[0] @ token + bias).detach())
            total, slope, offset = total + guess**2, slope + 2 * guess * token, offset + 2 * guess
    count = int(VALID.sum())
    return torch.cat([slope, torch.tensor([offset])]) * 3 / count, total / count


SPLITS = [[[*range(8)]], [[0, 1], [2, 3], [4, 5], [6, 7]], [[5, 0, 1, 2], [7, 6, 3, 4]], [[i] for i in range(8)]]


@pytest.mark.parametrize("batches", SPLITS)
def test_ragged_micro_batches_add_up_to_the_mean_over_all_terms(batches, tmp_path):
    trainer, (line,) = one_update(tmp_path, batches)
    gradient, loss = by_hand()
    torch.testing.assert_close(trainer.gradient, gradient, rtol=1e-5, atol=1e-6)
    assert line["loss/a"] == pytest.approx(loss, rel=1e-5)
    assert line["loss/b"] == pytest.approx(2 * loss, rel=1e-5)
    assert line["loss"] == pytest.approx(3 * loss, rel=1e-5)
    assert line["health/rows"] == len(batches[0])


def test_without_raggedness_every_micro_batch_counts_the_same(tmp_path):
    trainer, (line,) = one_update(tmp_path, SPLITS[1], ragged=False)
    assert line["loss/a"] != pytest.approx(by_hand()[1], rel=1e-2)
    uncounted = MeanOverTokens()
    uncounted.terms = lambda batch: None
    same, (again,) = one_update(tmp_path, SPLITS[1], method=uncounted)
    assert torch.equal(same.gradient, trainer.gradient)
    assert again["loss/a"] == line["loss/a"]


def measure(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": Path(folder, "port").read_text()}
    trainer, lines = one_update(folder, [[0, 1], [2, 3]] if rank == 0 else [[4, 5], [6, 7]])
    torch.save((trainer.gradient, lines, trainer.seen_by_all(trainer.samples)), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.mark.distributed
def test_ragged_micro_batches_of_two_ranks_add_up_too(tmp_path):
    (tmp_path / "port").write_text(free_port())
    mp.spawn(measure, (str(tmp_path),), nprocs=2)
    gradient, loss = by_hand()
    (first, (line,), seen), (second, none, _) = (torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))
    torch.testing.assert_close(first, gradient, rtol=1e-5, atol=1e-6)
    assert torch.equal(first, second)
    assert line["loss/a"] == pytest.approx(loss, rel=1e-5)
    assert (none, seen) == ([], 8)


def test_parts_are_asked_for_their_health(tmp_path):
    assert one_update(tmp_path, SPLITS[0])[1][0]["health/applied"] == 1.0


def test_speed_counts_the_samples_that_were_seen(tmp_path, monkeypatch):
    """A clock that ticks two seconds for each micro-batch."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    forward = MeanOverTokens.forward
    monkeypatch.setattr(MeanOverTokens, "forward", lambda *a: (now.append(now.pop() + 2.0), forward(*a))[1])
    trainer, (line,) = one_update(tmp_path, [[0, 1], [2], [3, 4, 5]])
    assert trainer.samples == 6
    assert line["speed/samples_per_s"] == 6 / 6.0


# The guard ----------------------------------------------------------------------------------------------------------


def test_the_guard_sleeps_until_its_update_and_then_stops_the_run(tiny_recipe, tmp_path):
    recipe = tiny_recipe(
        "train.steps=6", "watch.guard={target_std: 1e3}", "watch.guard_after=3", "save.every=1", "watch.every=0"
    )
    with pytest.raises(CollapseError, match=r"target_std is [\d.]+ at step 4, below the 1000 .*optim\.lr.*momentum") as caught:
        pretrain(recipe)
    assert caught.value.code == 4
    run = tmp_path / "run"
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(lines) == 4  # what made it stop is logged
    assert checkpoint.step_of(checkpoint.find(run / "checkpoints")[0]) == 3
    assert '"state": "failed"' in (text := (run / "status.json").read_text())
    assert '"code": 4' in text


def test_the_guard_is_silent_above_its_value_and_before_its_update(tiny_recipe, trained):
    guard = "watch.guard={target_std: 1.0e-9, momentum: 0.5}"  # equal is not below
    for more in (("watch.guard={target_std: 1e3}", "watch.guard_after=3"), (guard, "watch.guard_after=0")):
        run = trained(tiny_recipe("train.steps=3", *more))
        assert run.trainer.state.global_step == 3
        assert all(line["health/momentum"] == 0.5 for line in run.lines if "loss" in line)


def test_the_guard_looks_at_the_mean_since_the_last_line(tmp_path):
    trainer, (line,) = one_update(tmp_path, [[0, 1], [2]])
    assert line["health/rows"] == 1.5
    trainer.recipe.watch.guard, trainer.recipe.watch.guard_after = {"rows": 1.4}, 0
    assert trainer._guard(line) is None
    trainer.recipe.watch.guard = {"rows": 1.6}
    assert "health/rows is 1.5 at step 1, below the 1.6" in str(trainer._guard(line))
    assert trainer._guard(line | {"health/rows": float("nan")}) is not None  # what is no number is not above anything
    assert trainer._guard({"step": 1, "loss": None}) is None  # all updates since the last line were skipped


def test_a_guard_of_an_unknown_metric_names_those_that_exist(tiny_recipe, trained):
    with pytest.raises(RecipeError, match=r"watch\.guard\.target_sdt: .*known are .*target_std") as caught:
        trained(tiny_recipe("watch.guard={target_sdt: 0.1}"))
    assert caught.value.code == 2
