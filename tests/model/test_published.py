"""Checkpoints in the layouts that data2vec's authors have published, with random weights, against their forward pass.

The pass and the names are written here from the papers and the layout, in float64, without a word of the converter's.
"""

import argparse
import enum
import json
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.testing import assert_close

from mmssl.cli import main
from mmssl.config import load_recipe
from mmssl.errors import RecipeError
from mmssl.hub.convert import convert
from mmssl.hub.export import load_encoder, load_weights
from mmssl.model.modeling import MmsslModel
from mmssl.training.pretrain import pretrain
from tests.strangers import STRANGER, start

WIDTH, HEADS, DEPTH, PRENET, CHANNELS = 32, 4, 3, 2, 16
VOCAB, PLACES = 40, 24
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WAVES = torch.randn(2, 4000, generator=torch.Generator().manual_seed(1))
IDS = torch.cat(
    [torch.zeros(2, 1, dtype=torch.long), torch.randint(4, 39, (2, 9), generator=torch.Generator().manual_seed(2))], 1
)
IDS[1, 7:] = 1  # padding
INPUTS = {
    "images": {"pixel_values": X},
    "speech": {"input_values": WAVES},
    "text": {"input_ids": IDS, "attention_mask": (IDS != 1).long()},
}
KINDS = {"images": "IMAGE", "speech": "AUDIO", "text": "TEXT"}

# The forward pass -----------------------------------------------------------------------------------------------------


class Weights(dict):
    """Of one network, in float64, by their published names."""

    def linear(self, x, name):
        return F.linear(x, self[f"{name}.weight"], self[f"{name}.bias"])

    def norm(self, x, name, eps):
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], eps)


def attention(q, k, v, heads, bias):
    """By loops over heads. bias: (R or 1, H, L, L)."""
    size, found = q.shape[-1] // heads, []
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        logits = q[..., own] @ k[..., own].transpose(1, 2) / math.sqrt(size)
        found.append((logits + bias[:, h]).softmax(-1) @ v[..., own])
    return torch.cat(found, -1)


def block2(w, x, name, eps, bias):
    """Post-norm, projections fused."""
    q, k, v = w.linear(x, f"{name}.attn.qkv").chunk(3, -1)
    x = w.norm(x + w.linear(attention(q, k, v, HEADS, bias), f"{name}.attn.proj"), f"{name}.norm1", eps)
    return w.norm(x + w.linear(F.gelu(w.linear(x, f"{name}.mlp.fc1")), f"{name}.mlp.fc2"), f"{name}.norm2", eps)


def block1(w, x, name, bias):
    """Post-norm, projections apart."""
    q, k, v = (w.linear(x, f"{name}.self_attn.{part}_proj") for part in "qkv")
    x = x + w.linear(attention(q, k, v, HEADS, bias), f"{name}.self_attn.out_proj")
    x = w.norm(x, f"{name}.self_attn_layer_norm", 1e-5)
    return w.norm(x + w.linear(F.gelu(w.linear(x, f"{name}.fc1")), f"{name}.fc2"), f"{name}.final_layer_norm", 1e-5)


def listen(w, convolutions, norm, proj):
    """Seven convolutions with layer norm over channels, then norm and projection."""
    x = WAVES.double()[:, None]
    for i, stride in enumerate((5, 2, 2, 2, 2, 2, 2)):
        x = F.conv1d(x, w[f"{convolutions}.{i}.0.weight"], stride=stride)
        x = F.gelu(w.norm(x.transpose(1, 2), f"{convolutions}.{i}.2.1", 1e-5)).transpose(1, 2)
    return w.linear(w.norm(x.transpose(1, 2), norm, 1e-5), proj)


def placed(w, x, stack, first):
    """Five position convolutions, whose output is added."""
    code = x.transpose(1, 2)
    for i in range(5):
        name = f"{stack}.{first + i}.0"
        code = F.conv1d(code, w[f"{name}.weight"], w[f"{name}.bias"], padding=9, groups=16)
        code = F.gelu(F.layer_norm(code.transpose(1, 2), (WIDTH,))).transpose(1, 2)
    return x + code.transpose(1, 2)


