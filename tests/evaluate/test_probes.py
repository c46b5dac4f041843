"""Probes beyond k-NN and logistic regression: of tokens, of few labels, of layers, of several data sets."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from sklearn.neighbors import NearestCentroid
from torch.testing import assert_close
from transformers import ViTConfig, ViTModel

from mmssl.cli import main
from mmssl.config import Recipe
from mmssl.errors import RecipeError
from mmssl.evaluate.attentive import Attentive, AttentivePool, attentive_accuracy
from mmssl.evaluate.features import _as_long, rank_in_class
from mmssl.evaluate.fewshot import FewShot, few_shot
from mmssl.evaluate.layers import layer_scores, projector_of
from mmssl.evaluate.linear import linear_accuracy
from mmssl.evaluate.probe import probe, runner
from mmssl.evaluate.protocols import choose, measure
from mmssl.model.configuration import MmsslConfig
from mmssl.model.heads import mlp
from mmssl.model.modeling import MmsslModel
from mmssl.random import generator
from mmssl.training.pretrain import pretrain
from mmssl.types import Batch, View


@pytest.fixture
def vit(tmp_path):
    """A saved model of two blocks with a class token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"hidden_size": 8, "depth": 2, "heads": 2, "image_size": 8, "patch_size": 4}
        MmsslModel(MmsslConfig(**shape, extra_tokens=1)).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


def test_few_shots_are_nearest_centroids_of_keyed_draws():
    x = torch.randn(50, 6, generator=generator(1), dtype=torch.float64)
    y = torch.arange(50) % 3 + 2  # classes need not begin at 0
    x[torch.arange(50), y] += 2
    p, scores = FewShot(4, draws=5), []
    unit = x / x.norm(dim=1, keepdim=True)
    for draw in range(5):
        chosen = rank_in_class(y[:30], 7, "few-shot", draw) < 4
        assert chosen.sum() == 12
        model = NearestCentroid().fit(unit[:30][chosen], y[:30][chosen])
        scores.append(model.score(unit[30:], y[30:]))
    found = few_shot(p, x[:30], y[:30], x[30:], y[30:], seed=7)
    low, high = stats.t.interval(0.95, 4, loc=sum(scores) / 5, scale=stats.sem(scores))
    assert found == pytest.approx((sum(scores) / 5, low, high))
    assert len({*scores}) > 1
    with pytest.raises(RecipeError, match=r"few-11 takes 11 labelled samples of each class, class number 2 has 10"):
        few_shot(FewShot(11), x[:30], y[:30], x[30:], y[30:])


def test_the_query_gathers_what_the_formula_says():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pool = AttentivePool(6, 2).double()
    x, valid = torch.randn(2, 4, 6, generator=generator(2), dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool)
    valid[1, 3] = False
    k, v, wanted = pool.key(x).detach(), pool.value(x).detach(), torch.zeros(2, 6, dtype=torch.float64)
    for row in range(2):
        for part in (slice(0, 3), slice(3, 6)):
            seen = [i for i in range(4) if valid[row, i]]
            weights = [math.exp(float(pool.query.detach()[part].double() @ k[row, i, part]) / 3**0.5) for i in seen]
            wanted[row, part] = sum(w * v[row, i, part] for w, i in zip(weights, seen)) / sum(weights)
    assert_close(pool(x, valid), pool.out(wanted))


def test_attention_finds_the_token_that_a_mean_drowns():
    draw = generator(3)
    tokens, labels = torch.randn(300, 9, 4, generator=draw), torch.arange(300) % 2
    where = torch.randint(8, (300,), generator=draw)  # the ninth is padding
    rows = torch.arange(300)
    tokens[rows, where, 0] = 6.0  # its mark
    tokens[rows, where, 1] = 2.0 * labels - 1
    valid = torch.arange(9).expand(300, 9) < 8
    tokens[:, 8] = 1e4
    bank, test = ({"tokens": tokens[s], "attend": valid[s], "label": labels[s], "embedding": tokens[s, :8].mean(1)}
                  for s in (slice(200), slice(200, 300)))  # fmt: skip
    p = Attentive(lr=1e-2, batch=50, epochs=40)
    found = attentive_accuracy(p, bank, test, 2)
    assert found > 0.9
    assert linear_accuracy(bank["embedding"], bank["label"], test["embedding"], test["label"]) < 0.8
    assert attentive_accuracy(p, bank, test, 2) == found
    both = measure(choose("attentive,few-1", epochs=1, lr=0.1), bank, test, 2)
    assert both["attentive"]["overridden"] == {"lr": 1e-3, "epochs": 90}
    assert "overridden" not in both["few-1"]
    with pytest.raises(RecipeError, match="epochs: none of few-5 trains with it"):
        choose("few-5", epochs=3)


def test_batches_of_other_length_are_filled_up_with_zeros():
    parts = _as_long([torch.ones(2, 3, 5), torch.ones(1, 4, 5)])
    assert torch.cat(parts).shape == (3, 4, 5)
    assert parts[0][:, 3].sum() == 0
    assert parts[0].sum() == 30


