"""Runs that are told to stop, lose a process or hang. X1 to X9 and T25 to T27 of the specification."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmssl.cli.status import run as status
from mmssl.config import Recipe
from mmssl.training import checkpoint, signals
from mmssl.training.pretrain import prepare, pretrain
from mmssl.training.run_folder import RunFolder
from mmssl.training.trackers import following
from tests.launcher import befallen

ROOT = Path(__file__).resolve().parents[2]
PASS, STEPS = 4, 10  # updates of a pass over 32 images, and of a run


@pytest.fixture(scope="module")
def written(image_folder, tmp_path_factory) -> Path:
    """A recipe of a method that describes all samples before each pass, with probes and saves in between."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(
        f"data: {{path: {image_folder}, modality: vision, workers: 0}}\n"
        "model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 1, heads: 2}\n"
        "method: {name: deepcluster, clusters: 4, pca: 8, iterations: 3}\n"
        "views: {crops: instdisc}\n"
        "optim: {name: sgd, lr: 0.05, warmup: 2}\n"
        f"train: {{steps: {STEPS}, global_batch: 8, device: cpu, log_every: 1, threads: 1}}\n"
        "watch: {samples: 20, every: 3}\n"
        "save: {every: 2, keep: 9}\n"
    )
    return path


@pytest.fixture(scope="module")
def whole(written, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    return pretrain(Recipe.load(written, f"out={tmp_path_factory.mktemp('whole') / 'run'}"))


def losses(run: Path) -> dict[int, float]:
    """Step -> loss, exactly as written."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def state(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def newest(run: Path) -> int | None:
    path = checkpoint.find(run / "checkpoints")[0]
    return None if path is None else checkpoint.step_of(path)


def resumed(recipe: Path, run: Path) -> dict[int, float]:
    """The losses after going on, on one rank."""
    pretrain(Recipe.load(recipe, f"out={run}"), resume=True)
    return losses(run)


# Signals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "number", "at", "stopped"),
    [("save_run", signal.SIGINT, 2, 3), ("probe", signal.SIGUSR1, 3, 3), ("_describe", signal.SIGTERM, 4, 4)],
)
def test_t26_a_signal_in_the_middle_of_a_long_stage_is_heeded(stage, number, at, stopped, written, whole, tmp_path):
    """Of a save the next update is the last one; probes and descriptions break off, and the state is that before them."""
    recipe = Recipe.load(written, f"out={tmp_path / 'run'}")
    run = prepare(recipe)
    usual = getattr(run.trainer, stage)

    def told(trainer):
        if trainer.state.global_step == at:
            os.kill(os.getpid(), number)
        return usual(trainer)

    setattr(run.trainer, stage, told)
    run.train()
    assert state(tmp_path / "run")["state"] == "preempted"
    assert newest(tmp_path / "run") == state(tmp_path / "run")["step"] == stopped
    assert status([str(tmp_path / "run")]) == 75
    pretrain(recipe, resume=True)
    assert losses(tmp_path / "run") == losses(whole)
    assert status([str(tmp_path / "run")]) == 0


TWICE = """
import os, signal
from mmssl.training import checkpoint, signals
signals.ONE_BLOW, write = 0, checkpoint._write
def twice(folder, step, *rest):
    if step == 6: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]
    write(folder, step, *rest)
checkpoint._write = twice
"""
EARLY = """
import os, signal
from mmssl.training import pretrain
pretrain.Progress = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.distributed
def test_t26_a_second_signal_one_before_the_first_update_and_one_to_a_single_rank(written, whole, tmp_path):
    told = "befall(1, 4, 'os.kill(os.getpid(), signal.SIGTERM)')"
    codes, said = befallen(written, tmp_path, {"twice": (1, TWICE), "early": (1, EARLY), "one": (2, told)})
    # A second one within a save ends the run at once, and the checkpoint before stays.
    assert codes["twice"] == -signal.SIGTERM, said["twice"]
    assert newest(tmp_path / "twice") == 4
    # Before the first update there is nothing to save: the run starts again.
    assert codes["early"] == 130, said["early"]
    assert f"mmssl resume {tmp_path / 'early'}" in said["early"]
    assert "Traceback" not in said["early"]
    assert (state(tmp_path / "early")["state"], newest(tmp_path / "early")) == ("preempted", None)
    # What one rank hears stops both after the same update.
    assert codes["one"] == 0, said["one"]
    assert (state(tmp_path / "one")["state"], newest(tmp_path / "one")) == ("preempted", 5)
    for name in codes:
        assert status([str(tmp_path / name)]) == 75
    assert resumed(written, tmp_path / "twice") == losses(whole)
    assert resumed(written, tmp_path / "early") == losses(whole)
    assert resumed(written, tmp_path / "one") == pytest.approx(losses(whole), rel=1e-4)


def test_a_signal_that_comes_by_two_ways_is_one(monkeypatch):
    """A scheduler tells all processes, and the launcher tells its ranks again."""
    heard = []
    with signals.Signals(heard.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]


