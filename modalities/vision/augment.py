"""The crops and colours of the joint-embedding papers: published policies, and the keyed draws that carry them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from mmssl.crops import listed
from mmssl.random import generator
from modalities.vision.pixels import (
    blur,
    brightness,
    contrast,
    cut_out,
    floats,
    gradients,
    grey,
    hue,
    noise,
    saturation,
    solarize,
)

Step = Literal["flip", "jitter", "grey", "blur", "solarize"]
FLIP_FIRST: tuple[Step, ...] = ("flip", "jitter", "grey", "blur", "solarize")
FLIP_LAST: tuple[Step, ...] = ("jitter", "grey", "blur", "solarize", "flip")
GREY_FIRST: tuple[Step, ...] = ("grey", "jitter", "blur", "solarize", "flip")
UNCHANGED = (1.0, 1.0, 1.0, 0.0)
UNCUT = (0.0, 0.0, 0.0)
SINGLE = ("flip", "grey", "blur", "solarize", "rotation", "noise", "sobel")  # what one number tells of a change
RECORD = {"box": 4, "colour": 4, "sequence": 4, "cutout": 3} | dict.fromkeys(SINGLE, 1)  # what is told of a crop, in how many
COLOURS = (brightness, contrast, saturation, hue)


@dataclass(frozen=True)
class Crop:
    """Crops of one kind: what is cut from an image, and with which chance it is changed in which way.

    The steps of `order` come first, then rotation and noise, and after normalisation cutout and Sobel. These four complete the
    transformations of arXiv:2002.05709 (Figures 4 and 5); no published policy uses them.
    """

    count: int = 1
    size: int | None = None  # pixels; model.image_size if unset
    scale: tuple[float, float] = (0.08, 1.0)  # of the image's area
    aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width : height
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation; hue in turns
    jitter_chance: float = 0.8
    grey: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels, whatever the size of the crop
    solarize: float = 0.0
    order: tuple[Step, ...] = FLIP_FIRST  # after the crop
    rotate: float = 0.0  # by 90, 180 or 270 degrees, each as likely; 0.75 makes all four directions so
    noise: float = 0.0
    noise_std: float = 0.1  # of the range of a pixel
    cutout: float = 0.0
    cutout_side: float = 0.5  # of the view's side; that of arXiv:1708.04552 for CIFAR-10
    sobel: float = 0.0

    __pydantic_config__: ClassVar = {"extra": "forbid", "allow_inf_nan": False}


_SIMCLR = Crop(2, 224, jitter=(0.8, 0.8, 0.8, 0.2), grey=0.2, blur=0.5)
_MOCO = Crop(2, 224, (0.2, 1.0), interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5, order=FLIP_LAST)
_MOCO1 = replace(_MOCO, jitter=(0.4, 0.4, 0.4, 0.4), jitter_chance=1.0, blur=0.0, order=GREY_FIRST)
_BYOL = Crop(1, 224, jitter=(0.4, 0.4, 0.2, 0.1), grey=0.2)
_SWAV = replace(_SIMCLR, interpolation="bilinear")
_LOCAL = replace(_BYOL, size=96, blur=0.5)  # of DINO
_SOLO = Crop(2, 32, jitter=(0.8, 0.8, 0.8, 0.2), grey=0.2, order=FLIP_LAST)  # solo-learn's, which flips last and is bicubic
_SOLO_BYOL = replace(_SOLO, jitter=(0.4, 0.4, 0.2, 0.1))


def _uneven(crop: Crop, blur: tuple[float, float] = (1.0, 0.1)) -> tuple[Crop, Crop]:
    """The two policies of BYOL, always the first for the first view: the second is solarised, and seldom blurred."""
    crop = replace(crop, count=1)
    return replace(crop, blur=blur[0]), replace(crop, blur=blur[1], solarize=0.2)


# Sizes are those of the paper; `policy` scales them to the model's. Where paper and authors' code differ, this is the code.
POLICIES: dict[str, tuple[Crop, ...]] = {
    "simclr": (_SIMCLR,),  # arXiv:2002.05709, strength 1
    "instdisc": (replace(_MOCO1, count=1),),  # arXiv:1805.01978, whose policy MoCo v1 took over
    "moco1": (_MOCO1,),  # arXiv:1911.05722
    "moco2": (_MOCO,),  # arXiv:2003.04297, and SimSiam
    "mocov3": _uneven(replace(_BYOL, interpolation="bilinear", order=FLIP_LAST)),  # arXiv:2104.02057, vision transformers
    "mocov3-resnet": _uneven(replace(_BYOL, scale=(0.2, 1.0), interpolation="bilinear", order=FLIP_LAST)),
    "byol": _uneven(_BYOL),  # arXiv:2006.07733, and Barlow Twins, VICReg
    "swav": (replace(_SWAV, scale=(0.14, 1.0)), replace(_SWAV, count=6, size=96, scale=(0.05, 0.14))),  # arXiv:2006.09882
    "swav-160": (replace(_SWAV, size=160), replace(_SWAV, count=4, size=96, scale=(0.05, 0.14))),
    "swav-two-crop": (_SWAV,),
    "dino": (*_uneven(replace(_BYOL, scale=(0.4, 1.0))), replace(_LOCAL, count=8, scale=(0.05, 0.4))),  # arXiv:2104.14294
    "dino-800": (*_uneven(replace(_BYOL, scale=(0.25, 1.0))), replace(_LOCAL, count=10, scale=(0.05, 0.25))),  # ViT-S, epochs
    "dino-resnet": (*_uneven(replace(_BYOL, scale=(0.14, 1.0))), replace(_LOCAL, count=6, scale=(0.05, 0.14))),
    "dino-two-crop": _uneven(replace(_BYOL, scale=(0.14, 1.0))),
    "deepcluster": (Crop(1, 224, interpolation="bilinear"),),  # arXiv:1807.05520
    # 32 pixels
    "simclr-cifar": (Crop(2, 32, jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2),),  # SimCLR's code, strength 0.5, no blur
    "moco-cifar": (Crop(2, 32, interpolation="bilinear", jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2),),  # MoCo's notebook
    "symmetric": (replace(_SOLO, blur=0.5),),  # SimCLR, SwAV, DeepCluster v2
    "symmetric-weak": (replace(_SOLO, jitter=(0.4, 0.4, 0.4, 0.1), blur=0.5),),  # MoCo v2, SimSiam
    "asymmetric": _uneven(_SOLO_BYOL, blur=(0.0, 0.0)),  # BYOL, Barlow Twins, DINO, MoCo v3
    "vicreg-cifar": (replace(_SOLO_BYOL, scale=(0.2, 1.0), solarize=0.1),),
}


def policy(name: str, image_size: int, patch_size: int = 1) -> list[Crop]:
    """The crops of a published policy for images of another size: smaller crops in proportion, in whole patches.

    Raises: ValueError with the nearest name if there is no such policy.
    """
    crops = listed(name, POLICIES)
    published = crops[0].size
    assert published is not None

    def fitted(size: int | None) -> int:
        if size is None or size == published:
            return image_size
        patches = max(1, round(image_size * size / published / patch_size))
        return min(patches, image_size // patch_size - 1) * patch_size

    return [replace(crop, size=fitted(crop.size)) for crop in crops]


def check_crop(crop: Crop, key: str, image_size: int, patch_size: int = 1) -> None:
    """Raises: ValueError that begins with `key.` and the option that is wrong."""
    size = image_size if crop.size is None else crop.size
    if not 1 <= crop.count <= 64:
        raise ValueError(f"{key}.count: {crop.count}, must be between 1 and 64")
    if not 1 <= size <= image_size or size % patch_size:
        raise ValueError(
            f"{key}.size: {size} pixels, must be between 1 and model.image_size={image_size}, in whole patches of {patch_size}"
        )
    check_box(crop.scale, crop.aspect, f"{key}.")
    for name in ("flip", "jitter_chance", "grey", "blur", "solarize", "rotate", "noise", "cutout", "sobel"):
        if not 0 <= getattr(crop, name) <= 1:
            raise ValueError(f"{key}.{name}: {getattr(crop, name)}, must be a probability")
    if min(crop.jitter) < 0 or crop.jitter[3] > 0.5:
        raise ValueError(f"{key}.jitter: {crop.jitter}, must be at least 0, and hue at most 0.5 turns")
    if not 0 < crop.blur_sigma[0] <= crop.blur_sigma[1]:
        raise ValueError(f"{key}.blur_sigma: {crop.blur_sigma}, must be two widths with 0 < smallest <= largest")
    for name in ("noise_std", "cutout_side"):
        if not 0 < getattr(crop, name) <= 1:
            raise ValueError(f"{key}.{name}: {getattr(crop, name)}, must be above 0 and at most 1")
    if sorted(crop.order) != sorted(FLIP_FIRST):
        raise ValueError(f"{key}.order: {', '.join(crop.order)}; must name each of {', '.join(FLIP_FIRST)} once")


def check_box(scale: Sequence[float], aspect: Sequence[float], prefix: str = "") -> None:
    """Raises: ValueError if no crop can have such areas and shapes."""
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"{prefix}scale: {scale}, must be two areas with 0 < smallest <= largest <= 1")
    if not 0 < aspect[0] <= aspect[1]:
        raise ValueError(f"{prefix}aspect: {aspect}, must be two ratios width : height with 0 < smallest <= largest")


class Change(NamedTuple):
    """What is done to one crop after it was cut."""

    flip: bool = False
    colour: tuple[float, ...] = UNCHANGED  # factors of brightness, contrast and saturation; hue in turns
    sequence: tuple[int, ...] = (0, 1, 2, 3)  # in which these four come
    grey: bool = False
    blur: float = 0.0  # sigma in pixels; 0 = none
    solarize: bool = False
    rotation: int = 0  # quarter turns counter-clockwise
    noise: float = 0.0  # standard deviation as a share of the range; 0 = none
    noise_seed: int = 0
    cutout: tuple[float, float, float] = UNCUT  # centre x, y and side as shares of the view's side; side 0 = none
    sobel: bool = False

    @classmethod
    def drawn(cls, crop: Crop, draw: torch.Generator) -> Change:
        """A change of that kind. It takes as many numbers from the generator whatever the crop's options are."""
        u = torch.rand(10, generator=draw, dtype=torch.float64).tolist()
        sequence = tuple(torch.randperm(4, generator=draw).tolist())
        chances = (crop.flip, crop.jitter_chance, crop.grey, crop.blur, crop.solarize)
        flip, jitter, grey, blur, solarize = (x < chance for x, chance in zip(u, chances))
        *factors, hue = crop.jitter
        ranges = [(max(0.0, 1 - f), 1 + f) for f in factors] + [(-hue, hue)]
        colour = tuple(low + (high - low) * x for (low, high), x in zip(ranges, u[5:9]))
        thin, wide = crop.blur_sigma
        change = cls(
            flip, colour if jitter else UNCHANGED, sequence, grey, thin + (wide - thin) * u[9] if blur else 0.0, solarize
        )
        chances = (crop.rotate, crop.noise, crop.cutout, crop.sobel)
        if not any(chances):
            return change
        # Masks are drawn next from `draw`: a second generator, keyed by the numbers so far, leaves them where they are.
        second = generator("more", str(u))
        *more, turn, across, down = torch.rand(7, generator=second, dtype=torch.float64).tolist()
        rotate, noise, cutout, sobel = (x < chance for x, chance in zip(more, chances))
        return change._replace(
            rotation=1 + int(3 * turn) if rotate else 0,
            noise=crop.noise_std if noise else 0.0,
            noise_seed=int(torch.randint(2**62, (), generator=second)) if noise else 0,
            cutout=(across, down, crop.cutout_side) if cutout else UNCUT,
            sobel=sobel,
        )

    def applied(self, pixels: Tensor, order: Sequence[Step] = FLIP_FIRST) -> Tensor:
        """The changed image; what follows normalisation is left to `finished`.

        Args:
            pixels: (C, H, W) from 0 to 255, of any type; of `read` or `cut`, or of three channels or one.
        Returns: (C, H, W) float32 from 0 to 255, not rounded.
        """
        # Flipped here wherever that stands in `order`: no other step knows left from right.
        x = floats(pixels.flip(-1) if self.flip else pixels)
        for step in order:
            if step == "jitter":
                x = recoloured(x, self.colour, self.sequence)
            elif step == "grey" and self.grey:
                x = grey(x)
            elif step == "blur" and self.blur:
                x = blur(x, self.blur)
            elif step == "solarize" and self.solarize:
                x = solarize(x)
        if self.rotation:
            x = x.rot90(self.rotation, (-2, -1))
        x = x.expand(min(len(pixels), 3), -1, -1).contiguous()  # what is grey has gone through the later steps as one channel
        return noise(x, self.noise, generator("noise", self.noise_seed)) if self.noise else x

    def finished(self, x: Tensor) -> Tensor:
        """The normalised view (C, H, W) with its square cut out, then as gradients."""
        if self.cutout[2]:
            x = cut_out(x, *self.cutout)
        return gradients(x) if self.sobel else x

    def numbers(self) -> list[float]:
        """What is told of it, in the order of `RECORD`, whose box comes first."""
        return [*self.colour, *self.sequence, *self.cutout, *(getattr(self, name) for name in SINGLE)]


def told(numbers: Tensor) -> dict[str, Tensor]:
    """What the numbers of crops mean, which workers pass on as one tensor each.

    Args:
        numbers: (B, 22) float32: the box and `Change.numbers` of each.
    Returns: box (B, 4), left, top, width and height as shares of the image; colour (B, 4), sequence (B, 4), cutout (B, 3);
        flip, grey, blur, solarize, rotation from 0 to 3, noise and sobel, (B,) each.
    """
    parts = numbers.split([*RECORD.values()], dim=1)
    return {name: part.squeeze(1).contiguous() for name, part in zip(RECORD, parts, strict=True)}


def recoloured(x: Tensor, colour: Sequence[float], sequence: Sequence[int]) -> Tensor:
    """Brightness, contrast, saturation and hue changed in that sequence, in place; grey images have neither of the last two."""
    for i in sequence:
        if colour[i] != UNCHANGED[i]:
            x = COLOURS[i](x, colour[i])
    return x
