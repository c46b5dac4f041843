"""Contrastive predictive coding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl import losses
from mmssl.distributed import gather, gather_rows, rank, world
from mmssl.methods.method import AtLeast1, Method, Normal
from mmssl.model.encoder import Encoder
from mmssl.parts import Network
from mmssl.random import generator
from mmssl.types import Batch, Clock, StepOutput


class CPC(Method):
    """van den Oord et al. 2018, arXiv:1807.03748: by what was heard so far, find the frames to come among others of the batch.

    Departs from the paper: the context is that of the shared transformer, which sees the past alone, not of a GRU; and frames
    are those of the modality, 20 ms each of waves. Candidates are frames of the batch of all ranks.

    Args:
        steps: frames ahead, each with a linear predictor of its own.
        negatives: candidates beside the right one, drawn for each frame and the same for all its steps.
    """

    paper, family, modalities, coverage = "arXiv:1807.03748", "predictive", ("speech", "spectrogram"), (26,)
    normal = (Normal("information", 0.05, "frames to come are found hardly better than by chance", after=200),)

    def __init__(self, encoder: Encoder, steps: AtLeast1 = 12, negatives: AtLeast1 = 128):
        super().__init__()
        check_causal(encoder)
        self.student = Network(encoder=encoder)
        self.predictors = nn.ModuleList(nn.Linear(encoder.dim, encoder.dim, bias=False) for _ in range(steps))
        self.negatives = negatives

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """The frames some steps ahead of each context."""
        (view,), encoder = batch.views, self.student.encoder
        frames = encoder.local(view.x)  # (B, L, D)
        seen = encoder.contextualize(frames)
        lengths, steps = rank_lengths(frames), len(self.predictors)
        window = frames.shape[1] - steps
        if min(lengths) <= steps:  # on every rank, or some would wait for those that stopped
            raise ValueError(f"method.steps: {steps}, the views have {min(lengths)} frames; lower it or raise views.shortest")
        pool = every_frame(frames, lengths)  # (N, D)
        places = negative_places(batch.keys, lengths, steps, self.negatives, pool)  # (B, window, K)
        context = seen.tokens[:, :window]
        each = torch.stack(
            [
                losses.cpc(predict(context), frames[:, k : k + window], places, pool)
                for k, predict in enumerate(self.predictors, 1)
            ]
        )
        told = math.log(self.negatives + 1) - each.detach()  # nats beyond chance
        health = {
            "information": told.mean(),
            "information_first": told[0],
            "information_last": told[-1],
            "feature_std": losses.token_std(frames),
        }
        return StepOutput({"cpc": each.mean()}, health, encoder.pool(seen).detach())


def rank_lengths(frames: Tensor) -> list[int]:
    """How many frames the rows of each rank have; those of a stream are cut by each rank for itself. frames: (B, L, D)."""
    length = frames.shape[1]
    return [length] if world() == 1 else gather_rows(torch.tensor([length], device=frames.device)).tolist()


def every_frame(frames: Tensor, lengths: Sequence[int]) -> Tensor:
    """(N, D) frames of all ranks in global order. Ranks exchange rows as long as the longest; what was filled up is left out.

    Args:
        frames: (B, L, D).  lengths: L of each rank.
    """
    most = max(lengths)
    rows = gather(F.pad(frames, (0, 0, 0, most - frames.shape[1])))  # (W*B, most, D)
    if min(lengths) == most:
        return rows.flatten(0, 1)
    own = torch.tensor(lengths, device=rows.device).repeat(len(frames))  # (W*B,)
    return rows[torch.arange(most, device=rows.device) < own[:, None]]


def negative_places(keys: Sequence[int], lengths: Sequence[int], steps: int, count: int, pool: Tensor) -> Tensor:
    """(B, L - steps, K) int64: for each context, uniform places in the pool, without the frames that it predicts.

    Args:
        keys: B seeds, one a sample.  lengths: L of each rank.  pool: (N, D) frames of all ranks in global order.
    """
    context = torch.arange(lengths[rank()] - steps, device=pool.device)[:, None]
    places = torch.empty(len(keys), len(context), count, dtype=torch.int64, device=pool.device)
    for row, key in enumerate(keys):
        draw = generator(key, "negatives", device=pool.device)
        drawn = torch.randint(len(pool) - steps, places.shape[1:], generator=draw, device=pool.device)
        first = row * sum(lengths) + sum(lengths[: rank()]) + context + 1  # to come
        places[row] = drawn + steps * (drawn >= first)
    return places


def check_causal(encoder: Encoder) -> None:
    """Raises: ValueError if a token of the encoder depends on what comes after it, with the option that makes it so."""
    if not isinstance(encoder, Encoder):
        raise ValueError("model.backbone: cpc predicts what follows, which a backbone sees; leave it out")
    if not all(getattr(module, "causal", True) for module in encoder.transformer.modules()):
        raise ValueError("model.causal: false, the context must not see what it predicts; set model.causal=true")
    if any(weight.ndim == 3 and weight.shape[-1] > 1 for weight in encoder.positions.parameters()):
        raise ValueError(
            "model.position_kernel: convolutions over several frames see those to come; set model.position_kernel=1 and leave "
            "the order of frames to model.alibi"
        )
    if any(isinstance(module, nn.GroupNorm) for module in encoder.features.modules()):
        raise ValueError("model.conv_norm: group normalises over time, which tells what is to come; set model.conv_norm=layer")
