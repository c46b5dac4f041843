"""Whole runs: what a user does, and what can go wrong on the way."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from mmssl.config import Recipe
from mmssl.errors import DataError, NonFiniteError, RecipeError
from mmssl.parts import Teacher
from mmssl.training import checkpoint
from mmssl.training.launch import check_deepspeed, prefer_own_tools, remove_stale_locks
from mmssl.training.pretrain import prepare, pretrain

ROOT = Path(__file__).resolve().parents[2]
TINY = (
    "train.log_every=1 save.keep=3 watch.every=0 model.depth=2 model.hidden_size=32 model.heads=2 method.top_k=2 "
    "method.decoder={dim: 32, groups: 4, layers: 2} optim.warmup=2 data.workers=0 train.global_batch=16 train.steps=12 "
    "save.every=4 train.threads=1"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Forty images of stripes in two classes, with a test split."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 8)):
        for i in range(count):
            name = "rows" if i % 2 else "columns"
            stripes = np.tile((np.arange(32) // 4 % 2 * 200).astype(np.uint8), (32, 1))
            pixels = (stripes.T if i % 2 else stripes) + draw.integers(0, 55, (32, 32), dtype=np.uint8)
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / split / name / f"{i:02}.png")
    return folder


def words(images: Path, out: Path, *more: str) -> list[str]:
    """Command-line words of a tiny run; values with spaces stay whole."""
    tiny = [w.replace("\0", " ") for w in TINY.replace(": ", ":\0").replace(", ", ",\0").split()]
    return ["vision/data2vec2-demo", f"data.path={images}", f"out={out}", *tiny, *more]


def recipe(images: Path, out: Path, *more: str) -> Recipe:
    name, *overrides = words(images, out, *more)
    return Recipe.load(name, *overrides)


def curve(run: Path) -> dict[int, float]:
    """Step -> loss, exactly as written."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mmssl", *arguments], cwd=ROOT, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    return pretrain(recipe(images, tmp_path_factory.mktemp("whole") / "run"))


def test_a_run_leaves_what_the_contract_names(whole):
    for name in ("config.yaml", "command.txt", "env.json", "data.json", "metrics.jsonl", "log.txt", "status.json", "README.md"):
        assert (whole / name).is_file(), name
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "modeling_mmssl.py", "README.md"} <= {
        file.name for file in (whole / "model").iterdir()
    }
    status = json.loads((whole / "status.json").read_text())
    assert (status["state"], status["step"], status["steps"]) == ("finished", 12, 12)
    assert "step 12  loss 8." in (whole / "log.txt").read_text()
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 13)]
    for line in lines:
        if "loss" in line:
            assert line["loss"] == pytest.approx(line["loss/tokens"] + line["loss/cls"], rel=1e-6)
            assert {"lr", "speed/samples_per_s", "health/target_std", "health/prediction_std", "health/feature_std"} <= {*line}
    assert {"probe/test/knn", "probe/test/linear", "health/rankme"} <= {*lines[-1]}


