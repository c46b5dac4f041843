"""From a run to a folder that `AutoModel` loads."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedModel
from transformers.utils import logging

from mmssl.config import Recipe, Settings
from mmssl.errors import RecipeError
from mmssl.files import umask
from mmssl.hub.card import card, joint_card
from mmssl.hub.flatten import flatten
from mmssl.methods import METHODS
from mmssl.model.backbone import Backbone
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.modeling import MmsslModel
from mmssl.model.transformer import DEEPEST, SHARED
from mmssl.redaction import redact
from mmssl.registry import Modality, modalities, modality

STEMS = {"student": "method.student.encoder.", "teacher": "method.teacher.network.encoder."}
STUDENT = re.escape(STEMS["student"])


def export_encoder(
    recipe: Recipe,
    views: Any,
    tensors: dict[str, Tensor],
    path: Path,
    which: str | None = None,
    metrics: dict[str, float] | None = None,
    step: int | None = None,
    beside: Sequence[str] = (),
) -> Path:
    """Write config, weights, processor and card; the folder appears whole or not at all.

    It has the transformers architecture of the same structure if there is one, otherwise ours and its modelling code.

    Args:
        tensors: the model part of a checkpoint.
        which: student or teacher; the one that the method's paper uses if None.
        beside: other kinds of data of the run, for the card.
    Raises: RecipeError if the run has no such network.
    """
    which = which or METHODS[recipe.method.name].exports  # type: ignore[attr-defined]
    if not any(name.startswith(STEMS[which]) for name in tensors):
        raise RecipeError(f"which={which}: this run has no {which}.")
    # A teacher may share parts of the student, which it then does not hold itself.
    weights = {n.removeprefix(s): t for s in (STEMS["student"], STEMS[which]) for n, t in tensors.items() if n.startswith(s)}
    config, kind = recipe.config(), modality(recipe.data.modality)
    native = _native(config, kind, weights)
    with torch.device("meta"):
        model = _class_of(native[0])(native[0]) if native else _own(config)
    named = native[1] if native else {f"encoder.{name}": tensor for name, tensor in weights.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".tmp-model-", dir=path.parent))
    try:
        with quiet():
            model.save_pretrained(aside, state_dict=named)
        for file in aside.iterdir():  # safetensors writes 0600, whatever the umask
            file.chmod(0o666 & ~umask())
        if not native:
            (aside / "modeling_mmssl.py").write_text(flatten(kind.features.__module__))
        try:
            kind.processor(config, views).save_pretrained(aside)
        except ValueError as error:
            raise RecipeError(str(error)) from None
        (aside / "README.md").write_text(redact(card(recipe, which, metrics or {}, step, type(model).__name__, beside)))
        aside.chmod(0o777 & ~umask())  # mkdtemp makes it private
        replace_folder(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def export_encoders(
    recipe: Settings,
    views: Mapping[str, Any],
    tensors: dict[str, Tensor],
    path: Path,
    which: str | None = None,
    metrics: dict[str, float] | None = None,
    step: int | None = None,
) -> Path:
    """As `export_encoder`; of several kinds of data a folder for each, in one that appears whole or not at all."""
    if isinstance(recipe, Recipe):
        return export_encoder(recipe, views[""], tensors, path, which, metrics, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".tmp-model-", dir=path.parent))
    try:
        for name, member in recipe.members.items():
            own = {metric.replace(f"/{name}.", "/", 1): v for metric, v in (metrics or {}).items() if f"/{name}." in metric}
            parts, beside = tensors_of(name, [*recipe.members], tensors), [other for other in recipe.members if other != name]
            export_encoder(member, views[name], parts, aside / name, which, own, step, beside)
        (aside / "README.md").write_text(redact(joint_card([*recipe.members], recipe.dump(), metrics or {}, step)))
        aside.chmod(0o777 & ~umask())  # mkdtemp makes it private
        replace_folder(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return path


def tensors_of(member: str, names: list[str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a checkpoint of several kinds of data that belongs to one, with what it shares, as a run of it alone has."""
    each = {
        name: {n.removeprefix(f"members.{name}."): t for n, t in tensors.items() if n.startswith(f"members.{name}.")}
        for name in names
    }
    own = each[member]
    stems = [stem for stem in STEMS.values() if any(n.startswith(stem) for n in own)]
    trunk = tuple(f"{stem}transformer.{part}." for stem in stems for part in SHARED)
    return {n: t for others in reversed(each.values()) for n, t in others.items() if n.startswith(trunk)} | own


