"""MAE, SimMIM, BEiT, CAE and SplitMask on tiny images."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans
from torch.testing import assert_close

from mmssl.config import Recipe
from mmssl.distributed import all_sum, world
from mmssl.errors import RecipeError
from mmssl.masks import uniform
from mmssl.methods import METHODS
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.regressor import RegressorOptions
from mmssl.model.token_decoder import TokenDecoderOptions
from mmssl.parts.tokenizer import Tokenizer, TokenizerOptions
from mmssl.random import generator
from mmssl.training.survey import check_stream
from mmssl.types import Batch, Clock, Mask, View
from tests.losses.cases import MASKED
from tests.ranks import on_two_ranks

SAMPLES, LENGTH, PATCH = 12, 16, 4
DECODER = TokenDecoderOptions(dim=16, depth=1, heads=2)
TOKENIZER = TokenizerOptions(codes=8, iterations=5)
RANDOM = TokenizerOptions(codes=8, dim=4, kind="random")
OPTIONS = {
    "mae": {"decoder": DECODER},
    "simmim": {},
    "beit": {"tokenizer": TOKENIZER},
    "cae": {"tokenizer": RANDOM, "regressor": RegressorOptions(depth=2, decoder_depth=1, heads=2)},
    "splitmask": {"tokenizer": RANDOM, "decoder": DECODER},
}
RATIO = {"mae": 0.75}
NAMES = sorted(OPTIONS)


def build(name, **options):
    torch.manual_seed(0)
    config = MmsslConfig(
        modality="vision", image_size=16, patch_size=PATCH, hidden_size=16, depth=2, heads=2, norm="pre", extra_std=0.02
    )
    method = METHODS[name](Encoder.from_config(config), **OPTIONS[name] | options)
    method.attach(SAMPLES, 0)
    return method.double().train()


def images():
    """(12, 3, 16, 16) of smooth patterns, so that patches tell of each other."""
    draw = generator("images")
    coarse = torch.randn(SAMPLES, 3, 4, 4, generator=draw, dtype=torch.float64)
    noise = torch.randn(SAMPLES, 3, 16, 16, generator=draw, dtype=torch.float64)
    return F.interpolate(coarse, size=(16, 16), mode="bicubic") + 0.3 * noise


def batch_of(name, rows, copies=1):
    ratio = RATIO.get(name, 0.5)
    hidden = torch.cat([uniform(LENGTH, copies, ratio, generator("mask", int(row))) for row in rows])
    return Batch([View(images()[rows], "vision", mask=Mask.of(hidden))], rows, tuple(rows.tolist()))


def begin(method):
    """The stage before the first pass."""
    clock = Clock(0, 20, 0)
    method.eval()
    with torch.no_grad():
        described = method.describe(View(images(), "vision")) if method.needs_description(clock) else None
    method.on_epoch(clock, described)
    method.train()
    return method


def total(out):
    return torch.stack(list(out.losses.values())).sum()


# What all of them must keep ---------------------------------------------------------------------------------------------


def train(rank, name, steps=2, rate=0.1):
    """Losses, gradients of the last update, and state, of plain descent on global batches of eight."""
    method, losses, gradients = begin(build(name)), [], {}
    for step in range(steps):
        rows = ((torch.arange(8) + 4 * step) % SAMPLES)[rank :: world()]
        out = method(batch_of(name, rows, copies=2), Clock(step, steps))
        total(out).backward()
        losses.append(all_sum(total(out).detach()) / world())
        for key, parameter in method.named_parameters():
            assert parameter.grad is not None, key
            gradients[key] = all_sum(parameter.grad) / world()
            parameter.data -= rate * gradients[key]
            parameter.grad = None
    return torch.stack(losses), gradients, method.state_dict(), out.health


def train_all(rank):
    return {name: train(rank, name) for name in NAMES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(train_all, folder=tmp_path_factory.mktemp("ranks"))


@pytest.mark.distributed
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_equal_one_process(name, ranks):
    losses, gradients, state, health = train(0, name)
    for one in ranks:
        assert_close(one[name][0], losses, rtol=1e-9, atol=1e-12)
        assert_close(one[name][1], gradients, rtol=1e-7, atol=1e-10)
        assert_close(one[name][2], state, rtol=1e-7, atol=1e-10)
        assert_close(one[name][3], health, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_every_trained_weight_gets_a_finite_gradient(name):
    _, gradients, _, health = train(0, name)
    assert set(gradients) == {key for key, parameter in build(name).named_parameters() if parameter.requires_grad}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    # All keys of attention may share an offset without effect.
    still = [key for key, one in gradients.items() if not float(one.abs().max()) > 1e-12]
    assert not [key for key in still if not key.endswith("norm_k.bias")], still
    assert all(value.shape == () and bool(value.isfinite()) and not value.requires_grad for value in health.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls_and_health_is_normal(name):
    method, rows = begin(build(name)), torch.arange(SAMPLES)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    lines = []
    for step in range(20):
        out = method(batch_of(name, rows), Clock(step, 20))
        optimizer.zero_grad()
        total(out).backward()
        optimizer.step()
        lines.append(float(total(out).detach()))
    assert lines[-1] < 0.95 * lines[0]
    assert method.judge({f"health/{key}": float(value) for key, value in out.health.items()}) == []
    assert out.embedding.shape == (SAMPLES, 16)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_hidden_reaches_the_loss_only_as_a_target(name):
    """Pixels under the mask change no embedding of visible-only encoders, and none of encoders that see a token there."""
    method, batch = begin(build(name)).eval(), batch_of(name, torch.arange(4))
    view = batch.views[0]
    hidden = view.mask.hidden.view(4, 1, 4, 4).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    other = view._replace(x=torch.where(hidden, view.x.flip(0), view.x))
    first, second = method(batch, Clock()), method(batch._replace(views=[other]), Clock())
    if name != "splitmask":  # both of whose halves are seen
        assert torch.equal(first.embedding, second.embedding)
    assert not torch.equal(total(first), total(second))


# MAE --------------------------------------------------------------------------------------------------------------------


def native_names(depth, layers):
    """Ours -> transformers', but for fused projections."""
    names = {"student.encoder.transformer.extra.tokens": "vit.embeddings.cls_token", "decoder.token": "decoder.mask_token"}
    pairs = {
        "student.encoder.features.proj": "vit.embeddings.patch_embeddings.projection",
        "student.encoder.transformer.norm": "vit.layernorm",
        "decoder.embed": "decoder.decoder_embed",
        "decoder.norm": "decoder.decoder_norm",
        "decoder.proj": "decoder.decoder_pred",
    }
    blocks = [(f"student.encoder.transformer.blocks.{i}", f"vit.layers.{i}") for i in range(depth)]
    blocks += [(f"decoder.blocks.{i}", f"decoder.decoder_layers.{i}") for i in range(layers)]
    for ours, theirs in blocks:
        pairs |= {f"{ours}.norm1": f"{theirs}.layernorm_before", f"{ours}.norm2": f"{theirs}.layernorm_after"}
        pairs |= {f"{ours}.mlp.{n}": f"{theirs}.mlp.{n}" for n in ("fc1", "fc2")}
        pairs[f"{ours}.attn.proj"] = f"{theirs}.attention.o_proj"
    names |= {f"{a}.{kind}": f"{b}.{kind}" for a, b in pairs.items() for kind in ("weight", "bias")}
    return names, blocks


