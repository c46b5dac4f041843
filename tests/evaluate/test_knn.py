import json
import math
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from mmssl.evaluate.knn import knn_accuracies, knn_accuracy, knn_scores

CASE = json.loads((Path(__file__).parents[1] / "vectors/joint-embedding.json").read_text())["cases"]["weighted_knn"]
BANK, QUERY = (torch.tensor(CASE["inputs"][f"{name}_to_be_L2_normalised"], dtype=torch.float64) for name in ("bank", "query"))
LABELS = torch.tensor(CASE["inputs"]["labels"])


def test_votes_are_those_of_the_vectors():
    wanted = CASE["expected"]
    for temperature in (0.07, 0.1):
        scores = torch.tensor([wanted[f"scores_T{temperature}"]], dtype=torch.float64)
        assert_close(knn_scores(BANK, LABELS, QUERY, 3, 3, temperature), scores, rtol=1e-9, atol=0)
        assert_close(knn_scores(BANK.float(), LABELS, QUERY.float(), 3, 3, temperature), scores.float(), rtol=1e-5, atol=0)
    assert knn_scores(BANK, LABELS, QUERY, 3, 3, 0.07).argmax() == wanted["prediction_T0.07"]
    assert knn_scores(BANK, LABELS, QUERY, 3, 3, 1.0).argmax() == wanted["prediction_T1.0"]


def test_votes_of_many_queries_match_a_slow_loop_whatever_the_blocks():
    draw = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(9, 4, generator=draw).double(), torch.randn(5, 4, generator=draw).double()
    labels = torch.arange(9) % 3
    wanted = torch.zeros(5, 3, dtype=torch.float64)
    for q, query in enumerate(queries):
        cosines = sorted(((float(query @ b / query.norm() / b.norm()), int(y)) for b, y in zip(bank, labels)), reverse=True)
        for cosine, label in cosines[:4]:
            wanted[q, label] += math.exp(cosine / 0.3)
    for block in (2, 100):
        assert_close(knn_scores(bank, labels, queries, 3, 4, 0.3, block), wanted, rtol=1e-9, atol=0)


def test_several_numbers_of_neighbours_at_once():
    draw = torch.Generator().manual_seed(1)
    bank, queries = torch.randn(60, 3, generator=draw), torch.randn(50, 3, generator=draw)
    labels, truth = torch.arange(60) % 4, torch.arange(50) % 4
    found = knn_accuracies(bank, labels, queries, truth, (1, 7, 60, 200, 300), 0.5)
    assert found == {k: pytest.approx(knn_accuracy(bank, labels, queries, truth, k, 0.5)) for k in (1, 7, 60)}
    assert len({*found.values()}) > 1
