import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from mmssl.errors import CheckpointError, StorageError
from mmssl.training import checkpoint
from mmssl.training.checkpoint import clean, find, load, newest, newest_or_fail, save, step_of

REPOSITORY = Path(__file__).resolve().parents[2]
FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]


def tensors(value, size=64):
    return {
        "model": {"w": torch.full((size,), float(value)), "n": torch.tensor(value)},
        "optimizer": {"w.m": torch.full((size,), -float(value))},
    }


def write(root, step, keep=2, **options):
    return save(root, step, tensors(step), {"step": step}, keep, **options)


def names(root):
    return sorted(p.name for p in root.iterdir())


def assert_holds(path, step):
    found, state = load(path)
    assert state == {"step": step}
    assert found.keys() == {"model", "optimizer"}
    for name, group in tensors(step).items():
        for key, value in group.items():
            torch.testing.assert_close(found[name][key], value.expand_as(found[name][key]), rtol=0, atol=0)


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    shared = torch.randn(4, 3)
    given = {
        "model": {
            "half": torch.randn(5).bfloat16(),
            "double": torch.randn(2, 2, dtype=torch.float64),
            "scalar": torch.tensor(3),
            "bool": torch.tensor([True, False]),
            "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
            "transposed": shared.T,
            "tied": shared,
            "slice": shared[1:, :2],
            "leaf": torch.nn.Parameter(torch.randn(3)),
            "none": torch.empty(0, 3),
        },
        "empty": {},
    }
    state = {"loss": 0.1 + 0.2, "nested": {"a": [1, None, "ä"]}, "big": 2**60}
    path = save(tmp_path / "c", 12, given, state, keep=1)
    found, found_state = load(path)
    assert path == tmp_path / "c/step-00000012"
    assert found_state == state
    assert found["empty"] == {}
    for name, value in given["model"].items():
        assert found["model"][name].dtype == value.dtype
        torch.testing.assert_close(found["model"][name], value.detach(), rtol=0, atol=0, equal_nan=True)
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], sorted(manifest["files"])) == (
        1,
        12,
        ["empty.safetensors", "model.safetensors", "state.json"],
    )
    assert manifest["files"]["state.json"]["size"] == (path / "state.json").stat().st_size


def test_without_checkpoints_there_is_nothing_to_find(tmp_path):
    assert find(tmp_path / "missing") == (None, [])
    assert newest_or_fail(tmp_path) is None
    (tmp_path / ".tmp-step-00000001-ab").mkdir()
    (tmp_path / "step-back").mkdir()
    assert newest_or_fail(tmp_path) is None


def test_rotation_keeps_the_newest_and_the_chosen(tmp_path):
    for step in range(1, 7):
        write(tmp_path, step, also_keep=(2,))
    assert names(tmp_path) == ["step-00000002", "step-00000005", "step-00000006"]
    write(tmp_path, 7, keep=1)
    assert names(tmp_path) == ["step-00000007"]


def test_order_is_that_of_numbers(tmp_path):
    for step in (9, 10, 99_999_999, 100_000_000):
        write(tmp_path, step, keep=9)
    assert step_of(newest(tmp_path)) == 100_000_000


def test_broken_ones_take_no_place_from_whole_ones(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step, keep=3)
    os.truncate(tmp_path / "step-00000002/model.safetensors", 5)
    write(tmp_path, 4, keep=3)
    assert names(tmp_path) == ["step-00000001", "step-00000003", "step-00000004"]


def test_a_run_that_went_back_leaves_its_other_future(tmp_path):
    for step in (1, 2, 9):
        write(tmp_path, step, keep=3)
    write(tmp_path, 3, keep=1, also_keep=(9,))
    assert names(tmp_path) == ["step-00000003"]


def test_rotation_deletes_only_after_the_new_one_is_verified(tmp_path, monkeypatch):
    write(tmp_path, 1, keep=1)
    monkeypatch.setattr(checkpoint, "problem", lambda path, hashes=True: "state.json: gone")
    with pytest.raises(StorageError, match=r"state\.json: gone"):
        write(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_the_same_step_is_replaced(tmp_path):
    write(tmp_path, 5)
    save(tmp_path, 5, tensors(5), {"again": True}, keep=1)
    assert names(tmp_path) == ["step-00000005"]
    assert load(newest(tmp_path))[1] == {"again": True}
    (tmp_path / "step-00000005/state.json").unlink()
    write(tmp_path, 5)
    assert_holds(newest(tmp_path), 5)


def test_a_crash_while_replacing_leaves_the_old_one_findable(tmp_path, monkeypatch):
    write(tmp_path, 5, keep=1)
    rename = Path.rename

    def crash(self, target):
        if self.name.startswith(".tmp-"):
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 5, tensors(6), {}, keep=1)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000005.old"]
    assert_holds(newest(tmp_path), 5)
    for _ in range(2):
        write(tmp_path, 5, keep=1)
        assert names(tmp_path) == ["step-00000005"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flip": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "delete": Path.unlink,
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(tmp_path, file, damage):
    """T18: R1."""
    write(tmp_path, 1)
    bad = write(tmp_path, 2)
    DAMAGE[damage](bad / file)
    path, reasons = find(tmp_path)
    assert path.name == "step-00000001"
    assert_holds(path, 1)
    assert len(reasons) == 1
    assert reasons[0].startswith("step-00000002: ")
    if (file, damage) != ("manifest.json", "flip"):  # the flipped digit may be one of the hash of another file
        assert file in reasons[0]
    shutil.rmtree(path)
    assert newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="step-00000002: "):
        newest_or_fail(tmp_path)


