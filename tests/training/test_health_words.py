"""What a run says of its health: planted collapses are named within fifty updates, healthy runs and fresh networks are not."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl.cli import status
from mmssl.config import Recipe
from mmssl.evaluate.health import of_outputs
from mmssl.methods import METHODS
from mmssl.methods.normal import Normal
from mmssl.random import generator
from mmssl.training.pretrain import pretrain
from mmssl.training.trainer import SelfSupervisedTrainer
from tests.ranks import on_two_ranks

MODEL = "model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 1, heads: 2}\n"
CROPS = "[{count: 2, scale: [0.4, 1.0]}, {count: 1, size: 8, scale: [0.1, 0.4]}]"
METHOD = {
    "simclr": "{name: simclr, hidden: 16, dim: 16}\nviews: {crops: moco-cifar}",
    "mae": "{name: mae, decoder: {dim: 16, depth: 1, heads: 2}}",
    "dino": "{name: dino, prototypes: 32, hidden: 16, bottleneck: 8}\nviews: {crops: moco-cifar}",
    "msn": "{name: msn, prototypes: 32, hidden: 16, dim: 16}\nviews: {crops: CROPS, mask: {kind: random, ratio: 0.5}}",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Forty-eight images of coarse coloured patterns, in two splits."""
    folder, draws = tmp_path_factory.mktemp("patterns"), np.random.default_rng(0)
    for i in range(48):
        place = folder / ("train" if i % 3 else "test")
        place.mkdir(exist_ok=True)
        coarse = Image.fromarray(draws.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((24, 24), Image.Resampling.BICUBIC).save(place / f"{i}.png")
    return folder


@pytest.fixture
def recipe(images, tmp_path):
    """Function: method and overrides -> a recipe of fifty updates."""

    def build(name, *overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"data: {{path: {images}, modality: vision, workers: 0}}\n{MODEL}"
            f"method: {METHOD[name].replace('CROPS', CROPS)}\n"
            "train: {steps: 50, global_batch: 16, device: cpu}\nwatch: {samples: 20, every: 0}\n"
        )
        return Recipe.load(path, f"out={tmp_path / 'run'}", *overrides)

    return build


def told(run):
    """What it logged of its updates."""
    return [line for line in run.lines if "loss" in line]


def replaced(change):
    """A fault: what leaves the student's transformer is changed, whoever asks for it."""

    def plant(run):
        transformer = run.objective.method.student.encoder.transformer
        transformer.register_forward_hook(lambda module, given, out: (change(out[0]), out[1]))

    return plant


def constant(x):
    return 0 * x + torch.linspace(-1, 1, x.shape[-1])


def rank_one(x):
    direction = torch.linspace(-1, 1, x.shape[-1])
    return (x @ direction)[..., None] * direction


def half_dead(x):
    return torch.cat([x[..., : x.shape[-1] // 2], 0 * x[..., x.shape[-1] // 2 :]], -1)


FAULTS = {
    "constant": (constant, "collapsed: all outputs are alike (output_std "),
    "rank one": (rank_one, "collapsed: 1.0 of 16 dimensions carry everything (output_dimensions 1, normal above 1.2"),
    "half dead": (
        half_dead,
        "collapsing: 50% of the 16 dimensions are dead, the same for all samples (output_dead 0.5, normal",
    ),
}


@pytest.mark.parametrize("name", ["simclr", "mae"])
@pytest.mark.parametrize("fault", [*FAULTS])
def test_planted_collapses_are_named_within_fifty_updates(name, fault, recipe, trained):
    change, words = FAULTS[fault]
    lines = told(trained(recipe(name), replaced(change)))
    assert [line["step"] for line in lines] == [10, 20, 30, 40, 50]
    assert all(words in line["verdict"] for line in lines), lines[-1]
    others = [told for other, (_, told) in FAULTS.items() if other != fault]
    assert not any(told in line["verdict"] for line in lines for told in others), lines[-1]


@pytest.mark.parametrize(("name", "part"), [("dino", "target_use"), ("msn", "prototype_use")])
def test_one_prototype_that_takes_all_is_named(name, part, recipe, trained):
    def plant(run):
        method, first = run.objective.method, torch.zeros(32).index_fill_(0, torch.tensor([3]), 100.0)
        for module in (*method.modules(), *method.teacher.network.modules()):
            if type(module).__name__ in ("Prototypes", "DinoHead"):
                module.register_forward_hook(lambda module, given, out: out + first)
        if name == "dino":
            method.center.update = lambda scores: None

    verdicts = [line["verdict"] for line in told(trained(recipe(name), plant))]
    assert all("takes all" in said and f"({part} " in said for said in verdicts), verdicts


@pytest.mark.parametrize("name", ["simclr", "mae", "msn", "dino"])  # more of them: python -m tools.soak only=health
def test_healthy_runs_raise_no_alarm(name, recipe, trained):
    lines = told(trained(recipe(name, "train.log_every=5", "optim.lr=1e-3")))
    assert {line["verdict"] for line in lines} == {"healthy"}
    assert {"health/output_std", "health/output_dimensions", "health/output_dead"} <= {*lines[0]}


def test_status_says_it(recipe, tmp_path, capsys):
    pretrain(recipe("mae", "train.steps=10"))
    assert json.loads((tmp_path / "run" / "status.json").read_text())["health"] == "healthy"
    assert status.run([str(tmp_path / "run")]) == 0
    assert "health      healthy\n" in capsys.readouterr().out
    assert "health healthy" in (tmp_path / "run" / "log.txt").read_text()


def test_what_begins_small_is_judged_by_how_it_began():
    normal = Normal("x_std", 0.1, "small in {dim}", floor=0.001)
    assert normal.told(0.05, 0.05, 10, 8) is None  # as it began
    assert normal.told(0.02, 0.05, 10, 8) == "small in 8 (x_std 0.02, normal above 0.1, 0.05 at the start)"
    assert normal.told(0.0001, 0.0001, 10, 8) == "small in 8 (x_std 0.0001, normal above 0.1)"
    assert normal.told(0.05, None, 10, 8) == "small in 8 (x_std 0.05, normal above 0.1)"
    assert normal._replace(by=10).told(0.05, 0.05, 10, 8) == "small in 8 (x_std 0.05, normal above 0.1, 0.05 at the start)"
    assert normal._replace(by=20, drops=False).told(0.002, 0.05, 19, 8) is None
    assert normal._replace(by=20, drops=False).told(0.002, 0.05, 20, 8) is not None
    assert normal._replace(by=20, drops=False).told(0.0001, 0.05, 10, 8) is not None
    assert normal._replace(samples=8).told(0.0, 0.05, 10, 8, samples=7) is None
    assert normal._replace(samples=8).told(0.0, 0.05, 10, 8, samples=8) is not None
    assert normal._replace(after=11).told(0.0, None, 10, 8) is None
    assert normal.told(math.nan, 0.05, 10, 8) == "small in 8 (x_std nan, normal above 0.1, 0.05 at the start)"


def test_outputs_in_numbers():
    rows = torch.randn(4000, 8, generator=generator("rows"), dtype=torch.float64)
    found = of_outputs(rows)
    assert found["output_std"] == pytest.approx(1.0, abs=0.01)
    assert found["output_dimensions"] == pytest.approx(8.0, abs=0.1)
    assert found["output_dead"] == 0.0
    assert of_outputs(rows * torch.tensor([3.0] * 2 + [0.0] * 6)) == pytest.approx(
        {"output_std": 1.0, "output_dimensions": 2.0, "output_dead": 0.75}, abs=0.01
    )
    assert of_outputs(rows[:1].expand(10, 8)) == {"output_std": pytest.approx(0.0, abs=1e-12)}
    assert of_outputs(rows[:3]) == {}


def outputs(rank):
    """Health of the outputs of both members, of which the ranks have 8 and 3, and 8 and 8."""
    rows = [torch.randn(8, 4, generator=generator("rows", one)) for one in range(4)]
    own = {"a": [rows[0]] if rank == 0 else [rows[1][:1], rows[1][1:3]], "b": [rows[2 + rank]]}
    trainer = SimpleNamespace(objective=SimpleNamespace(outputs=own), args=SimpleNamespace(device="cpu"))
    return SelfSupervisedTrainer._outputs(trainer), [of_outputs(rows[place]) for place in (0, 2, 3)]


def test_ranks_agree_on_the_mean_of_those_that_have_enough_outputs(tmp_path):
    (first, (a, *b)), (second, _) = on_two_ranks(outputs, folder=tmp_path)
    assert first == second
    wanted = {f"health/a.{name}": value for name, value in a.items()}
    wanted |= {f"health/b.{name}": (b[0][name] + b[1][name]) / 2 for name in a}
    assert first == pytest.approx(wanted, rel=1e-6)


def test_few_samples_say_little_of_dimensions(recipe, trained):
    """Of two samples every projection lies on a line."""
    lines = told(trained(recipe("simclr", "train.steps=10", "train.global_batch=2")))
    assert lines[0]["health/dimensions"] < 1.2
    assert lines[0]["verdict"] == "healthy"


def test_a_method_declares_only_what_differs():
    class Own(METHODS["dino"]):
        normal = (Normal("unit_std", 0.3, "own words"),)

    method = Own.__new__(Own)
    torch.nn.Module.__init__(method)
    table = {normal.metric: normal for normal in method.normals()}
    assert table["unit_std"].least == 0.3
    assert {"target_use", "output_std", "dimensions"} <= {*table}
