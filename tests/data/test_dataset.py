from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import DataLoader

from mmssl.config import DataOptions
from mmssl.data.dataset import KeyedDataset, KeyedStream
from mmssl.data.quarantine import Quarantine
from mmssl.data.sampler import KeyBatches
from mmssl.data.sources import SHARD_ROWS, open_source
from mmssl.errors import DataError, RecipeError
from mmssl.random import generator
from mmssl.registry import Modality
from mmssl.types import Rejected, View


class FakeViews:
    """Two views: the sample plus noise of its own; the second one drawn first."""

    def __call__(self, sample, draw, length=None):
        second, first = (torch.rand((), generator=draw(i)) for i in (1, 0))
        return {"a": sample + first, "b": sample + second}

    def collate(self, samples):
        assert set(samples[0]) == {"a", "b"}
        return [View(torch.stack([sample[name] for sample in samples]), "fake") for name in ("a", "b")]


def decode(value):
    """Content is a number, or a word that tells what is wrong."""
    text = Path(value).read_text() if isinstance(value, str) else value.decode()
    if text in Rejected.kinds:
        raise Rejected(text, "said so")
    if text == "bug":
        raise RuntimeError("decoder bug")
    return torch.tensor([float(text), 0.0])


KIND = Modality(**dict.fromkeys(Modality._fields))._replace(name="fake", decode=decode, columns=("text",), suffixes=(".txt",))


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def source_of(path, **options):
    return open_source(DataOptions(path=str(path), modality="fake", **options), KIND, "train")


def folder(path: Path, contents) -> Path:
    for i, content in enumerate(contents):
        (path / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        (path / f"c{i % 2}" / f"{i:03}.txt").write_text(str(content))
    return path


def dataset_of(path: Path, seed: int = 5, share: float = 1.0) -> KeyedDataset:
    return KeyedDataset(source_of(path), KIND, FakeViews(), seed, Quarantine(None, share, 0))


def equal(a, b) -> bool:
    return len(a) == len(b) and all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b))


# Tables and folders


def test_a_sample_depends_on_its_key_alone(tmp_path):
    data = dataset_of(folder(tmp_path, range(6)))
    sample = data[1, 4]
    noise = torch.rand((), generator=generator(5, "augment", 1, 4, 0))
    torch.testing.assert_close(sample["a"], decode(data.source.value(4)) + noise, rtol=0, atol=0)
    assert (sample["index"], sample["label"]) == (4, 1)
    assert torch.equal(data[1, 4]["b"], sample["b"])
    for other in (data[0, 4], data[1, 3], dataset_of(tmp_path, seed=6)[1, 4]):
        assert not torch.equal(other["a"], sample["a"])


def test_collate_gives_a_flat_dict(tmp_path):
    data = dataset_of(folder(tmp_path, range(6)))
    batch = data.collate([data[0, i] for i in (3, 0, 5)])
    assert set(batch) == {"index", "label", "0.fake.x", "1.fake.x"}
    assert batch["index"].tolist() == [3, 0, 5]
    assert batch["label"].tolist() == [1, 0, 1]  # sorted: c0/000 c0/002 c0/004 c1/001 ...
    assert batch["index"].dtype == batch["label"].dtype == torch.int64
    assert batch["0.fake.x"].shape == (3, 2)


@pytest.mark.parametrize(("workers", "start"), [(1, "fork"), (2, "fork"), (2, "spawn")])
def test_workers_change_nothing_even_with_bad_samples(tmp_path, workers, start):
    folder(tmp_path, [*range(10), "truncated", *range(11, 20), "bug"])

    def run(**loading):
        data = dataset_of(tmp_path)
        keys = KeyBatches(21, 4, 4, 0, 1, steps=7, seed=5)
        return list(DataLoader(data, batch_sampler=keys, collate_fn=data.collate, **loading)), data.quarantine.summary()

    alone, found = run(num_workers=0)
    together, counted = run(num_workers=workers, multiprocessing_context=start)
    assert equal(alone, together)
    assert found["kinds"] == counted["kinds"]
    assert (found["seen"], counted["seen"]) == (28, 28)


def test_a_bad_sample_is_recorded_and_replaced_by_a_keyed_draw(tmp_path):
    data = dataset_of(folder(tmp_path, ["truncated", *range(1, 9)]))
    sample = data[2, 0]
    substitute = int(torch.randint(9, (), generator=generator(5, "replace", 2, 0, 0)))
    assert sample["index"] == substitute != 0
    assert torch.equal(sample["a"], data[2, substitute]["a"])
    found = data.quarantine.summary()
    assert found["kinds"] == {"truncated": 1}
    assert found["first"][0].endswith("c0/000.txt (truncated: said so)")


