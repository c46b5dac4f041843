"""How two views of samples, two sets of features, or samples of a class agree. All rows are those of all ranks together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmssl.losses.numerics import at_least_fp32, same_shape, unit_rows


class Scores(NamedTuple):
    """Cosine similarities of views of the same sample, and of different samples."""

    positive: Tensor  # (N,)
    negative: Tensor  # (N, N - 1), row i: those of the first view of sample i with the second view of others


@torch.no_grad()
def scores(z1: Tensor, z2: Tensor) -> Scores:
    """Similarities between two views.

    Args:
        z1, z2: (N, D); row i of both is the same sample. Normalised here.
    Raises: ValueError if the shapes differ or there is one sample only.
    """
    same_shape(z1=z1, z2=z2)
    if len(z1) < 2:
        raise ValueError("scores: 1 sample, at least 2 are needed")
    every = unit_rows(z1) @ unit_rows(z2).T
    others = ~torch.eye(len(every), dtype=torch.bool, device=every.device)
    return Scores(every.diagonal(), every[others].view(len(every), -1))


def summary(found: Scores, top: int = 10) -> dict[str, float]:
    """Mean and variance of positives and negatives, and the mean of each sample's highest, and `top` highest, negatives."""
    positive, negative = found
    hardest = negative.sort(1, descending=True).values
    return {
        "positive_mean": float(positive.mean()),
        "positive_variance": float(positive.var(correction=0)),
        "negative_mean": float(negative.mean()),
        "negative_variance": float(negative.var(correction=0)),
        "negative_top1": float(hardest[:, 0].mean()),
        f"negative_top{top}": float(hardest[:, :top].mean()),
    }


class Coupling(NamedTuple):
    """q of each sample's InfoNCE: what its gradient is multiplied by."""

    mean: float  # near 0: positives are told from negatives so easily that nothing is learned
    variation: float  # standard deviation by mean


def coupling(found: Scores, temperature: float) -> Coupling:
    """Negative-positive coupling: q = 1 - softmax of the positive among all. Source: arXiv:2110.06848."""
    logits = torch.cat([found.positive[:, None], found.negative], 1) / temperature
    q = -torch.expm1(logits.log_softmax(1)[:, 0])
    return Coupling(float(q.mean()), float(q.std(correction=0) / q.mean()))


def penalty_entropy(found: Scores, temperature: float) -> float:
    """Mean entropy, 0..1 of log(N - 1), of the shares of negatives in the gradient: near 0 if few hard ones have it all.

    Source: arXiv:2012.09740.
    """
    shares = (found.negative / temperature).softmax(1)
    most = torch.tensor(float(found.negative.shape[1])).log().clamp(min=1e-12)
    return float(torch.special.entr(shares).sum(1).mean() / most)


@torch.no_grad()
def tolerance(features: Tensor, labels: Tensor) -> float:
    """Mean cosine similarity of two different samples of one class.

    Args:
        features: (N, D), normalised here.  labels: (N,) int64, -1 = unknown, which is left out.
    Returns: NaN if no class has two samples.
    Source: arXiv:2012.09740.
    """
    known = labels >= 0
    rows, labels = unit_rows(features[known]), labels[known]
    classes = int(labels.max()) + 1 if len(labels) else 0
    sums = torch.zeros(classes, rows.shape[1], dtype=rows.dtype, device=rows.device).index_add_(0, labels, rows)
    counts = torch.bincount(labels, minlength=classes).to(rows.dtype)
    pairs = (counts * (counts - 1)).sum()
    own = rows.square().sum()  # similarities of rows with themselves
    return float((sums.square().sum() - own) / pairs)


@torch.no_grad()
def invariance(features: Tensor, views: Tensor, share: float = 0.01, best: int = 10) -> float:
    """How much more often units fire on other views of the samples that they fire on than on all, of the units of which it is
    most so; 1 by chance.

    Args:
        features: (N, D).  views: (N, q, D), views of the same samples.
        share: of all N (1 + q) inputs that a unit, a dimension or its negative, fires on.
        best: units that count.
    Source: Goodfellow et al., NeurIPS 2009, as used in arXiv:2007.13916.
    """
    fires, seen = _firing(torch.cat([features[:, None], views], 1), share)
    own = seen[:, 1:].double().mean(1)  # (N, 2 D)
    return _best((own * fires).sum(0) / fires.sum(0).clamp(min=1), seen.double().mean((0, 1)), best)


