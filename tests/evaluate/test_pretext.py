"""Whether features tell what was done to samples, and that ranks agree on it."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from mmssl.config import DataOptions, WatchOptions
from mmssl.evaluate.features import embed, open_sets
from mmssl.evaluate.knn import knn_accuracy
from mmssl.evaluate.linear import linear_accuracy
from mmssl.evaluate.pretext import LEAST, told
from mmssl.evaluate.probe import label_free
from mmssl.random import generator
from mmssl.registry import modalities, modality
from mmssl.types import Batch
from modalities.vision.backbone import Images
from modalities.vision.views import ImageViews
from tests.ranks import on_two_ranks


def versions(count, apart, samples=60):
    """Embeddings of the same samples in several versions, apart by as much in one direction."""
    base = torch.randn(samples, 5, generator=generator("pretext"))
    where = torch.randperm(2 * samples, generator=generator("index"))[:samples].sort().values
    shift = torch.eye(5)[0]
    return [{"embedding": base + apart * number * shift, "index": where} for number in range(count)]


def test_a_version_that_features_show_is_found_of_other_samples():
    assert told(versions(4, 20.0), 0) == 1.0
    assert told(versions(4, 0.0), 0) == 0.25  # the same features: one answer for all versions of a sample
    memory = [{"embedding": torch.randn(60, 200, generator=generator(i)), "index": torch.arange(60)} for i in range(2)]
    assert 0.2 < told(memory, 0) < 0.8  # what is learned by heart is of no use


def test_samples_that_lack_a_version_are_left_out():
    first, second = versions(2, 20.0)
    second = {name: rows[5:] for name, rows in second.items()}
    assert told([first, second], 0) == 1.0
    assert told([first, {name: rows[: LEAST - 1] for name, rows in second.items()}], 0) is None


def test_every_kind_of_data_has_an_order():
    assert all("order" in modality(name).pretexts for name in modalities())
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    vision, speech, text = (modality(name).pretexts for name in ("vision", "speech", "text"))
    image = Image.fromarray(pixels)
    for turns, change in enumerate(vision["rotation"], 1):
        assert np.array_equal(np.asarray(change(image)), np.rot90(pixels, turns))
    assert np.array_equal(np.asarray(vision["order"][0](image)), np.roll(pixels, 3, 1))
    assert speech["reversal"][0](torch.arange(5)).tolist() == [4, 3, 2, 1, 0]
    assert speech["order"][0](torch.arange(5)).tolist() == [3, 4, 0, 1, 2]
    assert text["order"][0]("one two three") == "two three one"
    assert text["order"][0](np.arange(4)).tolist() == [2, 3, 0, 1]


def pixels_through_a_matrix(batch):
    """Embeddings by a matrix that is the same everywhere."""
    (view,) = Batch.from_tensors(batch).views
    flat = view.x.flatten(1)
    return {"embedding": torch.tanh(flat @ torch.randn(flat.shape[1], 6, generator=generator("matrix")) / 9)}


def everything(rank, folder):
    """All metrics and accuracies of a set."""
    kind, watch = modality("vision"), WatchOptions(samples=30)
    sets = open_sets(DataOptions(path=folder, modality="vision", workers=0), watch, kind, ImageViews(Images(8, 3)), 0)
    bank, test = embed(sets.train, pixels_through_a_matrix), embed(sets.test, pixels_through_a_matrix)
    four = bank["embedding"], bank["label"], test["embedding"], test["label"]
    found = label_free(sets, pixels_through_a_matrix, bank, 0)
    return found | {"knn": knn_accuracy(*four, 5), "linear": linear_accuracy(*four)}


def test_two_ranks_measure_what_one_process_does(image_folder, tmp_path):
    one = everything(0, str(image_folder))
    two, other = on_two_ranks(everything, str(image_folder), folder=tmp_path)
    assert one == pytest.approx(two, abs=1e-6)
    assert two == other
    wanted = {"rankme", "lidar", "alpha_req", "uniformity", "alignment", "tolerance", "map", "nmi", "ari", "npc", "rotation"}
    assert wanted | {"invariance", "class_invariance", "order", "correlation", "redundant", "embedding_std"} <= {*one}
    assert all(math.isfinite(value) for value in one.values())
