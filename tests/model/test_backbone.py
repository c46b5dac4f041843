import copy
import json
import shutil

import pytest
import torch
import torchvision
from torch.testing import assert_close
from transformers import AutoModel, ConvNextConfig, ConvNextModel, PoolFormerConfig, ResNetConfig, ResNetModel

from mmssl import registry
from mmssl.config import Recipe, read_yaml
from mmssl.errors import RecipeError
from mmssl.evaluate.probe import probe
from mmssl.hub.export import load_encoder, load_weights
from mmssl.model.backbone import Backbone
from mmssl.model.library import configuration
from mmssl.model.norm import BatchNorm, synchronised
from mmssl.training import checkpoint
from mmssl.training.export import export
from mmssl.training.pretrain import pretrain
from mmssl.types import View

TINY = {"depths": [1, 2], "hidden_sizes": [8, 16], "embedding_size": 8, "layer_type": "basic"}
X = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def built(backbone="resnet", options=TINY, image_size=32, **more):
    """A backbone in float64, its weights and running statistics drawn anew."""
    encoder = Backbone.from_config(configuration("vision", backbone, options, image_size=image_size, **more)).double()
    source = torch.Generator().manual_seed(1)
    for name, tensor in encoder.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=source, dtype=torch.float64)
            tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else 0.3 * noise)
    return encoder


def mapped(weights, depths):
    """Weights of a residual network of transformers under the names of torchvision."""
    names = {"embedder.embedder.convolution": "conv1", "embedder.embedder.normalization": "bn1"}
    for stage, depth in enumerate(depths):
        for block in range(depth):
            theirs, ours = f"layer{stage + 1}.{block}", f"encoder.stages.{stage}.layers.{block}"
            names |= {f"{ours}.shortcut.convolution": f"{theirs}.downsample.0"}
            names |= {f"{ours}.shortcut.normalization": f"{theirs}.downsample.1"}
            names |= {f"{ours}.layer.{i}.convolution": f"{theirs}.conv{i + 1}" for i in range(3)}
            names |= {f"{ours}.layer.{i}.normalization": f"{theirs}.bn{i + 1}" for i in range(3)}
    parts = {name: name.rpartition(".") for name in weights}
    return {f"{names[stem]}.{leaf}": weights[name] for name, (stem, _, leaf) in parts.items()}


def size(module):
    return sum(p.numel() for p in module.parameters())


# The model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_176_512), ("resnet34", 21_284_672), ("resnet50", 23_508_032)])
def test_presets_are_the_networks_of_that_name(name, count):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)()
        normal = Backbone.from_config(configuration("vision", name, {}))
        small = Backbone.from_config(configuration("vision", name, {}, stem="small", image_size=32))
    assert size(normal) == count == size(theirs) - size(theirs.fc)
    assert size(small) == count - 64 * 3 * (49 - 9)
    assert normal.dim == small.dim == theirs.fc.in_features


@pytest.mark.parametrize("layer_type", ["basic", "bottleneck"])
@pytest.mark.parametrize("stem", ["normal", "small"])
def test_outputs_are_those_of_torchvision(stem, layer_type):
    # torchvision's widths are fixed, its depths are not
    wide = 4 if layer_type == "bottleneck" else 1
    options = {"depths": [1, 1, 1, 1], "hidden_sizes": [n * wide for n in (64, 128, 256, 512)], "layer_type": layer_type}
    ours = built(options=options, stem=stem).eval()
    block = getattr(torchvision.models.resnet, {"basic": "BasicBlock", "bottleneck": "Bottleneck"}[layer_type])
    theirs = torchvision.models.ResNet(block, [1, 1, 1, 1])
    theirs.fc = torch.nn.Identity()
    if stem == "small":  # as the code of solo-learn, lightly and SimCLR has it, padding 1
        theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    theirs.double().eval().load_state_dict(mapped(ours.model.state_dict(), [1, 1, 1, 1]))
    with torch.no_grad():
        encoded, wanted = ours(View(X[:2], "vision")), theirs(X[:2])
    assert encoded.tokens.shape == (2, 1 if stem == "normal" else 16, 512 * wide)
    assert_close(ours.pool(encoded), wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
    assert_close(encoded.tokens.mean(1), wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))


