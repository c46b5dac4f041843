import ast
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest
import torch

from mmssl.cli import VERBS, main
from mmssl.cli.options import describe, parse
from mmssl.cli.status import judge
from mmssl.errors import CheckpointError, DataError, NonFiniteError, RecipeError, StorageError
from mmssl.methods import METHODS
from mmssl.training.checkpoint import save
from mmssl.training.run_folder import RunFolder

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}
RECIPE = """\
data: {path: digits, modality: vision}
model: {hidden_size: 96, depth: 4}
method: {name: %s}
train: {steps: 10}
"""


@pytest.fixture(autouse=True)
def forget_the_current_run(monkeypatch):
    monkeypatch.setattr(RunFolder, "current", None)


@pytest.fixture(autouse=True)
def temporary_files_stay_here(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of recipes: a and b train the same encoder by the first method, c another one by a method unknown here."""
    root = tmp_path / "recipes"
    (root / "vision").mkdir(parents=True)
    name = next(iter(METHODS))
    (root / "vision/a.yaml").write_text(RECIPE % name)
    (root / "vision/b.yaml").write_text(RECIPE % name)
    (root / "vision/c.yaml").write_text((RECIPE % "other").replace("96", "192"))
    monkeypatch.setattr("mmssl.config.reading.recipe_root", lambda: root)
    return root


@pytest.fixture
def raising(monkeypatch):
    """Makes `mmssl env` raise."""

    def install(error):
        def run(arguments):
            raise error

        monkeypatch.setitem(sys.modules, "mmssl.cli.env", types.SimpleNamespace(run=run))

    return install


def call(capsys, *arguments):
    code = main(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# Help ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["--version"], ["status", "--help"], ["list", "-h"]])
def test_help_needs_nothing_slow(arguments):
    code = (
        "import sys; from mmssl.cli import main; code = main(sys.argv[1:])\n"
        "slow = {'torch', 'pydantic', 'transformers', 'numpy', 'yaml'} & set(sys.modules)\n"
        "assert not slow, slow\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_python_m_mmssl_is_the_same():
    done = subprocess.run([sys.executable, "-m", "mmssl"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(verb in done.stdout and line in done.stdout for verb, line in VERBS.items())


@pytest.mark.parametrize("verb", VERBS)
def test_help_lines_are_the_docstrings(verb):
    tree = ast.parse((REPOSITORY / f"mmssl/cli/{verb}.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree).splitlines()[0] == VERBS[verb]


def test_every_verb_is_in_the_table():
    files = {path.stem for path in (REPOSITORY / "mmssl/cli").glob("*.py")}
    assert files - {"__init__", "options"} <= VERBS.keys()


def test_help_of_a_verb_shows_its_options(capsys):
    code, out, _ = call(capsys, "copy", "--help")
    assert code == 0
    assert out.startswith(VERBS["copy"])
    assert "overwrite=true|false [false]  replace FILE" in out


# Errors -------------------------------------------------------------------------------------------------------------


def test_an_unknown_verb_is_answered_with_the_nearest(capsys):
    code, out, err = call(capsys, "pretrian")
    assert (code, out) == (2, "")
    assert err.startswith("mmssl: no verb is named 'pretrian' (did you mean pretrain?)")
    assert main(["list"]) == 2  # a verb named like a builtin must not break the next call
    assert main(["copy"]) == 2
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("x"), 2),
        (DataError("x"), 3),
        (NonFiniteError("x"), 4),
        (CheckpointError("x"), 5),
        (StorageError("x"), 6),
        (OSError(28, "No space left on device", "/runs/a"), 6),
        (PermissionError(13, "Permission denied", "/runs/a"), 6),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("x"), 8),
        (FileNotFoundError(2, "No such file or directory", "a"), 8),
        (BrokenPipeError(32, "Broken pipe"), 8),  # not stdout's: a worker died
    ],
)
def test_exit_codes(capsys, raising, error, code):
    raising(error)
    status, _, err = call(capsys, "env")
    assert status == code
    assert err.startswith("mmssl: ")
    assert "Traceback (most" not in err


def test_an_internal_error_leaves_its_traceback_in_a_file(capsys, raising, tmp_path):
    raising(ValueError("hf_" + "a1" * 17))
    code, _, err = call(capsys, "env")
    path = Path(err.rpartition(" is in ")[2].strip().rstrip("."))
    assert code == 8
    assert "internal error: ValueError: REDACTED" in err
    assert "ValueError: REDACTED" in path.read_text()
    path.unlink()
    RunFolder.create(tmp_path)
    assert f"{tmp_path}/traceback-0.txt" in call(capsys, "env")[2]


def test_messages_hold_no_secret(capsys, raising, monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "open sesame")
    raising(RecipeError("the hub refused open sesame"))
    assert call(capsys, "env")[2] == "mmssl: the hub refused REDACTED\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(unbuffered):
    code = "import sys; sys.stdin.read(); from mmssl.cli import main; sys.exit(main(['--help']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": unbuffered},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()  # before the child writes: it waits for its input to end
    process.stdin.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)
    process.stderr.close()


# Options ------------------------------------------------------------------------------------------------------------

OPTIONS = {
    "k": (int, 20, "neighbours"),
    "rate": (float, 0.5, "a rate"),
    "which": (("student", "teacher"), "student", "network"),
    "deep": (bool, False, "look closely"),
    "to": (Path, ..., "where to write"),
    "name": (str, None, "a name"),
}


def test_words_get_their_types():
    found = parse(["runs/lr=1e-3", "k=3", "rate=1e-3", "deep=True", "to=a/b", "which=teacher"], ("RUN", "[FILE]"), OPTIONS)
    assert found == {
        **{"run": "runs/lr=1e-3", "file": None, "k": 3, "rate": 1e-3},
        **{"which": "teacher", "deep": True, "to": Path("a/b"), "name": None},
    }
    assert parse(["--deep", "--to=x", "name=a=b"], (), OPTIONS)["deep"] is True
    assert parse(["name=a=b", "to=x"], (), OPTIONS)["name"] == "a=b"


def test_overrides_are_passed_on():
    found = parse(["r", "optim.lr=1", "deep=true"], ("[RECIPE]",), {"deep": OPTIONS["deep"]}, overrides=True)
    assert found == {"recipe": "r", "deep": True, "overrides": ["optim.lr=1"]}


def test_all_errors_are_reported_at_once():
    with pytest.raises(RecipeError) as error:
        parse(["k=many", "wich=student", "deep=yes", "which=techer", "rate=", "k=1", "extra"], (), OPTIONS)
    assert str(error.value).splitlines() == [
        "the command line has 8 errors:",
        "  k: found 'many', expected a whole number",
        "  wich: unknown option (did you mean which?); allowed are k, rate, which, deep, to, name",
        "  deep: found 'yes', expected true or false",
        "  which: found 'techer', expected one of student, teacher (did you mean teacher?)",
        "  rate: found '', expected a number",
        "  k: given twice",
        "  'extra': not expected; options are written key=value",
        "  to: missing; where to write",
    ]


def test_a_missing_word_is_named():
    with pytest.raises(RecipeError, match="1 error:\n  RUN: missing"):
        parse([], ("RUN",))


def test_the_last_word_may_be_several():
    options = {"deep": OPTIONS["deep"]}
    assert parse(["a", "b/x=1", "deep=true", "c"], ("RUN ...",), options)["run"] == ["a", "b/x=1", "c"]
    assert parse(["a", "b"], ("FILE", "RUN ..."), options)["run"] == ["b"]
    with pytest.raises(RecipeError, match=r"RUN \.\.\.: missing"):
        parse(["deep=true"], ("RUN ...",), options)


def test_options_are_described():
    text = describe(OPTIONS)
    for line in ("k=INT [20]  neighbours", "which=student|teacher [student]", "to=PATH (required)", "name=STR  a name"):
        assert line in text
    assert describe({}) == ""


# Verbs --------------------------------------------------------------------------------------------------------------


def test_list_methods(capsys, shipped):
    code, out, _ = call(capsys, "list", "methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows.keys() == METHODS.keys()
    for name, row in rows.items():
        assert row.keys() == {"name", "modalities", "family", "paper", "recipes", "coverage"}
        assert row["modalities"] == [*METHODS[name].modalities]
        assert row["family"] == METHODS[name].family
        assert row["paper"] == METHODS[name].paper
        assert all(isinstance(number, int) for number in row["coverage"])
    assert rows[next(iter(METHODS))]["recipes"] == ["vision/a", "vision/b"]
    assert next(iter(METHODS)) in call(capsys, "list", "methods")[1]


def test_list_recipes_and_models(capsys, shipped):
    rows = json.loads(call(capsys, "list", "recipes", "json=true")[1])
    assert rows[2] == {"name": "vision/c", "modality": "vision", "method": "other", "steps": 10}
    assert len(rows) == 3
    (shipped / "finetune").mkdir()
    (shipped / "finetune/d.yaml").write_text("task: ctc\ntrain: {epochs: 1}\n")
    assert json.loads(call(capsys, "list", "recipes", "json=true")[1])[3:] == [{"name": "finetune/d", "task": "ctc"}]
    assert call(capsys, "list", "recipes")[1].splitlines()[-1].split() == ["finetune/d", "ctc"]
    rows = json.loads(call(capsys, "list", "models", "--json")[1])
    assert [(row["model"]["hidden_size"], row["recipes"]) for row in rows] == [
        (96, ["vision/a", "vision/b"]),
        (192, ["vision/c"]),
    ]
    assert "hidden_size=96 depth=4" in call(capsys, "list", "models")[1]


def test_list_of_all_that_is_really_shipped(capsys):
    for what in ("methods", "models", "recipes", "modalities"):
        code, out, err = call(capsys, "list", what, "--json")
        assert (code, err) == (0, "")
        assert isinstance(json.loads(out), list)


def test_list_of_something_else(capsys):
    code, _, err = call(capsys, "list", "method")
    assert code == 2
    assert "did you mean methods?" in err


def test_copy(capsys, shipped, tmp_path):
    target = tmp_path / "new/mine.yaml"
    assert call(capsys, "copy", "vision/a", str(target))[0] == 0
    assert target.read_text() == (shipped / "vision/a.yaml").read_text()
    code, _, err = call(capsys, "copy", "vision/c", str(target))
    assert code == 2
    assert "overwrite=true" in err
    assert call(capsys, "copy", "vision/c", str(target), "overwrite=true")[0] == 0
    assert "192" in target.read_text()
    assert call(capsys, "copy", "vision/c", str(tmp_path))[0] == 0
    assert (tmp_path / "c.yaml").exists()
    assert call(capsys, "copy", "vision/d", str(target))[0] == 2


def test_env(capsys, monkeypatch):
    monkeypatch.setenv("SOME_VARIABLE", "some value")
    code, out, _ = call(capsys, "env", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert "cpu" in facts["devices"]
    assert {"compiler", "backends", "gpus", "python"} <= facts.keys()
    assert "some value" not in out
    assert "torch" in call(capsys, "env")[1]


def test_status_of_each_kind_of_run(capsys, tmp_path):
    def status(*arguments):
        code, out, _ = call(capsys, "status", str(tmp_path), *arguments)
        return code, out

    folder = RunFolder.create(tmp_path)
    assert status()[0] == 3  # this very process
    dead = {"pid": 2**22 + 1, "born": 0}
    folder.status("running", step=4, steps=10, **dead)
    assert status()[0] == 1  # killed before its first checkpoint
    path = save(folder.checkpoints, 3, {"model": {"w": torch.ones(2)}}, {}, keep=1)
    folder.log_metrics({"step": 4, "loss": 0.5})
    code, out = status()
    assert code == 75
    assert "killed, resumable" in out
    assert f"mmssl resume {tmp_path}" in out
    assert "4 of 10" in out
    assert "loss 0.5" in out
    folder.status("preempted", step=4)
    assert status()[0] == 75
    folder.status("failed", error="the disk is full")
    code, out = status("--json")
    facts = json.loads(out)
    assert code == 1
    assert (facts["state"], facts["step"], facts["steps"], facts["checkpoint"]) == ("failed", 4, 10, 3)
    assert facts["metrics"] == {"step": 4, "loss": 0.5}
    assert facts["error"] == "the disk is full"
    assert facts["seconds_since_write"] < 60
    folder.status("finished", step=10)
    assert status()[0] == 0
    folder.status("preempted")
    (path / "manifest.json").unlink()
    assert status()[0] == 1


def test_verdicts():
    assert [judge("running", True, has) for has in (True, False)] == ["running", "running"]
    assert [judge("preempted", False, has) for has in (True, False)] == ["resumable", "failed"]
    assert judge("failed", False, True) == "failed"


def test_status_of_nothing(capsys, tmp_path):
    code, _, err = call(capsys, "status", str(tmp_path))
    assert code == 2
    assert "no run" in err
    assert call(capsys, "status", str(tmp_path), "jsn=true")[0] == 2
