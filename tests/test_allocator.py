"""What is freed stays with the process, in a program of its own."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mmssl import allocator
from mmssl.config import Recipe
from mmssl.training import pretrain

# A block above every threshold of glibc is taken, written to and freed, again and again; each page counts that the kernel gave.
PROGRAM = """
import resource, sys
from mmssl.allocator import keep_freed_memory
print(sys.argv[1] == "keep" and keep_freed_memory())
import torch
def given(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for i in range(20): torch.ones(2**23 + i % 3 * 1000)
before = given()
for i in range(20): torch.ones(2**23 + i % 3 * 1000)
print(given() - before)
"""


def faults(word: str, **more: str) -> tuple[str, int]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | more
    out = subprocess.run([sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, check=True, env=environment)
    kept, count = out.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_blocks_that_are_freed_are_used_again():
    kept, few = faults("keep")
    assert kept == "True"
    kept, many = faults("not")
    assert kept == "False"
    assert many > 20 * 2**25 // 2**21 > few  # a fault for each huge page, far more where the kernel has none


def test_settings_of_the_environment_stand():
    assert faults("keep", MALLOC_ARENA_MAX="4")[0] == "False"
    assert faults("keep", GLIBC_TUNABLES="glibc.malloc.arena_max=4")[0] == "False"


@pytest.mark.parametrize("library", [object(), OSError("none"), TypeError("no name")])
def test_another_library_is_left_alone(library, monkeypatch):
    def load(name: None) -> object:
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(allocator.ctypes, "CDLL", load)
    assert allocator.keep_freed_memory() is False


@pytest.mark.parametrize(("device", "called"), [("cpu", ["keep", "signals"]), ("cuda", ["signals"])])
def test_training_on_a_processor_keeps_what_it_frees(device, called, monkeypatch):
    order = []

    def signals(hear: object) -> None:
        order.append("signals")
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "training_arguments", lambda recipe: SimpleNamespace(device=torch.device(device)))
    monkeypatch.setattr(pretrain, "keep_freed_memory", lambda: order.append("keep"))
    monkeypatch.setattr(pretrain, "Signals", signals)
    with pytest.raises(KeyboardInterrupt):
        pretrain.prepare(Recipe.load("vision/data2vec2-demo"))
    assert order == called
