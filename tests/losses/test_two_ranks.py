"""Each loss on two ranks is the loss of one process with all samples: the value, and after DDP's mean the gradient."""

import pytest
import torch
from torch.testing import assert_close

from mmssl import losses
from mmssl.distributed import gather, gather_rows, sum_ranks
from mmssl.losses import contrastive
from mmssl.types import Mask
from tests.losses.cases import CASES, drawn, expected, tensor
from tests.ranks import on_two_ranks

QUEUE, MEMORY = drawn(9, 6, seed=3), drawn(8, 6, seed=4)
PAIRED = torch.tensor([1, 0, 1, 0, 1, 1, 1, 0], dtype=torch.bool)  # four on rank 0, one on rank 1
ALIKE = torch.arange(8) % 3 == torch.arange(8)[:, None] % 3
IDS = torch.tensor([0, -100, 3, 1, -100, -100, 2, 2])  # counted: two on rank 0, three on rank 1


def in_blocks(first, second, index):
    whole, contrastive.BLOCK = contrastive.BLOCK, 40
    try:
        return losses.nt_xent(first, second)
    finally:
        contrastive.BLOCK = whole


def vicreg(first, second, index):
    terms = losses.vicreg(first, second)
    return 25 * terms.invariance + 25 * terms.variance + terms.covariance


def swav(first, second, index):
    return losses.swav((first, second), {0: losses.sinkhorn(first.detach()), 1: losses.sinkhorn(second.detach(), 0.5, 5)})


LOSSES = {  # of the rows of both views, and the positions of the samples
    "nt_xent": lambda a, b, index: losses.nt_xent(a, b),
    "nt_xent, decoupled": lambda a, b, index: losses.nt_xent(a, b, 0.2, losses.decoupled),
    "nt_xent, hard": lambda a, b, index: losses.nt_xent(a, b, 0.5, losses.hard()),
    "nt_xent in blocks": in_blocks,
    "info_nce": lambda a, b, index: losses.info_nce(a, b, QUEUE, 0.2),
    "in_batch_info_nce": lambda a, b, index: losses.in_batch_info_nce(a, b, 0.2),
    "batch_contrast": lambda a, b, index: losses.batch_contrast(a, b.detach(), 0.2),
    "instance_discrimination": lambda a, b, index: losses.instance_discrimination(a, MEMORY, index),
    "cosine_regression": lambda a, b, index: losses.cosine_regression(a, b) + losses.cosine_regression(b, a),
    "barlow_twins": lambda a, b, index: losses.barlow_twins(a, b),
    "vicreg": vicreg,
    "swav": swav,
    "dino": lambda a, b, index: losses.dino([a, b], [b, a], QUEUE[0]),
    "cluster_cross_entropy": lambda a, b, index: losses.cluster_cross_entropy(a, IDS[index]),
    "alignment": lambda a, b, index: losses.alignment(a, b, 3.0),
    "uniformity": lambda a, b, index: losses.uniformity(a),
    "clip": lambda a, b, index: losses.clip(a, b, 5.0),
    "clip, uneven": lambda a, b, index: losses.clip(a, b, 5.0, PAIRED[index], ALIKE[index]),
    "clip, positives": lambda a, b, index: losses.clip(a, b, 5.0, PAIRED[index], ALIKE[index], positive=True),
    "siglip": lambda a, b, index: losses.siglip(a, b, 5.0, -1.0),
    "siglip, uneven": lambda a, b, index: losses.siglip(a, b, 5.0, -1.0, PAIRED[index], ALIKE[index], positive=True),
}
NUMBERS = {
    "unit_std": losses.unit_std,
    "assignment_entropy": lambda z: torch.stack(losses.assignment_entropy(z.softmax(1))),
}


def values(rows):
    """Of each loss, for the samples `rows` of eight: its value, and its gradient with respect to shared weights."""
    x, found = drawn(8, 2, 6)[rows], {}
    for name, loss in LOSSES.items():
        theta = drawn(6, 6, seed=1).requires_grad_()
        value = loss(*(x @ theta).unbind(1), torch.arange(8)[rows])
        found[name] = (value.detach(), *torch.autograd.grad(value, theta))
    return found | {name: number(x[:, 0]) for name, number in NUMBERS.items()} | {"codes": losses.sinkhorn(x[:, 0])}


def references(rank):
    """For ranks with rows 0-1 and rows 2-3: losses, and their gradients for an encoder x @ theta."""
    rows, found = slice(2 * rank, 2 * rank + 2), {}
    x1, x2 = (tensor(CASES["ntxent_two_ranks"]["inputs"][name])[rows] for name in ("x1", "x2"))
    for name in ("nt_xent", "barlow_twins", "vicreg"):
        theta = torch.eye(3, dtype=torch.float64, requires_grad=True)
        value = LOSSES[name](x1 @ theta, x2 @ theta, None)
        found[name] = (value.detach(), *torch.autograd.grad(value, theta))
    q1, q2, k1, k2 = (tensor(CASES["moco_v3_two_ranks"]["inputs"][name])[rows] for name in ("q1", "q2", "k1", "k2"))
    found["moco_v3"] = losses.batch_contrast(q1, k2, 0.2) + losses.batch_contrast(q2, k1, 0.2)
    return found | {"sinkhorn": losses.sinkhorn(tensor(CASES["sinkhorn_two_ranks"]["inputs"]["scores"])[rows])}


