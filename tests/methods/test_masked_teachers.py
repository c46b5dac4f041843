"""iBOT and MSN against their definitions, and what they share with the predictive methods of `test_predictive.py`."""

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

from mmssl.config import Recipe
from mmssl.distributed import all_sum, world
from mmssl.errors import RecipeError
from mmssl.masks import uniform
from mmssl.methods import METHODS
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.token_decoder import TokenDecoderOptions
from mmssl.parts import Center
from mmssl.random import generator
from mmssl.schedules import constant
from mmssl.types import Batch, Clock, Mask, View
from tests.losses.cases import MASKED, tensor
from tests.ranks import on_two_ranks

SAMPLES, EPOCH = 12, 2  # of the data set, and updates of a pass
PIXELS = {"patch_size": 1, "image_size": 4, "palette": 5, "positions": "learned"}
MODELS = {
    "ibot": {"pooling": "cls"},
    "ibot-normed": {"pooling": "cls"},
    "msn": {"pooling": "cls"},
    "ijepa": {"extra_tokens": 0},
    "mp3": {"positions": "none", "extra_tokens": 0},
    "igpt": PIXELS | {"causal": True, "norm_kind": "rms", "activation": "gelu_quick"},
    "igpt-hidden": PIXELS,
}
OPTIONS = {
    "ibot": {"prototypes": 6, "hidden": 16, "bottleneck": 8, "freeze_epochs": 0, "momentum": constant(0.9)},
    "msn": {"hidden": 16, "dim": 8, "prototypes": 4, "entropy": 0.1, "momentum": constant(0.9)},
    "ijepa": {"momentum": constant(0.9)},
    "mp3": {"ratio": 0.5},
    "igpt": {},
    "igpt-hidden": {"predict": "hidden"},
}
OPTIONS["ibot-normed"] = OPTIONS["ibot"] | {"head_norm": True}
NAMES = sorted(OPTIONS)


def encoder(name, model=()):
    torch.manual_seed(0)
    shape = {"image_size": 16, "patch_size": 4, "hidden_size": 16, "depth": 2, "heads": 2, "norm": "pre", "extra_std": 0.02}
    return Encoder.from_config(MmsslConfig(modality="vision", **shape | MODELS[name] | dict(model)))


def build(name, model=(), **options):
    options = OPTIONS[name] | options
    if name == "ijepa":
        options |= {"predictor": TokenDecoderOptions(8, 1, 2)}
    method = METHODS[name.split("-")[0]](encoder(name, model), **options)
    method.attach(SAMPLES, 0)
    return method.double().train()


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(name):
    """Of all samples: random for MSN, different numbers for iBOT, two groups of four patches for I-JEPA."""
    draw = torch.Generator().manual_seed(2)
    if name == "msn":
        return Mask.of(uniform(16, SAMPLES, 0.5, draw))
    if name.startswith("ibot"):
        return Mask.replacing(torch.rand(SAMPLES, 16, generator=draw) < torch.arange(SAMPLES)[:, None] % 3 * 0.2)
    mask = Mask.of(uniform(16, SAMPLES, 0.6, draw))
    return mask._replace(wanted=torch.stack([mask.rest[:, :4], mask.rest[:, 3:7]], 1))


def batch_of(name, rows):
    base = drawn(1, SAMPLES, 3, 16, 16)
    if name.startswith("igpt") or name == "mp3":
        size = 4 if name.startswith("igpt") else 16
        return Batch([View(base[rows, :, :size, :size], "vision")], rows, tuple(rows.tolist()))
    mask = Mask(*(t if t is None else t[rows] for t in masks(name)))
    views = [View(base[rows], "vision", mask=mask)]
    if name != "ijepa":
        views += [
            View((base + 0.5 * drawn(3, *base.shape))[rows], "vision", mask=mask),
            View(base[rows, :, 4:12, 4:12], "vision"),
        ]
    return Batch(views, rows, tuple(rows.tolist()))


def begin(method, name, clock):
    """A pass, described first if need be."""
    with torch.no_grad():
        whole = batch_of(name, torch.arange(SAMPLES)).views[0]
        method.on_epoch(clock, method.describe(whole) if method.needs_description(clock) else None)


