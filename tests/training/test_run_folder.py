import json
import logging
import os
import signal
import socket
import tempfile

import pytest
import torch

from mmssl.errors import RecipeError, StorageError
from mmssl.training import run_folder
from mmssl.training.run_folder import RunFolder, born, redact, redact_command, save_traceback

HF, WANDB = "hf_" + "aB3" * 11, "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def forget_the_current_run(monkeypatch):
    monkeypatch.setattr(RunFolder, "current", None)


def dead_process():
    child = os.fork()
    if child == 0:
        os._exit(0)
    started = born(child)
    os.waitpid(child, 0)
    return {"pid": child, "born": started}


def test_create_makes_parents_and_a_status(tmp_path):
    folder = RunFolder.create(tmp_path / "a/b")
    status = folder.read_status()
    assert (status["state"], status["step"], status["pid"], status["host"]) == ("running", 0, os.getpid(), socket.gethostname())
    assert RunFolder.open(tmp_path / "a/b").is_run()
    assert folder.checkpoints == tmp_path / "a/b/checkpoints"
    assert folder.card.name == "README.md"


def test_a_second_run_is_refused_unless_overwritten(tmp_path):
    folder = RunFolder.create(tmp_path)
    with pytest.raises(RecipeError, match=r"mmssl resume .*overwrite=true"):
        RunFolder.create(tmp_path)
    folder.log_metrics({"step": 1})
    folder.log.write_text("old")
    for step in (folder.checkpoints / "step-00000001", folder.checkpoints / ".tmp-step-00000002-ab", folder.model):
        step.mkdir(parents=True)
        (step / "x").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    (folder.checkpoints / "mine").write_text("mine")
    RunFolder.create(tmp_path, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoints", "notes.txt", "status.json"]
    assert [p.name for p in folder.checkpoints.iterdir()] == ["mine"]


def test_a_run_that_ended_before_it_learned_anything_needs_no_overwriting(tmp_path):
    folder = RunFolder.create(tmp_path)
    folder.write_identity("a: 1\n", ["mmssl"], {})
    folder.log.write_text("refused\n")
    folder.status("failed", error="train.recompute: nothing here has blocks")
    RunFolder.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]
    folder.status("running", host="elsewhere")
    os.utime(folder.status_file, (0, 0))
    with pytest.raises(RecipeError, match="holds a run"):
        RunFolder.create(tmp_path)
    for name in ("metrics.jsonl", "results.json", "checkpoints", "notes.txt"):
        folder.status("failed", host=socket.gethostname())
        (tmp_path / name).write_text("something")
        with pytest.raises(RecipeError, match="holds a run"):
            RunFolder.create(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("status", [None, "{}", '{"state": "done"}', "[1]", "\xff"])
def test_a_folder_that_is_no_run_is_never_overwritten(tmp_path, status):
    (tmp_path / "config.yaml").write_text("precious")
    if status is not None:
        (tmp_path / "status.json").write_bytes(status.encode("latin-1"))
    with pytest.raises(RecipeError, match="not a run of mmssl"):
        RunFolder.create(tmp_path, overwrite=True)
    assert (tmp_path / "config.yaml").read_text() == "precious"
    with pytest.raises(RecipeError, match="no run"):
        RunFolder.open(tmp_path)


def test_files_and_missing_folders_are_told_apart(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="is a file"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(RecipeError, match="no such folder"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(StorageError, match="cannot be written"):
        RunFolder.create(tmp_path / "file" / "run")


def test_an_unwritable_parent_is_a_storage_error(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_folder.Path, "mkdir", refuse)
    with pytest.raises(StorageError, match="write permission"):
        RunFolder.create(tmp_path / "run")


def test_a_live_run_is_not_overwritten(tmp_path):
    folder = RunFolder.create(tmp_path)
    parent = {"pid": os.getppid(), "born": born(os.getppid())}
    folder.status("running", **parent)
    with pytest.raises(RecipeError, match="a run is going on here"):
        RunFolder.create(tmp_path, overwrite=True)
    folder.status("running", **dead_process())
    RunFolder.create(tmp_path, overwrite=True)


def test_who_is_alive(tmp_path):
    folder = RunFolder.create(tmp_path)
    assert folder.is_alive()
    folder.status("running", **dead_process())
    assert not folder.is_alive()
    folder.status("running", pid=os.getpid(), born=born(os.getpid()) - 1)  # the pid was given to somebody else
    assert not folder.is_alive()
    folder.status("running", host="elsewhere")
    assert folder.is_alive()
    os.utime(folder.status_file, (0, 0))
    assert not folder.is_alive()
    folder.status("finished")
    assert not folder.is_alive()


def test_a_zombie_is_dead():
    child = os.fork()
    if child == 0:
        signal.pause()
    assert born(child) is not None
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # ended, and not yet reaped
    assert born(child) is None
    os.waitpid(child, 0)


def test_other_ranks_write_nothing(tmp_path):
    folder = RunFolder.create(tmp_path / "run", is_main=False)
    folder.status("running")
    folder.log_metrics({"step": 1})
    folder.truncate_metrics(0)
    folder.write_identity("a: 1", ["mmssl"], {})
    assert isinstance(folder.log_handler(), logging.NullHandler)
    assert not (tmp_path / "run").exists()


def test_status_keeps_the_step_and_forgets_the_error(tmp_path):
    folder = RunFolder.create(tmp_path)
    folder.status("running", step=7, steps=100)
    folder.status("failed", error=f"token {HF} was refused", code=6)
    status = folder.read_status()
    assert (status["step"], status["steps"], status["code"]) == (7, 100, 6)
    assert HF not in status["error"]
    folder.status("running")
    assert folder.read_status()["error"] is None
    with pytest.raises(ValueError, match="state"):
        folder.status("done")
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_a_status_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path)

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "sync", full)
    with pytest.raises(StorageError, match="full"):
        folder.status("finished")
    assert folder.read_status()["state"] == "running"
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_metrics_are_json_and_nan_is_null(tmp_path):
    folder = RunFolder.create(tmp_path)
    folder.log_metrics({"step": 1, "loss": float("nan"), "lr": torch.tensor(0.5), "x": torch.tensor(float("inf"))})
    folder.log_metrics({"step": torch.tensor(2), "loss": 0.25})
    lines = folder.metrics.read_text().splitlines()
    assert json.loads(lines[0], parse_constant=pytest.fail) == {"step": 1, "loss": None, "lr": 0.5, "x": None}
    assert folder.last_metrics() == {"step": 2, "loss": 0.25}


def test_a_resumed_curve_has_no_duplicates_and_no_torn_line(tmp_path):
    folder = RunFolder.create(tmp_path)
    for step in (10, 20, 30):
        folder.log_metrics({"step": step, "loss": 1.0})
    with folder.metrics.open("a") as file:
        file.write('{"step": 15, "lo')
    assert folder.last_metrics()["step"] == 30
    folder.truncate_metrics(20)
    folder.log_metrics({"step": 30})
    assert [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()] == [10, 20, 30]


def test_truncating_nothing_is_fine(tmp_path):
    folder = RunFolder.create(tmp_path)
    folder.truncate_metrics(5)
    assert folder.last_metrics() == {}


def test_identity_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "correct horse battery")
    monkeypatch.setenv("HF_TOKEN", HF)
    folder = RunFolder.create(tmp_path)
    words = ["mmssl", "pretrain", "r.yaml", f"hub.token={HF}", "key=abc", "--token", "xyz", "optim.lr=1e-3"]
    folder.write_identity(
        f"data:\n  path: s3://u:pa55@host/{HF}\n", words, {"rows": 3, "path": f"x {HF}", "mean": float("nan")}
    )
    folder.write_identity("a: 1\n", ["mmssl", "resume", "run dir"], {"rows": 3, "note": "correct horse battery"})
    commands = folder.command.read_text().splitlines()
    assert commands == [
        "mmssl pretrain r.yaml hub.token=REDACTED key=REDACTED --token REDACTED optim.lr=1e-3",
        "mmssl resume 'run dir'",
    ]
    env = json.loads(folder.env.read_text())
    assert env["packages"]["torch"]
    assert env["cpus"] >= 1
    assert "MY_API_KEY" not in folder.env.read_text()
    everything = "".join(p.read_text() for p in tmp_path.iterdir())
    assert not any(secret in everything for secret in (HF, "correct horse", "pa55"))
    assert json.loads(folder.data.read_text())["rows"] == 3