@torch.no_grad()
def class_invariance(features: Tensor, labels: Tensor, share: float = 0.01, best: int = 10) -> float:
    """The same with the other samples of a class in place of views. NaN if no class has two samples.

    Args:
        features: (N, D).  labels: (N,) int64, -1 = unknown, which is left out.
    """
    sizes = labels[labels >= 0].bincount()
    known = (labels >= 0) & (sizes[labels.clamp(min=0)] > 1) if len(sizes) else labels >= 0
    if not bool(known.any()):
        return float("nan")
    rows, classes = features[known], labels[known]
    fires, _ = _firing(rows[:, None], share)
    of_class = torch.zeros(len(sizes), fires.shape[1], dtype=fires.dtype, device=fires.device).index_add_(0, classes, fires)
    others = (of_class[classes] - fires) / (sizes[classes] - 1)[:, None]  # (N, 2 D)
    return _best((others * fires).sum(0) / fires.sum(0), fires.mean(0), best)


def _firing(inputs: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(N, 2 D) float64 and (N, q, 2 D) bool, of (N, q, D): whether units fire on the first of each sample, and on all."""
    both = torch.cat([inputs, -inputs], 2)
    flat = both.flatten(0, 1)
    seen = both >= flat.topk(max(1, round(share * len(flat))), 0).values[-1]
    return seen[:, 0].double(), seen


def _best(local: Tensor, overall: Tensor, best: int) -> float:
    return float((local / overall).topk(min(best, len(local))).values.mean())


@torch.no_grad()
def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features, 0..1; 1 if one is the other turned and scaled.

    Args:
        x: (N, D), y: (N, E); row i of both is the same sample.
    Returns: NaN if one of them does not vary.
    Source: arXiv:1905.00414.
    """
    if len(x) != len(y):
        raise ValueError(f"cka: {len(x)} and {len(y)} samples, they must be the same")
    x, y = (at_least_fp32(one) - at_least_fp32(one).mean(0) for one in (x, y))
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def clustering(features: Tensor, labels: Tensor, seed: int = 0) -> dict[str, float]:
    """How far clusters found by k-means in standardised features, as many as there are classes, are the classes.

    Args:
        features: (N, D).  labels: (N,) int64, -1 = unknown, which is left out.
    Returns: `nmi`, normalised mutual information 0..1, and `ari`, adjusted Rand index, 0 by chance and 1 if they are the same;
        {} if there are fewer than two classes.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    known = labels >= 0
    rows, truth = at_least_fp32(features[known]), labels[known].numpy()
    if len(classes := set(truth.tolist())) < 2:
        return {}
    rows = (rows - rows.mean(0)) / rows.std(0).clamp(min=1e-6)
    make: Any = KMeans  # whose types know one of the values of n_init
    found = make(len(classes), n_init=4, random_state=seed).fit_predict(rows.double().numpy())
    return {
        "nmi": float(normalized_mutual_info_score(truth, found)),
        "ari": float(adjusted_rand_score(truth, found)),
    }


@torch.no_grad()
def retrieval(features: Tensor, labels: Tensor, block: int = 1024) -> float:
    """Mean average precision of finding samples of the same class by cosine similarity, each sample asked once.

    Args:
        features: (N, D), normalised here.  labels: (N,) int64, -1 = unknown, which is left out.
    Returns: mean over samples whose class has another one; NaN if there is none.
    """
    known = labels >= 0
    rows, labels = unit_rows(features[known]), labels[known]
    found = []
    for start in range(0, len(rows), block):
        part = torch.arange(start, min(start + block, len(rows)), device=rows.device)
        similarity = rows[part] @ rows.T
        similarity[torch.arange(len(part)), part] = -torch.inf  # itself, last
        order = similarity.argsort(dim=1, descending=True, stable=True)[:, :-1]
        right = (labels[order] == labels[part][:, None]).to(torch.float64)
        precision = right.cumsum(1) / torch.arange(1, order.shape[1] + 1, device=rows.device)
        wanted = right.sum(1)
        found.append(((precision * right).sum(1) / wanted)[wanted > 0])
    return float(torch.cat(found).mean()) if found else float("nan")
