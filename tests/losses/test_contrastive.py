import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from mmssl.losses import (
    batch_contrast,
    chain,
    contrastive,
    debiased,
    decoupled,
    hard,
    in_batch_info_nce,
    info_nce,
    instance_discrimination,
    nt_xent,
    softmax,
)
from tests.losses.cases import drawn, expected, gradients, inputs, tensor

EXACT = {"rtol": 1e-9, "atol": 0}
ROUNDED = {"rtol": 0, "atol": 2e-8}  # gradients in the file have 8 or 9 decimals


def plain(z1, z2, temperature=0.5):
    """NT-Xent as it is usually written, with the whole matrix."""
    z = F.normalize(torch.cat((z1, z2)), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z)).roll(len(z1)))


# NT-Xent


@pytest.mark.parametrize("temperature", [0.1, 0.2, 0.5])
def test_nt_xent_has_the_reference_values(temperature):
    found = nt_xent(*inputs("ntxent", "z1", "z2"), temperature)
    assert_close(found.item(), expected("ntxent")[f"tau={temperature}"]["mean_over_2N"], **EXACT)


def test_nt_xent_matches_a_slow_loop():
    z1, z2, temperature = F.normalize(drawn(3, 4), dim=1), F.normalize(drawn(3, 4, seed=1), dim=1), 0.5
    z, total = [*z1, *z2], 0.0
    for i in range(6):
        others = sum(math.exp(z[i] @ z[k] / temperature) for k in range(6) if k != i)
        total -= math.log(math.exp(z[i] @ z[(i + 3) % 6] / temperature) / others)
    assert_close(nt_xent(z1, z2, temperature).item(), total / 6, **EXACT)


def test_nt_xent_has_the_reference_gradient_which_is_orthogonal_to_each_row():
    z1, z2 = inputs("ntxent", "z1", "z2")
    found = gradients(nt_xent(z1, z2, 0.5), z1, z2)
    wanted = expected("ntxent")["grad_of_mean_wrt_z_tau=0.5"]
    for z, gradient, name in zip((z1, z2), found, ("dz1", "dz2")):
        assert_close(gradient, tensor(wanted[name]), **ROUNDED)
        assert (z * gradient).sum(1).abs().max() < 1e-12


