"""ViT and ViTMAE on the shared transformer, and back."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from mmssl.hub.export import load_encoder
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.modeling import MmsslModel
from mmssl.model.native import stored
from mmssl.model.positions import Learned2d, SinCos2d
from mmssl.types import Mask, View
from modalities.vision import convert

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "masked-prediction.json").read_text())
SIZES = {"small": (32, 3, 4, 72, 32, 8), "wide": (48, 6, 6, 192, 24, 4)}
MADE = {"pooler.dense.weight", "pooler.dense.bias"}
PLACES = "embeddings.position_embeddings"


def shape(size="small", **more):
    """Options of a tiny ViT or ViTMAE."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size")
    return dict(zip(names, SIZES[size])) | more


def redrawn(model):
    """The model in float64 with weights like those of a trained one: products keep their size, norms are near 1."""
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if name.endswith("weight"):
            parameter.data = noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 1 + 0.1 * noise
        else:
            parameter.data = 0.1 * noise
    return model.double().eval()


def redrawn_mae(kind, **more):
    """The same for a ViTMAE, with the positions of a release: transformers leaves those of a new one zero."""
    theirs = redrawn(kind(ViTMAEConfig(**shape() | more, decoder_num_hidden_layers=1)))
    bare = getattr(theirs, "vit", theirs)
    side, width = bare.config.image_size // bare.config.patch_size, bare.config.hidden_size
    angle = torch.arange(side)[:, None] / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    code = torch.cat([angle.sin(), angle.cos()], 1)
    table = [torch.zeros(width)] + [torch.cat([code[column], code[row]]) for row in range(side) for column in range(side)]
    bare.embeddings.position_embeddings.data = torch.stack(table)[None].float().double()
    return theirs


def images(side, count=2):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def twin(theirs, **changes):
    """Ours with the weights of theirs, but for the changes of the configuration."""
    config, weights = convert.from_native(theirs.config, theirs.state_dict())
    ours = MmsslModel(MmsslConfig(**config.to_dict() | changes)).double().eval()
    ours.encoder.load_state_dict(weights)
    return ours