def test_a_killed_run_resumes_with_a_bit_identical_curve(whole, images, tmp_path):
    """T14 (b) and T15, once."""
    for attempt in range(4):  # on a busy machine the blow may fall after the end
        out = tmp_path / f"run-{attempt}"
        process = subprocess.Popen(
            [sys.executable, "-m", "mmssl", "pretrain", *words(images, out, "data.workers=1")],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and checkpoint.find(out / "checkpoints", hashes=False)[0] is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        newest = checkpoint.find(out / "checkpoints")[0]
        assert newest is not None
        if checkpoint.step_of(newest) < 12:
            break
    else:
        pytest.fail("every run ended before it was killed")
    assert command("status", str(out)).returncode == 75
    done = command("resume", str(out))
    assert done.returncode == 0, done.stderr
    assert curve(out) == curve(whole)  # the same bits, with another number of workers
    mine, theirs = (checkpoint.load(checkpoint.find(run / "checkpoints")[0])[0] for run in (out, whole))
    for part in theirs:
        assert mine[part].keys() == theirs[part].keys()
        assert all(torch.equal(mine[part][name], theirs[part][name]) for name in theirs[part])
    assert command("status", str(out)).returncode == 0


def test_the_first_signal_saves_and_the_run_goes_on_later(whole, images, tmp_path):
    for attempt in range(4):  # on a busy machine the signal may come after the end
        out = tmp_path / f"run-{attempt}"
        process = subprocess.Popen(
            [sys.executable, "-m", "mmssl", "pretrain", *words(images, out)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not ((out / "metrics.jsonl").exists() and curve(out)):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        state = json.loads((out / "status.json").read_text())
        if state["state"] != "finished" and process.returncode >= 0:
            break
    else:
        pytest.fail("every run ended before the signal")
    assert process.returncode == 0, errors
    assert state["state"] == "preempted"
    assert checkpoint.step_of(checkpoint.find(out / "checkpoints")[0]) == state["step"] < 12
    assert command("status", str(out)).returncode == 75
    assert command("resume", str(out)).returncode == 0
    assert curve(out) == curve(whole)


def test_a_signal_at_the_very_end_does_not_make_a_finished_run_unfinished(images, tmp_path):
    prepared = prepare(recipe(images, tmp_path / "run", "train.steps=2"))
    save = prepared.trainer.save_run

    def interrupted(trainer):
        save(trainer)
        trainer.stop_signal = signal.SIGTERM

    prepared.trainer.save_run = interrupted
    prepared.train()
    assert prepared.folder.read_status()["state"] == "finished"


def test_a_plain_accelerate_loop_gives_the_same_losses(whole, images, tmp_path):
    script = (
        "import sys, json; sys.path.insert(0, 'recipes')\nfrom no_trainer import train\nfrom mmssl.config import Recipe\n"
        f"import torch; torch.set_num_threads(1)\nprint(json.dumps(train(Recipe.load(*{words(images, tmp_path)!r}))))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx([*curve(whole).values()], rel=1e-6)


def test_micro_batches_do_not_change_the_curve(whole, images, tmp_path):
    split = pretrain(recipe(images, tmp_path / "run", "train.micro_batch=4", "train.steps=4", "watch.linear=false"))
    whole_lr = pretrain(recipe(images, tmp_path / "whole", "train.steps=4", "watch.linear=false"))
    assert [*curve(split).values()] == pytest.approx([*curve(whole_lr).values()], rel=2e-6)


def accelerate(profile: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")} | {"OMP_NUM_THREADS": "1"} | more
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["accelerate", "launch", "--config_file", f"recipes/accelerate/{profile}.yaml", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("profile", "kind", "stage"),
    [
        ("cpu2-ddp", "MULTI_CPU", None),
        ("cpu2-zero2", "DEEPSPEED", 2),
        ("cpu2-zero3", "DEEPSPEED", 3),
    ],
)
def test_two_processes_equal_one_and_take_over_from_each_other(profile, kind, stage, whole, images, tmp_path):
    """T01, T03 and T19: DDP and ZeRO against one process, and each resumed by the other."""
    out = tmp_path / "run"
    built = tmp_path / "extensions"
    done = accelerate(profile, "recipes/pretrain.py", *words(images, out), TORCH_EXTENSIONS_DIR=str(built))
    assert done.returncode == 0, done.stderr[-3000:]
    assert not built.exists()  # no compiler is needed
    facts = json.loads((out / "status.json").read_text())["launch"]
    assert facts["distributed"] == kind
    assert facts["processes"] == {"accelerate": 2, "torch": 2, "launcher": 2}
    assert facts["zero_stage"] == stage
    assert facts["clip"] == 4.0  # the recipe's, not accelerate's 1.0
    assert [*curve(out).values()] == pytest.approx([*curve(whole).values()], rel=1e-5)
    mine, theirs = (checkpoint.load(checkpoint.find(run / "checkpoints")[0])[0]["model"] for run in (out, whole))
    teacher = [name for name in theirs if name.startswith("method.teacher.")]
    for name in teacher:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5)
    start = recipe(images, tmp_path).build().state_dict()
    changed = [name for name in teacher if not torch.equal(mine[name], start[name.removeprefix("method.")])]
    assert len(changed) == len(teacher) - 1  # all but the fixed positions

    # Saved by two, resumed by one; saved by one, resumed by two.
    shutil.rmtree(out / "checkpoints" / "step-00000012")
    pretrain(recipe(images, out), resume=True)
    assert curve(out) == pytest.approx(curve(whole), rel=1e-5)
    moved = tmp_path / "moved"
    shutil.copytree(whole, moved)
    shutil.rmtree(moved / "checkpoints" / "step-00000012")
    again = accelerate(profile, "-m", "mmssl", "resume", str(moved), f"train.split_teacher={str(stage == 3).lower()}")
    assert again.returncode == 0, again.stderr[-3000:]
    assert curve(moved) == pytest.approx(curve(whole), rel=1e-5)


WHOLE = """
import json, sys
from mmssl.config import Recipe
from mmssl.distributed import is_partitioned, rank
from mmssl.training.pretrain import prepare

place, images, init = sys.argv[1:]
common = [f"data.path={images}", "data.workers=0", "train.global_batch=4", "train.device=cpu", "watch.linear=false"]
recipes = {
    "read": ["vision/data2vec2-demo", f"model.init={init}", "model.depth=2", "model.hidden_size=32", "model.heads=2",
             "method.top_k=2", "method.decoder={dim: 32, groups: 4, layers: 2}"],
    "made": ["vision/byol-cifar10-cpu"],
}
found = {}
for name, words in recipes.items():
    method = prepare(Recipe.load(*words, *common, f"out={place}/{name}")).objective.method
    students, teachers = (dict(network.named_parameters()) for network in (method.student, method.teacher.network))
    found[name] = {
        "whole": not any(is_partitioned(p) for p in students.values()),
        "sizes": [sum(students[n].numel() for n in teachers), sum(p.numel() for p in teachers.values())],
    }
open(f"{place}/found-{rank()}.json", "w").write(json.dumps(found))
"""


@pytest.mark.distributed
def test_t09_students_are_whole_when_teachers_are_copied_from_them_under_zero3(whole, images, tmp_path):
    """B4 and B5: models of transformers that are read from a folder, or made from a config."""
    (tmp_path / "whole.py").write_text(WHOLE)
    done = accelerate("cpu2-zero3", str(tmp_path / "whole.py"), str(tmp_path), str(images), str(whole / "model"))
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        for name, found in json.loads((tmp_path / f"found-{rank}.json").read_text()).items():
            students, teachers = found["sizes"]
            assert found["whole"], name
            assert students == teachers > 10_000, name


SRUN = """#!/bin/bash
# Every task in a process of its own; the first job's time is soon up.
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
if [ ! -e "$JOBS" ]; then
    until grep -q loss "$RUN/metrics.jsonl" 2>/dev/null; do sleep 0.05; kill -0 "${tasks[0]}" || break; done
    kill -USR1 "${tasks[@]}"
fi
for task in "${tasks[@]}"; do wait "$task" || worst=$?; done
exit "${worst:-0}"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = requeue ]; then echo "$2" >>"$JOBS"; else echo 127.0.0.1; fi
"""


@pytest.mark.distributed
def test_a_slurm_job_whose_time_is_up_saves_queues_again_and_goes_on(whole, images, tmp_path):
    """X1; the scheduler's two commands are ours, the job script is the one that users get."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    run, jobs = tmp_path / "run", tmp_path / "jobs"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    paths = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "here", "MASTER_PORT": str(port)}
    environment = (
        os.environ | slurm | {"PATH": os.pathsep.join(paths), "RUN": str(run), "JOBS": str(jobs), "OMP_NUM_THREADS": "1"}
    )
    name, *rest = [word for word in words(images, run) if not word.startswith("out=")]
    script = ["bash", "recipes/accelerate/slurm.sbatch", str(run), name, *rest]

    first = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert first.returncode == 0, first.stderr[-3000:]
    assert jobs.read_text().split() == ["7"]
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"
    assert len(curve(run)) < len(curve(whole))
    second = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert second.returncode == 0, second.stderr[-3000:]
    assert jobs.read_text().split() == ["7"]  # a run that is finished does not queue again
    assert curve(run) == pytest.approx(curve(whole), rel=1e-5)
    assert json.loads((run / "status.json").read_text())["launch"]["processes"]["torch"] == 2


def test_launch_profiles_name_files_that_are_there_and_their_own_command():
    """Those for GPUs, too, which no test here can start."""
    for file in (ROOT / "recipes" / "accelerate").glob("*.yaml"):
        text = file.read_text()
        assert f"recipes/accelerate/{file.name}" in text, file
        profile = yaml.safe_load(text)
        engine = profile.get("deepspeed_config")
        assert (engine is not None) == ("zero" in file.name), file
        assert ("num_processes" in profile) == file.name.startswith("cpu2"), file
        if engine:
            config = json.loads((ROOT / engine["deepspeed_config_file"]).read_text())
            assert f"zero{config['zero_optimization']['stage']}" in file.name, file
            fits = recipe(ROOT, ROOT, f"train.precision={'fp32' if file.name.startswith('cpu2') else 'bf16'}")
            check_deepspeed(config, fits)


def test_without_labels_there_are_still_signs_of_life(images, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (images / "train").glob("*/*.png"):
        shutil.copy(file, flat)
    run = pretrain(recipe(flat, tmp_path / "run", "train.steps=4"))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["health/rankme"] >= 1
    assert last["health/embedding_std"] > 0
    assert not [name for name in last if name.startswith("probe/")]


def test_micro_batches_are_fetched_one_by_one(images, tmp_path, monkeypatch):
    from mmssl.data.dataset import KeyedDataset
    from mmssl.methods.data2vec2 import Data2Vec2

    events, collate, forward = [], KeyedDataset.collate, Data2Vec2.forward
    monkeypatch.setattr(KeyedDataset, "collate", lambda self, s: (events.append("fetch"), collate(self, s))[1])
    monkeypatch.setattr(Data2Vec2, "forward", lambda self, *a: (events.append("train"), forward(self, *a))[1])
    pretrain(recipe(images, tmp_path / "run", "train.micro_batch=4", "train.steps=2"))
    assert events[:8] == ["fetch", "train"] * 4


def test_trackers_get_the_same_numbers(images, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = pretrain(recipe(images, tmp_path / "run", "train.steps=4", "train.report_to=[tensorboard]"))
    (events,) = run.rglob("events.out.tfevents*")
    log = EventAccumulator(str(events)).Reload()
    logged = {scalar.step: scalar.value for scalar in log.Scalars("train/loss")}
    assert logged == pytest.approx(curve(run))


def test_a_run_may_start_from_a_model_folder(whole, images, tmp_path):
    start = recipe(images, tmp_path / "run", f"model.init={whole / 'model'}", "train.steps=4", "optim.warmup=1000000")
    run = pretrain(start)  # the first rates are next to nothing, so the weights stay where they began
    mine, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole))
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-5)
    with pytest.raises(RecipeError, match=r"model\.init"):
        pretrain(recipe(images, tmp_path / "other", f"model.init={whole / 'model'}", "model.depth=3"))


def test_t21_a_stream_trains_and_resumes_exactly(images, tmp_path):
    import datasets

    files = sorted((images / "train").glob("*/*.png"))
    (tmp_path / "shards").mkdir()
    for i in range(4):
        rows = {"image": [{"bytes": f.read_bytes(), "path": None} for f in files[i::4]]}
        features = datasets.Features({"image": datasets.Image(decode=False)})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "shards" / f"train-{i}.parquet")
    more = ["data.streaming=true", "data.readers=2", "data.block=8", "data.path=" + str(tmp_path / "shards"), "train.steps=8"]
    run = pretrain(recipe(images, tmp_path / "run", *more))
    before = curve(run)
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    pretrain(recipe(images, run, *more), resume=True)
    assert curve(run) == before


def test_bf16_autocast_trains_and_the_teacher_still_moves(images, tmp_path):
    run = pretrain(recipe(images, tmp_path / "run", "train.precision=bf16", "method.momentum=0.9999", "watch.linear=false"))
    tensors = checkpoint.load(checkpoint.find(run / "checkpoints")[0])[0]["model"]
    start = recipe(images, tmp_path, "method.momentum=0.9999").build().state_dict()
    name = "teacher.network.encoder.transformer.blocks.0.mlp.fc1.weight"
    assert tensors[f"method.{name}"].dtype == torch.float32
    assert not torch.equal(tensors[f"method.{name}"], start[name])
    assert [*curve(run).values()][-1] < next(iter(curve(run).values()))


def test_t04_under_bf16_the_teacher_is_the_true_average_and_one_kept_in_bf16_is_not(images, tmp_path, monkeypatch):
    """T04 and the stricter half per cent of its movement; the average is followed in float64."""
    small = ("train.precision=bf16", "train.steps=200", "train.global_batch=4", "model.depth=1", "method.top_k=1")
    quiet = ("watch.linear=false", "watch.samples=20", "save.every=200", "train.log_every=50", "method.momentum=0.996")
    run, move, true, low = prepare(recipe(images, tmp_path / "run", *small, *quiet)), Teacher.after_step, {}, {}
    teacher = run.objective.method.teacher
    start = {name: p.double() for name, p in teacher.network.named_parameters() if not name.startswith(teacher.copied)}

    def follow(self, clock):
        student = dict(self.student.named_parameters())
        for name, first in start.items():
            now = student[name].detach()
            true[name] = 0.996 * true.get(name, first) + 0.004 * now.double()
            low[name] = torch.lerp(low.get(name, first.bfloat16()), now.bfloat16(), 0.004)
        move(self, clock)

    monkeypatch.setattr(Teacher, "after_step", follow)
    run.train()
    assert run.trainer.applied == 200

    def error(average):
        apart, moved = (sum(float((a[n] - b[n]).square().sum()) for n in true) for a, b in ((average, true), (true, start)))
        return (apart / moved) ** 0.5

    assert error(dict(teacher.network.named_parameters())) < 0.005
    assert error(low) > 0.02


def test_the_command_line_checks_probes_and_exports(whole, images, tmp_path):
    checked = command("check", *words(images, tmp_path / "unused", "json=true"))
    assert checked.returncode == 0, checked.stderr
    facts = json.loads(checked.stdout.splitlines()[-1])
    assert facts["trained_parameters"] == sum(p.numel() for p in recipe(images, tmp_path).build().parameters())
    assert facts["samples_per_second"] > 0
    assert not (tmp_path / "unused").exists()
    probed = command("probe", str(whole / "model"), f"data={images}", "random=true", "json=true")
    assert probed.returncode == 0, probed.stderr
    scores = json.loads(probed.stdout.splitlines()[-1])
    assert {*scores} == {"raw", "random", "model"}
    assert all(0 <= value <= 1 for row in scores.values() for value in row.values())
    exported = command("export", str(whole), f"to={tmp_path / 'teacher'}", "which=teacher")
    assert exported.returncode == 0, exported.stderr
    tensors = checkpoint.load(checkpoint.find(whole / "checkpoints")[0])[0]["model"]
    for name, tensor in load_file(tmp_path / "teacher" / "model.safetensors").items():
        assert torch.equal(tensor, tensors[f"method.teacher.network.{name}"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED"), "ACCELERATE_USE_CPU"),
        (("ACCELERATE_USE_FSDP",), "recipes/accelerate/gpu-zero3.yaml"),
    ],
)
def test_t01_launchers_settings_that_would_train_otherwise_are_refused(images, tmp_path, settings, told):
    done = command("pretrain", *words(images, tmp_path / "run"), env=os.environ | dict.fromkeys(settings, "true"))
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_lock_of_a_build_that_was_killed_does_not_stop_a_run_for_ever(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    forgotten, held, young = (tmp_path / name / "lock" for name in ("forgotten", "held", "young"))
    for lock in (forgotten, held, young):
        lock.parent.mkdir()
        lock.touch()
    for lock in (forgotten, held):
        os.utime(lock, (0, 0))
    with held.open():
        remove_stale_locks()
    assert [lock.exists() for lock in (forgotten, held, young)] == [False, True, True]
    assert str(forgotten) in capsys.readouterr().err


def test_extensions_are_built_with_this_environments_ninja(monkeypatch):
    monkeypatch.setenv("PATH", os.defpath)
    prefer_own_tools()
    prefer_own_tools()
    assert os.environ["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), *os.defpath.split(os.pathsep)]
    assert Path(shutil.which("ninja") or "").parent == Path(sys.executable).parent


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ({"gradient_clipping": 1.0}, r"optim\.clip"),
        ({"gradient_clipping": 4.0, "bf16": {"enabled": True}}, "bf16 engine"),
        ({"gradient_clipping": "auto", "torch_autocast": {"enabled": True}}, "agree"),
        ({"gradient_clipping": "auto", "zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_recipe_is_refused(file, word, images, tmp_path):
    with pytest.raises(RecipeError, match=word):
        check_deepspeed(file, recipe(images, tmp_path))


def test_a_non_finite_loss_is_skipped_and_never_logged_as_zero(images, tmp_path, monkeypatch):
    from mmssl.methods.data2vec2 import Data2Vec2

    forward, calls = Data2Vec2.forward, []

    def poisoned(self, batch, clock):
        out = forward(self, batch, clock)
        calls.append({n: p.detach().clone() for n, p in self.named_parameters()} | {"teacher": clone(self.teacher)})
        return out._replace(losses={n: t * float("nan") for n, t in out.losses.items()}) if len(calls) == 3 else out

    def clone(teacher):
        return torch.cat([p.flatten() for p in teacher.network.parameters()]).clone()

    monkeypatch.setattr(Data2Vec2, "forward", poisoned)
    run = pretrain(recipe(images, tmp_path / "run", "train.steps=6", "save.every=6"))
    lines = {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line}
    assert lines[3]["loss"] is None
    assert lines[3]["skipped"] == 1
    assert all(lines[step]["loss"] > 0 for step in (1, 2, 4, 5, 6))
    assert all(torch.equal(calls[2][name], calls[3][name]) for name in calls[2])  # weights and teacher as before the bad batch
    assert not torch.equal(calls[3]["teacher"], calls[4]["teacher"])
    state = json.loads((checkpoint.find(run / "checkpoints")[0] / "state.json").read_text())
    assert (state["step"], state["applied"]) == (6, 5)


def test_a_non_finite_gradient_is_skipped(images, tmp_path, monkeypatch):
    from mmssl.methods.data2vec2 import Data2Vec2

    forward, weights = Data2Vec2.forward, []

    def poisoned(self, batch, clock):
        out = forward(self, batch, clock)
        weights.append(self.student.encoder.features.proj.weight.detach().clone())
        if len(weights) == 3:  # sqrt at 0: finite value, infinite slope
            out.losses["tokens"] = out.losses["tokens"] + (self.student.encoder.features.proj.weight * 0).sum().abs().sqrt()
        return out

    monkeypatch.setattr(Data2Vec2, "forward", poisoned)
    run = pretrain(recipe(images, tmp_path / "run", "train.steps=5", "save.every=5"))
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[3], weights[4])
    tensors, state = checkpoint.load(checkpoint.find(run / "checkpoints")[0])
    assert state["applied"] == 4
    assert all(bool(t.isfinite().all()) for t in tensors["model"].values())


def test_the_end_is_saved_even_if_the_last_update_was_skipped(images, tmp_path, monkeypatch):
    from mmssl.methods.data2vec2 import Data2Vec2

    forward = Data2Vec2.forward

    def poisoned(self, batch, clock):
        out = forward(self, batch, clock)
        return out._replace(losses={n: t * float("nan") for n, t in out.losses.items()}) if clock.step == 3 else out

    monkeypatch.setattr(Data2Vec2, "forward", poisoned)
    run = pretrain(recipe(images, tmp_path / "run", "train.steps=4", "save.every=100"))
    state = checkpoint.load(checkpoint.find(run / "checkpoints")[0])[1]
    assert (state["step"], state["applied"]) == (4, 3)
    assert (run / "model" / "model.safetensors").is_file()


def test_samples_without_a_label_count_in_no_probe(images, tmp_path):
    rows = [{"file": str(file.relative_to(images)), "label": file.parent.name} for file in sorted(images.rglob("*.png"))]
    for i, row in enumerate(rows):
        row["label"] = row["label"] if i % 4 else None
    table = images / "partly.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = pretrain(recipe(images, tmp_path / "run", f"data.path={table}", "train.steps=4"))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["probe/heldout/knn"] <= 1
    assert 0 <= last["probe/heldout/linear"] <= 1


def test_the_online_probe_never_sees_the_labels_that_it_is_measured_on(images, tmp_path):
    prepared = prepare(recipe(images / "train", tmp_path / "run"))
    measured = set(prepared.members[0].probes.sets.test.data.indices)
    labels = prepared.members[0].dataset.source.labels
    assert prepared.members[0].probes.sets.name == "heldout"
    assert measured
    assert {i for i in range(len(labels)) if labels[i] < 0} == measured
    assert not measured & set(prepared.members[0].probes.sets.train.data.indices)


def test_a_run_that_stays_non_finite_stops_with_status_4(images, tmp_path, monkeypatch):
    from mmssl.methods.data2vec2 import Data2Vec2

    forward = Data2Vec2.forward

    def poisoned(self, batch, clock):
        out = forward(self, batch, clock)
        return out._replace(losses={n: t * float("inf") for n, t in out.losses.items()}) if clock.step >= 5 else out

    monkeypatch.setattr(Data2Vec2, "forward", poisoned)
    with pytest.raises(NonFiniteError, match=r"optim\.lr"):
        pretrain(recipe(images, tmp_path / "run"))
    assert checkpoint.step_of(checkpoint.find(tmp_path / "run" / "checkpoints")[0]) == 4
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 4)


def test_an_existing_run_is_refused_unless_told(whole, images):
    before = (whole / "metrics.jsonl").read_text()
    with pytest.raises(RecipeError, match="overwrite=true"):
        pretrain(recipe(images, whole))
    assert (whole / "metrics.jsonl").read_text() == before


def test_unreadable_images_are_replaced_and_named(images, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(images, data)
    victim = sorted((data / "train" / "rows").iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:60])
    run = pretrain(recipe(data, tmp_path / "run", "train.steps=4", "save.every=4"))
    ledger = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert {Path(line["identity"]).name for line in ledger} == {victim.name}


def test_t24_too_many_unreadable_images_stop_the_run_with_status_3(images, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(images, data)
    for victim in sorted((data / "train" / "rows").iterdir())[:8]:
        victim.write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"\.png"):
        pretrain(recipe(data, tmp_path / "run", "data.max_bad=0", "data.min_bad=2"))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["code"] == 3


def test_a_folder_without_a_readable_image_is_refused_by_name(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(40):
        (data / f"{i}.png").write_bytes(b"")
    done = command("pretrain", *words(data, tmp_path / "run"))
    assert done.returncode == 3
    assert ".png" in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_leave_no_run_folder_and_no_traceback(images, tmp_path):
    for more, name in (
        ("data.path=nowhere", "nowhere"),
        ("train.global_batch=64", "train.global_batch"),
        ("optim.lrr=1", "optim.lrr"),
    ):
        done = command("pretrain", *words(images, tmp_path / "run", more))
        assert done.returncode == 2, done.stderr
        assert name in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "run").exists()


def test_a_full_disk_at_a_save_is_one_sentence_and_keeps_the_last_checkpoint(images, tmp_path):
    """The disk is a file-size limit: the first save fits, the second has a larger file."""
    script = (
        "import resource, sys; from mmssl.training import checkpoint, pretrain\n"
        "from mmssl.cli import main\nimport signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "save = checkpoint.save\n"
        "def limited(root, step, *rest, **more):\n"
        "    if step > 4: resource.setrlimit(resource.RLIMIT_FSIZE, (20000, resource.RLIM_INFINITY))\n"
        "    try: return save(root, step, *rest, **more)\n"
        "    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        f"checkpoint.save = limited; sys.exit(main(['pretrain', *{words(images, tmp_path / 'run')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 6, done.stderr
    assert "Traceback" not in done.stderr
    kept = checkpoint.find(tmp_path / "run" / "checkpoints")[0]
    assert checkpoint.step_of(kept) == 4
    assert not [p for p in kept.parent.iterdir() if p.name.startswith(".")]


def test_the_model_folder_holds_the_student(whole):
    exported = load_file(whole / "model" / "model.safetensors")
    tensors, _ = checkpoint.load(checkpoint.find(whole / "checkpoints")[0])
    for name, tensor in exported.items():
        assert torch.equal(tensor, tensors["model"][f"method.student.{name}"])


def test_crops_changed_on_the_device_teach_what_those_of_workers_teach(images, tmp_path):
    path = tmp_path / "dino.yaml"
    path.write_text(
        f"data: {{path: {images}, modality: vision, workers: 1}}\n"
        "model: {image_size: 16, patch_size: 4, channels: 1, hidden_size: 16, depth: 1, heads: 2}\n"
        "method: {name: dino, hidden: 16, bottleneck: 8, prototypes: 6}\n"
        "views: {crops: dino, mean: [0.4], std: [0.3]}\n"
        "train: {steps: 4, global_batch: 8, device: cpu, log_every: 1, threads: 1}\n"
        "watch: {every: 2, samples: 20, change: false}\nsave: {every: 2}\n"
    )
    runs = [pretrain(Recipe.load(path, f"out={tmp_path / on}", f"views.on_device={on}")) for on in ("false", "true")]
    workers, device = map(curve, runs)
    assert device == pytest.approx(workers, rel=1e-3)
    assert len(set(device.values())) == 4
