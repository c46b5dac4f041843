"""What all joint-embedding methods must keep, on tiny models."""

import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.distributed import all_sum, world
from mmssl.losses import sinkhorn
from mmssl.methods import METHODS, sela_v2
from mmssl.methods.families import embed_in_parts
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.parts import Network
from mmssl.schedules import constant, cosine
from mmssl.types import Batch, Clock, View
from tests.ranks import on_two_ranks

SAMPLES, EPOCH = 12, 2  # of the data set, and updates of a pass
OPTIONS = {
    "simclr": {"hidden": 16, "dim": 8},
    "simclr_v2": {"hidden": 16, "dim": 8},
    "moco_v1": {"dim": 8, "queue": 20, "split": 2, "momentum": constant(0.9)},
    "moco_v2": {"hidden": 16, "dim": 8, "queue": 20, "split": 2, "momentum": constant(0.9)},
    "moco_v3": {"hidden": 16, "dim": 8},
    "instance_discrimination": {"dim": 8},
    "byol": {"hidden": 16, "dim": 8, "momentum": constant(0.9)},
    "simsiam": {"dim": 8, "hidden": 4},
    "swav": {"hidden": 16, "dim": 8, "prototypes": 4, "freeze_epochs": 1, "queue": 8, "queue_from_epoch": 0},
    "deepcluster": {"clusters": 3, "pca": 4},
    "deepcluster_v2": {"hidden": 16, "dim": 8, "prototypes": 3, "heads": 3},
    "sela_v2": {"hidden": 16, "dim": 8, "prototypes": 3, "heads": 2},
    "barlow_twins": {"hidden": 16, "dim": 8},
    "vicreg": {"hidden": 16, "dim": 8},
    "dino": {"prototypes": 6, "hidden": 16, "bottleneck": 8, "head_norm": True, "momentum": constant(0.9)},
}
NAMES = sorted(OPTIONS)


def build(name, **options):
    torch.manual_seed(0)
    encoder = Encoder.from_config(
        MmsslConfig(image_size=8, patch_size=4, hidden_size=16, depth=1, heads=2, channels=3, modality="vision")
    )
    method = METHODS[name](encoder, **OPTIONS[name] | options).double()
    method.attach(SAMPLES, 0)
    return method.double().train()


def images(name):
    """The data set: views of all samples, full-size ones first."""
    method, draw = METHODS[name], torch.Generator().manual_seed(1)
    base = torch.randn(SAMPLES, 3, 8, 8, generator=draw, dtype=torch.float64)
    views = [base + 0.5 * torch.randn(base.shape, generator=draw, dtype=torch.float64) for _ in range(method.views)]
    return views + [views[0][:, :, 2:6, 2:6]] * method.crops


def batch_of(name, rows):
    return Batch([View(x[rows], "vision") for x in images(name)], rows, tuple(rows.tolist()))


