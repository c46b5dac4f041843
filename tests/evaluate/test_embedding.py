import csv
import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import mmssl
from mmssl.cli import main
from mmssl.errors import DataError, RecipeError
from mmssl.evaluate import embedding as module
from mmssl.evaluate.embedding import embed
from mmssl.model.configuration import MmsslConfig
from mmssl.model.modeling import MmsslModel
from tests.ranks import on_two_ranks


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a small model for images and one for text."""
    place = tmp_path_factory.mktemp("models")
    shape = {"hidden_size": 8, "depth": 2, "heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        MmsslModel(MmsslConfig(**shape, image_size=8, patch_size=4, extra_tokens=1)).save_pretrained(place / "vision")
    return place


@pytest.fixture
def images(image_folder, tmp_path):
    """Six images in two classes, the third of them broken."""
    for i in range(6):
        place = tmp_path / "images" / ("dark", "light")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(image_folder / "train" / ("dark", "light")[i % 2] / f"{i:02}.png", place)
    (tmp_path / "images" / "dark" / "04.png").write_bytes(b"no image")
    return str(tmp_path / "images")  # dark/00, dark/02, dark/04, light/01, ...


def by_hand(models, images, wanted):
    """Name -> what the model makes of each image alone, of those that can be read."""
    from mmssl.registry import modality

    model, kind, found = MmsslModel.from_pretrained(models / "vision").eval(), modality("vision"), {}
    views = kind.plain_views(model, models / "vision")
    for name in ("dark/00", "dark/02", "light/01", "light/03", "light/05"):
        with torch.no_grad():
            out = model(pixel_values=views.plain([kind.decode(f"{images}/{name}.png")]).x, output_hidden_states=True)
        last, blocks = out.last_hidden_state[0], out.hidden_states
        found[name] = {
            "pooled": out.pooler_output[0],
            "mean": last[1:].mean(0),
            "cls": last[0],
            "patch": last[1:],
            "layer:1": blocks[0][0, 1:].mean(0),
            "layer:-1": blocks[1][0, 1:].mean(0),
        }[wanted]
    return found


@pytest.mark.parametrize("tokens", ["pooled", "mean", "cls", "patch", "layer:1", "layer:-1"])
def test_row_i_is_sample_i_also_where_one_is_broken(models, images, tmp_path, tokens):
    wanted = by_hand(models, images, tokens)
    out = embed(models / "vision", images, tmp_path / "x.parquet", tokens, shard=2)
    table = pyarrow.parquet.read_table(out).to_pylist()
    assert [row["row"] for row in table] == [*range(6)]
    assert [row["class"] for row in table] == ["dark"] * 3 + ["light"] * 3
    assert [row["label"] for row in table] == [0, 0, 0, 1, 1, 1]
    assert [row["name"].removeprefix(images + "/") for row in table if row["embedding"] is not None] == [
        f"{n}.png" for n in wanted
    ]
    for row, expected in zip((row for row in table if row["embedding"] is not None), wanted.values(), strict=True):
        assert_close(torch.tensor(row["embedding"]), expected)
    (line,) = map(json.loads, (tmp_path / "x.parquet.quarantine.jsonl").read_text().splitlines())
    assert line["row"] == 2
    assert line["identity"].endswith("dark/04.png")
    assert line["reason"] == "unreadable: not an image of a known format"
    array = np.load(embed(models / "vision", images, tmp_path / "x.npy", tokens, dtype="float16", shard=4))
    assert array.dtype == np.float16
    assert array.shape == (6, *next(iter(wanted.values())).shape)
    assert np.isnan(array[2]).all()
    assert_close(torch.from_numpy(array[[0, 1, 3, 4, 5]]).float(), torch.stack([*wanted.values()]), atol=5e-3, rtol=5e-3)
    saved = load_file(embed(models / "vision", images, tmp_path / "x.safetensors", tokens))
    if tokens == "patch":
        assert saved["offsets"].tolist() == [0, 4, 8, 8, 12, 16, 20]
        assert_close(saved["embedding"], torch.cat([*wanted.values()]))
    else:
        assert_close(saved["embedding"][[0, 1, 3, 4, 5]], torch.stack([*wanted.values()]))
    rows = [*csv.DictReader((tmp_path / "x.npy.rows.csv").open())]
    assert [row["usable"] for row in rows] == ["true", "true", "false", "true", "true", "true"]
    assert rows[0]["name"].endswith("dark/00.png")
    assert rows[5]["class"] == "light"
    assert not [*tmp_path.glob("*.parts")]


def test_it_goes_on_where_it_stopped_and_mixes_nothing(models, images, tmp_path, monkeypatch):
    whole = embed(models / "vision", images, tmp_path / "whole.npy", shard=2)
    encode, seen = module.Writer._shard, []

    def stopped(self, positions):
        seen.append(positions.start)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return encode(self, positions)

    monkeypatch.setattr(module.Writer, "_shard", stopped)
    out = tmp_path / "x.npy"
    with pytest.raises(KeyboardInterrupt):
        embed(models / "vision", images, out, shard=2)
    assert not out.exists()
    for change in ({"tokens": "cls"}, {"dtype": "float16"}, {"samples": 3}, {"shard": 3}):
        with pytest.raises(RecipeError, match=rf"was begun otherwise: .*{next(iter(change))} was "):
            embed(models / "vision", images, out, **({"shard": 2} | change))
    assert embed(models / "vision", images, out, shard=2).read_bytes() == whole.read_bytes()
    assert seen == [0, 2, 2, 4]
    with pytest.raises(RecipeError, match="exists"):
        embed(models / "vision", images, out, shard=2)


def on_rank(_, model, data, folder):
    return [embed(model, data, f"{folder}/two{suffix}", shard=2) for suffix in (".npy", ".parquet")]


def test_two_processes_write_what_one_does(models, images, tmp_path):
    on_two_ranks(on_rank, str(models / "vision"), images, str(tmp_path), folder=tmp_path)
    for suffix in (".npy", ".parquet"):
        one = embed(models / "vision", images, tmp_path / f"one{suffix}", shard=2)
        assert one.read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    assert (tmp_path / "two.npy.quarantine.jsonl").read_text() == (tmp_path / "one.npy.quarantine.jsonl").read_text()
    assert not [*tmp_path.glob("*.parts")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": "middle"}, "tokens: found 'middle', allowed are pooled, mean, cls, patch and layer:K"),
        ({"tokens": "layer:0"}, "tokens: found 'layer:0'"),
        ({"tokens": "layer:3"}, "tokens: layer:3, the model has 1 to 2"),
        ({"dtype": "int8"}, "dtype: found 'int8'"),
        ({"out": "x.csv"}, r"out: .*x.csv ends in .csv, allowed are .parquet"),
        ({"shard": 0}, "shard: 0"),
        ({"colour": "red"}, "colour: unknown option"),
        ({"split": "dev"}, "data.split: .* has no split 'dev'"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(models, images, tmp_path, change, said):
    out = tmp_path / change.pop("out", "x.parquet")
    with pytest.raises(RecipeError, match=said):
        embed(models / "vision", images, out, **change)
    assert {path.name for path in tmp_path.iterdir()} == {"images"}


def test_what_would_be_a_wrong_number_is_refused(models, images, tmp_path):
    model = MmsslModel.from_pretrained(models / "vision")
    norm = model.encoder.transformer.blocks[-1].mlp.fc2
    norm.weight.data.mul_(1e9)
    model.save_pretrained(tmp_path / "large")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of the 1 samples can be read; .*a\.png"):
        embed(models / "vision", str(tmp_path / "bad"), tmp_path / "x.npy")
    norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(RecipeError, match="is not finite; the model has diverged"):
        embed(tmp_path / "nan", images, tmp_path / "y.npy")


def test_the_command_line_and_the_memory_say_the_same(models, images, tmp_path, capsys):
    out = tmp_path / "x.npy"
    assert main(["embed", str(models / "vision"), f"data={images}", f"out={out}", "workers=0"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}; 1 samples could not be read, see {out}.quarantine.jsonl"
    rows = mmssl.embed(models / "vision", images, samples=20)
    kept = np.delete(np.load(out), 2, 0)
    found = {tuple(np.round(row, 4)) for row in kept}
    assert {tuple(np.round(row, 4)) for row in rows["embedding"].numpy()} <= found
    with pytest.raises(RecipeError, match="out: missing"):
        mmssl.embed(models / "vision", images, tokens="cls")