def test_nt_xent_depends_neither_on_order_nor_on_length():
    z1, z2 = drawn(5, 4), drawn(5, 4, seed=1)
    wanted, order, length = nt_xent(z1, z2), torch.tensor([3, 1, 4, 0, 2]), tensor([[0.1], [2], [3], [1], [50]])
    for other in (nt_xent(z2, z1), nt_xent(z1[order], z2[order]), nt_xent(z1 * length, z2)):
        assert_close(other, wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_alike_embeddings_have_the_loss_of_guessing(temperature):
    z = torch.ones(4, 3, dtype=torch.float64)
    assert_close(nt_xent(z, z, temperature).item(), math.log(7), **EXACT)
    assert_close(in_batch_info_nce(z, z, temperature).item(), math.log(4), **EXACT)
    many = torch.ones(256, 1, dtype=torch.float64)
    assert_close(nt_xent(many, many, temperature).item(), expected("collapse_loss_levels")["ntxent_N=256"], **EXACT)


def test_nt_xent_by_cached_gradients_is_that_of_the_whole_batch():
    case = expected("micro_batching")
    x1, x2 = inputs("micro_batching", "z1", "z2")
    theta = torch.eye(3, dtype=torch.float64, requires_grad=True)
    halves = [nt_xent(x1[rows], x2[rows]) for rows in (slice(2), slice(2, 4))]
    assert_close((sum(halves) / 2).item(), case["mean_of_two_half_batches"], **EXACT)
    z1, z2 = ((x @ theta).detach().requires_grad_() for x in (x1, x2))
    cached, total = gradients(nt_xent(z1, z2), z1, z2), 0.0
    for rows in (slice(2), slice(2, 4)):
        total += sum((x[rows] @ theta * g[rows]).sum() for x, g in zip((x1, x2), cached))
    assert_close(gradients(total, theta)[0], tensor(case["dTheta_by_cached_gradient_z_equals_x_Theta_Theta_I"]), **ROUNDED)


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for one in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return made


def largest(loss):
    z1, z2 = drawn(64, 8).requires_grad_(), drawn(64, 8, seed=1).requires_grad_()
    with Largest() as seen:
        loss(z1, z2).backward()
    return seen.elements, z1.grad, z2.grad


@pytest.mark.parametrize("rows", [8, 7])
def test_no_matrix_of_all_with_all_is_made_and_blocks_change_nothing(rows, monkeypatch):
    monkeypatch.setattr(contrastive, "BLOCK", rows * 128)
    elements, *found = largest(nt_xent)
    whole, *wanted = largest(plain)
    assert elements <= 8 * 128  # at most the 2N projections or a block, below 64 x 64
    assert whole == 128 * 128  # so the measurement sees matrices
    assert_close(found, wanted, rtol=1e-11, atol=1e-16)
    assert_close(nt_xent(drawn(64, 8), drawn(64, 8, seed=1)), plain(drawn(64, 8), drawn(64, 8, seed=1)), **EXACT)


@pytest.mark.parametrize("estimator", [softmax, decoupled, hard(1.0, 0.1)])
def test_blocks_change_nothing_for_any_estimator_and_mask(estimator, monkeypatch):
    query, positive, queue = (drawn(n, 4, seed=n).requires_grad_() for n in (6, 6, 9))
    positive = drawn(6, 4, seed=2)  # a constant, as the teacher's keys
    left_out = torch.rand(6, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    whole = info_nce(query, positive, queue, 0.2, left_out, estimator)
    wanted = gradients(whole, query, queue)
    monkeypatch.setattr(contrastive, "BLOCK", 18)
    blocks = info_nce(query, positive, queue, 0.2, left_out, estimator)
    assert_close(blocks, whole, **EXACT)
    assert_close(gradients(3 * blocks, query, queue), tuple(3 * g for g in wanted), rtol=1e-10, atol=1e-15)
    with torch.no_grad():
        assert_close(info_nce(query, positive, queue, 0.2, left_out, estimator), whole, **EXACT)


# InfoNCE with a queue, with the batch, with a memory


@pytest.mark.parametrize("temperature", [0.07, 0.1, 0.2])
def test_info_nce_has_the_reference_values_of_moco(temperature):
    q, k, queue = inputs("moco_queue", "q", "k", "queue_rows")
    loss = info_nce(q, k, queue, temperature)
    assert_close(loss.item(), expected("moco_queue")[f"tau={temperature}"]["mean"], **EXACT)
    if temperature == 0.2:
        assert_close(gradients(loss, q)[0], tensor(expected("moco_queue")["grad_wrt_q_tau=0.2"]), **ROUNDED)


@pytest.mark.parametrize("size", [4096, 65536])
def test_info_nce_of_equal_similarities_is_the_logarithm_of_their_number(size):
    one = torch.ones(1, 2, dtype=torch.float64)
    found = info_nce(one, one, one.expand(size, 2), 0.07).item()
    assert_close(found, expected("moco_queue")[f"all_similarities_equal_K={size}"], **EXACT)


def test_what_is_left_out_of_the_queue_counts_as_if_it_were_not_there():
    q, k, queue = drawn(2, 3), drawn(2, 3, seed=1), drawn(5, 3, seed=2)
    mask = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 1, 1]]).bool()
    rows = [info_nce(q[i : i + 1], k[i : i + 1], queue[~mask[i]], 0.2) for i in range(2)]
    assert_close(info_nce(q, k, queue, 0.2, mask), torch.stack(rows).mean(), **EXACT)
    assert_close(info_nce(q, k, queue, 0.2, torch.tensor([[1, 4], [3, 4]])), torch.stack(rows).mean(), **EXACT)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_batch_contrast_has_the_reference_values_of_moco_v3(temperature):
    q1, q2, k1, k2 = inputs("moco_v3", "q1", "q2", "k1", "k2")
    wanted = expected("moco_v3")[f"tau={temperature}"]
    assert_close(in_batch_info_nce(q1, k2, temperature).item(), wanted["ce_q1_k2"], **EXACT)
    assert_close(in_batch_info_nce(q2, k1, temperature).item(), wanted["ce_q2_k1"], **EXACT)
    both = batch_contrast(q1, k2, temperature) + batch_contrast(q2, k1, temperature)
    assert_close(both.item(), wanted["loss_2tau_times_sum"], **EXACT)


