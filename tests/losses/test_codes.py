import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from mmssl.losses import (
    code_perplexity,
    code_scores,
    codebook_diversity,
    cpc,
    feature_penalty,
    masked_cross_entropy,
    next_token,
    replaced_token,
    wav2vec2_contrastive,
    wav2vec2_scores,
)
from mmssl.types import Mask
from tests.losses.cases import MASKED, drawn, gradients, tensor

EXACT = {"rtol": 1e-9, "atol": 0}
NOTHING = torch.zeros(2, 5, dtype=torch.bool)


def ids(*shape, below=7):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(0))


def contrast():
    case = MASKED["wav2vec2_contrastive"]
    return *(tensor(case[name]) for name in ("context", "positive", "negatives")), case  # (T, D), (T, D), (K, T, D)


def one_hot(codes, count):
    return F.one_hot(codes, count).double()


# Vectors


def test_masked_language_modelling_has_the_reference_value_by_labels_and_by_mask():
    case = MASKED["mlm_loss"]
    logits, labels = tensor(case["logits"])[None], torch.tensor(case["labels"])[None]
    assert_close(masked_cross_entropy(logits, labels).item(), case["loss"], **EXACT)
    found = masked_cross_entropy(logits, labels.clamp(min=0), labels != -100)
    assert_close(found.item(), case["loss"], **EXACT)


def test_causal_language_modelling_has_the_reference_value():
    case = MASKED["causal_lm_loss"]
    logits, tokens = tensor(case["logits"])[None], torch.tensor(case["tokens"])[None]
    assert_close(next_token(logits, tokens).item(), case["loss_shifted"], **EXACT)
    assert_close(masked_cross_entropy(logits, tokens).item(), case["loss_if_not_shifted_WRONG"], **EXACT)


def test_replaced_tokens_have_the_reference_value():
    case = MASKED["electra_disc"]
    pad = tensor(case["input_mask"])[None] == 0
    found = replaced_token(tensor(case["logits"])[None], tensor(case["is_fake"])[None].bool(), pad)
    found = found.item() * 3 / (3 + 1e-6)  # the authors' code adds that to the number of tokens
    assert_close(found, case["disc_loss"], **EXACT)
    assert_close(2.5 + 50 * found, case["total_with_gen_2_5"], **EXACT)


def test_hubert_has_the_reference_values():
    case = MASKED["hubert_loss"]
    scores = code_scores(tensor(case["proj"]), tensor(case["codewords"]), case["tau"])
    assert_close(scores, tensor(case["logits"]), **EXACT)
    found = masked_cross_entropy(scores, torch.tensor(case["targets"]))
    assert_close(found.item(), case["ce_mean"], **EXACT)
    assert_close(2 * found.item(), case["ce_sum"], **EXACT)


def test_wav2vec2_contrast_has_the_reference_values():
    context, positive, negatives, case = contrast()
    wanted = tensor([[float(x) for x in row] for row in case["logits_with_exclusion"]])
    assert_close(wav2vec2_scores(context, positive, negatives, case["kappa"]).T, wanted, **EXACT)
    for mask, number in (([True, True], sum(case["loss_per_frame"]) / 2), ([False, True], case["loss_per_frame"][1])):
        assert_close(wav2vec2_contrastive(context, positive, negatives, mask=torch.tensor(mask)).item(), number, **EXACT)
    everyone = torch.zeros(2, 3, dtype=torch.bool)
    wrong = wav2vec2_contrastive(context, positive, negatives, same=everyone)
    assert_close(2 * wrong.item(), case["loss_sum_without_exclusion_WRONG"], **EXACT)


