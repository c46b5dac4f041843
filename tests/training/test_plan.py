import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmssl.cli import main
from mmssl.errors import RecipeError
from mmssl.model.transformer import Block
from mmssl.training.check import Uncounted, check, cost, largest, tried, updates
from mmssl.training.plan import Cost, Machine, counting_activations, counting_flops, fits, plan, states, table, volume

LARGE = Cost(trained=1000, kept=900, flops=2e12, activations=50.0)


def test_states_are_sharded_as_each_stage_of_zero_says():
    # float32: weights 4000, gradients 4000, two moments 8000, teacher 3600
    assert states(LARGE, "ddp", 8) == 19600
    assert states(LARGE, "zero1", 8) == 4000 + 4000 + 1000 + 3600
    assert states(LARGE, "zero2", 8) == 4000 + 500 + 1000 + 3600
    assert states(LARGE, "zero3", 8) == 19600 / 8
    assert states(LARGE._replace(moments=1), "ddp", 1) == 15600


def test_states_are_what_a_run_holds(trained, tiny_recipe):
    trainer = trained(tiny_recipe()).trainer
    parameters = [p for p in trainer.objective.method.parameters() if p.requires_grad]
    moments = [t for p in parameters for t in trainer.optimizer.state[p].values() if torch.is_tensor(t) and t.ndim]
    kept = [t for part in trainer.objective.method.parts() for t in part.state_dict().values() if t.dtype == torch.float32]
    held = sum(t.numel() * t.element_size() for t in (*parameters, *parameters, *moments, *kept))
    count = sum(p.numel() for p in parameters)
    assert states(Cost(count, sum(t.numel() for t in kept), 0, 0), "ddp", 1) == held


def test_volumes_are_those_of_rings():
    assert volume(LARGE, "ddp", 4) == volume(LARGE, "zero2", 4) == 2 * 4000 * 3 / 4
    assert volume(LARGE, "zero3", 4) == 3 * 4000 * 3 / 4
    assert volume(LARGE, "zero3", 4, micro_batches=2) == 5 * 4000 * 3 / 4
    assert volume(LARGE, "ddp", 1) == 0


def test_a_plan_has_a_row_for_each_engine_and_none_for_more_devices_than_samples():
    rows = plan(LARGE, 64, micro=4, machine=Machine(1e12, 0.5, 100.0, 10.0))
    assert [(row.devices, row.engine) for row in rows] == [
        (1, "ddp"), *((n, e) for n in (8, 64) for e in ("ddp", "zero1", "zero2", "zero3")),
    ]  # fmt: skip
    one, eight, many = rows[0], rows[1], rows[5]
    assert (one.samples, one.memory, one.compute, one.exchange) == (4, 19600 + 200, 64 * 2e12 / 5e11, 0)
    assert (eight.samples, eight.compute, eight.exchange) == (4, 8 * 2e12 / 5e11, 7000 / 100)
    assert (many.samples, many.memory, many.exchange) == (1, 19600 + 50, 2 * 4000 * 63 / 64 / 10)
    text = table(rows, updates=7200)
    assert len(text.splitlines()) == 2 + len(rows)
    assert text.splitlines()[2] == f"| 1 | ddp | 4 | 0.0 | 256 | 0 | 0 | {256 * 2:.3g} |"


def test_products_are_counted_and_those_of_attention_too():
    x = torch.randn(3, 10, 8, requires_grad=True)
    with counting_flops() as found:
        nn.Linear(8, 6)(x).sum().backward()
    assert found() == 3 * 2 * 30 * 8 * 6  # forward, and gradients of input and weight
    block = Block(8, 2, mlp_ratio=4)
    with counting_flops() as found:
        block(x)[0].sum().backward()
    linear, attention = 30 * 8 * 8 * (3 + 1 + 4 + 4), 2 * 3 * 2 * 10 * 10 * 4
    assert found() == 3 * 2 * (linear + attention)


def test_what_waits_for_the_backward_pass_is_counted_once():
    model = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4))
    with counting_activations(model) as found:
        model(torch.randn(5, 8))
    assert found() == 4 * 5 * (8 + 6 + 6)  # input, what enters the GELU, what leaves it


