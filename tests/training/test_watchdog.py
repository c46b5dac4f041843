"""Who is told to hang, who has gone, and what was first; without waiting for any of it."""

import json
import os
import subprocess
import sys

import torch
import torch.distributed as dist

from mmssl import stage
from mmssl.distributed import limit_groups
from mmssl.errors import DataError, RankError
from mmssl.stage import Stage
from mmssl.training.outcome import record_failure
from mmssl.training.peers import Member, Peers
from mmssl.training.run_folder import RunFolder, born
from mmssl.training.watchdog import PATIENCE, Judge
from tests.ranks import on_two_ranks


def at(*passed: int, name: str = "forward", beats: int = 1) -> dict[int, tuple[int, Stage]]:
    return {rank: (beats, Stage(name, 3, n)) for rank, n in enumerate(passed)}


def test_t27_the_rank_furthest_behind_hangs_and_not_those_that_wait_for_it():
    judge = Judge(10)
    assert judge.hanging(at(5, 5), 0) == []
    assert judge.hanging(at(9, 6), 8) == []
    assert judge.hanging(at(9, 6), 18) == []
    assert judge.hanging(at(9, 6), 18.5) == [1]
    assert judge.hanging(at(9, 7), 19) == []  # it goes on


def test_t27_ranks_that_stand_still_together_are_all_named():
    judge = Judge(10)
    judge.hanging(at(5, 5), 0)
    assert judge.hanging(at(5, 5), 11) == [0, 1]


def test_t27_what_is_long_by_nature_may_last_longer():
    for name in ("save", "probe", "describe", "first forward"):
        judge = Judge(10)
        judge.hanging(at(4, 5, name=name), 0)
        assert judge.hanging(at(4, 5, name=name, beats=2), 10 * PATIENCE) == []
        assert judge.hanging(at(4, 5, name=name, beats=3), 10 * PATIENCE + 1) == [0]


def test_t27_a_process_that_does_not_answer_is_told_from_one_that_does():
    judge = Judge(10)
    for now in range(12):
        stages = {0: (now, Stage("forward", 3, 5)), 1: (7, Stage("save", 3, 4))}
        behind = judge.hanging(stages, now)
    assert behind == [1]  # a save may last, but somebody who saves says so
    assert judge.silent([0, 1], 11) == [1]


def three(folder: RunFolder) -> Peers:
    """Rank 1 of three on this host; rank 2 has gone, rank 0 is this process too."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    peers = Peers()
    host, me, began = peers.members[0]
    peers.rank, peers.near = 1, [0, 2]
    peers.members = [Member(host, me, began), Member(host, me, began), Member(host, child.pid, born(child.pid))]
    peers.folder = folder
    peers.make_place(folder)
    assert peers.gone() == []
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # gone, and nobody has looked yet
    assert peers.gone() == [2]
    child.communicate()
    return peers


def test_t27_a_broken_connection_is_explained_by_the_rank_that_has_gone(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    peers = three(folder)
    (folder.path / ".ranks" / "2.json").write_text(json.dumps([4, "backward", 17, 99]))
    told = peers.explain(RuntimeError("Connection closed by peer"))
    assert isinstance(told, RankError)
    assert "rank 2 has gone" in str(told)
    assert "step 17 (backward)" in str(told)
    assert f"mmssl resume {folder.path}" in str(told)
    assert peers.cause().text == str(told)
    record_failure(folder, peers, told)
    assert folder.read_status()["code"] == 7
    assert "rank 2 has gone" in folder.read_status()["error"]


def test_t27_the_first_cause_wins(tmp_path):
    peers = three(RunFolder.create(tmp_path / "run"))
    error = DataError("data: too many bad samples")
    assert peers.explain(error) is error  # of its own, whoever else has gone
    assert peers.claim(7, "later") == peers.cause()
    told = peers.explain(RuntimeError("Connection reset"))
    assert "rank 1 stopped: DataError: data: too many bad samples" in str(told)
    assert told.code == 3


def test_where_a_process_stands_is_known_to_the_others(tmp_path):
    peers = three(RunFolder.create(tmp_path / "run"))
    stage.enter("probe", 12)
    peers.beat()
    before = peers.stages()[1]
    peers.rank = 0  # as another one reads it
    assert peers.stages()[1] == before == (1, stage.now())


def _limits(rank: int) -> list[float]:
    copy = dist.new_group([0, 1])  # as DeepSpeed makes one
    limit_groups(77)
    groups = (dist.group.WORLD, copy)
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_t02_every_group_has_the_same_time_out(tmp_path):
    assert on_two_ranks(_limits, folder=tmp_path) == [[77.0, 77.0]] * 2
