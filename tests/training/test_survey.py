"""What a modality finds out about all samples before a run begins."""

import json
from types import SimpleNamespace

import pytest
import torch

from mmssl.data.quarantine import Quarantine
from mmssl.data.sources.source import Source
from mmssl.errors import DataError, RecipeError
from mmssl.registry import modality
from mmssl.training.check import check
from mmssl.training.pretrain import prepare, pretrain
from mmssl.training.survey import Early, survey
from mmssl.training.trainer import SelfSupervisedTrainer
from modalities.vision.views import ImageViews

LEFT_OUT = (3, 11)


@pytest.fixture
def measured(monkeypatch):
    """Function: what `prepare` of images does."""

    def use(prepare):
        changed = modality("vision")._replace(prepare=prepare)
        monkeypatch.setattr("mmssl.training.member.modality", lambda name: changed)

    return use


def lengths(source, views, quarantine):
    """Images get a length of 10 to 41; two cannot be used."""
    quarantine.seen(source.size)
    found = torch.arange(10, 10 + source.size)
    for index in LEFT_OUT:
        quarantine.record(source.identity(index), "truncated", "said so")
        found[index] = -1
    return source._replace(lengths=found, facts=source.facts | {"hours": 7})


def ledger(run):
    return [json.loads(line)["identity"] for line in (run / "quarantine.jsonl").read_text().splitlines()]


def state_of(run):
    (folder,) = (run / "checkpoints").glob("step-*")
    return json.loads((folder / "state.json").read_text())


def test_lengths_reach_the_batches_and_the_views(tiny_recipe, trained, measured, monkeypatch):
    measured(lengths)
    told, make = [], ImageViews.__call__
    monkeypatch.setattr(ImageViews, "longest", 30)
    monkeypatch.setattr(ImageViews, "__call__", lambda *a: told.append(a[-1]) or make(*a))
    shapes = ("train.steps=7", "train.global_batch=4", "train.micro_batch=2", "data.budget=60", "data.buckets=3")
    seen, step = [], SelfSupervisedTrainer.training_step
    monkeypatch.setattr(
        SelfSupervisedTrainer, "training_step", lambda t, m, b, *r: seen.append(b["index"].tolist()) or step(t, m, b, *r)
    )
    run = trained(tiny_recipe(*shapes))
    # Thirty images: ten of length 10 to 20, of which 3 fit into 60 units, and twenty of up to 30, of which 2 do. After six of
    # the short ones a third sample would come from the long ones.
    assert run.epoch_steps == 7
    assert sorted(len(batch) for batch in seen) == [2] * 12 + [3] * 2
    assert not set(LEFT_OUT) & {index for batch in seen for index in batch}
    updates = [seen[i] + seen[i + 1] for i in range(0, 14, 2)]
    least = [min(min(10 + index, 30) for index in update) for update in updates]
    assert told == [length for length, update in zip(least, updates) for _ in update]
    assert run.trainer.samples == sum(map(len, seen))
    assert run.objective.ragged is False


def test_check_counts_samples_of_unlike_batches(tiny_recipe, measured, monkeypatch):
    measured(lengths)
    monkeypatch.setattr(ImageViews, "ragged", True)
    shapes = ("train.steps=9", "train.global_batch=4", "train.micro_batch=2", "data.budget=60", "data.buckets=3")
    seen, end = [], SelfSupervisedTrainer.end_update
    monkeypatch.setattr(SelfSupervisedTrainer, "end_update", lambda t, c: seen.append(t.samples) or end(t, c))
    facts = check(tiny_recipe(*shapes))
    assert len(seen) == 5  # the first two are counted in, not timed
    assert facts["samples_per_second"] * facts["seconds_per_update"] * 3 == pytest.approx(seen[4] - seen[1], rel=0.05)


def test_what_was_rejected_is_counted_once_and_named_in_the_ledger(tiny_recipe, measured):
    measured(lambda *a: (found := lengths(*a))._replace(lengths=found.lengths.clamp(max=10)))  # all but two are as long
    run = pretrain(tiny_recipe("train.steps=2", "save.keep=1", "watch.linear=false"))
    assert [name.rsplit("/", 1)[1] for name in ledger(run)] == ["06.png", "22.png"]  # dark ones come first
    bad, seen = state_of(run)["samples"]
    assert (bad, seen) == (2, 32 + 16)
    assert json.loads((run / "data.json").read_text())["hours"] == 7
    longer = tiny_recipe("train.steps=4", "save.keep=1", "watch.linear=false")
    pretrain(longer, resume=True)
    assert state_of(run)["samples"] == [2, 32 + 32]
    assert len(ledger(run)) == 2


