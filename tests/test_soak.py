"""A short fault campaign; the whole one is `make soak`."""

import subprocess
import sys

import pytest

from tools.soak import __main__ as soak
from tools.soak import engines
from tools.soak.runs import Row


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["only=kills", "kills=3", "settings=2"], "kills: folder, 2 workers: 3 kills"),  # T14 and T15
        (["only=disk", "disk=2"], "disk: 2 saves"),
    ],
)
def test_nothing_is_lost(words, told):
    said = soaked(*words)
    assert said.startswith(told)
    assert "identical to the bit" in said


@pytest.mark.distributed
def test_t16_one_of_two_ranks_killed():
    """A rank that is killed, in a save as well: the other ends soon and names it, the last checkpoint is whole."""
    assert soaked("only=ranks", "ranks=2", "under=ddp").startswith("ranks: ddp: one of two ranks killed 2 times")


def soaked(*words: str) -> str:
    words = (sys.executable, "-m", "tools.soak", *words, "write=false")
    done = subprocess.run(words, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.distributed
def test_t03_two_ranks_say_what_one_process_says():
    """A part of the campaign, which has seven methods under four engines; see also tests/training/test_run.py."""
    said = soaked("only=engines", "engines=zero1", "methods=dino,wav2vec2", "precision=fp32")
    assert said.startswith("engine: zero1: 2 ranks against one process: dino, wav2vec2")


@pytest.mark.distributed
def test_t03_under_autocast_zero3_rounds_as_ddp_does():
    said = soaked("only=engines", "engines=ddp,zero3", "methods=data2vec2", "precision=bf16").splitlines()
    assert [line.partition(": 2 ranks")[0] for line in said[:3]] == [
        "engine: ddp, bf16",
        "engine: zero3, bf16",
        "engine: zero3 and ddp, bf16",
    ]


@pytest.mark.distributed
def test_t08_images_and_speech_on_one_trunk_are_learned_alike_under_each_stage():
    """Each rank goes through all kinds of data in every micro-batch."""
    said = soaked("only=engines", "engines=zero1,zero2,zero3", "methods=images and speech", "precision=fp32").splitlines()
    for stage, line in zip((1, 2, 3), said):
        assert line.startswith(f"engine: zero{stage}: 2 ranks against one process: images and speech")


@pytest.mark.distributed
def test_what_is_computed_twice_under_an_engine_is_what_one_process_keeps():
    said = soaked("only=engines", "engines=ddp,zero3", "methods=dino in parts,mae recomputed", "precision=fp32").splitlines()
    for engine, line in zip(("ddp", "zero3"), said):
        assert line.startswith(f"engine: {engine}: 2 ranks against one process: dino in parts, mae recomputed")


def test_differences_between_engines_are_told():
    alike, apart = engines.Found(1e-7, 1e-7, 1e-7, 0.1), engines.Found(2e-5, 1e-7, 2e-6, 1e-4)
    (row,) = engines.rows({"zero2": {"mae": alike, "dino": apart}})
    assert row.wrong == ("dino: losses differ by 2e-05", "dino: weights differ by 2e-06", "dino: weights went 0.0001 only")
    rounded = apart._replace(moved=0.1, limits=engines.ROUNDED)
    far = rounded._replace(outputs=3e-3)
    one, other = engines.rows({"zero2, bf16": {"dino": rounded}, "zero2 and ddp, bf16": {"dino": far}})
    assert one.tried.startswith("2 ranks against one process")
    assert not one.wrong
    assert other.tried.startswith("2 ranks and 2 ranks")
    assert other.wrong == ("dino: outputs differ by 0.003",)


def test_results_are_kept_where_no_newer_one_is(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr(soak, "DOCS", page)
    page.write_text(f"before\n{soak.BEGIN}\n{soak.END}\nafter\n")
    soak.keep([Row("a", "1 time", "good"), Row("b", "2 times", "good")], "command 1")
    soak.keep([Row("b", "3 times", "good", ("something was lost",))], "command 2")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "| a | 1 time | good | `command 1`" in text
    assert "| b | 3 times | **1 wrong** | `command 2`" in text
    assert "2 times" not in text
    assert text.count("| fault |") == 1


def test_an_unknown_word_is_answered_with_the_known_ones():
    done = subprocess.run([sys.executable, "-m", "tools.soak", "kils=3"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "kils" in done.stderr
    assert "kills=100" in done.stderr