@pytest.mark.parametrize("position", range(0, 400, 7))
def test_a_flip_anywhere_in_the_manifest_never_gives_wrong_values(tmp_path, position):
    path = write(tmp_path, 3) / "manifest.json"
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 2
    path.write_bytes(data)
    if (found := newest(tmp_path)) is not None:  # the flip hit white space
        assert_holds(found, 3)


@pytest.mark.parametrize(
    "manifest",
    [
        "null",
        "[]",
        '{"format": 2, "step": 1, "files": {}}',
        '{"format": 1, "step": 2, "files": {}}',
        '{"format": 1, "step": 1, "files": {}}',
        '{"format": 1, "step": 1, "files": ["state.json"]}',
        '{"format": 1, "step": 1, "files": {"../x": {"size": 0, "sha256": ""}, "state.json": {"size": 0, "sha256": ""}}}',
    ],
)
def test_strange_manifests_are_rejected(tmp_path, manifest):
    (write(tmp_path, 1) / "manifest.json").write_text(manifest)
    path, (reason,) = find(tmp_path)
    assert path is None
    assert "manifest.json" in reason
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load(tmp_path / "step-00000001")


def test_loading_damage_that_only_a_hash_shows_is_no_crash(tmp_path):
    path = write(tmp_path, 1) / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert find(tmp_path, hashes=False)[0] is not None
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(path.parent)


def test_clean_removes_leftovers_of_this_root_only(tmp_path):
    """R5."""
    write(tmp_path / "a", 1)
    for name in ("a/.tmp-step-00000002-ab", "a/.del-step-00000001-cd", "a/.tmp-mine", "b/.tmp-step-00000002-ab"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x").write_text("")
    clean(tmp_path / "a")
    clean(tmp_path / "missing")
    assert names(tmp_path / "a") == [".tmp-mine", "step-00000001"]
    assert names(tmp_path / "b") == [".tmp-step-00000002-ab"]


@pytest.mark.parametrize("bad", [{"keep": 0}, {"step": -1}, {"tensors": {"../x": {}}}, {"state": {"x": torch.ones(1)}}])
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises((ValueError, TypeError)):
        save(tmp_path / "c", **({"step": 1, "tensors": {}, "state": {}, "keep": 1} | bad))
    assert not (tmp_path / "c").exists()


def test_too_little_space_is_found_before_writing(tmp_path, monkeypatch):
    write(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(StorageError, match=r"is full; 44\d{5} bytes are needed; 1000000 bytes are free"):
        save(tmp_path, 2, tensors(2, 500_000), {}, keep=1)
    assert names(tmp_path) == ["step-00000001"]


def test_a_limit_of_the_system_is_a_storage_error(tmp_path):
    write(tmp_path, 1, keep=1)
    code = """
import sys, pathlib, resource, torch
from mmssl.errors import StorageError
from mmssl.training.checkpoint import save
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save(pathlib.Path(sys.argv[1]), 2, {"model": {"w": torch.zeros(100_000)}}, {}, keep=1)
except StorageError as error:
    print("storage:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("storage:"), done.stderr
    assert names(tmp_path) == ["step-00000001"]
    assert_holds(newest(tmp_path), 1)


def save_forever(root, step):
    """In a child: every third step is saved twice, so that replacing is interrupted as well."""
    try:
        while True:
            write(root, step, keep=1)
            if step % 3 == 0:
                write(root, step, keep=1)
            step += 1
    finally:
        os._exit(1)


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    """T14 (a), in small."""
    draw, start, last = random.Random(0), time.monotonic(), 0
    interrupted = 0
    for _ in range(40):
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            save_forever(tmp_path, last + 1)
        time.sleep(draw.uniform(0.0, 0.12))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL  # it was saving, not failing
        interrupted += any(name.startswith(".") for name in names(tmp_path))
        path = newest(tmp_path)
        if path is None:
            assert last == 0  # none lost, none was ever finished
            continue
        assert step_of(path) >= last
        last = step_of(path)
        assert_holds(path, last)
        clean(tmp_path)
        assert not any(name.startswith(".") for name in names(tmp_path))
    assert last > 0
    assert interrupted > 5, "too few kills hit a save to prove anything"
    assert time.monotonic() - start < 60
