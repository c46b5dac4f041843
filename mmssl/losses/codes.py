"""Prediction of discrete codes: token ids, units of speech, which of some vectors is the right one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from mmssl.distributed import all_sum, sum_ranks
from mmssl.losses.masking import counted, masked_mean, shared
from mmssl.losses.numerics import above_zero, at_least_fp32, same_shape, unit_rows, without_autocast
from mmssl.types import Mask

# Codes --------------------------------------------------------------------------------------------------------------


def masked_cross_entropy(logits: Tensor, codes: Tensor, mask: Mask | Tensor | None = None) -> Tensor:
    """Cross entropy of the codes of masked tokens: BEiT, HuBERT, masked language models.

    Args:
        logits: (M*B, L, K), the M rows of a sample adjacent; or (n, K). Where few tokens are masked, make no others.
        codes: (B, L) or (n,) int64, shared by a sample's M rows; tokens with -100 do not count.
        mask: tokens that count, rows (M*B, L), or bool, True = masked; all of them if None.
    Returns: () mean over this rank's masked tokens, in nats, 0 if there are none; log K if all is uniform.
    Raises: ValueError if the shapes do not fit.
    Source: arXiv:2106.08254, section 2; arXiv:1810.04805, section 3.1; arXiv:2106.07447, section II.
    """
    codes = shared(codes, logits)
    codes = codes.masked_fill(~counted(codes, mask), -100)
    total = F.cross_entropy(at_least_fp32(logits).flatten(0, -2), codes.flatten(), ignore_index=-100, reduction="sum")
    return total / (codes != -100).sum().clamp(min=1)


def next_token(logits: Tensor, ids: Tensor, pad: Tensor | None = None) -> Tensor:
    """Cross entropy of each token after those before it.

    Args:
        logits: (B, L, V), of which the ones at token t are compared with token t + 1.
        ids: (B, L) int64.  pad: (B, L) bool, True = padding, which is not predicted.
    Returns: () mean over this rank's predicted tokens, in nats; 0 if there are none.
    Raises: ValueError if the shapes do not fit.
    Source: Radford et al. 2018, "Improving language understanding by generative pre-training", Eq. 1.
    """
    wanted = ids if pad is None else ids.masked_fill(pad, -100)
    return masked_cross_entropy(logits, F.pad(wanted[:, 1:], (0, 1), value=-100))  # moving the logits would copy them


def replaced_token(logits: Tensor, replaced: Tensor, pad: Tensor | None = None) -> Tensor:
    """Cross entropy of whether each token is another than the original one, the loss of ELECTRA's discriminator.

    Args:
        logits: (B, L), above 0 = replaced.  replaced: (B, L) bool.  pad: (B, L) bool, True = padding.
    Returns: () mean over this rank's tokens that are not padding, in nats; 0 if there are none.
    Raises: ValueError if the shapes differ.
    Source: arXiv:2003.10555, section 2.
    """
    same_shape(logits=logits, replaced=replaced)
    logits = at_least_fp32(logits)
    error = F.binary_cross_entropy_with_logits(logits, replaced.to(logits.dtype), reduction="none")
    return masked_mean(error, None if pad is None else ~pad)


@without_autocast
def code_scores(x: Tensor, codebook: Tensor, temperature: float = 0.1) -> Tensor:
    """Logits of HuBERT: cosines with the code vectors over the temperature, fp32 or higher.

    Args:
        x: (..., D) projections.  codebook: (K, D). Both are normalised here.
        temperature: above 0.
    Returns: (..., K).
    Source: arXiv:2106.07447, section II.
    """
    above_zero(temperature=temperature)
    return unit_rows(x) @ unit_rows(codebook).T / temperature


# Contrast within a sequence -----------------------------------------------------------------------------------------


@without_autocast
def wav2vec2_scores(
    context: Tensor, positive: Tensor, negatives: Tensor, temperature: float = 0.1, same: Tensor | None = None
) -> Tensor:
    """Cosines of frames with their own quantised target and with those of other frames, over the temperature.

    Args:
        context, positive: (..., n, D) predictions and quantised targets of masked frames. Normalised here.
        negatives: (K, ..., n, D) distractors; or (..., n, K) int64, their places among the n targets of the same sequence, in
            which case no vector is copied.
        temperature: above 0.
        same: (..., n, K) bool, True where a distractor has the code of the positive and is none. Found by comparing vectors if
            None, which rounding may tell apart although their codes are the same.
    Returns: (..., n, 1 + K), the positive first, -inf where there is no distractor.
    Raises: ValueError if the shapes differ, or if there is no distractor.
    Source: arXiv:2006.11477, Eq. 3; what is left out, as in the authors' code.
    """
    above_zero(temperature=temperature)
    same_shape(context=context, positive=positive)
    if negatives.is_floating_point():
        alike = (negatives == positive).all(-1).movedim(0, -1) if same is None else same
        scores = _scores(unit_rows(context) / temperature, unit_rows(positive), unit_rows(negatives))
    else:
        alike = _same(positive.detach(), negatives) if same is None else same
        scores = _scores(unit_rows(context) / temperature, unit_rows(positive), negatives)
    return torch.cat((scores[..., :1], scores[..., 1:].masked_fill(alike, -torch.inf)), -1)


def wav2vec2_contrastive(
    context: Tensor,
    positive: Tensor,
    negatives: Tensor,
    temperature: float = 0.1,
    mask: Mask | Tensor | None = None,
    same: Tensor | None = None,
) -> Tensor:
    """Cross entropy of finding a frame's own quantised target among those of other frames of the sequence.

    Args:
        context, positive, negatives, temperature, same: as in `wav2vec2_scores`.
        mask: frames that count, (..., n) bool; all of them if None.
    Returns: () mean over this rank's frames that count, in nats, 0 if there are none; log(K + 1) if all vectors are alike but
        for their codes. The authors' code has the sum, and multiplies the other terms by the number of frames.
    Source: arXiv:2006.11477, Eq. 3.
    """
    return _first(wav2vec2_scores(context, positive, negatives, temperature, same), mask)


@without_autocast
def cpc(
    prediction: Tensor,
    positive: Tensor,
    negatives: Tensor,
    pool: Tensor | None = None,
    mask: Mask | Tensor | None = None,
) -> Tensor:
    """Cross entropy of finding the frame that is some steps ahead among others: CPC's loss for one step.

    Args:
        prediction, positive: (..., n, D) what is predicted, and the frames that come.
        negatives: (K, ..., n, D); or (..., n, K) int64, their places in `pool`, in which case no vector is copied.
        pool: (..., m, D) frames, of which each sequence has its own unless they are (m, D); `positive` if None.
        mask: frames that count, (..., n) bool; all of them if None.
    Returns: () mean over this rank's frames, in nats; log(K + 1) if all is alike.
    Raises: ValueError if the shapes differ, or if there is no negative.
    Source: arXiv:1807.03748, Eq. 4; the score is a mean over channels as in arXiv:2002.02848's code.
    """
    same_shape(prediction=prediction, positive=positive)
    return _first(_scores(at_least_fp32(prediction) / prediction.shape[-1], positive, negatives, pool), mask)


def _scores(query: Tensor, positive: Tensor, negatives: Tensor, pool: Tensor | None = None) -> Tensor:
    """(..., n, 1 + K) products of queries with their positive and their negatives."""
    positive = positive.to(query.dtype)
    if negatives.is_floating_point():
        far = torch.einsum("...d,k...d->...k", query, negatives.to(query.dtype))
    else:
        far = (query @ (positive if pool is None else pool.to(query.dtype)).mT).gather(-1, negatives)
    if far.shape[-1] == 0:
        raise ValueError("negatives: 0, must be at least 1; raise the number that is drawn")
    return torch.cat(((query * positive).sum(-1, keepdim=True), far), -1)


def _same(vectors: Tensor, places: Tensor) -> Tensor:
    """(..., n, K) bool, whether the vectors at some places are those of the frame. vectors: (..., n, D)."""
    with torch.no_grad():
        unlike = torch.cdist(at_least_fp32(vectors), at_least_fp32(vectors), p=0)  # how many entries differ
        return unlike.gather(-1, places) == 0


def _first(scores: Tensor, mask: Mask | Tensor | None) -> Tensor:
    """() mean over the tokens that count of the cross entropy of the first candidate. scores: (..., 1 + K)."""
    return masked_cross_entropy(scores, torch.zeros(scores.shape[:-1], dtype=torch.int64, device=scores.device), mask)


# Codebooks ----------------------------------------------------------------------------------------------------------


def code_perplexity(probabilities: Tensor, mask: Mask | Tensor | None = None, group: ProcessGroup | None = None) -> Tensor:
    """How many entries of each codebook are in use, over the frames of all ranks. With gradient.

    Args:
        probabilities: (..., G, V), each codebook's sum to 1: softmax of logits, or one-hot codes.
        mask: frames that count, (...) bool; all of them if None.
    Returns: (G,) exp of the entropy of the mean over frames: 1 if all frames have one entry; V if all entries are used alike,
        or if no frame counts.
    Raises: ValueError if the mask is not one of these frames.
    Source: arXiv:2006.11477; the 1e-7 that keeps the gradient finite, as in the authors' code.
    """
    p = at_least_fp32(probabilities)
    hidden = counted(p[..., 0, 0], mask)
    total = sum_ranks(p.masked_fill(~hidden[..., None, None], 0.0).flatten(0, -3).sum(0), group)  # (G, V)
    count = all_sum(hidden.sum(), group)
    mean = torch.where(count > 0, total / count.clamp(min=1), 1 / p.shape[-1])
    return (-(mean * (mean + 1e-7).log()).sum(-1)).exp()


def codebook_diversity(probabilities: Tensor, mask: Mask | Tensor | None = None, group: ProcessGroup | None = None) -> Tensor:
    """Share of codebook entries that is not in use, the diversity loss of wav2vec 2.0. Arguments as in `code_perplexity`.

    Returns: () whole loss on every rank: 0 if all entries are used alike, (V - 1) / V if one is.
    Source: arXiv:2006.11477, Eq. 4. Departs from it as the authors' code does: perplexity in place of entropy.
    """
    return 1 - code_perplexity(probabilities, mask, group).mean() / probabilities.shape[-1]


def feature_penalty(features: Tensor, pad: Tensor | None = None) -> Tensor:
    """Mean square of the convolutions' output before it is normalised, which keeps wav2vec 2.0 and HuBERT from diverging.

    Args:
        features: (B, L, D).  pad: (B, L) bool, True = padding, which does not count.
    Returns: () mean over this rank's frames and channels; 0 if there are none.
    Source: the authors' code.
    """
    return masked_mean(at_least_fp32(features).square().mean(-1), None if pad is None else ~pad)
