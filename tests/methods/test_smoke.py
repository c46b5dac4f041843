"""A few hundred updates of data2vec 2.0 teach something about images, tones and texts, and keep predictions apart."""

import json

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mmssl.config import Recipe
from mmssl.evaluate.linear import linear_accuracy

LEARNED_FROM, PROBED_BY, TESTED_ON = 800, 200, 400

IMAGES = """
model: {image_size: 16, patch_size: 4, channels: 1, hidden_size: 48, depth: 3, heads: 3}
method: {name: data2vec2, top_k: 3, cls_weight: 0.5, momentum: {start: 0.99, end: 0.999},
  decoder: {dim: 48, groups: 4, layers: 2}}
views: {scale: [0.5, 1.0], flip: 0.0, mean: [0.5], std: [0.5], mask: {ratio: 0.7, adjust: 0.1, width: 2, copies: 4}}
optim: {lr: 2.0e-3, warmup: 30, clip: 4.0}
train: {steps: 300, global_batch: 16}
"""
TONES = """
model: {hidden_size: 48, depth: 2, heads: 3, extra_tokens: 0, conv_channels: 32, position_layers: 1, position_kernel: 3,
  position_groups: 4, norm_eps: 1.0e-5}
method: {name: data2vec2, top_k: 2, final_norm: none, cls_weight: 0.0, teacher_features: share,
  momentum: {start: 0.99, end: 0.999}, decoder: {dim: 48, groups: 4, kernel: 5, layers: 2}}
views: {longest: 0.3, shortest: 0.2, mask: {kind: block, ratio: 0.5, adjust: 0.05, width: 3, copies: 4}}
optim: {lr: 1.0e-3, warmup: 50, clip: 4.0}
train: {steps: 400, global_batch: 8}
"""
WORDS = """
model: {vocab_size: 424, mask_token_id: 423, max_tokens: 24, hidden_size: 48, depth: 2, heads: 3, norm_eps: 1.0e-5,
  extra_tokens: 1, position_std: 2.0e-3}
method: {name: data2vec2, top_k: 2, each_norm: layer, final_norm: layer, loss_scale: 0.1, cls_weight: 2.56,
  teacher_features: average, momentum: {start: 0.999, end: 0.999},
  decoder: {dim: 48, groups: 4, kernel: 5, layers: 2, residual: false, hidden: 96}}
views: {tokenizer: TOKENIZER, pack: false, mask: {kind: uniform, ratio: 0.6, copies: 4}}
optim: {lr: 2.0e-3, betas: [0.9, 0.98], warmup: 50, clip: 1.0}
train: {steps: 250, global_batch: 16, micro_batch: 16}
"""
REST = """
watch: {every: 0, samples: 20}
data: {path: DATA, modality: KIND, workers: 0}
"""


def images(folder, draw):
    """Scanned digits."""
    digits = load_digits()
    order = draw.permutation(len(digits.images))
    samples = [Image.fromarray((digits.images[i] * 15.9).astype(np.uint8)).resize((16, 16)) for i in order]
    for i, image in enumerate(samples[:LEARNED_FROM]):
        image.save(folder / f"{i}.png")
    return samples[LEARNED_FROM:], digits.target[order][LEARNED_FROM:]


def tones(folder, draw):
    """Eight pitches, each by a new voice every 25 milliseconds: what can be told from the rest of a clip is its pitch."""
    label, time = draw.integers(8, size=LEARNED_FROM + PROBED_BY + TESTED_ON), np.arange(4800) / 16_000
    samples = []
    for pitch in 200 * 2 ** (label / 4 + draw.uniform(-0.05, 0.05, len(label))):
        strength, phase = draw.uniform(0, 1, (2, 5, 12)).repeat(len(time) // 12, 2)
        wave = (strength * np.sin(2 * np.pi * (pitch * np.arange(1, 6)[:, None] * time + phase))).sum(0)
        samples.append(0.1 * (wave + draw.normal(0, 0.1, len(time))))
    for i, wave in enumerate(samples[:LEARNED_FROM]):
        soundfile.write(folder / f"{i}.wav", wave, 16_000)
    return [torch.tensor(wave, dtype=torch.float32) for wave in samples[LEARNED_FROM:]], label[LEARNED_FROM:]


def words(folder, draw):
    """Texts of sixteen words on six topics: half of the words are of any text, half are among the sixty of the topic."""
    label = draw.integers(6, size=2000 + PROBED_BY + TESTED_ON)
    own, any_text = draw.integers(60, size=(2, len(label), 16))
    which = np.where(draw.random(own.shape) < 0.5, any_text, 60 * (1 + label[:, None]) + own)
    samples = [" ".join(f"w{word}" for word in row) for row in which]
    lines = [json.dumps({"text": text}) for text in samples[:2000]]
    (folder / "train.jsonl").write_text("\n".join(lines))
    names = ["<s>", "<pad>", "</s>", *(f"w{i}" for i in range(420)), "<mask>"]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<mask>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder.parent / "tokenizer")
    return samples[2000:], label[2000:]


KINDS = {"vision": (IMAGES, images), "speech": (TONES, tones), "text": (WORDS, words)}
GAINS = {"vision": 0.04, "speech": 0.05, "text": 0.2}  # 57 to 68 %, 34 to 47 %, 47 to 91 %


@torch.no_grad()
def accuracy(run, samples, labels):
    """Of a linear probe on the student's features, learned from the first 200 samples."""
    encoder = run.trainer.objective.method.student.encoder.eval()
    parts = [encoder.inspect(run.members[0].views.plain(samples[i : i + 50]))[0] for i in range(0, PROBED_BY + TESTED_ON, 50)]
    features, labels = torch.cat(parts), torch.from_numpy(labels[: PROBED_BY + TESTED_ON])
    return linear_accuracy(features[:PROBED_BY], labels[:PROBED_BY], features[PROBED_BY:], labels[PROBED_BY:])


def train(kind, folder, trained, before):
    """The run after a few hundred updates, and the labelled samples that it has not seen."""
    (folder / "data").mkdir()
    text, make = KINDS[kind]
    samples, labels = make(folder / "data", np.random.default_rng(0))
    file = folder / "recipe.yaml"
    text = (text + REST).replace("DATA", str(folder / "data")).replace("KIND", kind)
    file.write_text(text.replace("TOKENIZER", str(folder / "tokenizer")))
    options = ("train.device=cpu", "train.threads=1", "train.log_every=25")
    recipe = Recipe.load(file, f"out={folder / 'run'}", *options)
    return trained(recipe, lambda run: before(run, samples, labels)), samples, labels


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_hundred_updates_keep_predictions_apart_and_teach_what_samples_are_about(kind, tmp_path, trained):
    untrained = []
    run, samples, labels = train(kind, tmp_path, trained, lambda *given: untrained.append(accuracy(*given)))
    lines = [line for line in run.lines if "health/prediction_std" in line and line["step"] >= 100]
    assert min(line["health/prediction_std"] for line in lines) > 0.05  # fairseq stops below 0.01
    assert accuracy(run, samples, labels) > untrained[0] + GAINS[kind]
