import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.testing import assert_close

from mmssl.evaluate.linear import Heads, Linear, logistic_path
from mmssl.random import permutation

N, D, C = 20, 5, 3
LABELS = torch.arange(N) % C


@pytest.fixture
def features():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=draw, dtype=torch.float64) + 0.7 * torch.nn.functional.one_hot(LABELS, D)


def trained(options: Linear, features) -> Heads:
    heads = Heads(options, N, features, C, 3)
    for epoch in range(options.epochs):
        heads.train(features, LABELS, epoch)
    return heads


def rates(options: Linear, steps: int) -> list[float]:
    """Of each update, from the definition."""
    total, found = steps * options.epochs, []
    warm = round(options.warmup * total)
    for t in range(total):
        if options.falls:
            factor = 1.0
            for share in options.falls:
                factor /= 10 if t >= share * total else 1
        elif t < warm:
            factor = t / warm
        else:
            factor = (1 + math.cos(math.pi * (t - warm) / (total - warm))) / 2
        found.append(factor * options.lr[0] * (N / steps / 256 if options.scaled else 1))
    return found


def by_hand(options: Linear, x, weight):
    """SGD, LARS or LARC on the softmax's own derivative, in the order of the keys."""
    (decay,), m = options.weight_decay, options.momentum
    steps, bias = math.ceil(N / options.batch), torch.zeros(C, dtype=torch.float64)
    tensors, buffers, means, variances = [weight, bias], [0.0, 0.0], [], []
    every = iter(rates(options, steps))
    for epoch in range(options.epochs):
        order = permutation(N, 3, "probe-order", epoch)
        for rows in order.tensor_split(steps):
            batch = x[rows]
            if options.norm:
                means.append(batch.mean(0))
                variances.append(batch.var(0))
                batch = (batch - batch.mean(0)) / (batch.var(0, correction=0) + 1e-6).sqrt()
            error = (batch @ tensors[0].T + tensors[1]).softmax(1)
            error[range(len(rows)), LABELS[rows]] -= 1
            gradients, lr = [error.T @ batch / len(rows), error.mean(0)], next(every)
            for i, (w, g) in enumerate(zip(tensors, gradients)):
                d, norm = g + decay * w, w.norm()
                if options.optimizer == "lars":
                    d = 1e-3 * norm / d.norm() * d if i == 0 else g
                elif options.optimizer == "larc":
                    d = 1e-3 * norm / (g.norm() + decay * norm + 1e-8) * d if norm > 0 else g
                buffers[i] = m * buffers[i] + d
                tensors[i] = w - lr * (d + m * buffers[i] if options.nesterov else buffers[i])
    if options.norm:
        mean, variance = torch.stack(means).mean(0), torch.stack(variances).mean(0)
        x = (x - mean) / (variance + 1e-6).sqrt()
    return *tensors, x @ tensors[0].T + tensors[1]


@pytest.mark.parametrize(
    "options",
    [
        Linear((0.5,), weight_decay=(0.03,), batch=8, epochs=4),
        Linear((9.0,), scaled=True, batch=7, epochs=4, nesterov=True),
        Linear((2.0,), batch=20, epochs=10, falls=(0.6, 0.8)),
        Linear((40.0,), weight_decay=(0.03,), batch=8, epochs=4, optimizer="lars", warmup=0.25, norm=True, init_std=0.5),
        Linear((40.0,), weight_decay=(0.03,), batch=100, epochs=5, optimizer="larc", init_std=0.5),
    ],
)
def test_training_matches_a_loop_by_hand(options, features):
    first = Heads(options, N, features, C, 3).weights[0].detach().clone()
    weight, bias, logits = by_hand(options, features, first)
    heads = trained(options, features)
    assert (weight - first).abs().max() > 0.01
    assert_close(heads.weights[0].detach(), weight, rtol=1e-9, atol=1e-12)
    assert_close(heads.biases[0].detach(), bias, rtol=1e-9, atol=1e-12)
    (accuracy,) = heads.accuracies(features, LABELS)
    assert accuracy == pytest.approx(float((logits.argmax(1) == LABELS).double().mean()))


def test_heads_side_by_side_learn_as_each_would_alone_and_one_that_diverges_counts_for_nothing(features):
    several = Linear((0.5, 1e200, 0.01), weight_decay=(0.05, 0.1), batch=8, epochs=4)
    together = trained(several, features)
    accuracies = together.accuracies(features, LABELS)
    for i, (lr, decay) in enumerate(together.settings):
        if lr == 1e200:
            assert accuracies[i] == 0
            continue
        alone = trained(Linear((lr,), weight_decay=(decay,), batch=8, epochs=4), features)
        assert_close(together.weights[i], alone.weights[0], rtol=1e-12, atol=1e-14)
        assert [accuracies[i]] == alone.accuracies(features, LABELS)
    assert together.settings == [(lr, decay) for lr in several.lr for decay in several.weight_decay]


def test_the_first_weights_have_the_spread_of_the_protocol(features):
    wide = torch.zeros(1, 4000)
    assert Heads(Linear((1.0,), init_std=0.01), 1, wide, 4).weights[0].std().item() == pytest.approx(0.01, rel=0.03)
    assert not Heads(Linear((1.0,), init_std=0.0), 1, wide, 4).weights[0].any()
    other = Heads(Linear((1.0,)), N, features, C, 4).weights[0]
    assert not torch.equal(Heads(Linear((1.0,)), N, features, C, 3).weights[0], other)


def test_logistic_regression_reaches_the_optimum_of_scikit_learn_at_every_strength(features):
    strengths = (100.0, 1.0, 0.03)
    for l2, (weight, bias) in zip(strengths, logistic_path(features, LABELS, C, strengths)):
        peer = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=10_000).fit(features.numpy(), LABELS.numpy())
        assert_close(weight, torch.from_numpy(peer.coef_), rtol=1e-4, atol=1e-5)
        own, theirs = bias, torch.from_numpy(peer.intercept_)  # a shift of all biases changes nothing
        assert_close(own - own.mean(), theirs - theirs.mean(), rtol=1e-4, atol=1e-5)
