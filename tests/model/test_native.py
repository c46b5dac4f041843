import pytest
import torch
from torch.testing import assert_close
from transformers import (
    Data2VecAudioConfig,
    Data2VecAudioModel,
    Data2VecTextConfig,
    Data2VecTextModel,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    RobertaConfig,
    RobertaModel,
)

from mmssl.hub.export import load_encoder
from mmssl.model import native
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.modeling import MmsslModel
from modalities.speech import convert as speech
from modalities.text import convert as text
from modalities.vision import convert as vision

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 72}


def audio(**more):
    options = {"mask_time_prob": 0.0, "conv_dim": (24,) * 7, "num_conv_pos_embedding_groups": 8}
    return Data2VecAudioConfig(**SHAPE | options | more)


def image(**more):
    options = {"image_size": 32, "patch_size": 8, "layer_scale_init_value": 0.1, "out_indices": [2]}
    options |= {"use_shared_relative_position_bias": True, "use_mean_pooling": False}
    return Data2VecVisionConfig(**SHAPE | options | more)


def words(kind=RobertaConfig, **more):
    return kind(**SHAPE | {"vocab_size": 50, "max_position_embeddings": 66, "layer_norm_eps": 1e-5} | more)


def draw(seed=1):
    return torch.Generator().manual_seed(seed)


def given(name):
    if name == "speech":
        return {"input_values": torch.randn(2, 8000, generator=draw())}
    if name == "vision":
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=draw())}
    ids = torch.randint(4, 50, (2, 20), generator=draw())
    ids[1, 12:] = 1
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}


KINDS = {
    "speech": (speech, Data2VecAudioModel, audio),
    "vision": (vision, Data2VecVisionModel, image),
    "roberta": (text, RobertaModel, words),
    "data2vec-text": (text, Data2VecTextModel, lambda: words(Data2VecTextConfig)),
}


def drawn(name):
    """A model of transformers, all weights drawn anew."""
    _, kind, config = KINDS[name]
    model, source = kind(config()).eval(), draw(0)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=source)
    return model


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_the_shared_transformer_gives_the_outputs_of_the_class_of_the_same_structure(name):
    theirs, inputs = drawn(name), given(name)
    config, weights = KINDS[name][0].from_native(theirs.config, theirs.state_dict())
    ours = MmsslModel(config).eval()
    ours.encoder.load_state_dict(weights)
    valid = inputs.get("attention_mask", torch.ones(2, 1)).bool()
    found, wanted = ours(**inputs).last_hidden_state, theirs(**inputs).last_hidden_state
    if "attention_mask" in inputs:
        found, wanted = found[valid], wanted[valid]
    assert float(wanted.std()) > 0.1
    assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["speech", "vision", "roberta"])
def test_there_and_back_gives_the_same_weights_under_the_same_names(name):
    theirs = drawn(name)
    module = KINDS[name][0]
    before = theirs.state_dict()
    config, weights = module.from_native(theirs.config, before)
    back, after = module.to_native(config, weights)
    assert type(back) is type(theirs.config)
    made = {"pooler.dense.weight", "pooler.dense.bias"}  # of RoBERTa
    assert set(after) == set(before)
    for weight in set(before) - made:
        assert_close(after[weight], before[weight], rtol=0, atol=0)
    if name == "roberta":
        assert_close(after["pooler.dense.weight"], torch.eye(32), rtol=0, atol=0)
    names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps"]
    names += ["vocab_size", "max_position_embeddings", "pad_token_id", "type_vocab_size"] if name == "roberta" else []
    assert {n: getattr(back, n) for n in names} == {n: getattr(theirs.config, n) for n in names}


