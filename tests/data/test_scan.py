import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmssl.cli import main
from mmssl.data.scan import look, modality_of_data, scan, stats
from mmssl.errors import RecipeError
from mmssl.evaluate.near import near, near_pairs, typical
from mmssl.model.configuration import MmsslConfig
from mmssl.model.modeling import MmsslModel


@pytest.fixture
def images(tmp_path):
    """train: a/0 a/1 a/copy b/0 b/other (equal to a/0) b/broken; test: a/0 (equal to train/a/1), b/9."""
    draw, root = np.random.default_rng(0), tmp_path / "images"

    def write(name, width=8):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (6, width, 3)).astype(np.uint8)).save(root / f"{name}.png")

    for name, width in (("train/a/0", 8), ("train/a/1", 10), ("train/b/0", 20), ("test/b/9", 30)):
        write(name, width)
    for name in ("train/a/copy", "train/b/other"):
        shutil.copy(root / "train/a/0.png", root / f"{name}.png")
    (root / "test/a").mkdir()
    shutil.copy(root / "train/a/1.png", root / "test/a/0.png")
    (root / "train/b/broken.png").write_bytes(b"no image")
    return root


def test_counts_sizes_and_classes_of_images(images):
    kind, found = look(str(images))
    assert kind.name == "vision"
    told = stats(found)
    assert [*told] == ["test", "train"]
    train = told["train"]
    assert (train["samples"], train["unreadable"]) == (6, 1)
    assert train["bytes"] == sum(file.stat().st_size for file in (images / "train").rglob("*.png"))
    assert train["classes"] == {"a": 3, "b": 3}
    widths = [8, 10, 8, 20, 8]
    assert train["sizes"]["width"]["half"] == np.median(widths)
    assert train["sizes"]["width"]["95 %"] == pytest.approx(np.quantile(widths, 0.95))
    assert train["sizes"]["height"] == {**dict.fromkeys(train["sizes"]["height"], 6.0), "sum": 30.0}


def test_what_is_broken_double_or_shared_is_named(images, tmp_path, capsys):
    _, found = look(str(images))
    told = scan(found)
    (bad,) = told["unreadable"]["train"]
    assert bad["name"].endswith("train/b/broken.png")
    assert (bad["kind"], bad["reason"]) == ("unreadable", "not an image of a known format")
    (group,) = told["duplicates"]["train"]
    assert [name.split("train/")[1] for name in group] == ["a/0.png", "a/copy.png", "b/other.png"]
    assert told["conflicts"]["train"] == [group]
    assert told["duplicates"]["test"] == told["conflicts"]["test"] == []
    (leak,) = told["leaks"]
    assert (leak["first"], leak["second"]) == ("test", "train")
    assert [[name.split("images/")[1] for name in pair] for pair in leak["names"]] == [["test/a/0.png", "train/a/1.png"]]
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(images / "test/b/9.png", other / "held.png")
    assert main(["data", "scan", str(images), f"against={other}", "json=true", "workers=0"]) == 0
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(one["first"], one["second"]) for one in whole["leaks"]] == [("test", "train"), ("test", "against train")]
    assert whole["duplicates"] == told["duplicates"]
    assert main(["data", "scan", str(images), "workers=0"]) == 0
    out = capsys.readouterr().out
    assert "train: 6 samples, 1 unreadable, 2 copies of others" in out
    assert "test and train share 1 samples" in out
    assert main(["data", "stats", str(images), "workers=0"]) == 0
    assert "train: 6 samples, 1 unreadable" in capsys.readouterr().out