@pytest.mark.parametrize("training", [False, True])
def test_outputs_gradients_and_statistics_are_those_of_transformers(training):
    ours = synchronised(built()).train(training)
    assert sum(isinstance(module, BatchNorm) for module in ours.modules()) == 8
    theirs = ResNetModel(ResNetConfig(**TINY)).double().train(training)
    theirs.load_state_dict({name.removeprefix("model."): tensor for name, tensor in ours.state_dict().items()})
    encoded, wanted = ours(View(X, "vision")), theirs(X)
    assert_close(encoded.tokens, wanted.last_hidden_state.flatten(2).transpose(1, 2), rtol=1e-9, atol=1e-12)
    assert_close(ours.pool(encoded), wanted.pooler_output[:, :, 0, 0], rtol=1e-9, atol=1e-12)
    assert_close(ours.pool(encoded), wanted.last_hidden_state.mean((2, 3)), rtol=1e-9, atol=1e-12)
    for pooled in (ours.pool(encoded), wanted.pooler_output):
        pooled.square().sum().backward()
    grads = {f"model.{name}": p.grad for name, p in theirs.named_parameters()}
    assert_close({name: p.grad for name, p in ours.named_parameters()}, grads, rtol=1e-7, atol=1e-9)
    after = {f"model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    assert_close(dict(ours.state_dict()), after, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_what_a_model_pools_in_its_own_way_is_kept():
    shape = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4}
    ours = built("convnext", shape).eval()
    theirs = ConvNextModel(ConvNextConfig(**shape)).double().eval()
    theirs.load_state_dict(ours.model.state_dict())
    encoded, wanted = ours(View(X, "vision")), theirs(X)
    assert_close(ours.pool(encoded), wanted.pooler_output, rtol=1e-9, atol=1e-12)
    assert_close(encoded.tokens, wanted.last_hidden_state.flatten(2).transpose(1, 2), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(encoded.tokens.mean(1), wanted.pooler_output, atol=1e-2)


@torch.no_grad()
def test_a_model_that_pools_nothing_is_pooled_by_the_mean():
    shape = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
    ours = built("poolformer", shape, image_size=64).eval()
    assert ours.dim == 24
    x = torch.nn.functional.interpolate(X, 64)
    theirs = AutoModel.from_config(PoolFormerConfig(**shape)).double().eval()
    theirs.load_state_dict(ours.model.state_dict())
    wanted = theirs(x).last_hidden_state.mean((2, 3))
    assert_close(ours.pool(ours(View(x, "vision"))), wanted, rtol=1e-9, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("stem", ["normal", "small"])
def test_local_features_are_the_middle_of_the_stems_output(stem):
    ours, seen = built(stem=stem).eval(), []
    ours.model.embedder.register_forward_hook(lambda _, given, out: seen.append(out))
    pooled, local = ours.inspect(View(X, "vision"))
    assert seen[0].shape == (6, 8, *((8, 8) if stem == "normal" else (32, 32)))
    middle = seen[0].shape[-1] // 2
    assert_close(local, seen[0][:, :, middle, middle], rtol=0, atol=0)
    assert_close(pooled, ours.pool(ours(View(X, "vision"))), rtol=0, atol=0)


def test_blocks_begin_as_torchvisions_do():
    torch.manual_seed(0)
    for zero in (False, True):
        ours = Backbone.from_config(configuration("vision", "resnet18", {}, zero_init=zero)).model
        theirs = torchvision.models.resnet18(zero_init_residual=zero)
        theirs.fc = torch.nn.Identity()
        found, wanted = mapped(ours.state_dict(), [2, 2, 2, 2]), theirs.state_dict()
        assert {*found} == {*wanted}
        for name in wanted:
            if ".bn" in name or name.startswith("bn") or wanted[name].ndim == 1:
                assert_close(found[name], wanted[name], rtol=0, atol=0)
            elif wanted[name].numel() > 100_000:
                assert float(found[name].std()) == pytest.approx(float(wanted[name].std()), rel=0.02)
        assert sum(not t.any() for n, t in found.items() if n.endswith("bn2.weight")) == (8 if zero else 0)


# The recipe ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def simclr(image_folder, tmp_path):
    """Function: overrides -> checked recipe of SimCLR on `image_folder` with a tiny ResNet."""

    def build(*overrides, modality="vision", model=None, method="{name: simclr, hidden: 16, dim: 8}"):
        model = model or f"{{backbone: resnet, options: {json.dumps(TINY)}, image_size: 16}}"
        path = tmp_path / "tiny.yaml"
        path.write_text(
            f"data: {{path: {image_folder}, modality: {modality}, workers: 0}}\n"
            f"model: {model}\n"
            f"method: {method}\n"
            "views: {crops: [{count: 2}]}\n"
            "train: {steps: 4, global_batch: 8, device: cpu, log_every: 1}\n"
            "watch: {samples: 20, every: 0}\n"
            "save: {every: 2, keep: 3}\n"
        )
        return Recipe.load(path, f"out={tmp_path / 'run'}", *overrides)

    return build


def refused(make, *overrides, **more):
    with pytest.raises(RecipeError) as error:
        make(*overrides, **more)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.backbone=resnt", "model.backbone: transformers has no model type 'resnt' (did you mean resnet?)"),
        ("model.backbone=resnet19", "(did you mean resnet18?)"),
        ("model.backbone=bert", "model.backbone: bert takes input_ids, vision gives pixel_values"),
        ("model.options.depth=[1]", "model.options.depth: resnet has no such option (did you mean depths?); allowed are "),
        ("model.options.num_channels=1", "model.options.num_channels: follows from"),
        ("model.options.depths=many", "model.options: transformers refuses, "),
        ("model.options.depths=[9999999,1,1,1]", "model.options: transformers refuses, ValueError: more than 20000 modules"),
        ("model.options.layer_type=wide", "model.options: transformers refuses, "),
        ("model.patch_size=4", "model.patch_size: unknown key"),
        ("model.freeze_features=true", "model.freeze_features: unknown key"),
        ("model.channels=2", "model.channels: 2, must be 1 (grey) or 3 (colour)"),
        ("model.image_size=0", "model.image_size: 0, must be at least 1 pixel"),
        ("model.stem=tiny", "model.stem: found 'tiny'"),
        ("model.init=/nowhere", "model.init: transformers refuses, OSError"),
        ("views.mask={}", "views.mask: a backbone sees whole views"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_mend(simclr, override, words):
    assert words in refused(simclr, override)


@pytest.mark.parametrize("override", ["model.stem=small", "model.zero_init=true"])
def test_what_only_resnet_has_is_refused_for_others(simclr, override):
    message = refused(simclr, "model.backbone=convnext", "model.options={}", "model.image_size=32", override)
    assert f"{override.partition('=')[0]}: " in message
    assert "convnext" in message


def test_other_modalities_and_methods_that_hide_tokens_are_refused(simclr):
    for modality in ("text", "speech"):
        message = refused(simclr, "views={}", modality=modality)
        assert f"model.backbone: {modality} has the shared transformer only; leave it out" in message
    for method in ("data2vec1", "data2vec2"):
        message = refused(simclr, "views={}", method=f"{{name: {method}}}")
        assert f"model.backbone: {method} hides tokens" in message


def test_a_method_s_defaults_for_the_shared_transformer_are_not_those_of_a_backbone(simclr, monkeypatch):
    vision = registry.modality("vision")
    changed = vision._replace(defaults={"simclr": {"model": {"depth": 7}, "method": {"temperature": 0.3}}})
    monkeypatch.setattr("mmssl.config.recipe.modality", lambda name: changed)
    recipe = simclr()
    assert recipe.method.temperature == 0.3
    assert not hasattr(recipe.model, "depth")
    assert simclr(model="{image_size: 16, patch_size: 4, hidden_size: 16, heads: 2}").model.depth == 7


def test_options_override_a_preset_and_weights_follow_the_seed(simclr):
    one, same, other = (simclr("model.backbone=resnet18", *more).build() for more in ((), (), ("train.seed=1",)))
    assert size(one.student.encoder) == size(built())  # TINY overrides all of the preset
    assert_close(dict(one.state_dict()), dict(same.state_dict()), rtol=0, atol=0)
    name = "student.encoder.model.embedder.embedder.convolution.weight"
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    plain = simclr(model="{backbone: resnet18, stem: small, image_size: 32}").config()
    assert (plain.hidden_size, plain.backbone["depths"], plain.backbone["layer_type"]) == (512, [2, 2, 2, 2], "basic")


def test_without_a_backbone_it_is_the_shared_transformer(tiny_recipe):
    recipe = tiny_recipe()
    assert not recipe.wrapped
    assert recipe.config().backbone is None
    assert "options: unknown key" in refused(tiny_recipe, "model.options={}")


def test_features_may_stay_as_they_were_drawn(tiny_recipe, trained):
    recipe = tiny_recipe("model.freeze_features=true", "optim.warmup=0", "optim.lr=0.01")
    start = recipe.build().state_dict()
    run = trained(recipe)
    end, features = run.objective.method.state_dict(), 0
    optimized = {id(p) for group in run.trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in run.objective.method.named_parameters():
        frozen = name.startswith("student.encoder.features.")
        features += frozen
        assert parameter.requires_grad is not frozen
        assert (id(parameter) in optimized) is not frozen
        assert torch.equal(start[name], end[name]) is frozen, name
        if frozen:
            twin = name.replace("student.", "teacher.network.")
            assert torch.equal(end[twin], start[name])
    assert features == 2
    assert all(p.requires_grad for p in tiny_recipe().build().student.parameters())


# Whole runs -----------------------------------------------------------------------------------------------------------


def curve(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("stem", ["normal", "small"])
def test_a_run_trains_resumes_exports_and_is_probed(simclr, image_folder, tmp_path, stem):
    recipe = simclr(f"model.stem={stem}", "model.zero_init=true")
    start = copy.deepcopy(recipe.build().student.encoder.state_dict())
    run = pretrain(recipe)
    before = curve(run)
    assert len(before) == 4
    newest = checkpoint.load(checkpoint.find(run / "checkpoints")[0])[0]["model"]
    tensors = {n.removeprefix("method.student.encoder."): t for n, t in newest.items() if ".encoder." in n}
    assert tensors.keys() == start.keys()
    assert not any(torch.equal(tensors[name], start[name]) for name in start if not name.endswith("running_mean"))
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    pretrain(recipe, resume=True)
    assert curve(run) == before
    again = checkpoint.load(checkpoint.find(run / "checkpoints")[0])[0]["model"]
    assert all(torch.equal(again[name], newest[name]) for name in newest)

    kind = "ResNetModel" if stem == "normal" else "MmsslModel"
    card = (run / "model" / "README.md").read_text()
    assert f"Architecture: resnet{' with a small stem' * (stem == 'small')} ({kind})." in card
    for folder in (run / "model", export(run, tmp_path / "again")):
        model = load_encoder(folder)
        assert type(model).__name__ == kind
        own = model.state_dict() if stem == "normal" else model.encoder.model.state_dict()
        assert_close({f"model.{name}": tensor for name, tensor in own.items()}, tensors, rtol=0, atol=0)
    told = json.loads((run / "model" / "config.json").read_text())
    shape = told if stem == "normal" else told["backbone"]
    assert {name: shape[name] for name in TINY} == TINY
    assert "depth" not in told  # nothing of the shared transformer
    later = simclr(f"model.init={run / 'model'}", f"model.stem={stem}", "model.options={}").build()  # goes on from it
    load_weights(later.student.encoder, run / "model")
    assert_close(dict(later.student.encoder.state_dict()), tensors, rtol=0, atol=0)
    found = probe(run / "model", str(image_folder), random=True, samples=20)
    assert {*found} == {"raw", "random", "model"}
    wanted = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["probe/test/knn"]
    assert found["model"]["knn"] == wanted  # the same pixels as the run's own probe


def test_a_run_may_start_from_a_released_model_whose_shape_it_takes(simclr, tmp_path):
    released = ResNetModel(ResNetConfig(**TINY | {"hidden_sizes": [8, 24], "hidden_act": "gelu"}))
    released.save_pretrained(tmp_path / "released")
    start = [f"model.init={tmp_path / 'released'}", "model.options={}"]
    recipe = simclr(*start)
    assert recipe.config().hidden_size == 24
    assert recipe.model.options["hidden_act"] == "gelu"
    encoder = recipe.build().student.encoder
    load_weights(encoder, recipe.model.init)
    wanted = {f"model.{name}": tensor for name, tensor in released.state_dict().items()}
    assert_close(dict(encoder.state_dict()), wanted, rtol=0, atol=0)

    run = pretrain(simclr(*start, "optim.warmup=1000000"))  # next to nothing is learned at the first rates
    # Its config.yaml holds the shape, so that the run goes on without the model it came from.
    shutil.rmtree(tmp_path / "released")
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    pretrain(Recipe.check(read_yaml(run / "config.yaml")), resume=True)
    end = load_encoder(run / "model").state_dict()
    for name, parameter in released.named_parameters():
        assert_close(end[name], parameter.detach(), rtol=0, atol=1e-5)


def test_a_model_that_does_not_fit_is_no_start(simclr, tiny_recipe, tmp_path):
    ResNetModel(ResNetConfig(**TINY)).save_pretrained(tmp_path / "resnet")
    ConvNextModel(ConvNextConfig(hidden_sizes=[8], depths=[1], num_stages=1)).save_pretrained(tmp_path / "convnext")
    init = f"model.init={tmp_path / 'resnet'}"
    assert "model.init: " in refused(simclr, f"model.init={tmp_path / 'convnext'}", "model.options={}")
    wide = simclr(init, "model.options.hidden_sizes=[8, 24]")
    small = simclr(init, "model.stem=small")
    for recipe in (wide, small):
        with pytest.raises(RecipeError, match=r"^model\.init: .* first difference: model\."):
            load_weights(recipe.build().student.encoder, recipe.model.init)
    with pytest.raises(RecipeError, match=r"^model\.init: .*With model\.backbone=resnet "):
        load_weights(tiny_recipe().build().student.encoder, tmp_path / "resnet")
