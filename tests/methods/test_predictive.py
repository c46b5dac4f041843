"""I-JEPA, MP3 and image GPT against their definitions; what all methods must keep is in `test_masked_teachers.py`."""

import math
import sys
import types
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

from mmssl import random
from mmssl.config import Recipe
from mmssl.errors import RecipeError
from mmssl.hub.flatten import flatten
from mmssl.methods import METHODS
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.token_decoder import TokenDecoderOptions
from mmssl.registry import modality
from mmssl.types import Batch, Clock, View
from tests.losses.cases import MASKED
from tests.methods.test_masked_teachers import OPTIONS, SAMPLES, batch_of, begin, build, drawn, encoder

# I-JEPA ------------------------------------------------------------------------------------------------------------------


def test_ijepa_predicts_each_block_apart_from_the_others():
    """One block at a time gives the same predictions; the target is the teacher's, normed, under smooth L1."""
    method, batch = build("ijepa"), batch_of("ijepa", torch.arange(5))
    for parameter in method.teacher.network.parameters():
        parameter.data += 0.1 * drawn(4, *parameter.shape)
    (view,), errors = batch.views, []
    whole = F.layer_norm(method.teacher.network.encoder(view._replace(mask=None)).tokens, (16,))
    for group in range(2):
        alone = view.mask._replace(wanted=view.mask.wanted[:, group : group + 1])
        guess = method.predictor(method.student.encoder(view, view.mask), alone)  # (5, 4, 16)
        target = whole.gather(1, alone.wanted[:, 0, :, None].expand(-1, -1, 16))
        errors.append(F.smooth_l1_loss(guess, target))
    out = method(batch, Clock())
    assert_close(out.losses["features"], torch.stack(errors).mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("collect", ["ffn", "block"])
def test_ijepa_may_predict_the_mean_of_several_layers(collect):
    """Each with mean 0 and variance 1 in every channel of an image, then the mean normed as the paper's target is."""
    method, batch = build("ijepa", top_k=2, collect=collect), batch_of("ijepa", torch.arange(5))
    (view,), given = batch.views, []
    for block in method.teacher.network.encoder.transformer.blocks:
        part = block.mlp if collect == "ffn" else block
        part.register_forward_hook(lambda _, __, out: given.append(out[0] if isinstance(out, tuple) else out))
    method.teacher.network.encoder(view._replace(mask=None))
    normed = [F.instance_norm(layer.transpose(1, 2), eps=1e-5).transpose(1, 2) for layer in given]
    whole = F.layer_norm((normed[0] + normed[1]) / 2, (16,))
    guess = method.predictor(method.student.encoder(view, view.mask), view.mask)  # (5 * 2, 4, 16)
    target = whole.repeat_interleave(2, 0).gather(1, view.mask.wanted.flatten(0, 1)[..., None].expand(-1, -1, 16))
    assert_close(method(batch, Clock()).losses["features"], F.smooth_l1_loss(guess, target), rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match=r"^top_k: 3 layers to average, the trunk has 2"):
        build("ijepa", top_k=3)


def test_ijepa_student_sees_the_context_only_and_the_teacher_all():
    method, batch = build("ijepa"), batch_of("ijepa", torch.arange(5))
    (view,) = batch.views
    moved = view._replace(x=view.x + F.interpolate(view.mask.hidden.view(5, 1, 4, 4).double(), scale_factor=4))
    guesses = [method.predictor(method.student.encoder(one, view.mask), view.mask) for one in (view, moved)]
    assert torch.equal(*guesses)
    found = [method(batch._replace(views=[one]), Clock()).losses["features"] for one in (view, moved)]
    assert not torch.allclose(*found)


def test_ijepa_momentum_is_the_published_one():
    case = MASKED["ema_linear_schedule"]
    method = METHODS["ijepa"](build("ijepa").student.encoder, TokenDecoderOptions(8, 1, 2))
    steps = case["ipe"] * case["epochs"]
    for i, value in case["m"].items():
        assert method.teacher.health(Clock(int(i) + 1, steps))["momentum"] == pytest.approx(value, abs=1e-12)


def test_a_collapsed_teacher_is_named():
    method, batch = build("ijepa"), batch_of("ijepa", torch.arange(5))
    judged = lambda: method.judge({f"health/{name}": float(v) for name, v in method(batch, Clock()).health.items()})  # noqa: E731
    assert not [line for line in judged() if "target_std" in line]
    method.teacher.encoder.transformer.norm.weight.data.zero_()  # the same feature everywhere
    assert any("targets hardly differ" in line for line in judged())


def test_masks_without_groups_are_refused():
    batch = batch_of("ijepa", torch.arange(5))
    for mask in (None, batch.views[0].mask._replace(wanted=None)):
        with pytest.raises(ValueError, match=r"views\.mask\.kind: ijepa needs groups.*multiblock"):
            build("ijepa")(batch._replace(views=[batch.views[0]._replace(mask=mask)]), Clock())


# MP3 -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "name"), [(8, "mp3_64"), (14, "mp3_196")])
def test_mp3_begins_at_chance(side, name):
    method = build("mp3", {"image_size": 4 * side})
    out = method(Batch([View(drawn(0, 4, 3, 4 * side, 4 * side), "vision")], torch.arange(4), (1, 2, 3, 4)), Clock())
    assert out.losses["places"].item() == pytest.approx(MASKED["initial_losses"]["values"][name], rel=0.02)


def test_mp3_cannot_tell_places_but_from_content():
    """Moving patches moves what is said of them; a token that is no key changes nothing but itself."""
    method, rows = build("mp3"), torch.arange(3)
    features = method.student.encoder.features(batch_of("mp3", rows).views[0].x)
    attend = torch.arange(16).expand(3, -1) % 2 == 0
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    encode = method.student.encoder.contextualize
    plain = encode(features, attend=attend).tokens
    assert_close(encode(features[:, order], attend=attend[:, order]).tokens, plain[:, order], rtol=1e-9, atol=1e-12)
    changed = features.clone()
    changed[:, 3] += 1.0
    moved = (encode(changed, attend=attend).tokens - plain).abs().sum(-1) > 0
    assert moved.nonzero()[:, 1].unique().tolist() == [3]


def test_mp3_keys_are_so_many_and_those_of_the_sample():
    method, batch = build("mp3", ratio=0.7), batch_of("mp3", torch.arange(6))
    (view,) = batch.views
    features = method.student.encoder.features(view.x)
    keys = method._keys(view, features, batch)
    assert keys.sum(1).tolist() == [4] * 6  # floor(16 * 0.3)
    assert len(keys.unique(dim=0)) > 1
    apart = [method._keys(view, features[i : i + 1], batch._replace(keys=batch.keys[i : i + 1])) for i in range(6)]
    assert torch.equal(torch.cat(apart), keys)
    pad = torch.arange(16)[None] >= torch.tensor([16, 10, 2, 16, 10, 1])[:, None]
    padded = method._keys(view._replace(pad=pad), features, batch)
    assert padded.sum(1).tolist() == [4, 3, 1, 4, 3, 1]
    assert not bool((padded & pad).any())
    short = method._keys(view._replace(pad=pad[1:2, :10]), features[1:2, :10], batch._replace(keys=batch.keys[1:2]))
    assert torch.equal(short[0], padded[1, :10])  # whatever it is padded to


def test_mp3_places_are_relative_where_lengths_differ():
    """Sixteen tokens in four classes are four each, ten are 3, 2, 3 and 2: place * 4 // 10."""
    method, batch = build("mp3", places=4), batch_of("mp3", torch.arange(2))
    method.head.weight.data.zero_()
    method.head.bias.data = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    pad = torch.arange(16)[None] >= torch.tensor([16, 10])[:, None]
    out = method(batch._replace(views=[batch.views[0]._replace(pad=pad)]), Clock())
    nats = -method.head.bias.log_softmax(0)
    wanted = sum(nats[t // 4] for t in range(16)) + sum(nats[t * 4 // 10] for t in range(10))
    assert_close(out.losses["places"], wanted / 26, rtol=1e-9, atol=0)
    assert float(out.health["accuracy"]) == pytest.approx((4 + 2) / 26)


SOUND_AND_TEXT = {
    "speech": {"positions": "none", "alibi": False, "conv_channels": 8},
    "spectrogram": {"positions": "none", "bands": 8, "frames": 64, "patch_frames": 2},
    "text": {"positions": "none", "vocab_size": 50, "max_tokens": 16},
}


def heard(kind, **options):
    """MP3 on sound or text, and a view of ten tokens for each of four samples."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "depth": 2, "heads": 2, "norm": "pre", "extra_tokens": 0} | SOUND_AND_TEXT[kind]
    method = METHODS["mp3"](Encoder.from_config(MmsslConfig(modality=kind, **shape)), **({"places": 5} | options)).double()
    x = {
        "speech": drawn(0, 4, 400 + 9 * 320),
        "spectrogram": drawn(0, 4, 20, 8),
        "text": torch.randint(2, 50, (4, 10), generator=torch.Generator().manual_seed(0)),
    }
    return method, Batch([View(x[kind], kind)], torch.arange(4), (1, 2, 3, 4))


@pytest.mark.parametrize("kind", SOUND_AND_TEXT)
def test_mp3_places_sound_and_text_in_bins(kind):
    """Ten tokens in five classes are two each, which zero weights and these biases tell apart."""
    method, batch = heard(kind)
    assert method(batch, Clock()).losses["places"].item() == pytest.approx(math.log(5), rel=0.05)
    method.head.weight.data.zero_()
    method.head.bias.data = torch.arange(5.0, dtype=torch.float64)
    out = method(batch, Clock())
    assert_close(out.losses["places"], -method.head.bias.log_softmax(0).mean(), rtol=1e-9, atol=0)
    assert float(out.health["accuracy"]) == pytest.approx(0.2)
    assert int(method.terms(batch)) == 40
    pad = torch.arange(10) >= torch.tensor([10, 4, 10, 1])[:, None]
    assert int(method.terms(batch._replace(views=[batch.views[0]._replace(pad=pad)]))) == 25


@pytest.mark.parametrize("kind", SOUND_AND_TEXT)
def test_features_without_positions_do_not_tell_places(kind):
    method, batch = heard(kind)
    x, step = batch.views[0].x, {"speech": 320, "spectrogram": 2, "text": 1}[kind]
    encoder = method.student.encoder
    assert_close(encoder.features(x[:, 3 * step :]), encoder.features(x)[:, 3:], rtol=1e-9, atol=1e-12)
    tokens, bias = encoder.positions(encoder.features(x))
    assert bias is None
    assert torch.equal(tokens, encoder.features(x))


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        ("speech", {"positions": "stack"}, r"model\.positions: a model that knows places"),
        ("speech", {"alibi": True}, r"alibi: true, attention would know distances"),
        ("spectrogram", {"positions": "sincos"}, r"model\.positions: a model that knows places"),
        ("text", {"positions": "learned"}, r"model\.positions: a model that knows places"),
        ("text", {"causal": True}, r"model\.causal: true, a token could count"),
    ],
)
def test_mp3_refuses_models_that_know_places(kind, change, text):
    shape = {"hidden_size": 16, "depth": 1, "heads": 2, "extra_tokens": 0} | SOUND_AND_TEXT[kind] | change
    with pytest.raises(ValueError, match=text):
        METHODS["mp3"](Encoder.from_config(MmsslConfig(modality=kind, **shape)))


@pytest.mark.parametrize("kind", ["speech", "text"])
def test_models_without_positions_have_no_class_of_transformers(kind):
    native = import_module(modality(kind).native)
    shape = {"hidden_size": 16, "depth": 1, "heads": 2, "extra_tokens": 0, "norm_eps": 1e-5} | SOUND_AND_TEXT[kind]
    with_positions = {"positions": "stack" if kind == "speech" else "learned"}
    for change, found in (({}, False), (with_positions, True)):
        config = MmsslConfig(modality=kind, **shape | change)
        weights = Encoder.from_config(config).state_dict()
        assert (native.to_native(config, weights) is not None) == found


def test_uniform_rows_depend_on_their_keys_alone():
    rows = random.uniform((3, 4, 5), (1000,), torch.device("cpu"))
    assert torch.equal(rows[1:2], random.uniform((4,), (1000,), torch.device("cpu")))
    assert bool(((rows >= 0) & (rows < 1)).all())
    assert rows.mean().item() == pytest.approx(0.5, abs=0.03)
    assert len(rows.unique()) > 2900


# Image GPT ---------------------------------------------------------------------------------------------------------------


def test_igpt_is_image_gpt_of_transformers():
    """Same weights, same logits: their pixel i has the code of place i + 1, their start token that of place 0."""
    torch.manual_seed(0)
    theirs = ImageGPTForCausalImageModeling(
        ImageGPTConfig(vocab_size=6, n_positions=17, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    )
    theirs = theirs.double().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    method, weights, names = build("igpt", {"norm_eps": 1e-5}), dict(theirs.named_parameters()), {}
    for i in range(2):
        ours, other = f"student.encoder.transformer.blocks.{i}", f"transformer.h.{i}"
        names |= {f"{ours}.norm1.weight": f"{other}.ln_1.weight", f"{ours}.norm2.weight": f"{other}.ln_2.weight"}
        pairs = (("attn.qkv", "attn.c_attn"), ("attn.proj", "attn.c_proj"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"))
        names |= {f"{ours}.{a}.{part}": f"{other}.{b}.{part}" for a, b in pairs for part in ("weight", "bias")}
    names |= {"student.encoder.transformer.norm.weight": "transformer.ln_f.weight", "head.weight": "lm_head.weight"}
    found = {a: weights[b].T if ".h." in b and weights[b].ndim == 2 else weights[b] for a, b in names.items()}
    words, places = weights["transformer.wte.weight"], weights["transformer.wpe.weight"]
    found["student.encoder.features.palette.embed.weight"] = words[:5]
    found["student.encoder.transformer.extra.tokens"] = (words[5] + places[0])[None, None]
    found["student.encoder.positions.table"] = places[1:][None]
    missing, unexpected = method.load_state_dict(found, strict=False)
    assert unexpected == []
    assert missing == ["student.encoder.features.palette.colours"]
    begin(method, "igpt", Clock())
    batch = batch_of("igpt", torch.arange(4))
    ids = method.student.encoder.features.raw(batch.views[0].x)
    start = torch.full((4, 1), 5)
    with torch.no_grad():
        wanted = theirs(input_ids=torch.cat([start, ids[:, :-1]], 1)).logits
        _, _, logits = method._guess(batch)
    assert_close(logits, wanted, rtol=1e-9, atol=1e-9)
    assert_close(
        method(batch, Clock()).losses["colours"], F.cross_entropy(wanted.flatten(0, 1), ids.flatten()), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("name", ["igpt", "igpt-hidden"])
def test_igpt_begins_at_chance(name):
    method = METHODS["igpt"](encoder(name, {"palette": 512}), **OPTIONS[name]).double()
    out = method(batch_of(name, torch.arange(4)), Clock())
    assert out.losses["colours"].item() == pytest.approx(MASKED["initial_losses"]["values"]["igpt_512"], rel=1e-12)
    std = torch.cat([block.attn.proj.weight.flatten() for block in method.student.encoder.transformer.blocks]).std().item()
    assert std == pytest.approx((16 * 2) ** -0.5, rel=0.15)


def test_a_pixel_is_predicted_from_those_before_it():
    method, batch = build("igpt"), batch_of("igpt", torch.arange(4))
    begin(method, "igpt", Clock())
    torch.nn.init.normal_(method.head.weight)
    (view,), changed = batch.views, batch.views[0].x.clone()
    changed[:, :, 1, 2] = -changed[:, :, 1, 2] * 9  # the seventh of sixteen
    before, after = (method._guess(batch._replace(views=[view._replace(x=x)]))[2] for x in (view.x, changed))
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7], after[:, 7])


def test_hidden_pixels_are_predicted_from_all_others():
    method, batch = build("igpt-hidden", ratio=0.2), batch_of("igpt-hidden", torch.arange(4))
    begin(method, "igpt-hidden", Clock())
    torch.nn.init.normal_(method.head.weight)
    _, places, logits = method._guess(batch)
    assert places.shape == (4, 3)  # of sixteen
    assert len(places.sort(1).values.unique(dim=0)) > 1
    (view,) = batch.views
    hidden = torch.zeros(4, 16, dtype=torch.bool).scatter_(1, places, True)
    moved = view.x - 9 * view.x * hidden.view(4, 1, 4, 4)
    assert torch.equal(method._guess(batch._replace(views=[view._replace(x=moved)]))[2], logits)
    wanted = F.cross_entropy(logits.flatten(0, 1), method.student.encoder.features.raw(view.x).gather(1, places).flatten())
    assert_close(method(batch, Clock()).losses["colours"], wanted, rtol=1e-12, atol=0)


def test_the_palette_is_found_in_the_data_and_the_nearest_colour_taken():
    method = build("igpt")
    assert method.needs_description(Clock())
    colours = drawn(0, 5, 3)
    ids = torch.randint(5, (SAMPLES, 16), generator=torch.Generator().manual_seed(0))
    x = colours[ids].transpose(1, 2).unflatten(2, (4, 4))
    method.on_epoch(Clock(), method.describe(View(x, "vision")))
    assert_close(method.colours.sort(0).values, colours.sort(0).values, rtol=1e-12, atol=1e-12)
    assert not method.needs_description(Clock())  # at a start from such an encoder
    features = method.student.encoder.features
    assert_close(features.unraw(features.raw(x)), x, rtol=1e-12, atol=1e-12)
    noisy = drawn(1, 3, 3, 4, 4)
    nearest = torch.cdist(noisy.flatten(2).transpose(1, 2), method.colours).argmin(-1)
    assert torch.equal(features.raw(noisy), nearest)
    assert torch.equal(features(noisy), features.palette.embed.weight[nearest])


@pytest.mark.parametrize("name", ["igpt", "igpt-hidden"])
def test_what_igpt_rebuilt_are_colours(name):
    method, batch = build(name), batch_of(name, torch.arange(4))
    begin(method, name, Clock())
    torch.nn.init.normal_(method.head.weight)
    rebuilt = method.rebuild(batch, Clock())
    assert rebuilt.truth.shape == rebuilt.guess.shape == (4, 16, 3)
    known = {tuple(colour) for colour in method.colours.tolist()}
    assert {tuple(pixel) for pixel in rebuilt.guess.flatten(0, 1).tolist()} <= known
    assert torch.equal(rebuilt.guess[~rebuilt.hidden], rebuilt.truth[~rebuilt.hidden])
    assert rebuilt.hidden.sum(1).tolist() == [16 if name == "igpt" else 2] * 4
    assert not torch.equal(rebuilt.guess, rebuilt.truth)


def test_an_exported_palette_needs_torch_and_transformers_only(monkeypatch):
    """The flat modelling code runs pixels of the same weights alike."""
    method = build("igpt").float().eval()
    begin(method, "igpt", Clock())
    own, module = method.student.encoder, types.ModuleType("modeling_mmssl_palette")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(flatten("modalities.vision.features"), vars(module))
    config = {key: value for key, value in own.config.to_dict().items() if key != "model_type"}
    model = module.MmsslModel(module.MmsslConfig(**config)).eval()
    model.encoder.load_state_dict(own.state_dict())
    x = drawn(0, 2, 3, 4, 4).float()
    with torch.no_grad():
        assert_close(model(pixel_values=x).pooler_output, own.pool(own(View(x, "vision"))))


# What cannot work --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "change", "text"),
    [
        ("mp3-demo", "model.positions=sincos", r"model\.positions: a model that knows places.*set it to none"),
        ("mp3-demo", "method.ratio=1.0", r"method\.ratio: 1\.0, must be at least 0 and below 1"),
        ("mp3-demo", "model.patch_size=32", r"model\.patch_size: one patch an image"),
        ("igpt-demo", "model.palette=0", r"model\.palette: missing.*512"),
        ("igpt-demo", "model.palette=1", r"model\.palette: 1 colours.*must be 2"),
        ("igpt-demo", "model.patch_size=2", r"model\.palette: 16 colours of patches of 2.*model\.patch_size=1"),
        ("igpt-demo", "model.causal=false", r"model\.causal: False, with method\.predict=next it must be True"),
        ("igpt-demo", "method.predict=hidden", r"model\.causal: True, with method\.predict=hidden it must be False"),
        ("igpt-demo", "model.extra_tokens=0", r"model\.extra_tokens: 0.*set it to 1"),
        ("igpt-demo", "model.extra_tokens=2", r"model\.extra_tokens: 2, with causal=true at most 1"),
        ("igpt-demo", "model.pooling=cls", r"model\.pooling: 'cls' sees only itself"),
        ("igpt-demo", "method.ratio=0", r"method\.ratio: 0.*above 0 and below 1"),
        ("ijepa-demo", "method.predictor={dim: 62, depth: 2, heads: 4}", r"dim 62 must be a multiple of 4"),
    ],
)
def test_what_cannot_work_is_refused(recipe, change, text):
    with pytest.raises(RecipeError, match=text):
        Recipe.load(f"vision/{recipe}", change)


def test_a_palette_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"model\.palette: 512 colours, 12 images are too few; use fewer"):
        build("igpt", {"palette": 512}).attach(12, 0)
    method = build("igpt")
    x = torch.zeros(SAMPLES, 3, 4, 4, dtype=torch.float64)
    x[:, :, ::2] = 1.0
    with pytest.raises(ValueError, match=r"model\.palette: 5 colours, of which 192 pixels have 2; use fewer"):
        method.on_epoch(Clock(), method.describe(View(x, "vision")))
