"""wav2vec 2.0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmssl import losses
from mmssl.methods.method import Above0, AtLeast0, AtLeast1, AtLeast2, Guard, Method, Normal, masked_share
from mmssl.model.encoder import Encoder
from mmssl.model.listening import Listening
from mmssl.model.positions import take_at
from mmssl.parts import Network
from mmssl.parts.quantizer import GumbelQuantizer
from mmssl.random import generator
from mmssl.schedules import Schedule
from mmssl.types import Batch, Clock, StepOutput

COLLAPSED = (
    "the codebooks have collapsed: nearly all frames have the same code, which leaves nothing to find; raise method.diversity "
    "(up to 1), method.gumbel_temperature, train.global_batch or optim.warmup, lower optim.lr, or set views.normalise=true"
)


class Wav2Vec2(Method):
    """Baevski et al. 2020, arXiv:2006.11477: find the quantised frame that was hidden among others of the utterance.

    Terms are means over masked frames; the authors' code has their sums.

    Args:
        dim: of predictions and of what they are compared with, and of the quantised frames.
        groups, entries: codebooks, and entries of each.
        negatives: other masked frames of the utterance, drawn with replacement.
        temperature: of the contrast.  gumbel_temperature: of the choice of entries.
        diversity, penalty: weights of the loss of unused entries and of the mean square of the convolutions' output.
        dropout: of the frames that are projected, and of those that are quantised.
        feature_grad_scale: factor of the gradient that the convolutions get.
    """

    paper, family, modalities, coverage = "arXiv:2006.11477", "masked", ("speech",), (20,)
    masks = True
    normal = (Normal("code_perplexity", 4.0, COLLAPSED),)  # with two codebooks 2 is the least there can be

    def __init__(
        self,
        encoder: Encoder,
        dim: AtLeast1 = 256,
        groups: AtLeast1 = 2,
        entries: AtLeast2 = 320,
        negatives: AtLeast1 = 100,
        temperature: Above0 = 0.1,
        gumbel_temperature: Schedule = Schedule(2.0, 0.5, "exponential", steps=277_258),  # falls by 5e-6 an update
        diversity: AtLeast0 = 0.1,
        penalty: AtLeast0 = 10.0,
        dropout: AtLeast0 = 0.1,
        feature_grad_scale: Above0 = 0.1,
    ):
        super().__init__()
        if min(gumbel_temperature.start, gumbel_temperature.end) <= 0:
            ends = f"from {gumbel_temperature.start} to {gumbel_temperature.end}"
            raise ValueError(f"gumbel_temperature: {ends}, must be above 0")
        self.listening = Listening(encoder, dropout, feature_grad_scale, "wav2vec2")
        self.student = Network(encoder=encoder)
        self.quantizer = GumbelQuantizer(encoder.features.norm.normalized_shape[0], dim, groups, entries)
        self.predict, self.project = nn.Linear(encoder.dim, dim), nn.Linear(dim, dim)
        self.negatives, self.temperature, self.gumbel_temperature = negatives, temperature, gumbel_temperature
        self.diversity, self.penalty = diversity, penalty
        self.normal = (Normal("code_perplexity", 2.0 * groups, COLLAPSED),)  # type: ignore[misc]

    def guards(self) -> tuple[Guard, ...]:
        """Fewer than two codes of each book in use."""
        return tuple(Guard(normal.metric, normal.least, normal.below) for normal in self.normal)

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Hidden frames from all frames, hidden ones replaced."""
        (view,), encoder = batch.views, self.student.encoder
        if view.mask is None or not view.mask.count or view.pad is not None:
            raise ValueError("views.mask: wav2vec2 needs masks that hide as many frames of each view, and no padding")
        heard = self.listening(encoder, view)
        seen = encoder.contextualize(heard.tokens)  # tokens (M*B, L, D)
        places = view.mask.rest  # (M*B, n)
        context = self.predict(take_at(seen.tokens, places))  # (M*B, n, dim)
        frames = take_at(self.listening.dropout(heard.frames), places)
        own = self.quantizer(frames, batch.keys, self.gumbel_temperature(clock))
        others = distractors(batch.keys, places, self.negatives)  # (M*B, n, K)
        same = own.ids.unsqueeze(-1) == own.ids.unsqueeze(1).expand(-1, places.shape[1], -1).gather(-1, others)
        scores = losses.wav2vec2_scores(context, self.project(own.vectors), others, self.temperature, same)
        terms = {
            "contrastive": losses.masked_cross_entropy(scores, torch.zeros_like(places)),  # the first is the right one
            "diversity": self.diversity * losses.codebook_diversity(own.probabilities),
            "penalty": self.penalty * losses.feature_penalty(heard.raw),
        }
        right = (scores[..., 0] > scores[..., 1:].amax(-1)) & ~same.all(-1)
        health = {
            "code_perplexity": losses.code_perplexity(own.chosen).sum(),
            "accuracy": right.float().mean(),
            "encoder_std": losses.token_std(seen.tokens),
            "masked_share": masked_share(view),
        }
        pooled = encoder.pool(seen).detach().unflatten(0, (len(batch.index), -1)).mean(1)  # (B, D)
        return StepOutput(terms, health, pooled)


def distractors(keys: Sequence[int], places: Tensor, count: int) -> Tensor:
    """(M*B, n, K) int64: for each of the n masked frames of a row, uniform draws of numbers of other ones, with replacement.

    Args:
        keys: B seeds, one a sample.  places: (M*B, n), the M rows of a sample adjacent.  count: K.
    Raises: ValueError if there is no other.
    """
    rows, frames = places.shape
    if frames < 2:
        raise ValueError(
            f"views.mask: hides {frames} frame of an utterance, and no other is left to tell it from; raise views.mask.ratio "
            "or views.shortest"
        )
    drawn = places.new_empty(len(keys), rows // len(keys), frames, count)
    for row, key in zip(drawn, keys, strict=True):
        draw = generator(key, "distractors", device=places.device)
        row.random_(0, frames - 1, generator=draw)
    drawn = drawn.flatten(0, 1)
    return drawn + (drawn >= torch.arange(frames, device=places.device)[:, None])
