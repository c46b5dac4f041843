"""The table of figures: what belongs to it, and what its runs cost."""

import json
import subprocess
import sys

import pytest

from mmssl.config import Recipe
from mmssl.methods import METHODS
from tools.results import RESULTS, counted, longer, masked, processor_seconds, row


def test_every_method_is_measured():
    measured = {result.recipe.split("/")[1].rsplit("-", 2)[0] for result in (RESULTS | masked()).values()}
    assert measured == {name for name, method in METHODS.items() if method.alone}
    assert {name.split("-")[0] for name in masked()} == {"vision", "speech", "spectrogram", "text"}
    assert not {*masked()} & {*RESULTS}
    assert {name.split("-")[1] for name in longer()} == {"vision", "spectrogram", "text"}
    for name, result in longer().items():
        assert Recipe.load(result.recipe, "data=x", "out=y", *result.words).train.steps > 1000, name


def test_costs_of_a_resumed_run_add_up(tmp_path):
    cost = tmp_path / "cost.json"
    cost.write_text('{"cpu_seconds": 100.0}')
    command = "import sys, time\nwhile time.process_time() < 0.5: pass\nsys.exit(1)"
    with pytest.raises(subprocess.CalledProcessError), counted(tmp_path):
        subprocess.run([sys.executable, "-c", command], check=True)  # children count, and so does what fails
    assert 100.5 <= json.loads(cost.read_text())["cpu_seconds"] <= 100.1 + processor_seconds()
    with counted(tmp_path / "missing"):
        pass
    assert not (tmp_path / "missing").exists()


def test_the_table_has_a_line_for_each_network(tmp_path):
    (tmp_path / "probe.json").write_text('{"random": {"knn": 0.25}, "model": {"knn": 0.5, "linear": 0.75, "left_out": 0.5}}')
    (tmp_path / "cost.json").write_text('{"cpu_seconds": 61.4}')
    assert [*row("text-mlm", tmp_path)] == [
        "| text-mlm | random | 25.0 |  |  |  |  |",
        "| text-mlm | model | 50.0 | 75.0 | 50.0 |  | 61 |",
    ]


def test_an_unknown_name_is_told(monkeypatch):
    from tools import results

    monkeypatch.setattr(sys, "argv", ["results", "only=masked,vision-mai"])
    with pytest.raises(SystemExit, match="only: found vision-mai, expected methods, masked, longer, finetune, cifar10"):
        results.main()
