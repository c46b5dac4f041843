"""Context autoencoders."""

from __future__ import annotations

import torch

from mmssl import losses
from mmssl.methods.method import AtLeast0, Method, Normal, check_raw, masked_share
from mmssl.model.encoder import Encoder
from mmssl.model.positions import take_at
from mmssl.model.regressor import LatentRegressor, RegressorOptions
from mmssl.parts import Network
from mmssl.parts.tokenizer import CodeTargets, TokenizerOptions, tokenizer_of
from mmssl.types import Batch, Clock, StepOutput


class CAE(CodeTargets, Method):
    """Chen et al. 2022, arXiv:2202.03026: regress how the encoder would see the hidden patches, and say their codes from that.

    Latents of hidden patches come from the encoder as it is, which sees them alone, without gradient. The tokenizer is that of
    `beit` (departs from the paper, as there).
    """

    paper, family, modalities, coverage = "arXiv:2202.03026", "masked", ("vision",), (89,)
    masks = drops = True
    normal = (
        Normal("code_use", 0.02, "few codes stand for most patches; try method.tokenizer.codes of a quarter"),
        Normal("target_std", 0.05, "collapsed: all hidden patches have the same latent; lower method.alignment"),
    )

    def __init__(
        self,
        encoder: Encoder,
        regressor: RegressorOptions = RegressorOptions(),
        tokenizer: TokenizerOptions = TokenizerOptions(),
        alignment: AtLeast0 = 2.0,
    ):
        super().__init__()
        check_raw(encoder, ids=False)
        self.student = Network(encoder=encoder)
        self.tokenizer = tokenizer_of(encoder.features, tokenizer)
        self.regressor = LatentRegressor(encoder.dim, tokenizer.codes, encoder.features.grid, regressor)
        self.alignment = alignment

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Latents and codes of what is hidden."""
        (view,), encoder = batch.views, self.student.encoder
        if view.mask is None or not view.mask.count:
            raise ValueError("views.mask: cae needs masks that hide as many patches in each row, such as kind=rectangle")
        codes = take_at(self.tokenizer(encoder.features.raw(view.x)), view.mask.rest)  # (M*B, n)
        visible = encoder(view, view.mask)  # tokens (M*B, L_visible, D)
        with torch.no_grad():
            target = encoder(view, view.mask.complement()).tokens  # (M*B, n, D), in the order of `rest`
        latents, logits = self.regressor(visible.tokens, view.mask)
        terms = {"codes": losses.masked_cross_entropy(logits, codes)}
        if self.alignment:
            terms["alignment"] = self.alignment * losses.masked_patch_mse(latents, target, None)
        health = {
            "code_use": self.tokenizer.use(codes),
            "target_std": losses.token_std(target),
            "latent_std": losses.token_std(latents),
            "masked_share": masked_share(view),
        }
        pooled = encoder.pool(visible).detach().unflatten(0, (len(batch.index), -1)).mean(1)  # (B, D)
        return StepOutput(terms, health, pooled)