def test_the_survey_comes_before_the_folder(tiny_recipe, measured, tmp_path):
    def fail(source, views, quarantine):
        raise ValueError("data.path: nothing remains")

    measured(fail)
    with pytest.raises(RecipeError, match=r"^data\.path: nothing remains$"):
        prepare(tiny_recipe())
    measured(lengths)
    with pytest.raises(DataError, match=r"(?s)2 of 32 samples.*06\.png \(truncated: said so\)"):
        prepare(tiny_recipe("data.max_bad=0", "data.min_bad=1"))
    measured(lambda source, views, quarantine: source._replace(lengths=torch.full((32,), -1)))
    with pytest.raises(RecipeError, match="hold 0 usable samples"):
        prepare(tiny_recipe())
    assert not (tmp_path / "run").exists()


def test_views_that_cannot_be_built_any_more_are_a_mistake_in_the_recipe(tiny_recipe, monkeypatch):
    recipe = tiny_recipe()
    monkeypatch.setattr(ImageViews, "__init__", lambda *a, **b: (_ for _ in ()).throw(ValueError("tokenizer: is gone")))
    with pytest.raises(RecipeError, match=r"^views\.tokenizer: is gone$"):
        prepare(recipe)


def test_probes_see_all_samples_and_no_label_is_learned_that_may_have_moved(tiny_recipe, measured, image_folder):
    def halved(source, views, quarantine):
        return source._replace(rows=source.rows.select(range(16)), labels=source.labels[:16], total=16)

    measured(halved)
    moved = prepare(tiny_recipe(f"data.path={image_folder}/train"))  # no test split: a tenth is held out
    assert (moved.members[0].dataset.source.size, len(moved.members[0].probes.sets.train.data.source.rows)) == (16, 32)
    assert moved.objective.probe is None
    measured(lengths)
    kept = prepare(tiny_recipe(f"data.path={image_folder}/train", f"out={moved.folder.path}-2"))
    assert kept.objective.probe is not None
    assert kept.members[0].probes.sets.train.data.source.lengths is None


@pytest.mark.parametrize("failed", [0.0, 1.0])
def test_other_ranks_wait_for_the_main_process(tiny_recipe, measured, monkeypatch, failed):
    events = []
    monkeypatch.setattr("mmssl.training.launch.all_sum", lambda x: events.append("waited") or x + failed)
    kind = modality("vision")._replace(prepare=lambda source, views, quarantine: events.append("prepared") or source)
    args = SimpleNamespace(process_index=1, device="cpu")
    source = Source([], "image")
    if failed:
        with pytest.raises(RecipeError, match="main process"):
            survey(tiny_recipe(), args, kind, None, source)
        assert events == ["waited"]
    else:
        assert survey(tiny_recipe(), args, kind, None, source).same_rows
        assert events == ["waited", "prepared"]


def test_an_error_of_any_kind_on_the_main_process_reaches_the_others(tiny_recipe, monkeypatch):
    shared = []
    monkeypatch.setattr("mmssl.training.launch.all_sum", lambda x: shared.append(float(x)) or x)

    def broken(source, views, quarantine):
        raise OSError("disk")

    kind, args = modality("vision")._replace(prepare=broken), SimpleNamespace(process_index=0, device="cpu")
    with pytest.raises(OSError, match="disk"):
        survey(tiny_recipe(), args, kind, None, None)
    assert shared == [1.0]


def test_an_early_quarantine_hands_over_all_that_it_found():
    early, later = Early(0.5, 1), Quarantine(None, 0.5, 1)
    early.seen(50)
    for i in range(20):
        early.record(f"file{i}", "empty" if i % 2 else "truncated", "why")
    later.seen(5)
    early.hand_over(later)
    assert later.totals() == (20, 55)
    assert later.summary()["kinds"] == {"truncated": 10, "empty": 10}
