"""Without what keeps a method from collapsing it collapses, and its health line says so."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmssl import losses
from mmssl.config import OptimOptions, Recipe
from mmssl.methods import METHODS
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.random import generator
from mmssl.schedules import constant
from mmssl.training.objective import Objective
from mmssl.training.optim import build_optimizer, schedule, set_rates
from mmssl.types import Batch, Clock, View

CLASSES, SAMPLES, BATCH, UPDATES, LINE = 32, 256, 64, 300, 50  # LINE: updates that a line is a mean over
OPTIONS = {
    "byol": {"hidden": 32, "dim": 32, "momentum": constant(0.9)},
    "simsiam": {"dim": 32, "hidden": 8},
    "vicreg": {"hidden": 32, "dim": 32},
    "barlow_twins": {"hidden": 32, "dim": 32},
    "dino": {
        "prototypes": 32,
        "hidden": 32,
        "bottleneck": 16,
        "momentum": constant(0.99),
        "teacher_temperature": constant(0.04),
    },
}
NOISE = {"simsiam": 1.5}
RATE = {"dino": 1e-3, "simsiam": 1e-2, "barlow_twins": 1e-2}


def train(name, change=lambda method: None, seed=0, **options):
    """The health of a method's last updates, as a run logs it, and what the method says of it."""
    draw = generator("images", seed)
    kinds = torch.randn(CLASSES, 3, 8, 8, generator=draw)
    images = kinds.repeat(SAMPLES // CLASSES, 1, 1, 1) + 0.7 * torch.randn(SAMPLES, 3, 8, 8, generator=draw)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "depth": 1, "heads": 2}
        encoder = Encoder.from_config(MmsslConfig(modality="vision", **shape))
        method = METHODS[name](encoder, **OPTIONS[name] | options).train()
    change(method)
    recipe = OptimOptions(lr=RATE.get(name, 5e-3), fall="none")
    rate = schedule(recipe)
    optimizer = build_optimizer(Objective(method), recipe, rate)
    health = []
    for step in range(UPDATES):
        clock = Clock(step, UPDATES, step // (SAMPLES // BATCH))
        method.before_step(clock)
        set_rates(optimizer, rate(clock), clock, method)
        draw = generator("batch", seed, step)
        rows = torch.randperm(SAMPLES, generator=draw)[:BATCH]
        noise = NOISE.get(name, 1.0) * torch.randn(method.views, BATCH, 3, 8, 8, generator=draw)
        out = method(Batch([View(images[rows] + one, "vision") for one in noise], rows), clock)
        optimizer.zero_grad()
        torch.stack(list(out.losses.values())).sum().backward()
        optimizer.step()
        method.after_step(clock._replace(step=step + 1))
        health.append(out.health)
    line = {f"health/{key}": float(torch.stack([one[key] for one in health[-LINE:]]).mean()) for key in health[0]}
    return line, method.judge(line)


def no_predictor(method):
    method.predictor = nn.Identity()


def no_centring(method):
    method.center.update = lambda scores: None


@pytest.fixture
def no_stop_gradient(monkeypatch):
    """Targets are trained, too."""
    monkeypatch.setattr(losses, "cosine_regression", lambda p, z: 2 - 2 * F.cosine_similarity(p, z).mean())


@pytest.mark.parametrize("name", [*OPTIONS])
def test_as_published_nothing_collapses(name):
    line, verdict = train(name)
    assert not verdict, line
    assert line["health/unit_std"] > 0.5, line
    assert line["health/dimensions"] > 2.0, line


def test_without_stop_gradient_simsiam_collapses(no_stop_gradient):
    line, verdict = train("simsiam")
    assert line["health/dimensions"] < 1.25, line
    assert any("collapsed: embeddings differ in one direction only" in words for words in verdict)


@pytest.mark.parametrize("name", ["byol", "simsiam"])
def test_without_a_predictor_byol_and_simsiam_collapse(name):
    line, verdict = train(name, no_predictor)
    assert line["health/dimensions"] < 1.25 or line["health/unit_std"] < 0.05, line
    assert any(words.startswith("collapsed") for words in verdict)


def test_without_centring_one_output_of_dino_takes_all():
    line, verdict = train("dino", no_centring)
    assert line["health/target_use"] < 0.2, line  # 0.9 with it
    assert any(words.startswith("collapsed") for words in verdict)


def test_with_invariance_alone_vicreg_collapses():
    line, verdict = train("vicreg", variance=0.0, covariance=0.0)
    assert line["health/spread"] < 0.05, line
    assert any("collapsed: projections shrink to a point" in words for words in verdict)


def test_with_invariance_alone_barlow_twins_collapses():
    line, verdict = train("barlow_twins", off_diagonal=0.0)
    assert line["health/dimensions"] < 1.4, line
    assert any("collapsed: embeddings differ in one direction only" in words for words in verdict)


def test_each_line_of_a_run_says_so(image_folder, tmp_path, trained):
    """In the log of a real run, as soon as projections are alike."""
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"data: {{path: {image_folder}, modality: vision, workers: 0}}\n"
        "model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 1, heads: 2}\n"
        "method: {name: vicreg, hidden: 16, dim: 16}\n"
        "views: {crops: moco-cifar}\n"
        "optim: {lr: 1e-9}\n"
        "train: {steps: 2, global_batch: 16, device: cpu, log_every: 1}\n"
        "watch: {samples: 20}\n"
    )

    def shrink(run):
        run.objective.method.student.projector[-1].weight.data.zero_()

    for change, words in ((lambda run: None, "healthy"), (shrink, "collapsed: ")):
        lines = trained(Recipe.load(path, f"out={tmp_path / 'run'}"), change).lines
        assert [line["verdict"].startswith(words) for line in lines if "loss" in line] == [True, True]
