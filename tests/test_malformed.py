"""Malformed files of all kinds: none crashes a run or fills its memory, all are named, the others are used (T23)."""

import datasets
import pytest

from tools.malformed import ANY, KINDS, read, write


@pytest.mark.parametrize("modality", [*KINDS])
def test_t23_every_malformed_file_is_named_and_every_other_used(modality, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    count = len(ANY | KINDS[modality]) + 8  # all kinds, some twice
    found = read(tmp_path, modality, count, good=8, seed=0)
    assert found.named == found.bad
    assert len(found.bad) == count
    assert found.used == 8
    assert len(found.reasons) >= 4
    assert found.megabytes < 1000


def test_files_of_a_seed_are_the_same(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "vision", 20, 4, seed=3)
    found = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.is_file()} for name in ("a", "b")]
    assert found[0] == found[1]
    assert len(found[0]) == 22  # one is a link to nowhere, one a pipe
