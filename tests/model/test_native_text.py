"""BERT, RoBERTa and Data2VecText on the shared transformer, and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertModel,
    Data2VecTextConfig,
    Data2VecTextForMaskedLM,
    Data2VecTextModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
)

from mmssl.hub.export import load_encoder
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.modeling import MmsslModel
from modalities.text import convert
from modalities.text.features import TextFeatures

VECTORS = json.loads((Path(__file__).parents[1] / "vectors" / "masked-prediction.json").read_text())
SIZES = {"small": (32, 3, 4, 72), "wide": (48, 6, 6, 192)}
BERT = {"vocab_size": 60, "max_position_embeddings": 40, "layer_norm_eps": 1e-12}
ROBERTA = {"vocab_size": 60, "max_position_embeddings": 42, "layer_norm_eps": 1e-5, "type_vocab_size": 1}
KINDS = {
    "bert": (BertModel, BertConfig, BERT),
    "roberta": (RobertaModel, RobertaConfig, ROBERTA),
    "data2vec-text": (Data2VecTextModel, Data2VecTextConfig, ROBERTA),
}
MADE = {"pooler.dense.weight", "pooler.dense.bias"}
TYPES = "embeddings.token_type_embeddings.weight"


def shape(size="small", **more):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return dict(zip(names, SIZES[size])) | more


def redrawn(model):
    """The model in float64 with weights like those of a trained one: small tables, products that keep their size."""
    draw = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        if parameter.ndim > 1:
            table = "embeddings" in name or "features" in name
            parameter.data = 0.02 * noise if table else noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    return model.double().eval()


def model(name, size="small", **more):
    kind, config, options = KINDS[name]
    return redrawn(kind(config(**shape(size) | options | more)))


def ids(pad, side):
    """Ids (3, 20), one row whole, and which of them are no padding."""
    found = torch.randint(4, 60, (3, 20), generator=torch.Generator().manual_seed(1))
    valid = torch.arange(20) < torch.tensor([[20], [12], [3]])
    valid = valid if side == "right" else valid.flip(1)
    return found.masked_fill(~valid, pad), valid


def twin(theirs, **changes):
    """Ours with the weights of theirs, but for the changes of the configuration."""
    config, weights = convert.from_native(theirs.config, theirs.state_dict())
    ours = MmsslModel(MmsslConfig(**config.to_dict() | changes)).double().eval()
    ours.encoder.load_state_dict(weights)
    return ours


def loaded(kind, native, weights):
    """A model of transformers with those weights, none missing and none left over."""
    found, told = kind.from_pretrained(None, config=native, state_dict=weights, output_loading_info=True)
    assert not {name: left for name, left in told.items() if left}, told
    return found.to(next(iter(weights.values())).dtype).eval()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_hidden_states_are_theirs_whatever_the_padding(name, size, side):
    theirs = model(name, size)
    x, valid = ids(theirs.config.pad_token_id, side)
    given = {"input_ids": x, "attention_mask": valid.long()}
    found, wanted = (net(**given, output_hidden_states=True) for net in (twin(theirs), theirs))
    assert float(wanted.last_hidden_state[valid].std()) > 0.5
    assert_close(found.last_hidden_state[valid], wanted.last_hidden_state[valid], rtol=0, atol=1e-10)
    for own, other in zip(found.hidden_states, wanted.hidden_states[1:], strict=True):
        assert_close(own[valid], other[valid], rtol=0, atol=1e-10)


@pytest.mark.parametrize("types", [1, 2])
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_there_and_back(name, types):
    theirs = model(name, type_vocab_size=types)
    before = theirs.state_dict()
    config, weights = convert.from_native(theirs.config, before)
    native, after = convert.to_native(config, weights)
    assert native.model_type == ("bert" if name == "bert" else "roberta")
    assert set(after) == set(before)
    assert all(torch.equal(after[n], before[n]) for n in set(before) - MADE)
    names = [*shape(), "layer_norm_eps", "vocab_size", "max_position_embeddings", "type_vocab_size", "pad_token_id"]
    names += ["bos_token_id", "eos_token_id", "hidden_dropout_prob", "attention_probs_dropout_prob"]
    assert {n: getattr(native, n) for n in names} == {n: getattr(theirs.config, n) for n in names}
    again = loaded(BertModel if name == "bert" else RobertaModel, native, after)
    x, _ = ids(native.pad_token_id, "right")
    assert torch.equal(again(x).last_hidden_state, theirs(x).last_hidden_state)
    assert_close(again(x).pooler_output, theirs(x).last_hidden_state[:, 0].tanh(), rtol=0, atol=1e-10)


@torch.no_grad()
def test_one_type_of_zeros_is_none():
    """RoBERTa's releases have it so, and start a run whose encoder knows no types."""
    theirs = model("roberta")
    theirs.embeddings.token_type_embeddings.weight.data.zero_()
    config, weights = convert.from_native(theirs.config, theirs.state_dict())
    assert config.token_types == 0
    assert "features.types.weight" not in weights
    assert torch.equal(convert.to_native(config, weights)[1][TYPES], theirs.state_dict()[TYPES])


