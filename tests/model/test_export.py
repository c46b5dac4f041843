import inspect
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.testing import assert_close

from mmssl.config import Recipe
from mmssl.errors import RecipeError
from mmssl.hub.export import export_encoder, load_encoder, load_weights
from mmssl.hub.flatten import flatten
from mmssl.model.configuration import MmsslConfig
from mmssl.model.modeling import MmsslModel
from mmssl.training.objective import Objective
from mmssl.training.state import model_state
from mmssl.types import View
from modalities.text.tokenizer import train
from tests.strangers import STRANGER, start

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WAVES = torch.randn(2, 6000, generator=torch.Generator().manual_seed(2))
SAMPLES = (torch.arange(6000) < torch.tensor([[6000], [4000]])).long()

KNOWS = """
import sys
{imports}
model = AutoModel.from_pretrained(sys.argv[1])
assert type(model).__module__ == "mmssl.model.modeling", type(model)
assert type(AutoConfig.from_pretrained(sys.argv[1])).__module__ == "mmssl.model.configuration"
"""
ORDERS = (
    "import mmssl\nfrom transformers import AutoConfig, AutoModel",
    "from transformers import AutoConfig, AutoModel\nimport mmssl",
)


@pytest.fixture
def objective(tiny_recipe):
    """Of a tiny run whose student and teacher have drifted apart."""
    found = Objective(tiny_recipe().build(), classes=2)
    draw = torch.Generator().manual_seed(1)
    for parameter in found.method.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
    return found


@pytest.fixture
def exported(tiny_recipe, objective, tmp_path):
    """Function: which -> folder."""

    def export(which=None):
        recipe = tiny_recipe()
        return export_encoder(recipe, recipe.build_views(), model_state(objective), tmp_path / f"model-{which}", which)

    return export


@pytest.fixture
def run(tmp_path):
    """Function: modality, overrides -> recipe and objective whose student and teacher have drifted apart."""

    def build(modality, *overrides):
        shape = "hidden_size: 16, depth: 2, heads: 2, extra_tokens: 0, norm_eps: 1.0e-5"
        if modality == "speech":
            model, views = f"{{{shape}, conv_channels: 8, position_groups: 4}}", "{mask: {copies: 2}}"
        else:
            train(["the quick brown fox jumps over the lazy dog"] * 20, "bpe", 60, tmp_path / "tokenizer")
            model, views = f"{{{shape}, max_tokens: 32}}", f"{{tokenizer: {tmp_path / 'tokenizer'}, mask: {{copies: 2}}}}"
        path = tmp_path / f"{modality}.yaml"
        path.write_text(
            f"data: {{path: null, modality: {modality}}}\nmodel: {model}\nviews: {views}\ntrain: {{steps: 2}}\n"
            "method: {name: data2vec2, top_k: 2, cls_weight: 0, final_norm: none, teacher_features: share, "
            "decoder: {dim: 16, groups: 4, kernel: 3, layers: 1}}\n"
        )
        recipe = Recipe.load(path, f"out={tmp_path / 'run'}", *overrides)
        objective, draw = Objective(recipe.build()), torch.Generator().manual_seed(1)
        for parameter in objective.method.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw)
        return recipe, objective

    return build


@pytest.fixture
def folder(tmp_path):
    """Function: recipe, objective, which -> exported folder."""

    def export(recipe, objective, which=None):
        place = tmp_path / f"{recipe.data.modality}-{which}"
        return export_encoder(recipe, recipe.build_views(), model_state(objective), place, which)

    return export


def outputs(encoder):
    """Last hidden state with extra tokens, mean pool and blocks, from the parts of an encoder."""
    with torch.no_grad():
        tokens, layers = encoder.transformer(encoder.positions(encoder.features(X))[0], "block")
    return [tokens, tokens[:, 1:].mean(1), *layers]