@pytest.mark.parametrize("foreign", [False, True])
def test_layers_are_the_means_of_content_after_each_block(vit, foreign):
    x = torch.randn(3, 3, 8, 8, generator=generator(4))
    model = MmsslModel.from_pretrained(vit)
    blocks = model.encoder.transformer.blocks
    if foreign:
        options = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        model = ViTModel(ViTConfig(image_size=8, patch_size=4, **options))
        blocks = model.encoder.layer if hasattr(model, "encoder") else model.layers
    outputs = []
    for block in blocks:
        block.register_forward_hook(lambda _, __, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        found = runner(model, layers=True, tokens=True)(Batch([View(x, "vision")], torch.arange(3)).tensors())
    assert [name for name in found if name.startswith("layer.")] == ["layer.1", "layer.2"]
    for number, output in enumerate(outputs, 1):
        assert_close(found[f"layer.{number}"], output[:, 1:].mean(1))
    assert found["tokens"].shape == (3, 4, 8)
    assert bool(found["attend"].all())


def test_every_block_and_the_projector_of_a_run_are_probed(image_folder, tmp_path, capsys):
    (tmp_path / "simclr.yaml").write_text(
        f"data: {{path: {image_folder}, modality: vision, workers: 0}}\n"
        "model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 2, heads: 2}\n"
        "method: {name: simclr, hidden: 12, dim: 4}\n"
        "train: {steps: 1, global_batch: 8, device: cpu}\n"
        "watch: {samples: 20, change: false}\n"
    )
    run = pretrain(Recipe.load(tmp_path / "simclr.yaml", f"out={tmp_path / 'run'}"))
    words = [
        "probe",
        str(run),
        f"data={image_folder}",
        "layers=true",
        "random=true",
        "neighbours=3",
        "protocol=attentive,few-1",
    ]
    assert main([*words, "epochs=2", "json=true"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [*found["model"]["layers"]] == ["1", "2", "projector.1", "projector", "all"]
    assert [*found["random"]["layers"]] == ["1", "2", "all"]
    project, h = projector_of(run / "model"), torch.randn(3, 16, generator=generator(5))
    saved = load_file(run / "heads" / "heads.safetensors")
    head = mlp(16, 12, 4, bias=False, last_norm="scale").eval()
    head.load_state_dict({n.removeprefix("student.projector."): t for n, t in saved.items() if "student.projector." in n})
    assert_close(project(h), {"projector.1": head[:3](h), "projector": head(h)})
    scores = [score for layer in found["model"]["layers"].values() for score in layer.values()]
    assert all(0 <= score <= 1 for score in scores)
    assert found["model"]["protocols"]["few-1"]["low"] <= found["model"]["protocols"]["few-1"]["accuracy"]
    assert main([*words, "epochs=2"]) == 0
    out = capsys.readouterr().out
    assert "projector" in out
    assert "shots 1, draws 100; 95 % " in out


def test_all_layers_side_by_side_tell_what_none_tells_alone():
    """One block knows the parity of a class, the other whether it is large; the projector takes no part."""
    labels = torch.arange(80) % 4
    rows = {"layer.1": (labels % 2)[:, None], "layer.2": (labels // 2)[:, None], "layer.projector": labels[:, None] * 0}
    noise = torch.randn(80, 1, generator=generator(3)) / 100
    bank = {"label": labels} | {name: torch.cat([x - 0.5 + noise, noise], 1) for name, x in rows.items()}
    scores = layer_scores(bank, bank, 5)
    assert scores["all"]["linear"] == 1
    assert max(scores[name]["linear"] for name in ("1", "2", "projector")) < 0.7


def test_several_data_sets_make_one_table(vit, image_folder, tmp_path, capsys):
    other = tmp_path / "other"
    other.symlink_to(image_folder)
    words = ["probe", vit, f"data={image_folder}", f"data={other}", "neighbours=3"]
    assert main([*words, "json=true"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [*found] == [str(image_folder), str(other)]
    assert found[str(other)] == found[str(image_folder)] == probe(vit, str(other), neighbours=3)
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4].split() == ["raw", "k-NN", "model", "k-NN", "model", "linear"]
    scores = [found[str(other)][network][key] for network, key in (("raw", "knn"), ("model", "knn"), ("model", "linear"))]
    assert lines[-1].split() == ["mean", *(f"{score:.1%}" for score in scores)]
    assert main([*words[:3], words[2]]) == 2
    assert "given twice" in capsys.readouterr().err


def test_data_that_cannot_tell_are_refused(vit, image_folder, tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.txt").write_text("some words")
    with pytest.raises(RecipeError, match=r"nothing usable for data\.modality=vision"):
        probe(vit, str(tmp_path / "words"))
    with pytest.raises(RecipeError, match="has no labels"):
        probe(vit, str(image_folder / "train" / "dark"))
    with pytest.raises(RecipeError, match="few-10 takes 10 labelled samples"):
        probe(vit, str(image_folder), protocol="few-10", labels=5)