def words(w, stem):
    """Embeddings and the bias that hides padding."""
    valid = (IDS != 1).long()
    places = valid.cumsum(1) * valid + 1
    x = w[f"{stem}.embed_tokens.weight"][IDS] + w[f"{stem}.embed_positions.weight"][places]
    bias = torch.zeros(IDS.shape).double().masked_fill(IDS == 1, -math.inf)[:, None, None].expand(-1, HEADS, -1, -1)
    return w.norm(x, f"{stem}.layernorm_embedding", 1e-5), bias


def patches(w, name):
    """A product with each patch."""
    cut = X.double().unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return cut @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]


def pass2(w, kind):
    """data2vec 2.0 without a mask."""
    stem, eps, bias = f"modality_encoders.{KINDS[kind]}", 1e-5, torch.zeros(1, HEADS, 1, 1).double()
    if kind == "images":
        x, eps = patches(w, f"{stem}.local_encoder.proj") + w[f"{stem}.fixed_positional_encoder.positions"], 1e-6
        x = torch.cat([w[f"{stem}.extra_tokens"].expand(2, -1, -1), x], 1)
    elif kind == "speech":
        x = listen(w, f"{stem}.local_encoder.conv_layers", f"{stem}.project_features.1", f"{stem}.project_features.2")
        x = placed(w, x, f"{stem}.relative_positional_encoder", 1)
        apart = torch.tensor([[abs(i - j) for j in range(x.shape[1])] for i in range(x.shape[1])])
        scale = w[f"{stem}.alibi_scale"].clamp(min=0)
        bias = torch.stack([-apart * 2.0 ** (-8 * (h + 1) / HEADS) * scale[0, 0, h, 0, 0] for h in range(HEADS)])[None]
    else:
        x, bias = words(w, f"{stem}.local_encoder")
    x = w.norm(x, f"{stem}.context_encoder.norm", eps)
    for i in range(PRENET):
        x = block2(w, x, f"{stem}.context_encoder.blocks.{i}", eps, bias)
    for i in range(DEPTH):
        x = block2(w, x, f"blocks.{i}", eps, bias)
    return x


def pass1(w, kind):
    """data2vec 1 without a mask."""
    if kind == "images":
        return beit(w)
    if kind == "speech":
        x, stem = listen(w, "feature_extractor.conv_layers", "layer_norm", "post_extract_proj"), "encoder"
        x = w.norm(placed(w, x, "encoder.pos_conv", 0), "encoder.layer_norm", 1e-5)
        bias = torch.zeros(1, HEADS, 1, 1).double()
    else:
        stem = "encoder.sentence_encoder"
        x, bias = words(w, stem)
    for i in range(DEPTH):
        x = block1(w, x, f"{stem}.layers.{i}", bias)
    return x


