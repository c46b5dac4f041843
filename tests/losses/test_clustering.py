import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.losses import cluster_cross_entropy, predict_others, self_training, sharpened, sinkhorn, student_t, swav
from tests.losses.cases import CASES, MASKED, drawn, expected, gradients, inputs, tensor

EXACT = {"rtol": 1e-9, "atol": 0}
SCORES = ("scores_view0", "scores_view1", "scores_small_view2")


# Codes


def test_codes_have_the_reference_values():
    wanted = expected("swav_sinkhorn")
    first, second = inputs("swav_sinkhorn", *SCORES[:2])
    codes = sinkhorn(first)
    assert_close(codes, tensor(wanted["Q_view0"]), **EXACT)
    assert_close(sinkhorn(second), tensor(wanted["Q_view1"]), **EXACT)
    assert_close(sinkhorn(first, iterations=1), tensor(wanted["Q_view0_after_1_iter"]), **EXACT)
    assert_close(sinkhorn(first, iterations=1000), tensor(wanted["Q_view0_after_1000_iters"]), **EXACT)
    assert_close(codes.sum(1), tensor([1.0] * 4), rtol=1e-12, atol=0)
    assert_close(codes.sum(0), tensor(wanted["Q_view0_prototype_mass"]), **EXACT)
    assert_close(sinkhorn(first, iterations=1000).sum(0), tensor([4 / 3] * 3), **EXACT)
    assert not codes.requires_grad


def test_codes_with_a_queue_before_the_batch_have_the_reference_values():
    names = [f"{n}_to_be_L2_normalised" for n in ("prototypes_rows", "queue_embeddings", "batch_embeddings")]
    prototypes, queue, batch = (F.normalize(x, dim=1) for x in inputs("swav_queue", *names))
    wanted = expected("swav_queue")
    found = sinkhorn(torch.cat((queue, batch)) @ prototypes.T)[len(queue) :]
    assert_close(found, tensor(wanted["Q_batch_with_queue"]), **EXACT)
    assert_close(sinkhorn(batch @ prototypes.T), tensor(wanted["Q_batch_without_queue"]), **EXACT)


def test_codes_know_no_shift_of_all_scores_but_one_of_each_sample():
    (scores,) = inputs("swav_sinkhorn", SCORES[0])
    codes, case = sinkhorn(scores), expected("swav_sinkhorn")
    assert_close(sinkhorn(scores + 1e3), codes, rtol=1e-9, atol=0)
    each = sinkhorn(scores - scores.amax(1, keepdim=True))
    assert_close(each, tensor(case["Q_view0_3_iters_if_each_sample_is_shifted_by_its_own_max"]), **EXACT)
    assert_close((each - codes).abs().max().item(), case["max_abs_error_of_per_sample_shift"], **EXACT)


@pytest.mark.parametrize("eps", [0.05, 0.01, 0.001])
def test_fp32_has_the_codes_of_double_where_exponentials_overflow_and_underflow(eps):
    scores = F.normalize(drawn(32, 8), dim=1) @ F.normalize(drawn(8, 12, seed=1), dim=0)
    scores[0], scores[:, 0] = -1.0, -1.0  # a sample and a prototype far from all: exp(-2 / eps) is 0
    found = sinkhorn(scores.float(), eps)
    assert_close(found.double(), sinkhorn(scores, eps), rtol=0, atol=1e-4)
    assert_close(found.sum(1), torch.ones(32))


