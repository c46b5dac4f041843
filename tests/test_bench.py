"""The benchmarks run; their figures stand in docs/benchmarks.md."""

import json
import subprocess
import sys

from tools.bench import masks, save


def test_the_benchmark_of_masks_counts_teacher_passes_and_tokens():
    found = masks.run(recipe="vision/data2vec2-demo", masks="3", batch="2", pairs="2")
    assert found["spread"][0] <= found["time_ratio"] <= found["spread"][1]
    kept = 16 + 1  # a quarter of 64 patches, and cls
    assert found["tokens_ratio"] == round((65 + 9 * kept) / (65 + 3 * kept), 3)


def test_the_benchmark_of_saving_writes_both_ways(tmp_path):
    found = save.run(recipe="vision/data2vec2-demo", folder=str(tmp_path), pairs="1")
    assert found["time_ratio"] > 0
    assert found["bytes"] > 1e5
    assert not [*tmp_path.iterdir()]


def test_an_unknown_benchmark_is_answered_with_those_that_exist():
    out = subprocess.run([sys.executable, "-m", "tools.bench", "nothing"], capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert "masks" in out.stderr
    assert "claim" in out.stderr


def test_json_is_one_object():
    words = ["masks", "--json", "recipe=vision/data2vec2-demo", "masks=2", "batch=1", "pairs=1"]
    out = subprocess.run([sys.executable, "-m", "tools.bench", *words], capture_output=True, text=True, check=True)
    assert {"time_ratio", "spread", "peer_version"} <= set(json.loads(out.stdout))
