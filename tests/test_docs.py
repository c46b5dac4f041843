"""Documents that are made from the code, and names that they mention."""

import importlib.util
import re
from pathlib import Path

import pytest

from mmssl.config import Recipe, shipped_recipes

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
def test_shipped_recipes_are_valid_and_build(name):
    import torch

    with torch.device("meta"):
        method = Recipe.load(name).build()
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) > 0


def test_files_that_documents_name_exist():
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for path in re.findall(r"`((?:mmssl|modalities|recipes|tests|tools|docs)/[\w./-]+\.\w+)", document.read_text()):
            assert (ROOT / path).exists(), f"{document.name} names {path}"
        for link in re.findall(r"\]\(([\w./-]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_coverage_lists_every_row_once():
    numbers = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "coverage.md").read_text(), re.MULTILINE)
    assert [int(n) for n in numbers] == [*range(1, 172)]
