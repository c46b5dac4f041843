"""Masked autoencoders."""

from __future__ import annotations

import torch
from torch import Tensor

from mmssl import losses
from mmssl.methods.method import Method, check_raw, masked_share
from mmssl.model.encoder import Encoder
from mmssl.model.positions import take_at
from mmssl.model.token_decoder import TokenDecoder, TokenDecoderOptions
from mmssl.parts import Network
from mmssl.types import Batch, Clock, Encoded, Rebuilt, StepOutput, View


class MAE(Method):
    """He et al. 2021, arXiv:2111.06377: encode a quarter of the patches, rebuild the others.

    Tokens with an id, as those of text, are rebuilt as a distribution over all ids.
    """

    paper, family, modalities, coverage = "arXiv:2111.06377", "masked", ("vision", "spectrogram", "text"), (23,)
    masks = drops = True

    def __init__(self, encoder: Encoder, decoder: TokenDecoderOptions = TokenDecoderOptions(), normalise: bool = True):
        """normalise: the values of each patch, to mean 0 and variance 1."""
        super().__init__()
        check_raw(encoder)
        self.student = Network(encoder=encoder)
        self.decoder = TokenDecoder(encoder.dim, encoder.features.raw_width, encoder.features.grid, decoder)
        self.normalise = normalise

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """What is hidden from what is visible."""
        (view,), encoder = batch.views, self.student.encoder
        visible, guess, raw = self._guess(view)
        assert view.mask is not None
        hidden = view.mask.hidden.gather(1, view.mask.rest)  # (M*B, n), False at padding
        if raw.is_floating_point():
            loss = losses.masked_patch_mse(guess, raw, hidden, self.normalise)
        else:
            loss = losses.masked_cross_entropy(guess, raw, hidden)
        health = {"prediction_std": losses.token_std(guess), "masked_share": masked_share(view)}
        pooled = encoder.pool(visible).detach().unflatten(0, (len(batch.index), -1)).mean(1)  # (B, D)
        return StepOutput({"rebuilt": loss}, health, pooled)

    def _guess(self, view: View) -> tuple[Encoded, Tensor, Tensor]:
        """The visible tokens, what the decoder says of the others, (M*B, n, raw), and what they are, so or (M*B, n) ids."""
        if view.mask is None:
            raise ValueError("views.mask: mae needs masks")
        encoder = self.student.encoder
        visible = encoder(view, view.mask)  # tokens (M*B, L_visible, D)
        return visible, self.decoder(visible, view.mask, view.pad), take_at(encoder.features.raw(view.x), view.mask.rest)

    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt:
        """Guesses of normalised values get the mean and variance of what they are guesses of."""
        (view,) = batch.views
        _, guess, raw = self._guess(view)
        assert view.mask is not None
        if not raw.is_floating_point():
            guess = guess.argmax(-1)
        elif self.normalise:
            variance, mean = torch.var_mean(raw.float(), -1, keepdim=True)
            guess = guess * (variance + 1e-6).sqrt() + mean
        truth = self.student.encoder.features.raw(view.x).repeat_interleave(view.copies, 0)
        places = view.mask.rest if truth.ndim == 2 else view.mask.rest[..., None].expand(-1, -1, truth.shape[-1])
        return Rebuilt(truth, truth.scatter(1, places, guess.to(truth.dtype)), view.mask.hidden)
