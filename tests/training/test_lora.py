"""Low-rank updates in pretraining: what is frozen, what is exported, and that a resume is exact."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel, ViTConfig

from mmssl.config import Recipe
from mmssl.errors import RecipeError
from mmssl.hub.export import load_encoder
from mmssl.model.low_rank import LowRank, merged
from mmssl.training import checkpoint
from mmssl.training.pretrain import prepare, pretrain
from mmssl.types import Clock

SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
FAST = ("watch.every=0", "watch.linear=false", "watch.pictures=false", "save.every=2")


@pytest.fixture
def recipe(tmp_path, image_folder):
    """Function: overrides -> a run of four updates that goes on from a small ViT."""
    torch.manual_seed(0)
    AutoModel.from_config(ViTConfig(**SHAPE, image_size=16, patch_size=4)).save_pretrained(tmp_path / "released")

    def build(*words):
        given = {
            "data": {"path": str(image_folder), "workers": 0, "modality": "vision"},
            "model": {"init": str(tmp_path / "released"), "dropout": 0.0},
            "method": {"name": "data2vec2", "top_k": 2, "momentum": 0.5, "decoder": {"dim": 16, "groups": 4, "layers": 1}},
            "views": {"mask": {"ratio": 0.75, "copies": 2}},
            "optim": {"lr": 1e-2},
            "train": {"steps": 4, "global_batch": 8, "device": "cpu", "log_every": 1},
        }
        path = tmp_path / "lora.yaml"
        path.write_text(json.dumps(given))
        return Recipe.load(path, f"out={tmp_path / 'run'}", "model.lora.rank=4", "model.lora.dropout=0.1", *FAST, *words)

    return build


@torch.no_grad()
def test_frozen_weights_keep_their_bits_and_the_export_is_an_ordinary_model(recipe, tmp_path):
    run = prepare(recipe())
    student, teacher = run.objective.method.student.encoder, run.objective.method.teacher.encoder
    begin = load_encoder(tmp_path / "released")
    assert_close(begin(X).last_hidden_state, features(student), rtol=0, atol=1e-6)  # an update is zero at first
    assert {n for n, p in student.named_parameters() if p.requires_grad} == {
        f"transformer.blocks.{i}.{layer}.lora_{one}.weight"
        for i in range(2)
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        for one in "ab"
    }
    with torch.enable_grad():
        run.train()
    frozen = begin.encoder.state_dict()
    for encoder in (student, teacher):
        now = encoder.state_dict()
        assert all(torch.equal(now[name], value) for name, value in frozen.items())
        assert all(bool(now[name].any()) for name in now if "lora" in name)
    model = AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert type(model).__name__ == "ViTModel"
    assert model.state_dict().keys() == AutoModel.from_pretrained(tmp_path / "released").state_dict().keys()
    wanted = features(student.eval())
    assert_close(model(X).last_hidden_state, wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(wanted, begin(X).last_hidden_state, atol=1e-3)
    optimizer = load_file(checkpoint.newest(run.folder.checkpoints) / "optimizer.safetensors")
    assert not any("student.encoder" in name and "lora" not in name for name in optimizer)


def features(encoder):
    return encoder.transformer(encoder.positions(encoder.features(X))[0])[0]


def test_the_teacher_averages_what_is_trained(recipe):
    method = prepare(recipe()).objective.method
    student, teacher = (dict(part.encoder.named_parameters()) for part in (method.student, method.teacher))
    draw = torch.Generator().manual_seed(1)
    for p in student.values():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=draw)
    wanted = {
        name: torch.lerp(teacher[name], p.detach(), 0.5) if p.requires_grad else p.detach() for name, p in student.items()
    }
    method.teacher.after_step(Clock(1, 4))
    assert teacher.keys() == wanted.keys()
    for name, value in wanted.items():
        assert_close(teacher[name], value, rtol=0, atol=0)


def test_a_resume_repeats_every_bit(recipe):
    whole = pretrain(recipe())
    first = {
        part: load_file(checkpoint.newest(whole / "checkpoints") / f"{part}.safetensors") for part in ("model", "optimizer")
    }
    lines = (whole / "metrics.jsonl").read_text().splitlines()
    checkpoint.drop_after(whole / "checkpoints" / "step-00000002")
    pretrain(recipe(), resume=True)
    for part, tensors in first.items():
        again = load_file(checkpoint.newest(whole / "checkpoints") / f"{part}.safetensors")
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], value) for name, value in tensors.items())
    losses = [
        [json.loads(line).get("loss") for line in text] for text in (lines, (whole / "metrics.jsonl").read_text().splitlines())
    ]
    assert losses[0] == losses[1]


def test_an_update_is_added_to_the_weight_it_belongs_to():
    layer = LowRank(torch.nn.Linear(6, 5).double(), 2, 3.0).double()
    layer.lora_b.weight.data.normal_()
    x = torch.randn(7, 6, dtype=torch.float64)
    weights = merged({f"a.b.{name}": value for name, value in layer.state_dict().items()} | {"other": x})
    assert {*weights} == {"a.b.weight", "a.b.bias", "other"}
    assert_close(x @ weights["a.b.weight"].T + weights["a.b.bias"], layer(x), rtol=0, atol=1e-12)
    assert merged(weights) is weights


def test_mistakes_are_told(recipe, tiny_recipe):
    with pytest.raises(
        RecipeError, match=r"model.lora.modules: no linear layer of the encoder is called 'query'; there are attn.qkv"
    ):
        recipe("model.lora.modules=[attn.proj, query]")
    with pytest.raises(RecipeError, match=r"model.lora: updates a model that is there already; give model.init"):
        tiny_recipe("model.lora.rank=4")
    with pytest.raises(RecipeError, match=r"model.lora.rank: .*greater than or equal to 1"):
        recipe("model.lora.rank=0")
    some = recipe("model.lora.modules=[attn.qkv]").build().student.encoder
    assert [n for n, module in some.named_modules() if isinstance(module, LowRank)] == [
        f"transformer.blocks.{i}.attn.qkv" for i in range(2)
    ]
