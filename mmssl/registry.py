"""Modalities, found by entry point, so that another package can add one without touching this one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mmssl.errors import RecipeError
from mmssl.types import Rebuilt, View

GROUP = "mmssl.modalities"


class Views(Protocol):
    """Turns a decoded sample into the views that a method sees."""

    ragged: bool  # whether batches differ in length or valid tokens, so that losses must be divided over all of an update
    count: int  # full-size views of a sample
    crops: int  # smaller views that follow them
    longest: int | None  # length of the longest view in the unit of `Source.lengths`; None where all are as long

    def __call__(self, sample: Any, draw: Callable[[int], torch.Generator], length: int | None = None) -> dict[str, Tensor]:
        """Tensors of one sample; `draw(i)` gives the generator of view i.

        `length` is what the shortest sample of the same update has; views that need equal lengths cut to it.
        """
        ...

    def collate(self, samples: Sequence[dict[str, Tensor]]) -> list[View]:
        """Views of a batch."""
        ...

    def finish(self, views: list[View]) -> list[View]:
        """What is left to be done to the views of a batch where the model is; nothing, unless a modality says otherwise."""
        return views

    def plain(self, samples: Sequence[Any]) -> View:
        """The view used for evaluation: no augmentation, no mask; padded where samples differ in length."""
        ...


class Modality(NamedTuple):
    """All the core needs to know of a kind of data."""

    name: str
    features: type[nn.Module]  # features(dim, **options): View.x -> local features; see mmssl/model/encoder.py
    views: Callable[..., Views]  # views(features, **options)
    decode: Callable[[Any], Any]  # a row's value (path, bytes or decoded) -> sample; raises Rejected
    raw: Callable[[Any], Tensor]  # sample -> (n,), the floor of every probe
    columns: tuple[str, ...]  # names under which a table usually holds the data
    suffixes: tuple[str, ...]  # of files in a folder, lower case
    processor: Callable[[Any, Any], Any]  # (config, views) -> the transformers processor to export
    plain_views: Callable[[Any, Any], Views]  # (model, its folder or id) -> the views that model was trained for
    # (source, views, quarantine) -> the source with what must be known of all samples first: lengths, packed blocks
    prepare: Callable[[Any, Any, Any], Any] | None = None
    # (model options, view options) -> the model options that the views decide, such as the size of a vocabulary
    configure: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    # method -> block -> options: what its base recipe for this kind of data sets otherwise than the method's own defaults
    defaults: dict[str, dict[str, dict[str, Any]]] = {}
    native: str | None = None  # name of a module of conversions, see mmssl/model/native.py
    draw: Callable[[Rebuilt, Any, Any], Any] | None = None  # (rebuilt, views, features) -> a picture of it, with `save(path)`
    # (folder or id of a model, model options that are given) -> the view options that its preprocessing states
    stated: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None
    tune: str | None = None  # name of a module with `Inputs`: what a model with a head takes, see mmssl/finetune/data.py
    # (plain view, views, features, colours) -> an image of each sample; colours of its tokens, (B, L, 3) in 0..1, beside it
    sketch: Callable[[View, Any, Any, Tensor | None], list[Any]] | None = None
    sizes: Callable[[Any], dict[str, float]] | None = None  # sample -> how large it is, each by the name of its unit
    published: str | None = None  # name of a module of layouts of others' checkpoints, see mmssl/model/published.py
    # name of a question -> what is done to a sample in each of its answers but the first, which is the sample as it is
    pretexts: dict[str, tuple[Callable[[Any], Any], ...]] = {}
    # (path of a mask, its sample, views) -> (H, W) int64, the class of each pixel where `views.plain` looks; raises Rejected
    segments: Callable[[Any, Any, Any], Tensor] | None = None


@cache
def _points() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=GROUP)}


def modalities() -> list[str]:
    """Names of all installed modalities."""
    return sorted(_points())


@cache
def modality(name: str) -> Modality:
    """The modality of that name.

    Raises: RecipeError if it is not installed, or if another distribution named `modalities` hides ours.
    """
    if name not in _points():
        raise RecipeError(f"data.modality: no modality is named {name!r}; installed are {', '.join(modalities()) or 'none'}.")
    try:
        found = _points()[name].load()
    except (ModuleNotFoundError, AttributeError) as error:
        raise RecipeError(
            f"The modality {name!r} cannot be imported ({error}). If another package named 'modalities' is installed, "
            "it hides the one of mmssl: remove it with 'pip uninstall modalities' and reinstall mmssl."
        ) from error
    return found
