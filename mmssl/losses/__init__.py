"""Loss arithmetic: pure functions of tensors, at least fp32 inside, exact over ranks."""

from mmssl.losses.clustering import cluster_cross_entropy, sinkhorn, swav
from mmssl.losses.contrastive import (
    Estimator,
    Logits,
    Stage,
    batch_contrast,
    chain,
    debiased,
    decoupled,
    hard,
    in_batch_info_nce,
    info_nce,
    instance_discrimination,
    nt_xent,
    softmax,
)
from mmssl.losses.distillation import dino, predict_others, teacher_distribution
from mmssl.losses.prediction import Norm, average_layers, cosine_regression, data2vec_regression, instance_norm
from mmssl.losses.redundancy import VICReg, barlow_twins, vicreg
from mmssl.losses.statistics import (
    AssignmentEntropy,
    alignment,
    assignment_entropy,
    dimensions,
    token_std,
    uniformity,
    unit_std,
)

__all__ = [
    "AssignmentEntropy",
    "Estimator",
    "Logits",
    "Norm",
    "Stage",
    "VICReg",
    "alignment",
    "assignment_entropy",
    "average_layers",
    "barlow_twins",
    "batch_contrast",
    "chain",
    "cluster_cross_entropy",
    "cosine_regression",
    "data2vec_regression",
    "debiased",
    "decoupled",
    "dimensions",
    "dino",
    "hard",
    "in_batch_info_nce",
    "info_nce",
    "instance_discrimination",
    "instance_norm",
    "nt_xent",
    "predict_others",
    "sinkhorn",
    "softmax",
    "swav",
    "teacher_distribution",
    "token_std",
    "uniformity",
    "unit_std",
    "vicreg",
]
