"""SplitMask."""

from __future__ import annotations

from torch import Tensor, nn

from mmssl import losses
from mmssl.methods.method import Above0, AtLeast0, Method, Normal, check_raw, masked_share
from mmssl.model.encoder import Encoder, init_linear
from mmssl.model.positions import take_at
from mmssl.model.token_decoder import TokenDecoder, TokenDecoderOptions
from mmssl.parts import Network
from mmssl.parts.tokenizer import CodeTargets, TokenizerOptions, tokenizer_of
from mmssl.types import Batch, Clock, StepOutput

SHALLOW = TokenDecoderOptions(dim=384, depth=2, heads=6)


class SplitMask(CodeTargets, Method):
    """El-Nouby et al. 2021, arXiv:2112.10740: each half of an image says the codes of the other, and finds it in the batch.

    Halves are compared by the mean of what the decoder says of the other half before its codes. The tokenizer is that of
    `beit`; the paper's small ones are of both its kinds.
    """

    paper, family, modalities, coverage = "arXiv:2112.10740", "masked", ("vision",), (88,)
    masks = drops = True
    normal = (
        Normal("code_use", 0.02, "few codes stand for most patches; try method.tokenizer.codes of a quarter"),
        Normal("unit_std", 0.1, "collapsed: halves hardly differ between images"),
    )

    def __init__(
        self,
        encoder: Encoder,
        decoder: TokenDecoderOptions = SHALLOW,
        tokenizer: TokenizerOptions = TokenizerOptions(),
        contrast: AtLeast0 = 1.0,
        temperature: Above0 = 0.2,
    ):
        super().__init__()
        check_raw(encoder, ids=False)
        self.student = Network(encoder=encoder)
        self.tokenizer = tokenizer_of(encoder.features, tokenizer)
        self.decoder = TokenDecoder(encoder.dim, None, encoder.features.grid, decoder)
        self.head = nn.Linear(decoder.dim, tokenizer.codes)
        self.head.apply(init_linear)
        self.contrast, self.temperature = contrast, temperature

    def check_batch(self, samples: int) -> list[str]:
        """Other images are the negatives."""
        if self.contrast and samples < 2:
            raise ValueError("train.global_batch: a micro-batch of 1 sample has no negatives; take at least 2 (of all ranks)")
        return super().check_batch(samples)

    def forward(self, batch: Batch, clock: Clock) -> StepOutput:
        """Both halves, each from the other."""
        (view,), encoder, samples = batch.views, self.student.encoder, len(batch.index)
        if view.mask is None or not view.mask.count:
            raise ValueError("views.mask: splitmask needs masks that hide as many patches in each row, such as kind=rectangle")
        features = encoder.local(view.x)  # (B, L, D), shared by the halves
        codes = self.tokenizer(encoder.features.raw(view.x))  # (B, L)
        terms: list[Tensor] = []
        halves: list[Tensor] = []  # each (B, d)
        embedded: list[Tensor] = []
        for mask in (view.mask, view.mask.complement()):
            seen = encoder.contextualize(features, mask)
            said = self.decoder(seen, mask)  # (M*B, n, d)
            terms.append(losses.masked_cross_entropy(self.head(said), take_at(codes, mask.rest)))
            halves.append(said.mean(1).unflatten(0, (samples, -1)).mean(1))
            embedded.append(encoder.pool(seen).detach().unflatten(0, (samples, -1)).mean(1))
        found = {"codes": terms[0] + terms[1]}
        if self.contrast:
            one, other = halves
            both = [losses.in_batch_info_nce(a, b, self.temperature) for a, b in ((one, other), (other, one))]
            found["halves"] = self.contrast * (both[0] + both[1]) / 2
        health = {
            "code_use": self.tokenizer.use(codes),
            "unit_std": losses.unit_std(halves[0].detach()),
            "masked_share": masked_share(view),
        }
        return StepOutput(found, health, (embedded[0] + embedded[1]) / 2)