@pytest.mark.parametrize(
    "secret",
    [HF, "ghp_" + "a1" * 18, "sk-proj-" + "Ab3d" * 8, "AKIAIOSFODNN7EXAMPLE", "github_pat_" + "1a" * 20],
)
def test_shapes_of_tokens_are_hidden(secret):
    assert redact(f"login with {secret}, then go") == "login with REDACTED, then go"


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"wandb key {WANDB}", WANDB),
        (f"WANDB_API_KEY={WANDB}", WANDB),
        ('{"hub_token": "abcdefgh1"}', "abcdefgh1"),
        ("https://x.org/?token=abcdefgh1&a=1", "abcdefgh1"),
        ("Authorization: Bearer abcdefgh1.x-y", "abcdefgh1"),
        ("https://me:hunter22@x.org", "hunter22"),
    ],
)
def test_named_secrets_are_hidden(text, hidden):
    assert hidden not in redact(text)
    assert "REDACTED" in redact(text)


@pytest.mark.parametrize(
    "text",
    ["sk-learn-something-long-name", "hf_datasets/imagenet", "overrides are key=value", "tokens=196 masked", "keys: x", WANDB,
     "step 3: loss 0.5, max_token=512", "vision/data2vec2-demo http://host:8080/path"],
)  # fmt: skip
def test_plain_text_stays(text):
    assert redact(text) == text


def test_values_of_secret_variables_are_hidden(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "a b,c/d:e")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    assert redact("x a b,c/d:e y abc") == "x REDACTED y abc"
    assert redact_command(["--api-key=1", "secret=2", "k=3"]) == "--api-key=REDACTED secret=REDACTED k=3"


def test_log_records_are_redacted_with_their_traceback(tmp_path):
    folder = RunFolder.create(tmp_path)
    logger, handler = logging.Logger("t"), folder.log_handler()
    logger.addHandler(handler)
    try:
        raise ValueError(f"bad {HF}")
    except ValueError:
        logger.exception("using %s", HF)
    handler.close()
    assert HF not in folder.log.read_text()
    assert "Traceback" in folder.log.read_text()


def test_tracebacks_lie_in_the_run_or_in_a_temporary_file(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
    assert save_traceback(f"boom {HF}").read_text() == "boom REDACTED"
    RunFolder.create(tmp_path)
    assert save_traceback("boom") == tmp_path / "traceback-0.txt"
