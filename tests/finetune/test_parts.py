"""Parts of fine-tuning: losses, rates of blocks, characters, error rates, mixed batches."""

import re
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from mmssl.config import FinetuneRecipe, checked_views, find_recipe, shipped_recipes
from mmssl.config.finetune import CtcOptions
from mmssl.errors import RecipeError
from mmssl.finetune import ctc
from mmssl.finetune.model import layer_shares, parameter_groups, restrict
from mmssl.finetune.run import Loss
from mmssl.model.configuration import MmsslConfig
from mmssl.model.tasks import MmsslForImageClassification
from tests.finetune.words import checked

ROOT = Path(__file__).resolve().parents[2]
VIEWS = {"image": "vision", "audio": "speech", "ctc": "speech", "sequence": "text"}
SHAPE = {"hidden_size": 16, "image_size": 16, "patch_size": 4}


def ours():
    return MmsslForImageClassification(MmsslConfig(depth=3, heads=2, prenet_depth=1, norm="pre", num_labels=2, **SHAPE))


def theirs():
    config = ViTConfig(num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=2, **SHAPE)
    return ViTForImageClassification(config)


def test_the_loss_is_a_mean_over_the_whole_update():
    draw = torch.Generator().manual_seed(0)
    logits, hard = torch.randn(6, 3, generator=draw).double(), torch.tensor([0, 2, 1, 1, 0, 2])
    soft = torch.softmax(torch.randn(6, 3, generator=draw), 1)
    rows = logits.float().log_softmax(1).double()
    for labels, counted in ((hard, 6), (soft, 18)):
        shares = torch.eye(3)[hard].double() if labels is hard else soft.double()
        wanted = -((0.9 * shares + 0.1 / 3) * rows).sum() / 6
        parts = [Loss(0.1)({"logits": logits[some]}, labels[some], torch.tensor(counted)) for some in (slice(2), slice(2, 6))]
        assert_close(sum(parts).double(), wanted, rtol=1e-5, atol=0)  # micro-batches of unlike size
        assert_close(Loss(0.1)({"logits": logits}, labels).double(), -(shares * rows).sum() / 6, rtol=1e-5, atol=0)  # the test


@pytest.mark.parametrize("make", [ours, theirs])
def test_each_block_has_a_share_of_the_rate_of_the_next(make):
    shares = layer_shares(make(), 0.5)
    base = "mmssl.encoder.transformer." if make is ours else "vit."
    block = "blocks." if make is ours else next(name for name in shares if "layer" in name and ".0." in name).split("0.")[0][4:]
    for i in range(3):
        found = {share for name, share in shares.items() if name.startswith(f"{base}{block}{i}.")}
        assert found == {0.5 ** (3 - i)}
    first = "mmssl.encoder.features." if make is ours else "vit.embeddings."
    assert {share for name, share in shares.items() if name.startswith(first)} == {0.5**4}
    assert {share for name, share in shares.items() if name.startswith("classifier") or "transformer.norm." in name} == {1.0}
    if make is ours:
        assert {share for name, share in shares.items() if ".prenet." in name} == {0.5**4}


def test_only_matrices_decay_and_a_frozen_encoder_has_no_group():
    recipe = checked("optim.lr=0.1", "optim.weight_decay=0.3", "optim.layer_decay=0.5")
    model = ours()
    groups = parameter_groups(model, recipe)
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()])
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.3 for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert "classifier.weight" in names
    assert not {name for name in names if "norm" in name or name.endswith((".bias", "extra.tokens"))}
    assert {group["lr"] for group in groups} == {0.1, 0.05, 0.025, 0.0125, 0.00625}
    still = restrict(ours(), checked("model.tune=head"))
    (one, other) = parameter_groups(still, checked("model.tune=head"))
    assert len(one["params"]) == len(other["params"]) == 1
    still.train()
    assert not any(module.training for module in still.mmssl.modules())
    assert still.classifier.training


