"""What a run rebuilt, as pictures: drawn at each probe, of the same samples, and showing what they say."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageColor

from mmssl.config import Recipe
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.training.pretrain import prepare, pretrain
from mmssl.types import Rebuilt
from modalities.speech.picture import draw as draw_sound
from modalities.text.picture import GREY, LINE, MARGIN, MARKED, RIGHT, WIDTH, WRONG, Cell, wrapped
from modalities.text.picture import draw as draw_text
from modalities.text.tokenizer import train as train_tokenizer
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
    assert sorted(path.name for path in report.iterdir()) == ["index.html", "rebuilt-0000002.png", "rebuilt-0000004.png"]
    first, last = (np.asarray(Image.open(path)) for path in sorted(report.glob("*.png")))
    side = (first.shape[0] - 3 * GAP) // 3 + GAP
    assert np.array_equal(first[: 2 * side], last[: 2 * side])  # what there is, and what was seen of it
    assert not np.array_equal(first[2 * side :], last[2 * side :])


def test_methods_that_rebuild_nothing_draw_nothing(tiny_recipe):
    assert [path.name for path in (pretrain(tiny_recipe()) / "report").iterdir()] == ["index.html"]


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


def test_altered_sound_is_shown_as_it_was_heard():
    truth, seen, guess = (torch.full((1, 4, 3), level) for level in (0.2, 0.6, 1.0))
    truth = truth + torch.linspace(-0.2, 0.8, 12).view(1, 4, 3)
    features = SimpleNamespace(unraw=lambda patches: patches)
    hidden = torch.tensor([[True, True, False, False]])
    found = np.asarray(draw_sound(Rebuilt(truth, guess, hidden, seen), None, features)).astype(int)
    size = (found.shape[0] - 9) // 9
    cell = lambda row, frame: tuple(found[row * (3 * size + 3) + size // 2, frame * size + size // 2])  # noqa: E731
    assert cell(1, 0) == cell(1, 3)  # heard alike everywhere, and not blanked
    assert cell(1, 0) not in {(128, 128, 128), cell(0, 0), cell(2, 0)}
    assert cell(2, 3) == cell(0, 3)  # what was not altered is left alone


WORDS = ["<pad>", "\u2581the", "\u2581cat", "\u2581sat", "s", "\u2581incomprehensibly", "<mask>"]


def text(guess: list[int], seen: list[int] | None = None) -> Image.Image:
    truth = torch.tensor([[1, 2, 4, 3, 0]])
    hidden = torch.tensor([[False, True, False, True, False]])
    opens = torch.tensor([True, True, True, True, False, True, True])
    views = SimpleNamespace(
        tokenizer=SimpleNamespace(convert_ids_to_tokens=WORDS.__getitem__), pieces=SimpleNamespace(opens=opens)
    )
    rebuilt = Rebuilt(truth, torch.tensor([guess]), hidden, None if seen is None else torch.tensor([seen]))
    return draw_text(rebuilt, views, SimpleNamespace(pad_token_id=0))


def colours(image: Image.Image, row: int) -> set[tuple[int, ...]]:
    """Of a line of the text, but for those of soft edges."""
    pixels = np.asarray(image)[MARGIN + row * LINE : MARGIN + (row + 1) * LINE]
    return {tuple(pixel) for pixel in pixels.reshape(-1, 3)} & {ImageColor.getrgb(c) for c in (RIGHT, WRONG, GREY, MARKED)}


def test_text_says_what_was_guessed_and_what_was_right():
    right, wrong, grey, marked = (ImageColor.getrgb(colour) for colour in (RIGHT, WRONG, GREY, MARKED))
    both = text([1, 1, 4, 3, 0])
    assert colours(both, 0) == {marked}
    assert colours(both, 1) == {right, wrong}
    assert colours(text([1, 2, 4, 3, 0]), 1) == {right}
    assert colours(text([1, 3, 4, 2, 0]), 1) == {wrong}
    altered = text([1, 1, 4, 3, 0], seen=[1, 6, 4, 3, 0])
    assert colours(altered, 1) - {marked} == {grey}  # soft edges may be as light
    assert colours(altered, 2) == {right, wrong}
    assert altered.height == both.height + LINE
    assert text([1, 5, 4, 5, 0]).size == both.size  # laid out alike at every step


def test_long_text_goes_on_in_the_next_line():
    rows = [[Cell("word", "", "", False, 1)] * n for n in (22, 23)]
    assert [[len(row) for row in wrapped(cells)] for cells in rows] == [[22], [22, 1]]
    assert all(sum(cell.width for cell in row) <= WIDTH for row in wrapped(rows[1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """FOLDER/{speech,text}/{train,test}/{a,b}/*, and FOLDER/tokenizer."""
    folder, draws, texts = tmp_path_factory.mktemp("data"), np.random.default_rng(0), []
    for split, name, i in product(("train", "test"), "ab", range(8)):
        for kind in ("speech", "text"):
            (folder / kind / split / name).mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / "speech" / split / name / f"{i}.wav", draws.normal(0, 0.1, 8000), 16_000)
        texts.append(" ".join(draws.choice(["stone", "river", "cloud", "night", "green", "paper"], 20)))
        (folder / "text" / split / name / f"{i}.txt").write_text(texts[-1])
    train_tokenizer(texts, "bpe", 60, folder / "tokenizer")
    return folder


RUNS = {
    "spectrogram": "model: {bands: 20, frames: 48, DIM}\nmethod: {name: tera}\nviews: {shortest: 0.2}\n",
    "text": "model: {max_tokens: 24, DIM}\nmethod: {name: mlm}\nviews: {tokenizer: FOLDER/tokenizer, pack: PACK}\n",
}


@pytest.mark.parametrize(("kind", "pack"), [("spectrogram", ""), ("text", "true"), ("text", "false")])
def test_sound_and_text_are_drawn_alike_at_each_probe(kind, pack, folder, tmp_path):
    path = tmp_path / "run.yaml"
    recipe = (
        f"data: {{path: FOLDER/{'text' if kind == 'text' else 'speech'}, modality: {kind}, workers: 0}}\n{RUNS[kind]}"
        "optim: {lr: 1.0e-2}\ntrain: {steps: 2, global_batch: 8, device: cpu}\nwatch: {samples: 20, every: 1}\n"
    )
    for name, value in {"FOLDER": str(folder), "PACK": pack, "DIM": "hidden_size: 16, depth: 1, heads: 2"}.items():
        recipe = recipe.replace(name, value)
    path.write_text(recipe)
    report = pretrain(Recipe.load(path, f"out={tmp_path / 'run'}")) / "report"
    first, last = (np.asarray(Image.open(path)) for path in sorted(report.glob("*.png")))
    assert first.shape == last.shape
    if kind == "text":
        seen = MARGIN + 2 * LINE  # the text and what was seen of it
        assert np.array_equal(first[:seen], last[:seen])
        return
    size = (first.shape[0] - 9) // 3
    assert first.shape[0] == 3 * (size + 3) >= 3 * 160  # three panels, each with its gap
    assert first.shape[1] % 8 == 0  # samples
    assert np.array_equal(first[: 2 * (size + 3)], last[: 2 * (size + 3)])
    assert not np.array_equal(first[2 * (size + 3) :], last[2 * (size + 3) :])


@pytest.mark.parametrize(("change", "split"), [("watch.test=test", "test"), ("watch.test=none", None)])
def test_pictures_show_what_is_not_learned_from_if_there_is_such(change, split, tiny_recipe):
    pictures = prepare(tiny_recipe(change)).members[0].pictures
    shown = pictures._batch()["index"]
    assert len(shown) == 8
    if split is None:
        assert pictures.held is None
    else:
        assert pictures.held.source.facts["split"] == split
        assert {*shown.tolist()} <= {*pictures.held.indices}