def test_sound_and_text_have_sizes_of_their_own(tmp_path):
    (tmp_path / "sound").mkdir()
    for i, seconds in enumerate((1.0, 0.5)):
        soundfile.write(tmp_path / "sound" / f"{i}.wav", np.zeros(int(8000 * seconds)), 8000)
    kind, found = look(str(tmp_path / "sound"))
    assert kind.name == "speech"
    assert stats(found)["train"]["sizes"]["seconds"]["sum"] == pytest.approx(1.5, rel=1e-3)
    (tmp_path / "texts.csv").write_text("text,label\nfour,low\nsomething,high\n,high\nfour,\n")
    kind, found = look(str(tmp_path / "texts.csv"))
    assert kind.name == "text"
    told = stats(found)["train"]
    assert told["sizes"]["characters"]["most"] == 9
    assert (told["samples"], told["unreadable"], told["unlabelled"], told["classes"]) == (4, 1, 1, {"high": 2, "low": 1})
    assert scan(found)["duplicates"]["train"] == [[f"{tmp_path}/texts.csv row 0", f"{tmp_path}/texts.csv row 3"]]
    assert scan(found)["conflicts"]["train"] == []  # one of both has no label


def test_near_pairs_are_those_of_a_slow_loop():
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.cat([x[:2] * 5, torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))])
    cosine = torch.nn.functional.cosine_similarity(x[:, None], y[None], dim=2)
    wanted = sorted(((i, j) for i in range(7) for j in range(5) if cosine[i, j] >= 0.6), key=lambda p: -cosine[p])
    found = near_pairs(x, y, 0.6)
    assert {(i, j) for i, j, _ in found} == {*wanted}
    assert {(i, j) for i, j, _ in found[:2]} == {(0, 0), (1, 1)}
    assert [value for _, _, value in found] == pytest.approx([float(cosine[p]) for p in wanted])
    within = near_pairs(torch.cat([x, x[:1] * 2]), None, 0.999)
    assert [(i, j) for i, j, _ in within] == [(0, 7)]
    assert typical(x, y) == pytest.approx(float(cosine.mean()))
    own = torch.nn.functional.cosine_similarity(x[:, None], x[None], dim=2)
    assert typical(x, None) == pytest.approx(float(own[~torch.eye(7, dtype=torch.bool)].mean()))


def test_near_duplicates_are_found_by_a_model_and_equal_ones_left_out(images, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"hidden_size": 8, "depth": 1, "heads": 2, "image_size": 8, "patch_size": 4}
        MmsslModel(MmsslConfig(**shape)).save_pretrained(tmp_path / "model")
    pixels = np.asarray(Image.open(images / "train/a/0.png")).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(images / "test/b/nearly.png")
    kind, found = look(str(images))
    told = near(tmp_path / "model", kind, found, cosine=0.99999)
    (one,) = [one for one in told if (one["first"], one["second"]) == ("test", "train")]
    names = {(a.split("images/")[1], b.split("images/")[1]) for a, b, _ in one["pairs"]}
    assert {("test/b/nearly.png", f"train/{name}.png") for name in ("a/0", "a/copy", "b/other")} <= names
    assert ("test/a/0.png", "train/a/1.png") not in names
    with pytest.raises(RecipeError, match=r"cosine: 1\.5"):
        near(tmp_path / "model", kind, found, cosine=1.5)
    (tmp_path / "texts.csv").write_text("text,label\nfour,0\nsomething,1\n")
    with pytest.raises(RecipeError, match="takes vision, the data are text"):
        near(tmp_path / "model", *look(str(tmp_path / "texts.csv")))


def test_what_is_no_data_is_refused(tmp_path, capsys):
    with pytest.raises(RecipeError, match="does not exist"):
        modality_of_data(str(tmp_path / "nothing"), {})
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "a.xyz").write_text("?")
    with pytest.raises(RecipeError, match=r"could be none of .*say which with modality=NAME"):
        modality_of_data(str(tmp_path / "odd"), {})
    assert main(["data", "scam", str(tmp_path)]) == 2
    assert "did you mean scan?" in capsys.readouterr().err
    assert main(["data", "stats", str(tmp_path), "model=x"]) == 2
    assert "are for mmssl data scan" in capsys.readouterr().err
