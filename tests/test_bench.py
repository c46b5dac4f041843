"""The benchmarks run; their figures stand in docs/benchmarks.md."""

import json
import subprocess
import sys

import pytest
import torch

from tools.bench import feed, finish, joint, losses, masks, parts, reach, save, scale, step, views
from tools.bench.aside import Aside
from tools.bench.turns import by_turns


def test_the_benchmark_of_masks_counts_teacher_passes_and_tokens():
    found = masks.run(recipe="vision/data2vec2-demo", masks="3", batch="2", pairs="2")
    assert found["spread"][0] <= found["time_ratio"] <= found["spread"][1]
    kept = 16 + 1  # a quarter of 64 patches, and cls
    assert found["tokens_ratio"] == round((65 + 9 * kept) / (65 + 3 * kept), 3)
    assert 0 < found["utilisation"] < 1


def test_against_data2vec1_both_learn_from_as_many_masked_views():
    found = masks.run(recipe="vision/data2vec2-demo", masks="3", batch="2", pairs="1", peer="vision/data2vec1-demo")
    assert found["views_a_step"] == 6
    assert found["views_ratio"] == pytest.approx(1 / found["time_ratio"], abs=0.01)
    assert "vision/data2vec1-demo, batch 6" in found["seconds"]


def test_a_method_without_a_teacher_has_its_own_masks():
    found = masks.run(recipe="vision/data2vec2-demo", masks="3", batch="2", pairs="1", peer="vision/mae-demo")
    assert found["views_a_step"] == 6
    assert "vision/mae-demo, batch 6" in found["seconds"]


def test_memory_of_a_loss_grows_with_its_batch(monkeypatch):
    monkeypatch.setattr(losses, "_fresh", lambda *words: losses._measure(*map(str, words)))
    sizes = {"nt_xent": ((128, 64), (512, 64)), "sinkhorn": ((512, 100), (2048, 100))}
    few = {name: case._replace(sizes=sizes[name]) for name, case in losses.CASES.items() if name in sizes}
    monkeypatch.setattr(losses, "CASES", few)
    found = losses.run(times="1", only="nt_xent,sinkhorn:512")
    assert found["nt_xent, 128 x 64"][1] < found["nt_xent, 512 x 64"][1]
    assert len(found["nt_xent, exponents"]) == 2
    assert "sinkhorn, 512 x 100" in found
    assert "sinkhorn, 2048 x 100" not in found


def test_sound_and_text_make_the_batches_of_transformers_examples(monkeypatch):
    found = feed.run(samples="2", pairs="1")
    assert found["times_real_time"].keys() == {"ours", "theirs"}
    found = feed.run(kind="text", files="20", samples="4", pairs="1")
    assert found["tokens_a_second"]["ours"] > 0
    assert found["masking_ratio"] > 0
    monkeypatch.setattr(feed, "heard_by_transformers", lambda given: (torch.zeros(len(given), 160_000), None))
    with pytest.raises(RuntimeError, match="different waves"):
        feed.run(samples="2", pairs="1")


@pytest.mark.realdata
def test_time_to_an_accuracy_is_measured_for_each_method(real_data, monkeypatch):
    few = {name: (recipe, 2, 1, (*words, "data.limit=128")) for name, (recipe, _, _, words) in reach.SETTINGS.items()}
    monkeypatch.setattr(reach, "SETTINGS", few)
    found = reach.run(data=str(real_data / "cifar10"), wanted="1,99", only="data2vec2-8,dino,simclr", samples="40")
    for name in ("data2vec2-8", "dino", "simclr"):
        (first, _), (second, _) = found[name]["curve"]
        assert found[name]["seconds"] == {"1": first, "99": None}
        assert 0 < first < second


def test_embedding_in_parts_has_the_same_loss_and_takes_less_memory():
    words = {"recipe": "vision/moco_v3-small", "batch": "16", "rows": "2", "pairs": "1"}
    found = parts.run(**words, words="model.depth=1 model.image_size=160 method.hidden=64")
    assert found["loss"]["parts"] == pytest.approx(found["loss"]["whole"], rel=1e-5)
    assert found["memory_ratio"] < 1


