"""A linear classifier on frozen features."""

from __future__ import annotations

import warnings

from torch import Tensor


def linear_accuracy(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, c: float = 1.0) -> float:
    """Test accuracy, 0..1, of a multinomial logistic regression on features standardised by the training set.

    Args:
        train: (N, D).  labels: (N,).  test: (Q, D).  truth: (Q,).
        c: inverse strength of the L2 penalty.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 iterations are the protocol
        model.fit(train.double().cpu().numpy(), labels.cpu().numpy())
    return float(model.score(test.double().cpu().numpy(), truth.cpu().numpy()))
