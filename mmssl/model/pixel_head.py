"""What says pixels: of each token, or of a whole image; and what tells whether somebody made them up."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmssl.model.encoder import Encoder
from mmssl.model.heads import mlp


def pixel_features(encoder: Any, name: str) -> Any:
    """The feature encoder of images whose pixels a method `name` rebuilds.

    Raises: ValueError if it has no such pixels.
    """
    if not isinstance(encoder, Encoder):
        raise ValueError(f"model.backbone: {name} rebuilds the pixels of patches; leave it out")
    if not hasattr(encoder.features, "patch_size"):
        raise ValueError(f"data.modality: {encoder.modality} has no pixels that {name} could rebuild; take vision")
    if encoder.features.palette is not None:
        raise ValueError(f"model.palette: {name} rebuilds pixels, not which colour of a palette they have; set it to 0")
    return encoder.features


def pixel_head(features: Any, layers: int = 3) -> nn.Sequential:
    """(B, L, D) -> (B, L, n) the values of each patch: linear layers as wide as the tokens, each with GELU, and a linear one.

    Source: of three layers the head of GMML and SiT, whose transposed convolution is that last linear layer. Departs from
    the authors' code in the start: as torch has it, which is their 0.02 for tokens 768 wide, and more for narrow ones.
    """
    return mlp(*(features.dim,) * (layers + 1), features.raw_width, norm=False, activation="gelu")


@dataclass(frozen=True)
class ImageDecoderOptions:
    """Shape of a decoder of whole images."""

    dim: int = 512  # channels where it begins, halved with each doubling of the sides
    least: int = 32  # channels at the end, as long as `dim` is not below

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


class ImageDecoder(nn.Module):
    """A vector becomes an image: a linear layer, then sides are doubled and convolved until they have their size.

    Each step is the nearest pixel's copy, 3 x 3 convolution, group norm and GELU. It begins with the smallest square that is
    doubled to the image, of at least 4 pixels a side.
    """

    def __init__(self, width: int, size: int, channels: int, options: ImageDecoderOptions):
        """Raises: ValueError that begins with the option that is wrong.

        Args:
            width: of the vector.  size: of the image, pixels.
        """
        super().__init__()
        if options.dim < 1 or options.least < 1 or options.dim > 1 << 14:
            raise ValueError(f"decoder: dim {options.dim} and least {options.least}, must be at least 1 and at most 16384")
        self.side, steps = size, 0
        while self.side % 2 == 0 and self.side >= 8:
            self.side, steps = self.side // 2, steps + 1
        if self.side > 16:
            raise ValueError(
                f"model.image_size: {size}, the decoder doubles sides and would begin with {self.side} pixels; take a size "
                "that can be halved more often, such as 32, 96, 128 or 224"
            )
        widths = [max(options.dim // 2**i, min(options.least, options.dim)) for i in range(steps + 1)]
        self.start = nn.Linear(width, widths[0] * self.side**2)
        self.steps = nn.Sequential(*(nn.Sequential(nn.Upsample(scale_factor=2), *_conv(a, b)) for a, b in pairwise(widths)))
        self.out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, D) -> (B, C, H, W)."""
        return self.out(self.steps(self.start(z).unflatten(1, (-1, self.side, self.side))))


def _conv(a: int, b: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(a, b, 3, padding=1, bias=False), nn.GroupNorm(_groups(b), b), nn.GELU()


def _groups(width: int) -> int:
    """At most 8, of several channels each: the mean of a single one would be lost."""
    return next((count for count in (8, 4, 2) if width % count == 0 and width >= 4 * count), 1)


class Critic(nn.Module):
    """(B, C, H, W) -> (B,) logits, high for an image that is real. Each image is judged by itself, whatever its batch.

    Convolutions of stride 2 with group norm and leaky ReLU, as in DCGAN (arXiv:1511.06434) but for its batch norm.
    """

    def __init__(self, size: int, channels: int, width: int):
        """width: channels of the first layer, doubled with each of the others, up to eightfold."""
        super().__init__()
        layers: list[nn.Module] = []
        before, after = channels, width
        while size > 4:
            norm = nn.GroupNorm(_groups(after), after) if layers else nn.Identity()
            layers += [nn.Conv2d(before, after, 4, 2, 1, bias=not layers), norm, nn.LeakyReLU(0.2)]
            before, after, size = after, min(2 * after, 8 * width), size // 2
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(before * size**2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Judge."""
        return self.head(self.layers(x).flatten(1)).squeeze(1)


def reverse_gradient(x: Tensor, scale: float) -> Tensor:
    """x itself, towards which a loss is raised instead of lowered: its gradient is turned round and multiplied by `scale`.

    Two players in one pass: what comes after this lowers a loss, what comes before raises `scale` times the same loss. No
    parameter is held constant or read outside of its module, so this works where parameters are sharded.

    Source: arXiv:1505.07818, section 4.2.
    """
    return _Reverse.apply(x, scale)  # type: ignore[return-value]


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return -ctx.scale * upstream, None