def test_statistics_of_batches_stay_where_the_encoder_does():
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=2)
    model = restrict(ResNetForImageClassification(config), checked("model.tune=head"))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    model(torch.randn(2, 3, 32, 32))
    assert_close(dict(model.named_buffers()), before, rtol=0, atol=0)
    shares = layer_shares(restrict(ResNetForImageClassification(config), checked()), 0.5)
    assert {share for name, share in shares.items() if ".stages.0." in name} == {0.25}


def codec(*texts, **options):
    options = CtcOptions(**options)
    return ctc.Codec(ctc.character_tokenizer(texts, options), options)


def test_characters_come_from_the_transcripts(tmp_path):
    own = codec("One two", "one ten")
    assert own.tokenizer.get_vocab() == {"<pad>": 0, "<unk>": 1, "|": 2, "e": 3, "n": 4, "o": 5, "t": 6, "w": 7}
    assert own.encode("One x") == [5, 4, 3, 2, 1]
    frames = torch.tensor([[5, 5, 0, 4, 4, 3, 0, 2, 6, 0, 0, 7, 5, 5], [0, 0, 3, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0]])
    assert own.read(frames) == ["one two", "ee"]
    assert own.texts(torch.tensor([[3, 3, 2, 5], [4, -100, -100, -100]])) == ["ee o", "n"]
    assert "O" in codec("One", lower=False).tokenizer.get_vocab()
    with pytest.raises(RecipeError, match=r"^data\.text: a transcript holds '\|'"):
        codec("a | b")


def test_wrong_words_and_characters_are_counted_over_all_batches():
    from types import SimpleNamespace

    own = codec("one two ten")
    errors = ctc.Errors(own)

    def batch(pairs):
        rows = [torch.tensor(own.encode(text)) for text, _ in pairs]
        labels = torch.nn.utils.rnn.pad_sequence(rows, True, padding_value=-100)
        read = torch.zeros(len(pairs), 20, dtype=torch.long)
        for row, (_, text) in zip(read, pairs):
            for i, token in enumerate(own.encode(text)):
                row[2 * i] = token
        return SimpleNamespace(label_ids=(labels.numpy(), np.ones(3)), predictions=read.numpy())

    assert errors(batch([("one two", "one ten"), ("", "ten")]), compute_result=False) == {}
    found = errors(batch([("ten", "ten one"), ("two one", "one")]), compute_result=True)
    # words: 1 substitution, 1 insertion, 1 deletion of 5; characters: 2, 4, 4 of 17; without a transcript none
    assert found == {"wer": 3 / 5, "cer": 10 / 17}
    assert errors(batch([("ten", "ten")]), compute_result=True) == {"wer": 0.0, "cer": 0.0}


def test_padding_says_nothing():
    logits = torch.zeros(2, 4, 3)
    logits[..., 2] = 1
    found = ctc.silenced(logits, torch.tensor([4, 1]), 0).argmax(-1)
    assert found.tolist() == [[2, 2, 2, 2], [2, 0, 0, 0]]
    assert ctc.silenced(logits, None, 0) is logits


@pytest.mark.parametrize("name", [name for name in shipped_recipes(finetune=True) if name.startswith("finetune/")])
def test_shipped_recipes_are_valid(name):
    assert f"mmssl finetune {name} " in find_recipe(name).read_text(encoding="utf-8")
    recipe = FinetuneRecipe.load(name, "model=MODEL", "data=DATA")
    assert FinetuneRecipe.load(name, "model=MODEL", "data=DATA", "train.steps=5").train.epochs is None
    tune = import_module(f"modalities.{VIEWS[recipe.task.split('-')[0]]}.tune")
    assert checked_views(tune.Inputs, recipe.views, "path").keys() >= recipe.views.keys()


@pytest.mark.parametrize("document", ["README.md", "docs/finetuning.md"])
def test_command_lines_of_documents_are_understood(document):
    lines = re.findall(
        r"^(?:mmssl finetune|accelerate launch recipes/finetune\.py) ([^#\n]+)", (ROOT / document).read_text(), re.M
    )
    assert lines
    for line in lines:
        FinetuneRecipe.load(*line.split())
