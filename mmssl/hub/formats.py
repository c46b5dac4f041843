"""What an export can be besides the model folder that suits a run: for other libraries, or what it trained beside the encoder.

A writer takes a member's recipe, views and tensors, and fills a folder. It raises RecipeError where the encoder does not fit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmssl.config import JointRecipe, Recipe, Settings
from mmssl.errors import RecipeError
from mmssl.files import umask
from mmssl.hub.export import appearing, export_encoders, recommended, tensors_of, weights_of
from mmssl.hub.onnx import write_onnx
from mmssl.methods import METHODS
from mmssl.methods.method import Method
from mmssl.model.backbone import Backbone
from mmssl.model.encoder import Encoder
from mmssl.model.low_rank import merged
from mmssl.parts import Network, Teacher
from mmssl.registry import modality

Writer = Callable[[Recipe, Any, dict[str, Tensor], str, Path], None]


def export_as(
    form: str,
    recipe: Settings,
    views: Mapping[str, Any],
    tensors: dict[str, Tensor],
    path: Path,
    which: str | None = None,
    metrics: dict[str, float] | None = None,
    step: int | None = None,
) -> Path:
    """Write a run in one of `mmssl.hub.FORMATS`, whole or not at all.

    A run of several kinds of data gives a folder for each in `path`, where that fits; hf, remote-code and auto as
    `export_encoders` does.

    Args:
        tensors: the model part of a checkpoint.
        which: student or teacher; the one that the method's paper uses if None.
    Raises: RecipeError if nothing of the run fits the format, with the reason.
    """
    write = WRITERS.get(form)
    if write is None:
        return export_encoders(recipe, views, tensors, path, which, metrics, step, form)
    of = {name: which or recommended(member) for name, member in recipe.members.items()}
    tensors = merged(tensors)
    parts = tensors_of(recipe, tensors, of) if isinstance(recipe, JointRecipe) else {"": tensors}
    refused: dict[str, str] = {}
    with appearing(path) as aside:
        for name, member in recipe.members.items():
            (aside / name).mkdir(exist_ok=True)
            try:
                write(member, views[name], parts[name], of[name], aside / name)
            except RecipeError as error:
                refused[name] = f"{name}: {error}" if name else str(error)
                (aside / name).rmdir()
        if len(refused) == len(of):
            raise RecipeError("\n".join(refused.values()))
        for file in (file for file in aside.rglob("*") if file.is_file()):  # safetensors writes 0600, whatever the umask
            file.chmod(0o666 & ~umask())
    for reason in refused.values():
        print(f"mmssl: note: left out: {reason}", file=sys.stderr)
    return path


def write_timm(recipe: Recipe, views: Any, tensors: dict[str, Tensor], which: str, path: Path) -> None:
    """`timm.create_model("local-dir:FOLDER")`, or `hf-hub:` once it is on the Hub. Raises: RecipeError."""
    config, kind = recipe.config(), modality(recipe.data.modality)
    convert = getattr(import_module(kind.native), "to_timm", None) if kind.native else None
    if convert is None:
        raise RecipeError(f"timm holds encoders of images, this one is of {recipe.data.modality}.")
    try:
        told, weights = convert(config, weights_of(tensors, which))
        prepare = kind.processor(config, views)
    except ValueError as error:
        raise RecipeError(f"{error}.") from None
    side = prepare.crop_size["height"]
    normal = {"mean": [*prepare.image_mean], "std": [*prepare.image_std], "input_size": [len(prepare.image_mean), side, side]}
    usual = {"interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "center", "num_classes": 0}
    told |= {"num_classes": 0, "num_features": config.hidden_size, "pretrained_cfg": normal | usual}
    (path / "config.json").write_text(json.dumps(told, indent=2) + "\n")
    save_file(weights, path / "model.safetensors", {"format": "pt"})


def write_heads(recipe: Recipe, views: Any, tensors: dict[str, Tensor], which: str, path: Path) -> None:
    """What the method trained beside the encoders: heads.safetensors, and heads.json that says what each part is."""
    with torch.device("meta"):
        method = recipe.build()
    name = recipe.method.name  # type: ignore[attr-defined]
    held = {n.removeprefix("method."): t for n, t in tensors.items() if n.startswith("method.")}
    parts, kept = {}, {}
    for place, module in heads(method):
        own = {n: t for n, t in held.items() if n.startswith(f"{place}.")}
        if own:
            about = (type(module).__doc__ or "").strip().splitlines()
            parts[place] = {
                "class": f"{type(module).__module__}.{type(module).__qualname__}",
                "what": about[0] if about and not type(module).__module__.startswith("torch.") else "",
                "structure": str(module).splitlines(),
                "tensors": {n: list(t.shape) for n, t in own.items()},
            }
            kept |= own
    if not kept:
        raise RecipeError(f"heads: {name} trains nothing beside the encoder.")
    told = {"method": name, "paper": METHODS[name].paper, "file": "heads.safetensors", "parts": parts}
    (path / "heads.json").write_text(json.dumps(told, indent=2) + "\n")
    save_file(kept, path / "heads.safetensors", {"format": "pt"})


def heads(module: nn.Module, place: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The parts of a method that are no encoder, by their names: projectors, predictors, decoders, prototypes, queues."""
    own = [("network", module.network)] if isinstance(module, Teacher) else module.named_children()
    for name, child in own:
        if isinstance(child, Method | Network | Teacher | nn.ModuleDict):
            yield from heads(child, f"{place}{name}.")
        elif not isinstance(child, Encoder | Backbone):
            yield f"{place}{name}", child


WRITERS: dict[str, Writer] = {"onnx": write_onnx, "timm": write_timm, "heads": write_heads}
