"""The page about a run: all that it must hold, however its run ended, and nothing that a browser would fetch or run."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from mmssl import report
from mmssl.cli import main
from mmssl.methods import METHODS
from mmssl.methods.normal import NORMAL
from mmssl.report.curves import Axis, chart, pieces, thinned
from mmssl.report.page import comparison, page
from mmssl.report.record import read
from mmssl.training.run_folder import RunFolder

CARD = '# x\n\n```python\nmodel = AutoModel.from_pretrained("PATH")\n```\n'
BAD = "collapsed: all outputs are alike (output_std 1e-05, normal above 0.1)"


class Seen(HTMLParser):
    """Elements of a page, with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture
def run(tmp_path):
    """Function: what differs -> a run folder as a process leaves it."""

    def build(name="run", state="finished", lines=None, config=None, card=CARD):
        folder = RunFolder.create(tmp_path / name, overwrite=True)
        folder.write_identity(
            json.dumps(config or {"optim": {"lr": 0.1}}), ["mmssl", "pretrain", "x", "data=a b"], {"count": 3}
        )
        for line in lines if lines is not None else LINES:
            folder.log_metrics(line)
        folder.status(state, step=30, steps=40, error="DataError: <no> data" if state == "failed" else None)
        (folder.path / "report").mkdir(exist_ok=True)
        for step in (10, 30):
            Image.new("RGB", (20, 10)).save(folder.path / "report" / f"rebuilt-{step:07d}.png")
        folder.quarantine.write_text('{"identity": "a<b>.png", "kind": "truncated", "reason": "ends early"}\n')
        if card:
            folder.model.mkdir(exist_ok=True)
            (folder.model / "README.md").write_text(card)
        return folder.path

    return build


LINES = [
    {"step": 10, "loss": 2.0, "loss/a": 1.5, "loss/b": 0.5, "health/output_std": 0.5, "verdict": "healthy", "lr": 0.1},
    {"step": 10, "probe/test/knn": 0.5},
    {"step": 20, "loss": float("nan"), "lr": 0.1},
    {"step": 30, "loss": 1.0, "loss/a": 0.75, "loss/b": 0.25, "health/output_std": 1e-5, "verdict": BAD, "lr": 0.05},
    {"step": 30, "probe/test/knn": 0.75},
]


def seen(path):
    """The page of a run, which must be whole and stand alone."""
    text = (path / "report" / "index.html").read_text() if path.is_dir() else path.read_text()
    found = Seen(text)
    assert found.open == []
    assert not {tag for tag, _ in found.elements} & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for _, attrs in found.elements:
        assert not [name for name in attrs if name.startswith("on")]
        assert all(attrs[name].startswith("data:image/png;base64,") for name in ("src", "href") if name in attrs)
    assert not re.search(r"url\(|@import|https?://", text)
    assert all(attrs.get("alt") for attrs in found.all("img"))
    assert all(attrs.get("aria-label") for attrs in found.all("svg"))
    assert {"name": "viewport", "content": "width=device-width,initial-scale=1"} in found.all("meta")
    assert "prefers-color-scheme:dark" in text
    return found


def test_a_page_holds_what_a_person_asks_for(run):
    path = run()
    assert report.write(path) == path / "report" / "index.html"
    found = seen(path)
    for text in (
        "finished at step 30 of 40",
        f"Health: {BAD}",
        "from step 10: healthy",
        "Last probes: test/knn 75.0%",
        "steps 20: their loss is missing",
        "a<b>.png",
        "truncated",
        "mmssl pretrain x 'data=a b'",
        f'AutoModel.from_pretrained("{path / "model"}")',
        f"model.init={path}/model",
        "lr: 0.1",
        "count",
    ):
        assert text in found.text, text
    labels = [attrs["aria-label"] for attrs in found.all("svg")]
    assert labels[0] == (
        "loss from 2 at step 10 to 1 at step 30, missing 1 times; a from 1.5 at step 10 to 0.75 at step 30; "
        "b from 0.5 at step 10 to 0.25 at step 30"
    )
    assert "test/knn from 50% at step 10 to 75% at step 30" in labels
    assert [attrs["width"] for attrs in found.all("img")] == ["20", "20"]  # the newest picture, and the first


@pytest.mark.parametrize(("state", "words"), [("failed", "DataError: <no> data"), ("preempted", "mmssl resume")])
def test_runs_that_ended_otherwise_have_a_page(state, words, run):
    path = run(state=state, card="")
    report.write(path)
    found = seen(path)
    assert words in found.text
    assert f"{state} at step 30 of 40" in found.text
    assert "There is no model yet" in found.text


