"""How a run goes on: which checkpoint, under which recipe, on how many processes, and which checkpoints stay."""

import json
import os
import re
import shutil
from itertools import chain

import pytest

from mmssl.cli import main
from mmssl.config import Recipe
from mmssl.config.blocks import SaveOptions
from mmssl.data.sampler import KeyBatches
from mmssl.data.sources import open_source
from mmssl.errors import CheckpointError, CollapseError, RecipeError
from mmssl.registry import modality
from mmssl.training import batches, checkpoint, resuming
from mmssl.training.batches import identity
from mmssl.training.pretrain import prepare, pretrain
from mmssl.training.retention import Retention


@pytest.fixture(scope="module")
def saved(image_folder, tmp_path_factory):
    """A run of three updates, each saved."""
    path = tmp_path_factory.mktemp("saved") / "tiny.yaml"
    path.write_text(
        f"data: {{path: {image_folder}, modality: vision, workers: 0}}\n"
        "model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 1, heads: 2}\n"
        "method: {name: simmim}\nviews: {mask: {ratio: 0.5}}\n"
        "train: {steps: 3, global_batch: 8, device: cpu, log_every: 1}\n"
        "watch: {samples: 20, every: 0}\nsave: {every: 1, keep: 9}\n"
    )
    pretrain(Recipe.load(path, f"out={path.parent / 'run'}"))
    return path


@pytest.fixture
def again(saved, tmp_path):
    """Function: overrides -> (recipe, folder) of a copy of that run, without its last checkpoint."""
    shutil.copytree(saved.parent / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000003")

    def build(*words):
        return Recipe.load(saved, f"out={tmp_path / 'run'}", *words)

    return build


def steps(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


# Which recipe ---------------------------------------------------------------------------------------------------------


def test_r3_what_is_free_changes_in_silence_and_what_is_to_come_with_a_note(again, capsys):
    """R3: free and warned keys."""
    pretrain(again("save.keep=5", "train.log_every=2", "optim.lr=1e-5", "train.steps=4"), resume=True)
    told = [line for line in capsys.readouterr().err.splitlines() if "from here on" in line]
    assert [line.split()[2] for line in told] == ["optim.lr", "train.steps"]
    assert "optim.lr was 0.001 when the run was saved, and is 1e-05 from here on" in told[0]


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("train.seed=1", "train.seed"),
        ("train.global_batch=16", "train.global_batch"),
        ("views.mask.ratio=0.25", "views.mask.ratio"),
        ("model.depth=2", "model.depth"),
        ("data.limit=30", "data.limit"),
    ],
)
def test_r3_what_would_make_another_run_is_refused_by_name(again, word, key):
    """R3: refused keys."""
    with pytest.raises(RecipeError, match=rf"{key} was .*\n.*allow_changed={key}") as caught:
        pretrain(again(word), resume=True)
    assert caught.value.code == 2


def test_r3_a_refused_change_can_be_allowed(again, tmp_path):
    """R3: by key or by block; what does not fit the weights stays refused."""
    pretrain(again("views.mask.ratio=0.25", "train.seed=1"), resume=True, allow_changed=["views", "train.seed", "data"])
    with pytest.raises(CheckpointError, match="does not fit"):
        pretrain(again("model.depth=2", "views.mask.ratio=0.25", "train.seed=1"), resume=True, allow_changed=["model"])


def test_r3_on_the_command_line(again, tmp_path, capsys):
    """R3: `mmssl resume RUN key=value allow_changed=...`."""
    words = ["resume", str(tmp_path / "run"), "views.mask.ratio=0.25"]
    assert main(words) == 2
    assert "allow_changed=views.mask.ratio" in capsys.readouterr().err
    assert main([*words, "allow_changed=views"]) == 0


def test_secrets_of_a_recipe_are_not_in_its_facts(again):
    told = resuming.facts(again("data.path=https://me:hunter22@host.org/data"))
    assert "hunter22" not in json.dumps(told)


# Which data -----------------------------------------------------------------------------------------------------------


def opened(recipe):
    return recipe, open_source(recipe.data, modality("vision"), "train"), recipe.build_views()