def test_what_waits_grows_with_tokens_and_masks_as_it_should(monkeypatch):
    monkeypatch.setattr(scale, "USUAL", {"image": 64, "width": 128, "depth": 2, "batch": 2, "masks": 2})
    monkeypatch.setattr(scale, "VARIED", {"masks": [{"masks": 1}, {"masks": 4}]})
    found = scale.run(times="1", only="masks")
    (_, few, _), (_, many, _) = found["masks 1"], found["masks 4"]
    assert few < many < 4 * few  # the teacher runs once
    assert found["masks, exponents"][1] < 1


def test_crops_changed_on_a_device_are_those_of_a_worker(monkeypatch):
    words = {"crops": "dino", "size": "64", "images": "2", "pairs": "1"}
    assert finish.run(**words)["device_images_a_second"] > 0
    monkeypatch.setattr(finish, "DIFFERENT", 0.0)
    with pytest.raises(RuntimeError, match="different views"):
        finish.run(**words)


def test_the_benchmark_of_saving_writes_both_ways(tmp_path):
    found = save.run(recipe="vision/data2vec2-demo", folder=str(tmp_path), pairs="1")
    assert found["time_ratio"] > 0
    assert found["bytes"] > 1e5
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("method", ["mae", "wav2vec2", "mlm"])
def test_a_step_of_transformers_has_the_same_loss(method):
    decoder = {"mae": " method.decoder.depth=1"}.get(method, "")
    found = step.run(method=method, batch="1", pairs="1", words="model.depth=1" + decoder)
    assert found["loss_difference"] < 1e-5
    assert found["seconds"].keys() == {"ours", "theirs"}
    assert 0 < found["utilisation"] < 1
    assert found["teraflop"] / found["tokens_a_second"] > 0
    assert min(found["mebibytes"].values()) > 10


def test_a_step_that_computes_something_else_is_not_timed(monkeypatch):
    losses = iter([1.0, 1.001])
    monkeypatch.setattr(step.Aside, "__init__", lambda self, *words, **more: None)
    monkeypatch.setattr(step.Aside, "__exit__", lambda self, *of: None)
    monkeypatch.setattr(step.Aside, "ask", lambda self, name: {"loss": next(losses)})
    with pytest.raises(RuntimeError, match="compute different losses"):
        step.run(method="mlm", best="1")


def test_a_side_that_ends_is_told(capfd):
    with Aside("tools.bench.step", "ours", "nothing", *"111111") as side, pytest.raises(RuntimeError, match="ended; see above"):
        side.ask("facts")
    assert "KeyError: 'nothing'" in capfd.readouterr().err


def test_a_peer_that_is_not_installed_is_named_with_the_mend(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightly", None)
    with pytest.raises(SystemExit, match="make bench"):
        joint.run(part="loss", batch="8", dim="4")


def test_views_of_both_sides_are_of_one_kind():
    photos = [views.photo(i) for i in range(4)]
    told = [views.described(way(32), photos, passes=20) for way in (views.ours, views.of_torchvision)]
    assert told[0] == pytest.approx(told[1], abs=0.4)
    assert 0.5 < told[0][1] < 2


def test_turns_alternate_and_leave_out_the_first():
    order = []
    found = by_turns({name: lambda name=name: order.append(name) for name in "ab"}, turns=2, warm=1)
    assert "".join(order) == "baabba"
    assert {name: len(values) for name, values in found.seconds.items()} == {"a": 2, "b": 2}


def test_an_unknown_benchmark_is_answered_with_those_that_exist():
    out = subprocess.run([sys.executable, "-m", "tools.bench", "nothing"], capture_output=True, text=True, check=False)
    assert out.returncode == 1
    assert "masks" in out.stderr
    assert "claim" in out.stderr


def test_json_is_one_object():
    words = ["masks", "--json", "recipe=vision/data2vec2-demo", "masks=2", "batch=1", "pairs=1"]
    out = subprocess.run([sys.executable, "-m", "tools.bench", *words], capture_output=True, text=True, check=True)
    assert {"time_ratio", "spread", "peer_version"} <= set(json.loads(out.stdout))