def test_codebooks_have_the_reference_values():
    case = MASKED["gumbel_diversity"]
    logits = tensor(case["logits"])  # (N, G, V)
    soft = logits.softmax(-1)
    assert_close(code_perplexity(soft), tensor(case["prob_perplexity_per_group_eps1e7"]), **EXACT)
    assert_close(code_perplexity(soft).sum().item(), case["prob_perplexity"], **EXACT)
    assert_close(codebook_diversity(soft).item(), case["diversity_loss"], **EXACT)
    assert_close(codebook_diversity(soft).item(), case["diversity_exact_xlogx"], rtol=1e-4, atol=0)
    codes = one_hot(torch.tensor(case["codes_argmax"]), 3)
    assert_close(code_perplexity(codes).sum().item(), case["code_perplexity"], **EXACT)
    collapsed = one_hot(torch.zeros(5, 2, dtype=torch.int64), 320)
    assert_close(codebook_diversity(collapsed).item(), case["collapsed_value_G2_V320"], rtol=0, atol=1e-6)
    uniform = torch.full((5, 2, 320), 1 / 320)
    assert_close(codebook_diversity(uniform).item(), case["uniform_value"], rtol=0, atol=1e-4)


def test_the_terms_of_wav2vec2_add_up_to_the_reference_value():
    context, positive, negatives, _ = contrast()
    diversity = codebook_diversity(tensor(MASKED["gumbel_diversity"]["logits"]).softmax(-1))
    penalty = feature_penalty(torch.full((1, 3, 2), 0.37**0.5, dtype=torch.float64))
    total = wav2vec2_contrastive(context, positive, negatives) + 0.1 * diversity + 10 * penalty
    assert_close(total.item(), MASKED["wav2vec2_total"]["with_the_two_vectors_above_N2_penalty_0_37"], **EXACT)


def test_cpc_has_the_reference_value():
    case = MASKED["cpc"]
    candidates = tensor(case["candidates_pos_first"])  # (1 + K, n, D)
    found = cpc(tensor(case["pred"]), candidates[0], candidates[1:])
    assert_close(found.item(), case["ce_mean"], **EXACT)
    summed = cpc(4 * tensor(case["pred"]), candidates[0], candidates[1:])
    assert_close(summed.item(), case["score_if_summed_WRONG_ce"], **EXACT)


@pytest.mark.parametrize("name", ["mp3_64", "beit_8192", "igpt_512", "hubert_500", "bert_30522"])
def test_a_uniform_prediction_scores_its_known_value(name):
    logits = torch.zeros(1, 2, int(name.split("_")[1]), dtype=torch.float64)
    found = masked_cross_entropy(logits, torch.tensor([[0, 3]]))
    assert_close(found.item(), MASKED["initial_losses"]["values"][name], **EXACT)


@pytest.mark.parametrize(("name", "negatives"), [("cpc_1_plus_128", 128), ("wav2vec2_1_plus_100", 100)])
def test_a_contrast_of_what_is_all_alike_scores_its_known_value(name, negatives):
    x, places = torch.ones(1, 5, 4, dtype=torch.float64), ids(1, 5, negatives, below=5)
    wanted = MASKED["initial_losses"]["values"][name]
    assert_close(cpc(x, x, places).item(), wanted, **EXACT)
    assert_close(wav2vec2_contrastive(x, x, places, same=torch.zeros_like(places, dtype=torch.bool)).item(), wanted, **EXACT)


# Arithmetic


