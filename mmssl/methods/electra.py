"""ELECTRA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmssl import losses, random
from mmssl.distributed import all_sum
from mmssl.losses.numerics import at_least_fp32
from mmssl.methods.method import Above0, AtLeast0, Method, Normal, masked_share
from mmssl.model.encoder import Encoder, init_linear
from mmssl.model.lm_head import lm_head
from mmssl.model.mask_token import Corruption, asked, check_corruption, corrupt
from mmssl.model.positions import attention_bias, take_at
from mmssl.model.transformer import Transformer
from mmssl.parts import Network
from mmssl.types import Batch, Clock, Rebuilt, StepOutput, View


class Generator(nn.Module):
    """A narrower transformer on the encoder's features: embeddings (R, L, D) -> tokens (R, L, width)."""

    def __init__(self, encoder: Encoder, share: float):
        """share: of the encoder's heads, rounded to whole ones of the same width."""
        super().__init__()
        config = encoder.config
        assert config is not None
        heads = max(1, round(config.heads * share))
        self.width = heads * config.hidden_size // config.heads
        self.narrow = nn.Linear(encoder.dim, self.width)
        self.transformer = Transformer(
            self.width,
            config.depth,
            heads,
            mlp_ratio=config.mlp_ratio,
            norm=config.norm,
            extra_tokens=0,
            eps=config.norm_eps,
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            normed=True,
            activation=config.activation,
            norm_kind=config.norm_kind,
        )
        self.apply(init_linear)

    def forward(self, features: Tensor, pad: Tensor | None) -> Tensor:
        """pad: (R, L) bool, True = padding."""
        return self.transformer(self.narrow(features), bias=attention_bias(None, pad, 0))[0]


class Electra(Method):
    """Clark et al. 2020, arXiv:2003.10555: tell which tokens a small masked language model made up.

    Generator and encoder share their embeddings, which are as wide as the encoder (in the paper's small model, half of it).
    """

    paper, family, modalities, coverage = "arXiv:2003.10555", "masked", ("text",), ()
    masks = True
    normal = (Normal("replaced_share", 0.002, "hardly a token is replaced: the generator is too good; lower method.generator"),)

    def __init__(
        self,
        encoder: Encoder,
        generator: Above0 = 1 / 3,
        discriminator_weight: AtLeast0 = 50.0,
        corruption: Corruption = Corruption(mask=0.85, random=0.0),
    ):
        """generator: its width as a share of the encoder's.  discriminator_weight: of the loss of the encoder."""
        super().__init__()
        check_corruption(getattr(encoder, "features", None), corruption, "electra")
        if generator > 1:
            raise ValueError(f"generator: {generator}, must be a share of the encoder's width, at most 1")
        self.student = Network(encoder=encoder)
        self.generator = Generator(encoder, generator)
        self.generator_head = lm_head(encoder.features.tokens, self.generator.width, encoder.features.norm.eps)
        self.head = nn.Sequential(nn.Linear(encoder.dim, encoder.dim), nn.GELU(), nn.Linear(encoder.dim, 1))
        self.head.apply(init_linear)
        self.discriminator_weight, self.corruption = discriminator_weight, corruption

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """The generator fills hidden places with what it finds likely; the encoder judges every token."""
        (view,), encoder = batch.views, self.student.encoder
        gaps, places, logits = self._guess(view, batch)
        assert view.mask is not None
        truth = view.x.repeat_interleave(view.copies, 0)  # (M*B, L)
        counts, ids = view.mask.hidden.gather(1, places), truth.gather(1, places)  # (M*B, n)
        sampled = torch.where(counts, self._sample(logits, places, batch), ids)
        filled = gaps._replace(x=truth.scatter(1, places, sampled))
        replaced = filled.x != truth
        seen = encoder(filled)  # tokens (M*B, L, D)
        score = self.head(seen.tokens).squeeze(-1)  # (M*B, L)
        # An update averages over real tokens, see `terms`; ranks may hide unequal shares of theirs.
        own = torch.stack([counts.sum(), self.terms(batch)]).double()
        every = all_sum(own)
        share = (own[0] * every[1]) / (own[1] * every[0]).clamp(min=1)
        told = losses.masked_cross_entropy(logits, ids, counts)
        terms = {
            "tokens": told * share.to(told.dtype),
            "replaced": self.discriminator_weight * losses.replaced_token(score, replaced, filled.pad),
        }
        health = {
            "accuracy": ((logits.detach().argmax(-1) == ids) & counts).sum() / own[0].clamp(min=1),
            "found": ((score.detach() > 0) & replaced).sum() / replaced.sum().clamp(min=1),
            "replaced_share": replaced.sum() / own[1],
            "encoder_std": losses.token_std(seen.tokens, pad=filled.pad),
            "masked_share": masked_share(view),
        }
        pooled = encoder.pool(seen).detach().unflatten(0, (len(batch.index), -1)).mean(1)  # (B, D)
        return StepOutput(terms, health, pooled)

    def _guess(self, view: View, batch: Batch) -> tuple[View, Tensor, Tensor]:
        """The view with gaps, the places to fill, (M*B, n), and the generator's logits of them, (M*B, n, V)."""
        if view.mask is None:
            raise ValueError("views.mask: electra needs masks")
        features, places = self.student.encoder.features, asked(view.mask)
        gaps = corrupt(view, features, batch.keys, self.corruption)
        return gaps, places, self.generator_head(take_at(self.generator(features(gaps.x), gaps.pad), places))

    @torch.no_grad()
    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt:
        """What the generator finds most likely."""
        (view,) = batch.views
        gaps, places, logits = self._guess(view, batch)
        assert view.mask is not None
        truth = view.x.repeat_interleave(view.copies, 0)
        return Rebuilt(truth, truth.scatter(1, places, logits.argmax(-1)), view.mask.hidden, gaps.x)

    @torch.no_grad()
    def _sample(self, logits: Tensor, places: Tensor, batch: Batch) -> Tensor:
        """(M*B, n) ids drawn by their probability: where a number from [0, 1) falls in the sum of probabilities."""
        copies, length = batch.views[0].copies, self.student.encoder.features.length
        drawn = random.uniform([random.key(key, "sample") for key in batch.keys], (copies, length), logits.device)
        total = at_least_fp32(logits).softmax(-1).cumsum(-1)
        level = drawn.flatten(0, 1).gather(1, places)[..., None].to(total.dtype) * total[..., -1:]
        return torch.searchsorted(total, level, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)

    def terms(self, batch: Batch) -> Tensor:
        """Tokens that are not padding."""
        (view,) = batch.views
        real = torch.ones_like(view.x) if view.pad is None else ~view.pad
        return real.sum() * view.copies
