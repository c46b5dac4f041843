"""Wav2Vec2 and HuBERT on the shared transformer, and back."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModel,
    Data2VecAudioConfig,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Wav2Vec2Config,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Model,
)

from mmssl.hub.export import load_encoder, quiet
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.modeling import MmsslModel
from mmssl.model.positions import WeightNormConv
from modalities.speech import convert

COUNTS = json.loads((Path(__file__).parents[1] / "vectors" / "masked-prediction.json").read_text())["hf_param_counts"]
SHAPE = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 120}
SHAPE |= {"conv_dim": (32,) * 7, "num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 4}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
KINDS = {
    "wav2vec2 base": (Wav2Vec2Model, Wav2Vec2Config, {}),
    "wav2vec2 large": (Wav2Vec2Model, Wav2Vec2Config, LARGE),
    "wav2vec2 mixed": (Wav2Vec2Model, Wav2Vec2Config, {"feat_extract_norm": "layer", "num_conv_pos_embeddings": 19}),
    "hubert base": (HubertModel, HubertConfig, {}),
    "hubert large": (HubertModel, HubertConfig, LARGE),
}


def drawn(model, seed=0):
    """The model in float64 with weights of the size that trained ones have, norms and biases among them."""
    source = torch.Generator().manual_seed(seed)
    for name, parameter in model.double().eval().named_parameters():
        random = torch.randn(parameter.shape, generator=source).double()
        if name.endswith(("original0", "conv.g")):
            random = 1 + random.abs()
        elif parameter.ndim == 1:
            random = 0.1 * random + ("norm" in name and name.endswith("weight"))
        else:
            random = 0.7 * random / parameter[0].numel() ** 0.5
        parameter.data = random
    return model


def theirs_of(name):
    model, config, more = KINDS[name]
    return drawn(model(config(**SHAPE | more)))


def ours_of(theirs):
    """The same model on the shared transformer."""
    config, weights = convert.from_native(theirs.config, theirs.state_dict())
    ours = MmsslModel(config).double().eval()
    ours.encoder.load_state_dict(weights)
    return ours


def waves():
    """Two recordings, the second shorter and padded; a mask of samples; which frames are real."""
    x = torch.randn(2, 9000, generator=torch.Generator().manual_seed(1)).double()
    mask = (torch.arange(9000) < torch.tensor([[9000], [6000]])).long()
    return x * mask, mask, torch.arange(27) < torch.tensor([[27], [18]])


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_all_hidden_states_are_those_of_transformers(name):
    theirs = theirs_of(name)
    ours = ours_of(theirs)
    assert not any(type(part).__module__.startswith("transformers.models") for part in ours.modules())
    x, mask, real = waves()
    for given, valid in (({}, torch.ones_like(real)), ({"attention_mask": mask}, real)):
        wanted = theirs(x, **given, output_hidden_states=True)
        found = ours(input_values=x, **given, output_hidden_states=True)
        assert float(wanted.last_hidden_state.std()) > 0.3
        assert_close(found.last_hidden_state[valid], wanted.last_hidden_state[valid], rtol=0, atol=1e-10)
        assert len(found.hidden_states) == len(wanted.hidden_states) - 1 == 6
        for one, other in zip(found.hidden_states, wanted.hidden_states[1:]):
            assert_close(one[valid], other[valid], rtol=0, atol=1e-10)
    projected = theirs.feature_projection(theirs.feature_extractor(x).transpose(1, 2))
    projected = projected if isinstance(projected, torch.Tensor) else projected[0]
    assert_close(ours.encoder.features(x), projected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("name", "agree"), [("wav2vec2 large", True), ("wav2vec2 base", False)])
@torch.no_grad()
def test_a_padded_recording_is_heard_as_it_is_alone_by_layer_norm(name, agree):
    ours, (x, mask, real) = ours_of(theirs_of(name)).float(), waves()
    padded = ours(input_values=x.float(), attention_mask=mask).last_hidden_state[1][real[1]]
    alone = ours(input_values=x[1:, :6000].float()).last_hidden_state[0]
    apart = float((padded - alone).abs().max())
    assert apart < 1e-4 if agree else apart > 0.1


# Traps -----------------------------------------------------------------------------------------------------------------


def eps(encoder):
    for module in encoder.transformer.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6


def tanh(encoder):
    for block in encoder.transformer.blocks:
        block.mlp.act = nn.GELU("tanh")


def placement(encoder):
    for block in encoder.transformer.blocks:
        block.pre = not block.pre


def no_final_norm(encoder):
    encoder.transformer.norm = nn.Identity()


def first_frame_cropped(encoder):
    encoder.positions.conv.register_forward_hook(lambda module, args, y: y.roll(-1, 2))


def weight(make):
    """A trap: the convolution of positions uses another weight."""

    def change(encoder):
        conv = encoder.positions.conv
        conv.forward = lambda x: F.conv1d(x, make(conv), conv.bias, padding=conv.padding, groups=conv.groups)

    return change


def padding_left_in(encoder):
    forward = encoder.positions.forward
    encoder.positions.forward = lambda tokens, mask, pad: forward(tokens, mask)


TRAPS = {
    "eps": eps,
    "tanh": tanh,
    "placement": placement,
    "first frame cropped": first_frame_cropped,
    "no weight norm": weight(lambda conv: conv.v),
    "weight norm of channels": weight(lambda conv: conv.v * (conv.g / conv.v.norm(dim=(1, 2), keepdim=True))),
    "padding left in": padding_left_in,
}
CASES = [(name, trap) for name in ("wav2vec2 base", "wav2vec2 large") for trap in TRAPS.values()]


@pytest.mark.parametrize(("name", "trap"), [*CASES, ("wav2vec2 large", no_final_norm)])
@torch.no_grad()
def test_each_trap_would_show(name, trap):
    theirs, (x, mask, real) = theirs_of(name), waves()
    ours = ours_of(theirs)
    trap(ours.encoder)
    found = ours(input_values=x, attention_mask=mask).last_hidden_state[real]
    assert float((found - theirs(x, attention_mask=mask).last_hidden_state[real]).abs().max()) > 1e-5


# There and back --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_theirs_come_back_bit_by_bit(name):
    theirs = theirs_of(name)
    before = theirs.state_dict()
    back, after = convert.to_native(*convert.from_native(theirs.config, before))
    assert type(back) is Wav2Vec2Config
    assert set(before) - set(after) == {"masked_spec_embed"}
    assert not set(after) - set(before)
    assert all(torch.equal(after[weight], before[weight]) for weight in after)
    same = [*SHAPE, "conv_bias", "feat_extract_norm", "do_stable_layer_norm", "layer_norm_eps", "hidden_dropout", "layerdrop"]
    found, wanted = ({option: getattr(config, option) for option in same} for config in (back, theirs.config))
    assert found == wanted | {"conv_dim": tuple(wanted["conv_dim"])}


OURS = {"modality": "speech", "hidden_size": 48, "depth": 2, "heads": 4, "mlp_ratio": 2.5, "extra_tokens": 0, "norm_eps": 1e-5}
OURS |= {"conv_channels": 32, "positions": "single", "position_kernel": 32, "position_groups": 4, "alibi": False}
STRUCTURES = {
    "base": {"conv_norm": "group"},
    "large": {"norm": "pre", "conv_bias": True},
    "odd": {"norm": "pre", "conv_norm": "group", "position_kernel": 5},
}


@pytest.mark.parametrize("name", STRUCTURES)
@torch.no_grad()
def test_ours_run_under_transformers_and_come_back_bit_by_bit(name, tmp_path):
    config = MmsslConfig(**OURS | STRUCTURES[name])
    ours = drawn(MmsslModel(config)).float()
    native, weights = convert.to_native(config, ours.encoder.state_dict())
    with torch.device("meta"):
        empty = AutoModel.from_config(native)
    assert type(empty) is Wav2Vec2Model
    assert set(weights) == set(empty.state_dict())
    with quiet():
        empty.save_pretrained(tmp_path, state_dict=weights)
        theirs, said = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(said[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x, mask, real = waves()
    found, wanted = theirs.eval()(x.float(), mask), ours(input_values=x.float(), attention_mask=mask)
    assert_close(found.last_hidden_state[real], wanted.last_hidden_state[real], rtol=0, atol=1e-5)
    again, back = convert.from_native(theirs.config, theirs.state_dict())
    assert set(back) == set(ours.encoder.state_dict())
    assert all(torch.equal(tensor, back[weight]) for weight, tensor in ours.encoder.state_dict().items())
    options = OURS | STRUCTURES[name]
    assert {option: getattr(again, option) for option in options} == options


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, Wav2Vec2Config),
        ({"norm": "pre"}, Wav2Vec2Config),
        ({"positions": "stack", "position_layers": 3}, Data2VecAudioConfig),
        ({"positions": "stack", "conv_bias": True}, Data2VecAudioConfig),
        ({"positions": "stack", "norm": "pre"}, None),
        ({"positions": "stack", "conv_norm": "group"}, None),
        ({"alibi": True}, None),
        ({"prenet_depth": 1}, None),
        ({"extra_tokens": 1}, None),
        ({"layer_scale": 0.1}, None),
        ({"norm_eps": 1e-6}, None),
        ({"causal": True}, None),
        ({"activation": "gelu_tanh"}, None),
    ],
)
def test_the_structure_decides_which_class_it_becomes(options, kind):
    config = MmsslConfig(**OURS | options)
    found = convert.to_native(config, Encoder.from_config(config).state_dict())
    assert found is None if kind is None else type(found[0]) is kind
    if kind:
        with torch.device("meta"):
            assert set(AutoModel.from_config(found[0]).state_dict()) == set(found[1])


@pytest.mark.parametrize(
    "config",
    [
        Wav2Vec2Config(**SHAPE, hidden_act="relu"),
        Wav2Vec2Config(**SHAPE, feat_extract_activation="relu"),
        Wav2Vec2Config(**SHAPE, add_adapter=True),
        Wav2Vec2Config(**SHAPE, adapter_attn_dim=8),
        Wav2Vec2Config(**SHAPE, layer_norm_eps=1e-6),
        Wav2Vec2Config(**SHAPE, conv_stride=(5, 2, 2, 2, 2, 2, 1)),
        HubertConfig(**SHAPE, conv_pos_batch_norm=True),
        HubertConfig(**SHAPE, feat_proj_layer_norm=False),
    ],
)
def test_other_structures_stay_theirs(config):
    assert convert.from_native(config, {}) is None


# Folders ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wav2vec2 base", "hubert large"])
@pytest.mark.parametrize("form", ["model", "task", "old names"])
@torch.no_grad()
def test_a_folder_loads_onto_the_shared_transformer(name, form, tmp_path):
    theirs = theirs_of(name).float()
    whole, kind = theirs, theirs.config.model_type
    if form == "task":
        whole = (HubertForCTC if kind == "hubert" else Wav2Vec2ForPreTraining)(theirs.config)
        setattr(whole, kind, theirs)
    with quiet():
        whole.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    saved = load_file(file)
    assert any(key.endswith("original0") for key in saved)
    assert any(key.startswith(f"{kind}.encoder.") for key in saved) == (form == "task")
    if form == "old names":
        saved = {key.replace("parametrizations.weight.original0", "weight_g"): tensor for key, tensor in saved.items()}
        saved = {key.replace("parametrizations.weight.original1", "weight_v"): tensor for key, tensor in saved.items()}
        save_file(saved, file, {"format": "pt"})
    ours = load_encoder(tmp_path)
    assert type(ours) is MmsslModel
    assert not any(type(part).__module__.startswith("transformers.models") for part in ours.modules())
    assert any(type(part) is WeightNormConv for part in ours.modules())
    x = waves()[0].float()
    assert_close(ours(input_values=x).last_hidden_state, theirs(x).last_hidden_state, rtol=0, atol=1e-5)
    # The tensors as they lie in the file, without transformers' own renaming.
    straight = convert.from_native(theirs.config, saved)[1]
    assert all(torch.equal(straight[weight], tensor) for weight, tensor in ours.encoder.state_dict().items())


# Sizes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "model", "count"),
    [
        (Wav2Vec2Config(), Wav2Vec2Model, "wav2vec2_base_model"),
        (HubertConfig(), HubertModel, "hubert_base_model"),
        (
            Wav2Vec2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, **LARGE),
            Wav2Vec2Model,
            "wav2vec2_large_model",
        ),
        (Data2VecAudioConfig(), AutoModel.from_config, "data2vec_audio_base"),
    ],
)
def test_published_sizes(config, model, count):
    with torch.device("meta"):
        theirs = model(config)
        ours = MmsslModel(convert.from_native(config, theirs.state_dict())[0])
    total, own = (sum(p.numel() for p in one.parameters()) for one in (theirs, ours))
    assert total == COUNTS[count]
    assert own == total - config.hidden_size  # without the vector for masked frames
