"""Models that others have released, and our own: from a folder or the Hub, and which kind of data they take."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from mmssl.errors import RecipeError
from mmssl.model import register
from mmssl.model.modeling import MmsslModel
from mmssl.model.transformer import DEEPEST
from mmssl.registry import Modality, modalities, modality


def load_encoder(path_or_id: str | Path) -> torch.nn.Module:
    """An encoder from a folder or the Hub.

    Models of transformers whose structure the shared transformer has run on it.

    Returns: a module that takes `pixel_values | input_values | input_ids | input_features` and gives `last_hidden_state` and
        `pooler_output`.
    Raises: RecipeError if there is none, with the reason.
    """
    register.auto_classes()
    if not Path(path_or_id).is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(path_or_id)):
        raise RecipeError(f"{path_or_id}: no such folder, and no Hub id (ORG/NAME).")
    # Or transformers asks a Space of the Hub to convert a model that has no safetensors.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(str(path_or_id), trust_remote_code=False)
            _check_size(config, Path(path_or_id))
            model = AutoModel.from_pretrained(str(path_or_id), config=config, trust_remote_code=False, weights_only=True).eval()
    except Exception as error:  # the readers of the many kinds of files raise almost anything on malformed ones
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"{path_or_id} cannot be loaded as a model: {reason}") from None
    return model if isinstance(model, MmsslModel) else _shared(model)


def modality_of(model: torch.nn.Module, told: str | None = None) -> Modality:
    """The kind of data a model takes: by its config if it is ours, as told, or by the name of its input.

    Raises: RecipeError if all that leaves it open.
    """
    config: Any = model.config
    name = getattr(config, "modality", None) if getattr(config, "model_type", None) == "mmssl" else told
    if name is not None:
        return modality(str(name))
    takes, fitting = getattr(model, "main_input_name", None), []
    for other in modalities():
        with suppress(RecipeError):  # one that cannot be imported does not matter here
            fitting += [kind for kind in (modality(other),) if getattr(kind.features, "input_name", None) == takes]
    if len(fitting) != 1:
        found = " and ".join(kind.name for kind in fitting) or "no installed kind of data"
        raise RecipeError(
            f"modality: {type(model).__name__} takes {takes}, which belongs to {found}; "
            f"say what it is for with modality=NAME, one of {', '.join(modalities())}."
        )
    return fitting[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars, which would tear ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def class_of(config: Any) -> type[PreTrainedModel]:
    """The class of transformers for a config. Not by `from_config`, which splits a new model over ranks under ZeRO-3."""
    found: Any = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _check_size(config: Any, path: Path) -> None:
    """Whether a config asks for no more than its folder can hold, found before memory is. Raises: ValueError."""
    told = {**config.to_dict(), **(getattr(config, "backbone", None) or {})}
    deep = [f"{name}={value}" for name, value in told.items() if re.search("layers$|depth$", name) and _above(value, DEEPEST)]
    if deep:
        raise ValueError(f"config.json: {deep[0]}, at most {DEEPEST} blocks can be built")
    held = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in path.glob(pattern))
    if not path.is_dir() or not held:
        return
    with torch.device("meta"):
        asked = sum(parameter.numel() for parameter in class_of(config)(config).parameters())
    if asked > 8 * held:  # a weight takes a bit at least
        raise ValueError(f"config.json: describes {asked} weights, the files hold {held} bytes")


def _above(value: Any, most: int) -> bool:
    return isinstance(value, (int, float)) and value > most


def _shared(model: PreTrainedModel) -> torch.nn.Module:
    """The same model on the shared transformer, or itself if its structure is another."""
    for name in modalities():
        convert = modality(name).native
        native = import_module(convert) if convert else None
        if native and model.config.model_type in native.NATIVE:
            found = native.from_native(model.config, model.state_dict())
            if found:
                twin = MmsslModel(found[0])
                twin.encoder.load_state_dict(found[1], strict=False)  # fixed tables are not among theirs
                return twin.eval()
    return model
