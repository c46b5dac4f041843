"""Pictures of what an encoder makes of a run's data: drawn from what is true, by kind of data, with captions that say so."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl.cli import main
from mmssl.config import Recipe
from mmssl.evaluate import gallery
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.random import generator
from mmssl.report import figures
from mmssl.training.outcome import illustrated
from mmssl.training.pretrain import pretrain
from mmssl.types import View


def encoder(**options):
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "depth": 2, "heads": 4} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder.from_config(MmsslConfig(modality="vision", **shape)).eval()


def images(count):
    return View(torch.randn(count, 3, 16, 16, generator=generator("images")), "vision")


@pytest.mark.parametrize("options", [{"norm": "pre"}, {"extra_tokens": 0}, {"causal": True, "norm": "pre"}])
def test_attention_is_what_the_last_layer_multiplies_values_with(options):
    """The layer's own output, made again from one-hot values, against weights written out in loops."""
    model, view = encoder(**options), images(2)
    encoded, weights = gallery.attended(model, view)
    assert torch.equal(encoded.tokens, model(view).tokens)
    given = []
    attention = model.transformer.blocks[-1].attn
    handle = attention.qkv.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    model(view)
    handle.remove()
    x, extra = given[0].double(), model.transformer.extra_tokens
    rows, length, dim = x.shape
    weight, bias = attention.qkv.weight.double(), attention.qkv.bias.double()
    q, k = ((x @ weight[i * dim : (i + 1) * dim].T + bias[i * dim : (i + 1) * dim]).detach() for i in range(2))
    for row in range(rows):
        mean = torch.zeros(length, length, dtype=torch.float64)
        for head in range(4):
            own = slice(head * 4, head * 4 + 4)
            for i in range(length):
                seen = range(i + 1) if options.get("causal") else range(length)
                scores = [math.exp(float(q[row, i, own] @ k[row, j, own]) / 2.0) for j in seen]
                for j, score in zip(seen, scores, strict=True):
                    mean[i, j] += score / sum(scores) / 4
        wanted = mean[0, extra:] if extra else mean.mean(0)
        torch.testing.assert_close(weights[row].double(), wanted, rtol=1e-4, atol=1e-6)


def test_padding_is_no_query_of_the_mean():
    model, view = encoder(extra_tokens=0), images(2)
    pad = torch.zeros(2, 16, dtype=torch.bool)
    pad[1, 10:] = True
    _, weights = gallery.attended(model, view._replace(pad=pad))
    torch.testing.assert_close(weights.sum(1), torch.ones(2))
    assert float(weights[1, 10:].sum()) == 0.0


def test_components_are_those_of_all_tokens_together():
    draw = generator("tokens")
    tokens = torch.randn(2, 40, 3, generator=draw, dtype=torch.float64) * torch.tensor([9.0, 3.0, 1.0])
    tokens = torch.cat([tokens, torch.zeros(2, 40, 5)], 2)[..., torch.randperm(8, generator=draw)]
    pad = torch.zeros(2, 40, dtype=torch.bool)
    pad[1, 30:] = True
    colours = gallery.first_components(tokens, pad)
    assert colours.shape == (2, 40, 3)
    assert float(colours[1, 30:].abs().max()) == 0.0
    rows = tokens[~pad].numpy()
    _, vectors = np.linalg.eigh(np.cov(rows.T))
    for place in range(3):
        direction = vectors[:, -1 - place]
        found = rows @ (direction * np.sign(direction[np.abs(direction).argmax()]))
        low, high = np.quantile(found, [0.01, 0.99])
        wanted = ((found - low) / (high - low)).clip(0, 1)
        assert np.abs(colours[~pad][:, place].numpy() - wanted).max() < 1e-3


def test_neighbours_pairs_and_spectrum():
    features = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0], [-1.0, 0.0]])
    places, cosines = gallery.nearest(features, torch.tensor([0, 2]), 2)
    assert places.tolist() == [[1, 3], [3, 1]]
    assert cosines[0, 0] == pytest.approx(2 / math.hypot(2, 0.1))
    assert gallery.nearest(features, torch.tensor([0]), 9)[0].shape == (1, 4)
    assert gallery.random_pairs(features[[0, 2, 4, 3]]).tolist() == pytest.approx([-1.0, 0.9994, -1.0, 0.9994], abs=1e-3)
    values = gallery.spectrum(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.25], [0.0, -0.25]]))
    assert values.tolist() == pytest.approx([1.0, 0.25])


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """Of a method with two views."""
    place = tmp_path_factory.mktemp("run")
    (place / "recipe.yaml").write_text(
        f"data: {{path: {image_folder}, modality: vision, workers: 0}}\n"
        "model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 1, heads: 2}\n"
        "method: {name: simclr, hidden: 16, dim: 16}\nviews: {crops: moco-cifar}\n"
        "train: {steps: 4, global_batch: 8, device: cpu}\nwatch: {samples: 20, every: 2}\nsave: {every: 4}\n"
    )
    return pretrain(Recipe.load(place / "recipe.yaml", f"out={place / 'run'}"))


def test_a_run_refreshes_its_report_and_view_draws_all(run, capsys):
    path = run / "report" / "index.html"
    before = path.read_text()
    assert "finished at step 4 of 4" in before
    assert "Feature maps" not in before
    assert illustrated(run) == path
    text = path.read_text()
    assert all(f"<h3>{title}</h3>" in text for title in ("Feature maps", "Where the last layer looks", "Nearest neighbours"))
    assert "Map of the features" not in text
    assert main(["view", str(run), "pictures=true"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    text = path.read_text()
    assert all(f"<h3>{title}</h3>" in text for title in ("Map of the features", "Similarity of pairs"))
    for name in ("patches", "attention", "neighbours", "map", "similarity", "spectrum"):
        picture = run / "report" / f"{name}-0000004.png"
        assert len(np.unique(np.asarray(Image.open(picture)))) > 2, name
        caption = picture.with_suffix(".txt").read_text()
        assert "at step 4." in caption
        assert "samples of test" in caption
    assert "two random views of each sample" in (run / "report" / "similarity-0000004.txt").read_text()


def test_a_map_shows_which_patch_differs(run):
    looked = figures.look(Recipe.load(run / "config.yaml"), run / "model", 4, 20)
    view = looked.view([0, 1])
    colours = torch.zeros(2, 16, 3)
    colours[0, 5] = torch.tensor([1.0, 0.0, 0.0])  # second row, second column
    found = np.asarray(looked.sketch(view, colours)[0])
    side = found.shape[0]
    maps = found[:, -side:]
    red = np.argwhere((maps == (255, 0, 0)).all(-1))
    assert red.min(0).tolist() == [side // 4, side // 4]
    assert red.max(0).tolist() == [side // 2 - 1, side // 2 - 1]


def test_without_model_or_data_a_sentence_says_so(run, tmp_path, capsys):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("status.json", "metrics.jsonl"):
        (moved / name).write_text((run / name).read_text())
    (moved / "config.yaml").write_text((run / "config.yaml").read_text())
    assert main(["view", str(moved), "pictures=true"]) == 2
    assert "there is no model yet" in capsys.readouterr().err
    config = (run / "config.yaml").read_text()
    at = next(line for line in config.splitlines() if line.startswith("  path:"))
    (moved / "config.yaml").write_text(config.replace(at, f"  path: {tmp_path / 'gone'}", 1))
    (moved / "model").symlink_to(run / "model")
    illustrated(moved)
    assert "could be drawn: " in capsys.readouterr().err
