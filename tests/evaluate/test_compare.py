import json
import shutil

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mmssl.cli import main
from mmssl.errors import RecipeError
from mmssl.evaluate.compare import compare, same_samples, sentence
from mmssl.evaluate.intervals import interval, paired, resampled
from mmssl.evaluate.linear import linear_right
from mmssl.evaluate.probe import probe
from mmssl.hub.export import load_encoder
from mmssl.model.configuration import MmsslConfig
from mmssl.model.modeling import MmsslModel
from mmssl.random import generator


def saved(path, seed=0, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = {"hidden_size": 8, "depth": 2, "heads": 2, "image_size": 8, "patch_size": 4}
        MmsslModel(MmsslConfig(**(shape | config))).save_pretrained(path)
    return str(path)


def test_the_interval_of_a_mean_is_that_of_numpy_on_the_same_draws():
    right = torch.rand(1, 40, generator=generator(3)) < 0.7
    places = torch.randint(40, (100, 40), generator=generator(5, "bootstrap")).numpy()
    means = right[0].numpy().astype(np.float64)[places].mean(1)
    found = interval(right.double().mean(), resampled(right, 5, 100)[0])
    assert found == pytest.approx((float(right.double().mean()), *np.percentile(means, [2.5, 97.5])))
    assert torch.equal(resampled(right, 5), resampled(right, 5))
    assert not torch.equal(resampled(right, 5), resampled(right, 6))


def test_the_interval_of_a_difference_is_narrower_than_those_of_its_parts_say():
    """Of pairs: two models that are right about the same samples differ for sure by the few in which they do."""
    first = torch.arange(400) % 2 == 0
    second = first | (torch.arange(400) < 20)
    found = paired(first, second, seed=1)
    assert found.value == pytest.approx(10 / 400)
    deviation = (0.025 * (1 - 0.025) / 400) ** 0.5  # of a mean of 400 zeros and ones
    assert found.low == pytest.approx(0.025 - 1.96 * deviation, abs=0.003)
    assert found.high == pytest.approx(0.025 + 1.96 * deviation, abs=0.003)
    alone = interval(second.double().mean(), resampled(second[None], 1)[0])
    assert alone.high - alone.low > 3 * (found.high - found.low)
    assert paired(second, first, seed=1) == pytest.approx((-found.value, -found.high, -found.low))
    assert paired(first, first) == (0, 0, 0)


def test_the_linear_probe_is_right_where_scikit_learn_is():
    x, y = torch.randn(60, 5, generator=generator(1), dtype=torch.float64), torch.arange(60) % 3
    scaler = StandardScaler().fit(x[:40])
    fitted = LogisticRegression(max_iter=300).fit(scaler.transform(x[:40]), y[:40])
    assert (
        linear_right(x[:40], y[:40], x[40:], y[40:]).numpy().tolist()
        == (fitted.predict(scaler.transform(x[40:])) == y[40:].numpy()).tolist()
    )


def test_samples_that_one_model_cannot_take_are_left_out_for_all():
    def rows(*index):
        return {"index": torch.tensor(index), "label": torch.tensor(index) % 2, "embedding": torch.tensor(index)[:, None]}

    found = same_samples({"a": (rows(1, 2, 3), rows(7, 9)), "b": (rows(0, 2, 3), rows(7, 8, 9))})
    for name in "ab":
        bank, test = found[name]
        assert bank["index"].tolist() == bank["embedding"].flatten().tolist() == [2, 3]
        assert test["index"].tolist() == [7, 9]
    assert same_samples({"a": (rows(1), None), "b": (rows(1), None)})["a"][1] is None


@pytest.mark.parametrize(
    ("linear", "knn", "said"),
    [
        ((2.3, 0.4, 4.1), (-0.5, -2, 1.1), "B is better than A by 2.3 points linear (95 %: 0.4 to 4.1); k-NN leaves it"),
        ((-2.3, -4.1, -0.4), (3, 1, 5), "A is better than B by 2.3 points linear (95 %: 0.4 to 4.1); B is better than A by 3"),
        ((2.3, 0.4, 4.1), (3, 1, 5), "B is better than A by 2.3 points linear (95 %: 0.4 to 4.1) and by 3.0 points k-NN (95 "),
        ((0.3, -1, 1.6), (0, 0, 0), "Whether B is better than A is open; linear leaves it open (+0.3, 95 %: -1.0 to +1.6); k"),
    ],
)  # fmt: skip
def test_the_verdict_says_what_the_intervals_say(linear, knn, said):
    parts = {"linear": linear, "knn": knn}
    pair = {n: dict(zip(("value", "low", "high"), (v / 100 for v in values))) for n, values in parts.items()}
    assert sentence({"first": "A", "second": "B"} | pair).startswith(said)


def test_models_of_different_width_are_compared(image_folder, tmp_path, capsys):
    a, _ = saved(tmp_path / "a"), saved(tmp_path / "run" / "model", 1, hidden_size=12, image_size=16)
    words = ["compare", a, str(tmp_path / "run"), f"data={image_folder}", "neighbours=5"]
    assert main([*words, "json=true"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    run = str(tmp_path / "run")
    assert [*found["models"]] == [a, run]
    assert [one["width"] for one in found["models"].values()] == [8, 12]
    assert found["models"][a]["parameters"] == sum(p.numel() for p in load_encoder(a).parameters())
    assert found["samples"] == {"train": 32, "test": 24}
    (pair,) = found["pairs"]
    for measure in ("knn", "linear"):
        values = [found["models"][name][measure]["value"] for name in (a, run)]
        assert pair[measure]["value"] == pytest.approx(values[1] - values[0])
        assert pair[measure]["low"] <= pair[measure]["value"] <= pair[measure]["high"]
    assert found["cka"][a][a] == pytest.approx(1)
    assert found["cka"][a][run] == pytest.approx(found["cka"][run][a])
    assert 0 < found["cka"][a][run] < 1
    assert found["verdict"] == [sentence(pair)]
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == found["verdict"][0]
    assert compare([a, run], str(image_folder), neighbours=5) == found


def test_protocols_take_the_place_of_the_linear_probe(image_folder, tmp_path, capsys):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", 1, hidden_size=12)
    words = ["compare", a, b, f"data={image_folder}", "neighbours=5", "protocol=few-1,moco,grid", "epochs=2", "metrics=false"]
    assert main([*words, "json=true"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for name in (a, b):
        alone = probe(name, str(image_folder), protocol="few-1,moco,grid", epochs=2, neighbours=5)["model"]
        told = {one: found["models"][name][one]["value"] for one in ("few-1", "moco", "grid", "knn")}
        assert told == pytest.approx({one: p["accuracy"] for one, p in alone["protocols"].items()} | {"knn": alone["knn"]})
    assert {*found["pairs"][0]} == {"first", "second", "few-1", "moco", "grid", "knn"}
    assert main(words) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[4:8]] == ["k-NN", "few-1", "moco", "grid"]
    assert "linear" not in out
    for options, said in (({"protocol": "dense"}, "dense stands alone"), ({"epochs": 2}, "belong to a protocol")):
        with pytest.raises(RecipeError, match=said):
            compare([a, b], str(image_folder), **options)
    with pytest.raises(RecipeError, match="has no labels"):
        compare([a, b], str(image_folder / "train" / "dark"), protocol="moco")


def test_a_model_beside_itself_differs_by_nothing(image_folder, tmp_path):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b")
    found = compare([a, b], str(image_folder), metrics=False)
    assert found["pairs"][0]["linear"] == found["pairs"][0]["knn"] == {"value": 0, "low": 0, "high": 0}
    assert "metrics" not in found["models"][a]
    assert "is open" in found["verdict"][0]


def test_without_labels_there_are_metrics_and_likeness(image_folder, tmp_path, capsys):
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", 1)
    flat = image_folder / "train" / "dark"
    found = compare([a, b], str(flat))
    assert found["pairs"] == []
    assert found["verdict"] == ["There are no labels to judge by."]
    assert "knn" not in found["models"][a]
    assert found["models"][a]["metrics"]["rankme"] > 1
    assert main(["compare", a, b, f"data={flat}"]) == 0
    assert "k-NN" not in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused_by_name(image_folder, tmp_path, capsys):
    a = saved(tmp_path / "a")
    speech = saved(tmp_path / "s", modality="speech", conv_channels=8, position_groups=4, extra_tokens=0, image_size=1)
    with pytest.raises(RecipeError, match=rf"{speech} takes speech, {a} takes vision"):
        compare([a, speech], str(image_folder))
    for models in ([a], [a, a]):
        with pytest.raises(RecipeError, match="two models or more, each once"):
            compare(models, str(image_folder))
    assert main(["compare", f"data={image_folder}"]) == 2
    assert "MODEL ...: missing" in capsys.readouterr().err
    lost = saved(tmp_path / "lost", 0)
    network = MmsslModel.from_pretrained(lost)
    network.encoder.transformer.blocks[-1].mlp.fc2.weight.data.fill_(float("nan"))
    network.save_pretrained(lost)
    with pytest.raises(RecipeError, match=rf"{lost}: its embeddings .* are not finite"):
        compare([a, lost], str(image_folder))


def test_training_samples_of_one_class_are_refused(tmp_path, image_folder):
    for place in ("train/dark", "test/dark", "test/light"):
        shutil.copytree(image_folder / place, tmp_path / "data" / place)
    models = [saved(tmp_path / "a"), saved(tmp_path / "b", 1)]
    with pytest.raises(RecipeError, match="are of one class"):
        compare(models, str(tmp_path / "data"))
