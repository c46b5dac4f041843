from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from mmssl.config import DataOptions, WatchOptions
from mmssl.errors import DataError, RecipeError
from mmssl.evaluate import features
from mmssl.evaluate.features import Loaded, PlainSet, embed, few_labels, open_sets, rank_in_class
from mmssl.random import generator
from mmssl.registry import Modality, modality
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
    where = DataOptions(path=str(image_folder), modality="vision")
    sets = open_sets(where, WatchOptions(), modality("vision"), SimpleNamespace(longest=longest), 0)
    assert (sets.train.batch, sets.test.batch) == (batch, batch)
    assert features.PADDED < features.BATCH


def test_embeddings_carry_their_index():
    rows = [torch.full((3,), float(i)) for i in range(1, 6)]
    rows[1] = torch.empty(0)
    assert embed(Loaded(plain_set(rows), 2, 0), means)["index"].tolist() == [0, 2, 3, 4]


def drawn_pixels(sets, batch: int, workers: int, seed: int, epoch: int) -> torch.Tensor:
    loaded = Loaded(sets.train.data, batch, workers).drawn(seed, epoch)
    return embed(loaded, lambda flat: {"embedding": flat["0.vision.x"].flatten(1)})["embedding"]


def test_random_views_depend_on_seed_epoch_and_index_alone(image_folder):
    kind = modality("vision")
    views = kind.plain_views(SimpleNamespace(config=SimpleNamespace(image_size=8)), image_folder)
    sets = open_sets(DataOptions(path=str(image_folder), modality="vision"), WatchOptions(), kind, views, 0)
    found = drawn_pixels(sets, 5, 0, 1, 2)
    source, data = sets.train.data.source, sets.train.data
    for row, index in zip(found[:3], data.indices):
        by_hand = views(kind.decode(source.value(index)), lambda view, i=index: generator(1, "probe-views", 2, i, view))
        assert torch.equal(row, by_hand["x"].flatten())
    assert torch.equal(found, drawn_pixels(sets, 32, 1, 1, 2))
    for other in (drawn_pixels(sets, 5, 0, 1, 3), drawn_pixels(sets, 5, 0, 2, 2)):
        assert (other != found).any(1).all()


CLASS = torch.tensor([0] * 40 + [1] * 30 + [2] * 3)


def taken(share: float, seed: int = 0) -> torch.Tensor:
    return few_labels(torch.arange(100, 173), CLASS, share, seed)


def test_few_labels_are_as_many_of_each_class_as_there_are():
    sizes = {share: CLASS[taken(share) - 100].bincount().tolist() for share in (0.01, 0.1, 0.5, 1, 5, 35, 1000)}
    assert sizes == {
        0.01: [1, 1, 1], 0.1: [2, 2, 2], 0.5: [12, 12, 3], 1: [1, 1, 1], 5: [5, 5, 3], 35: [35, 30, 3], 1000: [40, 30, 3],
    }  # fmt: skip


def test_few_labels_lie_within_more_of_the_same_seed():
    parts = [{*taken(share).tolist()} for share in (0.01, 0.1, 0.5, 20, 1000)]
    assert all(fewer <= more for fewer, more in pairwise(parts))
    assert {*taken(5).tolist()} == {*taken(5).tolist()} != {*taken(5, seed=1).tolist()}
    order = torch.randperm(73, generator=torch.Generator().manual_seed(0))
    shuffled = few_labels(torch.arange(100, 173)[order], CLASS[order], 5, 0)
    assert {*shuffled.tolist()} == {*taken(5).tolist()}


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_part_is_a_share_or_a_whole_number(share):
    with pytest.raises(RecipeError, match=r"^labels: .*share between 0 and 1 or a whole number"):
        taken(share)


def test_ranks_count_each_class_by_itself():
    ranks = rank_in_class(CLASS, 4, "x")
    for c, size in enumerate((40, 30, 3)):
        assert ranks[c == CLASS].sort().values.tolist() == [*range(size)]
    assert ranks[:40].tolist() != [*range(40)]


def test_few_labels_are_drawn_from_the_whole_split_and_must_fit(image_folder):
    where, kind = DataOptions(path=str(image_folder), modality="vision"), modality("vision")
    views = SimpleNamespace(longest=None)
    sets = open_sets(where, WatchOptions(samples=20), kind, views, 0, (0.5, 0))  # of 32
    assert len(sets.train.data) == 16
    assert len(sets.test.data) == 20
    assert sets.train.data.source.labels[sets.train.data.indices].bincount().tolist() == [8, 8]
    with pytest.raises(RecipeError, match=r"^samples: 20, but labels=0\.75 takes 24 of them; give samples=24"):
        open_sets(where, WatchOptions(samples=20), kind, views, 0, (0.75, 0))
