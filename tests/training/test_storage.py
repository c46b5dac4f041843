"""A disk that is full or read-only while a run saves: the checkpoint before stays, and the run says so and goes on, or ends."""

import errno
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from threading import Event

import pytest
import torch

from mmssl.config import Recipe
from mmssl.errors import StorageError
from mmssl.training import checkpoint, run_folder
from mmssl.training.durable import DTYPES, safetensors, write
from mmssl.training.pretrain import prepare, pretrain

CALLS = ("open", "write", "fsync", "mkdir", "rename")
NUMBERS = {"ENOSPC": "is full", "EDQUOT": "is full", "EROFS": "cannot be written"}


class Disk:
    """Counts what is written from now on, and refuses from the nth call on."""

    def __init__(self, monkeypatch, number, at):
        self.calls = itertools.count(1)
        self.number, self.at = number, at
        for name in CALLS:
            monkeypatch.setattr(os, name, self.counted(name, getattr(os, name)))

    def counted(self, name, call):
        def refuse(*args, **kwargs):
            if (name != "open" or args[1] & os.O_WRONLY) and next(self.calls) >= self.at:
                raise OSError(self.number, os.strerror(self.number))
            return call(*args, **kwargs)

        return refuse


def tensors(value):
    return {part: {"w": torch.full((3, 5), float(value)), "n": torch.tensor(value)} for part in ("model", "optimizer")}


def refused(root, number, at):
    """What a save says whose disk refuses from that call on; None if it has fewer."""
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, number, at)
        try:
            checkpoint.save(root, 2, tensors(2), {"step": 2}, keep=1)
        except StorageError as error:
            return str(error)
    return None


@pytest.mark.parametrize("name", NUMBERS)
def test_t17_whichever_call_of_a_save_fails_the_checkpoint_before_is_whole(tmp_path, name):
    """T17: every open, write, fsync, mkdir and rename in turn, and all that follow it."""
    for at in itertools.count(1):
        root = tmp_path / str(at)
        checkpoint.save(root, 1, tensors(1), {"step": 1}, keep=1)
        error = refused(root, getattr(errno, name), at)
        if error is None:
            break
        assert NUMBERS[name] in error
        assert str(root) in error
        if name != "EROFS":
            needed, free = re.findall(r"(\d+) bytes are (?:needed|free)", error)
            assert 200 < int(needed) < 10**5
            assert int(free) > 0
        path, _ = checkpoint.find(root)
        found, state = checkpoint.load(path)
        assert checkpoint.problem(root / "step-00000001") is None
        assert torch.equal(found["model"]["w"], tensors(state["step"])["model"]["w"])
        checkpoint.save(root, 3, tensors(3), {"step": 3}, keep=1)  # there is space again
        checkpoint.clean(root)
        assert [p.name for p in root.iterdir()] == ["step-00000003"]
    assert at > 12, "a save has more calls than that"


def test_files_are_those_of_safetensors(tmp_path):
    from safetensors.torch import load_file

    given = {f"{i}": torch.ones(2, 3, dtype=dtype) for i, dtype in enumerate(getattr(torch, name) for name in DTYPES)} | {
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
        "turned": torch.arange(6.0).view(2, 3).T,
    }
    written = write(tmp_path / "x.safetensors", safetensors(given))
    assert written.size == (tmp_path / "x.safetensors").stat().st_size
    assert written.sha256 == checkpoint._sha256(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == given.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in given.items())
    with pytest.raises(ValueError, match="complex64 cannot be saved"):
        safetensors({"z": torch.ones(1, dtype=torch.complex64)})