def test_r8_other_data_in_the_same_place_are_refused(saved, image_folder, tmp_path):
    """R8: the identity of the next batch, which does not depend on where the data lie."""
    moved = tmp_path / "moved"
    shutil.copytree(image_folder, moved)

    def recipe(*words):
        return Recipe.load(saved, f"out={tmp_path / 'run'}", f"data.path={moved}", *words)

    here, there = (identity(*opened(one), 2) for one in (recipe(), recipe(f"data.path={image_folder}")))
    assert here == there
    pretrain(recipe("train.steps=2"))
    for name in ("00", "02", "04", "06"):
        (moved / f"train/dark/{name}.png").rename(moved / f"train/dark/x{name}.png")
    with pytest.raises(RecipeError, match=r"data\.path: the batch after step 2 holds other samples .* allow_changed=data"):
        pretrain(recipe(), resume=True)
    pretrain(recipe(), resume=True, allow_changed=["data"])


def test_t20_the_next_batch_has_one_name_on_any_number_of_processes(again, monkeypatch):
    """T20: S3, and R8's hash."""
    found, names = opened(again("train.micro_batch=2")), []
    for world in (1, 2, 4):
        monkeypatch.setattr(batches, "world", lambda world=world: world)
        names.append([identity(*found, step) for step in range(9)])
    assert names[0] == names[1] == names[2]
    assert len({*names[0]}) == 9


@pytest.mark.parametrize("worlds", [(2, 1, 2), (1, 4, 2)])
def test_t19_t20_every_global_batch_is_seen_once_whatever_the_world_sizes(worlds):
    """T19, T20: 2 ranks, then 1, then 2 again: the same samples in the same order, over the end of a pass."""

    def drawn(world, first, last):
        ranks = [list(KeyBatches(20, 8, 2, rank, world, last, 7, first)) for rank in range(world)]
        return [[key for row in zip(*turn) for key in row] for turn in zip(*ranks)]

    def joined(updates, world):  # micro-batches of all ranks -> updates
        share = 4 // world
        return [[*chain(*updates[i : i + share])] for i in range(0, len(updates), share)]

    whole = joined(drawn(1, 0, 9), 1)
    parts = [joined(drawn(world, first, first + 3), world) for world, first in zip(worlds, (0, 3, 6))]
    assert [*chain(*parts)] == whole


# Which checkpoint -----------------------------------------------------------------------------------------------------


def test_r4_a_checkpoint_that_was_tried_twice_in_vain_gives_way_to_an_older_one(again, tmp_path, capsys):
    """R4: and comes back as soon as nothing else is left; getting through an update clears it."""
    root = tmp_path / "run/checkpoints"
    for tried in (1, 2):
        run = prepare(again(), resume=True)  # which then dies
        assert run.start == 2
        assert checkpoint.tries(root / "step-00000002") == tried
    run = prepare(again(), resume=True)
    assert run.start == 1
    assert "checkpoint left out: step-00000002: resumed 2 times without getting through an update" in capsys.readouterr().err
    run.train()
    assert checkpoint.tries(root / "step-00000001") == 0
    assert steps(tmp_path / "run") == [1, 2, 3]
    for step in (1, 2, 3):
        for _ in range(2):
            checkpoint.note_try(root / f"step-{step:08d}")
    path, reasons = checkpoint.find(root)
    assert (checkpoint.step_of(path), len(reasons)) == (3, 3)