def test_in_batch_info_nce_reaches_keys_that_carry_a_gradient():
    query, keys = drawn(4, 3).requires_grad_(), drawn(4, 3, seed=1).requires_grad_()
    logits = F.normalize(query, dim=1) @ F.normalize(keys, dim=1).T / 0.3
    wanted = gradients(F.cross_entropy(logits, torch.arange(4)), query, keys)
    assert_close(gradients(in_batch_info_nce(query, keys, 0.3), query, keys), wanted, rtol=1e-10, atol=1e-15)


def test_instance_discrimination_is_a_softmax_over_all_slots():
    z, memory, index = drawn(3, 4), drawn(7, 4, seed=1), torch.tensor([5, 0, 2])
    logits = F.normalize(z, dim=1) @ F.normalize(memory, dim=1).T / 0.07
    assert_close(instance_discrimination(z, memory, index), F.cross_entropy(logits, index), **EXACT)


# How negatives enter


def loop(z1, z2, temperature, row):
    """Mean over anchors of `row(positive, negatives)`, exponentials of similarities over temperature."""
    z, count, total = [*F.normalize(z1, dim=1), *F.normalize(z2, dim=1)], len(z1), 0.0
    for i in range(2 * count):
        e = [math.exp(float(z[i] @ z[k]) / temperature) for k in range(2 * count)]
        total += row(e[(i + count) % (2 * count)], [e[k] for k in range(2 * count) if k % count != i % count])
    return total / (2 * count)


def test_decoupled_leaves_the_positive_out_of_the_sum():
    z1, z2 = drawn(3, 4), drawn(3, 4, seed=1)
    wanted = loop(z1, z2, 0.1, lambda p, n: math.log(sum(n) / p))
    assert_close(nt_xent(z1, z2, 0.1, decoupled).item(), wanted, **EXACT)


def test_the_gradient_of_decoupled_is_that_of_info_nce_over_what_the_positive_lacks_to_certainty():
    query, positive, queue = drawn(1, 4).requires_grad_(), drawn(1, 4, seed=1), drawn(5, 4, seed=2)
    loss = info_nce(query, positive, queue, 0.5)
    (wanted,) = gradients(loss, query)
    (found,) = gradients(info_nce(query, positive, queue, 0.5, estimator=decoupled), query)
    assert_close(found, wanted / (1 - (-loss.detach()).exp()), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("beta", "prior", "clamps"), [(1.0, 0.1, False), (0.0, 0.1, True), (2.0, 0.0, False), (0.5, 0.7, True)]
)
def test_hard_negatives_match_a_slow_loop(beta, prior, clamps):
    z1, z2, temperature, clamped = drawn(4, 3), drawn(4, 3, seed=1), 0.5, []

    def row(p, n):
        weights = [e**beta for e in n]
        pushed = sum(w * e for w, e in zip(weights, n)) / (sum(weights) / len(n))
        pushed, least = (pushed - prior * len(n) * p) / (1 - prior), len(n) * math.exp(-1 / temperature)
        clamped.append(pushed < least)
        return -math.log(p / (p + max(pushed, least)))

    wanted = loop(z1, z2, temperature, row)
    assert any(clamped) == clamps
    assert_close(nt_xent(z1, z2, temperature, hard(beta, prior)).item(), wanted, **EXACT)
    if beta == 0:
        assert_close(nt_xent(z1, z2, temperature, debiased(prior)).item(), wanted, **EXACT)


def test_without_weights_and_prior_hard_is_info_nce_at_any_temperature():
    for temperature, dtype in ((0.5, torch.float64), (0.01, torch.float64), (0.005, torch.float32)):
        z1, z2 = (drawn(6, 3, seed=i).to(dtype).requires_grad_() for i in range(2))
        first, second = nt_xent(z1, z2, temperature, hard(0.0, 0.0)), nt_xent(z1, z2, temperature)
        tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-4}
        assert_close(first, second, **tolerance)
        assert_close(gradients(first, z1, z2), gradients(second, z1, z2), **tolerance)


def test_detached_weights_change_the_gradient_only():
    z1, z2 = drawn(4, 3).requires_grad_(), drawn(4, 3, seed=1).requires_grad_()
    first, second = nt_xent(z1, z2, 0.5, hard()), nt_xent(z1, z2, 0.5, hard(detach=True))
    assert first == second
    assert (gradients(first, z1)[0] - gradients(second, z1)[0]).abs().max() > 1e-3


