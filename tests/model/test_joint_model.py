"""The one model that a run of several kinds of data exports."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel

from mmssl import MmsslModel, load_encoder
from mmssl.config import JointRecipe, load_recipe
from mmssl.errors import RecipeError
from mmssl.hub.export import export_encoders, load_weights, member_folder
from mmssl.hub.flatten import flatten
from mmssl.hub.formats import export_as
from mmssl.hub.push import plan
from mmssl.training.objective import JointObjective, Objective
from mmssl.training.state import model_state
from modalities.text.tokenizer import train
from tests.strangers import STRANGER, start

DECODER = "{dim: 16, groups: 4, kernel: 3, layers: 1}"
RECIPE = f"""\
modalities:
  vision:
    model: {{image_size: 16, patch_size: 4, pooling: cls}}
    views: {{mask: {{copies: 2}}}}
  photos:
    data: {{modality: vision}}
    model: {{image_size: 32, patch_size: 8, extra_tokens: 2}}
    views: {{mask: {{copies: 2}}}}
  speech:
    model: {{conv_channels: 8, position_groups: 4, extra_tokens: 0}}
    method: {{cls_weight: 0}}
    views: {{mask: {{copies: 2}}}}
  text:
    model: {{max_tokens: 32, extra_tokens: 0}}
    method: {{cls_weight: 0}}
    views: {{tokenizer: TOKENIZER, mask: {{copies: 2}}}}
data: {{path: null}}
model: {{hidden_size: 16, depth: 2, heads: 2, norm_eps: 1.0e-5}}
method: {{name: data2vec2, top_k: 2, momentum: 0.5, decoder: {DECODER}}}
train: {{steps: 2, global_batch: 8}}
out: OUT
"""
DRAW = torch.Generator().manual_seed(0)
PIXELS, PHOTOS = torch.randn(2, 3, 16, 16, generator=DRAW), torch.randn(2, 3, 32, 32, generator=DRAW)
WAVES = torch.randn(2, 6000, generator=DRAW)
IDS = torch.tensor([[2, 9, 8, 7, 6, 3], [2, 9, 3, 1, 1, 1]])
INPUTS = {
    "vision": {"pixel_values": PIXELS, "member": "vision"},
    "photos": {"pixel_values": PHOTOS, "member": "photos"},
    "speech": {"input_values": WAVES, "attention_mask": (torch.arange(6000) < torch.tensor([[6000], [4000]])).long()},
    "text": {"input_ids": IDS, "attention_mask": (IDS != 1).long()},
}
PADS = {"speech": torch.arange(18) >= torch.tensor([[18], [12]]), "text": IDS == 1}

# What somebody does who trains one of them and saves all.
AGAIN = (
    STRANGER
    + """
from safetensors import safe_open
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
optimizer = torch.optim.SGD(model.members["photos"].parameters(), lr=1.0)
model(**torch.load(given, weights_only=True)[1]).pooler_output.square().mean().backward()
optimizer.step()
model.save_pretrained("again")
again = AutoModel.from_pretrained("again", trust_remote_code=True)
own, other = model.state_dict(), again.state_dict()
assert own.keys() == other.keys()
assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())
assert not torch.equal(own["members.photos.features.proj.weight"], start["members.photos.features.proj.weight"])
shared = "members.text.transformer.blocks.1.mlp.fc1.weight"
assert not torch.equal(own[shared], start[shared])
assert again.members["text"].transformer.blocks is again.members["photos"].transformer.blocks
first, second = (safe_open(f"{place}/model.safetensors", "pt").keys() for place in (folder, "again"))
assert {*first} == {*second}
for name in again.config.members:  # each of a folder of its own
    AutoModel.from_pretrained(folder, subfolder=name, trust_remote_code=True)
