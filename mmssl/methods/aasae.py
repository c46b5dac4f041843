"""AASAE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmssl import losses, random
from mmssl.losses.generative import gaussian_kl
from mmssl.methods.method import AtLeast0, AtLeast1, Method, Normal
from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp
from mmssl.model.pixel_head import ImageDecoder, ImageDecoderOptions, pixel_features
from mmssl.parts import Network
from mmssl.types import Batch, Clock, Rebuilt, StepOutput


class LogScale(nn.Module):
    """Twice the log of the standard deviation of pixels, a module of its own, because it may be sharded."""

    def __init__(self, start: float):
        super().__init__()
        self.value = nn.Parameter(torch.full((1,), start))

    def forward(self) -> Tensor:
        """()."""
        return self.value.squeeze(0)


class AASAE(Method):
    """Falcon et al. 2021, arXiv:2107.12329: a code of an augmented view, with noise, becomes the image without augmentation.

    The first view is that image, the second one is augmented.
    """

    paper, family, modalities, coverage = "arXiv:2107.12329", "masked", ("vision",), (95,)
    views = 2
    normal = (Normal("prediction_std", 0.02, "collapsed: the same image is said of every view"),)

    def __init__(
        self,
        encoder: Encoder,
        hidden: AtLeast1 = 512,
        dim: AtLeast1 = 128,
        decoder: ImageDecoderOptions = ImageDecoderOptions(),
        kl_weight: AtLeast0 = 0.0,
        log_scale: float = 0.0,
        learn_scale: bool = False,
    ):
        """
        Args:
            dim: of the code.
            log_scale: twice the log of the standard deviation of pixels around what the decoder says.
            learn_scale: begin with `log_scale`, and train it.
        """
        super().__init__()
        features = pixel_features(encoder, "aasae")
        if not -20 <= log_scale <= 20:
            raise ValueError(f"log_scale: {log_scale}, must be between -20 and 20")
        self.student = Network(encoder=encoder)
        self.mean, self.log_variance = (mlp(encoder.dim, hidden, dim, bias=False) for _ in range(2))
        self.decoder = ImageDecoder(dim, features.image_size, features.channels, decoder)
        self.scale = LogScale(log_scale) if learn_scale else None
        self.kl_weight, self.log_scale = kl_weight, log_scale

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Likelihood of the image, which is a sum over its pixels."""
        plain, augmented = batch.views
        h = self.student.embed(augmented)
        mean, log_variance = self.mean(h), self.log_variance(h)  # (B, dim)
        spread = (log_variance / 2).exp()
        noise = random.normal([random.key(key, "code") for key in batch.keys], mean.shape[1:], mean)
        guess = self.decoder(mean + spread * noise)
        scale = self.log_scale if self.scale is None else self.scale()
        terms = {"unlikely": -losses.gaussian_log_likelihood(guess, plain.x, scale)}
        if self.kl_weight:
            terms["kl"] = self.kl_weight * gaussian_kl(mean, log_variance)
        # Of single pixels over images: one picture of the mean hardly differs between images, but between its places.
        health = {
            "prediction_std": losses.token_std(guess.flatten(1)[:, None]),
            "code_std": losses.token_std(mean[:, None]),
            "noise": spread.detach().mean(),
        }
        return StepOutput(terms, health, h.detach())

    def rebuild(self, batch: Batch, clock: Clock) -> Rebuilt:
        """The image without augmentation, from the mean of its augmented view's code."""
        plain, augmented = batch.views
        raw = self.student.encoder.features.raw
        truth = raw(plain.x)
        guess = raw(self.decoder(self.mean(self.student.embed(augmented))))
        hidden = torch.ones(truth.shape[:2], dtype=torch.bool, device=truth.device)
        return Rebuilt(truth, guess.to(truth.dtype), hidden, raw(augmented.x))
