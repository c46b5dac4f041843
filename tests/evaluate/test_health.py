"""Label-free metrics against NumPy in float64, and scikit-learn where it has them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import cosine_similarity

from mmssl.evaluate import agreement, collapse, health

CASES = json.loads((Path(__file__).parents[1] / "vectors/joint-embedding.json").read_text())["cases"]
DRAW = np.random.default_rng(0)
BASE = DRAW.standard_normal((40, 6)) @ np.diag([3.0, 2.0, 1.0, 0.5, 0.2, 0.1]) + 1.0
FIRST, SECOND = (BASE + 0.3 * DRAW.standard_normal(BASE.shape) for _ in range(2))
LABELS = DRAW.integers(-1, 4, 40)


def t(x) -> torch.Tensor:
    return torch.as_tensor(x)


def entropy(values: np.ndarray) -> float:
    shares = values / values.sum()
    return float(-(shares * np.log(shares)).sum())


def test_effective_rank_counts_directions_of_variance():
    values = np.linalg.svd(BASE - BASE.mean(0), compute_uv=False)
    assert collapse.effective_rank(t(BASE)) == pytest.approx(math.exp(entropy(values)), rel=1e-9)
    line = np.outer(np.arange(10.0), [1.0, 2.0, 3.0]) + 7
    assert collapse.effective_rank(t(line)) == pytest.approx(1, rel=1e-6)
    assert collapse.effective_rank(torch.full((10, 3), 7.0)) == 0.0
    assert collapse.rankme(torch.full((10, 3), 7.0)) == pytest.approx(1, abs=1e-4)  # which takes the offset for a direction


def test_the_spread_of_a_dimension_is_that_of_numpy():
    assert collapse.dimension_std(t(BASE)) == pytest.approx(BASE.std(0, ddof=1).mean(), rel=1e-12)


def test_lidar_is_by_hand():
    x = np.stack([FIRST, SECOND], 1)
    means = x.mean(1)
    within = sum(np.outer(v - m, v - m) for views, m in zip(x, means) for v in views) / 40 + 1e-4 * np.eye(6)
    between = np.cov(means.T)
    root = np.linalg.inv(np.linalg.cholesky(within))
    values = np.linalg.eigvalsh(root @ between @ root.T)
    assert collapse.lidar(t(x)) == pytest.approx(math.exp(entropy(values)), rel=1e-9)
    with pytest.raises(ValueError, match="lidar: 40 samples of 1 views"):
        collapse.lidar(t(x[:, :1]))


def test_channels_that_say_the_same_or_nothing():
    x = np.concatenate([BASE, BASE[:, :1] * 2 + 0.01 * BASE[:, 1:2], np.full((40, 2), 5.0)], 1)
    found = collapse.channels(t(x))
    corr = np.abs(np.corrcoef(x[:, :7].T))[~np.eye(7, dtype=bool)]
    assert found.correlation == pytest.approx(corr.mean(), rel=1e-9)
    assert found.redundant == pytest.approx((corr > 0.9).mean())
    assert found.redundant > 0
    assert found.dead == pytest.approx(2 / 9)
    assert collapse.channels(torch.full((5, 4), 3.0)) == (0.0, 0.0, 1.0)
    assert collapse.channels(torch.tensor([[1.0, 0.0], [2.0, 0.0]])) == (0.0, 0.0, 0.5)


def test_centre_and_rest():
    rows = BASE / np.linalg.norm(BASE, axis=1, keepdims=True)
    found = collapse.centre(t(BASE))
    assert found.common == pytest.approx(np.linalg.norm(rows.mean(0)), rel=1e-9)
    assert found.residual == pytest.approx(np.linalg.norm(rows - rows.mean(0), axis=1).mean(), rel=1e-9)
    assert collapse.centre(torch.ones(4, 3)) == pytest.approx((1, 0), abs=1e-6)


def test_similarities_coupling_and_penalties():
    similarity = cosine_similarity(FIRST, SECOND)
    off = np.array([np.delete(row, i) for i, row in enumerate(similarity)])
    found = agreement.scores(t(FIRST), t(SECOND))
    told = agreement.summary(found, top=3)
    assert told["positive_mean"] == pytest.approx(np.diag(similarity).mean(), rel=1e-9)
    assert told["positive_variance"] == pytest.approx(np.diag(similarity).var(), rel=1e-9)
    assert told["negative_mean"] == pytest.approx(off.mean(), rel=1e-9)
    assert told["negative_variance"] == pytest.approx(off.var(), rel=1e-9)
    assert told["negative_top1"] == pytest.approx(off.max(1).mean(), rel=1e-9)
    assert told["negative_top3"] == pytest.approx(np.sort(off, 1)[:, -3:].mean(), rel=1e-9)
    positive, negative = np.exp(np.diag(similarity) / 0.2), np.exp(off / 0.2)
    q = negative.sum(1) / (positive + negative.sum(1))
    assert agreement.coupling(found, 0.2) == pytest.approx((q.mean(), q.std() / q.mean()), rel=1e-9)
    shares = negative / negative.sum(1, keepdims=True)
    wanted = -(shares * np.log(shares)).sum(1).mean() / np.log(39)
    assert agreement.penalty_entropy(found, 0.2) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="at least 2"):
        agreement.scores(t(FIRST[:1]), t(SECOND[:1]))


def test_tolerance_and_retrieval_leave_unknown_labels_out():
    known = LABELS >= 0
    similarity, labels = cosine_similarity(BASE[known]), LABELS[known]
    same = (labels[:, None] == labels) & ~np.eye(len(labels), dtype=bool)
    assert agreement.tolerance(t(BASE), t(LABELS)) == pytest.approx(similarity[same].mean(), rel=1e-9)
    scores = [
        average_precision_score(np.delete(same[i], i), np.delete(similarity[i], i)) for i in range(len(labels)) if same[i].any()
    ]
    assert agreement.retrieval(t(BASE), t(LABELS), block=7) == pytest.approx(np.mean(scores), rel=1e-9)
    nobody = torch.arange(40)
    assert math.isnan(agreement.tolerance(t(BASE), nobody))
    assert math.isnan(agreement.retrieval(t(BASE), nobody))
    assert math.isnan(agreement.retrieval(t(BASE), torch.full((40,), -1)))


def fired(x, share):
    """(N, 2 D) bool: units above the threshold that a share of all inputs, (N, q, D), reaches; and the share of all."""
    both = np.concatenate([x, -x], 2)
    flat = np.sort(both.reshape(-1, both.shape[2]), 0)[::-1]
    seen = both >= flat[max(1, round(share * len(flat))) - 1]
    return seen, seen.mean((0, 1))


def test_invariance_is_by_hand():
    seen, overall = fired(np.stack([BASE, FIRST, SECOND], 1), 0.1)
    scores = []
    for unit in range(12):
        own = [seen[i, 1:, unit].mean() for i in range(40) if seen[i, 0, unit]]
        scores.append((np.mean(own) if own else 0.0) / overall[unit])
    wanted = np.mean(sorted(scores)[-4:])
    assert agreement.invariance(t(BASE), t(np.stack([FIRST, SECOND], 1)), 0.1, 4) == pytest.approx(wanted, rel=1e-9)
    assert wanted > 2
    random = t(DRAW.standard_normal((4000, 1, 6)))
    assert agreement.invariance(t(DRAW.standard_normal((4000, 6))), random, 0.1, 12) == pytest.approx(1, abs=0.2)
    assert agreement.invariance(t(BASE), t(BASE[:, None])) > 20


def test_invariance_to_what_differs_within_a_class_is_by_hand():
    known = LABELS >= 0
    rows, labels = BASE[known], LABELS[known]
    seen, overall = fired(rows[:, None], 0.1)
    scores = []
    for unit in range(12):
        firing = seen[:, 0, unit]
        others = [firing[(labels == labels[i]) & (np.arange(len(rows)) != i)].mean() for i in np.flatnonzero(firing)]
        scores.append(np.mean(others) / overall[unit])
    wanted = np.mean(sorted(scores)[-4:])
    assert agreement.class_invariance(t(BASE), t(LABELS), 0.1, 4) == pytest.approx(wanted, rel=1e-9)
    assert math.isnan(agreement.class_invariance(t(BASE), torch.full((40,), -1)))
    assert math.isnan(agreement.class_invariance(t(BASE), torch.arange(40)))


def test_clusters_of_apart_classes_are_the_classes():
    """Whatever the scale of a dimension; unknown labels are left out."""
    labels = torch.arange(60) % 3
    apart = torch.eye(3, dtype=torch.float64)[labels] * torch.tensor([1.0, 100.0, 0.01]) + 1e-4 * torch.randn(60, 3).double()
    assert agreement.clustering(apart, labels) == pytest.approx({"nmi": 1.0, "ari": 1.0})
    mixed = agreement.clustering(t(BASE), t(LABELS))
    assert mixed["ari"] < 0.3
    assert agreement.clustering(apart, torch.zeros(60, dtype=torch.int64)) == {}
    assert agreement.clustering(apart, labels.masked_fill(labels == 2, -1)) == pytest.approx({"nmi": 1.0, "ari": 1.0})


def test_cka_is_blind_to_rotation_and_scale_only():
    turn, _ = np.linalg.qr(DRAW.standard_normal((6, 6)))
    assert agreement.cka(t(BASE), t(3 * BASE @ turn)) == pytest.approx(1, rel=1e-9)
    x, y = BASE - BASE.mean(0), SECOND[:, :4] ** 2 - (SECOND[:, :4] ** 2).mean(0)
    k, o = x @ x.T, y @ y.T  # by kernels of samples
    wanted = (k * o).sum() / math.sqrt((k * k).sum() * (o * o).sum())
    assert agreement.cka(t(BASE), t(SECOND[:, :4] ** 2)) == pytest.approx(wanted, rel=1e-9)
    assert math.isnan(agreement.cka(t(BASE), t(np.ones((40, 2)))))
    with pytest.raises(ValueError, match="cka: 40 and 39"):
        agreement.cka(t(BASE), t(SECOND[:39]))


def test_all_of_them_are_told_by_name():
    z1, z2 = (t(np.array(CASES["ntxent"]["inputs"][name])) for name in ("z1", "z2"))
    found, views = health.of_set(z1), health.of_views(z1, z2)
    wanted = CASES["collapse_diagnostics"]["expected"]
    assert found["uniformity"] == pytest.approx(wanted["uniformity_log_mean_exp_-2d2_over_pairs_of_z1"], rel=1e-9)
    assert views["alignment"] == pytest.approx(wanted["alignment_mean_sq_distance_of_pairs"], rel=1e-9)
    assert found["rankme"] == pytest.approx(CASES["rankme"]["expected"]["Z_d"], rel=1e-9)
    assert all(math.isfinite(value) for value in (found | views).values())
    assert health.of_set(z1[:1]) == health.of_views(z1[:1], z2[:1]) == {}


@pytest.mark.parametrize(
    ("features", "shows"),
    [
        (torch.ones(64, 8) * torch.linspace(-1, 1, 8), lambda m: m["effective_rank"] == 0 and m["dead"] == 1),
        (torch.randn(64, 1) @ torch.randn(1, 8) + 3, lambda m: m["effective_rank"] < 1.1 and m["redundant"] == 1),
        (torch.randn(64, 8) * (torch.arange(8) < 4), lambda m: m["dead"] == 0.5),
        (torch.randn(64, 8), lambda m: m["effective_rank"] > 6 and m["dead"] == 0 and m["redundant"] == 0),
    ],
)
def test_planted_collapses_show(features, shows):
    """Constant output, one direction, half of the dimensions dead; and none of these."""
    assert shows(health.of_set(features))
