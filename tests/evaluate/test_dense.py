"""The probe of patches against scikit-learn, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score

from mmssl.cli import main
from mmssl.errors import RecipeError
from mmssl.evaluate import dense
from mmssl.evaluate.dense import IGNORE, Dense, majority, segmented
from mmssl.evaluate.probe import probe
from mmssl.model.configuration import MmsslConfig
from mmssl.model.modeling import MmsslModel
from mmssl.random import generator
from mmssl.registry import modality
from modalities.vision.backbone import Images
from modalities.vision.views import ImageViews


@pytest.fixture
def vit(tmp_path):
    """A saved model of 2 x 2 patches."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"hidden_size": 8, "depth": 1, "heads": 2, "image_size": 8, "patch_size": 4}
        MmsslModel(MmsslConfig(**shape, extra_tokens=1)).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.fixture
def folder(tmp_path):
    """Images whose bright quarter is class 3, the rest class 0; the last of them without a mask."""
    draws, place = np.random.default_rng(0), tmp_path / "data"
    for i in range(21):
        mask = np.zeros((16, 16), np.uint8)
        mask[8 * (i % 2) :, 8 * (i // 2 % 2) :][:8, :8] = 3
        pixels = draws.integers(0, 60, (16, 16, 3)) + 180 * (mask[..., None] == 3)
        for name, array in (("images", pixels.astype(np.uint8)), ("masks", mask)):
            at = place / name / ("test" if i % 3 == 0 else "train") / f"{i:02}.png"
            at.parent.mkdir(parents=True, exist_ok=True)
            if i < 20 or name == "images":
                Image.fromarray(array).save(at)
    return place


def test_patches_have_the_class_of_most_of_their_pixels():
    classes = torch.tensor([7, 3, IGNORE])[torch.randint(3, (5, 9, 8), generator=generator("classes"))].to(torch.uint8)
    classes[0, :4, :4] = IGNORE
    found = majority(classes, 2)
    for image in range(5):
        for patch in range(4):
            row, column = divmod(patch, 2)
            pixels = classes[image, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten().tolist()
            counts = {number: pixels.count(number) for number in (3, 7)}
            wanted = max((3, 7), key=counts.__getitem__) if any(counts.values()) else IGNORE
            assert found[image, patch] == wanted


def test_numbers_are_those_of_scikit_learn(monkeypatch):
    classes = torch.tensor([0, 2, 5, IGNORE])[torch.randint(4, (30, 3, 3), generator=generator("dense"))]
    masks = classes.repeat_interleave(4, 1).repeat_interleave(4, 2).to(torch.uint8)
    masks[20:, :2] = 9  # which is never learned
    tokens = torch.eye(6)[classes.flatten(1).clamp(max=5)] + torch.randn(30, 9, 6, generator=generator("noise"))
    told, every = [], dense._said

    def kept(*given):
        for said, truth in every(*given):
            told.append((said, truth))
            yield said, truth

    monkeypatch.setattr(dense, "_said", kept)
    found = segmented(Dense(), tokens[:20], masks[:20], tokens[20:], masks[20:])
    said, truth = (torch.cat([pair[i].flatten() for pair in told]).numpy() for i in range(2))
    known = truth != IGNORE
    assert found["pixels"] == pytest.approx(accuracy_score(truth[known], said[known]), abs=1e-9)
    assert found["miou"] == pytest.approx(jaccard_score(truth[known], said[known], average="macro"), abs=1e-9)
    assert 0.15 < found["miou"] < found["pixels"] < 0.95
    assert segmented(Dense(), 9 * tokens[:20], masks[:20], 9 * tokens[20:], masks[20:]) == pytest.approx(found, abs=1e-6)


def test_masks_are_cut_as_images_are(tmp_path):
    """Wide images: the middle square; every mode that holds numbers."""
    pixels = np.random.default_rng(1).integers(0, 255, (8, 12), dtype=np.uint8)
    image, views, found = Image.fromarray(pixels).convert("RGB"), ImageViews(Images(8, 3)), []
    palette = Image.fromarray(pixels, mode="P")
    palette.putpalette([*range(255, -1, -1)] * 3)
    for name, mask in (
        ("grey", Image.fromarray(pixels)),
        ("palette", palette),
        ("deep", Image.fromarray(pixels.astype(np.uint16))),
    ):
        mask.save(tmp_path / f"{name}.png")
        found.append(modality("vision").segments(tmp_path / f"{name}.png", image, views))
    assert all(torch.equal(one, torch.from_numpy(pixels[:, 2:10].astype(np.int64))) for one in found)


def test_bright_patches_are_found_and_the_table_says_so(vit, folder, capsys):
    words = ["probe", vit, f"data={folder}", "protocol=dense", "random=true"]
    assert main([*words, "json=true"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [*found] == ["raw", "random", "model"]
    assert found["raw"]["pixels"] > 0.8
    assert all({*one} == {"miou", "pixels"} and 0 < one["miou"] <= one["pixels"] <= 1 for one in found.values())
    assert main(words) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["mIoU", "pixels"]
    whole = {"images": folder / "images" / "train", "masks": folder / "masks" / "train"}
    for name, place in whole.items():  # without splits a tenth is held out
        place.rename(folder.parent / f"flat-{name}")
    (folder.parent / "flat").mkdir()
    for name in whole:
        (folder.parent / f"flat-{name}").rename(folder.parent / "flat" / name)
    assert {*probe(vit, str(folder.parent / "flat"), protocol="dense")} == {"raw", "model"}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda at: Image.new("RGB", (16, 16)).save(at),
            r"train/01\.png: a mask of mode RGB; pixels must be class numbers",
        ),
        (lambda at: Image.new("L", (8, 16)).save(at), "a mask of 8 x 16 pixels for an image of 16 x 16"),
        (lambda at: Image.fromarray(np.full((16, 16), 700, np.uint16)).save(at), "holds 700; classes are 0 to 254"),
        (lambda at: at.write_bytes(b"no image"), "not an image of a known format"),
    ],
)
def test_masks_that_cannot_be_used_are_named(vit, folder, spoil, said):
    spoil(folder / "masks" / "train" / "01.png")
    with pytest.raises(RecipeError, match=said):
        probe(vit, str(folder), protocol="dense")


def test_what_dense_cannot_do_is_refused(vit, folder, image_folder):
    with pytest.raises(RecipeError, match="has not both images/ and masks/"):
        probe(vit, str(image_folder), protocol="dense")
    with pytest.raises(RecipeError, match="layers: does not apply to protocol=dense"):
        probe(vit, str(folder), protocol="dense", layers=True)
    with pytest.raises(RecipeError, match="dense stands alone"):
        probe(vit, str(folder), protocol="dense,knn")
    for at in (folder / "masks").rglob("*.png"):
        Image.new("L", (16, 16), 4).save(at)
    with pytest.raises(RecipeError, match="are of one class"):
        probe(vit, str(folder), protocol="dense")
    for at in (folder / "masks" / "train").iterdir():
        at.unlink()
    with pytest.raises(RecipeError, match=r"no image of .* has a mask, such as"):
        probe(vit, str(folder), protocol="dense")
