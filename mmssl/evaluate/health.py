"""Label-free metrics of embeddings, by the names under which runs and probes tell them.

Embeddings are those of all ranks together, the same on each, so that nothing is exchanged here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmssl.evaluate import agreement, collapse
from mmssl.losses.numerics import at_least_fp32, unit_rows
from mmssl.losses.statistics import log_potential, participation

OF_SET = (
    *("rankme", "effective_rank", "alpha_req", "embedding_std"),
    *("correlation", "redundant", "dead", "common", "residual", "uniformity"),
)
PAIRS = 4096  # samples of which all pairs are compared
LEAST = 4  # outputs that say something of how outputs differ
ALIKE = 1e-6  # output_std of rounding errors
OUTPUTS = ("output_std", "output_dimensions", "output_dead")


def of_set(features: Tensor) -> dict[str, float]:
    """What one embedding of each sample shows; empty if there are fewer than two.

    Args:
        features: (N, D).
    Returns: rankme, effective_rank, alpha_req, embedding_std, correlation, redundant, dead, common, residual (see
        `collapse`), and the uniformity of the first 4 096.
    """
    if len(features) < 2:
        return {}
    found = {
        "rankme": collapse.rankme(features),
        "effective_rank": collapse.effective_rank(features),
        "alpha_req": collapse.alpha_req(features),
        "embedding_std": collapse.dimension_std(features),
        **collapse.channels(features)._asdict(),
        **collapse.centre(features)._asdict(),
        "uniformity": float(log_potential(unit_rows(features[:PAIRS]), 2.0)),
    }
    return _defined(found)


def of_outputs(features: Tensor) -> dict[str, float]:
    """What the pooled outputs of an update show, at the price of a matrix product; empty if there are fewer than four.

    Args:
        features: (B, D) of this rank.
    Returns: output_std, their distance from the mean of all as a share of their length, roots of mean squares (0 if all are
        alike, 1 if they have nothing in common); output_dimensions, the participation ratio of their covariance;
        output_dead, the share of dimensions that hardly differ. The last two are left out where all are alike.
    """
    if len(features) < LEAST:
        return {}
    rows = at_least_fp32(features)
    spread = float((rows - rows.mean(0)).norm() / rows.norm().clamp(min=torch.finfo(rows.dtype).tiny))
    if not spread > ALIKE:
        return {"output_std": spread}
    return {"output_std": spread, "output_dimensions": float(participation(rows)), "output_dead": collapse.channels(rows).dead}


def of_views(first: Tensor, second: Tensor, temperature: float = 0.1, plain: Tensor | None = None) -> dict[str, float]:
    """What two random views of each sample show; empty if there are fewer than two samples, or the views are not random.

    Args:
        first, second: (N, D), row i of both is the same sample; of pairs, the first 4 096 are compared.
        temperature: at which the contrast of views is judged.
        plain: (N, D), the same samples as they are, for invariance.
    Returns: alignment (mean squared distance), lidar, npc and npc_variation, penalty_entropy, invariance, and means and
        variances of similarities, see `agreement`.
    """
    if len(first) < 2 or torch.equal(first, second):
        return {}
    found = agreement.scores(first[:PAIRS], second[:PAIRS])
    npc = agreement.coupling(found, temperature)
    return _defined(
        {
            "alignment": float((unit_rows(first) - unit_rows(second)).square().sum(1).mean()),
            "lidar": collapse.lidar(torch.stack([first, second], 1)),
            "npc": npc.mean,
            "npc_variation": npc.variation,
            "penalty_entropy": agreement.penalty_entropy(found, temperature),
            **agreement.summary(found),
            **({} if plain is None else {"invariance": agreement.invariance(plain, torch.stack([first, second], 1))}),
        }
    )


def of_classes(features: Tensor, labels: Tensor, seed: int = 0) -> dict[str, float]:
    """What labels show: tolerance, map (mean average precision of retrieval), class_invariance, nmi and ari of k-means.

    Args:
        features: (N, D).  labels: (N,) int64, -1 = unknown.
    """
    return _defined(
        {
            "tolerance": agreement.tolerance(features, labels),
            "map": agreement.retrieval(features, labels),
            "class_invariance": agreement.class_invariance(features, labels),
            **agreement.clustering(features, labels, seed),
        }
    )


def _defined(found: dict[str, float]) -> dict[str, float]:
    """Without what these samples leave undefined, such as the slope of one eigenvalue: a log has no NaN."""
    return {name: value for name, value in found.items() if math.isfinite(value)}
