"""What a run rebuilt, as pictures: drawn at each probe, of the same samples, and showing what they say."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from mmssl.config import Recipe
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.training.pretrain import pretrain
from mmssl.types import Rebuilt
from modalities.speech.picture import draw as draw_sound
from modalities.text.picture import draw as draw_text
from modalities.vision.picture import GAP, draw

WHITE = (255, 255, 255)


def test_a_run_draws_the_same_samples_at_each_probe(image_folder, tmp_path):
    path = tmp_path / "mae.yaml"
    path.write_text(
        f"data: {{path: {image_folder}, modality: vision, workers: 0}}\n"
        "model: {image_size: 16, patch_size: 4, hidden_size: 16, depth: 1, heads: 2}\n"
        "method: {name: mae, decoder: {dim: 16, depth: 1, heads: 2}}\n"
        "optim: {lr: 1.0e-2}\n"
        "train: {steps: 4, global_batch: 8, device: cpu}\n"
        "watch: {samples: 20, every: 2}\n"
    )
    report = pretrain(Recipe.load(path, f"out={tmp_path / 'run'}")) / "report"
    assert sorted(path.name for path in report.iterdir()) == ["rebuilt-0000002.png", "rebuilt-0000004.png"]
    first, last = (np.asarray(Image.open(path)) for path in sorted(report.iterdir()))
    side = (first.shape[0] - 3 * GAP) // 3 + GAP
    assert np.array_equal(first[: 2 * side], last[: 2 * side])  # what there is, and what was seen of it
    assert not np.array_equal(first[2 * side :], last[2 * side :])


def test_methods_that_rebuild_nothing_draw_nothing(tiny_recipe):
    assert not (pretrain(tiny_recipe()) / "report").exists()


def test_images_are_shown_as_they_are_with_what_was_not_seen_in_grey():
    config = MmsslConfig(modality="vision", hidden_size=16, depth=1, heads=2, image_size=64, patch_size=32)
    features = Encoder.from_config(config).features
    colours = torch.linspace(0, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    truth = features.raw((colours - mean[:, None, None]) / std[:, None, None])
    hidden = torch.zeros(2, 4, dtype=torch.bool)
    hidden[1, 3] = True
    views = SimpleNamespace(mean=mean.numpy() * 255, std=std.numpy() * 255)
    black = features.raw(((torch.zeros_like(colours)) - mean[:, None, None]) / std[:, None, None])
    found = np.asarray(draw(Rebuilt(truth, black, hidden), views, features))
    assert found.shape == (3 * (64 + GAP), 2 * (64 + GAP), 3)
    wanted = (colours * 255).round().permute(0, 2, 3, 1).numpy()
    above, right = slice(64), slice(64 + GAP, 128 + GAP)
    assert np.abs(found[above, :64] - wanted[0]).max() <= 1
    assert np.abs(found[above, right] - wanted[1]).max() <= 1
    seen, made = found[64 + GAP :][:64], found[2 * (64 + GAP) :][:64]
    corner = slice(32, 64), slice(64 + GAP + 32, 128 + GAP)
    assert {*seen[corner].flatten().tolist()} == {128}
    assert {*made[corner].flatten().tolist()} == {0}
    assert np.array_equal(seen[:, :64], made[:, :64])
    assert tuple(found[0, 64]) == WHITE


def test_sound_stands_upright_with_low_bands_below():
    cells = torch.zeros(1, 4, 3)
    cells[0, 1, 0] = 1.0  # second frame, lowest band
    features = SimpleNamespace(unraw=lambda patches: patches.view(-1, 4, 3))
    truth, hidden = cells.view(1, 4, 3), torch.tensor([[False, False, True, False]])
    found = np.asarray(draw_sound(Rebuilt(truth, truth, hidden), None, features)).astype(int)
    size = (found.shape[0] - 9) // 9  # pixels of a cell: three spectrograms of three bands
    middle = found[size // 2 : 3 * size : size, size // 2 : 4 * size : size].sum(-1)  # (bands, frames)
    assert middle.argmax() == 2 * 4 + 1
    seen = found[3 * size + 3 :]
    assert tuple(seen[size // 2, 2 * size + size // 2]) == (128, 128, 128)


def test_text_says_what_was_guessed_and_what_was_right(monkeypatch, tmp_path):
    words = ["<pad>", "\u2581the", "\u2581cat", "\u2581sat", "s"]
    tokenizer = SimpleNamespace(convert_ids_to_tokens=words.__getitem__)
    shown = []
    monkeypatch.setattr("modalities.text.picture._page", lambda lines: shown.extend(lines))
    truth, guess = torch.tensor([[1, 2, 4, 3, 0]]), torch.tensor([[1, 3, 4, 3, 0]])
    hidden = torch.tensor([[False, True, False, True, False]])
    draw_text(Rebuilt(truth, guess, hidden), SimpleNamespace(tokenizer=tokenizer), SimpleNamespace(pad_token_id=0))
    assert shown == ["the [sat|cat]s [sat]", ""]
    monkeypatch.undo()
    picture = draw_text(Rebuilt(truth, guess, hidden), SimpleNamespace(tokenizer=tokenizer), SimpleNamespace(pad_token_id=0))
    picture.save(tmp_path / "text.png")
    assert np.asarray(Image.open(tmp_path / "text.png").convert("L")).min() < 128  # there is something on it