OURS = {
    "speech": (
        speech,
        {
            "norm_eps": 1e-5,
            "extra_tokens": 0,
            "alibi": False,
            "conv_channels": 24,
            "position_layers": 5,
            "position_groups": 8,
        },
    ),
    "text": (
        text,
        {
            "norm_eps": 1e-5,
            "extra_tokens": 0,
            "vocab_size": 50,
            "max_tokens": 64,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "vision": (
        vision,
        {"norm": "pre", "positions": "relative", "layer_scale": 0.1, "image_size": 32, "patch_size": 8, "channels": 3},
    ),
}


@pytest.mark.parametrize("modality", OURS)
@torch.no_grad()
def test_what_we_train_runs_under_transformers(modality):
    module, options = OURS[modality]
    encoder = Encoder.from_config(config := MmsslConfig(modality, 32, depth=2, heads=4, **options)).eval()
    source = draw(0)
    for parameter in encoder.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=source)
    ours = MmsslModel(config).eval()
    ours.encoder.load_state_dict(encoder.state_dict())
    back, weights = module.to_native(config, dict(encoder.state_dict()))
    theirs = next(kind for _, kind, make in KINDS.values() if type(make()) is type(back))(back).eval()
    theirs.load_state_dict(weights)
    inputs = given("roberta" if modality == "text" else modality)
    valid = inputs.get("attention_mask", torch.ones(2, 1)).bool()
    found, wanted = theirs(**inputs).last_hidden_state, ours(**inputs).last_hidden_state
    if modality == "text":
        found, wanted = found[valid], wanted[valid]
    assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("modality", "other"),
    [
        ("speech", {"alibi": True}),
        ("speech", {"prenet_depth": 1}),
        ("speech", {"norm": "pre"}),
        ("speech", {"extra_tokens": 1}),
        ("speech", {"norm_eps": 1e-6}),
        ("speech", {"layer_scale": 0.1}),
        ("text", {"prenet_depth": 1}),
        ("text", {"norm": "pre"}),
        ("text", {"extra_tokens": 1}),
        ("text", {"layer_scale": 0.1}),
        ("vision", {"norm": "post"}),
        ("vision", {"positions": "none"}),
        ("vision", {"extra_tokens": 0}),
        ("vision", {"layer_scale": 0.0}),
        ("vision", {"prenet_depth": 1}),
    ],
)
def test_what_transformers_does_not_have_stays_ours(modality, other):
    module, options = OURS[modality]
    config = MmsslConfig(modality, 32, depth=2, heads=4, **options | other)
    assert module.to_native(config, dict(Encoder.from_config(config).state_dict())) is None


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (speech, audio(hidden_act="relu")),
        (speech, audio(feat_extract_activation="relu")),
        (speech, audio(add_adapter=True)),
        (speech, audio(conv_kernel=(10, 3, 3, 3, 3, 2, 4))),
        (speech, audio(conv_dim=(24, 24, 24, 24, 24, 24, 32))),
        (speech, audio(layer_norm_eps=1e-6)),
        (text, words(hidden_act="gelu_new")),
        (text, words(is_decoder=True)),
        (vision, image(hidden_act="gelu_new")),
        (vision, image(use_mean_pooling=True)),
        (vision, image(use_shared_relative_position_bias=False)),
        (vision, image(use_relative_position_bias=True)),
        (vision, image(use_absolute_position_embeddings=True)),
        (vision, image(layer_scale_init_value=0.0)),
        (vision, words()),
        (text, image()),
        (speech, words()),
    ],
)
def test_what_the_shared_transformer_does_not_have_stays_theirs(module, config):
    assert module.from_native(config, {}) is None


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_a_folder_of_transformers_loads_onto_the_shared_transformer(name, tmp_path):
    theirs, inputs = drawn(name), given(name)
    theirs.save_pretrained(tmp_path)
    ours = load_encoder(tmp_path)
    assert type(ours) is MmsslModel
    assert not ours.training
    valid = inputs.get("attention_mask", torch.ones(2, theirs(**inputs).last_hidden_state.shape[1])).bool()
    assert_close(ours(**inputs).last_hidden_state[valid], theirs(**inputs).last_hidden_state[valid], rtol=0, atol=1e-5)


def test_another_structure_runs_as_it_is(tmp_path):
    RobertaModel(words(hidden_act="gelu_new")).save_pretrained(tmp_path)
    assert type(load_encoder(tmp_path)) is RobertaModel


def test_missing_weights_are_named():
    theirs = drawn("roberta")
    weights = theirs.state_dict()
    del weights["encoder.layer.1.output.dense.bias"]
    with pytest.raises(ValueError, match=r"^the weights lack encoder\.layer\.1\.output\.dense\.bias$"):
        text.from_native(theirs.config, weights)
    with pytest.raises(ValueError, match="lack a and 1 more"):
        native.renamed({}, {"a": "b", "c": "d"})
