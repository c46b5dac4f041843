"""From a run to a folder that `AutoModel` loads."""

from __future__ import annotations

import contextlib
import inspect
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from mmssl.config import JointRecipe, Recipe, Settings
from mmssl.config.joint import TRUNK
from mmssl.errors import RecipeError
from mmssl.files import umask
from mmssl.hub.card import card, joint_card
from mmssl.hub.flatten import flatten
from mmssl.methods import METHODS
from mmssl.methods.joint import Joint
from mmssl.model.backbone import Backbone
from mmssl.model.configuration import BACKBONE, OWN, MmsslConfig
from mmssl.model.encoder import Encoder, feature_class
from mmssl.model.low_rank import merged, untouched
from mmssl.model.modeling import MmsslModel
from mmssl.model.released import class_of, load_encoder, quiet
from mmssl.model.tasks import TASKS
from mmssl.model.transformer import SHARED
from mmssl.parts import Teacher
from mmssl.redaction import redact
from mmssl.registry import Modality, modality

STEMS = {"student": "method.student.encoder.", "teacher": "method.teacher.network.encoder."}
STUDENT = re.escape(STEMS["student"])
CODE = "modeling_mmssl.py"


def export_encoder(
    recipe: Recipe,
    views: Any,
    tensors: dict[str, Tensor],
    path: Path,
    which: str | None = None,
    metrics: dict[str, float] | None = None,
    step: int | None = None,
    beside: Sequence[str] = (),
    form: str = "auto",
) -> Path:
    """Write config, weights, processor and card; the folder appears whole or not at all.

    It has the transformers architecture of the same structure if there is one, otherwise ours and its modelling code.

    Args:
        tensors: the model part of a checkpoint.
        which: student or teacher; the one that the method's paper uses if None.
        beside: other kinds of data of the run, for the card.
        form: hf, where nothing but the former will do; remote-code for the latter in any case.
    Raises: RecipeError if the run has no such network, or transformers no such class.
    """
    which = which or recommended(recipe)
    weights, config, kind = weights_of(merged(tensors), which), recipe.config(), modality(recipe.data.modality)
    with appearing(path) as aside:
        architecture = write_encoder(config, weights, aside, form)
        if form == "hf" and architecture == "MmsslModel":
            raise RecipeError(_no_class(recipe, kind))
        try:
            kind.processor(config, views).save_pretrained(aside)
        except ValueError as error:
            raise RecipeError(str(error)) from None
        (aside / "README.md").write_text(redact(card(recipe, which, metrics or {}, step, architecture, beside)))
    return path


def write_encoder(
    config: MmsslConfig, weights: dict[str, Tensor], folder: Path, form: str = "auto", released: str | None = None
) -> str:
    """Write config and weights, under the transformers architecture of the same structure or with the code of ours.

    Args:
        form: remote-code for the latter in any case.
        released: model type of transformers, where a structure has several.
    Returns: name of the class.
    """
    native = None if form == "remote-code" else _native(config, modality(config.modality), weights, released)
    with torch.device("meta"):
        model = class_of(native[0])(native[0]) if native else _own(config)
    _write(model, native[1] if native else {f"encoder.{name}": tensor for name, tensor in weights.items()}, folder)
    if not native:
        (folder / CODE).write_text(_code([config.modality]))
    return type(model).__name__


def export_encoders(
    recipe: Settings,
    views: Mapping[str, Any],
    tensors: dict[str, Tensor],
    path: Path,
    which: str | None = None,
    metrics: dict[str, float] | None = None,
    step: int | None = None,
    form: str = "auto",
) -> Path:
    """As `export_encoder`; of several kinds of data one model of all, and in it a folder for each, whole or not at all."""
    if isinstance(recipe, Recipe):
        return export_encoder(recipe, views[""], tensors, path, which, metrics, step, form=form)
    assert isinstance(recipe, JointRecipe)
    if form == "hf":
        raise RecipeError(
            "hf: transformers has no class for several kinds of data. Without it, the folder of each holds one where that fits."
        )
    members, tensors = recipe.members, merged(tensors)  # before they are shared out: what is shared is so by identity
    of = {name: which or recommended(member) for name, member in members.items()}
    parts = tensors_of(recipe, tensors, of)
    config, named = _together(members, {name: weights_of(parts[name], of[name]) for name in members})
    with appearing(path) as aside:
        with torch.device("meta"):
            model = _own(config)
        _write(model, named, aside)
        (aside / CODE).write_text(modelling_code([*members.values()]))
        for name, member in members.items():
            own = {metric.replace(f"/{name}.", "/", 1): v for metric, v in (metrics or {}).items() if f"/{name}." in metric}
            beside = [other for other in members if other != name and recipe.share_trunk]
            export_encoder(member, views[name], parts[name], aside / name, of[name], own, step, beside, form)
        trunks = {name: config.trunk(name) for name in members}
        (aside / "README.md").write_text(redact(joint_card(members, of, trunks, recipe.dump(), metrics or {}, step)))
    return path