def beit(w):
    """Pre-norm, relative positions shared by all blocks, a scale for each channel of what is added."""
    x = torch.cat([w["cls_token"].expand(2, -1, -1), patches(w, "patch_embed.proj")], 1)
    table, side = w["rel_pos_bias.relative_position_bias_table"], 4
    bias = torch.empty(1, HEADS, 17, 17).double()
    for a in range(17):
        for b in range(17):
            if a and b:
                row, column = (a - 1) // side - (b - 1) // side, (a - 1) % side - (b - 1) % side
                index = (row + side - 1) * (2 * side - 1) + column + side - 1
            else:
                index = len(table) - (1 if a == b else 2 if a else 3)
            bias[0, :, a, b] = table[index]
    for i in range(DEPTH):
        name = f"blocks.{i}"
        y, weight = w.norm(x, f"{name}.norm1", 1e-6), w[f"{name}.attn.qkv.weight"]
        q, k, v = F.linear(y, weight).chunk(3, -1)
        q, v = q + w[f"{name}.attn.q_bias"], v + w[f"{name}.attn.v_bias"]
        x = x + w[f"{name}.gamma_1"] * w.linear(attention(q, k, v, HEADS, bias), f"{name}.attn.proj")
        y = F.gelu(w.linear(w.norm(x, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1"))
        x = x + w[f"{name}.gamma_2"] * w.linear(y, f"{name}.mlp.fc2")
    return w.norm(x, "norm", 1e-6)


# Files ----------------------------------------------------------------------------------------------------------------


def drawn(shapes, seed):
    """Random weights of those shapes; norms near one."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=draw)
        near = name.endswith("weight") and len(shape) == 1
        found[name] = 1 + 0.2 * noise if near or "alibi" in name else 0.3 * noise
    return found


def lin(name, out, inputs):
    return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}


def ln(name, size):
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def convolutions(name):
    found = {}
    for i, kernel in enumerate((10, 3, 3, 3, 3, 2, 2)):
        found[f"{name}.{i}.0.weight"] = (CHANNELS, CHANNELS if i else 1, kernel)
        found |= ln(f"{name}.{i}.2.1", CHANNELS)
    return found


def stack(name, first):
    found = {}
    for i in range(first, first + 5):
        found |= {f"{name}.{i}.0.weight": (WIDTH, WIDTH // 16, 19), f"{name}.{i}.0.bias": (WIDTH,)}
    return found


def embeddings(name):
    tables = {f"{name}.embed_tokens.weight": (VOCAB, WIDTH), f"{name}.embed_positions.weight": (PLACES + 2, WIDTH)}
    return tables | ln(f"{name}.layernorm_embedding", WIDTH)


def block_shapes(name):
    found = ln(f"{name}.norm1", WIDTH) | ln(f"{name}.norm2", WIDTH) | lin(f"{name}.attn.qkv", 3 * WIDTH, WIDTH)
    found |= lin(f"{name}.attn.proj", WIDTH, WIDTH)
    return found | lin(f"{name}.mlp.fc1", 4 * WIDTH, WIDTH) | lin(f"{name}.mlp.fc2", WIDTH, 4 * WIDTH)


def layer_shapes(name):
    found = ln(f"{name}.self_attn_layer_norm", WIDTH) | ln(f"{name}.final_layer_norm", WIDTH)
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        found |= lin(f"{name}.self_attn.{part}", WIDTH, WIDTH)
    return found | lin(f"{name}.fc1", 4 * WIDTH, WIDTH) | lin(f"{name}.fc2", WIDTH, 4 * WIDTH)


def shapes2(kind):
    stem = f"modality_encoders.{KINDS[kind]}"
    if kind == "images":
        found = {f"{stem}.local_encoder.proj.weight": (WIDTH, 3, 4, 4), f"{stem}.local_encoder.proj.bias": (WIDTH,)}
        found |= {f"{stem}.extra_tokens": (1, 1, WIDTH), f"{stem}.decoder.blocks.0.0.weight": (WIDTH, 2, 3, 3)}
    elif kind == "speech":
        found = convolutions(f"{stem}.local_encoder.conv_layers") | stack(f"{stem}.relative_positional_encoder", 1)
        found |= ln(f"{stem}.project_features.1", CHANNELS) | lin(f"{stem}.project_features.2", WIDTH, CHANNELS)
        found |= {f"{stem}.alibi_scale": (1, 1, HEADS, 1, 1)} | lin(f"{stem}.decoder.proj", WIDTH, WIDTH)
    else:
        found = embeddings(f"{stem}.local_encoder") | lin(f"{stem}.decoder.proj.0", WIDTH, WIDTH)
    found |= ln(f"{stem}.context_encoder.norm", WIDTH)
    for i in range(PRENET):
        found |= block_shapes(f"{stem}.context_encoder.blocks.{i}")
    for i in range(DEPTH):
        found |= block_shapes(f"blocks.{i}")
    return found


def shapes1(kind):
    if kind == "images":
        found = {"patch_embed.proj.weight": (WIDTH, 3, 4, 4), "patch_embed.proj.bias": (WIDTH,), "cls_token": (1, 1, WIDTH)}
        found |= {"mask_token": (1, 1, WIDTH), "rel_pos_bias.relative_position_bias_table": (7 * 7 + 3, HEADS)}
        found |= ln("norm", WIDTH) | lin("lm_head", WIDTH, WIDTH)
        for i in range(DEPTH):
            own = {name: shape for name, shape in block_shapes(f"blocks.{i}").items() if not name.endswith("qkv.bias")}
            found |= own | {f"blocks.{i}.{name}": (WIDTH,) for name in ("attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2")}
        return found
    if kind == "speech":
        stem = "encoder"
        found = convolutions("feature_extractor.conv_layers") | stack("encoder.pos_conv", 0) | ln("layer_norm", CHANNELS)
        found |= lin("post_extract_proj", WIDTH, CHANNELS) | ln("encoder.layer_norm", WIDTH)
        found |= {"mask_emb": (WIDTH,)} | lin("final_proj.0", WIDTH, WIDTH)
    else:
        stem = "encoder.sentence_encoder"
        found = embeddings(stem) | lin("encoder.regression_head.0", WIDTH, WIDTH) | {f"{stem}.version": (1,)}
    for i in range(DEPTH):
        found |= layer_shapes(f"{stem}.layers.{i}")
    return found


def table():
    """Sines and cosines of column and row, by loops."""
    quarter, rows = WIDTH // 4, []
    for row in range(4):
        for column in range(4):
            angles = [[place / 10000 ** (i / quarter) for i in range(quarter)] for place in (column, row)]
            rows.append([f(a) for own in angles for f in (math.sin, math.cos) for a in own])
    return torch.tensor(rows)[None]


TABLE = "modality_encoders.IMAGE.fixed_positional_encoder.positions"


def networks(version, kind, seed=0):
    """Student and what the file has of the teacher: names of the file, and all weights that the teacher uses."""
    shapes = (shapes2 if version == 2 else shapes1)(kind)
    student, other = drawn(shapes, seed), drawn(shapes, seed + 100)
    if TABLE.split(".fixed")[0] in str([*shapes]):
        student[TABLE] = other[TABLE] = table()
    if (version, kind) == (2, "images"):
        student = {name: tensor.half() for name, tensor in student.items()}  # as fp16 training saves them
    stem, other = f"modality_encoders.{KINDS[kind]}.", {n: t for n, t in other.items() if ".decoder." not in n}
    shared = {
        (2, "images"): (),
        (2, "speech"): (f"{stem}local_encoder.", f"{stem}project_features."),
        (2, "text"): (stem,),
        (1, "images"): (),
        (1, "speech"): ("feature_extractor.", "layer_norm.", "post_extract_proj.", "mask_emb", "final_proj"),
        (1, "text"): ("encoder.regression_head",),
    }[version, kind]
    own = {n: t for n, t in other.items() if not n.startswith(shared or "\0")}
    cut = {(1, "speech"): "encoder.", (1, "text"): "encoder.sentence_encoder."}.get((version, kind), "")
    cut = "blocks." if (version, kind) == (2, "text") else cut
    average = {name.removeprefix(cut): tensor for name, tensor in own.items()}
    return student, average, student | own


class Modality(enum.Enum):
    IMAGE = 1


class DictConfig:
    """As omegaconf keeps a configuration: nodes that know their parents."""

    def __init__(self, content, parent=None):
        self._metadata, self._parent, self._content = {"ref_type": dict}, parent, {}
        for key, value in content.items():
            self._content[key] = DictConfig(value, self) if isinstance(value, dict) else AnyNode(value, self)


class AnyNode:
    def __init__(self, value, parent):
        self._val, self._parent = value, parent


def settings(version, kind):
    """What a configuration says."""
    if version == 2:
        own = {"prenet_depth": PRENET, "prenet_dropout": 0.1, "type": Modality.IMAGE}
        model = {"num_heads": HEADS, "depth": DEPTH, "norm_eps": 1e-6 if kind == "images" else 1e-5, "encoder_dropout": 0.1}
        return {"model": model | {"modalities": {{"images": "image", "speech": "audio"}.get(kind, kind): own}}}
    if kind == "speech":
        return {
            "model": {"encoder_layers": DEPTH, "encoder_attention_heads": HEADS, "dropout": 0.1},
            "task": {"normalize": False},
        }
    return {"model": {"transformer": {"encoder": {"layers": DEPTH, "attention_heads": HEADS}, "dropout": 0.1}}}


def save(path, content):
    """By torch, with classes of a package that is not there any more when the file is read."""
    module = types.ModuleType("omegaconf_like")
    for one in (DictConfig, AnyNode, Modality):
        setattr(module, one.__name__, one)
        one.__module__ = module.__name__
    sys.modules[module.__name__] = module
    torch.save(content, path)
    del sys.modules[module.__name__]
    return path


def checkpoint(path, version, kind, told=True):
    """A file, and the weights of student and teacher in float64."""
    student, average, teacher = networks(version, kind)
    content = {"model": student, "extra_state": {"epoch": 3}, "last_optimizer_state": {"exp_avg": torch.ones(2)}}
    if (version, kind) == (1, "images"):
        content |= {"model_ema": average, "args": argparse.Namespace(model="beit", imagenet_default_mean_and_std=True)}
    else:
        content["model"] = student | {"encoder._ema" if (version, kind) == (1, "text") else "_ema": average}
        content |= {"cfg": DictConfig(settings(version, kind))} if told else {}
    double = [Weights({n: t.double() for n, t in one.items()}) for one in (student, teacher)]
    return save(path, content), dict(zip(("student", "teacher"), double))


def outputs(folder, kind):
    """Of the class that AutoModel finds, where tokens are valid."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return type(model), model(**INPUTS[kind]).last_hidden_state


def valid(x, kind):
    return x[IDS != 1] if kind == "text" else x


EVERY = [(version, kind) for version in (2, 1) for kind in KINDS]
CLASSES = {"images": "Data2VecVisionModel", "speech": "Data2VecAudioModel", "text": "Data2VecTextModel"}


@pytest.mark.parametrize(("version", "kind"), EVERY)
def test_a_converted_checkpoint_has_the_features_of_the_published_pass(version, kind, tmp_path):
    file, weights = checkpoint(tmp_path / "published.pt", version, kind)
    for which in ("student", "teacher"):
        folder, (said, *_) = convert(file, tmp_path / which, None if which == "teacher" else which)
        found, out = outputs(folder, kind)
        assert found.__name__ == ("MmsslModel" if version == 2 else CLASSES[kind])
        assert which in said
        wanted = (pass2 if version == 2 else pass1)(weights[which], kind)
        assert_close(valid(out.double(), kind), valid(wanted, kind), rtol=0, atol=1e-5)
        assert (folder / "modeling_mmssl.py").exists() == (version == 2)
        ours = load_encoder(folder)
        assert type(ours) is MmsslModel  # on the shared transformer, whichever class it is
        with torch.no_grad():
            assert_close(valid(ours(**INPUTS[kind]).last_hidden_state, kind), valid(out, kind), rtol=0, atol=1e-5)
    other = (pass2 if version == 2 else pass1)(weights["student"], kind)
    assert not torch.allclose(valid(other, kind), valid(wanted, kind), atol=1e-2)


def test_strangers_load_what_was_converted(tmp_path):
    given, wanted = [], {}
    for kind, inputs in INPUTS.items():
        file, weights = checkpoint(tmp_path / f"{kind}.pt", 2, kind)
        folder, _ = convert(file, tmp_path / kind)
        torch.save([inputs], tmp_path / f"{kind}.in")
        given += [folder, tmp_path / f"{kind}.in", tmp_path / f"{kind}.out"]
        wanted[kind] = pass2(weights["teacher"], kind)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    process = start(elsewhere, STRANGER, *given)
    told, _ = process.communicate(timeout=600)
    assert process.returncode == 0, told
    for kind, out in wanted.items():
        ((last, *_),) = torch.load(tmp_path / f"{kind}.out", weights_only=True)
        assert_close(valid(last.double(), kind), valid(out, kind), rtol=0, atol=1e-5)


# What files say, and what they lack ---------------------------------------------------------------------------------


def test_what_a_configuration_says_is_in_the_folder(tmp_path):
    file, _ = checkpoint(tmp_path / "a.pt", 2, "speech")
    config = json.loads((convert(file, tmp_path / "a")[0] / "config.json").read_text())
    assert {name: config[name] for name in ("heads", "depth", "prenet_depth", "dropout", "input_dropout")} == {
        **{"heads": HEADS, "depth": DEPTH, "prenet_depth": PRENET, "dropout": 0.1, "input_dropout": 0.1}
    }
    assert (config["position_groups"], config["position_kernel"], config["conv_channels"]) == (16, 19, CHANNELS)
    normal = json.loads((tmp_path / "a" / "preprocessor_config.json").read_text())
    assert normal["do_normalize"] is True
    file, _ = checkpoint(tmp_path / "b.pt", 1, "speech")
    normal = json.loads((convert(file, tmp_path / "b")[0] / "preprocessor_config.json").read_text())
    assert normal["do_normalize"] is False  # its task says so
    file, _ = checkpoint(tmp_path / "c.pt", 1, "images")
    normal = json.loads((convert(file, tmp_path / "c")[0] / "preprocessor_config.json").read_text())
    assert normal["image_mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert normal["size"]["shortest_edge"] == 16


def test_without_a_configuration_shapes_tell_as_much_as_they_can(tmp_path):
    file, weights = checkpoint(tmp_path / "speech.pt", 2, "speech", told=False)  # scales tell how many heads
    folder, _ = convert(file, tmp_path / "speech")
    assert_close(outputs(folder, "speech")[1].double(), pass2(weights["teacher"], "speech"), rtol=0, atol=1e-5)
    file, _ = checkpoint(tmp_path / "images.pt", 2, "images", told=False)
    with pytest.raises(RecipeError, match="width of 32 does not tell the number of heads"):
        convert(file, tmp_path / "images")


@pytest.mark.parametrize(("version", "kind"), EVERY)
def test_names_that_do_not_fit_are_listed_and_refused(version, kind, tmp_path, capsys):
    file, _ = checkpoint(tmp_path / "a.pt", version, kind)
    content = content_of(file)
    student = content["model"]
    names = [name for name, value in student.items() if torch.is_tensor(value)]
    block = "blocks.1.mlp" if kind == "images" or version == 2 else "layers.1"
    missing, odd = (next(n for n in names if n.endswith(f"{block}.{end}")) for end in ("fc1.bias", "fc2.bias"))
    del student[missing]
    student |= {odd: torch.zeros(5), "blocks.0.strange": torch.zeros(1)}
    save(file, content)
    assert main(["convert", str(file), f"to={tmp_path / 'out'}", "which=student"]) == 2
    told = capsys.readouterr().err
    assert "3 names do not fit" in told
    assert f"{missing}: missing" in told
    assert f"{odd}: of shape [5], expected [{WIDTH}]" in told
    assert "blocks.0.strange: unknown" in told
    assert not (tmp_path / "out").exists()


def content_of(file):
    """What was saved, by torch itself."""
    module = types.ModuleType("omegaconf_like")
    module.DictConfig, module.AnyNode, module.Modality = DictConfig, AnyNode, Modality
    sys.modules[module.__name__] = module
    found = torch.load(file, weights_only=False)
    del sys.modules[module.__name__]
    return found


def test_a_teacher_that_lacks_a_block_does_not_get_that_of_the_student(tmp_path):
    file, _ = checkpoint(tmp_path / "a.pt", 2, "images")
    content = content_of(file)
    del content["model"]["_ema"]["blocks.1.norm1.weight"]
    save(file, content)
    with pytest.raises(RecipeError, match=r"1 names do not fit:\n  blocks\.1\.norm1\.weight: missing"):
        convert(file, tmp_path / "out")
    convert(file, tmp_path / "out", "student")


def test_the_heads_of_fine_tuned_models_are_left_out(tmp_path):
    for kind, prefix, inner in (
        ("speech", "w2v_encoder.w2v_model.", "w2v_args"),
        ("images", "model.", "pretrained_model_args"),
    ):
        student, _, _ = networks(2, kind)
        content = {f"{prefix}{n}": t for n, t in student.items() if ".decoder." not in n}
        head = {"w2v_encoder.proj.weight": torch.zeros(5, WIDTH)} if kind == "speech" else lin_of("head")
        cfg = DictConfig({"model": {inner: settings(2, kind), "dropout": 0.9}})
        file = save(tmp_path / f"{kind}.pt", {"model": content | head, "cfg": cfg})
        folder, (said, note, *_) = convert(file, tmp_path / kind)
        assert "the student" in said
        assert f"{len(head)} tensors of its head are left out ({', '.join(head)})" in note
        w = Weights({n: t.double() for n, t in student.items()})
        assert_close(outputs(folder, kind)[1].double(), pass2(w, kind), rtol=0, atol=1e-5)
        with pytest.raises(RecipeError, match=r"which=teacher: .* holds no average"):
            convert(file, tmp_path / "other", "teacher")


def lin_of(name):
    return {f"{name}.weight": torch.zeros(5, WIDTH), f"{name}.bias": torch.zeros(5)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state": 1}, "holds no weights"),
        ({"model": {"encoder.weight": torch.ones(2)}}, "is of no layout that is known .*its names are encoder.weight"),
        (
            {"model": {"modality_encoders.IMAGE.a": torch.ones(2), "modality_encoders.TEXT.a": torch.ones(2)}},
            "several encoders",
        ),
        ({"model": {"modality_encoders.IMAGE.extra_tokens": torch.ones(2)}}, "it lacks modality_encoders.IMAGE.local_encoder"),
    ],
)
def test_what_is_no_published_encoder_is_refused(content, message, tmp_path):
    with pytest.raises(RecipeError, match=message):
        convert(save(tmp_path / "a.pt", content), tmp_path / "out")


def test_pre_norm_absurd_and_broken_ones_are_refused(tmp_path):
    file, _ = checkpoint(tmp_path / "a.pt", 2, "text")
    for change, message in (
        ({"layer_norm_first": True}, "layer_norm_first is true"),
        ({"depth": 10**9}, "hidden_size, extra_tokens and MLP: at most"),
        ({"num_heads": 5}, "not a multiple of 5 heads"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06"),
    ):
        content, told = content_of(file), settings(2, "text")
        told["model"] |= change
        with pytest.raises(RecipeError, match=message):
            convert(save(tmp_path / "b.pt", content | {"cfg": DictConfig(told)}), tmp_path / "out")
    content = content_of(file)
    content["model"]["_ema"]["1.norm1.bias"][3] = math.nan
    with pytest.raises(RecipeError, match=r"not finite: transformer\.blocks\.1\.norm1\.bias"):
        convert(save(tmp_path / "b.pt", content), tmp_path / "out")


# Tokenizers -----------------------------------------------------------------------------------------------------------


def release(folder):
    """GPT-2's files in small, and a dictionary of fairseq in another order, without one piece: options."""
    merges = [("l", "o"), ("lo", "w"), ("Ġ", "low"), ("e", "r"), ("n", "e"), ("ne", "w")]
    letters = [*"lowernsti", "Ġ"]
    pieces = {piece: i for i, piece in enumerate([*letters, *("".join(pair) for pair in merges), "<|endoftext|>"])}
    (folder / "encoder.json").write_text(json.dumps(pieces), encoding="utf-8")
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n", encoding="utf-8")
    order = [number for piece, number in sorted(pieces.items()) if piece != "new"]
    fillers = VOCAB - 5 - len(order)
    rows = [f"{number} {1000 - number}" for number in order] + [f"madeupword{i:04} 0" for i in range(fillers)]
    (folder / "dict.txt").write_text("\n".join(rows) + "\n")
    names = {"dictionary": "dict.txt", "vocab": "encoder.json", "merges": "vocab.bpe"}
    return pieces, order, {option: folder / name for option, name in names.items()}


def test_a_text_model_gets_the_tokenizer_of_its_release(tmp_path, capsys):
    file, _ = checkpoint(tmp_path / "a.pt", 2, "text")
    pieces, order, files = release(tmp_path)
    words = [f"{name}={path}" for name, path in files.items()]
    assert main(["convert", str(file), f"to={tmp_path / 'model'}", *words]) == 0
    assert "1 of 6 byte pairs are left out" in capsys.readouterr().out
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [0, 1, 2, 3, VOCAB - 1]
    assert len(tokenizer) == VOCAB
    cut = ["low", "er", "Ġlow", "Ġ", "ne", "w", "s"]
    assert tokenizer("lower low news")["input_ids"] == [0, *(4 + order.index(pieces[piece]) for piece in cut), 2]
    assert tokenizer.model_max_length == PLACES
    assert tokenizer.decode(tokenizer("lower low news")["input_ids"], skip_special_tokens=True) == "lower low news"
    pair = tokenizer("low", "low")["input_ids"]
    assert pair == [0, pair[1], 2, 2, pair[1], 2]


def test_without_the_files_of_its_release_a_text_model_has_no_tokenizer(tmp_path):
    file, _ = checkpoint(tmp_path / "a.pt", 1, "text")
    folder, notes = convert(file, tmp_path / "model")
    assert "No tokenizer was written" in notes[-1]
    assert "No tokenizer was written" in (folder / "README.md").read_text()
    assert not [*folder.glob("tokenizer*")]
    _, _, files = release(tmp_path)
    del files["merges"]
    with pytest.raises(RecipeError, match="merges: missing"):
        convert(file, tmp_path / "other", files=files)
    sound, _ = checkpoint(tmp_path / "b.pt", 2, "images")
    with pytest.raises(RecipeError, match="dictionary, vocab: for text only"):
        convert(sound, tmp_path / "other", files=files)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("dict.txt", "0 5\n", "dictionary: .* has 1 entries, the model has rows for 35"),
        ("dict.txt", "0 5\n" * 35, "dictionary: .* has 34 entries twice"),
        ("encoder.json", "[1]", "vocab: .* is no JSON of pieces"),
        ("vocab.bpe", "a b c\n", "merges: .* no pair"),
    ],
)
def test_files_of_another_tokenizer_are_refused(name, text, message, tmp_path):
    file, _ = checkpoint(tmp_path / "a.pt", 2, "text")
    _, _, files = release(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match=message):
        convert(file, tmp_path / "model", files=files)


# Going on -------------------------------------------------------------------------------------------------------------

SHORT = ("train.epochs=null", "train.steps=2", "train.global_batch=8", "train.device=cpu", "data.workers=0", "optim.warmup=0")
SHORT += ("optim.heads_first=1",)


def test_a_converted_model_is_gone_on_from_and_probed(image_folder, tmp_path, capsys):
    for version, own in ((2, ("method.decoder={dim: 32, groups: 16, layers: 1}",)), (1, ())):
        file, _ = checkpoint(tmp_path / f"{version}.pt", version, "images")
        folder, _ = convert(file, tmp_path / f"model-{version}")
        recipe = load_recipe(
            None,
            f"model.init={folder}",
            f"data={image_folder}",
            f"out={tmp_path / f'run-{version}'}",
            *SHORT,
            *own,
            "watch.samples=20",
        )
        assert recipe.method.name == f"data2vec{version}"
        run = pretrain(recipe)
        again = type(transformers.AutoModel.from_pretrained(run / "model")).__name__
        assert again == ("MmsslModel" if version == 2 else CLASSES["images"])
        assert main(["probe", str(folder), f"data={image_folder}", "samples=20"]) == 0
        assert "k-NN" in capsys.readouterr().out


def test_speech_and_text_are_gone_on_from_too(tmp_path):
    _, _, files = release(tmp_path)
    for version, kind in EVERY[1:3] + EVERY[4:]:
        file, _ = checkpoint(tmp_path / "a.pt", version, kind)
        folder, _ = convert(file, tmp_path / f"{kind}-{version}", files=files if kind == "text" else None)
        (tmp_path / "data").mkdir(exist_ok=True)
        recipe = load_recipe(None, f"model.init={folder}", f"data={tmp_path / 'data'}", *SHORT)
        assert recipe.method.name == f"data2vec{version}"
        encoder = recipe.build().student.encoder
        load_weights(encoder, folder)
        assert_close(dict(encoder.state_dict()), dict(load_encoder(folder).encoder.state_dict()), rtol=0, atol=0)
