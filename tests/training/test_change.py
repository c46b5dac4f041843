import json
import re
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmssl.cli import main
from mmssl.config import Recipe
from mmssl.evaluate.features import embed, open_sets
from mmssl.evaluate.knn import knn_accuracy
from mmssl.hub.export import load_encoder
from mmssl.registry import modality
from mmssl.training import checkpoint
from mmssl.training.change import change, told
from mmssl.training.outcome import summary
from mmssl.training.pretrain import prepare, pretrain
from mmssl.training.run_folder import RunFolder
from mmssl.types import Batch
from tests.ranks import on_two_ranks


def ended(recipe):
    """Metrics, status and card of a run."""
    folder = RunFolder(pretrain(recipe, overwrite=True))
    return {n: v for n, v in summary(folder.path).items() if n.startswith("change/")}, folder.read_status(), folder


def rows(recipe, model):
    """Embeddings of both sets by a model of transformers."""
    (member,) = prepare(recipe, overwrite=True).members

    def run(batch):
        (view,) = Batch.from_tensors(batch).views
        return {"embedding": model(pixel_values=view.x).pooler_output}

    with torch.no_grad():
        return [embed(part, run) for part in (member.probes.sets.train, member.probes.sets.test)]


def test_a_run_says_what_it_has_gained_over_its_start(tiny_recipe, tmp_path, capsys):
    recipe = tiny_recipe("train.steps=3", "optim.lr=0.01", "watch.neighbours=3")
    found, status, folder = ended(recipe)
    assert {n.rsplit("/", 1)[1] for n in found} >= {"knn_gain", "linear_low", "rank_before", "cka"}
    bank, test = rows(tiny_recipe(f"out={tmp_path / 'other'}", "watch.neighbours=3"), load_encoder(folder.model))
    accuracy = knn_accuracy(bank["embedding"], bank["label"], test["embedding"], test["label"], 3)
    assert found["change/test/knn_after"] == pytest.approx(accuracy)
    assert found["change/test/knn_gain"] == pytest.approx(accuracy - found["change/test/knn_before"])
    assert found["change/test/knn_low"] <= found["change/test/knn_gain"] <= found["change/test/knn_high"]
    assert 0 < found["change/test/cka"] < 1
    assert status["change"] == told(found)
    assert status["change"].startswith("test: ")
    card = folder.card.read_text()
    assert re.search(r"## Before and after training\n.*\n.*\n\|---\|---\|---\|---\|\n\| test knn \| \d", card)
    assert "`change/" not in card
    # What began with a model is compared with that, and nothing has changed where nothing is learned.
    start = tiny_recipe(
        "train.steps=1", "optim.lr=1e-30", f"model.init={folder.model}", f"out={tmp_path / 'next'}", "watch.neighbours=3"
    )
    later, _, _ = ended(start)
    assert later["change/test/knn_before"] == later["change/test/knn_after"] == found["change/test/knn_after"]
    assert later["change/test/linear_gain"] == later["change/test/linear_high"] == 0
    assert later["change/test/cka"] == pytest.approx(1)
    shutil.rmtree(folder.model)
    assert change(None, start, {"": None}, checkpoint.load(checkpoint.newest(folder.checkpoints))[0]["model"]) == {}
    assert "The model is not compared with it" in capsys.readouterr().err


def test_without_labels_ranks_are_compared(tiny_recipe, image_folder):
    found, status, _ = ended(tiny_recipe(f"data.path={image_folder / 'train' / 'dark'}"))
    assert {*found} == {"change/train/rank_before", "change/train/rank_after", "change/train/cka"}
    assert re.fullmatch(r"train: effective rank [\d.]+ before, [\d.]+ after\.", status["change"])


def test_it_can_be_left_out(tiny_recipe, capsys):
    found, status, folder = ended(tiny_recipe("watch.change=false"))
    assert found == {}
    assert status["change"] is None
    assert "Before and after" not in folder.card.read_text()
    assert main(["status", str(folder.path), "json=true"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["change"] is None


def gained(_, path, overrides):
    """`change` of what a recipe builds under other weights, on a rank."""
    recipe = Recipe.load(path, *overrides)
    kind = modality(recipe.data.modality)
    sets = open_sets(recipe.data, recipe.watch, kind, recipe.build_views(), recipe.train.seed)
    other = Recipe.load(path, *overrides, "train.seed=1").build()
    tensors = {f"method.{name}": tensor for name, tensor in other.state_dict().items()}
    trainer: Any = SimpleNamespace(args=SimpleNamespace(device="cpu"), heed=lambda: None)
    return change(trainer, recipe, {"": sets}, tensors)


def test_two_ranks_find_what_one_does(tiny_recipe, tmp_path):
    tiny_recipe()
    given = str(tmp_path / "tiny.yaml"), (f"out={tmp_path / 'run'}",)
    one = gained(0, *given)
    both = on_two_ranks(gained, *given, folder=tmp_path)
    assert both[0] == both[1] == pytest.approx(one)
    assert len(one) == 13
    assert 0 < one["change/test/cka"] < 1
