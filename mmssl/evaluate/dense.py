"""How well a linear classifier on the tokens of single patches segments images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmssl import random
from mmssl.config import DataOptions
from mmssl.data.sources import Source, open_source, splits
from mmssl.errors import RecipeError
from mmssl.evaluate.features import BATCH, Loaded, PlainSet
from mmssl.evaluate.linear import logistic
from mmssl.evaluate.protocols import Rows
from mmssl.registry import Modality, Views
from mmssl.types import Batch, Rejected

IMAGES, MASKS = "images", "masks"
IGNORE = 255  # of a mask: not labelled
AT_ONCE = 64  # images whose pixels are classified at once


@dataclass(frozen=True)
class Dense:
    """Logistic regression on standardised tokens, each with the class of most of its pixels; what it says of patches is made
    as large as the mask bilinearly, as in arXiv:2304.07193. Departs from papers: no gradient descent and no views.
    """

    patches: int = 20_000  # of all training images that it learns from at most
    c: float = 1.0  # inverse strength of the penalty


def open_masked(path: str, kind: Modality, views: Views, samples: int, train: str, test: str) -> tuple[Loaded, Loaded]:
    """Images that have a mask: those learned from, and those of the test split or a keyed tenth.

    Args:
        path: folder with `images` and `masks`, in which files have the same names, masks as PNG; both may hold splits.
        samples: of each split at most.
    Raises: RecipeError if there is no such folder, or a split has no masked image.
    """
    folder = Path(path)
    if kind.segments is None:
        raise RecipeError(f"protocol: dense takes images, and the model takes {kind.name}.")
    if not all((folder / name).is_dir() for name in (IMAGES, MASKS)):
        raise RecipeError(f"data: {path} has not both {IMAGES}/ and {MASKS}/ (PNG files of the same names), which dense wants.")
    where = DataOptions.model_validate({"path": str(folder / IMAGES), "modality": kind.name})
    there = splits(where, kind)

    def opened(split: str) -> tuple[Source, list[int]]:
        source = open_source(where, kind, split)
        found = [i for i in range(source.size) if mask_of(source, i).is_file()]
        if not found:
            raise RecipeError(f"data: no image of {source.root} has a mask, such as {mask_of(source, 0)}.")
        return source, [found[i] for i in random.permutation(len(found), 0, "dense", split).tolist()]

    def loaded(source: Source, indices: list[int]) -> Loaded:
        return Loaded(PlainSet(source, kind, views, sorted(indices[:samples])), BATCH, 0)

    source, order = opened(train if train in there else there[0] if len(there) == 1 else train)
    if test in there:
        return loaded(source, order), loaded(*opened(test))
    held = max(1, len(order) // 10)
    if len(order) < 2:
        raise RecipeError(f"data: {path} has one image with a mask; one to learn from and one to test with are needed.")
    return loaded(source, order[held:]), loaded(source, order[:held])


def mask_of(source: Source, index: int) -> Path:
    """Where the mask of an image of a folder should be."""
    image = Path(str(source.value(index)))
    place = max(i for i, part in enumerate(image.parts) if part == IMAGES and i < len(Path(str(source.root)).parts))
    return Path(*image.parts[:place], MASKS, *image.parts[place + 1 :]).with_suffix(".png")


def classes_of(part: Loaded, rows: Rows) -> Tensor:
    """(N, H, W) uint8: of each pixel of the embedded images, where the model looks. Raises: RecipeError naming a bad mask."""
    data, found = part.data, []
    assert data.kind.segments is not None
    for index in rows["index"].tolist():
        place = mask_of(data.source, index)
        try:
            classes = data.kind.segments(place, data.kind.decode(data.source.value(index)), data.views)
        except Rejected as error:
            raise RecipeError(f"data: {place}: {error.reason}.") from None
        if int(classes.max()) > IGNORE:
            raise RecipeError(f"data: {place} holds {int(classes.max())}; classes are 0 to 254, and 255 is not labelled.")
        found.append(classes.to(torch.uint8))
    return torch.stack(found)


def with_pixels(run: Any) -> Any:
    """`run`, which gives `tokens`, and beside them `pixels` (B, L, n): what lies under each token."""

    def wrapped(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        found, x = run(batch), Batch.from_tensors(batch).views[0].x
        side = grid_side(found["tokens"].shape[1])
        return found | {"pixels": F.unfold(x, x.shape[-1] // side, stride=x.shape[-1] // side).transpose(1, 2)[:, : side**2]}

    return wrapped


def grid_side(tokens: int) -> int:
    """Of the square of places that tokens are of. Raises: RecipeError if there is none."""
    side = math.isqrt(tokens)
    if side * side != tokens or side < 2:
        raise RecipeError(f"protocol: dense wants tokens of a square of places, 2 x 2 at least; the model gives {tokens}.")
    return side


def majority(classes: Tensor, side: int) -> Tensor:
    """The class of most labelled pixels of each patch, of equals the lower; IGNORE if none is labelled.

    Args:
        classes: (N, H, W) uint8.  side: patches in a row; pixels beyond the last whole patch are left out.
    Returns: (N, side * side) int64.
    """
    height, width = (size // side for size in classes.shape[1:])
    cut = classes[:, : side * height, : side * width].reshape(-1, side, height, side, width)
    patches = cut.transpose(2, 3).flatten(3).flatten(1, 2).long()  # (N, L, pixels)
    known = [number for number in patches.unique().tolist() if number != IGNORE]
    if not known:
        return torch.full(patches.shape[:2], IGNORE)
    counts = torch.stack([(patches == number).sum(2) for number in known])
    return torch.tensor(known)[counts.argmax(0)].masked_fill(counts.sum(0) == 0, IGNORE)


def segmented(
    p: Dense, tokens: Tensor, classes: Tensor, test_tokens: Tensor, test_classes: Tensor, seed: int = 0
) -> dict[str, float]:
    """What a linear classifier makes of test images.

    Args:
        tokens: (N, L, D).  classes: (N, H, W) uint8, IGNORE = not labelled.  test_tokens, test_classes: likewise.
        seed: of the choice of patches.
    Returns: `miou`, mean over the classes that are there, or are said to be, of intersection by union of all test pixels;
        `pixels`, the share of labelled test pixels that are right. 0..1.
    Raises: RecipeError if patches are of one class, features are not finite, or no test pixel is labelled.
    """
    if not all(bool(rows.isfinite().all()) for rows in (tokens, test_tokens)):
        raise RecipeError("protocol: dense: tokens are not finite; the model has diverged, take another checkpoint.")
    side = grid_side(tokens.shape[1])
    labels = majority(classes, side).flatten()
    (known,) = torch.where(labels != IGNORE)
    known = known[random.permutation(len(known), seed, "dense-patches")[: p.patches]]
    if len(labels[known].unique()) < 2:
        raise RecipeError("data: patches of the training images are of one class, and classifying takes two.")
    model = logistic(tokens.flatten(0, 1)[known], labels[known], p.c)
    table = torch.zeros(IGNORE + 1, IGNORE + 1, dtype=torch.int64)  # truth by what was said
    for said, truth in _said(model, test_tokens, test_classes, side):
        pairs = truth[truth != IGNORE].long() * (IGNORE + 1) + said[truth != IGNORE]
        table += pairs.bincount(minlength=table.numel()).view_as(table)
    if not table.sum():
        raise RecipeError("data: no pixel of the test masks is labelled.")
    right, union = table.diagonal().double(), (table.sum(0) + table.sum(1) - table.diagonal()).double()
    return {"miou": float((right / union)[union > 0].mean()), "pixels": float(right.sum() / table.sum())}


def _said(model: Any, tokens: Tensor, classes: Tensor, side: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The class that each pixel is said to be of, and the true one, (n, H, W) each."""
    numbers = torch.from_numpy(model.classes_)
    for x, truth in zip(tokens.split(AT_ONCE), classes.split(AT_ONCE), strict=True):
        logits = torch.from_numpy(model.predict_log_proba(x.flatten(0, 1).double().numpy()))  # (n L, C)
        maps = logits.view(len(x), side, side, -1).permute(0, 3, 1, 2)
        yield numbers[F.interpolate(maps, truth.shape[1:], mode="bilinear", align_corners=False).argmax(1)], truth
