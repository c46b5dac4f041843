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


def python(code: str) -> subprocess.CompletedProcess:
    """A program of its own, whose end is no matter to the tests."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


def accelerate(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The script on two ranks."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | {"OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONPATH"] = str(ROOT)
    command = ["accelerate", "launch", "--config_file", "recipes/accelerate/cpu2-ddp.yaml", str(script), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)


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


def test_t26_a_second_signal_within_a_save_ends_the_run_at_once_and_keeps_the_last_checkpoint(written, whole, tmp_path):
    done = python(
        "import os, signal, sys\n"
        "from mmssl.training import checkpoint, signals\n"
        "from mmssl.cli import main\n"
        "signals.ONE_BLOW, write = 0, checkpoint._write\n"
        "def twice(folder, step, *rest):\n"
        "    if step == 6: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]\n"
        "    write(folder, step, *rest)\n"
        "checkpoint._write = twice\n"
        f"sys.exit(main(['pretrain', {str(written)!r}, 'out={tmp_path / 'run'}']))"
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert newest(tmp_path / "run") == 4
    assert status([str(tmp_path / "run")]) == 75
    pretrain(Recipe.load(written, f"out={tmp_path / 'run'}"), resume=True)
    assert losses(tmp_path / "run") == losses(whole)


def test_t26_a_signal_before_the_first_update_leaves_a_run_that_starts_again(written, whole, tmp_path):
    done = python(
        "import os, signal, sys\n"
        "from mmssl.training import pretrain\n"
        "from mmssl.cli import main\n"
        "pretrain.Progress = lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.exit(main(['pretrain', {str(written)!r}, 'out={tmp_path / 'run'}']))"
    )
    assert done.returncode == 130, done.stderr
    assert f"mmssl resume {tmp_path / 'run'}" in done.stderr
    assert "Traceback" not in done.stderr
    assert state(tmp_path / "run")["state"] == "preempted"
    assert status([str(tmp_path / "run")]) == 75
    pretrain(Recipe.load(written, f"out={tmp_path / 'run'}"), resume=True)
    assert losses(tmp_path / "run") == losses(whole)


@pytest.mark.distributed
def test_t26_a_signal_to_one_rank_stops_both_after_the_same_update(written, whole, tmp_path):
    script = tmp_path / "told.py"
    script.write_text(
        "import os, signal, sys\n"
        "from mmssl.cli import main\n"
        "from mmssl.training.trainer import SelfSupervisedTrainer as Trainer\n"
        "begin = Trainer.begin_update\n"
        "def told(self):\n"
        "    if os.environ['RANK'] == '1' and self.state.global_step == 4: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    begin(self)\n"
        "Trainer.begin_update = told\n"
        "sys.exit(main(['pretrain', *sys.argv[1:]]))\n"
    )
    done = accelerate(script, str(written), f"out={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (state(tmp_path / "run")["state"], newest(tmp_path / "run")) == ("preempted", 5)
    pretrain(Recipe.load(written, f"out={tmp_path / 'run'}"), resume=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-4)


def test_a_signal_that_comes_by_two_ways_is_one(monkeypatch):
    """A scheduler tells all processes, and the launcher tells its ranks again."""
    heard = []
    with signals.Signals(heard.append):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [signal.SIGTERM]


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