@pytest.mark.parametrize("copies", [1, 3])
def test_masked_cross_entropy_matches_a_slow_loop(copies):
    logits, codes = drawn(2 * copies, 5, 7), ids(2, 5)
    mask = Mask.of(torch.rand(2 * copies, 5, generator=torch.Generator().manual_seed(1)).argsort(1) < 3)
    nats = []
    for row in range(2 * copies):
        for token in range(5):
            if mask.hidden[row, token]:
                scores = logits[row, token].tolist()
                nats.append(math.log(sum(map(math.exp, scores))) - scores[codes[row // copies, token]])
    for given in (mask, mask.hidden):
        assert masked_cross_entropy(logits, codes, given).item() == pytest.approx(sum(nats) / len(nats), rel=1e-12)
    chosen = masked_cross_entropy(logits[mask.hidden], codes.repeat_interleave(copies, 0)[mask.hidden])
    assert chosen.item() == pytest.approx(sum(nats) / len(nats), rel=1e-12)


def test_padding_is_neither_predicted_nor_judged():
    logits, tokens, pad = drawn(2, 5, 7), ids(2, 5), torch.arange(5) >= torch.tensor([[5], [3]])
    short = [F.cross_entropy(logits[row, : n - 1], tokens[row, 1:n], reduction="sum") for row, n in enumerate((5, 3))]
    assert_close(next_token(logits, tokens, pad), sum(short) / 6, rtol=1e-12, atol=0)
    replaced = tokens > 3
    wanted = F.binary_cross_entropy_with_logits(logits[..., 0][~pad], replaced[~pad].double())
    assert_close(replaced_token(logits[..., 0], replaced, pad), wanted, rtol=1e-12, atol=0)
    assert_close(feature_penalty(logits, pad), logits[~pad].square().mean(), rtol=1e-12, atol=0)


def test_masks_that_hide_nothing_give_zero_and_no_nan():
    x = drawn(2, 5, 7).requires_grad_()
    values = [
        masked_cross_entropy(x, ids(2, 5), NOTHING),
        masked_cross_entropy(x, torch.full((2, 5), -100)),
        next_token(x[:, :1], ids(2, 1)),
        next_token(x, ids(2, 5), ~NOTHING),
        replaced_token(x[..., 0], NOTHING, ~NOTHING),
        wav2vec2_contrastive(x, x * 2 + 1, ids(2, 5, 3, below=5), mask=NOTHING),
        cpc(x, x * 2 + 1, ids(2, 5, 3, below=5), mask=NOTHING),
        feature_penalty(x, ~NOTHING),
    ]
    for value in values:
        assert value.item() == 0
        assert gradients(value, x)[0].abs().max() == 0
    diversity = codebook_diversity(x.softmax(-1).unflatten(-1, (1, 7)), NOTHING)
    assert diversity.abs() < 1e-5
    assert gradients(diversity, x)[0].abs().max() == 0


def test_distractors_by_their_places_are_those_vectors():
    context, pool = drawn(2, 6, 4), drawn(2, 6, 4, seed=1)
    pool[0, 4] = pool[0, 1]  # one code for two frames
    places = ids(2, 6, 9, below=6)
    vectors = torch.stack([pool[torch.arange(2)[:, None], places[..., k]] for k in range(9)])  # (K, 2, 6, D)
    for loss in (wav2vec2_contrastive, cpc):
        assert_close(loss(context, pool, places), loss(context, pool, vectors), rtol=1e-12, atol=0)
    scores = wav2vec2_scores(context, pool, places)
    own = places == torch.arange(6)[:, None]
    twin = (places[0] == 4) & (torch.arange(6)[:, None] == 1) | (places[0] == 1) & (torch.arange(6)[:, None] == 4)
    assert twin.any()
    assert torch.equal(scores[0, :, 1:].isinf(), own[0] | twin)
    assert torch.equal(scores[1, :, 1:].isinf(), own[1])


def test_negatives_of_cpc_may_come_from_a_pool_of_all_sequences():
    prediction, positive, frames = drawn(2, 3, 4), drawn(2, 3, 4, seed=1), drawn(10, 4, seed=2)
    places = ids(2, 3, 6, below=10)
    found = cpc(prediction, positive, places, pool=frames)
    assert_close(found, cpc(prediction, positive, frames[places].movedim(2, 0)), rtol=1e-12, atol=0)


def test_a_frame_all_of_whose_distractors_are_its_own_code_costs_nothing_and_has_a_finite_gradient():
    context, positive = drawn(1, 3, 4).requires_grad_(), torch.ones(1, 3, 4, dtype=torch.float64)
    value = wav2vec2_contrastive(context, positive, ids(1, 3, 5, below=3))
    assert value.item() == 0
    assert gradients(value, context)[0].abs().max() == 0


def test_codes_say_what_is_alike_where_rounding_would_not():
    positive = drawn(1, 4, 8).float()
    positive[0, 2] = positive[0, 0] * (1 + 1e-6)
    places, codes = torch.tensor([[[2], [3], [0], [1]]]), torch.tensor([[5, 1, 5, 2]])
    assert not wav2vec2_scores(positive, positive, places).isinf().any()
    same = codes.gather(1, places[..., 0])[..., None] == codes[..., None]
    assert wav2vec2_scores(positive, positive, places, same=same).isinf().flatten(0, 1)[:, 1].tolist() == [
        True,
        False,
        True,
        False,
    ]


def test_perplexity_counts_the_masked_frames_only_and_its_gradient_is_finite_at_zero():
    p, mask = drawn(2, 5, 3, 4).softmax(-1), ids(2, 5, below=2).bool()
    mean = p[mask].mean(0)
    wanted = torch.distributions.Categorical(mean).entropy().exp()
    assert_close(code_perplexity(p, mask), wanted, rtol=1e-5, atol=0)
    logits = torch.tensor([[[200.0, 0.0, 0.0]]]).requires_grad_()  # of which softmax leaves zeros
    assert gradients(codebook_diversity(logits.softmax(-1)), logits)[0].isfinite().all()


# Precision and bad input


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_is_computed_in_fp32(dtype):
    x, y, places = (3 * drawn(4, 6, 8)).to(dtype), drawn(4, 6, 8, seed=1).to(dtype), ids(4, 6, 9, below=6)
    vectors, mask = drawn(9, 4, 6, 8, seed=2).to(dtype), ids(4, 6, below=2).bool()
    for loss in (
        lambda x, y, v: masked_cross_entropy(x, ids(4, 6), mask),
        lambda x, y, v: next_token(x, ids(4, 6)),
        lambda x, y, v: replaced_token(x[..., 0], mask),
        lambda x, y, v: masked_cross_entropy(code_scores(x, y[0]), ids(4, 6, below=6), mask),
        lambda x, y, v: wav2vec2_contrastive(x, y, places, mask=mask),
        lambda x, y, v: wav2vec2_contrastive(x, y, v, mask=mask),
        lambda x, y, v: cpc(x, y, places),
        lambda x, y, v: cpc(x, y, v),
        lambda x, y, v: codebook_diversity(x.double().softmax(-1).to(x.dtype).unflatten(-1, (2, 4)) * 2, mask),
        lambda x, y, v: feature_penalty(x),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(x, y, vectors)
        assert found.dtype == torch.float32
        wanted = loss(x.double(), y.double(), vectors.double())
        low = dtype != torch.float32 and loss.__code__.co_names[:1] == ("codebook_diversity",)  # its softmax is rounded above
        assert_close(found.double(), wanted, rtol=1e-2 if low else 2e-5, atol=0)


def test_bad_input_is_refused():
    x = drawn(2, 5, 4)
    with pytest.raises(ValueError, match=r"^temperature: 0, must be above 0"):
        code_scores(x, x[0], 0)
    with pytest.raises(ValueError, match=r"^temperature: 0, must be above 0"):
        wav2vec2_contrastive(x, x, ids(2, 5, 3, below=5), 0)
    for loss in (wav2vec2_contrastive, cpc):
        with pytest.raises(ValueError, match=r"^negatives: 0, must be at least 1"):
            loss(x, x, ids(2, 5, 0, below=5))
        with pytest.raises(ValueError, match="must have one shape"):
            loss(x, x[:1], ids(2, 5, 3, below=5))
    with pytest.raises(ValueError, match="must have one shape"):
        replaced_token(x[..., 0], NOTHING[:, :4])
    with pytest.raises(ValueError, match="do not fit"):
        masked_cross_entropy(x, ids(2, 4))
    with pytest.raises(ValueError, match=r"^mask: "):
        masked_cross_entropy(x, ids(2, 5), torch.ones(2, 5))