def exchanges(rank):
    """Values and gradients of the two functions that everything is built of, for rows that are no contiguous tensors."""
    x = (drawn(3, 2) + 10 * rank).T.requires_grad_()  # (2, 3)
    rows, total = gather(x), sum_ranks(x)
    weight = torch.arange(12.0, dtype=torch.float64).view(4, 3) * (rank + 1)
    first = torch.autograd.grad((weight * rows).sum(), x, create_graph=True)
    second = torch.autograd.grad((weight[:2] * total).sum(), x)
    return gather_rows(x.detach()), rows.detach(), total.detach(), first[0].detach(), second[0]


def uneven_tokens(rows):
    hidden = torch.rand(5, 6, generator=torch.Generator().manual_seed(0)).argsort(1) < 4
    return losses.token_std(drawn(5, 6, 4)[rows], Mask.of(hidden[rows]))


def work(rank):
    return values(slice(rank, None, 2)), references(rank), exchanges(rank), uneven_tokens((slice(2), slice(2, 5))[rank])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return list(zip(*on_two_ranks(work, folder=tmp_path_factory.mktemp("ranks"))))


@pytest.mark.distributed
def test_t11_every_loss_of_two_ranks_is_that_of_one_process(ranks):
    (first, second), whole = ranks[0], values(slice(None))
    for name in LOSSES:
        for found_0, found_1, wanted in zip(first[name], second[name], whole[name]):
            assert_close((found_0 + found_1) / 2, wanted, rtol=1e-9, atol=1e-12, msg=lambda text: f"{name}: {text}")  # noqa: B023
        assert whole[name][1].abs().max() > 1e-6


@pytest.mark.distributed
def test_codes_and_statistics_of_two_ranks_are_those_of_one_process(ranks):
    (first, second), whole = ranks[0], values(slice(None))
    assert_close(torch.stack((first["codes"], second["codes"]), 1).flatten(0, 1), whole["codes"], rtol=1e-12, atol=1e-15)
    for name in NUMBERS:
        for found in (first, second):
            assert_close(found[name], whole[name], rtol=1e-12, atol=0)


@pytest.mark.distributed
def test_two_ranks_have_the_reference_values(ranks):
    first, second = ranks[1]
    case = expected("ntxent_two_ranks")
    for found, wanted in zip((first, second), case["per_rank_loss_with_global_candidates"]):
        assert_close(found["nt_xent"][0].item(), wanted, rtol=1e-9, atol=0)
    for found, wanted in zip((first, second), expected("moco_v3_two_ranks")["per_rank_loss"]):
        assert_close(found["moco_v3"].item(), wanted, rtol=1e-9, atol=0)
    for found in (first, second):
        wanted = expected("barlow_two_ranks")["loss_with_cross_rank_statistics"]
        assert_close(found["barlow_twins"][0].item(), wanted, rtol=1e-9, atol=0)
    loss = (first["vicreg"][0] + second["vicreg"][0]) / 2
    assert_close(loss.item(), expected("vicreg_two_ranks")["mean_over_ranks_of_loss"], rtol=1e-9, atol=0)
    for name, wanted in (
        ("nt_xent", case["dTheta_single_process"]),
        ("barlow_twins", expected("barlow_twins")["dTheta_single_process_with_z_equal_x_Theta_Theta_I"]),
        ("vicreg", expected("vicreg_two_ranks")["dTheta_single_process"]),
    ):
        assert_close((first[name][1] + second[name][1]) / 2, tensor(wanted), rtol=0, atol=1e-8)
    codes = expected("sinkhorn_two_ranks")
    for found, name in ((first, "rank0_rows"), (second, "rank1_rows")):
        assert_close(found["sinkhorn"], tensor(codes[name]), rtol=1e-9, atol=0)


@pytest.mark.distributed
def test_gather_keeps_the_global_order_and_both_gradients_are_sums_over_ranks(ranks):
    x = [(drawn(3, 2) + 10 * rank).T for rank in range(2)]
    weight = torch.arange(12.0, dtype=torch.float64).view(4, 3)
    for rank, (plain, rows, total, gathered, summed) in enumerate(ranks[2]):
        assert torch.equal(plain, torch.stack(x, 1).flatten(0, 1))  # row j of rank r at 2 j + r
        assert torch.equal(rows, plain)
        assert torch.equal(total, x[0] + x[1])
        assert torch.equal(gathered, 3 * weight[rank::2])  # weights 1 and 2 times
        assert torch.equal(summed, 3 * weight[:2])


@pytest.mark.distributed
def test_token_std_of_two_ranks_with_unlike_numbers_of_tokens_is_that_of_all(ranks):
    for found in ranks[3]:
        assert_close(found, uneven_tokens(slice(None)), rtol=1e-12, atol=0)