@pytest.mark.parametrize(("samples", "prototypes"), [(64, 512), (512, 64)])
def test_many_iterations_do_not_run_away_with_the_ratio_of_samples_to_prototypes(samples, prototypes):
    scores = F.normalize(drawn(samples, 8), dim=1) @ F.normalize(drawn(8, prototypes, seed=1), dim=0)
    logs = scores / 0.05
    for _ in range(200):
        logs = logs - logs.logsumexp(0)
        logs = logs - logs.logsumexp(1, keepdim=True)
    assert_close(sinkhorn(scores.float(), iterations=200).double(), logs.exp(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("eps", [0.01, 0.001])
def test_codes_stay_finite_where_no_factors_can_balance_them(eps):
    """127 samples want one prototype, and what the other gets of them is 0 in fp32."""
    scores = torch.tensor([[1.0, -1.0]] * 127 + [[-1.0, 1.0]])
    for iterations in (3, 20, 200):
        assert_close(sinkhorn(scores, eps, iterations).sum(1), torch.ones(128))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_from_half_precision_are_refused(dtype):
    with pytest.raises(ValueError, match=rf"^scores: {dtype}, .*pass scores\.float\(\)"):
        sinkhorn(drawn(4, 3).to(dtype))


# Predicting codes


def test_swav_has_the_reference_values():
    scores, wanted = inputs("swav_sinkhorn", *SCORES), expected("swav_sinkhorn")
    codes = {i: sinkhorn(scores[i]) for i in range(2)}
    assert_close(swav(scores[:2], codes).item(), wanted["loss_two_views"], **EXACT)
    loss = swav(scores, codes)
    assert_close(loss.item(), wanted["loss_two_views_plus_small"], **EXACT)
    assert all(g.abs().max() > 0 for g in gradients(loss, *scores))


@pytest.mark.parametrize(("views", "name"), [(8, "swav_2_large_6_small"), (2, "swav_2_large_only")])
def test_a_view_does_not_predict_its_own_code(views, name):
    """View v's prediction costs v + 1 nats, so that the mean tells which pairs were counted."""
    logits = [torch.tensor([[0.0, math.log(math.exp(v + 1) - 1)]], dtype=torch.float64) for v in range(views)]
    code = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    pairs = [(i, v) for i in range(2) for v in range(views) if v != i]
    assert len(pairs) == expected("term_counts")[name]
    wanted = sum(v + 1 for _, v in pairs) / len(pairs)
    assert_close(predict_others({0: code, 1: code}, logits).item(), wanted, **EXACT)
    assert_close(swav([x * 0.1 for x in logits], {0: code, 1: code}, 0.1).item(), wanted, **EXACT)


def test_uniform_scores_cost_the_logarithm_of_the_prototypes():
    scores = [torch.full((2, 3000), 0.3, dtype=torch.float64)] * 2
    codes = {i: sinkhorn(scores[i]) for i in range(2)}
    assert_close(codes[0], torch.full_like(codes[0], 1 / 3000), **EXACT)
    assert_close(swav(scores, codes).item(), expected("collapse_loss_levels")["swav_K=3000"], **EXACT)


# Clusters


def test_cluster_cross_entropy_has_the_reference_value():
    case = CASES["deepcluster_v2_loss"]["inputs"]
    scores, ids = tensor(case["scores_one_head"]), torch.tensor(case["targets"])
    assert_close(cluster_cross_entropy(scores, ids, 0.1).item(), expected("deepcluster_v2_loss")["loss"], **EXACT)


def test_cluster_cross_entropy_of_no_cluster_is_zero():
    scores = drawn(3, 4).requires_grad_()
    loss = cluster_cross_entropy(scores, torch.full((3,), -100))
    assert loss == 0
    assert gradients(loss, scores)[0].abs().max() == 0


def test_lower_precisions_are_computed_in_fp32():
    scores, codes = drawn(2, 8, 5).bfloat16(), {i: sinkhorn(drawn(8, 5, seed=i)).float() for i in range(2)}
    for found, wanted in (
        (swav(scores.unbind(), codes), swav(scores.double().unbind(), codes)),
        (cluster_cross_entropy(scores[0], torch.arange(8) % 5), cluster_cross_entropy(scores[0].double(), torch.arange(8) % 5)),
    ):
        assert found.dtype == torch.float32
        assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def test_bad_input_is_refused():
    scores = drawn(4, 3)
    for call in (lambda: swav([scores] * 2, {0: scores}, 0), lambda: cluster_cross_entropy(scores, torch.arange(4) % 3, 0)):
        with pytest.raises(ValueError, match=r"^temperature: 0, must be above 0"):
            call()
    with pytest.raises(ValueError, match=r"^views: 1, there must be another"):
        swav([scores], {0: scores})
    with pytest.raises(ValueError, match=r"^eps: 0, must be above 0"):
        sinkhorn(scores, 0)
    with pytest.raises(ValueError, match=r"^iterations: 0, must be at least 1"):
        sinkhorn(scores, iterations=0)


# Self-training


def test_self_training_has_the_reference_values():
    case = MASKED["sccl"]
    embeddings, centres = (tensor(case[name]).requires_grad_() for name in ("embeddings", "centers"))
    q = student_t(embeddings, centres, case["alpha"])
    assert_close(q, tensor(case["q"]), **EXACT)
    assert_close(sharpened(q), tensor(case["p"]), **EXACT)
    assert_close(self_training(q).item(), case["kl_per_batch"], rtol=0, atol=3e-8)  # theirs adds 1e-8 to each probability
    theirs = F.kl_div((q + 1e-8).log(), sharpened(q), reduction="batchmean")
    assert_close(theirs.item(), case["kl_per_batch"], **EXACT)
    assert all(float(g.abs().max()) > 0 for g in gradients(self_training(q), embeddings, centres))
    assert not sharpened(q).requires_grad


def test_assignments_and_targets_match_a_slow_loop():
    x, centres, alpha = drawn(5, 3, seed=1), drawn(4, 3, seed=2), 2.5
    weight = [[(1 + float((a - c).square().sum()) / alpha) ** (-(alpha + 1) / 2) for c in centres] for a in x]
    q = tensor([[w / sum(row) for w in row] for row in weight])
    assert_close(student_t(x, centres, alpha), q, **EXACT)
    p = tensor([[float(q[i, k] ** 2 / q[:, k].sum()) for k in range(4)] for i in range(5)])
    assert_close(sharpened(q), p / p.sum(1, keepdim=True), **EXACT)
    assert student_t(x.bfloat16(), centres.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="alpha: 0"):
        student_t(x, centres, 0)