def train(rank, name, steps=3, rate=0.1):
    """Losses, gradients of the last update, and state, of plain descent on global batches of eight."""
    method, losses, gradients = build(name), [], {}
    for step in range(steps):
        clock = Clock(step, steps, step // EPOCH)
        if step % EPOCH == 0:
            begin(method, name, clock)
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
    return torch.stack(losses), gradients, {key: value.detach().clone() for key, value in method.state_dict().items()}


def train_all(rank):
    return {name: train(rank, name) for name in NAMES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(train_all, folder=tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def alone():
    return train_all(0)


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one_process(name, ranks, alone):
    """Loss, gradients and all state after three updates, of which the later ones see centres, teachers and palettes."""
    losses, gradients, state = alone[name]
    for one in ranks:
        other_losses, other_gradients, other_state = one[name]
        assert_close(other_losses, losses, rtol=1e-6, atol=1e-9)
        for key, gradient in gradients.items():
            assert_close(other_gradients[key], gradient, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
        for key, value in state.items():
            assert_close(other_state[key], value, rtol=1e-6, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_every_trained_weight_gets_a_finite_gradient(name, alone):
    losses, gradients, _ = alone[name]
    assert bool(losses.isfinite().all())
    assert set(gradients) == {key for key, parameter in build(name).named_parameters() if parameter.requires_grad}
    still = [key for key, gradient in gradients.items() if not bool(gradient.abs().sum() > 0)]
    # Batch normalisation removes what the layer before adds to all samples alike.
    assert not [key for key in still if not ("projector" in key and key.endswith("bias"))], still
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_a_few_samples_by_heart(name):
    method, batch, found = build(name), batch_of(name, torch.arange(8)), []
    begin(method, name, Clock())
    optimizer = torch.optim.Adam(method.parameters(), 0.01)
    for step in range(20):
        clock = Clock(step, 20)
        method.before_step(clock)
        out = method(batch, clock)
        loss = torch.stack(list(out.losses.values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    for value in (*out.losses.values(), *out.health.values()):
        assert value.shape == ()
        assert bool(value.isfinite())
    assert not any(value.requires_grad for value in out.health.values())
    assert out.embedding.shape == (8, 16)
    assert not out.embedding.requires_grad
    assert {normal.metric for normal in method.normal} <= {*out.health}
    assert found[-1] < 0.9 * found[0], found


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_update_leaves_no_trace_in_the_state(name):
    method, clock = build(name), Clock(0, 3, 0)
    begin(method, name, clock)
    before = {key: value.clone() for key, value in method.state_dict().items()}
    for _ in range(2):
        method.before_step(clock)
        method(batch_of(name, torch.arange(8)), clock)
    changed = [key for key, value in before.items() if not torch.equal(value, method.state_dict()[key])]
    assert all("running_" in key or "num_batches" in key for key in changed), changed


@pytest.mark.parametrize("name", ["ibot", "msn", "ijepa", "mp3", "igpt"])
def test_the_views_of_a_recipe_are_what_its_method_takes(name):
    recipe = Recipe.load(f"vision/{name}-demo")
    views, method = recipe.build_views(), recipe.build()
    pixels = torch.randint(256, (4, 40, 36), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    samples = [views(Image.fromarray(own), lambda view, i=i: generator(i, view)) for i, own in enumerate(pixels)]
    found = Batch(views.collate(samples), torch.arange(4))
    losses = method(Batch.from_tensors(found.tensors(), (1, 2, 3, 4)), Clock(0, 10)).losses
    assert all(bool(loss.isfinite()) for loss in losses.values())


# iBOT --------------------------------------------------------------------------------------------------------------------


def test_ibot_is_the_loss_of_the_paper():
    """Pairs of different views, and in each view the patches that are hidden; a view that hides nothing counts as 0."""
    method = build("ibot", teacher_temperature=constant(0.05), patch_temperature=constant(0.06))
    batch, student, teacher = batch_of("ibot", torch.arange(5)), method.student, method.teacher.network
    for parameter in teacher.parameters():
        parameter.data += 0.05 * drawn(4, *parameter.shape)
    method.mask_token.vector.data += 1.0
    method.center.value += drawn(5, 6) * 0.1
    method.patch_center.value += drawn(6, 6) * 0.1
    old, old_patch = method.center.value.clone(), method.patch_center.value.clone()
    out = method(batch, Clock())

    student_cls, teacher_cls, patch, all_patches = [], [], 0.0, []
    for number, view in enumerate(batch.views):
        features = student.encoder.features(view.x).detach().clone()
        if number < 2:
            features[view.mask.hidden] = method.mask_token.vector.detach()
        seen = student.encoder.contextualize(features)
        student_cls.append((student.project(seen.cls) / 0.1).log_softmax(-1))
        if number < 2:
            whole = teacher.encoder(view._replace(mask=None))
            teacher_cls.append(((teacher.project(whole.cls) - old) / 0.05).softmax(-1))
            scores, guesses = teacher.project(whole.tokens), (student.project(seen.tokens) / 0.1).log_softmax(-1)
            all_patches.append(scores.flatten(0, 1))
            for row in range(5):
                places = view.mask.hidden[row].nonzero().flatten().tolist()
                wanted = ((scores[row] - old_patch) / 0.06).softmax(-1)
                patch -= sum((wanted[p] * guesses[row, p]).sum().item() for p in places) / max(len(places), 1) / 10
    pairs = [-(teacher_cls[q] * student_cls[v]).sum(-1).mean() for q in range(2) for v in range(3) if q != v]
    assert not bool(batch.views[0].mask.hidden[0].any())
    assert_close(out.losses["views"], torch.stack(pairs).mean(), rtol=1e-9, atol=0)
    assert out.losses["patches"].item() == pytest.approx(patch, rel=1e-9)
    method.after_step(Clock(1))
    assert_close(method.patch_center.value, 0.9 * old_patch + 0.1 * torch.cat(all_patches).mean(0), rtol=1e-9, atol=1e-12)


def test_ibot_centres_move_as_in_the_reference():
    case = MASKED["ibot_loss"]
    for kind, scores in (("cls", case["teacher_cls"]), ("patch", case["teacher_patch"])):
        center = Center(4).double()
        center.value.copy_(tensor(case[f"center_{kind}"]).flatten())
        for view in tensor(scores):
            center.update(view.flatten(0, -2))
        center.after_step(Clock())
        assert_close(center.value, tensor(case[f"new_center_{kind}"]).flatten(), rtol=1e-12, atol=1e-12)


def test_ibot_schedules_are_the_published_ones():
    method = METHODS["ibot"](build("ibot").student.encoder, prototypes=4, hidden=8, bottleneck=4)
    for epoch, value in MASKED["ibot_teacher_temperature"]["values"].items():
        assert method.teacher_temperature(Clock(epoch=int(epoch))) == pytest.approx(value, abs=1e-12)
        assert method.patch_temperature(Clock(epoch=int(epoch))) == pytest.approx(value, abs=1e-12)
    case = MASKED["ibot_dino_cosine_ema"]
    for i, value in case["m"].items():  # of the update that is number i, from 0
        assert method.teacher.health(Clock(int(i) + 1, case["N"]))["momentum"] == pytest.approx(value, abs=1e-12)
    assert not bool(method.mask_token.vector.any())


def test_ibot_shows_the_teacher_what_is_hidden_from_the_student():
    method, batch = build("ibot"), batch_of("ibot", torch.arange(6))
    student, teacher = method.student.encoder, method.teacher
    moved = [
        view._replace(x=view.x + F.interpolate(view.mask.hidden.view(6, 1, 4, 4).double(), scale_factor=4))
        for view in batch.views[:2]
    ]
    for view, other in zip(batch.views, moved):
        seen, again = (student.contextualize(method.mask_token(student, one)).tokens for one in (view, other))
        assert torch.equal(seen, again)
        assert not torch.allclose(teacher.encode(view, None).tokens, teacher.encode(other, None).tokens)


# MSN -------------------------------------------------------------------------------------------------------------------


def test_msn_is_the_loss_of_the_paper():
    """Targets sharpened, then balanced; the mean assignment of all anchors."""
    method, batch = build("msn", me_max=0.7), batch_of("msn", torch.arange(6))
    for parameter in method.teacher.network.parameters():
        parameter.data += 0.05 * drawn(4, *parameter.shape)
    out = method(batch, Clock())
    student, directions = method.student, F.normalize(method.prototypes.weight, dim=1)

    def assigned(z):
        return (F.normalize(z, dim=1) @ directions.T / 0.1).softmax(1)

    anchor, small = batch.views[1:]
    anchors = [
        assigned(student.project(student.encoder(anchor, anchor.mask).cls)),
        assigned(student.project(student.embed(small))),
    ]
    target = assigned(method.teacher.project(method.teacher.embed(batch.views[0]))).detach() ** 4
    target = (target / target.sum(1, keepdim=True)).T  # prototypes by samples
    target = target / target.sum()
    for _ in range(3):
        target = target / target.sum(1, keepdim=True) / 4
        target = target / target.sum(0, keepdim=True) / 6
    wanted = 6 * target.T
    error = torch.stack([-(wanted * p.log()).sum(1) for p in anchors]).mean()
    mean = torch.cat(anchors).mean(0)
    assert_close(out.losses["assignment"], error, rtol=1e-9, atol=0)
    assert_close(out.losses["me_max"], 0.7 * (math.log(4) + (mean * mean.log()).sum()), rtol=1e-9, atol=1e-12)
    entropy = torch.stack([-(p * p.log()).sum(1) for p in anchors]).mean()
    assert_close(out.losses["entropy"], 0.1 * entropy, rtol=1e-9, atol=0)


def test_msn_takes_several_masks_as_several_anchors():
    """Twice the same mask is the same loss: both rows of a sample meet its own target."""
    method, batch = build("msn"), batch_of("msn", torch.arange(6))
    method.eval()  # batch statistics would not be those of one
    twice = Mask(*(None if t is None else t.repeat_interleave(2, 0) for t in batch.views[1].mask))
    both = batch._replace(views=[batch.views[0], batch.views[1]._replace(mask=twice)])
    once = method(batch._replace(views=batch.views[:2]), Clock())
    for name, loss in method(both, Clock()).losses.items():
        assert_close(loss, once.losses[name], rtol=1e-9, atol=1e-12)


def test_msn_does_not_see_what_was_dropped():
    method, batch = build("msn"), batch_of("msn", torch.arange(6))
    anchor = batch.views[1]
    hidden = F.interpolate(anchor.mask.hidden.view(6, 1, 4, 4).double(), scale_factor=4)
    moved = batch._replace(views=[batch.views[0], anchor._replace(x=anchor.x + hidden), batch.views[2]])
    for name, loss in method(batch, Clock()).losses.items():
        assert torch.equal(loss, method(moved, Clock()).losses[name])


def test_msn_momentum_is_that_of_a_run_1_25_times_as_long():
    method = METHODS["msn"](build("msn").student.encoder, hidden=8, dim=4, prototypes=4)
    found = [method.teacher.health(Clock(step + 1, 1000))["momentum"] for step in (0, 500, 999)]
    assert found == pytest.approx([0.996 + step * 0.004 / 1250 for step in (0, 500, 999)], abs=1e-12)


# What cannot work --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "change", "text"),
    [
        ("ibot-demo", "method.teacher_temperature=0", r"method\.teacher_temperature: from 0.* must be above 0"),
        ("ibot-demo", "method.patch_temperature={start: 0.1, end: 0}", r"method\.patch_temperature: from 0\.1 to 0.*above 0"),
        ("ibot-demo", "views.mask=null", r"views\.mask: ibot learns from hidden tokens"),
        ("ibot-demo", "views.crops=instdisc", r"views: ibot takes 2 full-size views of a sample, these are 1"),
        ("msn-demo", "method.sharpen=0", r"method\.sharpen: .*greater than 0"),
        ("msn-demo", "method.prototypes=1", r"method\.prototypes: .*2"),
    ],
)
def test_what_cannot_work_is_refused(recipe, change, text):
    with pytest.raises(RecipeError, match=text):
        Recipe.load(f"vision/{recipe}", change)


def test_masks_of_another_kind_are_refused():
    batch = batch_of("ibot", torch.arange(4))
    mask = Mask(*(None if t is None else t.repeat_interleave(2, 0) for t in batch.views[0].mask))
    for other in (None, mask):
        with pytest.raises(ValueError, match=r"views\.mask\.copies: ibot takes one mask"):
            build("ibot")(batch._replace(views=[view._replace(mask=other) for view in batch.views]), Clock())
    with pytest.raises(ValueError, match=r"views\.mask: msn needs masks"):
        build("msn")(batch._replace(views=[view._replace(mask=None) for view in batch.views]), Clock())


def test_more_prototypes_than_samples_are_worth_a_note():
    assert build("msn").check_batch(4) == []
    assert build("msn").check_batch(3)[0].startswith("method.prototypes: 4, Sinkhorn spreads the 3 samples")
    assert build("msn", iterations=0).check_batch(3) == []