def train(rank, name, steps=3, rate=0.1, at_once=None):
    """Losses, gradients of the last update, and state, of plain descent on global batches of eight."""
    method, losses, gradients = build(name), [], {}
    if at_once:
        assert embed_in_parts(method, at_once) == 1
    for step in range(steps):
        clock = Clock(step, steps, step // EPOCH)
        if step % EPOCH == 0:
            method.eval()
            whole = View(images(name)[0], "vision")
            with torch.no_grad():
                method.on_epoch(clock, method.describe(whole) if method.needs_description(clock) else None)
            method.train()
        method.before_step(clock)
        rows = (torch.arange(8) + 4 * step) % SAMPLES
        out = method(batch_of(name, rows[rank :: world()]), clock)
        loss = torch.stack(list(out.losses.values())).sum()
        loss.backward()
        losses.append(all_sum(loss.detach()) / world())
        for key, parameter in method.named_parameters():
            if parameter.requires_grad:
                gradients[key] = all_sum(parameter.grad) / world()
                parameter.data -= rate * gradients[key]
                parameter.grad = None
        method.after_step(clock._replace(step=step + 1))
    state = {key: value.detach().clone() for key, value in method.state_dict().items() if "extra_state" not in key}
    return torch.stack(losses), gradients, state


def train_all(rank):
    return {name: train(rank, name) for name in NAMES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes makes of every method."""
    return on_two_ranks(train_all, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one_process(name, ranks):
    """T10, T11: loss, gradients and all state after three updates, of which the later ones see queues, centres and teachers."""
    losses, gradients, state = train(0, name)
    for one in ranks:
        other_losses, other_gradients, other_state = one[name]
        assert_close(other_losses, losses, rtol=1e-6, atol=1e-9)
        for key, gradient in gradients.items():
            assert_close(other_gradients[key], gradient, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
        for key, value in state.items():
            assert_close(other_state[key], value, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_embedding_in_parts_changes_nothing(name):
    """Parts of three rows, of eight or sixteen: losses, gradients and all state."""
    for whole, parts in zip(train(0, name), train(0, name, at_once=3), strict=True):
        assert_close(parts, whole, rtol=1e-9, atol=1e-12)


def test_of_embeddings_in_parts_one_part_at_most_waits_for_the_backward_pass():
    """Of what the first layers give, nothing is alive when all rows are embedded."""
    method = build("simclr")
    embed_in_parts(method, 3)
    given = []
    method.student.encoder.transformer.blocks[0].mlp.fc1.register_forward_hook(lambda *of: given.append(weakref.ref(of[2])))
    loss = method(batch_of("simclr", torch.arange(8)), Clock(0, 3)).losses["nt_xent"]
    gc.collect()
    assert len(given) == 6  # sixteen rows, three at once
    assert not [one for one in given if one() is not None]
    loss.backward()
    assert len(given) == 12


def test_padded_rows_keep_their_padding_when_they_are_embedded_in_parts():
    torch.manual_seed(0)
    shape = {
        "vocab_size": 20,
        "mask_token_id": 19,
        "max_tokens": 6,
        "extra_tokens": 0,
        "hidden_size": 16,
        "depth": 1,
        "heads": 2,
    }
    encoder = Encoder.from_config(MmsslConfig(modality="text", **shape)).double()
    network = Network(encoder=encoder)
    ids, pad = torch.randint(0, 19, (5, 6)), torch.arange(6) >= torch.tensor([[6], [2], [4], [3], [5]])
    views = [View(ids, "text", pad), View(ids.flip(0), "text")]
    whole = network.embed_all(views)
    network.at_once = 2
    assert_close(network.embed_all(views), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_every_trained_weight_gets_a_gradient(name):
    """After a few updates, when nothing is frozen any more."""
    _, gradients, _ = train(0, name, steps=5)
    method = build(name)
    assert set(gradients) == {key for key, parameter in method.named_parameters() if parameter.requires_grad}
    still = [key for key, gradient in gradients.items() if not bool(gradient.abs().sum() > 0)]
    # Batch normalisation removes what the layer before adds to all samples alike.
    assert not [key for key in still if not key.endswith("bias")], still
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_health_are_finite_scalars(name):
    method = build(name)
    clock = Clock(0, 3, 0)
    method.on_epoch(clock, method.describe(View(images(name)[0], "vision")) if method.needs_description(clock) else None)
    method.before_step(clock)
    out = method(batch_of(name, torch.arange(8)), clock)
    for value in (*out.losses.values(), *out.health.values()):
        assert value.shape == ()
        assert bool(value.isfinite())
    assert not any(value.requires_grad for value in out.health.values())
    assert out.embedding.shape == (8, 16)
    assert not out.embedding.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_update_leaves_no_trace_in_the_state(name):
    """Between `before_step` and `after_step` nothing but running batch statistics may change."""
    method, clock = build(name), Clock(0, 3, 0)
    method.on_epoch(clock, method.describe(View(images(name)[0], "vision")) if method.needs_description(clock) else None)
    before = {key: value.clone() for key, value in method.state_dict().items() if isinstance(value, torch.Tensor)}
    for _ in range(2):
        method.before_step(clock)
        method(batch_of(name, torch.arange(8)), clock)
    after = method.state_dict()
    changed = [key for key, value in before.items() if not torch.equal(value, after[key])]
    assert all("running_" in key or "num_batches" in key for key in changed), changed


@pytest.mark.parametrize("name", ["moco_v1", "moco_v2", "moco_v3", "byol", "dino"])
def test_the_teacher_is_no_parameter_and_moves(name):
    method = build(name)
    names = [key for key, _ in method.named_parameters()]
    assert not [key for key in names if key.startswith("teacher")]
    assert not any(parameter.requires_grad for parameter in method.teacher.network.parameters())
    start = {key: value.clone() for key, value in method.teacher.network.named_parameters()}
    for parameter in method.student.parameters():
        parameter.data += 1.0
    method.after_step(Clock(1, 3, 0))
    kept = method.teacher.momentum(Clock(1, 3, 0))
    for key, value in method.teacher.network.named_parameters():
        assert_close(value, start[key] + (1 - kept) * 1.0, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block", [4096, 5])
def test_sela_balances_as_sinkhorn_does_without_the_whole_matrix(block, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    rows, directions = (F.normalize(torch.randn(n, 6, generator=draw, dtype=torch.float64), dim=1) for n in (23, 4))
    monkeypatch.setattr(sela_v2, "BLOCK", block)
    found, ids = sela_v2.balanced_means(rows, directions, 0.05, 7)
    codes = sinkhorn(rows @ directions.T, 0.05, 7)
    assert_close(found, F.normalize(codes.T @ rows, dim=1), rtol=1e-9, atol=1e-9)
    assert torch.equal(ids, codes.argmax(1))


@pytest.mark.parametrize("name", ["byol", "dino"])
def test_momentum_is_that_of_the_update_it_follows(name):
    """m(k) after update k (arXiv:2006.07733): the last update of a run still moves the teacher."""
    method = build(name, momentum=cosine(0.99, 1.0))
    kept = [method.teacher.health(Clock(step, 4))["momentum"] for step in range(1, 5)]
    wanted = [1 - 0.01 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert kept == pytest.approx(wanted, abs=1e-12)


def test_a_memory_may_start_with_what_the_untrained_network_makes_of_each_sample():
    method = build("instance_discrimination", memory_start="embedded")
    drawn = method.memory.rows.clone()
    assert not build("instance_discrimination").needs_description(Clock(0, 10, 0))
    assert method.needs_description(Clock(0, 10, 0))
    assert not method.needs_description(Clock(5, 10, 1))
    described = method.describe(View(images("instance_discrimination")[0], "vision"))
    assert_close(described.norm(dim=1), torch.ones(SAMPLES, dtype=torch.float64))
    method.on_epoch(Clock(0, 10, 0), described)
    assert torch.equal(method.memory.rows, described)
    assert not torch.equal(drawn, described)