"""
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train(["the quick brown fox jumps over the lazy dog"] * 20, "bpe", 60, place)
    return place


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    """Function: changes of the recipe -> recipe and objective whose students and teachers have drifted apart."""

    def build(*changes: tuple[str, str]) -> tuple[JointRecipe, JointObjective]:
        text = RECIPE.replace("TOKENIZER", str(tokenizer)).replace("OUT", str(tmp_path_factory.mktemp("run")))
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        (path := tmp_path_factory.mktemp("recipe") / "joint.yaml").write_text(text)
        recipe, draw = load_recipe(path), torch.Generator().manual_seed(1)
        assert isinstance(recipe, JointRecipe)
        objective = JointObjective({name: Objective(method) for name, method in recipe.build().items()}).eval()
        for parameter in objective.method.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
        return recipe, objective

    return build


def exported(recipe, objective, place, which=None):
    views = {name: member.build_views() for name, member in recipe.members.items()}
    return export_encoders(recipe, views, model_state(objective), place, which, {"probe/vision.test/knn": 0.5})


@pytest.fixture(scope="module")
def joint(made, tmp_path_factory):
    """Recipe, objective and exported folder."""
    recipe, objective = made()
    return recipe, objective, exported(recipe, objective, tmp_path_factory.mktemp("exported") / "model")


@torch.no_grad()
def said(encoder, name, ears=None):
    """Of an encoder as it was trained: tokens, what it pools, and its blocks. ears: whose features it has, if not its own."""
    features = (ears or encoder).features(next(iter(INPUTS[name].values())))
    encoded = encoder.contextualize(features, pad=PADS.get(name), collect="block")
    return [encoded.tokens, encoder.pool(encoded), *encoded.layers]


@torch.no_grad()
def heard(model, name):
    """The same of a model."""
    out = model(**INPUTS[name], output_hidden_states=True)
    return content([out.last_hidden_state, out.pooler_output, *out.hidden_states], model.members[name])


def content(outs, encoder):
    """Without extra tokens, as an encoder gives it."""
    extra = encoder.transformer.extra_tokens
    return [out[:, extra:] if out.ndim == 3 else out for out in outs]


# Who loads it ----------------------------------------------------------------------------------------------------------


def test_strangers_hear_of_each_kind_of_data_what_training_heard_and_can_go_on(joint, tmp_path):
    _, objective, folder = joint
    torch.save([*INPUTS.values()], tmp_path / "given.pt")
    process = start(tmp_path, AGAIN, folder, tmp_path / "given.pt", tmp_path / "found.pt")
    told, _ = process.communicate(timeout=600)
    assert process.returncode == 0, told
    for name, found in zip(INPUTS, torch.load(tmp_path / "found.pt", weights_only=True), strict=True):
        encoder = objective.members[name].method.student.encoder
        assert_close(content(found, encoder), said(encoder, name), rtol=0, atol=1e-5)
        assert float(found[1].std()) > 0.01


def test_what_is_shared_is_stored_once(joint):
    recipe, objective, folder = joint
    weights = load_file(folder / "model.safetensors")
    encoders = {name: part.method.student.encoder for name, part in objective.members.items()}
    assert {n for n in weights if ".blocks." in n} == {
        f"members.vision.transformer.{n}"
        for n, _ in encoders["vision"].transformer.named_parameters()
        if n.startswith("blocks.")
    }
    whole = torch.nn.ModuleDict(encoders)
    assert sum(t.numel() for t in weights.values()) == sum(
        t.numel() for t in {id(t): t for t in (*whole.parameters(), *whole.buffers())}.values()
    )
    model = load_encoder(folder)
    assert type(model) is MmsslModel
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in whole.parameters())
    assert {name: own["modality"] for name, own in model.config.members.items()} == {
        name: member.data.modality for name, member in recipe.members.items()
    }


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"pixel_values": PIXELS}, "photos and vision take pixel_values; say whose it is with member=NAME"),
        ({"input_values": WAVES, "input_ids": IDS}, "are inputs of speech and text; give those of one in each call"),
        ({}, "takes pixel_values, input_values or input_ids"),
        ({"input_ids": IDS, "member": "speech"}, "takes input_values"),
        ({"input_ids": IDS, "member": "smell"}, "this model has photos, speech, text and vision"),
    ],
)
def test_what_could_be_meant_for_several_is_refused(joint, given, told):
    with pytest.raises(ValueError, match=told):
        load_encoder(joint[2])(**given)


def test_a_model_of_one_kind_of_data_has_no_members(joint):
    model = load_encoder(joint[2] / "vision")
    with pytest.raises(ValueError, match="member='vision': this model has none"):
        model(pixel_values=PIXELS, member="vision")


def test_the_lines_of_the_card_say_what_each_folder_says(joint):
    recipe, _, folder = joint
    card = (folder / "README.md").read_text()
    assert "transformer of" not in card.split("```")[0]
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    draw = np.random.default_rng(0)
    found = {
        "image": Image.fromarray(draw.integers(0, 255, (40, 50, 3), dtype=np.uint8)),
        "wave": draw.standard_normal(6000).astype(np.float32),
        "text": "the quick brown fox",
    }
    alone = dict(found)
    with torch.no_grad():
        exec(lines.replace('"PATH"', repr(str(folder))), found)
        for name in recipe.members:
            (own,) = re.findall(r"```python\n(.*?)```", (folder / name / "README.md").read_text(), re.DOTALL)
            exec(own.replace('"PATH"', repr(str(folder / name))), alone)
            assert_close(found["features"][name], alone["features"], rtol=0, atol=1e-5)


# Which networks ----------------------------------------------------------------------------------------------------------


DINO = (
    "    views: {mask: {copies: 2}}\n  photos:",
    "    method: {name: dino, hidden: 16, bottleneck: 8, prototypes: 12}\n  photos:",
)


def test_members_whose_papers_use_unlike_networks_have_a_transformer_each(made, tmp_path):
    recipe, objective = made(DINO)
    folder = exported(recipe, objective, tmp_path / "model")
    model = load_encoder(folder)
    for name in INPUTS:
        network = objective.members[name].method
        encoder = network.teacher.encoder if name == "vision" else network.student.encoder
        assert_close(heard(model, name), said(encoder, name), rtol=0, atol=1e-5)
    blocks = {name: model.members[name].transformer.blocks for name in INPUTS}
    assert blocks["text"] is blocks["speech"] is blocks["photos"] is not blocks["vision"]
    assert "The transformer of photos is another than that of vision." in (folder / "README.md").read_text()
    students = load_encoder(exported(recipe, objective, tmp_path / "students", "student"))
    assert students.members["vision"].transformer.blocks is students.members["text"].transformer.blocks
    assert_close(heard(students, "vision"), said(objective.members["vision"].method.student.encoder, "vision"))


SLOWER = ("{cls_weight: 0}", "{cls_weight: 0, momentum: 0.9}")


@pytest.mark.parametrize(("changes", "speaks"), [((), "vision"), ((SLOWER, SLOWER), "speech")])
def test_teachers_that_share_a_transformer_do_so_in_their_model(made, tmp_path, changes, speaks):
    """Those of text and speech hold nothing of their own."""
    recipe, objective = made(*changes)
    weights = model_state(objective)
    assert not [name for name in weights if name.startswith("members.text.method.teacher.")]
    model = load_encoder(exported(recipe, objective, tmp_path / "model", "teacher"))
    for name in INPUTS:
        network = objective.members[name].method
        ears = network.student.encoder if name in ("speech", "text") else None
        assert_close(heard(model, name), said(network.teacher.encoder, name, ears), rtol=0, atol=1e-5)
        assert not torch.allclose(heard(model, name)[1], said(network.student.encoder, name)[1], atol=1e-3)
    blocks = {name: model.members[name].transformer.blocks for name in INPUTS}
    assert blocks["photos"] is blocks["vision"]
    assert blocks["text"] is blocks["speech"] is blocks[speaks]
    assert (blocks["text"] is blocks["vision"]) == (not changes)


# What else reads it ------------------------------------------------------------------------------------------------------


def test_a_run_begins_with_the_encoder_of_its_kind_of_data(joint):
    recipe, objective, folder = joint
    fresh = recipe.members["speech"].build().student.encoder
    load_weights(fresh, folder)
    wanted = objective.members["speech"].method.student.encoder.state_dict()
    assert_close(dict(fresh.state_dict()), dict(wanted), rtol=0, atol=0)
    with pytest.raises(RecipeError, match=r"of vision are photos and vision\. Name the folder of one, such as .*/photos"):
        load_weights(recipe.members["vision"].build().student.encoder, folder)


def test_all_of_it_is_pushed_and_cards_know_where_they_will_be(joint, tmp_path):
    _, _, folder = joint
    files = plan(folder, "lab/all").files
    assert {*files} == {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    assert {"config.json", "model.safetensors", "modeling_mmssl.py", "vision/config.json", "text/tokenizer.json"} <= {*files}
    assert b'AutoTokenizer.from_pretrained("lab/all", subfolder="text")' in files["README.md"]
    assert b'AutoTokenizer.from_pretrained("lab/all", subfolder="text")' in files["text/README.md"]
    assert not any(b'"PATH"' in data for data in files.values() if isinstance(data, bytes))
    (tmp_path / "checkpoint-1").mkdir()
    for place in (tmp_path, tmp_path / "checkpoint-1"):
        (place / "config.json").write_bytes((folder / "config.json").read_bytes())
        (place / "model.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match="checkpoint-1 is no plain file"):
        plan(tmp_path, "lab/all")


def test_on_the_hub_a_member_is_found_by_its_name(joint, tmp_path, monkeypatch):
    import huggingface_hub

    place = tmp_path / "models--lab--all"
    (place / "refs").mkdir(parents=True)
    (place / "snapshots").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).symlink_to(joint[2])
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = member_folder("lab/all", "text")
    assert json.loads((found / "config.json").read_text()) == json.loads((joint[2] / "text" / "config.json").read_text())
    for where in ("lab/all", joint[2]):
        with pytest.raises(RecipeError, match=r"(lab/all|model) holds no model of smell alone"):
            member_folder(where, "smell")


def test_features_that_would_hide_each_other_in_one_file_are_refused(tmp_path, monkeypatch):
    for name in ("one_features", "other_features"):
        (tmp_path / f"{name}.py").write_text('"""Doc."""\n\nfrom torch import nn\n\n\nSIZE = 3\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert "SIZE = 3" in flatten("one_features", "one_features")
    with pytest.raises(ValueError, match="one_features and other_features both define SIZE"):
        flatten("one_features", "other_features")


def test_the_class_is_known_without_code_of_the_folder(joint):
    assert type(AutoModel.from_pretrained(joint[2])) is MmsslModel


@torch.no_grad()
def test_other_libraries_get_the_encoder_of_each_kind_of_data(joint, tmp_path, capsys):
    """A folder for each where it fits; what does not fit is left out and named."""
    runtime = pytest.importorskip("onnxruntime")
    recipe, objective, _ = joint
    views, tensors = {name: member.build_views() for name, member in recipe.members.items()}, model_state(objective)
    place = export_as("onnx", recipe, views, tensors, tmp_path / "onnx")
    assert {folder.name for folder in place.iterdir()} == {*INPUTS}
    assert "left out" not in capsys.readouterr().err
    for name, method in objective.method.members.items():
        session = runtime.InferenceSession(str(place / name / "model.onnx"))
        given = {put.name: INPUTS[name][put.name].numpy() for put in session.get_inputs()}
        tokens, pool, *_ = said(method.student.encoder, name)
        found, pooled = session.run(["last_hidden_state", "pooler_output"], given)
        (content_tokens,) = content([torch.from_numpy(found)], method.student.encoder)
        valid = ~PADS[name] if name in PADS else torch.ones(tokens.shape[:2], dtype=torch.bool)
        assert_close(content_tokens[valid], tokens[valid], rtol=1e-4, atol=1e-4)
        assert_close(torch.from_numpy(pooled), pool, rtol=1e-4, atol=1e-4)
    heads = export_as("heads", recipe, views, tensors, tmp_path / "heads")
    assert {folder.name for folder in heads.iterdir()} == {*INPUTS}
    for name, method in objective.method.members.items():
        saved = load_file(heads / name / "heads.safetensors")
        own = method.state_dict()
        assert saved
        assert all(torch.equal(tensor, own[n]) for n, tensor in saved.items())
    with pytest.raises(RecipeError, match=r"(?s)vision: .*speech: timm holds encoders of images"):
        export_as("timm", recipe, views, tensors, tmp_path / "timm")
