"""What is not finite or collapses: nothing of it stays, it is on record, and the run stops or goes back as the recipe says."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmssl.cli import main
from mmssl.config import Recipe
from mmssl.errors import CollapseError, NonFiniteError, RecipeError
from mmssl.training import checkpoint
from mmssl.training import replay as module
from mmssl.training.guards import all_finite, broken
from mmssl.training.pretrain import prepare, pretrain
from mmssl.training.replay import replay

SMALL = "{image_size: 16, patch_size: 4, hidden_size: 16, depth: 1, heads: 2}"
NORMED = (
    "{backbone: resnet, options: {layer_type: basic, depths: [1], embedding_size: 8, hidden_sizes: [8]}, stem: small, "
    "image_size: 16}"
)
METHODS = {
    "data2vec2": (SMALL, "top_k: 1, momentum: 0.5, decoder: {dim: 16, groups: 4, layers: 2}", "{}"),
    "byol": (NORMED, "hidden: 16, dim: 8", "{crops: asymmetric}"),
    "moco_v2": (NORMED, "hidden: 16, dim: 8, queue: 20, split: 2", "{crops: moco-cifar}"),
    "dino": (SMALL, "hidden: 16, bottleneck: 8, prototypes: 6, head_norm: true", "{crops: dino}"),
}
BAD = 3  # the update that is planted, counted from 1


@pytest.fixture
def setting(image_folder, tmp_path):
    """Function: method, overrides -> a recipe of six updates of two micro-batches, saved after every second one."""

    def build(name: str = "data2vec2", *more: str) -> Recipe:
        model, options, views = METHODS[name]
        path = tmp_path / "tiny.yaml"
        path.write_text(
            f"data: {{path: {image_folder}, modality: vision, workers: 0}}\nmodel: {model}\n"
            f"method: {{name: {name}, {options}}}\nviews: {views}\noptim: {{lr: 0.01}}\n"
            "train: {steps: 6, global_batch: 8, micro_batch: 4, device: cpu, log_every: 1}\n"
            "watch: {samples: 20, every: 0}\nsave: {every: 2, keep: 9}\n"
        )
        return Recipe.load(path, f"out={tmp_path / 'run'}", *more)

    return build


def snapshot(trainer):
    """All that may change: weights, teacher, queues, centres, running statistics, moments."""
    found = dict(trainer.objective.state_dict())
    for name, parameter in trainer.objective.named_parameters():
        found |= {f"{name}.{key}": value for key, value in trainer.optimizer.state.get(parameter, {}).items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def plant(trainer, what, micro=0, steps=(BAD,)):
    """Plant NaN when these updates are made; returns where states before and after each update are kept."""
    begin, prepare_inputs, end = trainer.begin_update, trainer._prepare_inputs, trainer.end_update
    states = {}
    weight = next(p for p in trainer.objective.method.student.parameters() if p.requires_grad and p.dim() > 1)

    def now():
        return trainer.state.global_step + 1 in steps

    def begin_update():
        states[trainer.state.global_step + 1, "before"] = snapshot(trainer)
        if what == "weight" and now():
            weight.data.view(-1)[3] = float("nan")
        begin()

    def inputs_of(inputs):
        inputs = prepare_inputs(inputs)
        if what == "sample" and now() and trainer.micro == micro:
            inputs = {n: t.clone().fill_(float("nan")) if n.endswith(".x") else t for n, t in inputs.items()}
        return inputs

    def end_update(control):
        step = trainer.state.global_step
        end(control)
        states[step, "after"] = snapshot(trainer)

    if what == "gradient":
        weight.register_hook(lambda g: g * float("inf") if now() and trainer.micro == micro + 1 else g)
    trainer.begin_update, trainer._prepare_inputs, trainer.end_update = begin_update, inputs_of, end_update
    return states


PLANTS = [
    ("data2vec2", "sample", 0),
    ("data2vec2", "gradient", 1),
    ("byol", "sample", 1),
    ("moco_v2", "sample", 1),
    ("dino", "gradient", 0),
]


@pytest.mark.parametrize(("method", "what", "micro"), PLANTS)
def test_t12_nothing_of_a_skipped_update_stays(setting, method, what, micro, tmp_path):
    """T12: N1 to N3, N5. Planted in either micro-batch; weights, moments, teacher, queues, centres and statistics keep their
    bits.
    """
    run = prepare(setting(method))
    states = plant(run.trainer, what, micro)
    run.train()
    assert equal(states[BAD, "before"], states[BAD, "after"])
    for step in {1, 2, 4, 5, 6}:
        assert not equal(states[step, "before"], states[step, "after"])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    lines = {line["step"]: line for line in lines if "loss" in line}
    assert [lines[step]["skipped"] for step in range(1, 7)] == [0, 0, 1, 0, 0, 0]
    assert lines[BAD]["loss"] is None
    state = checkpoint.load(checkpoint.newest(tmp_path / "run/checkpoints"))[1]
    assert (state["step"], state["applied"], state["skipped"]) == (6, 5, [BAD])


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, for which a host waits where that lies on a device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
def test_a_micro_batch_does_not_wait_for_the_device(setting, method):
    run = prepare(setting(method))
    training_step, counts = run.trainer.training_step, []

    def counted(*given):
        with Reads() as reads:
            loss = training_step(*given)
        counts.append(reads.count)
        return loss

    run.trainer.training_step = counted
    run.train()
    assert counts == [0] * 12
    with Reads() as reads:
        float(torch.ones(()))
    assert reads.count == 1


def test_t12_a_weight_that_is_lost_is_found_at_that_update(setting, tmp_path):
    """T12, E6: one NaN among the weights stops the run at once; the teacher keeps its bits."""
    run = prepare(setting())
    states = plant(run.trainer, "weight")
    with pytest.raises(NonFiniteError, match=r"Weights are not finite since step 3; the teacher has not followed"):
        run.train()
    now = snapshot(run.trainer)
    teacher = [name for name in now if ".teacher." in name]
    assert teacher
    assert all(torch.equal(states[BAD, "before"][name], now[name]) for name in teacher)
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run/checkpoints")) == 2


def test_t12_a_weight_that_no_loss_depends_on_is_found_too(setting):
    """T12, E6: the teacher would average it all the same."""
    run = prepare(setting())
    unused = torch.nn.Parameter(torch.zeros(2))
    run.objective.method.student.register_parameter("unused", unused)
    begin = run.trainer.begin_update

    def begin_update():
        begin()
        if run.trainer.state.global_step == BAD - 1:
            unused.data[1] = float("inf")

    run.trainer.begin_update = begin_update
    with pytest.raises(NonFiniteError, match="since step 3"):
        run.trainer.train()
    assert run.trainer.applied == BAD - 1


def test_t13_all_nan_stops_within_four_updates_and_keeps_the_last_good_checkpoint(setting, tmp_path):
    """T13: N4, N6."""
    run = prepare(setting("data2vec2", "train.steps=20"))
    plant(run.trainer, "sample", steps=range(BAD, 99))
    with pytest.raises(
        NonFiniteError, match=r"4 updates in a row, the last one at step 6.*\.png.*mmssl replay .* step=6"
    ) as caught:
        run.train()
    assert caught.value.code == 4
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run/checkpoints")) == 2
    pretrain(setting("data2vec2", "train.steps=4"), resume=True)


def test_t13_a_share_of_updates_stops_the_run_too(setting, tmp_path):
    """T13: never two in a row, and too many all the same."""
    run = prepare(setting("data2vec2", "train.steps=20", "train.max_skips=1", "train.max_skip_share=0.003"))
    plant(run.trainer, "sample", steps=range(2, 99, 2))
    with pytest.raises(NonFiniteError, match=r"4 of the last 8 updates, more than train\.max_skip_share"):
        run.train()


def test_n6_what_is_not_finite_is_not_saved(setting, tmp_path):
    """N6: weights, teacher and moments are looked at before a save."""
    for plant_in in ("weights", "teacher", "moments"):
        run = prepare(setting(), overwrite=True)
        probe = run.trainer.probe

        def spoil(trainer, plant_in=plant_in, probe=probe):
            method = trainer.objective.method
            weight = next(method.student.parameters())
            where = {
                "weights": weight.data,
                "teacher": next(method.teacher.network.parameters()).data,
                "moments": trainer.optimizer.state[weight]["exp_avg_sq"],
            }
            metrics = probe(trainer)
            where[plant_in].view(-1)[0] = float("nan")
            return metrics

        run.trainer.probe = spoil  # after the last update, before its save
        with pytest.raises(NonFiniteError, match="nothing was saved"):
            run.train()
        assert checkpoint.step_of(checkpoint.newest(tmp_path / "run/checkpoints")) == 4


def test_finite_is_told_from_large():
    large = torch.full((1000,), 3e38)
    assert all_finite([large, torch.empty(0), torch.arange(3), torch.tensor([1e30], dtype=torch.bfloat16)])
    for value in (float("nan"), float("inf"), -float("inf")):
        assert broken({"a": torch.ones(2), "b": torch.tensor([1.0, value, 1.0])}) == "b"
    assert broken({"a": large}) is None


# Going back -----------------------------------------------------------------------------------------------------------


def curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["lr"]) for line in lines if "loss" in line}


def test_a_streak_goes_back_to_the_last_checkpoint_with_a_lower_rate(setting, tmp_path, capsys):
    """In the same process; and a run that was killed after going back comes to the same numbers."""
    words = ("watch.on_nonfinite=rollback", "train.max_skips=0", "watch.rollback_factor=0.25", "optim.fall=none")
    run = prepare(setting("data2vec2", *words))
    bad = [BAD]
    plant(run.trainer, "sample", steps=bad)
    states, rewind = {}, run.trainer.rewind

    def gone_back(trainer, why):
        rewind(trainer, why)
        states["back"] = snapshot(trainer)
        bad.clear()  # what is planted there once is not there again

    run.trainer.rewind = gone_back
    run.train()
    folder = tmp_path / "run"
    saved = checkpoint.load(folder / "checkpoints/step-00000002")[0]
    assert equal({n: t for n, t in states["back"].items() if n in saved["model"]}, saved["model"])
    assert equal({n: t for n, t in states["back"].items() if n not in saved["model"]}, saved["optimizer"])
    assert {step: rate for step, (_, rate) in curve(folder).items()} == {1: 0.01, 2: 0.01} | dict.fromkeys(range(3, 7), 0.0025)
    assert all(loss is not None for loss, _ in curve(folder).values())
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["rollbacks"]) == ("finished", 1)
    whole = curve(folder)
    assert "Going on from step 2 with 0.25 of the learning rate" in capsys.readouterr().err
    for step in (4, 6):
        checkpoint._remove(folder / f"checkpoints/step-{step:08d}")
    pretrain(setting("data2vec2", *words), resume=True)
    assert curve(folder) == whole


def test_going_back_is_limited_and_needs_a_checkpoint(setting, tmp_path):
    words = ("watch.on_nonfinite=rollback", "train.max_skips=0", "watch.max_rollbacks=2")
    run = prepare(setting("data2vec2", *words))
    plant(run.trainer, "sample", steps=[BAD])
    with pytest.raises(NonFiniteError, match=r"went back 2 times already \(watch\.max_rollbacks\)"):
        run.train()
    run = prepare(setting("data2vec2", *words), overwrite=True)
    plant(run.trainer, "sample", steps=[1])
    with pytest.raises(NonFiniteError, match="There is no checkpoint to go back to"):
        run.train()


def test_a_collapse_is_told_once_stops_or_goes_back(setting, tmp_path, capsys):
    guard = ("watch.guard={target_std: 1e3}", "watch.guard_after=3")
    pretrain(setting("data2vec2", *guard, "watch.on_collapse=warn"))
    assert capsys.readouterr().err.count("below the 1000 of watch.guard") == 1
    with pytest.raises(CollapseError, match="at step 4"):
        pretrain(setting("data2vec2", *guard), overwrite=True)
    with pytest.raises(CollapseError, match=r"at step 4, .* went back 1 times"):
        pretrain(setting("data2vec2", *guard, "watch.on_collapse=rollback", "watch.max_rollbacks=1"), overwrite=True)
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run/checkpoints")) == 2


# The record -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("data2vec2",), ("dino", "views.on_device=true")])
def test_the_record_of_a_skipped_update_is_enough_to_build_its_batch_again(words, setting, monkeypatch, tmp_path, capsys):
    """N5: with the checkpoint's own weights the recorded losses come back, and the bad sample stands out."""
    run = prepare(setting(*words, "train.steps=3"))
    kept, index, step = {}, [], run.trainer.training_step

    def watched(model, inputs, *rest):
        if run.trainer.state.global_step == BAD - 1:
            kept[run.trainer.micro] = {name: tensor.clone() for name, tensor in inputs.items() if name != "label"}
            index.extend(inputs["index"].tolist())
        return step(model, inputs, *rest)

    run.trainer.training_step = watched
    plant(run.trainer, "gradient", 0)
    run.train()
    folder = tmp_path / "run"
    record = json.loads((folder / "replay/step-00000003.json").read_text())
    assert [index for micro in record["ranks"][0] for index in micro["samples"]] == index
    assert record["norm"] in ("nan", "inf")
    assert all(Path(name).is_file() for micro in record["ranks"][0] for name in micro["names"])
    seen, examine = [], module.examine
    monkeypatch.setattr(module, "examine", lambda o, batch, *rest: seen.append(batch) or examine(o, batch, *rest))
    found = replay(folder)
    assert (found["step"], found["weights"]) == (3, "step-00000002")
    for number, batch in enumerate(found["batches"]):
        assert batch["losses"] == pytest.approx(batch["recorded"], rel=1e-6)
        assert [sample["name"] for sample in batch["samples"]] == record["ranks"][0][number]["names"]
        (whole,) = [b for b in seen if b["index"].tolist() == kept[number]["index"].tolist()]
        assert all(torch.equal(whole[name], tensor) for name, tensor in kept[number].items())
    assert main(["replay", str(folder), "step=3"]) == 0
    assert record["ranks"][0][1]["names"][0] in capsys.readouterr().out
    with pytest.raises(RecipeError, match=r"step: found 2, there are records of 3\."):
        replay(folder, 2)