@pytest.mark.parametrize("normalise", [True, False])
def test_mae_is_that_of_transformers(normalise):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

    native = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4,
            layer_norm_eps=1e-6, decoder_hidden_size=24, decoder_num_hidden_layers=2, decoder_num_attention_heads=3,
            decoder_intermediate_size=96, mask_ratio=0.75, norm_pix_loss=normalise, attn_implementation="sdpa",
        )
    ).double().eval()  # fmt: skip
    for name, parameter in native.named_parameters():
        if "pos" not in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator("native", name))
    ours = build("mae", decoder=TokenDecoderOptions(dim=24, depth=2, heads=3), normalise=normalise)
    encoder, theirs = ours.student.encoder, dict(native.state_dict())
    tables = {"vit.embeddings.position_embeddings": encoder.positions.table, "decoder.decoder_pos_embed": ours.decoder.codes}
    for name, table in tables.items():  # a fresh model of theirs has zeros there, the released ones have the column first
        rows_first = build_2d_sinusoidal_position_embedding(4, 4, table.shape[-1])
        assert torch.equal(rows_first.roll(table.shape[-1] // 2, -1), table.view(LENGTH, -1).float())
        theirs[name][0, 1:].copy_(table.view(LENGTH, -1))
    names, blocks = native_names(2, 2)
    weights = {a: theirs[b].view_as(ours.state_dict()[a]) for a, b in names.items()}
    for a, b in blocks:
        for kind in ("weight", "bias"):
            weights[f"{a}.attn.qkv.{kind}"] = torch.cat([theirs[f"{b}.attention.{q}_proj.{kind}"] for q in "qkv"])
    missing = ours.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert {key.split(".")[-1] for key in missing.missing_keys} <= {"table"}

    noise = torch.rand(SAMPLES, LENGTH, generator=generator("noise"), dtype=torch.float64)
    kept = noise.argsort(1)[:, :4]
    mask = Mask.of(torch.ones(SAMPLES, LENGTH, dtype=torch.bool).scatter_(1, kept, False))
    view = View(images(), "vision", mask=mask)
    wanted = native(images(), noise=noise, output_hidden_states=True)
    assert torch.equal(wanted.mask.bool(), mask.hidden)
    out = ours(Batch([view], torch.arange(SAMPLES)), Clock())
    assert_close(out.losses["rebuilt"], wanted.loss, rtol=0, atol=1e-10)
    visible, guess, _ = ours._guess(view)
    order = kept.argsort(1)[..., None]
    last = native.vit(images(), noise=noise).last_hidden_state
    assert_close(visible.cls, last[:, 0], rtol=0, atol=1e-10)
    assert_close(visible.tokens, last[:, 1:].gather(1, order.expand(-1, -1, 16)), rtol=0, atol=1e-10)
    asked = wanted.logits.gather(1, mask.rest[..., None].expand(-1, -1, 48))
    assert_close(guess, asked, rtol=0, atol=1e-10)


def test_what_mae_rebuilds_has_the_pixels_of_what_is_seen_and_the_scale_of_what_is_not():
    method, batch = build("mae"), batch_of("mae", torch.arange(4), copies=2)
    (view,) = batch.views
    made = method.rebuild(batch, Clock())
    raw = method.student.encoder.features.raw(view.x).repeat_interleave(2, 0)
    assert torch.equal(made.truth, raw)
    assert torch.equal(made.guess[~made.hidden], raw[~made.hidden])
    perfect = (raw - raw.mean(-1, keepdim=True)) / (raw.var(-1, keepdim=True) + 1e-6).sqrt()
    method._guess = lambda view: (None, perfect.gather(1, view.mask.rest[..., None].expand(-1, -1, 48)),
                                  raw.gather(1, view.mask.rest[..., None].expand(-1, -1, 48)))  # fmt: skip
    assert_close(method.rebuild(batch, Clock()).guess, raw, rtol=1e-5, atol=1e-5)


# SimMIM -----------------------------------------------------------------------------------------------------------------


def test_simmim_is_the_sum_over_hidden_pixels_divided_by_their_number():
    method, batch = build("simmim"), batch_of("simmim", torch.arange(4))
    (view,) = batch.views
    made = method.rebuild(batch, Clock())
    features = method.student.encoder.features
    error = (features.unraw(made.guess) - view.x).abs()  # (4, 3, 16, 16)
    shown = view.mask.hidden.view(4, 1, 4, 4).repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    wanted = (error * shown).sum() / shown.sum() / 3
    assert_close(method(batch, Clock()).losses["rebuilt"], wanted, rtol=1e-12, atol=1e-12)


# Codes ------------------------------------------------------------------------------------------------------------------


def patches(count=40, draws="patches"):
    return torch.randn(count, LENGTH, 48, generator=generator(draws), dtype=torch.float64)


def test_kmeans_codes_are_those_of_the_nearest_centroid_of_normalised_patches():
    tokenizer = Tokenizer(48, TokenizerOptions(codes=8, iterations=20)).double()
    tokenizer.attach(40, LENGTH, 0)
    tokenizer.fit(tokenizer.sample(patches()))
    rows = patches().flatten(0, 1)
    rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    found = tokenizer(patches()).flatten()
    assert torch.equal(found, torch.cdist(rows, tokenizer.codes).argmin(1))
    inertia = float((rows - tokenizer.codes[found]).square().sum())
    best = KMeans(8, n_init=3, random_state=0).fit(rows.numpy()).inertia_
    assert inertia < 1.02 * best


def test_codes_know_neither_brightness_nor_contrast_nor_whom_they_are_batched_with():
    for options in (TOKENIZER, RANDOM):
        tokenizer = Tokenizer(48, options).double()
        found = tokenizer(patches())
        assert found.dtype == torch.int64
        assert torch.equal(found, tokenizer(3 * patches() + 1))
        assert torch.equal(found[3:4], tokenizer(patches()[3:4]))
        assert len(found.unique()) > 4
        assert not [name for name, _ in tokenizer.named_parameters()]
        same = Tokenizer(48, options).double()
        same.load_state_dict(tokenizer.state_dict())
        assert torch.equal(found, same(patches()))


def test_random_codes_are_the_direction_nearest_to_the_projection():
    tokenizer = Tokenizer(48, RANDOM).double()
    x = F.layer_norm(patches(), (48,)) @ tokenizer.projection
    wanted = F.cosine_similarity(x[:, :, None], tokenizer.codes, dim=-1).argmax(-1)
    assert torch.equal(tokenizer(patches()), wanted)


def test_patches_to_fit_to_come_from_everywhere_and_only_once():
    tokenizer = Tokenizer(48, TokenizerOptions(codes=8, patches=5 * 400))
    tokenizer.attach(400, LENGTH, 0)
    numbered = torch.randn(400, LENGTH, 48, generator=generator("all"))
    numbered[..., 0] = torch.arange(LENGTH)
    places = tokenizer.sample(numbered).view(400, 5, 48)[..., 0].long()
    assert all(len(row.unique()) == 5 for row in places)
    counts = places.flatten().bincount(minlength=LENGTH)
    assert float((counts - 125).abs().max()) < 50  # 5 standard deviations
    assert torch.equal(tokenizer.sample(numbered[7:9]), tokenizer.sample(numbered)[7:9])


def test_use_of_codes_is_the_share_of_equally_used_ones():
    tokenizer = Tokenizer(48, TOKENIZER)
    assert float(tokenizer.use(torch.arange(8).repeat(5))) == pytest.approx(1.0)
    assert float(tokenizer.use(torch.zeros(2, 9, dtype=torch.int64))) == pytest.approx(1 / 8)
    assert float(tokenizer.use(torch.tensor([1, 1, 5, 5, 6, 6, 7, 7]))) == pytest.approx(0.5)


def test_codes_are_those_of_the_crop_and_flip_that_is_seen():
    method, rows = begin(build("beit")), torch.arange(3)
    raw = method.student.encoder.features.raw
    whole, flipped = images()[rows], images()[rows].flip(3)
    grid = method.tokenizer(raw(whole)).view(3, 4, 4)
    assert not torch.equal(method.tokenizer(raw(flipped)).view(3, 4, 4), grid)
    by_hand = torch.stack([
        torch.stack([method.tokenizer(raw(flipped[..., 4 * r : 4 * r + 4, 4 * c : 4 * c + 4]))[:, 0] for c in range(4)], 1)
        for r in range(4)
    ], 1)  # fmt: skip
    assert torch.equal(by_hand, method.tokenizer(raw(flipped)).view(3, 4, 4))


def test_beit_counts_hidden_patches_only_and_takes_masks_of_any_number():
    method, rows = begin(build("beit")), torch.arange(4)
    (view,) = batch_of("beit", rows).views
    hidden = view.mask.hidden.clone()
    hidden[0], hidden[1, :3] = False, False
    view = view._replace(mask=Mask.replacing(hidden))
    method.head = torch.nn.Linear(16, 8).double()
    out = method(Batch([view], rows), Clock())
    encoder = method.student.encoder
    x = torch.where(hidden[..., None], method.mask_token.vector, encoder.features(view.x))
    logits = method.head(encoder.contextualize(x).tokens)
    codes = method.tokenizer(encoder.features.raw(view.x))
    wanted = [-logits[b, t].log_softmax(0)[codes[b, t]] for b in range(4) for t in range(LENGTH) if hidden[b, t]]
    assert_close(out.losses["codes"], torch.stack(wanted).mean(), rtol=1e-10, atol=1e-12)


def test_mae_has_as_many_parameters_as_that_of_the_authors():
    shapes = {
        "cifar32_p4": (32, 4, 192, 12, 96, 2),
        "cifar32_p2": (32, 2, 192, 12, 192, 4),
        "img64_p8": (64, 8, 384, 12, 192, 4),
    }
    for name, told in MASKED["mae_params_small"].items():
        size, patch, width, depth, dim, layers = shapes["_".join(name.split("_")[:2])]
        with torch.device("meta"):
            config = MmsslConfig("vision", width, depth, 3, norm="pre", image_size=size, patch_size=patch)
            method = METHODS["mae"](Encoder.from_config(config), TokenDecoderOptions(dim=dim, depth=layers, heads=3))
        encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (method.student, method.decoder))
        places = (size // patch) ** 2 + 1
        assert (encoder, decoder) == (told["encoder_trainable"], told["decoder_trainable"])
        with_places = encoder + places * width, decoder + places * dim
        assert with_places == (told["encoder_with_pos"], told["decoder_with_pos"])
        assert sum(with_places) == told["total"]


# CAE and SplitMask ------------------------------------------------------------------------------------------------------


def test_cae_adds_its_terms_as_the_authors_do(monkeypatch):
    case, method, batch = MASKED["cae_total"], build("cae"), batch_of("cae", torch.arange(4))
    monkeypatch.setattr("mmssl.losses.masked_cross_entropy", lambda *given: torch.tensor(case["ce_main"]))
    monkeypatch.setattr("mmssl.losses.masked_patch_mse", lambda *given: torch.tensor(case["mse_align"]))
    assert method.alignment == case["align_weight"]
    assert float(total(method(batch, Clock()))) == pytest.approx(case["total"])


def test_cae_regresses_the_encoder_s_own_latents_of_the_hidden_patches():
    method, batch = build("cae"), batch_of("cae", torch.arange(4))
    (view,), encoder = batch.views, method.student.encoder
    out = method(batch, Clock())
    target = encoder(view, Mask.of(~view.mask.hidden)).tokens.detach()
    latents, logits = method.regressor(encoder(view, view.mask).tokens, view.mask)
    assert_close(out.losses["alignment"], 2 * F.mse_loss(latents, target), rtol=1e-10, atol=1e-12)
    places = [row.nonzero().flatten() for row in view.mask.hidden]
    codes = torch.stack([row[at] for row, at in zip(method.tokenizer(encoder.features.raw(view.x)), places)])
    assert_close(out.losses["codes"], F.cross_entropy(logits.flatten(0, 1), codes.flatten()), rtol=1e-10, atol=1e-12)


def test_the_decoder_of_cae_sees_latents_only_and_visible_tokens_stay_as_they_are():
    method, batch = build("cae"), batch_of("cae", torch.arange(4))
    (view,) = batch.views
    visible = method.student.encoder(view, view.mask).tokens.detach().requires_grad_()
    latents, _ = method.regressor(visible, view.mask)
    fixed = latents.detach()
    for block in method.regressor.blocks:
        block.forward = lambda asked, *rest: fixed  # then nothing that is visible can reach the codes
    method.regressor.norm = torch.nn.Identity()
    first = method.regressor(visible, view.mask)[1]
    assert torch.equal(first, method.regressor(visible + 1, view.mask)[1])
    assert float(torch.autograd.grad(latents[..., 0].sum(), visible)[0].abs().sum()) > 0  # the regressor does see them


def test_splitmask_s_halves_partition_the_patches_and_say_each_other_s_codes():
    method, batch = build("splitmask", contrast=0.0), batch_of("splitmask", torch.arange(4))
    (view,), encoder = batch.views, method.student.encoder
    other = view.mask.complement()
    assert torch.equal(other.hidden, ~view.mask.hidden)
    codes, each = method.tokenizer(encoder.features.raw(view.x)), []
    for mask in (view.mask, other):
        said = method.head(method.decoder(encoder(view, mask), mask))
        each.append(F.cross_entropy(said.flatten(0, 1), codes.gather(1, mask.rest).flatten()))
    out = method(batch, Clock())
    assert set(out.losses) == {"codes"}
    assert_close(out.losses["codes"], each[0] + each[1], rtol=1e-10, atol=1e-12)
    assert "halves" in build("splitmask")(batch, Clock()).losses


# What cannot work -------------------------------------------------------------------------------------------------------

REFUSED = [
    ("beit", "method.tokenizer={codes: 1}", r"method\.tokenizer\.codes: 1, must be between 2"),
    ("beit", "method.tokenizer={dim: 0}", r"method\.tokenizer: dim, iterations and patches must be at least 1"),
    ("beit", "method.tokenizer={kind: vqgan}", r"method\.tokenizer\.kind: found 'vqgan'"),
    ("cae", "method.alignment=-1", r"method\.alignment: .*(must|should) (be|lie)"),
    ("cae", "method.regressor={heads: 5}", r"method\.regressor: heads 5 must divide hidden_size"),
    ("splitmask", "method.temperature=0", r"method\.temperature: .*(must|should) (be|lie)"),
    ("splitmask", "method.decoder={dim: 6, heads: 4}", r"method\.decoder: dim 6 must be a multiple of 4"),
    ("mae", "method.decoder={depth: 0}", r"method\.decoder: .*depth at least 1"),
    ("mae", "views.mask=null", r"views\.mask: mae learns from hidden tokens"),
    ("mae", "views.mask={ratio: 1.0}", r"views\.mask\.ratio: 1\.0 of 64 patches leaves nothing or everything visible"),
    ("simmim", "views.mask={width: 3}", r"views\.mask\.width: 3, squares must divide the 8 x 8 patches; take one of 1, 2, 4"),
    ("simmim", "views.mask={ratio: 0.0}", r"views\.mask\.ratio: 0\.0 of 64"),
]


@pytest.mark.parametrize(("name", "more", "text"), REFUSED)
def test_what_cannot_work_is_refused_by_its_key(name, more, text):
    with pytest.raises(RecipeError, match=text):
        Recipe.load(f"vision/{name}-demo", more)


@pytest.mark.parametrize("name", ["beit", "cae", "splitmask"])
def test_more_codes_than_patches_are_refused(name):
    method = build(name)
    with pytest.raises(ValueError, match=r"tokenizer\.codes: 8, the data hold 0 patches; use fewer codes"):
        method.attach(0, 0)
    with pytest.raises(ValueError, match=r"views\.mask"):
        method(batch_of(name, torch.arange(2))._replace(views=[View(images()[:2], "vision")]), Clock())


def test_a_single_image_has_no_negatives():
    with pytest.raises(ValueError, match=r"train\.global_batch: a micro-batch of 1 sample has no negatives"):
        build("splitmask").check_batch(1)
    assert build("splitmask", contrast=0.0).check_batch(1) == []


def test_a_stream_cannot_be_clustered_beforehand_and_needs_not_be():
    recipe = Recipe.load("vision/beit-demo")
    with pytest.raises(RecipeError, match=r"data\.streaming: "):
        check_stream(recipe.build(), recipe)
    chance = Recipe.load("vision/beit-demo", "method.tokenizer={kind: random, codes: 64}")
    check_stream(chance.build(), chance)