def test_check_counts_a_sample_whatever_the_batch(tiny_recipe):
    small, large = (check(tiny_recipe("train.steps=6", f"train.global_batch={n}")) for n in (4, 16))
    for name in ("trained_parameters", "teacher_parameters", "gflop_per_sample"):
        assert small[name] == large[name] > 0
    assert small["activation_mib_per_sample"] == pytest.approx(large["activation_mib_per_sample"], rel=0.1)
    halved = check(tiny_recipe("train.steps=6", "train.global_batch=16", "train.micro_batch=8"))
    assert halved["gflop_per_sample"] == small["gflop_per_sample"]
    assert cost(large).trained == large["trained_parameters"]
    with pytest.raises(RecipeError, match=r"^train\.compile: "):
        cost({**large, "gflop_per_sample": 0.0})


def test_recomputing_blocks_leaves_less_to_wait(tiny_recipe):
    plain, twice = (check(tiny_recipe("train.steps=6", f"train.recompute={value}")) for value in ("false", "true"))
    assert twice["activation_mib_per_sample"] < 0.9 * plain["activation_mib_per_sample"]
    assert twice["gflop_per_sample"] > 1.1 * plain["gflop_per_sample"]


def test_the_largest_micro_batch_leaves_a_tenth_of_the_memory_free():
    own = Cost(trained=1000, kept=500, flops=1.0, activations=100.0)
    assert fits(own, 0.9**-1 * (4 * 4 * 1000 + 4 * 500 + 750)) == 7
    assert fits(own, 1000) == 0


def test_the_largest_micro_batch_is_what_free_memory_divides_into(tiny_recipe, monkeypatch):
    recipe = tiny_recipe("train.steps=6")
    facts = check(recipe)
    state = 16 * facts["trained_parameters"] + 4 * facts["teacher_parameters"]
    each, free = facts["activation_mib_per_sample"] * 2**20, SimpleNamespace(available=0.0)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    free.available = (state + 5.5 * each) / 0.9
    assert largest(recipe, facts) == 5
    free.available = 1e12
    assert largest(recipe, facts) == facts["samples"] == 32
    free.available = state / 0.9
    with pytest.raises(RecipeError, match=r"^largest: no sample fits: .* try train\.recompute=true"):
        largest(recipe, facts)


def test_with_too_little_memory_a_tenth_fewer_samples_are_tried():
    tries = []

    def attempt(samples):
        tries.append(samples)
        if samples > 75:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert tried(100, attempt) == 72
    assert tries == [100, 90, 81, 72]
    with pytest.raises(RecipeError, match="memory suffices for no sample"):
        tried(1, lambda samples: attempt(76))

    def broken(samples):
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        tried(4, broken)


def test_an_attempt_makes_updates_of_that_many_samples_and_counts_nothing(tiny_recipe):
    run = updates(tiny_recipe("train.steps=6", "train.micro_batch=4", "train.global_batch=4"), Uncounted)
    assert [seen for _, seen in run.trainer.times] == [4, 8, 12, 16, 20]
    assert run.trainer.flops == run.trainer.activations == 0


def test_the_command_says_how_many_fit(tiny_recipe, tmp_path, capsys):
    tiny_recipe()
    assert main(["check", str(tmp_path / "tiny.yaml"), "train.steps=6", "--largest", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["largest_micro_batch"] == 32


def test_the_command_prints_the_plan(tiny_recipe, tmp_path, capsys):
    tiny_recipe()  # writes the file
    words = [str(tmp_path / "tiny.yaml"), "train.steps=6", "train.global_batch=2", "--plan", "batch=64"]
    assert main(["check", *words]) == 0
    printed = capsys.readouterr().out
    assert "Of 64 samples an update" in printed
    assert "| 64 | zero3 | 1 |" in printed
    assert main(["check", *words, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]) == 9
    assert main(["check", *words, "use=1.5"]) == 2
    assert "use: at most 1" in capsys.readouterr().err