@pytest.mark.parametrize("options", [{}, {"count_padding": True, "pad_token_id": 0}, {"token_types": 2}])
@torch.no_grad()
def test_ours_there_and_back(options):
    config = MmsslConfig("text", 32, 2, 4, extra_tokens=0, vocab_size=60, max_tokens=40, norm_eps=1e-5, **options)
    encoder = redrawn(Encoder.from_config(config))
    native, named = convert.to_native(config, dict(encoder.state_dict()))
    assert native.model_type == ("bert" if options.get("count_padding") else "roberta")
    loaded({"bert": BertModel, "roberta": RobertaModel}[native.model_type], native, named)
    again, found = convert.from_native(native, named)
    assert set(found) == set(encoder.state_dict())
    assert all(torch.equal(found[name], tensor) for name, tensor in encoder.state_dict().items())
    names = ["hidden_size", "depth", "heads", "norm", "norm_eps", "vocab_size", "max_tokens", *options]
    assert {n: getattr(again, n) for n in names} == {n: getattr(config, n) for n in names}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (BertModel, "bert"),
        (BertForMaskedLM, "bert"),
        (BertForPreTraining, "bert"),
        (BertForSequenceClassification, "bert"),
        (RobertaForMaskedLM, "roberta"),
        (Data2VecTextForMaskedLM, "data2vec-text"),
    ],
)
@torch.no_grad()
def test_a_folder_of_transformers_runs_on_the_shared_transformer(kind, name, tmp_path):
    _, config, options = KINDS[name]
    theirs = redrawn(kind(config(**shape() | options)))
    theirs.save_pretrained(tmp_path)
    ours = load_encoder(tmp_path).double()
    assert type(ours) is MmsslModel
    assert not [module for module in ours.modules() if type(module).__module__.startswith("transformers")]
    x, valid = ids(theirs.config.pad_token_id, "right")
    given = {"input_ids": x, "attention_mask": valid.long()}
    wanted = theirs.base_model(**given).last_hidden_state
    assert_close(ours(**given).last_hidden_state[valid], wanted[valid], rtol=0, atol=1e-10)
    direct = convert.from_native(theirs.config, load_file(tmp_path / "model.safetensors"))[1]
    assert_close(dict(ours.encoder.state_dict()), direct, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("roberta", {"norm_eps": 1e-12}),
        ("roberta", {"activation": "gelu_tanh"}),
        ("bert", {"norm_eps": 1e-5}),
        ("bert", {"norm_eps": 1e-6}),
        ("bert", {"activation": "gelu_tanh"}),
    ],
)
@torch.no_grad()
def test_each_detail_counts(name, change):
    theirs = model(name)
    x, _ = ids(theirs.config.pad_token_id, "right")
    wanted = theirs(x[:1]).last_hidden_state
    assert_close(twin(theirs)(input_ids=x[:1]).last_hidden_state, wanted, rtol=0, atol=1e-10)
    assert float((twin(theirs, **change)(input_ids=x[:1]).last_hidden_state - wanted).abs().max()) > 1e-5