def _native(config: MmsslConfig, kind: Modality, weights: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]] | None:
    """Config and weights of the same encoder in transformers; None if it has no class of that structure."""
    if not config.backbone:
        return import_module(kind.native).to_native(config, weights) if kind.native else None
    if config.stem == "small":
        return None
    return AutoConfig.for_model(**config.backbone), {name.removeprefix("model."): t for name, t in weights.items()}


def _class_of(config: Any) -> type[PreTrainedModel]:
    """The class of transformers for a config. Not by `from_config`, which splits a new model over ranks under ZeRO-3."""
    found: Any = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, tuple) else found


def _own(config: MmsslConfig) -> MmsslModel:
    config.architectures = ["MmsslModel"]
    config.auto_map = {"AutoConfig": "modeling_mmssl.MmsslConfig", "AutoModel": "modeling_mmssl.MmsslModel"}
    return MmsslModel(config)


def export_heads(tensors: dict[str, Tensor], path: Path) -> None:
    """What a run trained beside the encoder (decoder, heads, other network), so that anyone can go on from it."""
    rest = {n.removeprefix("method."): t for n, t in tensors.items() if not re.match(rf"(members\.\w+\.)?{STUDENT}", n)}
    path.mkdir(parents=True, exist_ok=True)
    aside = path / f".tmp-heads-{secrets.token_hex(4)}"
    save_file(rest, aside, {"format": "pt"})
    aside.chmod(0o666 & ~umask())
    aside.replace(path / "heads.safetensors")


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


def replace_folder(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`."""
    before = old.with_name(f".del-{old.name}")
    shutil.rmtree(before, ignore_errors=True)
    if old.exists():
        old.rename(before)
    new.rename(old)
    shutil.rmtree(before, ignore_errors=True)


def load_encoder(path_or_id: str | Path) -> torch.nn.Module:
    """An encoder from a folder or the Hub.

    Models of transformers whose structure the shared transformer has run on it.

    Returns: a module that takes `pixel_values | input_values | input_ids | input_features` and gives `last_hidden_state` and
        `pooler_output`.
    Raises: RecipeError if there is none, with the reason.
    """
    from mmssl.model import register

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
        asked = sum(parameter.numel() for parameter in _class_of(config)(config).parameters())
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


def load_weights(encoder: Encoder | Backbone, path: str | Path) -> None:
    """Start an encoder from a model of the same shape. Raises: RecipeError naming what does not fit."""
    try:
        model: Any = load_encoder(path)
    except RecipeError as error:
        raise RecipeError(f"model.init: {error}") from None
    own = encoder.state_dict()
    if isinstance(model, MmsslModel):
        saved = model.encoder.state_dict()
    elif isinstance(encoder, Backbone):
        saved = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    else:
        raise RecipeError(
            f"model.init: {path} is a {type(model).__name__}; the shared transformer has another structure. "
            f"With model.backbone={model.config.model_type} it is the encoder as it is."
        )
    wrong = sorted({*own} ^ {*saved}) + [n for n in own if n in saved and own[n].shape != saved[n].shape]
    if wrong and isinstance(encoder, Backbone):
        raise RecipeError(
            f"model.init: {path} has other weights than the recipe's backbone; first difference: {wrong[0]}. Without "
            "model.options its own are used; model.stem, model.channels and model.image_size must be those of the model."
        )
    if wrong:
        config = model.config.to_dict()
        named = ("hidden_size", "depth", "prenet_depth", "heads", "image_size", "patch_size", "vocab_size", "conv_channels")
        shape = {name: config[name] for name in named if name in config}
        raise RecipeError(f"model.init: {path} has another shape ({shape}) than the recipe; first difference: {wrong[0]}.")
    encoder.load_state_dict(saved)