def recommended(recipe: Recipe) -> str:
    """Student or teacher: the one that the method's paper uses."""
    return METHODS[recipe.method.name].exports  # type: ignore[attr-defined]


def weights_of(tensors: dict[str, Tensor], which: str) -> dict[str, Tensor]:
    """The encoder of the student or teacher, by its own names. Raises: RecipeError if the run has no such network."""
    if not any(name.startswith(STEMS[which]) for name in tensors):
        raise RecipeError(f"which={which}: this run has no {which}.")
    # A teacher may share parts of the student, which it then does not hold itself.
    own = (STEMS["student"], STEMS[which])
    return {n.removeprefix(stem): t for stem in own for n, t in tensors.items() if n.startswith(stem)}


def _together(members: Mapping[str, Recipe], weights: Mapping[str, dict[str, Tensor]]) -> tuple[MmsslConfig, dict[str, Tensor]]:
    """Config and weights of one model of all members; what several share is there once.

    Members that export student and teacher, or teachers of unlike momentum, have transformers of their own, as those of
    `share_trunk: false` have.
    """
    trunk = tuple(f"transformer.{part}." for part in SHARED)
    blocks = {name: {n: t for n, t in own.items() if n.startswith(trunk)} for name, own in weights.items()}
    configs = {name: recipe.config() for name, recipe in members.items()}
    common, told, named = next(iter(configs.values())), {}, {}
    for name, config in configs.items():
        same = (one for one in told if blocks[name] and all(blocks[one].get(n) is t for n, t in blocks[name].items()))
        home = next(same, name)
        told[name] = {key: getattr(config, key) for key in _own_options(config, common)}
        told[name] |= {} if home == name else {"trunk": home}
        named |= {f"members.{name}.{n}": t for n, t in weights[name].items() if home == name or n not in blocks[name]}
    return MmsslConfig(**{key: getattr(common, key) for key in TRUNK}, members=told), named


def _own_options(config: MmsslConfig, common: MmsslConfig) -> list[str]:
    """Those that a member has for itself: of its modality, and of the transformer where it differs."""
    kind = inspect.signature(feature_class(config.modality)).parameters
    names = [key for key in (*OWN, *kind) if hasattr(config, key) and key not in TRUNK]
    names += [key for key in TRUNK if getattr(config, key) != getattr(common, key)]
    return [*names, *BACKBONE] if config.backbone else names


def modelling_code(recipes: Sequence[Recipe]) -> str:
    """What builds their model where only torch and transformers are installed. Raises: RecipeError if that cannot be."""
    return _code([recipe.data.modality for recipe in recipes])


