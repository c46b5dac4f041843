"""DINOv2, without and with registers, and DINOv3's ViT on the shared transformer, and back."""

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from mmssl.hub.export import load_encoder
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.modeling import MmsslModel
from mmssl.model.native import stored
from mmssl.types import Mask, View
from modalities.vision import convert
from tests.model.test_native_vision import images, loaded, redrawn, twin

SHAPE = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
REGISTERS = {"num_register_tokens": 3}
V3 = {"intermediate_size": 40}
KINDS = {
    "dinov2": (Dinov2Model, Dinov2Config, {"layerscale_value": 0.5, "drop_path_rate": 0.1}),
    "dinov2-gated": (Dinov2Model, Dinov2Config, {"use_swiglu_ffn": True, "mlp_ratio": 3}),
    "dinov2-registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, REGISTERS),
    "dinov2-registers-gated": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, REGISTERS | {"use_swiglu_ffn": True}),
    "dinov3": (DINOv3ViTModel, DINOv3ViTConfig, V3),
    "dinov3-registers": (DINOv3ViTModel, DINOv3ViTConfig, V3 | REGISTERS | {"rope_theta": 50.0}),
    "dinov3-gated": (DINOv3ViTModel, DINOv3ViTConfig, V3 | REGISTERS | {"use_gated_mlp": True, "hidden_act": "silu"}),
    "dinov3-keys": (DINOv3ViTModel, DINOv3ViTConfig, V3 | {"key_bias": True, "num_attention_heads": 3}),
}


def drawn(name):
    """A tiny model of that kind with weights like those of a trained one; what masked patches get is as it begins."""
    model, config, more = KINDS[name]
    theirs = redrawn(model(config(**SHAPE | more)))
    theirs.embeddings.mask_token.data.zero_()
    return theirs


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_hidden_states_are_those_of_dino(name):
    theirs, x = drawn(name), images(32)
    found, wanted = twin(theirs)(x, output_hidden_states=True), theirs(x, output_hidden_states=True)
    assert float(wanted.last_hidden_state.std()) > 0.5
    tokens = wanted.last_hidden_state
    assert_close(found.last_hidden_state, tokens, rtol=0, atol=1e-6 if name.startswith("dinov3") else 1e-10)
    for own, other in zip(found.hidden_states[:-1], wanted.hidden_states[1:-1], strict=True):
        assert_close(own, other, rtol=0, atol=1e-6 if name.startswith("dinov3") else 1e-10)


@pytest.mark.parametrize("name", ["dinov2", "dinov3-registers"])
@torch.no_grad()
def test_images_of_another_size_have_the_places_of_dino(name):
    theirs, x = drawn(name), images(64)
    wanted = theirs(x).last_hidden_state
    assert_close(twin(theirs)(x).last_hidden_state, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_dino_there_and_back(name):
    theirs, x = drawn(name), images(32)
    before = stored(theirs.config, theirs.state_dict())
    config, weights = convert.from_native(theirs.config, theirs.state_dict())
    native, after = convert.to_native(config, weights)
    assert native.model_type == theirs.config.model_type
    places = {"embeddings.cls_token", "embeddings.position_embeddings"}  # the position of cls is added to it
    if "embeddings.position_embeddings" not in before:
        places = set()
    before = {name.removeprefix("model."): tensor for name, tensor in before.items()}
    assert set(after) == set(before)
    for key in set(before) - places:
        assert torch.equal(after[key].to(before[key]), before[key]), key
    named = {**SHAPE, **KINDS[name][2]}
    assert {key: getattr(native, key) for key in named} == {key: getattr(theirs.config, key) for key in named}
    again = loaded(type(theirs), native, after)
    assert_close(again(x).last_hidden_state, theirs(x).last_hidden_state, rtol=0, atol=1e-12)
    assert torch.equal(again(x).pooler_output, again(x).last_hidden_state[:, 0])


@torch.no_grad()
def test_a_released_folder_is_read_as_the_shared_transformer(tmp_path):
    theirs = drawn("dinov3-registers").float()
    theirs.save_pretrained(tmp_path)
    ours = load_encoder(tmp_path)
    assert isinstance(ours, MmsslModel)
    x = images(32).float()
    assert_close(ours(x).last_hidden_state, theirs(x).last_hidden_state, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "kind"),
    [
        ({"positions": "rotary"}, "dinov3_vit"),
        ({"positions": "rotary", "extra_tokens": 5, "layer_scale": 1e-3, "activation": "swiglu"}, "dinov3_vit"),
        ({"positions": "learned", "extra_tokens": 3}, "dinov2_with_registers"),
        ({"positions": "sincos", "layer_scale": 1e-3}, "dinov2"),
    ],
)
@torch.no_grad()
def test_encoders_of_ours_become_the_dino_of_their_structure(more, kind):
    torch.manual_seed(0)
    config = MmsslConfig(hidden_size=24, depth=2, heads=2, norm="pre", image_size=32, patch_size=8, **more)
    ours = MmsslModel(config).eval()
    for parameter in ours.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    native, weights = convert.to_native(config, ours.encoder.state_dict())
    assert native.model_type == kind
    model = next(m for m, c, _ in KINDS.values() if isinstance(native, c))
    x = images(32).float()
    wanted = ours(x)
    assert_close(loaded(model, native, weights)(x).last_hidden_state, wanted.last_hidden_state, rtol=0, atol=1e-5)


def test_structures_that_no_dino_has_stay_ours():
    shape = {"hidden_size": 24, "depth": 1, "heads": 2, "image_size": 32, "patch_size": 8}
    for more in (
        {"norm": "post", "extra_tokens": 2},
        {"norm": "pre", "extra_tokens": 2, "causal": False, "activation": "gelu_quick"},
        {"norm": "pre", "extra_tokens": 0, "positions": "rotary"},
        {"norm": "pre", "extra_tokens": 2, "mlp_ratio": 2.5},
    ):
        config = MmsslConfig(**shape | more)
        assert convert.to_native(config, MmsslModel(config).encoder.state_dict()) is None
    theirs = drawn("dinov3")
    theirs.config.hidden_act = "relu"
    assert convert.from_native(theirs.config, theirs.state_dict()) is None


@torch.no_grad()
def test_a_masked_pass_of_turning_tokens_is_the_pass_of_those_tokens_alone():
    torch.manual_seed(0)
    config = MmsslConfig(hidden_size=24, depth=2, heads=2, norm="pre", positions="rotary", image_size=32, patch_size=8)
    encoder, x = Encoder.from_config(config).eval(), images(32, 3).float()
    hidden = torch.rand(6, 16, generator=torch.Generator().manual_seed(1)).argsort(1).argsort(1) < 10
    found = encoder(View(x, "vision"), Mask.of(hidden))
    features = encoder.features(x)
    for row in range(6):
        attend = ~hidden[row : row + 1]
        alone = encoder.contextualize(features[row // 2][None], attend=attend)
        assert_close(found.tokens[row], alone.tokens[0, attend[0]], rtol=0, atol=1e-5)