@pytest.mark.parametrize("name", ["roberta", "bert"])
@torch.no_grad()
def test_where_positions_begin_and_what_they_count_matters(name, monkeypatch):
    theirs = model(name)
    x, valid = ids(theirs.config.pad_token_id, "left")
    given = {"input_ids": x, "attention_mask": valid.long()}
    wanted, ours = theirs(**given).last_hidden_state[valid], twin(theirs)
    assert_close(ours(**given).last_hidden_state[valid], wanted, rtol=0, atol=1e-10)
    counted = {"roberta": torch.arange(20)[None], "bert": (valid.cumsum(1) - 1).clamp(min=0)}
    monkeypatch.setattr(TextFeatures, "_place", lambda self, ids: counted[name])
    assert float((ours(**given).last_hidden_state[valid] - wanted).abs().max()) > 1e-5


@torch.no_grad()
def test_the_type_of_tokens_matters():
    theirs = model("bert")
    x, _ = ids(0, "right")
    ours, wanted = twin(theirs), theirs(x[:1]).last_hidden_state
    ours.encoder.features.types = None
    assert float((ours(input_ids=x[:1]).last_hidden_state - wanted).abs().max()) > 1e-5


def test_positions_are_the_published_ones():
    for row in VECTORS["roberta_positions"]["rows"]:
        features = TextFeatures(8, 60, pad_token_id=row["pad"], max_tokens=10)
        assert features._place(torch.tensor([row["ids"]])).tolist() == [row["positions"]]
        counting = TextFeatures(8, 60, pad_token_id=row["pad"], max_tokens=10, count_padding=True)
        assert counting._place(torch.tensor([row["ids"]])).tolist() == [[0, 1, 2, 3, 4]]
        assert (features.places.num_embeddings, counting.places.num_embeddings) == (10 + row["pad"] + 1, 10)


@pytest.mark.parametrize(("types", "said"), [(-1, "-1"), (2000, "2000")])
def test_a_senseless_number_of_types_is_refused(types, said):
    with pytest.raises(ValueError, match=rf"^token_types: {said}, must be between 0 and 1024"):
        TextFeatures(8, 60, token_types=types)


@pytest.mark.parametrize(
    "native",
    [
        BertConfig(**shape(hidden_act="gelu_new")),
        BertConfig(**shape(is_decoder=True)),
        BertConfig(**shape(add_cross_attention=True)),
        BertConfig(**shape(pad_token_id=None)),
        RobertaConfig(**shape(hidden_act="relu")),
    ],
)
def test_another_structure_stays_theirs(native):
    assert convert.from_native(native, {}) is None


@pytest.mark.parametrize(
    "other",
    [
        {"norm": "pre"},
        {"extra_tokens": 1},
        {"activation": "gelu_tanh"},
        {"causal": True},
        {"layer_scale": 0.1},
        {"prenet_depth": 1},
    ],
)
@pytest.mark.parametrize("count_padding", [True, False])
def test_another_structure_stays_ours(count_padding, other):
    options = {"hidden_size": 32, "depth": 2, "heads": 4, "extra_tokens": 0, "vocab_size": 60, "count_padding": count_padding}
    assert convert.to_native(MmsslConfig("text", **options | other), {}) is None


@pytest.mark.parametrize(
    ("name", "width", "depth", "options"),
    [
        ("roberta_base_model_with_pooler", 768, 12, {"vocab_size": 50265}),
        ("bert_base_model", 768, 12, {"vocab_size": 30522, "count_padding": True, "token_types": 2, "pad_token_id": 0}),
        ("bert_tiny", 128, 2, {"vocab_size": 30522, "count_padding": True, "token_types": 2, "pad_token_id": 0}),
        ("bert_mini", 256, 4, {"vocab_size": 30522, "count_padding": True, "token_types": 2, "pad_token_id": 0}),
    ],
)
def test_there_are_as_many_parameters_as_in_the_releases(name, width, depth, options):
    config = MmsslConfig("text", width, depth, width // 64, extra_tokens=0, **options)
    with torch.device("meta"):
        encoder = Encoder.from_config(config)
    _, weights = convert.to_native(config, dict(encoder.state_dict()))
    assert sum(tensor.numel() for tensor in weights.values()) == VECTORS["hf_param_counts"][name]