def loaded(kind, native, weights):
    """A model of transformers with those weights, none missing and none left over."""
    model, told = kind.from_pretrained(None, config=native, state_dict=weights, output_loading_info=True)
    assert not {name: found for name, found in told.items() if found}, told
    return model.to(next(iter(weights.values())).dtype).eval()


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_hidden_states_are_those_of_vit(size):
    theirs = redrawn(ViTModel(ViTConfig(**shape(size))))
    ours, x = twin(theirs), images(SIZES[size][4])
    found, wanted = ours(x, output_hidden_states=True), theirs(x, output_hidden_states=True)
    assert isinstance(ours.encoder.positions, Learned2d)
    assert float(wanted.last_hidden_state.std()) > 0.5
    assert_close(found.last_hidden_state, wanted.last_hidden_state, rtol=0, atol=1e-10)
    for own, other in zip(found.hidden_states, wanted.hidden_states[1:], strict=True):
        assert_close(own, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", [48, 16])
@torch.no_grad()
def test_images_of_another_size_get_the_interpolated_positions_of_vit(side):
    theirs = redrawn(ViTModel(ViTConfig(**shape())))
    found, wanted = twin(theirs)(images(side)), theirs(images(side), interpolate_pos_encoding=True)
    assert_close(found.last_hidden_state, wanted.last_hidden_state, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"^image_size: 6 patches form no square"):
        twin(theirs).encoder.positions(torch.zeros(1, 6, 32))


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_the_visible_tokens_are_those_of_vit_mae(size):
    theirs = redrawn_mae(ViTMAEForPreTraining, **shape(size), mask_ratio=0.75)
    ours, x = twin(theirs), images(SIZES[size][4])
    length = (SIZES[size][4] // SIZES[size][5]) ** 2
    noise = torch.rand(2, length, generator=torch.Generator().manual_seed(2))
    mask = Mask.of(noise.argsort(1).argsort(1) >= length // 4)
    out = theirs.vit(x, noise=noise)
    assert isinstance(ours.encoder.positions, SinCos2d)
    assert_close(out.mask.bool(), mask.hidden)
    ids_keep = noise.argsort(1)[:, : length // 4]
    assert_close(ids_keep.sort(1).values, mask.keep)
    wanted = out.last_hidden_state[:, 1:].gather(1, ids_keep.argsort(1)[..., None].expand(-1, -1, SIZES[size][0]))
    found = ours.encoder(View(x, "vision"), mask)
    assert_close(found.tokens, wanted, rtol=0, atol=1e-10)
    assert_close(found.cls, out.last_hidden_state[:, 0], rtol=0, atol=1e-10)


@torch.no_grad()
def test_vit_there_and_back():
    theirs = redrawn(ViTModel(ViTConfig(**shape(layer_norm_eps=1e-6, hidden_dropout_prob=0.1))))
    before = stored(theirs.config, theirs.state_dict())
    config, weights = convert.from_native(theirs.config, before)
    native, after = convert.to_native(config, weights)
    assert set(after) == set(before)
    merged = {"embeddings.cls_token", PLACES}  # the position of cls is added to it
    for name in set(before) - MADE - merged:
        assert torch.equal(after[name], before[name]), name
    assert torch.equal(after[PLACES][:, 1:], before[PLACES][:, 1:])
    assert torch.equal(after["embeddings.cls_token"], before["embeddings.cls_token"] + before[PLACES][:, :1])
    names = [*shape(), "layer_norm_eps", "hidden_dropout_prob", "num_channels", "qkv_bias", "hidden_act"]
    assert {n: getattr(native, n) for n in names} == {n: getattr(theirs.config, n) for n in names}
    again, x = loaded(ViTModel, native, after), images(32)
    assert torch.equal(again(x).last_hidden_state, theirs(x).last_hidden_state)
    assert torch.equal(again(x).pooler_output, again(x).last_hidden_state[:, 0])
    for tensors, other in zip(convert.from_native(native, after)[1].items(), weights.items(), strict=True):
        assert tensors[0] == other[0]
        assert torch.equal(tensors[1], other[1])


@torch.no_grad()
def test_vit_mae_there_and_back():
    theirs = redrawn_mae(ViTMAEModel)
    before = stored(theirs.config, theirs.state_dict())
    config, weights = convert.from_native(theirs.config, before)
    assert (config.positions, config.position_scale) == ("sincos", 1.0)
    native, after = convert.to_native(config, weights, "vit_mae")
    assert type(native) is ViTMAEConfig
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    loaded(ViTMAEModel, native, after)
    as_vit = loaded(ViTModel, *convert.to_native(config, weights))
    noise = torch.arange(16.0).expand(2, -1)
    theirs.config.mask_ratio = 0.0
    wanted = theirs(images(32), noise=noise).last_hidden_state
    assert_close(as_vit(images(32)).last_hidden_state, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {"positions": "learned"},
        {"positions": "sincos"},
        {"positions": "sincos", "position_scale": 0.15, "pooling": "cls"},
        {"positions": "sincos", "position_scale": 0.0, "channels": 1},
        {"positions": "relative", "layer_scale": 0.1, "pooling": "cls"},
    ],
)
@torch.no_grad()
def test_ours_there_and_back(options):
    config = MmsslConfig("vision", 32, 2, 4, norm="pre", image_size=32, patch_size=8, **options)
    encoder = redrawn(Encoder.from_config(config))
    weights = dict(encoder.state_dict())
    native, named = convert.to_native(config, weights)
    if options["positions"] == "sincos":
        wanted = options.get("position_scale", 1.0) * SinCos2d(32, (4, 4)).table
        assert_close(named[PLACES].float(), F.pad(wanted, (0, 0, 1, 0)), rtol=0, atol=1e-7)
    again, found = convert.from_native(native, named)
    if options["positions"] == "relative":  # theirs has no bias of keys
        for i in range(2):
            weights[f"transformer.blocks.{i}.attn.qkv.bias"].view(3, 32)[1] = 0
    assert set(found) == set(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    names = ["hidden_size", "depth", "heads", "norm", "norm_eps", "extra_tokens", "image_size", "patch_size", *options]
    assert {n: getattr(again, n) for n in names} == {n: getattr(config, n) for n in names}


@torch.no_grad()
def test_what_we_train_is_a_vit_that_needs_no_code_of_ours(tmp_path):
    config = MmsslConfig("vision", 32, 2, 4, norm="pre", image_size=32, patch_size=8, position_scale=0.5, pooling="cls")
    encoder = redrawn(Encoder.from_config(config))
    native, weights = convert.to_native(config, dict(encoder.state_dict()))
    theirs = loaded(ViTModel, native, weights)
    wanted = encoder(View(images(32), "vision"))
    found = theirs(images(32))
    assert_close(found.last_hidden_state, torch.cat([wanted.cls[:, None], wanted.tokens], 1), rtol=0, atol=1e-10)
    assert_close(found.pooler_output, encoder.pool(wanted), rtol=0, atol=1e-10)
    with torch.device("meta"):
        empty = ViTModel(native)
    empty.save_pretrained(tmp_path, state_dict=dict(weights))  # as an export does
    assert set(load_file(tmp_path / "model.safetensors")) == set(weights)
    ours = load_encoder(tmp_path)
    assert_close(ours.double()(images(32)).pooler_output, encoder.pool(wanted), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "kind", [ViTModel, ViTMAEModel, ViTMAEForPreTraining, ViTForImageClassification, ViTForMaskedImageModeling]
)
@torch.no_grad()
def test_a_folder_of_transformers_runs_on_the_shared_transformer(kind, tmp_path):
    mae = "MAE" in kind.__name__
    theirs = redrawn_mae(kind, mask_ratio=0.0) if mae else redrawn(kind(ViTConfig(**shape(), encoder_stride=8)))
    theirs.save_pretrained(tmp_path)
    bare, ours = getattr(theirs, "vit", theirs), load_encoder(tmp_path).double()
    assert type(ours) is MmsslModel
    assert not [module for module in ours.modules() if type(module).__module__.startswith("transformers")]
    given = {"noise": torch.arange(16.0).expand(2, -1)} if mae else {}
    wanted = bare(images(32), **given).last_hidden_state
    assert_close(ours(images(32)).last_hidden_state, wanted, rtol=0, atol=1e-10 if mae else 1e-6)  # cls rounded to float32
    direct = convert.from_native(theirs.config, load_file(tmp_path / "model.safetensors"))[1]
    assert_close(
        {name: tensor.float() for name, tensor in direct.items()}, dict(ours.float().encoder.state_dict()), rtol=0, atol=0
    )


def wrong(name, theirs):
    """Ours with one detail unlike ViT."""
    if name == "eps":
        return twin(theirs, norm_eps=1e-6)
    if name == "gelu":
        return twin(theirs, activation="gelu_tanh")
    ours = twin(theirs)
    if name == "final norm":
        ours.encoder.transformer.norm = nn.Identity()
    elif name == "position of cls":
        ours.encoder.transformer.extra.tokens.data = theirs.embeddings.cls_token.data
    elif name == "patch bias":
        ours.encoder.features.proj.bias.data.zero_()
    elif name == "post-norm":
        for block in ours.encoder.transformer.blocks:
            block.pre = False
    return ours


@pytest.mark.parametrize("name", ["eps", "gelu", "final norm", "position of cls", "patch bias", "post-norm"])
@torch.no_grad()
def test_each_detail_counts(name):
    theirs = redrawn(ViTModel(ViTConfig(**shape())))
    wanted = theirs(images(32)).last_hidden_state
    assert_close(wrong("nothing", theirs)(images(32)).last_hidden_state, wanted, rtol=0, atol=1e-10)
    assert float((wrong(name, theirs)(images(32)).last_hidden_state - wanted).abs().max()) > 1e-5


TRAPS = {
    "eps": "eps_1e6_instead_of_1e12",
    "gelu": "tanh_gelu",
    "final norm": "no_final_layernorm",
    "position of cls": "no_position_on_cls",
    "patch bias": "no_patch_bias",
    "post-norm": "post_norm",
}


@torch.no_grad()
def test_each_detail_of_a_deep_vit_counts_as_much_as_told():
    """To an order of magnitude: the magnitudes are of other weights."""
    told = VECTORS["hf_trap_magnitudes"]["vit"]
    wide = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
    theirs = redrawn(ViTModel(ViTConfig(**wide, image_size=32, patch_size=8)))
    wanted = theirs(images(32)).last_hidden_state
    for name, trap in TRAPS.items():
        found = float((wrong(name, theirs)(images(32)).last_hidden_state - wanted).abs().max())
        assert told[trap] / 30 < found < told[trap] * 30, name
    rounded = twin(theirs).float()(images(32).float()).last_hidden_state
    assert float((rounded - wanted).abs().max()) < 30 * told["float32_vs_float64"]


@pytest.mark.parametrize(
    "native",
    [
        ViTConfig(**shape(hidden_act="gelu_new")),
        ViTConfig(**shape(qkv_bias=False)),
        ViTConfig(**shape(image_size=[32, 16])),
        ViTConfig(**shape(patch_size=(8, 4))),
        ViTConfig(**shape(image_size=36)),
        ViTMAEConfig(**shape(num_channels=4)),
    ],
)
def test_another_structure_stays_theirs(native):
    assert convert.from_native(native, {}) is None


@pytest.mark.parametrize("other", [{"norm": "post"}, {"extra_tokens": 0}, {"activation": "gelu_tanh"}, {"prenet_depth": 1}])
@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_another_structure_stays_ours(positions, other):
    config = MmsslConfig(**{"hidden_size": 32, "depth": 2, "heads": 4, "norm": "pre", "positions": positions} | other)
    assert convert.to_native(config, {}) is None


@pytest.mark.parametrize(
    ("size", "width", "depth", "heads", "patch"),
    [("base", 768, 12, 12, 16), ("large", 1024, 24, 16, 16), ("huge14", 1280, 32, 16, 14)],
)
def test_there_are_as_many_parameters_as_in_mae(size, width, depth, heads, patch):
    config = MmsslConfig("vision", width, depth, heads, norm="pre", patch_size=patch)
    with torch.device("meta"):
        encoder = Encoder.from_config(config)
    told = VECTORS["mae_params"][size]
    assert sum(p.numel() for p in encoder.parameters()) == told["encoder_trainable"]
    _, weights = convert.to_native(config, dict(encoder.state_dict()), "vit_mae")
    assert sum(tensor.numel() for tensor in weights.values()) == told["encoder_with_pos"]
    if size == "base":
        _, weights = convert.to_native(config, dict(encoder.state_dict()))
        counts = VECTORS["hf_param_counts"]
        assert sum(tensor.numel() for tensor in weights.values()) == counts["vit_b16_with_pooler"]
        assert sum(t.numel() for name, t in weights.items() if name not in MADE) == counts["vit_b16_without_pooler"]


def test_the_fixed_positions_are_those_of_mae():
    told = VECTORS["sincos_2d"]
    table, whole = SinCos2d(768, (14, 14)).table[0].double(), told["D768_grid14_with_cls"]
    assert float(table.sum()) == pytest.approx(whole["total_sum"], abs=1e-3)
    assert float(table.square().sum()) == pytest.approx(whole["total_sum_of_squares"], abs=1e-3)
    assert_close(table[1, :4], torch.tensor(whole["row2_first4"], dtype=torch.float64), rtol=0, atol=1e-6)
    assert_close(table[14, 384:388], torch.tensor(whole["row15_cols_384_to_388"], dtype=torch.float64), rtol=0, atol=1e-6)
    assert_close(SinCos2d(8, (2, 2)).table[0], torch.tensor(told["D8_grid2x2"]), rtol=0, atol=1e-6)


def test_learned_positions_are_added_before_tokens_are_hidden_and_learn():
    positions, tokens = Learned2d(8, (2, 3)), torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    mask = Mask.of(torch.tensor([[c == "x" for c in row] for row in ("xx.x.x", ".xxxx.", "..xxxx", "x.x.xx")]))
    found, bias = positions(tokens, mask)
    assert bias is None
    for row, kept in enumerate([(2, 4), (0, 5), (0, 1), (1, 3)]):
        for place, position in enumerate(kept):
            assert_close(found[row, place], tokens[row // 2, position] + positions.table[0, position], rtol=0, atol=0)
    found.sum().backward()
    assert_close(positions.table.grad[0, :, 0], torch.tensor([2.0, 2, 1, 1, 1, 1]))
    spread = float(Learned2d(64, (14, 14), 0.05).table.detach().std())
    assert spread == pytest.approx(0.05, rel=0.1)
