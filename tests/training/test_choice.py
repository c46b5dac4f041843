import json
import math

import pytest
import torch
from safetensors.torch import load_file

from mmssl.cli import main
from mmssl.config.blocks import ChoiceOptions, StopOptions
from mmssl.errors import RecipeError
from mmssl.evaluate import health
from mmssl.training import checkpoint
from mmssl.training.choice import Watched, watched
from mmssl.training.export import export
from mmssl.training.pretrain import Run, prepare, pretrain
from mmssl.training.run_folder import RunFolder


def test_the_best_is_kept_and_what_is_undefined_is_no_better():
    one = Watched("a/b", ChoiceOptions(metric="a/b", least=0.1))
    values = [0.5, 0.55, math.nan, 0.7, None, 0.2]
    found = [one.take(step, {} if value is None else {"a/b": value}) for step, value in enumerate(values)]
    assert found == [True, False, False, True, False, False]
    assert (one.value, one.step, one.waited) == (0.7, 3, 2)
    least = Watched("a/b", ChoiceOptions(metric="a/b", mode="min"))
    assert [least.take(step, {"a/b": value}) for step, value in enumerate((0.5, 0.6, 0.4))] == [True, False, True]
    other = Watched("a/b", ChoiceOptions(metric="a/b"))
    other.load(one.state())
    assert other.state() == one.state()
    other.load(least.state())
    assert (other.value, other.step, other.waited) == (None, None, 0)


def test_metrics_are_found_by_their_short_names():
    names = ["probe/test/knn", "probe/a.test/linear", "probe/b.test/linear", "health/rankme"]

    def found(metric):
        return watched(StopOptions(metric=metric), "watch.stop", names).metric

    assert found("probe/knn") == found("probe/test/knn") == "probe/test/knn"
    assert found("health/rankme") == "health/rankme"
    assert watched(None, "watch.stop", names) is None
    with pytest.raises(RecipeError, match=r"probe/linear could be probe/a.test/linear or probe/b.test/linear; there are"):
        found("probe/linear")
    with pytest.raises(
        RecipeError, match=r"watch.stop.metric: probe/knm is not measured by this run; there are health/rankme, p"
    ):
        found("probe/knm")


def test_the_names_are_those_that_are_measured(tiny_recipe):
    run = prepare(tiny_recipe(), overwrite=True)
    (member,) = run.members
    assert {*member.probes.names(member.objective)} == {*run.measure(run.trainer)}
    assert {*health.of_set(torch.randn(9, 4))} == {*health.OF_SET}


@pytest.fixture
def scripted(monkeypatch):
    """Runs whose k-NN accuracy is what is written here, by step."""
    values = {1: 0.1, 2: 0.6, 3: 0.3, 4: 0.2, 5: 0.25, 6: 0.3, 7: 0.9}
    measure = Run.measure
    monkeypatch.setattr(Run, "measure", lambda run, t: measure(run, t) | {"probe/test/knn": values[t.state.global_step]})


OPTIONS = (
    *(
        "train.steps=7",
        "watch.every=1",
        "watch.change=false",
        "save.every=3",
        "save.keep=1",
        "save.permanent=0",
        "save.proven=0",
    ),
    "save.best.metric=probe/knn",
)


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_a_run_keeps_its_best_and_ends_when_nothing_gets_better(tiny_recipe, scripted, capsys, tmp_path):
    folder = RunFolder(pretrain(tiny_recipe(*OPTIONS, "watch.stop={metric: probe/knn, patience: 3}"), overwrite=True))
    status = folder.read_status()
    assert (status["state"], status["step"]) == ("finished", 5)
    assert status["best"] == {"metric": "probe/test/knn", "value": 0.6, "step": 2}
    assert status["early"] == "probe/test/knn was no better than at step 2 in 3 measurements (watch.stop)"
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-00000002", "step-00000005"]
    saved, _ = checkpoint.load(folder.checkpoints / "step-00000002")
    stem = "method.student.encoder."
    student = {n.removeprefix(stem): t for n, t in saved["model"].items() if n.startswith(stem)}
    best, last = weights(folder.best), weights(folder.model)
    assert all(torch.equal(best[f"encoder.{name}"], tensor) for name, tensor in student.items())
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert main(["status", str(folder.path)]) == 0
    assert "step 2: probe/test/knn 0.6, in best/" in capsys.readouterr().out
    assert main(["export", str(folder.path), "checkpoint=best", f"to={tmp_path / 'again'}"]) == 0
    assert all(torch.equal(best[name], tensor) for name, tensor in weights(tmp_path / "again").items())
    # To go on is to stay where it ended.
    before = folder.metrics.read_text()
    pretrain(tiny_recipe(*OPTIONS, "watch.stop={metric: probe/knn, patience: 3}"), resume=True)
    assert folder.read_status()["state"] == "finished"
    assert folder.metrics.read_text() == before
    # With more patience it goes on, and knows what was the best.
    pretrain(tiny_recipe(*OPTIONS, "watch.stop={metric: probe/knn, patience: 6}"), resume=True)
    assert folder.read_status()["best"]["step"] == 7
    assert folder.read_status()["early"] is None


def test_what_was_the_best_survives_a_resume(tiny_recipe, scripted):
    options = (*OPTIONS, "watch.stop={metric: probe/knn, patience: 4}")

    def stopped(run):
        save = run.trainer.save_run

        def then(trainer):
            save(trainer)
            if trainer.state.global_step == 3:
                raise KeyboardInterrupt

        run.trainer.save_run = then

    run = prepare(tiny_recipe(*options), overwrite=True)
    stopped(run)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    folder = RunFolder(pretrain(tiny_recipe(*options), resume=True))
    status = folder.read_status()
    assert (status["step"], status["best"]["step"]) == (6, 2)
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-00000002", "step-00000006"]
    measured = [line["step"] for line in map(json.loads, folder.metrics.read_text().splitlines()) if "probe/test/knn" in line]
    assert measured == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("key", ["save.best", "watch.stop"])
def test_a_metric_that_is_not_measured_is_refused_before_the_first_step(tiny_recipe, image_folder, key):
    flat = f"data.path={image_folder / 'train' / 'dark'}"
    with pytest.raises(
        RecipeError, match=rf"{key}.metric: probe/knn is not measured by this run; there are health/alpha_req, "
    ):
        prepare(tiny_recipe(flat, f"{key}.metric=probe/knn"), overwrite=True)


def test_what_cannot_be_exported_is_refused(tiny_recipe):
    run = pretrain(tiny_recipe("train.steps=1", "watch.change=false"), overwrite=True)
    with pytest.raises(RecipeError, match=r"keeps no best one; train with save\.best\.metric"):
        export(run, checkpoint="best")
    with pytest.raises(RecipeError, match="found 'worst', allowed are best"):
        export(run, checkpoint="worst", to=run / "x")
    with pytest.raises(RecipeError, match="to: missing"):
        export(run, checkpoint="1")
