"""GMML, SiT, denoising autoencoders, context encoders and AASAE on tiny images."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from mmssl import random
from mmssl.config import Recipe
from mmssl.distributed import all_sum, world
from mmssl.errors import RecipeError
from mmssl.losses.generative import critic, gaussian_kl, weighted_mse
from mmssl.methods import METHODS
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.pixel_head import Critic, ImageDecoder, ImageDecoderOptions, reverse_gradient
from mmssl.parts.corruption import GroupOptions, RegionOptions, noised, overwritten, region
from mmssl.random import generator
from mmssl.schedules import constant
from mmssl.types import Batch, Clock, View
from tests.ranks import on_two_ranks

MASKED = json.loads((Path(__file__).parent.parent / "vectors" / "masked-prediction.json").read_text())
SAMPLES, PATCH = 12, 4
DECODER = ImageDecoderOptions(dim=16, least=8)
OPTIONS = {
    "gmml": {"corruption": GroupOptions(align=2)},
    "sit": {
        "corruption": GroupOptions(share=0.5, fill="zeros"),
        "hidden": 16,
        "dim": 8,
        "momentum": constant(0.9),
    },
    "denoising_autoencoder": {"level": 0.5, "intact_weight": 0.0, "layers": 1},  # whose ranks alter unequal numbers of values
    "context_encoder": {"region": RegionOptions(overlap=1), "decoder": DECODER, "adversarial": 0.1, "critic_width": 8},
    "aasae": {"hidden": 16, "dim": 8, "decoder": DECODER, "kl_weight": 0.01, "learn_scale": True},
}
NAMES = sorted(OPTIONS)


def build(name, **options):
    torch.manual_seed(0)
    config = MmsslConfig(
        modality="vision", image_size=16, patch_size=PATCH, hidden_size=16, depth=2, heads=2, norm="pre", extra_std=0.02
    )
    method = METHODS[name](Encoder.from_config(config), **OPTIONS[name] | options)
    return method.double().train()


def images():
    """(12, 3, 16, 16) of smooth patterns, so that patches tell of each other."""
    draw = generator("images")
    coarse = torch.randn(SAMPLES, 3, 4, 4, generator=draw, dtype=torch.float64)
    noise = torch.randn(SAMPLES, 3, 16, 16, generator=draw, dtype=torch.float64)
    return F.interpolate(coarse, size=(16, 16), mode="bicubic") + 0.3 * noise


def batch_of(name, rows, step=0):
    x = images()[rows]
    views = [View(one, "vision") for one in ([x] if METHODS[name].views == 1 else [x, x.flip(-1) + 0.1])]
    return Batch(views, rows, tuple(random.key(step, row) for row in rows.tolist()))


def total(out):
    return torch.stack(list(out.losses.values())).sum()


# What all of them must keep ---------------------------------------------------------------------------------------------


def train(rank, name, steps=2, rate=0.05):
    """Losses, gradients of the last update, and state, of plain descent on global batches of eight."""
    method, losses, gradients = build(name), [], {}
    for step in range(steps):
        rows = ((torch.arange(8) + 4 * step) % SAMPLES)[rank :: world()]
        out = method(batch_of(name, rows, step), Clock(step, steps))
        total(out).backward()
        losses.append(all_sum(total(out).detach()) / world())
        for key, parameter in method.named_parameters():
            assert parameter.grad is not None, key
            gradients[key] = all_sum(parameter.grad) / world()
            parameter.data -= rate * gradients[key] / (1 + gradients[key].norm())
            parameter.grad = None
        method.after_step(Clock(step + 1, steps))
    health = {key: all_sum(value) / world() for key, value in out.health.items()}
    return torch.stack(losses), gradients, method.state_dict(), health


def train_all(rank):
    return {name: train(rank, name) for name in NAMES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(train_all, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one_process(name, ranks):
    losses, gradients, state, health = train(0, name)
    health.pop("dimensions", None)  # of one rank's samples
    for one in ranks:
        # Counts of altered values are weighed in fp32.
        assert_close(one[name][0], losses, rtol=1e-6, atol=1e-9)
        assert_close(one[name][1], gradients, rtol=1e-5, atol=1e-8)
        assert_close(one[name][2], state, rtol=1e-5, atol=1e-8)
        assert_close({key: one[name][3][key] for key in health}, health, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_every_trained_weight_gets_a_finite_gradient(name):
    _, gradients, _, health = train(0, name)
    assert set(gradients) == {key for key, parameter in build(name).named_parameters() if parameter.requires_grad}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    still = [key for key, one in gradients.items() if not float(one.abs().max()) > 1e-12]
    # Batch normalisation right after the encoder takes away what all samples have in common.
    assert not [key for key in still if (name, key) != ("aasae", "student.encoder.transformer.norm.bias")]
    assert all(value.shape == () and bool(value.isfinite()) and not value.requires_grad for value in health.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_and_health_is_normal(name):
    # A critic gets better while it is being convinced: its sum with the error need not fall.
    method, rows = build(name, **({"adversarial": 0.0} if name == "context_encoder" else {})), torch.arange(SAMPLES)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    lines = []
    for step in range(20):
        out = method(batch_of(name, rows), Clock(step, 20))
        optimizer.zero_grad()
        total(out).backward()
        optimizer.step()
        method.after_step(Clock(step + 1, 20))
        lines.append(float(total(out).detach()))
    assert sum(lines[-3:]) < 0.95 * sum(lines[:3])
    assert method.judge({f"health/{key}": float(value) for key, value in out.health.items()}) == []
    assert out.embedding.shape == (SAMPLES, 16)
    assert not out.embedding.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_no_draw_is_ambient(name):
    method, batch = build(name).eval(), batch_of(name, torch.arange(4))
    torch.manual_seed(1)
    first = method(batch, Clock())
    torch.manual_seed(2)
    assert torch.equal(total(first), total(method(batch, Clock())))
    other = method(batch._replace(keys=tuple(key + 1 for key in batch.keys)), Clock())
    if name != "context_encoder":  # whose square is always in the middle
        assert not torch.equal(total(first), total(other))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_rebuilt_is_of_the_patches_of_the_image(name):
    method, batch = build(name).eval(), batch_of(name, torch.arange(4))
    with torch.no_grad():
        made = method.rebuild(batch, Clock())
    raw = method.student.encoder.features.raw
    assert torch.equal(made.truth, raw(batch.views[0].x))
    assert made.guess.shape == made.truth.shape
    assert made.guess.dtype == made.truth.dtype
    assert made.hidden.shape == made.truth.shape[:2]
    altered = {
        "gmml": lambda: overwritten(batch.views[0].x, batch.keys, method.corruption).altered,
        "sit": lambda: (
            overwritten(batch.views[0].x, [random.key(key, "view", 0) for key in batch.keys], method.corruption).altered
        ),
        "denoising_autoencoder": lambda: noised(batch.views[0].x, batch.keys, "masking", 0.5).altered,
        "context_encoder": lambda: region(batch.keys, 16, torch.device("cpu"), method.region).asked,
        "aasae": lambda: torch.ones(4, 1, 16, 16, dtype=torch.bool),
    }[name]()
    cells = altered.any(1).unflatten(2, (4, 4)).unflatten(1, (4, 4)).any(4).any(2).flatten(1)
    assert torch.equal(made.hidden, cells)
    if name == "context_encoder":
        assert torch.equal(made.guess[~made.hidden], made.truth[~made.hidden])


# GMML and SiT -----------------------------------------------------------------------------------------------------------


def test_gmml_counts_altered_pixels_only_and_sees_the_corrupted_image():
    method, batch = build("gmml"), batch_of("gmml", torch.arange(6))
    (view,), encoder = batch.views, method.student.encoder
    corrupted = overwritten(view.x, batch.keys, method.corruption)
    x = encoder.features(corrupted.x) + encoder.positions.table
    x = torch.cat([encoder.transformer.extra.tokens.expand(6, -1, -1), x], 1)
    outputs = []
    for block in encoder.transformer.blocks:
        x, _ = block(x)
        outputs.append(x)
    assert method.blocks == (2,)
    said = method.head(encoder.transformer.norm(outputs[1])[:, 1:])  # rows, pixels of each patch, channels adjacent
    said = said.view(6, 4, 4, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(6, 3, 16, 16)
    error, count = 0.0, 0
    for b in range(6):
        for r in range(16):
            for c in range(16):
                if corrupted.altered[b, 0, r, c]:
                    error += float((said[b, :, r, c] - view.x[b, :, r, c]).abs().sum().detach())
                    count += 3
    assert_close(float(method(batch, Clock()).losses["rebuilt"].detach()), error / count, rtol=1e-9, atol=0)


def test_the_head_of_gmml_reads_several_depths():
    deep = MmsslConfig(modality="vision", image_size=16, patch_size=4, hidden_size=16, depth=12, heads=2, norm="pre")
    with torch.device("meta"):
        assert set(METHODS["gmml"](Encoder.from_config(deep)).blocks) == {6, 8, 10, 12}
        one = METHODS["gmml"](Encoder.from_config(MmsslConfig(**deep.to_dict() | {"depth": 1})))
        assert one.blocks == (1,)
    method, batch = build("gmml", blocks=(1, 2)), batch_of("gmml", torch.arange(3))
    _, seen, guess = method._guess(batch)
    mean = (seen.layers[0] + seen.layers[1]) / 2
    assert_close(guess, method.head(method.student.encoder.transformer.norm(mean)), rtol=0, atol=0)
    assert [type(layer).__name__ for layer in method.head] == ["Linear", "GELU"] * 3 + ["Linear"]


def test_sit_contrasts_each_corrupted_view_with_the_other_one_whole():
    case = MASKED["sit_contrastive"]
    q, k = torch.tensor(case["q"], dtype=torch.float64), torch.tensor(case["k"], dtype=torch.float64)
    method, batch = build("sit"), batch_of("sit", torch.arange(3))
    seen = []
    method.student.project = lambda h: torch.cat([q, k])
    method.teacher.project_all = lambda h: [q, k]
    method.teacher.embed_all = lambda views: seen.extend(views)
    loss = method(batch, Clock()).losses["contrast"]
    # q with k, and k with q
    back = F.cross_entropy(F.normalize(k) @ F.normalize(q).T / 0.2, torch.arange(3)) * 2 * 0.2
    assert_close(float(loss), case["loss_scaled_2T"] + float(back), rtol=1e-9, atol=0)
    assert all(torch.equal(view.x, clean.x) for view, clean in zip(seen, batch.views, strict=True))


def test_the_views_of_sit_are_corrupted_each_in_its_own_way_and_rebuilt_from_both():
    method, batch = build("sit", rebuild_weight=5.0), batch_of("sit", torch.arange(4))
    corrupted, _, guess = method._guess(batch)
    assert not torch.equal(corrupted.altered[:4], corrupted.altered[4:])
    whole, altered = torch.cat([view.x for view in batch.views]), corrupted.altered.expand(-1, 3, -1, -1)
    said = method.student.encoder.features.unraw(guess)
    assert_close(method(batch, Clock()).losses["rebuilt"], 5 * (said - whole).abs()[altered].mean(), rtol=1e-6, atol=1e-9)
    assert torch.equal(corrupted.x[~altered], whole[~altered])


# Denoising autoencoder --------------------------------------------------------------------------------------------------


def test_a_denoising_autoencoder_weighs_altered_and_intact_values():
    batch = batch_of("denoising_autoencoder", torch.arange(4))
    (view,) = batch.views
    for high, low in ((1.0, 1.0), (2.0, 0.5), (1.0, 0.0), (0.0, 1.0)):
        method = build("denoising_autoencoder", altered_weight=high, intact_weight=low)
        corrupted, _, guess = method._guess(batch)
        square = (method.student.encoder.features.unraw(guess) - view.x).square().detach()
        altered, intact = square[corrupted.altered], square[~corrupted.altered]
        count = altered.numel() * (high > 0) + intact.numel() * (low > 0)
        wanted = (high * altered.sum() + low * intact.sum()) / count
        assert_close(method(batch, Clock()).losses["rebuilt"].detach(), wanted, rtol=1e-6, atol=0)


def test_the_plain_error_is_that_of_torch():
    x, y = torch.randn(2, 4, 3, 5, generator=generator("plain"), dtype=torch.float64)
    assert_close(weighted_mse(x, y, torch.ones(())), F.mse_loss(x, y), rtol=1e-12, atol=0)
    assert float(weighted_mse(x, y, torch.zeros(4, 1, 1))) == 0


# Context encoder --------------------------------------------------------------------------------------------------------


def test_the_gradients_of_both_players_are_those_of_two_separate_losses():
    method, batch = build("context_encoder", adversarial=0.3), batch_of("context_encoder", torch.arange(4))
    (view,), judge = batch.views, method.critic
    total(method(batch, Clock())).backward()
    found = {name: parameter.grad for name, parameter in method.named_parameters()}

    hole, _, guess = method._guess(batch)
    filled = torch.where(hole.asked, guess, view.x)
    ones, zeros = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    bce = F.binary_cross_entropy_with_logits
    of_critic = bce(judge(view.x), ones) + bce(judge(filled.detach()), zeros)  # what it lowers
    error = (guess - view.x).square() * hole.asked * torch.where(hole.hidden, 1.0, 10.0)
    of_maker = 0.7 * error.sum() / (3 * hole.asked.sum()) - 0.3 * bce(judge(filled), zeros)  # log(1 - D), the paper's
    named = dict(method.named_parameters())
    for loss, mine in ((of_critic, True), (of_maker, False)):
        own = [name for name in named if name.startswith("critic.") == mine]
        wanted = torch.autograd.grad(loss, [named[name] for name in own])
        assert_close({name: found[name] for name in own}, dict(zip(own, wanted)), rtol=1e-6, atol=1e-10)


def test_only_what_is_asked_for_counts_and_only_what_is_seen_is_known():
    method, batch = build("context_encoder", adversarial=0.0), batch_of("context_encoder", torch.arange(4))
    (view,) = batch.views
    hole, pooled, guess = method._guess(batch)
    noise = torch.randn(view.x.shape, generator=generator("other"), dtype=torch.float64)
    inside = view._replace(x=torch.where(hole.hidden, noise, view.x))
    assert torch.equal(method._guess(batch._replace(views=[inside]))[1], pooled)
    gradient = torch.autograd.grad(total(method(batch, Clock())), method.decoder.out.bias)[0]
    guess.retain_grad()
    weighted_mse(guess, view.x, hole.asked).backward()
    assert not guess.grad[~hole.asked.expand_as(guess)].any()
    assert float(gradient.abs().sum()) > 0
    assert method.critic is None


def test_a_reversed_gradient_is_the_negative_and_the_value_stays():
    x = torch.randn(5, generator=generator("reverse"), dtype=torch.float64, requires_grad=True)
    y = reverse_gradient(x, 0.25)
    assert torch.equal(x, y)
    (gradient,) = torch.autograd.grad((y**2).sum(), x)
    assert_close(gradient, -0.25 * 2 * x.detach(), rtol=0, atol=0)


def test_a_critic_judges_each_image_by_itself():
    judge = Critic(16, 3, 8).double()
    assert_close(judge(images())[3:5], judge(images()[3:5]), rtol=1e-12, atol=1e-12)
    assert float(critic(torch.zeros(4), torch.zeros(4))) == pytest.approx(2 * 0.6931471805599453)


# AASAE ------------------------------------------------------------------------------------------------------------------


class Says(nn.Module):
    def __init__(self, image):
        super().__init__()
        self.image = image

    def forward(self, z):
        self.z = z
        return self.image.expand(len(z), -1, -1, -1)


def test_aasae_scores_the_image_without_augmentation():
    case = MASKED["aasae"]
    x, mean = (torch.tensor(case[name], dtype=torch.float64).view(1, 3, 1, 1) for name in ("x", "mean"))
    method, batch = build("aasae", log_scale=case["log_scale"], learn_scale=False, kl_weight=0.0).eval(), batch_of(
        "aasae", torch.arange(1)
    )  # fmt: skip
    method.decoder = Says(mean)
    out = method(batch._replace(views=[View(x, "vision"), batch.views[1]]), Clock())
    assert set(out.losses) == {"unlikely"}
    assert_close(float(out.losses["unlikely"]), -case["log_likelihood_sum"], rtol=1e-9, atol=0)


def test_the_code_of_aasae_is_drawn_around_its_mean_from_the_augmented_view():
    method, batch = build("aasae").eval(), batch_of("aasae", torch.arange(3))
    method.decoder = Says(torch.zeros(1, 3, 16, 16, dtype=torch.float64))
    method(batch, Clock())
    h = method.student.embed(batch.views[1])
    noise = torch.stack(
        [
            torch.randn(8, generator=torch.Generator().manual_seed(random.key(k, "code")), dtype=torch.float64)
            for k in batch.keys
        ]
    )
    wanted = method.mean(h) + method.log_variance(h).exp().sqrt() * noise
    assert_close(method.decoder.z, wanted, rtol=1e-12, atol=1e-12)


def test_the_divergence_is_that_of_torch():
    mean, log_variance = torch.randn(2, 5, 4, generator=generator("kl"), dtype=torch.float64)
    wanted = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(torch.zeros(4), torch.ones(4))).sum(1).mean()
    assert_close(gaussian_kl(mean, log_variance), wanted, rtol=1e-12, atol=0)
    assert float(gaussian_kl(torch.zeros(2, 3), torch.zeros(2, 3))) == 0


@pytest.mark.parametrize("size", [8, 32, 96, 224])
def test_a_decoder_makes_images_of_their_size(size):
    with torch.device("meta"):
        assert ImageDecoder(4, size, 3, ImageDecoderOptions(16, 4))(torch.empty(2, 4)).shape == (2, 3, size, size)
        assert Critic(size, 3, 4)(torch.empty(2, 3, size, size)).shape == (2,)


def test_the_first_view_of_the_recipe_is_the_image_and_the_second_one_is_not():
    from PIL import Image

    pixels = torch.randint(256, (32, 32), generator=generator("pixels"), dtype=torch.uint8).numpy()
    views = Recipe.load("vision/aasae-demo").build_views()
    made = views(Image.fromarray(pixels), lambda i: generator("view", i))
    assert_close(made["0.x"][0], torch.from_numpy(pixels).float() / 127.5 - 1, rtol=0, atol=1e-5)
    assert not torch.equal(made["1.x"], made["0.x"])


# What cannot work -------------------------------------------------------------------------------------------------------

REFUSED = [
    ("gmml", "method.corruption={share: 0.95}", r"method\.corruption\.share: 0\.95, must be above 0 and at most 0\.9"),
    ("gmml", "method.corruption={align: 5}", r"method\.corruption\.align: 5, must divide the 32 pixels"),
    ("gmml", "method.corruption={fill: grey}", r"method\.corruption\.fill: found 'grey'"),
    ("gmml", "method.blocks=[1, 2]", r"method\.blocks: \[1, 2\], must be between 1 and 4 \(model\.depth\)"),
    ("gmml", "method.blocks=[0, 4]", r"method\.blocks: \[0, 4\], must be"),
    ("gmml", "views.mask={ratio: 0.5, width: 1, copies: 1}", r"views\.mask: gmml sees whole views; leave it out"),
    ("sit", "method.temperature=0", r"method\.temperature: .*(must|should) (be|lie)"),
    ("sit", "method.rebuild_weight=-1", r"method\.rebuild_weight: .*(must|should) (be|lie)"),
    ("sit", "views.crops=null", r"views: sit takes 2 full-size views of a sample, these are 1"),
    ("denoising_autoencoder", "method.level=1.0", r"method\.level: 1\.0, the chance .* must be below 1"),
    ("denoising_autoencoder", "method.level=0", r"method\.level: .*(must|should) (be|lie)"),
    (
        "denoising_autoencoder",
        ("method.altered_weight=0", "method.intact_weight=0"),
        r"method\.altered_weight: 0, must be above 0",
    ),
    (
        "denoising_autoencoder",
        ("method.altered_weight=0", "method.kind=gaussian"),
        r"method\.altered_weight: 0, must be above 0",
    ),
    ("context_encoder", "method.region={overlap: 8}", r"method\.region\.overlap: 8 pixels.*take at most 7"),
    ("context_encoder", "method.region={share: 1.0}", r"method\.region\.share: 1\.0 of 32 x 32"),
    ("context_encoder", "method.adversarial=1.0", r"method\.adversarial: .*(must|should) (be|lie)"),
    ("context_encoder", "method.decoder={dim: 0}", r"method\.decoder: dim 0 and least"),
    ("context_encoder", "model.image_size=76", r"model\.image_size: 76, .*would begin with 19 pixels"),
    ("aasae", "method.log_scale=100", r"method\.log_scale: 100\.0, must be between -20 and 20"),
    ("aasae", "method.kl_weight=-1", r"method\.kl_weight: .*(must|should) (be|lie)"),
    ("aasae", "views.crops=null", r"views: aasae takes 2 full-size views of a sample, these are 1"),
]


@pytest.mark.parametrize(("name", "more", "text"), REFUSED)
def test_what_cannot_work_is_refused_by_its_key(name, more, text):
    with pytest.raises(RecipeError, match=text):
        Recipe.load(f"vision/{name}-demo", *([more] if isinstance(more, str) else more))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_shared_transformer_on_patches_of_pixels_will_do(name, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"data: {{path: x, modality: vision}}\nmodel: {{backbone: resnet18}}\nmethod: {{name: {name}}}\ntrain: {{steps: 1}}\n"
    )
    with pytest.raises(RecipeError, match=rf"model\.backbone: {name} rebuilds the pixels of patches; leave it out"):
        Recipe.load(str(path))
    with pytest.raises(RecipeError, match=rf"model\.palette: {name} rebuilds pixels"):
        Recipe.load(f"vision/{name}-demo", "model.palette=8", "model.patch_size=1", "model.image_size=8")


@pytest.mark.parametrize("name", ["gmml", "sit"])
def test_a_batch_of_one_has_nothing_to_paste(name):
    with pytest.raises(ValueError, match=r"corruption\.paste: needs another image"):
        build(name).check_batch(1)
    assert build("gmml", corruption=GroupOptions(paste=0.0)).check_batch(1) == []
