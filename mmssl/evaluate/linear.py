"""Linear classifiers on frozen features."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from mmssl.lars import Lars
from mmssl.random import generator, permutation
from mmssl.schedules import cosine
from mmssl.types import Clock


@dataclass(frozen=True)
class Linear:
    """How a paper trains its classifier.

    Several rates or weight decays train a classifier for each pair; the best on held-out training data is reported, with all.
    """

    lr: tuple[float, ...]
    scaled: bool = False  # lr is for 256 samples at once and grows with the batch
    weight_decay: tuple[float, ...] = (0.0,)
    batch: int = 256
    epochs: int = 100
    optimizer: Literal["sgd", "lars", "larc"] = "sgd"  # LARS leaves the bias out, LARC does not
    momentum: float = 0.9
    nesterov: bool = False
    falls: tuple[float, ...] = ()  # shares of the run after which the rate falls to a tenth; none = by half a cosine
    warmup: float = 0.0  # share of the run
    init_std: float = 0.01
    norm: bool = False  # BatchNorm without scale and shift before the classifier
    cls_layers: int = 0  # features are the cls tokens of so many last layers; 0 = as the model pools
    augment: bool = True  # a new random view of every training sample in each epoch


@dataclass(frozen=True)
class Logistic:
    """Multinomial logistic regression to the optimum, l2 chosen on held-out training data."""

    l2: tuple[float, ...]


class Heads:
    """The classifiers of a protocol, one for each pair of rate and weight decay, side by side on the same features.

    Departs from the papers: the rate changes with each update, where some change it with each epoch; and an epoch is cut into
    equal batches of at most `batch`, so that none is left over.

    Args:
        samples: of an epoch, as a rule.
        like: (N, D) features; gives D, dtype and device.
        seed: of the first weights, which all classifiers share, and of the order of samples.
    """

    def __init__(
        self,
        options: Linear,
        samples: int,
        like: Tensor,
        classes: int,
        seed: int = 0,
    ):
        self.options, self.seed, self.updates = options, seed, 0
        self.steps = -(-samples // options.batch)  # of an epoch
        self.settings = [(lr, decay) for lr in options.lr for decay in options.weight_decay]
        dim = like.shape[1]
        first = torch.randn(classes, dim, generator=generator(seed, "probe-head"), dtype=torch.float64) * options.init_std
        self.weights = [first.to(like, copy=True).requires_grad_() for _ in self.settings]  # each (C, D)
        self.biases = [like.new_zeros(classes).requires_grad_() for _ in self.settings]
        # Averages over all batches rather than the latest: of frozen features the statistics do not drift.
        self.norm = nn.BatchNorm1d(dim, 1e-6, momentum=None, affine=False).to(like) if options.norm else nn.Identity()
        scale = samples / self.steps / 256 if options.scaled else 1.0
        groups: list[dict[str, Any]] = []
        for weight, bias, (lr, decay) in zip(self.weights, self.biases, self.settings):
            rates = {"lr": scale * lr, "peak": scale * lr, "weight_decay": decay}
            groups += [{"params": weight, **rates}, {"params": bias, **rates, "adapt": options.optimizer != "lars"}]
        if options.optimizer == "sgd":
            self.optimizer: Optimizer = SGD(groups, momentum=options.momentum, nesterov=options.nesterov)
        else:
            variant = "outside" if options.optimizer == "lars" else "larc"
            self.optimizer = Lars(groups, lr=scale * options.lr[0], momentum=options.momentum, variant=variant)

    def train(self, features: Tensor, labels: Tensor, epoch: int) -> None:
        """One pass over (N, D) features with (N,) labels."""
        self.norm.train()
        order = permutation(len(features), self.seed, "probe-order", epoch).to(features.device)
        for rows in order.tensor_split(self.steps):
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak"] * self.rate(self.updates)
            logits = self._logits(features[rows]).transpose(1, 2)  # (B, C, heads)
            loss = F.cross_entropy(logits, labels[rows, None].expand(-1, len(self.settings)), reduction="sum") / len(rows)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.updates += 1

    def rate(self, update: int) -> float:
        """Share of the peak."""
        options, whole = self.options, self.steps * self.options.epochs
        if options.falls:
            return 0.1 ** sum(update >= share * whole for share in options.falls)
        return cosine(1.0, 0.0, warmup=round(options.warmup * whole))(Clock(update, whole))

    @torch.no_grad()
    def accuracies(self, features: Tensor, labels: Tensor) -> list[float]:
        """Of each classifier, 0..1; 0 of one whose weights are no longer finite."""
        return self.right(features, labels).double().mean(0).tolist()

    @torch.no_grad()
    def right(self, features: Tensor, labels: Tensor) -> Tensor:
        """(N, heads) bool: which classifier is right about which sample; one whose weights are no longer finite never is."""
        self.norm.eval()
        parts = zip(features.split(1024), labels.split(1024))
        right = torch.cat([self._logits(x).argmax(2) == y[:, None] for x, y in parts])
        return right & torch.stack([weight.isfinite().all() for weight in self.weights])

    def _logits(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, heads, C)."""
        return F.linear(self.norm(x), torch.cat(self.weights), torch.cat(self.biases)).unflatten(1, (len(self.settings), -1))


def logistic_path(
    features: Tensor, labels: Tensor, classes: int, l2: tuple[float, ...], steps: int = 500
) -> list[tuple[Tensor, Tensor]]:
    """Weights (C, D) and bias (C,) that minimise the sum of cross entropies + l2/2 |weights|^2, for each l2, in float64.

    Args:
        features: (N, D).  labels: (N,).
        l2: strengths from the strongest to the weakest: each begins where the one before ended. 1/C of scikit-learn.
        steps: of L-BFGS at most.
    """
    x = features.double()
    weight, bias = x.new_zeros(classes, x.shape[1]).requires_grad_(), x.new_zeros(classes).requires_grad_()
    found = []
    for strength in l2:
        solver = torch.optim.LBFGS(
            [weight, bias], max_iter=steps, tolerance_grad=1e-7, tolerance_change=1e-11, line_search_fn="strong_wolfe"
        )

        def loss(strength: float = strength, solver: Optimizer = solver) -> Tensor:
            solver.zero_grad()
            value = F.cross_entropy(F.linear(x, weight, bias), labels) + strength / (2 * len(x)) * weight.square().sum()
            value.backward()
            return value

        solver.step(loss)
        found.append((weight.detach().clone(), bias.detach().clone()))
    return found


def linear_accuracy(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, c: float = 1.0) -> float:
    """Test accuracy, 0..1, of the classifier of `linear_right`."""
    return float(linear_right(train, labels, test, truth, c).double().mean())


def linear_right(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, c: float = 1.0) -> Tensor:
    """(Q,) bool: whether a multinomial logistic regression on features standardised by the training set finds each class.

    Args:
        train: (N, D).  labels: (N,), of two classes at least.  test: (Q, D).  truth: (Q,).
        c: inverse strength of the L2 penalty.
    """
    return torch.from_numpy(logistic(train, labels, c).predict(test.double().cpu().numpy())) == truth.cpu()


def logistic(train: Tensor, labels: Tensor, c: float = 1.0) -> Any:
    """Multinomial logistic regression on features standardised by themselves, as scikit-learn has it. Arguments as above."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 300 iterations are the protocol
        return model.fit(train.double().cpu().numpy(), labels.cpu().numpy())
