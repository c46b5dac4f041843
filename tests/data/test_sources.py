import csv
import io
import json
import os
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from PIL import Image

from mmssl.config import DataOptions
from mmssl.data.sources import SHARD_ROWS, open_source, splits
from mmssl.errors import RecipeError
from mmssl.registry import Modality
from mmssl.types import Rejected

KIND = Modality(**dict.fromkeys(Modality._fields))._replace(
    name="vision", columns=("image", "file_name"), suffixes=(".png", ".jpg")
)
TEXT = KIND._replace(name="text", columns=("text", "file_name"), suffixes=(".txt",))
REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def opened(path, split="train", kind=KIND, **options):
    return open_source(DataOptions(path=str(path), modality=kind.name, **options), kind, split)


def refused(path, split="train", kind=KIND, **options) -> str:
    with pytest.raises(RecipeError) as caught:
        opened(path, split, kind, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def put(folder: Path, *names: str) -> Path:
    """Files whose content is their own name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (2, 2), value).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(file: Path, values, labels, names=("ant", "bee", "cat")) -> Path:
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names)), "more": datasets.Value("float32")}
    rows = {"image": [{"bytes": png(v), "path": None} for v in values], "label": list(labels), "more": [0.5] * len(values)}
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file, batch_size=2)
    return file


def table(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="") as out:
        if file.suffix == ".csv":
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            out.writelines(json.dumps(row) + "\n" for row in rows)
    return file


def values(source) -> list:
    return [source.value(i) for i in range(source.size)]


# Folders


def test_flat_folder(tmp_path):
    put(tmp_path, "b.png", "a.JPG", "sub/c.png", ".hidden.png", ".cache/d.png", "notes.txt")
    source = opened(tmp_path)
    assert values(source) == [str(tmp_path / name) for name in ("a.JPG", "b.png", "sub/c.png")]
    assert source.identity(1) == str(tmp_path / "b.png")
    assert (source.label, source.classes, source.label_at(0), source.streaming) == (None, 0, -1, False)
    assert source.facts == {
        "path": str(tmp_path), "kind": "folder", "split": "train", "count": 3, "column": "file", "label": None, "classes": [],
    }  # fmt: skip


def test_class_folders(tmp_path):
    put(tmp_path, "dog/1.png", "cat/deep/2.png", "cat/3.png")
    source = opened(tmp_path)
    assert [(Path(source.value(i)).name, source.label_at(i)) for i in range(3)] == [("3.png", 0), ("2.png", 0), ("1.png", 1)]
    assert (source.label, source.classes, source.facts["classes"]) == ("label", 2, ["cat", "dog"])


def test_split_folders_share_their_class_numbers(tmp_path):
    put(tmp_path, "train/dog/1.png", "train/cat/2.png", "val/dog/3.png", "val/ape/4.png")
    assert splits(DataOptions(path=str(tmp_path), modality="vision"), KIND) == ["train", "validation"]
    train, val = opened(tmp_path), opened(tmp_path, "val")
    assert train.facts["classes"] == val.facts["classes"] == ["ape", "cat", "dog"]
    assert [train.label_at(i) for i in range(2)] == [1, 2]
    assert [val.label_at(i) for i in range(2)] == [0, 2]
    assert opened(tmp_path, "validation").facts["count"] == 2
    assert "no split 'test'; there are train, validation" in refused(tmp_path, "test")


def test_a_class_may_be_named_like_a_split(tmp_path):
    put(tmp_path, "train/1.png", "bus/2.png", "car/3.png")
    assert opened(tmp_path).facts["classes"] == ["bus", "car", "train"]


def test_links_in_a_circle_and_odd_names(tmp_path):
    put(tmp_path, "a/1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    odd = os.fsencode(tmp_path) + b"/a/\xff.png"
    with open(odd, "wb") as file:
        file.write(b"x")
    source = opened(tmp_path)
    assert source.size == 2
    assert os.fsencode(source.value(1)) == odd
    source.identity(1).encode()  # printable


def test_limit_is_spread_evenly(tmp_path):
    put(tmp_path, *(f"{c}/{i}.png" for c in "abcde" for i in range(4)))
    source = opened(tmp_path, limit=10)
    assert [source.label_at(i) for i in range(10)] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert source.facts["count"] == 10
    assert source.identity(3) == source.value(3)


def test_a_single_file(tmp_path):
    put(tmp_path, "a.png", "b.png")
    assert values(opened(tmp_path / "b.png")) == [str(tmp_path / "b.png")]


def test_what_is_wrong_with_a_folder(tmp_path):
    put(tmp_path / "photos", "a.gif", "b.gif", "README")
    (tmp_path / "none").mkdir()
    assert "2 .gif, 1 with no suffix" in refused(tmp_path / "photos")
    assert ".png, .jpg" in refused(tmp_path / "photos")
    assert "none is empty" in refused(tmp_path / "none")
    text = refused(tmp_path / "photo")
    assert "data.path" in text
    assert "did you mean" in text
    assert "photos?" in text
    with pytest.raises(RecipeError, match=r"data\.path: missing"):
        open_source(DataOptions(modality="vision"), KIND, "train")


# Tables


def test_parquet_folder(tmp_path):
    folder = tmp_path / "set [1]"  # brackets are no pattern
    parquet(folder / "train-00000-of-00002.parquet", [0, 1, 2], [2, 1, 0])
    parquet(folder / "train-00001-of-00002.parquet", [3, 4], [1, -1])
    parquet(folder / "test-00000-of-00001.parquet", [5], [2])
    assert splits(DataOptions(path=str(folder), modality="vision"), KIND) == ["test", "train"]
    source = opened(folder)
    assert values(source) == [png(i) for i in range(5)]
    assert [source.label_at(i) for i in range(5)] == [2, 1, 0, 1, -1]
    assert source.rows.column_names == ["image"]
    assert source.identity(4) == f"{folder / 'train-00001-of-00002.parquet'} row 1"
    assert source.facts["classes"] == ["ant", "bee", "cat"]
    assert opened(folder, "test").label_at(0) == 2


def test_parquet_file_with_a_limit(tmp_path):
    source = opened(parquet(tmp_path / "all.parquet", range(9), [0] * 9), limit=3)
    assert values(source) == [png(0), png(3), png(6)]
    assert source.identity(2).endswith("all.parquet row 6")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
def test_manifests(tmp_path, suffix):
    put(tmp_path, "img/a.png", "img/b.png")
    rows = [{"file_name": "img/b.png", "label": "wet"}, {"file_name": "img/a.png", "label": "dry"}]
    source = opened(table(tmp_path / f"list{suffix}", rows))
    assert [Path(value).read_text() for value in values(source)] == ["img/b.png", "img/a.png"]
    assert [source.label_at(i) for i in range(2)] == [1, 0]
    assert source.identity(0) == str(tmp_path / "img/b.png")
    moved = table(tmp_path / "elsewhere" / f"list{suffix}", rows)
    assert values(opened(moved, root=str(tmp_path))) == values(source)


def test_string_labels_have_one_number_in_all_splits(tmp_path):
    table(tmp_path / "train.csv", [{"file_name": f"{i}.png", "label": c} for i, c in enumerate(["b", "c", "b"])])
    table(tmp_path / "test.csv", [{"file_name": "9.png", "label": "a"}])
    assert [opened(tmp_path).label_at(i) for i in range(3)] == [1, 2, 1]
    assert opened(tmp_path, "test").label_at(0) == 0


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "a/../../secret.png"])
@pytest.mark.parametrize("streaming", [False, True])
def test_names_must_not_leave_the_root(tmp_path, name, streaming):
    file = table(tmp_path / "in" / "list.csv", [{"file_name": "a.png"}, {"file_name": name}])
    if streaming:
        source = opened(file, streaming=True)
        rows = list(source.rows)
        assert source.content(rows[0]) == str(tmp_path / "in" / "a.png")
        with pytest.raises(Rejected, match=r"data\.root"):
            source.content(rows[1])
    else:
        assert "data.root=" in refused(file)
        assert values(opened(file, root="/"))[1] == os.path.join("/", name)


def test_paths_inside_a_parquet_file_must_not_leave_the_root_either(tmp_path):
    rows = [{"image": {"bytes": None, "path": "/etc/passwd"}}, {"image": {"bytes": None, "path": "a.png"}}]
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "x.parquet")
    source = opened(tmp_path)
    with pytest.raises(Rejected, match="lies outside"):
        source.value(0)
    assert source.value(1) == str(tmp_path / "a.png")


def test_text_is_content_not_a_path(tmp_path):
    source = opened(table(tmp_path / "x.jsonl", [{"text": "/etc/passwd"}, {"text": "Grüße"}]), kind=TEXT)
    assert values(source) == [b"/etc/passwd", "Grüße".encode()]


def test_columns(tmp_path):
    file = parquet(tmp_path / "x.parquet", [0], [0])
    other = KIND._replace(columns=("pixels",))
    text = refused(file, kind=other)
    assert "image, label, more" in text
    assert "data.column=" in text
    assert opened(file, kind=other, column="image").value(0) == png(0)
    assert "float32" in refused(file, column="more")
    assert "data.label: " in refused(file, label="colour")
    assert "not classes" in refused(file, label="more")


def test_numbers_as_labels(tmp_path):
    rows = [{"file_name": f"{n}.png", "label": n, "kind": n} for n in (30, 10, -1, 20)]
    source = opened(table(tmp_path / "x.jsonl", rows))
    assert [source.label_at(i) for i in range(4)] == [2, 0, -1, 1]
    assert source.facts["classes"] == ["10", "20", "30"]
    assert opened(tmp_path / "x.jsonl", label="kind").label == "kind"


def test_broken_tables_are_named(tmp_path):
    good = parquet(tmp_path / "a.parquet", [0], [0])
    (tmp_path / "b.parquet").write_bytes(good.read_bytes()[:-9])
    assert "b.parquet is no whole parquet file" in refused(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"file_name": ')
    assert "data.path" in refused(tmp_path / "x.jsonl")


# Streams


def test_streamed_parquet(tmp_path):
    parquet(tmp_path / "train-0.parquet", [0, 1, 2], [2, 1, 0])
    parquet(tmp_path / "train-1.parquet", [3], [1])
    source = opened(tmp_path, streaming=True)
    rows = list(source.rows)
    assert source.streaming
    assert [source.content(row) for row in rows] == [png(i) for i in range(4)]
    assert [source.label_of(row) for row in rows] == [2, 1, 0, 1]
    assert source.identity(SHARD_ROWS) == f"{tmp_path / 'train-1.parquet'} row 0"
    assert (source.total, source.facts["count"], source.rows.num_shards) == (4, None, 2)


def test_a_limited_stream_is_held_in_memory(tmp_path):
    for shard in range(3):
        parquet(tmp_path / f"train-{shard}.parquet", range(shard * 4, shard * 4 + 4), [shard] * 4)
    source = opened(tmp_path, streaming=True, limit=6)
    assert values(source) == [png(i) for i in (0, 1, 4, 5, 8, 9)]
    assert [source.label_at(i) for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert source.identity(0)


def test_a_stream_knows_no_string_classes(tmp_path):
    file = table(tmp_path / "x.csv", [{"file_name": "a.png", "label": "x"}])
    assert opened(file, streaming=True).label is None
    assert "ClassLabel" in refused(file, streaming=True, label="label")


# Hub


def test_the_hub(monkeypatch, tmp_path):
    asked = {}

    def load(path, name, revision, streaming):
        asked.update(path=path, name=name, revision=revision, streaming=streaming)
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        rows = {"img": [{"bytes": png(7), "path": None}], "label": [1]}
        return {"train": datasets.Dataset.from_dict(rows, features=features)}

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    source = opened("org/name", config="big", revision="abc", column="img")
    assert asked == {"path": "org/name", "name": "big", "revision": "abc", "streaming": False}
    assert (source.value(0), source.label_at(0), source.identity(0)) == (png(7), 1, "org/name train row 0")
    assert "there is only train" in refused("org/name", "test", column="img")


def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    monkeypatch.chdir(tmp_path)
    assert "Hub cannot be reached" in refused("org/name")
    with pytest.raises(RecipeError, match="Hub cannot be reached"):
        splits(DataOptions(path="org/name", modality="vision"), KIND)
    (tmp_path / "org").mkdir()
    assert "does not exist" in refused("org/name")  # plainly meant as a folder


def test_a_hub_data_set_that_needs_a_configuration(monkeypatch, tmp_path):
    def several(*_, **__):
        raise ValueError("Config name is missing. Please pick one among the available configs: ['en', 'de']")

    monkeypatch.setattr(datasets, "load_dataset", several)
    monkeypatch.chdir(tmp_path)
    assert refused("org/name").startswith("data.config: org/name")


@pytest.mark.realdata
@pytest.mark.skipif(not (REAL / "cifar10").is_dir(), reason="the real data sets are not beside the checkout")
def test_cifar10():
    source = opened(REAL / "cifar10", "test", streaming=True, limit=64)
    assert source.facts["classes"][0] == "airplane"
    assert all(Image.open(io.BytesIO(value)).size == (32, 32) for value in values(source))
