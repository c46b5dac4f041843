"""Loss arithmetic: pure functions of tensors, at least fp32 inside, exact over ranks."""

from mmssl.losses.prediction import Norm, average_layers, data2vec_regression, instance_norm
from mmssl.losses.statistics import token_std

__all__ = ["Norm", "average_layers", "data2vec_regression", "instance_norm", "token_std"]