@torch.no_grad()
def test_t35_strangers_and_friends_load_an_exported_folder(exported, objective, run, folder, tmp_path):
    images, (recipe, heard) = exported(), run("speech")
    sounds = folder(recipe, heard)
    torch.save([{"pixel_values": X}], tmp_path / "images.pt")
    torch.save([{"input_values": WAVES}, {"input_values": WAVES, "attention_mask": SAMPLES}], tmp_path / "sounds.pt")
    (elsewhere := tmp_path / "elsewhere").mkdir()
    files = [tmp_path / name for name in ("images.pt", "images.out", "sounds.pt", "sounds.out")]
    running = [start(elsewhere, STRANGER, images, *files[:2], sounds, *files[2:])]
    running += [start(elsewhere, KNOWS.format(imports=imports), images) for imports in ORDERS]
    for process in running:
        told, _ = process.communicate(timeout=600)
        assert process.returncode == 0, told
    (seen,) = torch.load(files[1], weights_only=True)
    assert_close(seen, outputs(objective.method.student.encoder), rtol=0, atol=1e-6)
    encoder, pad = heard.method.student.encoder, torch.arange(18) >= torch.tensor([[18], [12]])
    whole, padded = torch.load(files[3], weights_only=True)
    for found, own in ((whole, None), (padded, pad)):
        encoded = encoder(View(WAVES, "speech", own), collect="block")
        assert_close(found, [encoded.tokens, encoder.pool(encoded), *encoded.layers], rtol=0, atol=1e-6)
    alone = encoder(View(WAVES[1:, :4000], "speech"))
    assert_close(padded[1][1:], encoder.pool(alone), rtol=0, atol=1e-4)


def test_the_default_is_the_student_and_the_teacher_can_be_had(exported, objective):
    student, teacher = objective.method.student.encoder, objective.method.teacher.encoder
    assert not torch.allclose(outputs(student)[0], outputs(teacher)[0])
    for which, encoder in ((None, student), ("student", student), ("teacher", teacher)):
        found = load_encoder(exported(which))
        with torch.no_grad():
            out = found(pixel_values=X, output_hidden_states=True)
        assert_close([out.last_hidden_state, out.pooler_output, *out.hidden_states], outputs(encoder), rtol=0, atol=1e-6)


