"""What holds a model near the one it began with."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.config import Recipe
from mmssl.methods.anchor import Anchor
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.training.pretrain import prepare
from mmssl.types import Batch, Clock, View

CLOCK = Clock(0, 10)


@pytest.fixture
def anchored():
    """An anchor whose student has moved, and a batch of two texts, one of them padded."""
    torch.manual_seed(0)
    text = {"vocab_size": 30, "mask_token_id": 29, "pad_token_id": 1, "max_tokens": 12, "extra_tokens": 0}
    config = MmsslConfig(modality="text", hidden_size=16, depth=2, heads=2, norm_eps=1e-5, **text)
    method = Anchor(Encoder.from_config(config)).double().train()
    with torch.no_grad():
        for parameter in method.student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    pad = torch.arange(12) >= torch.tensor([[12], [7]])
    x = torch.randint(4, 29, (2, 12)).masked_fill(pad, 1)
    return method, Batch([View(x, "text", pad)], torch.arange(2), (0, 1))


def test_the_loss_is_the_mean_over_tokens_that_are_not_padding(anchored):
    method, batch = anchored
    (view,) = batch.views
    with torch.no_grad():
        new, old = method.student.encoder(view).tokens, method.start.encoder(view).tokens
    wanted = [2 - 2 * F.cosine_similarity(new[r, i], old[r, i], 0) for r, n in enumerate((12, 7)) for i in range(n)]
    out = method(batch, CLOCK)
    assert float(out.health["anchor"]) == pytest.approx(float(torch.stack(wanted).mean()), rel=1e-12)
    assert float(out.health["anchor"]) > 0.01
    out.losses["anchor"].backward()
    assert all(p.grad is None for p in method.start.network.parameters())
    assert sum(float(p.grad.abs().sum()) for p in method.student.parameters()) > 0


def test_it_never_moves_and_travels_with_the_state(anchored):
    method, batch = anchored
    before = {name: value.clone() for name, value in method.start.network.state_dict().items()}
    method.after_step(Clock(1))
    assert_close(dict(method.start.network.state_dict()), before, rtol=0, atol=0)
    loss, state = method(batch, CLOCK).losses["anchor"].detach(), copy.deepcopy(method.state_dict())
    method.start.restart()
    assert float(method(batch, CLOCK).losses["anchor"].detach()) == pytest.approx(0, abs=1e-12)
    method.load_state_dict(state)
    assert torch.equal(method(batch, CLOCK).losses["anchor"], loss)


@pytest.mark.parametrize(
    ("name", "options", "model"),
    [
        (
            "mae",
            "{decoder: {dim: 16, depth: 1, heads: 2}}",
            "{image_size: 16, patch_size: 4, hidden_size: 24, depth: 2}",
        ),
        ("simclr", "{hidden: 16, dim: 8}", "{backbone: resnet18, image_size: 32}"),
    ],
)
def test_beside_another_method_it_begins_at_zero_and_stays(name, options, model, image_folder, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"data: {{path: {image_folder}, modality: vision, workers: 0}}\n"
        f"model: {model}\nmethod: {{name: {name}+anchor, {name}: {options}, anchor: {{weight: 0.5}}}}\noptim: {{lr: 1.0e-2}}\n"
        "train: {steps: 3, global_batch: 8, device: cpu, log_every: 1}\nwatch: {samples: 20, linear: false}\n"
    )
    run = prepare(Recipe.load(path, f"out={tmp_path / 'run'}"))
    lines = []
    run.trainer.report = lines.append
    held_still = dict(run.objective.method.members["anchor"].start.network.named_parameters())
    start = {name: value.clone() for name, value in held_still.items()}
    run.train()
    held = [line["loss/anchor.anchor"] for line in lines if "loss/anchor.anchor" in line]
    assert held[0] == pytest.approx(0, abs=1e-5)
    assert held[-1] > 1e-4
    assert_close(held_still, start, rtol=0, atol=0)