def test_views_are_told_the_length_of_a_key(tmp_path):
    data = dataset_of(folder(tmp_path, range(4)))
    views, told = data.views, []
    data.views = lambda sample, draw, length: told.append(length) or views(sample, draw)
    longer = data[1, 2, 7]
    assert torch.equal(longer["a"], data[1, 2]["a"])  # the same stream of draws
    assert told == [7, None]


def test_a_bad_sample_of_known_length_is_replaced_by_one_that_is_not_shorter(tmp_path):
    data = dataset_of(folder(tmp_path, ["truncated", *range(1, 9)]))
    data.source = data.source._replace(lengths=torch.tensor([30, 10, 30, -1, 20, 40, 19, -1, 5]))
    substitutes = {data[epoch, 0, 20]["index"] for epoch in range(40)}
    assert substitutes == {2, 4, 5}
    draw = torch.randint(4, (), generator=generator(5, "replace", 7, 0, 1))  # of 0, 2, 4, 5
    first = torch.randint(4, (), generator=generator(5, "replace", 7, 0, 0))
    assert data[7, 0, 20]["index"] == [0, 2, 4, 5][int(first) or int(draw)]


def test_whatever_a_decoder_raises_is_a_rejection(tmp_path):
    data = dataset_of(folder(tmp_path, ["bug", 1, 2]))
    data[0, 0]
    assert "unreadable: RuntimeError: decoder bug" in data.quarantine.summary()["first"][0]


def test_a_view_that_is_not_finite_is_a_rejection(tmp_path):
    data = dataset_of(folder(tmp_path, ["inf", 1, 2]))
    assert data[0, 0]["a"].isfinite().all()
    assert data.quarantine.summary()["kinds"] == {"non_finite": 1}


def test_a_mistake_in_the_views_is_not_hidden(tmp_path):
    data = dataset_of(folder(tmp_path, [1, 2]))
    data.views = lambda sample, draw, length: sample.no
    with pytest.raises(AttributeError):
        data[0, 0]


def test_nothing_readable_stops_with_names(tmp_path):
    data = dataset_of(folder(tmp_path, ["empty"] * 3))
    with pytest.raises(DataError, match="100 substitutes") as caught:
        data[0, 1]
    assert all(name in str(caught.value) for name in ("000.txt", "001.txt", "002.txt"))


# Streams


def shards(path: Path, sizes, bad=()) -> Path:
    """Parquet files; the row r of shard s holds 100 s + r."""
    for s, size in enumerate(sizes):
        numbers = [100 * s + r for r in range(size)]
        rows = {"text": ["truncated" if n in bad else str(n) for n in numbers], "label": [s % 3] * size}
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y", "z"])})
        path.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path / f"train-{s}.parquet", batch_size=5)
    return path


def stream_of(path: Path, batches: int = 12, **more) -> KeyedStream:
    sizes = {"micro_batch": 3, "readers": 4, "block": 4} | more
    return KeyedStream(
        source_of(path, streaming=True), KIND, FakeViews(), 5, Quarantine(None, 1.0, 0), batches=batches, **sizes
    )


def load(stream: KeyedStream, workers: int = 0, start: str | None = None) -> list:
    return list(DataLoader(stream, batch_size=None, num_workers=workers, multiprocessing_context=start))


