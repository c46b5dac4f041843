"""T25: workers that die. What they were to read is read by others; a sample that keeps killing them is bad."""

import json
import os
import signal

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from mmssl.data import loading
from mmssl.data.loading import Restarting
from mmssl.data.quarantine import Quarantine
from mmssl.errors import DataError
from mmssl.types import Rejected


class Deadly(Dataset):
    """Twelve numbers; some kill the worker that reads them, as often as they are told. What is rejected becomes -1."""

    def __init__(self, quarantine: Quarantine, deaths: dict[int, int]):
        self.quarantine = quarantine
        self.deaths = {i: torch.tensor(n).share_memory_() for i, n in deaths.items()}

    def __getitem__(self, i):
        try:
            with self.quarantine.reading(i):
                if i in self.deaths and self.deaths[i] > 0:
                    assert get_worker_info() is not None
                    self.deaths[i] -= 1
                    os.kill(os.getpid(), signal.SIGKILL)
        except Rejected as bad:
            self.quarantine.record(f"{i}.png", bad.kind, bad.reason)
            return -1
        return i

    def loader(self) -> Restarting:
        keys = [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(4)]
        return Restarting(
            lambda done: DataLoader(self, batch_sampler=keys[done:], num_workers=2), self.quarantine, lambda i: f"{i}.png"
        )


@pytest.fixture
def budget(monkeypatch):
    monkeypatch.setattr(Restarting, "left", loading.RESTARTS)


@pytest.mark.usefixtures("budget")
def test_a_worker_that_died_changes_no_batch_and_is_named_with_what_it_read(capfd):
    batches = [batch.tolist() for batch in Deadly(Quarantine(None, 1, 100), {7: 1}).loader()]
    assert batches == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    told = capfd.readouterr().err
    assert "data worker 0 of rank 0" in told
    assert "SIGKILL" in told
    assert "7.png" in told
    assert "data.workers=0" in told


@pytest.mark.usefixtures("budget")
def test_a_sample_that_has_cost_two_workers_is_bad(tmp_path):
    data = Deadly(Quarantine(tmp_path / "bad.jsonl", 1, 100), {4: 9})
    assert [batch.tolist() for batch in data.loader()] == [[0, 1, 2], [3, -1, 5], [6, 7, 8], [9, 10, 11]]
    (line,) = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    assert (line["identity"], line["kind"]) == ("4.png", "crash")


def test_workers_that_keep_dying_end_the_run(monkeypatch):
    monkeypatch.setattr(Restarting, "left", 0)
    with pytest.raises(DataError, match=r"rank 0 .* 1\.png.*data\.workers=0"):
        list(Deadly(Quarantine(None, 1, 100), {1: 1}).loader())


def test_an_error_in_a_worker_is_none_of_this():
    class Broken(Dataset):
        def __getitem__(self, i):
            raise ValueError(f"number {i}")

    with pytest.raises(ValueError, match="number 0"):
        list(Restarting(lambda done: DataLoader(Broken(), batch_sampler=[[0]], num_workers=1)))
