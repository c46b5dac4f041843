"""Going on from a released encoder: what the recipe leaves open comes from the model."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModel,
    BertConfig,
    BitImageProcessor,
    Data2VecAudioConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    HubertConfig,
    ResNetConfig,
    RobertaConfig,
    ViTConfig,
    Wav2Vec2Config,
)

from mmssl.cli import main
from mmssl.config import Recipe, load_recipe
from mmssl.config.chosen import model_options
from mmssl.config.continuing import adopt
from mmssl.errors import RecipeError
from mmssl.hub.export import load_encoder, load_weights
from mmssl.model.configuration import MmsslConfig
from mmssl.model.modeling import MmsslModel
from mmssl.training.optim import build_optimizer, set_rates
from mmssl.training.pretrain import prepare, pretrain
from mmssl.types import Clock

BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = BODY | {"intermediate_size": 24}
IMAGE = {"image_size": 16, "patch_size": 4}
SOUND = WIDE | {"conv_dim": [8] * 7, "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 9}
WORDS = WIDE | {"vocab_size": 40, "max_position_embeddings": 20}
MODELS = {
    "vit": (ViTConfig(**WIDE, **IMAGE), "vision", "mae"),
    "dinov2": (Dinov2Config(**BODY, **IMAGE), "vision", "data2vec2"),
    "resnet": (ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"), "vision", "byol"),
    "wav2vec2": (Wav2Vec2Config(**SOUND), "speech", "wav2vec2"),
    "hubert": (HubertConfig(**SOUND), "speech", "hubert"),
    "data2vec-audio": (Data2VecAudioConfig(**WIDE, conv_dim=[8] * 7, num_conv_pos_embedding_groups=4), "speech", "data2vec1"),
    "bert": (BertConfig(**WORDS), "text", "mlm"),
    "roberta": (RobertaConfig(**WORDS, pad_token_id=1), "text", "mlm"),
}


def saved(config, folder, seed=0):
    """A model with random weights, as a folder."""
    torch.manual_seed(seed)
    model = AutoModel.from_config(config)
    model.save_pretrained(folder)
    return model.eval()


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A tiny DINOv3 with registers and its preprocessing, as a folder."""
    folder = tmp_path_factory.mktemp("released")
    saved(DINOv3ViTConfig(**WIDE, **IMAGE, num_register_tokens=2), folder)
    size = {"height": 16, "width": 16}
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    BitImageProcessor(size={"shortest_edge": 16}, crop_size=size, image_mean=mean, image_std=std).save_pretrained(folder)
    return folder