def numbers(batches) -> list[int]:
    """100 shard + row of each sample."""
    return [i // SHARD_ROWS * 100 + i % SHARD_ROWS for batch in batches for i in batch["index"].tolist()]


@pytest.mark.parametrize("sizes", [(7, 12, 5, 9, 1, 8), (17, 11)])  # more shards than readers, fewer
def test_workers_change_nothing_of_a_stream(tmp_path, sizes):
    shards(tmp_path, sizes, bad=(3, 102))
    alone = load(stream_of(tmp_path))
    assert len(alone) == 12
    for workers in (1, 2):
        assert equal(load(stream_of(tmp_path), workers), alone)


def test_spawned_workers_of_a_stream(tmp_path):
    shards(tmp_path, (7, 9))
    assert equal(load(stream_of(tmp_path), 1, "spawn"), load(stream_of(tmp_path)))


def test_t22_three_uneven_shards_make_as_many_full_batches_on_each_of_two_ranks_with_two_workers(tmp_path):
    shards(tmp_path, (7, 12, 2))
    alone, *ranks = (load(stream_of(tmp_path, 12, rank=r, world=2), workers) for r, workers in ((0, 0), (0, 2), (1, 2)))
    assert [[len(batch["index"]) for batch in rank] for rank in ranks] == 2 * [12 * [3]]
    assert equal(ranks[0], alone)


@pytest.mark.parametrize("sizes", [(7, 12, 5, 9, 1, 8), (17, 11)])
@pytest.mark.parametrize("known", [True, False])
def test_a_stream_resumes_anywhere_without_decoding(tmp_path, sizes, known, monkeypatch):
    shards(tmp_path, sizes, bad=(3, 102))
    whole = load(stream_of(tmp_path, 30))  # several epochs
    decoded = []
    monkeypatch.setattr("mmssl.data.dataset.decoded", lambda kind, value: decoded.append(value) or decode(value))
    for start in (1, 4, 5, 11, 17, 29):
        stream = stream_of(tmp_path, 30, start=start)
        if not known:
            stream.lengths = {}
        decoded.clear()
        assert equal(load(stream), whole[start:])
        assert len(decoded) <= (30 - start) * 3 + 20  # its own samples and substitutes


def test_resume_with_workers(tmp_path):
    shards(tmp_path, (7, 12, 5, 9, 1, 8))
    assert equal(load(stream_of(tmp_path, 16, start=5), 2), load(stream_of(tmp_path, 16))[5:])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("sizes", [(12,) * 8, (24, 24, 24, 24), (96,), (48, 48)])
def test_an_epoch_of_all_readers_has_every_row_once(tmp_path, world, sizes):
    """Sizes by which each of the readers gets the same number of rows, so that all end their epoch together."""
    shards(tmp_path, sizes)
    per_rank = 96 // (3 * world)
    seen = [numbers(load(stream_of(tmp_path, 2 * per_rank, rank=r, world=world, readers=4 // world))) for r in range(world)]
    everything = sorted(100 * s + r for s, size in enumerate(sizes) for r in range(size))
    first = [n for rank in seen for n in rank[: per_rank * 3]]
    second = [n for rank in seen for n in rank[per_rank * 3 :]]
    assert sorted(first) == sorted(second) == everything
    assert first != second


def test_blocks_are_shuffled_within_themselves(tmp_path):
    shards(tmp_path, (40,))
    rows = numbers(load(stream_of(tmp_path, 8, micro_batch=5, readers=1, block=20)))
    assert sorted(rows[:20]) == list(range(20))
    assert rows[:20] != list(range(20))


def test_a_bad_row_is_replaced_from_its_block(tmp_path):
    shards(tmp_path, (8,), bad=(5,))
    stream = stream_of(tmp_path, 4, micro_batch=4, readers=1)
    rows = numbers(load(stream))
    assert 5 not in rows
    assert sorted(n // 4 for n in rows) == [0] * 8 + [1] * 8
    found = stream.quarantine.summary()
    assert found["kinds"] == {"truncated": 2}  # once in each epoch
    assert found["first"] == [f"{tmp_path / 'train-0.parquet'} row 5 (truncated: said so)"]
    assert found["seen"] == 16


def test_labels_of_a_stream(tmp_path):
    shards(tmp_path, (6, 6, 6))
    for batch in load(stream_of(tmp_path, 6)):
        assert batch["label"].tolist() == (batch["index"] // SHARD_ROWS % 3).tolist()


def test_a_shard_that_breaks_off(tmp_path):
    """Its footer is whole, so its rows are expected; pages in the middle are not."""
    shards(tmp_path, (8, 20))
    file = tmp_path / "train-1.parquet"
    rows = [{"text": str(n), "label": 0} for n in range(20)]
    schema = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["x", "y", "z"])}
    ).arrow_schema
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), file, row_group_size=10, compression="gzip")
    data = bytearray(file.read_bytes())
    column = pyarrow.parquet.read_metadata(file).row_group(1).column(0)
    begin = column.dictionary_page_offset or column.data_page_offset
    data[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    file.write_bytes(data)
    whole = load(stream_of(tmp_path, 20, readers=2))
    assert set(numbers(whole)) <= {*range(8), *range(100, 110)}
    for start in (3, 8, 13):
        stream = stream_of(tmp_path, 20, readers=2, start=start)
        assert equal(load(stream), whole[start:])
    assert stream.quarantine.summary()["kinds"]["unreadable"] >= 10


def test_readers_that_cannot_be_shared(tmp_path, monkeypatch):
    shards(tmp_path, (7, 9))
    monkeypatch.setattr("mmssl.data.dataset.get_worker_info", lambda: SimpleNamespace(id=0, num_workers=2))
    with pytest.raises(RecipeError, match=r"data\.readers: 3 is no multiple"):
        next(iter(stream_of(tmp_path, readers=3)))


def test_a_reader_without_rows_gives_up(tmp_path):
    shards(tmp_path, (2,))
    with pytest.raises(DataError, match="finds no rows"):
        load(stream_of(tmp_path))