def _code(kinds: Sequence[str]) -> str:
    try:
        return flatten(*(modality(kind).features.__module__ for kind in kinds))
    except ValueError as error:
        raise RecipeError(f"data.modality: {error}.") from None


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of `path` when all is written, or leaves no trace."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=".tmp-model-", dir=path.parent))
    try:
        yield aside
        aside.chmod(0o777 & ~umask())  # mkdtemp makes it private
        replace_folder(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(model: PreTrainedModel, named: dict[str, Tensor], path: Path) -> None:
    """Config and weights."""
    with quiet():
        model.save_pretrained(path, state_dict=named)
    for file in path.iterdir():  # safetensors writes 0600, whatever the umask
        file.chmod(0o666 & ~umask())


def tensors_of(recipe: JointRecipe, tensors: dict[str, Tensor], of: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """The part of a checkpoint that belongs to each member, with what it shares, as a run of it alone has.

    Args:
        of: member -> student or teacher, whose shared part is wanted.
    """
    each = {
        name: {n.removeprefix(f"members.{name}."): t for n, t in tensors.items() if n.startswith(f"members.{name}.")}
        for name in recipe.members
    }
    trunk = tuple(f"{STEMS['student']}transformer.{part}." for part in SHARED if recipe.share_trunk)
    shared = {n: t for own in reversed(each.values()) for n, t in own.items() if n.startswith(trunk)}
    averages = _averages(recipe) if "teacher" in of.values() else {}
    return {
        name: shared | own | {n: tensors[place] for n, place in averages.get(name, {}).items() if place in tensors}
        for name, own in each.items()
    }


def _averages(recipe: JointRecipe) -> dict[str, dict[str, str]]:
    """Member -> weights of its teacher's encoder -> where a checkpoint holds them: another teacher may average them for it."""
    with torch.device("meta"):
        joint = Joint(recipe.build())
    held = {}
    for place, part in joint.named_modules():
        if isinstance(part, Teacher):
            own, stem = part.state_dict(), re.sub(r"^(members\.\w+)", r"\1.method", place)
            held |= {id(p): f"{stem}.network.{n}" for n, p in part.network.named_parameters() if f"network.{n}" in own}
    teachers = {name: getattr(method, "teacher", None) for name, method in joint.methods()}
    return {
        name: {f"{STEMS['teacher']}{n}": held[id(p)] for n, p in teacher.encoder.named_parameters() if id(p) in held}
        for name, teacher in teachers.items()
        if isinstance(teacher, Teacher)
    }


def _native(
    config: MmsslConfig, kind: Modality, weights: dict[str, Tensor], released: str | None = None
) -> tuple[Any, dict[str, Tensor]] | None:
    """Config and weights of the same encoder in transformers; None if it has no class of that structure."""
    if not config.backbone:
        given = {"kind": released} if released else {}
        return import_module(kind.native).to_native(config, weights, **given) if kind.native else None
    if config.stem == "small":
        return None
    return AutoConfig.for_model(**config.backbone), {name.removeprefix("model."): t for name, t in weights.items()}


def _no_class(recipe: Recipe, kind: Modality) -> str:
    if recipe.wrapped:
        why = "a backbone with model.stem=small has none; model.stem=normal has"
    else:
        fits = import_module(kind.native).FITS if kind.native else None
        why = f"it has some for {fits}" if fits else f"it has none for {kind.name}"
    return f"hf: transformers has no class of the structure of this encoder: {why}. as=remote-code writes it with its own code."


def _own(config: MmsslConfig) -> MmsslModel:
    config.architectures = ["MmsslModel"]
    config.auto_map = auto_map(config)
    return MmsslModel(config)


def auto_map(config: MmsslConfig) -> dict[str, str]:
    """Class of transformers -> that of the modelling code, for all that can be done with such a model."""
    features: Any = None if config.members else feature_class(config.modality)
    tasks = {name: task.__name__ for name, task in TASKS.items() if features and features.input_name in task.takes}
    names = {"AutoConfig": "MmsslConfig", "AutoModel": "MmsslModel"} | tasks
    return {name: f"modeling_mmssl.{own}" for name, own in names.items()}


def export_heads(tensors: dict[str, Tensor], path: Path) -> None:
    """What a run trained beside the encoder (decoder, heads, other network), so that anyone can go on from it."""
    rest = {n.removeprefix("method."): t for n, t in tensors.items() if not re.match(rf"(members\.\w+\.)?{STUDENT}", n)}
    path.mkdir(parents=True, exist_ok=True)
    aside = path / f".tmp-heads-{secrets.token_hex(4)}"
    save_file(rest, aside, {"format": "pt"})
    aside.chmod(0o666 & ~umask())
    aside.replace(path / "heads.safetensors")


def replace_folder(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`."""
    before = old.with_name(f".del-{old.name}")
    shutil.rmtree(before, ignore_errors=True)
    if old.exists():
        old.rename(before)
    new.rename(old)
    shutil.rmtree(before, ignore_errors=True)


def member_folder(path_or_id: str | Path, member: str) -> Path:
    """Where a model of several kinds of data has the one of a member, with what prepares its input.

    Raises: RecipeError if it has none.
    """
    folder = Path(path_or_id)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(path_or_id), allow_patterns=f"{member}/*"))
        except Exception as error:  # the client's transport has errors of its own, which differ between its versions
            raise RecipeError(f"{path_or_id}: {member} cannot be read: {error}") from None
    if not (folder / member / "config.json").is_file():
        raise RecipeError(f"{path_or_id} holds no model of {member} alone; `mmssl export RUN to=FOLDER` writes one.")
    return folder / member


def load_weights(encoder: Encoder | Backbone, path: str | Path) -> None:
    """Start an encoder from a model of the same shape, but for what its features and positions can fit to theirs, such as the
    size of images. Raises: RecipeError naming what does not fit.
    """
    try:
        model: Any = load_encoder(path)
    except RecipeError as error:
        raise RecipeError(f"model.init: {error}") from None
    own = encoder.state_dict()
    if isinstance(model, MmsslModel):
        saved = _fitted(encoder, _of_its_kind(model, encoder.modality, path).state_dict())
    elif isinstance(encoder, Backbone):
        saved = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    else:
        raise RecipeError(
            f"model.init: {path} is a {type(model).__name__}; the shared transformer has another structure. "
            f"With model.backbone={model.config.model_type} it is the encoder as it is."
        )
    saved = saved | untouched(encoder)
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


def _fitted(encoder: Encoder | Backbone, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a model as those of an encoder for other inputs, where features and positions know how."""
    for name in ("features", "positions"):
        fit = getattr(getattr(encoder, name, None), "fitted", None)
        if fit is not None:
            own = {key.removeprefix(f"{name}."): value for key, value in saved.items() if key.startswith(f"{name}.")}
            saved = saved | {f"{name}.{key}": value for key, value in fit(own).items()}
    return saved


def _of_its_kind(model: MmsslModel, modality: str, path: str | Path) -> torch.nn.Module:
    """The encoder of a kind of data; the only one of most models. Raises: RecipeError unless one is meant."""
    if not model.config.members:
        return model.encoder
    fitting = [name for name, own in model.config.members.items() if own["modality"] == modality]
    if len(fitting) != 1:
        found = " and ".join(fitting) if fitting else "none"
        raise RecipeError(
            f"model.init: {path} holds encoders of {', '.join(model.config.members)}; of {modality} are {found}. Name the "
            f"folder of one, such as {path}/{[*fitting, *model.config.members][0]}."
        )
    return model.encoders[fitting[0]]