def ring(outer, inner):
    """A selector: the nearest `outer` negatives without the nearest `inner`."""

    def select(logits):
        order = logits.far.argsort(1, descending=True)
        return logits._replace(far=logits.far.scatter(1, torch.cat((order[:, :inner], order[:, outer:]), 1), -torch.inf))

    return select


def halfway(logits):
    """A mixer: one more negative, between the two nearest."""
    nearest = logits.negatives[logits.far.topk(2).indices]
    extra = (logits.query * F.normalize(nearest.mean(1), dim=1).detach()).sum(1, keepdim=True) / logits.temperature
    return logits._replace(far=torch.cat((logits.far, extra), 1))


def shifted(eps, estimator=softmax):
    """IFM: an estimator from another one."""

    def estimate(logits):
        step = eps / logits.temperature
        return (estimator(logits) + estimator(logits._replace(near=logits.near - step, far=logits.far + step))) / 2

    return estimate


def test_selectors_mixers_and_estimators_are_chained():
    q, k, queue = (F.normalize(drawn(n, 4, seed=n), dim=1) for n in (2, 2, 8))
    q, total = F.normalize(drawn(2, 4, seed=9), dim=1), 0.0
    for i in range(2):
        near, far = float(q[i] @ k[i]), sorted((float(q[i] @ n) for n in queue), reverse=True)
        order = sorted(range(8), key=lambda j: -float(q[i] @ queue[j]))
        kept = [*far[1:5], float(q[i] @ F.normalize(queue[order[1]] + queue[order[2]], dim=0))]
        for eps in (0.0, 0.1):
            p = math.exp((near - eps) / 0.2)
            total += -math.log(p / (p + sum(math.exp((n + eps) / 0.2) for n in kept))) / 4
    found = info_nce(q, k, queue, 0.2, estimator=chain(ring(5, 1), halfway, estimator=shifted(0.1)))
    assert_close(found.item(), total, **EXACT)
    same = info_nce(q, k, queue, 0.2, estimator=chain(ring(8, 0), estimator=shifted(0.0)))
    assert_close(same, info_nce(q, k, queue, 0.2), **EXACT)


# Precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions_are_computed_in_fp32_also_under_autocast(dtype):
    z1, z2, queue = (drawn(32, 16, seed=i).to(dtype) for i in range(3))
    for loss in (
        lambda a, b, c: nt_xent(a, b, 0.1),
        lambda a, b, c: info_nce(a, b, c, 0.1),
        lambda a, b, c: batch_contrast(a, b, 0.1),
    ):
        wanted = loss(*(z.double() for z in (z1, z2, queue)))
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(z1, z2, queue)
        assert found.dtype == torch.float32
        assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_a_small_loss_keeps_its_digits_in_fp32():
    query, positive, negative = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.1]]), torch.tensor([[-1.0, 0.3]])
    wanted = info_nce(query.double(), positive.double(), negative.double(), 0.1)
    assert wanted < 1e-8  # log(1 + e^x) - x has no digit of it left
    assert_close(info_nce(query, positive, negative, 0.1).double(), wanted, rtol=1e-4, atol=0)


def test_a_row_of_zeros_gets_no_gradient_and_spoils_no_other():
    z1, z2 = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.ones(4, 3)
    z1[2] = 0
    z1.requires_grad_()
    (gradient,) = gradients(nt_xent(z1, z2), z1)
    assert gradient[2].tolist() == [0, 0, 0]
    assert gradient.isfinite().all()
    assert (gradient[[0, 1, 3]] != 0).all()


# Bad input


def test_bad_input_is_refused():
    z = drawn(4, 3)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"^temperature: .*, must be above 0"):
            nt_xent(z, z, temperature)
    with pytest.raises(ValueError, match=r"^z1 \(4, 3\), z2 \(3, 3\): must have one shape"):
        nt_xent(z, z[:3])
    with pytest.raises(ValueError, match="must have one shape"):
        info_nce(z, z[:3], z, 0.2)
    with pytest.raises(ValueError, match="must have one shape"):
        in_batch_info_nce(z, z[:3], 0.2)
    for loss in (nt_xent, in_batch_info_nce):
        with pytest.raises(ValueError, match=r"^train\.global_batch: 1, .* at least 2"):
            loss(z[:1], z[:1], 0.2)
    with pytest.raises(ValueError, match=r"^prior: 1\.0, "):
        hard(prior=1.0)
    with pytest.raises(ValueError, match=r"^beta: -1, "):
        hard(beta=-1)