def test_the_pooled_output_is_what_the_encoder_pools(exported, objective):
    encoder = objective.method.student.encoder
    with torch.no_grad():
        wanted = encoder.pool(encoder(View(X, "vision")))
        assert_close(load_encoder(exported())(X).pooler_output, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_model_survives_saving(tmp_path, norm, pooling):
    torch.manual_seed(0)
    config = MmsslConfig(
        hidden_size=16,
        depth=2,
        heads=2,
        prenet_depth=1,
        norm=norm,
        pooling=pooling,
        image_size=16,
        patch_size=8,
        extra_tokens=2,
    )
    model = MmsslModel(config).eval()
    model.save_pretrained(tmp_path)
    again = MmsslModel.from_pretrained(tmp_path).eval()
    own = set(inspect.signature(MmsslConfig).parameters) - {"kwargs"} | {"image_size", "patch_size"}
    assert {n: getattr(again.config, n) for n in own} == {n: getattr(config, n) for n in own}
    assert_close(dict(again.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    with torch.no_grad():
        one, other = model(pixel_values=X), again(pixel_values=X, return_dict=False)
    assert len(other) == 2
    assert_close(tuple(other), (one.last_hidden_state, one.pooler_output), rtol=0, atol=0)
    assert one.last_hidden_state.shape == (2, 2 + 4, 16)
    wanted = one.last_hidden_state[:, 0] if pooling == "cls" else one.last_hidden_state[:, 2:].mean(1)
    assert_close(one.pooler_output, wanted, rtol=0, atol=1e-6)
    assert one.hidden_states is None


def test_the_wrong_input_is_answered_with_the_right_one():
    model = MmsslModel(MmsslConfig(hidden_size=16, depth=1, heads=2, image_size=16, patch_size=8))
    with pytest.raises(ValueError, match="takes pixel_values"):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long))


def test_an_exported_folder_is_whole_and_replaces_an_older_one(exported, tmp_path):
    folder = exported()
    before = folder.stat().st_ino
    assert exported() == folder
    assert folder.stat().st_ino != before
    assert {"config.json", "model.safetensors", "modeling_mmssl.py", "README.md"} <= {path.name for path in folder.iterdir()}
    assert (folder / "preprocessor_config.json").is_file() or (folder / "processor_config.json").is_file()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert all(name.startswith("encoder.") for name in load_file(folder / "model.safetensors"))


def test_a_run_without_a_teacher_cannot_export_one(tiny_recipe, objective, tmp_path):
    recipe = tiny_recipe()
    tensors = {name: t for name, t in model_state(objective).items() if ".teacher." not in name}
    with pytest.raises(RecipeError, match=r"^which=teacher: "):
        export_encoder(recipe, recipe.build_views(), tensors, tmp_path / "model", "teacher")
    assert not (tmp_path / "model").exists()


def test_an_exported_folder_starts_another_run(exported, tiny_recipe, objective, tmp_path):
    fresh = tiny_recipe("train.seed=3").build().student.encoder
    load_weights(fresh, exported("teacher"))
    assert_close(outputs(fresh), outputs(objective.method.teacher.encoder), rtol=0, atol=0)
    with pytest.raises(RecipeError, match=r"^model\.init: .*another shape"):
        load_weights(tiny_recipe("model.depth=3").build().student.encoder, exported("teacher"))
    with pytest.raises(RecipeError, match=r"^model\.init: "):
        load_weights(fresh, tmp_path / "nothing")


def test_flattened_code_may_need_nothing_but_torch_and_transformers(tmp_path, monkeypatch):
    (tmp_path / "strange_features.py").write_text('"""Doc."""\n\nimport scipy\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "scipy", sys)
    with pytest.raises(ValueError, match="strange_features imports scipy"):
        flatten("strange_features")


# Speech and text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["student", "teacher"])
@torch.no_grad()
def test_a_teacher_without_features_is_exported_with_those_of_the_student(run, folder, which):
    recipe, objective = run("speech")
    student, teacher = objective.method.student.encoder, objective.method.teacher.encoder
    own = student if which == "student" else teacher
    wanted = own.contextualize(student.features(WAVES)).tokens
    other = (teacher if which == "student" else student).contextualize(student.features(WAVES)).tokens
    assert not torch.allclose(wanted, other, atol=1e-2)
    found = load_encoder(folder(recipe, objective, which))
    assert type(found) is MmsslModel
    assert_close(found(input_values=WAVES).last_hidden_state, wanted, rtol=0, atol=1e-6)


@torch.no_grad()
def test_speech_without_distances_is_a_data2vec_of_transformers(run, folder):
    recipe, objective = run("speech", "model.alibi=false")
    place = folder(recipe, objective)
    theirs = transformers.AutoModel.from_pretrained(place).eval()
    assert type(theirs) is transformers.Data2VecAudioModel
    assert not (place / "modeling_mmssl.py").exists()
    wanted = objective.method.student.encoder(View(WAVES, "speech")).tokens
    assert_close(theirs(WAVES).last_hidden_state, wanted, rtol=0, atol=1e-5)
    ours = load_encoder(place)
    assert type(ours) is MmsslModel
    assert_close(ours(input_values=WAVES).last_hidden_state, wanted, rtol=0, atol=1e-5)
    prepared = transformers.AutoFeatureExtractor.from_pretrained(place)(
        [WAVES[0].numpy(), WAVES[1, :4000].numpy()], sampling_rate=16_000, padding=True, return_tensors="pt"
    )
    assert prepared["attention_mask"].sum(1).tolist() == [6000, 4000]
    assert ours(**prepared).last_hidden_state.shape == (2, 18, 16)


@pytest.mark.parametrize("which", ["student", "teacher"])
@torch.no_grad()
def test_text_is_a_roberta_that_needs_no_code_of_ours(run, folder, which):
    recipe, objective = run("text")
    place = folder(recipe, objective, which)
    theirs = transformers.AutoModel.from_pretrained(place, trust_remote_code=False).eval()
    assert type(theirs) is transformers.RobertaModel
    assert not (place / "modeling_mmssl.py").exists()
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    given = tokenizer(["the quick brown fox jumps", "the dog"], padding=True, return_tensors="pt")
    valid = given["attention_mask"].bool()
    assert not valid.all()
    student, teacher = objective.method.student.encoder, objective.method.teacher.encoder
    features = student.eval().features(given["input_ids"])
    wanted = (student if which == "student" else teacher).contextualize(features, pad=~valid)
    assert_close(theirs(**given).last_hidden_state[valid], wanted.tokens[valid], rtol=0, atol=1e-5)
    ours = load_encoder(place)
    assert type(ours) is MmsslModel
    found = ours(**given)
    assert_close(found.last_hidden_state[valid], wanted.tokens[valid], rtol=0, atol=1e-5)
    assert_close(found.pooler_output, student.pool(wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("modality", "overrides"), [("speech", ()), ("speech", ("model.alibi=false",)), ("text", ()), ("text", ("model.norm=pre",))]
)
@torch.no_grad()
def test_a_folder_of_any_modality_starts_another_run(run, folder, modality, overrides):
    recipe, objective = run(modality, *overrides)
    fresh = recipe.build().student.encoder
    load_weights(fresh, folder(recipe, objective))
    found, wanted = fresh.state_dict(), objective.method.student.encoder.state_dict()
    assert_close(dict(found), dict(wanted), rtol=0, atol=0)


# Backbones ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_strangers_load_a_backbone(image_folder, tmp_path):
    path, inputs = tmp_path / "resnet.yaml", tmp_path / "images.pt"
    path.write_text(
        f"data: {{path: {image_folder}, modality: vision}}\n"
        "model: {backbone: resnet, options: {depths: [1, 2], hidden_sizes: [8, 16], embedding_size: 8}, image_size: 16}\n"
        "method: {name: byol, hidden: 16, dim: 8}\nviews: {crops: [{count: 2}]}\ntrain: {steps: 2}\n"
    )
    torch.save([{"pixel_values": X}], inputs)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    encoders, given = {}, []
    for stem in ("normal", "small"):
        recipe, draw = Recipe.load(path, f"model.stem={stem}"), torch.Generator().manual_seed(1)
        objective = Objective(recipe.build())
        for name, tensor in objective.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=draw)
                tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.3 * noise)
        encoders[stem] = objective.method.student.encoder.eval()
        folder = export_encoder(recipe, recipe.build_views(), model_state(objective), tmp_path / stem)
        assert (folder / "modeling_mmssl.py").exists() is (stem == "small")
        given += [folder, inputs, tmp_path / f"{stem}.out"]
    homes = '("transformers.models.resnet.", "transformers_modules.")'
    process = start(elsewhere, STRANGER.replace('"transformers_modules."', homes), *given)
    told, _ = process.communicate(timeout=600)
    assert process.returncode == 0, told
    for stem, encoder in encoders.items():
        ((last, pooled, *layers),) = torch.load(tmp_path / f"{stem}.out", weights_only=True)
        encoded, (_, local) = encoder(View(X, "vision")), encoder.inspect(View(X, "vision"))
        assert_close(last.flatten(2).transpose(1, 2), encoded.tokens, rtol=0, atol=1e-6)
        assert_close(pooled.flatten(1), encoder.pool(encoded), rtol=0, atol=1e-6)
        assert float(pooled.std()) > 0.01
        middle = layers[0].shape[-1] // 2
        assert_close(layers[0][:, :, middle, middle], local, rtol=0, atol=1e-6)
        out = load_encoder(tmp_path / stem)(pixel_values=X)
        assert_close([out.last_hidden_state, out.pooler_output], [last, pooled], rtol=0, atol=1e-6)
    assert type(load_encoder(tmp_path / "normal")) is transformers.ResNetModel
    assert type(load_encoder(tmp_path / "small")) is MmsslModel