def test_r4_a_run_lost_between_its_last_checkpoint_and_its_export_is_completed(again, saved, tmp_path, monkeypatch):
    """There is no update to get through from there, which is no fault of that checkpoint."""
    whole, run = saved.parent / "run", tmp_path / "run"

    def lost(*_, **__):
        raise KeyboardInterrupt

    recipe = again()
    with monkeypatch.context() as patch:
        patch.setattr("mmssl.training.saving.export_encoders", lost)
        for _ in range(3):  # the first makes the last checkpoint
            with pytest.raises(KeyboardInterrupt):
                pretrain(recipe, resume=True)
    assert [checkpoint.tries(path) for path in sorted((run / "checkpoints").glob("step-*"))] == [0, 0, 0]
    pretrain(recipe, resume=True)
    assert checkpoint.step_of(checkpoint.newest(run / "checkpoints")) == 3
    for file in ("model/model.safetensors", "model/config.json", "metrics.jsonl", "heads/heads.safetensors"):
        mine, other = ((path / file).read_bytes() for path in (run, whole))
        assert re.sub(rb'"speed.*', b"", mine) == re.sub(rb'"speed.*', b"", other), file
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_r1_t18_each_rejected_checkpoint_is_named_and_none_left_is_an_error(again, tmp_path, capsys):
    """R1, T18: through the whole program."""
    root = tmp_path / "run/checkpoints"
    file = root / "step-00000002/model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert prepare(again(), resume=True).start == 1
    assert "step-00000002: model.safetensors:" in capsys.readouterr().err
    (root / "step-00000001/state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no usable checkpoint") as caught:
        prepare(again(), resume=True)
    assert caught.value.code == 5


def test_r5_r6_leftovers_go_and_a_fresh_start_over_a_run_is_refused(again, tmp_path):
    """R5, R6."""
    root = tmp_path / "run/checkpoints"
    (root / ".tmp-step-00000003-ab").mkdir()
    (root / ".del-step-00000001-cd").mkdir()
    with pytest.raises(RecipeError, match=r"mmssl resume .*overwrite=true"):
        prepare(again())
    assert prepare(again(), resume=True).start == 2
    assert not [path for path in root.iterdir() if path.name.startswith(".")]


# Which ones stay ------------------------------------------------------------------------------------------------------


def kept(options, steps, trouble=()):
    """Steps that are on disk after each save of a run."""
    retention, disk, history = Retention(steps, options), [], []
    for step in range(1, steps + 1):
        if step in trouble:
            retention.trouble()
        if step % options.every == 0:
            stay = retention.at(step)
            disk = [s for s in [*disk, step] if s in stay or s in [*disk, step][-options.keep :]]
            history.append(disk)
            retention = Retention(steps, options, json.loads(json.dumps(retention.state())))  # as after a resume
    return history


def test_r7_permanent_ones_are_spread_over_the_run():
    """R7: every Nth; none in a run that saves no more often than that."""
    options = SaveOptions(every=10, keep=2, permanent=4, proven=0)
    assert kept(options, 200)[-1] == [50, 100, 150, 190, 200]
    assert kept(options, 40)[-1] == [30, 40]
    assert kept(SaveOptions(every=10, keep=1, permanent=0, proven=0), 200)[-1] == [200]


def test_r7_the_last_one_that_proved_healthy_stays():
    """R7: for M updates without trouble; trouble before that spoils it."""
    options = SaveOptions(every=10, keep=1, permanent=0, proven=30)
    calm = kept(options, 100)
    assert calm[:5] == [[10], [10, 20], [10, 30], [10, 40], [10, 40, 50]]  # 10 is healthy at 40, then 40 is the candidate
    assert calm[7] == [40, 70, 80]
    assert kept(options, 200, trouble=range(45, 201))[-1] == [10, 200]
    assert kept(options, 60, trouble=(15,))[-1] == [20, 60]


def test_r7_a_collapse_goes_back_to_the_healthy_one(again, tmp_path):
    """R7: not to the newest, which may hold what led there; later ones are removed."""
    run = prepare(again("train.steps=5", "watch.on_collapse=rollback"), resume=True)
    trainer, before, began = run.trainer, [], []
    trainer.retention.healthy = 1
    guard, begin = trainer._guard, trainer.begin_update

    def collapse(line):
        if line["step"] == 4 and not before:
            before.append(steps(tmp_path / "run"))
            return CollapseError("It collapsed.")
        return guard(line)

    trainer._guard = collapse
    trainer.begin_update = lambda: (began.append(trainer.state.global_step), begin())
    run.train()
    assert before == [[1, 2, 3]]
    assert began == [2, 3, 1, 2, 3, 4]
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5]