# Ranks and workers ---------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_t27_a_rank_that_was_killed_or_hangs_is_named_and_the_run_goes_on_later(written, whole, tmp_path):
    killed = "befall({}, 5, 'os.kill(os.getpid(), signal.SIGKILL)')"
    hangs = (2, "befall(1, 5, 'time.sleep(3600)')", "train.hang_timeout=30")
    trials = {"0": (2, killed.format(0)), "1": (2, killed.format(1)), "hangs": hangs}
    codes, said = befallen(written, tmp_path, trials)
    for rank in "01":
        assert codes[rank] in (-signal.SIGKILL, 7)  # whichever end was seen first
        assert f"mmssl: rank {rank} has gone (killed or crashed" in said[rank], said[rank]
        found = state(tmp_path / rank)
        assert (found["state"], found["code"]) == ("failed", 7)
        assert f"rank {rank} has gone" in found["error"]
        assert newest(tmp_path / rank) == 4
    assert resumed(written, tmp_path / "0") == pytest.approx(losses(whole), rel=1e-4)
    assert codes["hangs"] == 7, said["hangs"]
    assert "mmssl: rank 1 has made no progress" in said["hangs"], said["hangs"]
    assert "in data at step 5" in said["hangs"]
    found = state(tmp_path / "hangs")
    assert (found["state"], found["code"]) == ("failed", 7)
    assert "rank 1 has made no progress" in found["error"]
    assert "befallen" in (tmp_path / "hangs" / "stacks-1.txt").read_text()


@pytest.mark.distributed
def test_t27_a_real_launcher_tells_which_rank_was_killed(written, tmp_path):
    script = tmp_path / "fault.py"
    script.write_text(
        "import sys\n"
        "from mmssl.cli import main\n"
        "from tests.launcher import befall\n"
        "befall(1, 5, 'os.kill(os.getpid(), signal.SIGKILL)')\n"
        "sys.exit(main(['pretrain', *sys.argv[1:]]))\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | {"OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)
    command = ["accelerate", "launch", "--config_file", "recipes/accelerate/cpu2-ddp.yaml", str(script), str(written)]
    command += [f"out={tmp_path / 'run'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode != 0
    assert "mmssl: rank 1 has gone (killed or crashed" in done.stderr, done.stderr[-3000:]
    found = state(tmp_path / "run")
    assert (found["state"], found["code"]) == ("failed", 7)


def test_t25_a_worker_that_was_killed_changes_nothing(written, whole, tmp_path, monkeypatch):
    from mmssl.data.dataset import KeyedDataset

    usual, once = KeyedDataset._at, tmp_path / "once"

    def deadly(self, place):
        if place[1] == 17 and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return usual(self, place)

    monkeypatch.setattr(KeyedDataset, "_at", deadly)
    run = pretrain(Recipe.load(written, f"out={tmp_path / 'run'}", "data.workers=1"))
    assert once.exists()
    assert losses(run) == losses(whole)
    assert not (run / "quarantine.jsonl").exists()
    assert "worker 0 of rank 0" in (run / "log.txt").read_text()


@pytest.mark.distributed
def test_t24_too_many_unreadable_images_stop_both_ranks(written, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "data")
    broken = sorted((tmp_path / "data").rglob("*.png"))[::2]
    for victim in broken:
        victim.write_bytes(b"not an image")
    words = (f"data.path={tmp_path / 'data'}", "data.max_bad=0.1", "data.min_bad=2")
    codes, said = befallen(written, tmp_path, {"bad": (2, "", *words)})
    assert codes["bad"] == 3, said["bad"]
    assert "Traceback" not in said["bad"]
    assert any(victim.name in said["bad"] for victim in broken)
    assert (state(tmp_path / "bad")["state"], state(tmp_path / "bad")["code"]) == ("failed", 3)


# Trackers ------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_same_one_for_tensorboard(written, whole, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = Recipe.load(written, f"out={tmp_path / 'run'}", "train.report_to=[tensorboard]")
    run = pretrain(recipe)
    name = state(run)["tracker"]
    for step in (8, 10):  # as if it had been killed after step 7
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    pretrain(recipe, resume=True)
    assert state(run)["tracker"] == name
    (folder,) = {file.parent for file in run.rglob("events.out.tfevents*")}
    logged = [(scalar.step, scalar.value) for scalar in EventAccumulator(str(folder)).Reload().Scalars("train/loss")]
    assert [step for step, _ in logged] == [*range(1, STEPS + 1)]
    assert dict(logged) == pytest.approx(losses(whole))


def test_trackers_that_go_by_a_name_get_the_stored_one_at_each_start(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    recipe: Recipe = SimpleNamespace(train=SimpleNamespace(report_to=["wandb", "trackio"]))  # type: ignore[assignment]
    names = []
    for overwrite in (False, False, True):
        folder = RunFolder.create(tmp_path / "run", overwrite) if overwrite or not names else RunFolder(tmp_path / "run")
        trainer = SimpleNamespace(args=SimpleNamespace(run_name=None))
        with following(recipe, folder, trainer):  # type: ignore[arg-type]
            assert os.environ["WANDB_RUN_ID"] == trainer.args.run_name
            assert os.environ["WANDB_RESUME"] == "allow"
        assert "WANDB_RUN_ID" not in os.environ
        names.append(trainer.args.run_name)
        folder.status("failed")
    assert names[0] == names[1] != names[2]
