"""Discrete codes of patches, from a tokenizer that training leaves alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmssl.distributed import all_sum
from mmssl.parts import dvae
from mmssl.parts.kmeans import draw_rows, kmeans
from mmssl.parts.part import Part
from mmssl.parts.queue import keyed_rows
from mmssl.random import generator
from mmssl.types import Clock, View

if TYPE_CHECKING:
    from mmssl.parts.network import Network

BLOCK = 1 << 24  # similarities held at once


@dataclass(frozen=True)
class TokenizerOptions:
    """How patches become codes."""

    kind: Literal["kmeans", "dvae", "random"] = "kmeans"  # clusters of patches, an autoencoder trained on the data, or chance
    codes: int = 8192
    dim: int = 16  # of random: width of the projection
    iterations: int = 20  # of kmeans
    patches: int = 200_000  # of kmeans: drawn from all samples, at least one from each
    width: int = 128  # of dvae: channels of its convolutions
    updates: int = 2000  # of dvae: before the first pass
    batch: int = 64  # of dvae: images of an update
    kl: float = 1e-3  # of dvae: weight of the divergence from codes used evenly, in nats a patch
    memory: float = 4.0  # of dvae: GiB that all images may take, on each rank

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


class Tokenizer(Part):
    """(B, L, n) raw values of patches, each brought to mean 0 and variance 1, to the number of the nearest of K codes, (B, L).

    By k-means, codes are centroids of patches of the data, fitted before the first pass. By chance they are Gaussian directions
    of length 1, and patches are compared with them after a Gaussian projection (arXiv:2202.01855, section 3.1). Both are
    buffers. They stand in for the learned tokenizer of arXiv:2106.08254; `AutoencoderTokenizer` is one.
    """

    codes: Tensor
    projection: Tensor

    def __init__(self, width: int, options: TokenizerOptions):
        """width: n, values of a patch. Raises: ValueError that begins with the option that is wrong."""
        super().__init__()
        if not 2 <= options.codes <= 1 << 17:
            raise ValueError(f"tokenizer.codes: {options.codes}, must be between 2 and {1 << 17}")
        if min(options.dim, options.iterations, options.patches) < 1:
            raise ValueError("tokenizer: dim, iterations and patches must be at least 1")
        if options.kind == "dvae" and (min(options.width, options.updates, options.batch) < 1 or options.kl < 0):
            raise ValueError("tokenizer: width, updates and batch must be at least 1, kl at least 0")
        self.options, self.each, self.seed = options, 1, 0
        self._build(width, options)

    def _build(self, width: int, options: TokenizerOptions) -> None:
        random = options.kind == "random"
        self.register_buffer("codes", keyed_rows(options.codes, options.dim if random else width, "tokenizer"))
        draw = generator("tokenizer", "projection")
        self.register_buffer("projection", torch.randn(width, options.dim, generator=draw, device="cpu") if random else None)

    def attach(self, samples: int, length: int, seed: int) -> None:
        """Told the size of the data, in samples of that many patches. Raises: ValueError if codes outnumber patches."""
        count = self.options.codes
        if samples * length < count:
            raise ValueError(f"tokenizer.codes: {count}, the data hold {samples * length} patches; use fewer codes")
        self.each = min(length, math.ceil(max(self.options.patches, count) / samples))
        self.seed = seed

    @torch.no_grad()
    def sample(self, patches: Tensor) -> Tensor:
        """(B, L, n) to (B, m*n): some patches of each sample to fit codes to.

        A checksum of the sample says where they begin, so that they come from everywhere, and are the same on any number of
        ranks.
        """
        start = patches.float().contiguous().view(torch.int32).long().flatten(1).sum(1)  # exact in any order
        length = patches.shape[1]
        step = torch.arange(self.each, device=patches.device) * (length // self.each)
        places = (start[:, None] + step) % length
        return patches.gather(1, places[..., None].expand(-1, -1, patches.shape[2])).flatten(1)

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        """Codes from `sample` of all samples, (N, m*n), the same on all ranks."""
        rows = _normalised(rows.unflatten(1, (self.each, -1)).flatten(0, 1))
        draw = generator(self.seed, "tokenizer")
        count, most = self.options.codes, max(self.options.patches, self.options.codes)
        if len(rows) > most:
            rows = draw_rows(rows, most, draw)
        self.codes.copy_(kmeans(rows, draw_rows(rows, count, draw), draw, self.options.iterations).centroids)

    @torch.no_grad()
    def forward(self, patches: Tensor) -> Tensor:
        """Codes, int64, without gradient."""
        with torch.autocast(patches.device.type, enabled=False):
            rows, codes = _normalised(patches.flatten(0, 1)).to(self.codes.dtype), self.codes
            rows = rows if self.projection is None else rows @ self.projection
            offset = -codes.square().sum(1) / 2  # of equal length by chance
            blocks = rows.split(max(1, BLOCK // len(codes)))
            found = [torch.addmm(offset, block, codes.T).argmax(1) for block in blocks]
        return torch.cat(found).view(patches.shape[:2])

    @torch.no_grad()
    def use(self, found: Tensor) -> Tensor:
        """() how many codes are in use, exp of the entropy over the tokens of all ranks, as a share of all codes."""
        counts = torch.zeros(self.options.codes, device=found.device, dtype=torch.float64)
        counts.scatter_add_(0, found.flatten(), torch.ones_like(found.flatten(), dtype=torch.float64))
        counts = all_sum(counts)
        return (torch.special.entr(counts / counts.sum()).sum().exp() / len(counts)).float()


class AutoencoderTokenizer(Tokenizer):
    """Codes of a small discrete autoencoder that is trained on all images before the first pass; its weights are buffers.

    Unlike the other codes they depend on neighbouring patches, and can be decoded.
    """

    error: Tensor

    def __init__(self, width: int, options: TokenizerOptions, grid: tuple[int, int]):
        """grid: rows and columns of patches."""
        self.grid = grid
        super().__init__(width, options)

    def _build(self, width: int, options: TokenizerOptions) -> None:
        self.net: Any = dvae.frozen(dvae.DVAE(width, options.codes, options.width, self.grid))
        self.values = width
        self.register_buffer("error", torch.ones(()))

    def attach(self, samples: int, length: int, seed: int) -> None:
        """Told the size of the data. Raises: ValueError if the images take more memory than they may."""
        size = samples * length * self.values * 4 / 2**30
        if size > self.options.memory:
            raise ValueError(
                f"tokenizer.memory: {self.options.memory:g} GiB, the {samples} images take {size:.3g} GiB; raise it, learn "
                "from fewer with data.limit, or take tokenizer.kind=kmeans"
            )
        self.each, self.seed = length, seed

    @torch.no_grad()
    def sample(self, patches: Tensor) -> Tensor:
        """(B, L, n) to (B, L*n): all patches of each sample."""
        return patches.flatten(1)

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        """Train on `sample` of all samples, (N, L*n), the same on all ranks."""
        like = next(self.net.buffers())
        images, how = rows.unflatten(1, (self.each, -1)).to(like.dtype), self.options
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
            trained = dvae.DVAE(self.values, how.codes, how.width, self.grid).to(like)
        trained.load_state_dict(self.net.state_dict())
        dvae.train(trained, images, dvae.Training(how.updates, how.batch, how.kl), self.seed)
        self.net.load_state_dict(trained.state_dict())
        some = images[:1024]
        left = (self.decode(self(some)) - some).square().sum() / (some - images.mean(0)).square().sum()
        self.error.copy_(left)

    @torch.no_grad()
    def forward(self, patches: Tensor) -> Tensor:
        """Codes, int64, without gradient."""
        with torch.autocast(patches.device.type, enabled=False):
            blocks = patches.to(next(self.net.buffers()).dtype).split(self._rows(patches))
            return torch.cat([self.net.encode(block).argmax(-1) for block in blocks])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(B, L) codes to what they stand for, (B, L, n)."""
        like = next(self.net.buffers())
        with torch.autocast(codes.device.type, enabled=False):
            blocks = codes.split(self._rows(codes))
            return torch.cat([self.net.decode(F.one_hot(block, self.options.codes).to(like.dtype)) for block in blocks])

    def _rows(self, patches: Tensor) -> int:
        """Images at once."""
        return max(1, BLOCK // (self.options.codes * patches.shape[1]))

    def health(self, clock: Clock) -> dict[str, float]:
        """Variance that codes leave unexplained, as a share of that around the mean image; 1 before training."""
        return {"code_error": float(self.error)}


def tokenizer_of(features: Any, options: TokenizerOptions) -> Tokenizer:
    """The one of that kind, for the patches of an encoder. Raises: ValueError that begins with the option that is wrong."""
    if options.kind == "dvae":
        return AutoencoderTokenizer(features.raw_width, options, features.grid)
    return Tokenizer(features.raw_width, options)


class CodeTargets(nn.Module):
    """What methods have in common that predict the codes of patches: the stage that fits the `tokenizer`."""

    if TYPE_CHECKING:
        tokenizer: Tokenizer
        student: Network

    def attach(self, samples: int, seed: int) -> None:
        """Tell the tokenizer how many patches there are."""
        self.tokenizer.attach(samples, self.student.encoder.features.length, seed)

    def needs_description(self, clock: Clock) -> bool:
        """Before the first pass, if codes are fitted."""
        return self.tokenizer.options.kind != "random" and clock.epoch == 0

    def describe(self, view: View) -> Tensor:
        """(B, m*n) some patches of each sample."""
        return self.tokenizer.sample(self.student.encoder.features.raw(view.x))

    def on_epoch(self, clock: Clock, described: Tensor | None = None) -> None:
        """Fit the tokenizer."""
        method: Any = super()
        method.on_epoch(clock, described)
        if described is not None:
            self.tokenizer.fit(described)


def _normalised(patches: Tensor) -> Tensor:
    """(N, n), each row to mean 0 and variance 1, at least fp32."""
    patches = patches if patches.dtype == torch.float64 else patches.float()
    return F.layer_norm(patches, patches.shape[-1:])