def test_too_little_space_costs_first_what_no_rule_keeps(tmp_path, monkeypatch):
    """7.4: only checkpoints outside of the retention set."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, tensors(step), {"step": step}, keep=3)
    usage, real = type(shutil.disk_usage(tmp_path)), shutil.disk_usage

    def scarce(path):
        return real(path) if len([*tmp_path.glob("step-*")]) < 3 else usage(10**9, 10**9, 10)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", scarce)
    checkpoint.save(tmp_path, 4, tensors(4), {"step": 4}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10))
    with pytest.raises(StorageError, match=r"is full; \d+ bytes are needed; 10 bytes are free"):
        checkpoint.save(tmp_path, 5, tensors(5), {"step": 5}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


@pytest.fixture
def recipe(image_folder, tmp_path):
    """Function: overrides -> a run of five updates, each saved, in the folder `run/out`."""

    def build(*words):
        path = tmp_path / "tiny.yaml"
        path.write_text(
            f"data: {{path: {image_folder}, modality: vision, workers: 0}}\n"
            "model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 1, heads: 2}\n"
            "method: {name: simmim}\nviews: {mask: {ratio: 0.5}}\n"
            "train: {steps: 5, global_batch: 8, device: cpu, log_every: 1}\n"
            "watch: {samples: 20, every: 0}\nsave: {every: 1, keep: 2}\n"
        )
        return Recipe.load(path, f"out={tmp_path / 'run/out'}", *words)

    return build


def between(run, fail):
    """Call `fail(step)` before each save."""
    save = run.trainer.save_run

    def watched(trainer):
        fail(trainer.state.global_step)
        save(trainer)

    run.trainer.save_run = watched


def lines(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


@pytest.mark.parametrize("name", NUMBERS)
def test_t17_a_run_goes_on_without_saving_and_saves_when_it_can(recipe, tmp_path, monkeypatch, capsys, name):
    """T17: two saves fail, the third does not. Metrics of the time in between are not lost."""
    run, folder = prepare(recipe()), tmp_path / "run/out"
    disk, append, before = [], run_folder.append, []

    def fail(step):
        disk[:] = [OSError(getattr(errno, name), os.strerror(getattr(errno, name)))] * (step in (2, 3))
        before.append(sorted(path.name for path in (folder / "checkpoints").glob("step-*")))

    def refuse(call):
        def refused(*args, **kwargs):
            if disk:
                raise disk[0]
            return call(*args, **kwargs)

        return refused

    between(run, fail)
    monkeypatch.setattr(os, "write", refuse(os.write))
    monkeypatch.setattr(run_folder, "append", refuse(append))
    run.train()
    told = capsys.readouterr().err
    assert before[2:4] == [["step-00000001"]] * 2
    assert f"{NUMBERS[name]}" in told
    assert "Step 2 was not saved, older checkpoints are as they were; the run stops when 2 more saves fail" in told
    assert "Step 3 was not saved" in told
    assert checkpoint.step_of(checkpoint.newest(folder / "checkpoints")) == 5
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
    assert lines(folder) == [1, 2, 3, 4, 5]
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(("words", "last"), [((), 4), (("save.max_failed=1",), 2), (("train.steps=2",), 2)])
def test_t17_it_ends_with_6_when_saves_keep_failing_or_nothing_comes_after(recipe, tmp_path, monkeypatch, words, last):
    """T17: at the third failure, at the first if the recipe says so, and at the end of the run."""
    run = prepare(recipe(*words))
    full = []
    write_now = os.write
    between(run, lambda step: full.append(step) if step > 1 else None)

    def refuse(*args):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_now(*args)

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(StorageError, match=r"is full; \d+ bytes are needed; \d+ bytes are free") as caught:
        run.train()
    assert caught.value.code == 6
    assert full[-1] == last
    path = checkpoint.newest(tmp_path / "run/out/checkpoints")
    assert checkpoint.step_of(path) == 1
    assert checkpoint.problem(path) is None


def test_a_checkpoint_is_written_while_training_goes_on(recipe, tmp_path, monkeypatch):
    """The first one takes until the second is due; what is saved in the end is what a run saves that waits for each."""
    gate, seen, save = Event(), [], checkpoint.save

    def slow(root, step, *rest):
        if step == 2:
            assert gate.wait(60)
        return save(root, step, *rest)

    run = prepare(recipe("save.background=true", "save.every=2"))
    end = run.trainer.end_update

    def watched(control):
        end(control)
        seen.append((run.trainer.applied, checkpoint.newest(tmp_path / "run/out/checkpoints")))
        if run.trainer.applied == 4:
            gate.set()

    run.trainer.end_update = watched
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", slow)
        run.train()
    assert seen[:4] == [(1, None), (2, None), (3, None), (4, None)]
    background = checkpoint.load(checkpoint.newest(tmp_path / "run/out/checkpoints"))
    assert checkpoint.problem(tmp_path / "run/out/checkpoints/step-00000004") is None
    plain = checkpoint.load(checkpoint.newest(pretrain(recipe("save.every=2"), overwrite=True) / "checkpoints"))
    for group in ("model", "optimizer"):
        assert background[0][group].keys() == plain[0][group].keys()
        assert all(torch.equal(tensor, plain[0][group][name]) for name, tensor in background[0][group].items())


def test_what_goes_wrong_in_the_background_is_told_at_the_next_save(recipe, tmp_path, monkeypatch, capsys):
    full, save = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), checkpoint.save

    def refuse(root, step, *rest):
        if step in (2, 3):
            raise full
        return save(root, step, *rest)

    run = prepare(recipe("save.background=true"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", refuse)
        run.train()
    told = capsys.readouterr().err
    assert "Step 2 was not saved, older checkpoints are as they were; the run stops when 2 more saves fail" in told
    assert "Step 3 was not saved" in told
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run/out/checkpoints")) == 5
    patient = prepare(recipe("save.background=true", "save.max_failed=2"), overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", refuse)
        with pytest.raises(StorageError, match="is full"):
            patient.train()
    found = checkpoint.newest(tmp_path / "run/out/checkpoints")
    assert checkpoint.step_of(found) == 4  # begun when the second failure became known, and waited for
    assert json.loads((tmp_path / "run/out/status.json").read_text())["state"] == "failed"


def test_going_back_waits_for_what_is_being_written(recipe, tmp_path, monkeypatch):
    save, order = checkpoint.save, []

    def slow(root, step, *rest):
        time.sleep(0.3)
        order.append(step)
        return save(root, step, *rest)

    run = prepare(recipe("save.background=true", "save.every=2", "watch.on_nonfinite=rollback", "train.max_skips=0"))
    step = run.trainer.training_step

    def poisoned(model, inputs, *rest):
        if run.trainer.state.global_step == 2 and not run.trainer.rollbacks:
            inputs["0.vision.x"][0, 0, 0, 0] = math.nan
        return step(model, inputs, *rest)

    run.trainer.training_step = poisoned
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", slow)
        run.train()
    assert order == [2, 4, 5]
    assert run.trainer.rollbacks == 1
    assert json.loads((tmp_path / "run/out/status.json").read_text())["state"] == "finished"


def test_t17_on_a_file_system_that_is_really_full(recipe, tmp_path, capsys):
    """T17: a small file system in memory, where this process may mount one."""
    place = tmp_path / "run"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("only root may mount a file system")
    try:
        run = prepare(recipe())
        filler = place / "filler"

        def fill(step):
            filler.unlink(missing_ok=True)
            if step in (2, 3):
                with suppress(OSError), filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))

        between(run, fill)
        run.train()
        told = capsys.readouterr().err
        assert "Step 2 was not saved" in told
        assert "Step 3 was not saved" in told
        assert re.search(r"is full; \d+ bytes are needed; \d+ bytes are free", told)
        assert checkpoint.step_of(checkpoint.newest(place / "out/checkpoints")) == 5
        assert not [path for path in (place / "out/checkpoints").iterdir() if path.name.startswith(".")]
        assert lines(place / "out") == [1, 2, 3, 4, 5]
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
