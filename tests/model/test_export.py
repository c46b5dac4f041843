import inspect
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from mmssl.errors import RecipeError
from mmssl.hub.export import export_encoder, load_encoder, load_weights
from mmssl.hub.flatten import flatten
from mmssl.model.configuration import MmsslConfig
from mmssl.model.modeling import MmsslModel
from mmssl.training.objective import Objective
from mmssl.training.state import model_state
from mmssl.types import View

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

# What a stranger's machine lacks cannot be found there either: the finder says so instead of finding.
STRANGER = """
import importlib.abc, sys
LACKS = {"mmssl", "modalities", "pydantic", "datasets", "deepspeed", "accelerate", "torchvision", "torchaudio", "PIL",
         "sklearn", "soundfile", "sentencepiece", "matplotlib"}
class Lacking(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in LACKS:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)
sys.meta_path.insert(0, Lacking())
import importlib.util
find = importlib.util.find_spec  # transformers asks it what is installed
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in LACKS else find(name, package)
import torch
from transformers import AutoModel
torch.set_num_threads(1)  # as in the tests, so that sums have the same order
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    out = model(pixel_values=torch.load(sys.argv[2], weights_only=True), output_hidden_states=True)
torch.save([out.last_hidden_state, out.pooler_output, *out.hidden_states], sys.argv[3])
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert not LACKS & {name.split(".")[0] for name in sys.modules}
"""

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


def outputs(encoder):
    """Last hidden state with extra tokens, mean pool and blocks, from the parts of an encoder."""
    with torch.no_grad():
        tokens, layers = encoder.transformer(encoder.positions(encoder.features(X)), "block")
    return [tokens, tokens[:, 1:].mean(1), *layers]


def start(folder, code, *arguments):
    """A fresh process in an empty folder, without network."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    bare |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(words, cwd=folder, env=bare, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_strangers_and_friends_load_an_exported_folder(exported, objective, tmp_path):
    folder = exported()
    torch.save(X, tmp_path / "x.pt")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    running = [start(elsewhere, STRANGER, folder, tmp_path / "x.pt", tmp_path / "out.pt")]
    running += [start(elsewhere, KNOWS.format(imports=imports), folder) for imports in ORDERS]
    for process in running:
        told, _ = process.communicate(timeout=120)
        assert process.returncode == 0, told
    assert_close(
        torch.load(tmp_path / "out.pt", weights_only=True), outputs(objective.method.student.encoder), rtol=0, atol=1e-6
    )


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
