from types import SimpleNamespace

import pytest
import torch

from mmssl.config import DataOptions, WatchOptions
from mmssl.errors import DataError
from mmssl.evaluate import features
from mmssl.evaluate.features import Loaded, PlainSet, embed, open_sets
from mmssl.registry import Modality
from mmssl.types import Batch, Rejected, View

KIND = Modality(**dict.fromkeys(Modality._fields))._replace(
    decode=lambda value: value if len(value) else (_ for _ in ()).throw(Rejected("empty")), raw=lambda sample: sample[:1]
)


class Padding:
    """Rows of numbers, padded with zeros to the longest."""

    ragged, longest = True, 9

    def plain(self, samples):
        lengths = torch.tensor([len(sample) if sample[0] else 0 for sample in samples])
        pad = torch.arange(max(map(len, samples))) >= lengths[:, None]
        return View(torch.nn.utils.rnn.pad_sequence(samples, batch_first=True), "fake", pad)


def plain_set(rows, **more) -> PlainSet:
    source = SimpleNamespace(
        value=rows.__getitem__, label_at=lambda i: i % 3, identity=lambda i: f"row {i}", size=len(rows), **more
    )
    return PlainSet(source, KIND, Padding(), [*range(len(rows))])


def means(batch):
    """Of the valid numbers of each row."""
    (view,) = Batch.from_tensors({name: t for name, t in batch.items() if name not in ("raw", "valid", "label")}).views
    return {"embedding": ((view.x * ~view.pad).sum(1) / (~view.pad).sum(1))[:, None]}


def test_samples_of_unlike_length_are_padded_together():
    data = plain_set([torch.full((n,), float(n)) for n in (2, 5, 3)])
    batch = data.collate([data[0], data[1], data[2]])
    assert batch["0.fake.x"].shape == (3, 5)
    assert batch["0.fake.pad"].sum(1).tolist() == [3, 0, 2]
    assert batch["raw"].tolist() == [[2.0], [5.0], [3.0]]
    assert (batch["label"].tolist(), batch["index"].tolist(), batch["valid"].tolist()) == ([0, 1, 2], [0, 1, 2], [True] * 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_embeddings_come_in_order_whatever_the_batches(workers):
    rows = [torch.full((1 + i * 7 % 9,), float(i + 1)) for i in range(21)]
    found = embed(Loaded(plain_set(rows), 4, workers), means)
    assert found["embedding"].flatten().tolist() == [float(i + 1) for i in range(21)]
    assert found["label"].tolist() == [i % 3 for i in range(21)]


def test_samples_that_cannot_be_read_or_give_no_token_are_left_out():
    rows = [torch.full((3,), float(i)) for i in range(1, 8)]
    rows[2], rows[5] = torch.empty(0), torch.zeros(3)
    found = embed(Loaded(plain_set(rows), 4, 0), means)
    assert found["embedding"].flatten().tolist() == [1.0, 2.0, 4.0, 5.0, 7.0]
    with pytest.raises(DataError, match="row 0: empty"):
        plain_set([torch.empty(0)])[0]


@pytest.mark.parametrize(("longest", "batch"), [(None, features.BATCH), (9, features.PADDED)])
def test_padded_sets_have_smaller_batches(longest, batch, image_folder):
    from mmssl.registry import modality

    where = DataOptions(path=str(image_folder), modality="vision")
    sets = open_sets(where, WatchOptions(), modality("vision"), SimpleNamespace(longest=longest), 0)
    assert (sets.train.batch, sets.test.batch) == (batch, batch)
    assert features.PADDED < features.BATCH
