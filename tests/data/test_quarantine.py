import json

import pytest
from torch.utils.data import DataLoader, Dataset

from mmssl.data.quarantine import LINES, Quarantine
from mmssl.errors import StorageError
from mmssl.types import Rejected


class Recorder(Dataset):
    """Every third sample is bad."""

    def __init__(self, quarantine: Quarantine):
        self.quarantine = quarantine

    def __len__(self):
        return 30

    def __getitem__(self, i):
        self.quarantine.seen()
        if i % 3 == 0:
            self.quarantine.record(f"{i}.png", "truncated" if i % 2 else "empty", "so it is")
        return i


@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (2, "spawn")])
def test_counts_and_names_come_back_from_workers(tmp_path, workers, start):
    quarantine = Quarantine(tmp_path / "bad.jsonl", 0.5, 0)
    list(DataLoader(Recorder(quarantine), batch_size=5, num_workers=workers, multiprocessing_context=start))
    assert quarantine.totals() == (10, 30)
    found = quarantine.summary()
    assert found["kinds"] == {"truncated": 5, "empty": 5}
    assert {name.split(" ")[0] for name in found["first"]} == {f"{i}.png" for i in range(0, 30, 3)}
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert sorted(line["identity"] for line in lines) == sorted(f"{i}.png" for i in range(0, 30, 3))
    assert {"identity": "0.png", "kind": "empty", "reason": "so it is"} in lines


def test_budget():
    quarantine = Quarantine(None, share=0.1, least=2)
    quarantine.seen(10)
    for i in range(2):
        quarantine.record(f"{i}", "empty")
    assert not quarantine.over()
    quarantine.record("2", "empty")
    assert quarantine.over()  # 3 of 10, more than 2
    quarantine.seen(20)
    assert not quarantine.over()  # 3 of 30 is a tenth
    assert quarantine.over(bad=7, seen=60)  # totals of several ranks
    assert not quarantine.over(bad=6, seen=60)


def test_strict_mode_stops_at_the_first():
    quarantine = Quarantine(None, 0, 0)
    quarantine.seen(1000)
    assert not quarantine.over()
    quarantine.record("a", "unreadable")
    assert quarantine.over()


def test_ten_names_each_once():
    quarantine = Quarantine(None, 0, 0)
    for i in (*range(8), *range(15)):
        quarantine.record(f"{i}.png", "unreadable", "two\nlines")
    first = quarantine.summary()["first"]
    assert first == [f"{i}.png (unreadable: two lines)" for i in range(10)]
    assert quarantine.totals()[0] == 23


def test_the_message_names_numbers_keys_and_files(tmp_path):
    quarantine = Quarantine(tmp_path / "bad.jsonl", 0.001, 100)
    quarantine.seen(7)
    quarantine.record("train.parquet row 3", "too_large", "70000 x 70000 pixels")
    text = quarantine.message()
    for part in ("1 of 7", "1 too large", "data.min_bad", "data.max_bad", "train.parquet row 3", "bad.jsonl"):
        assert part in text


def test_odd_and_long_names():
    quarantine = Quarantine(None, 0, 0)
    quarantine.record("é" * 1000, "empty")
    quarantine.record("bad\udcff.png", "empty")  # a file name that is not valid text
    first = quarantine.summary()["first"]
    assert first[0] == "é" * 256
    assert first[1] == "bad?.png (empty)"


def test_the_ledger_is_capped(tmp_path, monkeypatch):
    monkeypatch.setattr("mmssl.data.quarantine.LINES", 3)
    quarantine = Quarantine(tmp_path / "bad.jsonl", 0, 0)
    for i in range(6):
        quarantine.record(f"{i}", "empty")
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [line.get("identity") for line in lines] == ["0", "1", "2", None]
    assert "more" in lines[-1]
    assert LINES > 1000


def test_a_ledger_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.write", full)
    with pytest.raises(StorageError, match="full"):
        Quarantine(tmp_path / "bad.jsonl", 0, 0).record("a", "empty")


def test_unknown_kinds_are_a_mistake():
    with pytest.raises(ValueError, match="known are"):
        Rejected("odd")
