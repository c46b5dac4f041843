"""Documents that are made from the code, and names that they mention."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from mmssl.config import JointRecipe, find_recipe, load_recipe, shipped_recipes
from mmssl.training.launch import batch_split
from mmssl.training.objective import Objective
from mmssl.training.optim import parameter_groups, schedule

ROOT = Path(__file__).resolve().parents[1]


def module(path: str):
    spec = importlib.util.spec_from_file_location("tool", ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_generated_documents_are_up_to_date():
    for path, content in module("tools/write_docs.py").documents().items():
        assert path.read_text(encoding="utf-8") == content, f"run python tools/write_docs.py ({path.name})"


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_build_and_are_launched_as_they_say(name):
    text = find_recipe(name).read_text(encoding="utf-8")
    assert f"{name} " in text or f"{name}.yaml" in text  # its command, not that of the file it was copied from
    whole = load_recipe(name)
    assert (name.split("/")[0] == "multimodal") == isinstance(whole, JointRecipe)
    for recipe in whole.members.values():
        is_right(recipe, int((re.findall(r"num_processes (\d+)", text) or [1])[0]))


def is_right(recipe, processes):
    with torch.device("meta"):
        method = recipe.build()
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) > 0
    parameter_groups(Objective(method), recipe.optim, schedule(recipe.optim, recipe.train.global_batch, recipe.train.epochs))
    micro, accumulation = batch_split(recipe, processes)
    assert micro * accumulation * processes == recipe.train.global_batch
    assert method.check_batch(micro * processes) == []  # nothing impossible, and nothing to note
    if recipe.method.name in ("simclr", "simclr_v2", "moco_v3", "barlow_twins", "vicreg"):  # others count the same in pieces
        assert accumulation == 1, "the loss compares the samples of a micro-batch"


def test_files_that_documents_name_exist():
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for path in re.findall(r"`((?:mmssl|modalities|recipes|tests|tools|docs)/[\w./-]+\.\w+)", document.read_text()):
            assert (ROOT / path).exists(), f"{document.name} names {path}"
        for link in re.findall(r"\]\(([\w./-]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_coverage_lists_every_row_once():
    numbers = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "coverage.md").read_text(), re.MULTILINE)
    assert [int(n) for n in numbers] == [*range(1, 172)]
