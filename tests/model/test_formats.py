"""Exports for other libraries give what the encoder gives, or say why they cannot be."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel

from mmssl.cli import main
from mmssl.config import Recipe
from mmssl.errors import MmsslError, RecipeError
from mmssl.hub import FORMATS
from mmssl.hub.formats import WRITERS, export_as
from mmssl.training.objective import Objective
from mmssl.training.state import model_state
from mmssl.types import View
from modalities.text.tokenizer import train

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
RESNET = ("model.backbone=resnet18", "model.image_size=32")
VIT = ("model.hidden_size=16", "model.depth=2", "model.heads=2", "model.image_size=16", "model.patch_size=4")
SHORT = ("model.depth=1", "method.top_k=1", "model.position_layers=1")
PRE = (*VIT, "model.norm=pre")
SPOKEN = "{name: data2vec2, top_k: 2, cls_weight: 0, final_norm: none, decoder: {dim: 16, groups: 4, kernel: 3, layers: 1}}"
SHAPE = "hidden_size: 16, depth: 2, heads: 2"
RECIPES = {
    "vision": ("{}", "{name: byol, hidden: 32, dim: 8}", "{}"),
    "speech": (f"{{{SHAPE}, extra_tokens: 0, conv_channels: 8, position_groups: 4}}", SPOKEN, "{mask: {copies: 2}}"),
    "text": (f"{{{SHAPE}, extra_tokens: 0, norm_eps: 1.0e-5, max_tokens: 32}}", SPOKEN, "{tokenizer: TOKENIZER, mask: {}}"),
    "spectrogram": (f"{{{SHAPE}, norm: pre, bands: 16, frames: 200, patch_frames: 2}}", "{name: mae}", "{mask: {ratio: 0.5}}"),
}


@pytest.fixture
def written(tmp_path):
    """Function: kind of data, overrides -> the student's encoder with drifted weights, and form -> its export's folder."""

    def build(kind, *overrides):
        model, method, views = RECIPES[kind]
        if kind == "text":
            train(["the quick brown fox jumps over the lazy dog"] * 20, "bpe", 60, tmp_path / "tokenizer")
        path = tmp_path / "recipe.yaml"
        data, views = f"{{path: null, modality: {kind}}}", views.replace("TOKENIZER", str(tmp_path / "tokenizer"))
        path.write_text(f"data: {data}\nmodel: {model}\nmethod: {method}\nviews: {views}\ntrain: {{steps: 2}}\n")
        recipe = Recipe.load(path, *overrides)
        objective, draw = Objective(recipe.build()).eval(), torch.Generator().manual_seed(1)
        for parameter in objective.method.parameters():
            scale = 0.02 + 0.3 * parameter.data.std(correction=0)
            parameter.data += scale * torch.randn(parameter.shape, generator=draw)

        def export(form, **more):
            views = {"": recipe.build_views()}
            return export_as(form, recipe, views, model_state(objective), tmp_path / form, **more)

        return objective.method.student.encoder, export

    return build


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("vision", VIT), ("speech", SHORT), ("spectrogram", ())],
)
@torch.no_grad()
def test_onnx_runtime_gives_what_the_encoder_gives(written, kind, overrides):
    runtime = pytest.importorskip("onnxruntime")
    encoder, export = written(kind, *overrides)
    folder = export("onnx")
    session = runtime.InferenceSession(str(folder / "model.onnx"))
    names = [put.name for put in session.get_inputs()]
    assert (
        names
        == {
            "vision": ["pixel_values"],
            "speech": ["input_values", "attention_mask"],
            "spectrogram": ["input_features", "attention_mask"],
        }[kind]
    )
    draw, pad = torch.Generator().manual_seed(3), None
    shape = {"vision": (5, 3, 16, 16), "speech": (5, 7000), "spectrogram": (5, 30, 16)}[kind]
    given = {names[0]: torch.randn(shape, generator=draw)}
    if len(names) > 1:
        given["attention_mask"] = (torch.arange(shape[1]) < shape[1] * torch.linspace(0.5, 1, 5)[:, None]).long()
        pad = encoder.features.pad(given["attention_mask"])
        assert pad.any()
    out = session.run(["pooler_output"], {name: value.numpy() for name, value in given.items()})
    view = View(given[names[0]], kind, pad)
    assert_close(torch.from_numpy(out[0]), encoder.pool(encoder(view)), rtol=0, atol=1e-4)
    assert (folder / "preprocessor_config.json").is_file()


@torch.no_grad()
def test_onnx_of_text_takes_any_length_and_padding(written):
    runtime = pytest.importorskip("onnxruntime")
    encoder, export = written("text")
    folder = export("onnx")
    session = runtime.InferenceSession(str(folder / "model.onnx"))
    ids = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = (torch.arange(9) < torch.tensor([[9], [4], [7], [1]])).long()
    ids = ids.masked_fill(mask == 0, encoder.features.pad_token_id)
    out = session.run(["pooler_output"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    assert_close(torch.from_numpy(out[0]), encoder.pool(encoder(View(ids, "text", mask == 0))), rtol=0, atol=1e-4)
    assert (folder / "tokenizer.json").is_file()


def test_an_onnx_that_differs_leaves_nothing(written, monkeypatch, tmp_path):
    pytest.importorskip("onnxruntime")
    from mmssl.hub import onnx

    _, export = written("vision", *VIT, "model.depth=1")
    monkeypatch.setattr(onnx, "TOLERANCE", -1.0)
    with pytest.raises(MmsslError, match=r"last_hidden_state of ONNX Runtime differs from that of torch by"):
        export("onnx")
    assert not (tmp_path / "onnx").exists()


def test_without_onnx_the_mend_is_told(written, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    _, export = written("vision", *VIT)
    with pytest.raises(RecipeError, match=r"pip install 'mmssl\[onnx\]'"):
        export("onnx")
    assert not (tmp_path / "onnx").exists()


@pytest.mark.parametrize(
    "overrides",
    [PRE, (*PRE, "model.extra_tokens=3", "model.layer_scale=0.1"), (*PRE, "model.extra_tokens=0"), RESNET],
)
@torch.no_grad()
def test_timm_loads_the_encoder(written, overrides):
    timm = pytest.importorskip("timm")
    encoder, export = written("vision", *overrides)
    for _, buffer in encoder.named_buffers():
        if buffer.ndim == 1:  # statistics of batches
            buffer += torch.rand(buffer.shape, generator=torch.Generator().manual_seed(4))
    folder = export("timm")
    told = json.loads((folder / "config.json").read_text())
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    named = timm.create_model(
        told["architecture"], checkpoint_path=folder / "model.safetensors", num_classes=0, **told["model_args"]
    ).eval()
    x = X if overrides is not RESNET else torch.nn.functional.interpolate(X, (32, 32))
    wanted = encoder.pool(encoder(View(x, "vision")))
    assert_close(model(x), wanted, rtol=0, atol=1e-5)
    assert_close(named(x), wanted, rtol=0, atol=1e-5)
    assert model.pretrained_cfg["mean"] == told["pretrained_cfg"]["mean"]
    assert tuple(model.pretrained_cfg["input_size"]) == tuple(x.shape[1:])


@pytest.mark.parametrize(
    ("kind", "overrides", "reason"),
    [
        ("vision", VIT, r"another structure than this encoder \(model.norm\)"),
        ("vision", (*PRE, "model.positions=rotary", "model.hidden_size=32"), r"\(model.positions\)"),
        ("vision", ("model.backbone=resnet18", "model.stem=small"), "only ResNets of resnet18, .* with their usual stem"),
        ("speech", (), "timm holds encoders of images, this one is of speech"),
    ],
)
def test_what_does_not_fit_timm_is_told(written, tmp_path, kind, overrides, reason):
    _, export = written(kind, *overrides)
    with pytest.raises(RecipeError, match=reason):
        export("timm")
    assert not (tmp_path / "timm").exists()


def test_hf_and_remote_code_can_be_insisted_on(written, tmp_path):
    _, export = written("vision", *PRE)
    assert json.loads((export("hf") / "config.json").read_text())["model_type"] == "vit"
    folder = export("remote-code")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "mmssl"
    assert (folder / "modeling_mmssl.py").is_file()
    with torch.no_grad():
        both = [AutoModel.from_pretrained(tmp_path / form)(X).last_hidden_state for form in ("hf", "remote-code")]
    assert_close(*both, rtol=0, atol=1e-5)
    _, export = written("speech")
    with pytest.raises(RecipeError, match=r"no class of the structure of this encoder: .*model.alibi=false.*as=remote-code"):
        export("hf")


def test_heads_are_told_apart(written):
    _, export = written("vision", *VIT)
    folder = export("heads")
    told, tensors = json.loads((folder / "heads.json").read_text()), load_file(folder / "heads.safetensors")
    assert {*told["parts"]} == {"student.projector", "teacher.network.projector", "predictor"}
    assert {name for part in told["parts"].values() for name in part["tensors"]} == {*tensors}
    assert (told["method"], told["paper"]) == ("byol", "arXiv:2006.07733")
    assert any("Linear(in_features=16, out_features=32" in line for line in told["parts"]["student.projector"]["structure"])
    assert not any("encoder" in name for name in tensors)


def test_the_command_takes_a_format_in_both_spellings(tiny_recipe, trained, tmp_path, capsys):
    from mmssl.training.pretrain import pretrain

    run = pretrain(tiny_recipe("watch.every=0", "watch.change=false", "watch.linear=false"))
    for words, place in (
        (["to=heads"], run / "export" / "heads"),
        (["as=heads", f"to={tmp_path / 'there'}"], tmp_path / "there"),
        (["to=heads", f"folder={tmp_path / 'here'}", "which=teacher"], tmp_path / "here"),
    ):
        assert main(["export", str(run), *words]) == 0, capsys.readouterr().err
        assert {file.name for file in place.iterdir()} == {"heads.json", "heads.safetensors"}
    assert main(["export", str(run), "to=heads"]) == 0  # again: its own folder is replaced
    assert main(["export", str(run), f"to={tmp_path / 'new'}", f"folder={tmp_path}"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
    assert main(["export", str(run), "as=heads", f"to={tmp_path / 'there'}"]) == 2
    assert "no empty folder" in capsys.readouterr().err


def test_all_formats_have_a_writer():
    assert {*FORMATS} == {"auto", "hf", "remote-code", *WRITERS}