def further(released, image_folder, out, *words):
    """The recipe of a run that goes on, with short steps."""
    shorter = ("train.epochs=null", "train.steps=3", "train.global_batch=8", "train.device=cpu", "data.workers=0")
    own = ("method.decoder={dim: 16, groups: 4, layers: 1}", "optim.warmup=0", "watch.linear=false", "watch.samples=20")
    return load_recipe(
        None, f"model.init={released}", f"data={image_folder}", f"out={out}", "optim.heads_first=1", *shorter, *own, *words
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_method_that_suits_a_model_is_chosen(name, tmp_path):
    config, kind, method = MODELS[name]
    saved(config, tmp_path)
    raw = {"data": {"path": "x"}, "model": {"init": str(tmp_path)}, "method": {"name": "auto"}}
    adopt(raw, model_options)
    assert (raw["data"]["modality"], raw["method"]["name"]) == (kind, method)
    if name == "resnet":
        assert raw["model"] == {"init": str(tmp_path), "backbone": "resnet"}
    else:
        shape = {"hidden_size": 16, "depth": 2, "heads": 2}
        assert {key: raw["model"][key] for key in shape} == shape
        assert "pooling" not in raw["model"]  # which is the method's to say
    if kind == "text":
        assert raw["views"]["tokenizer"] == str(tmp_path)


def test_without_a_recipe_the_model_says_all_that_is_left_open(released, image_folder, tmp_path):
    recipe = further(released, image_folder, tmp_path / "run")
    told = {"hidden_size": 16, "depth": 2, "heads": 2, "extra_tokens": 3, "positions": "rotary", "norm": "pre"}
    assert {name: getattr(recipe.model, name) for name in told} == told
    assert (recipe.data.modality, recipe.method.name, recipe.method.top_k) == ("vision", "data2vec2", 2)
    assert ([*recipe.views.mean], [*recipe.views.std]) == ([0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    other = further(released, image_folder, tmp_path / "run", "views.mean=[0.5]", "views.std=[0.5]", "method.top_k=1")
    assert ([*other.views.mean], other.method.top_k) == ([0.5], 1)


@pytest.mark.parametrize(("side", "channels"), [(32, 3), (16, 1), (32, 1)])
@torch.no_grad()
def test_images_of_another_size_or_without_colour_are_seen_as_before(side, channels, tmp_path, image_folder):
    theirs = saved(ViTConfig(**WIDE, **IMAGE), tmp_path)
    words = (f"model.init={tmp_path}", f"data={image_folder}", f"model.image_size={side}", f"model.channels={channels}")
    recipe = load_recipe(None, *words, "views.mean=[0.5]", "views.std=[0.5]", "method.decoder={dim: 16, depth: 1, heads: 2}")
    encoder = recipe.build().student.encoder.eval()
    load_weights(encoder, tmp_path)
    grey = torch.randn(2, 1, side, side, generator=torch.Generator().manual_seed(0))
    wanted = theirs(grey.expand(-1, 3, -1, -1), interpolate_pos_encoding=side != 16).last_hidden_state[:, 1:]
    found = encoder.contextualize(encoder.features(grey.expand(-1, channels, -1, -1))).tokens
    assert_close(found, wanted, rtol=0, atol=1e-5)


def test_grey_images_have_the_mean_of_the_means_of_colours(released, image_folder):
    recipe = load_recipe(
        None, f"model.init={released}", f"data={image_folder}", "model.channels=1", "method.decoder={dim: 16, groups: 4}"
    )
    assert [*recipe.views.mean] == pytest.approx([0.5])
    assert [*recipe.views.std] == pytest.approx([0.25])


def test_a_run_goes_on_and_ends_as_a_model_of_the_same_class(released, image_folder, tmp_path):
    recipe = further(released, image_folder, tmp_path / "run")
    run = prepare(recipe)
    start = {name: value.clone() for name, value in run.objective.method.student.encoder.state_dict().items()}
    assert_close(start, load_encoder(released).encoder.state_dict(), rtol=0, atol=0)
    run.train()
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert (config["model_type"], config["num_register_tokens"]) == ("dinov3_vit", 2)
    after = load_encoder(tmp_path / "run" / "model").encoder.state_dict()
    assert any(not torch.equal(after[name], value) for name, value in start.items())
    again = Recipe.load(tmp_path / "run" / "config.yaml")  # all is written down: the model is not asked again
    assert again.dump() == recipe.dump()


def test_heads_learn_first(released, image_folder, tmp_path):
    recipe = further(released, image_folder, tmp_path / "run", "optim.heads_first=2")
    method = recipe.build()
    start = {name: parameter.detach().clone() for name, parameter in method.named_parameters()}
    optimizer = build_optimizer(type("Held", (), {"method": method, "probes": []})(), recipe.optim)
    moved = []
    for step in range(3):
        set_rates(optimizer, 1e-2, Clock(step, 10), method)
        for parameter in method.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved.append({name for name, value in method.named_parameters() if not torch.equal(value, start[name])})
    encoder = {name for name in start if name.startswith("student.encoder.")}
    assert moved[0] == moved[1] == {*start} - encoder != set()
    assert encoder <= moved[2]


def test_a_model_of_our_own_goes_on_by_the_method_it_had_room_for(tiny_recipe, image_folder, tmp_path):
    pretrain(tiny_recipe("watch.linear=false", f"out={tmp_path / 'first'}"))
    words = ("method.decoder={dim: 16, groups: 4}", "method.top_k=1")
    recipe = load_recipe(None, f"model.init={tmp_path / 'first' / 'model'}", f"data={image_folder}", *words)
    assert (recipe.method.name, recipe.model.prenet_depth, recipe.model.norm) == ("data2vec2", 1, "post")
    load_weights(recipe.build().student.encoder, tmp_path / "first" / "model")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), r"RECIPE: missing; .*model\.init"),
        (("model.init=nowhere/at/all", "data=x"), r"model\.init: nowhere/at/all: no such folder"),
        (("vision/mae-demo", "method=auto"), r"method\.name: auto chooses .* give model\.init"),
        (("vision/mae-demo", "method=anchor"), r"method\.name: anchor holds another method back; put one before it"),
        (("vision/mae-demo", "optim.heads_first=5000"), r"optim\.heads_first: 5000 of train\.steps 800, nothing"),
    ],
)
def test_mistakes_are_told_with_the_mend(words, said):
    recipe = words[0] if words and "=" not in words[0] else None
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe, *words[recipe is not None :])


def test_a_folder_of_several_members_is_to_be_named(tmp_path):
    own = {"modality": "vision", **IMAGE}
    config = MmsslConfig(hidden_size=16, depth=1, heads=2, members={"a": own, "b": own | {"trunk": "a"}})
    MmsslModel(config).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"model\.init: .* takes a and b; name the folder of one"):
        load_recipe(None, f"model.init={tmp_path}", "data=x")


def test_the_command_needs_no_recipe(capsys):
    assert main(["pretrain"]) == 2
    assert "RECIPE: missing" in capsys.readouterr().err
