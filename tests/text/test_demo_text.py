import sys
from collections import Counter

import pytest

from tools.demo_text import AREAS, text


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    text(folder)
    return folder


def test_splits_share_neither_document_nor_paragraph(demo):
    files = {split: sorted((demo / "text" / split).glob("*/*.txt")) for split in ("train", "test")}
    documents = {split: {path.parent.name + path.stem.rpartition("-")[0] for path in found} for split, found in files.items()}
    paragraphs = [part for found in files.values() for path in found for part in path.read_text().strip().split("\n\n")]
    assert not documents["train"] & documents["test"]
    assert len(paragraphs) == len({*paragraphs})
    for split, least in (("train", 80), ("test", 25)):
        counts = Counter(path.parent.name for path in files[split])
        assert counts.keys() >= AREAS.keys()
        assert min(counts.values()) > least
    assert 500_000 < sum(path.stat().st_size for found in files.values() for path in found) < 2_000_000


def test_a_python_without_topics_leaves_them_out(tmp_path, monkeypatch, demo):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    monkeypatch.setattr("tools.demo_text.AREAS", {"numbers": AREAS["numbers"]})
    text(tmp_path)
    assert {path.name for path in (tmp_path / "text" / "train").iterdir()} == {"numbers"}
    for path in tmp_path.rglob("fractions*.txt"):
        assert path.read_text() == (demo / path.relative_to(tmp_path)).read_text()