def test_a_killed_run_is_called_so_and_one_without_a_line_has_a_page(run):
    path = run(lines=[])
    status = json.loads((path / "status.json").read_text())
    (path / "status.json").write_text(json.dumps(status | {"state": "running", "pid": 2**22 + 1, "born": 1}))
    (path / "config.yaml").write_text("a: [")
    (path / "data.json").unlink()
    report.write(path)
    assert "killed at step 30" in seen(path).text


def test_members_have_sections_of_their_own(run):
    line = {"step": 1, "loss": 3.0, "loss/a.x": 1.0, "loss/b.x": 2.0, "probe/b.test/knn": 0.5, "health/a.output_std": 0.5}
    line["verdict"] = "healthy"
    path = run(lines=[line], config={"modalities": {"a": {}, "b": {}}})
    Image.new("RGB", (30, 10)).save(path / "report" / "b-rebuilt-0000001.png")
    found = Seen(page(read(path), None))
    heads = re.findall(r"<h2>(.*?)</h2>", page(read(path), None))
    assert heads == ["Curves", "Health", "a", "b", "Data", "Use", "Configuration"]
    labels = [attrs["aria-label"].partition(" at ")[0] for attrs in found.all("svg")]
    assert labels == ["loss from 3", "x from 1", "output_std from 0.5", "x from 2", "test/knn from 50%"]


def test_missing_values_are_gaps_and_never_zero():
    curve = [(1, 1.0), (2, None), (3, 2.0), (4, 3.0)]
    assert pieces(curve) == [[(1, 1.0)], [(3, 2.0), (4, 3.0)]]
    drawn = chart({"loss": curve})
    assert drawn.count('class="line ') == 1
    assert drawn.count('class="missing"') == 1
    assert "<b>3</b>" in drawn
    assert "<b>missing</b>" in chart({"loss": curve[:2]})
    assert "<svg" not in chart({"loss": [(1, None)]})
    many = thinned([(i, None if i == 500 else float(i)) for i in range(3000)])
    assert len(many) <= 300
    assert [value for _, value in many].count(None) == 1


def test_axes_have_round_ticks():
    assert Axis(0.0, 1.0, 0, 100).ticks(4) == [0.0, 0.5, 1.0]
    assert Axis(130, 400, 0, 100).ticks(4) == [200.0, 300.0, 400.0]
    assert Axis(0.001, 100, 0, 100, logarithmic=True).ticks(4) == [0.001, 0.01, 0.1, 1.0, 10.0, 100.0]
    assert Axis(5, 5, 0, 100)(5) == 50


def test_several_runs_share_a_page(run, tmp_path, capsys):
    paths = [run("one"), run("two", state="preempted")]
    assert main(["view", *map(str, paths), f"out={tmp_path / 'both.html'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'both.html'}\n"
    found = seen(tmp_path / "both.html")
    assert "preempted at step 30" in found.text
    label = found.all("svg")[0]["aria-label"]
    assert (
        label
        == "one from 2 at step 10 to 1 at step 30, missing 1 times; two from 2 at step 10 to 1 at step 30, missing 1 times"
    )
    differing = [{"optim": {"lr": 0.1}}, {"optim": {"lr": 0.2}, "train": {"seed": 1}}]
    text = Seen(comparison([read(path) for path in paths], differing)).text
    assert "optim.lr0.10.2" in text
    assert "train.seedas the default1" in text


def test_view_of_one_run_and_what_is_no_run(run, tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    path = run()
    assert main(["view", str(path), "open=true"]) == 0
    assert opened == [(path / "report" / "index.html").as_uri()]
    assert main(["view", str(tmp_path)]) == 2
    assert "no run" in capsys.readouterr().err


def test_an_error_in_the_page_is_a_warning(run, monkeypatch, capsys):
    path = run()

    def fail(*args):
        raise ZeroDivisionError("of pages")

    monkeypatch.setattr(report, "page", fail)
    report.refresh(RunFolder(path, is_main=False), SimpleNamespace())
    assert capsys.readouterr().err == ""
    report.refresh(RunFolder(path), SimpleNamespace(model_dump=lambda **_: {}))
    assert "report/index.html could not be written: ZeroDivisionError: of pages" in capsys.readouterr().err


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="not run: there is no Chromium")
def test_a_browser_finds_nothing_wrong(run, tmp_path):
    path = run()
    report.write(path)
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path}/u",
    ]
    page_url = (path / "report" / "index.html").as_uri()
    done = subprocess.run(
        [*command, "--window-size=360,800", "--dump-dom", page_url],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert "Health" in done.stdout
    assert "CONSOLE" not in done.stderr, done.stderr


def test_the_documents_name_every_metric_that_is_judged():
    told = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    judged = {normal.metric for kind in METHODS.values() for normal in (*NORMAL, *kind.normal)}
    assert not {metric for metric in judged if f"`{metric}`" not in told}
