"""Which models of transformers a recipe can name as its backbone."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from mmssl.model import register
from mmssl.model.backbone import Backbone
from mmssl.model.configuration import MmsslConfig

MODULES = 20_000  # of a backbone at most; ViT-g/14 has 700


class Inputs(Protocol):
    """What a modality gives to backbones: its constructor's options are options of the recipe's `model` block.

    Views read its attributes where they read those of a feature encoder otherwise.
    """

    name: ClassVar[str]  # keyword of models that take such inputs
    presets: ClassVar[dict[str, dict[str, Any]]]  # short name -> options of transformers' config, `model_type` among them

    def facts(self) -> dict[str, Any]:
        """Options of transformers' configs that follow; a config takes those it has."""
        ...

    def example(self) -> Tensor:
        """One input."""
        ...


INPUTS: dict[str, type[Any]] = {}


def inputs_of(modality: str):
    """Class decorator: the inputs of a modality, see `Inputs`."""

    def add(cls: type[Any]) -> type[Any]:
        INPUTS[modality] = cls
        return cls

    return add


def inputs_class(modality: str) -> type[Any]:
    """The inputs of a modality. Raises: ValueError if its views cannot be given to a backbone."""
    if modality not in INPUTS:
        for point in entry_points(group="mmssl.modalities", name=modality):
            point.load()
    if modality not in INPUTS:
        raise ValueError(f"backbone: {modality} has the shared transformer only; leave it out")
    return INPUTS[modality]


def configuration(
    modality: str,
    backbone: str,
    options: dict[str, Any],
    stem: Literal["normal", "small"] = "normal",
    zero_init: bool = False,
    **given: Any,
) -> MmsslConfig:
    """Of a backbone by name; the model is built and run once without memory to find its width.

    Args:
        backbone: model type of transformers, or a preset of the modality.
        options: of transformers' config, in place of the preset's or the defaults.
        given: options of the modality's inputs.
    Raises: ValueError that begins with the option that is wrong.
    """
    inputs: Inputs = inputs_class(modality)(**given)
    kind, start = _kind(backbone, inputs.presets)
    model: Any = MODEL_MAPPING[kind]
    takes = _tried("backbone", lambda: model.main_input_name)
    if takes != inputs.name:
        raise ValueError(f"backbone: {backbone} takes {takes}, {modality} gives {inputs.name}; choose another")
    names = own_options(kind)
    facts = {name: value for name, value in inputs.facts().items() if name in names}
    for name in options:
        if name in facts or name not in names:
            allowed = [other for other in names if other not in facts]
            told = f"{kind.model_type} has no such option{_nearest(name, allowed)}; allowed are {', '.join(allowed)}"
            raise ValueError(
                f"options.{name}: " + ("follows from model.channels and the like; leave it out" if name in facts else told)
            )
    inner = _tried("options", lambda: kind(**start | options | facts))
    config = MmsslConfig(
        modality=modality,
        backbone={"model_type": kind.model_type, **_plain(inner, names)},
        stem=stem,
        zero_init=zero_init,
        **given,
    )
    with torch.device("meta"), torch.no_grad(), _few_modules():
        encoder = Backbone(_tried("options", lambda: AutoModel.from_config(inner)), config).eval()
        config.hidden_size = _tried("options", lambda: encoder.outputs(inputs.example())[1].shape[1])
    return config


def released(path: str, modality: str, backbone: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options of the model in a folder or on the Hub, with `options` in place of its own; these alone if they are complete.

    Raises: ValueError if there is none, or it is of another kind.
    """
    inputs = inputs_class(modality)
    kind, start = _kind(backbone, inputs.presets)
    names = own_options(kind)
    settable = [name for name in names if name not in inputs().facts()]
    if all(name in options for name in settable):
        return options
    register.auto_classes()
    found = _tried("init", lambda: AutoConfig.from_pretrained(path, trust_remote_code=False))
    inner = getattr(found, "backbone", None) if found.model_type == "mmssl" else {"model_type": found.model_type}
    if inner is None or inner["model_type"] != kind.model_type:
        what = inner["model_type"] if inner else "shared transformer"
        raise ValueError(f"init: {path} is a {what}, backbone is {kind.model_type}; make them agree")
    own = inner if found.model_type == "mmssl" else _plain(found, names)
    return {name: own[name] for name in settable if name in own} | start | options


def own_options(kind: type[PreTrainedConfig]) -> list[str]:
    """Names of the options that a config class adds to those of all."""
    common = inspect.signature(PreTrainedConfig).parameters
    own = inspect.signature(kind).parameters
    return [name for name in own if name not in common and name != "kwargs" and not name.startswith("_")]


def _kind(backbone: str, presets: dict[str, dict[str, Any]]) -> tuple[type[PreTrainedConfig], dict[str, Any]]:
    """The config class of a name, and the options of the preset."""
    start = dict(presets.get(backbone, {}))
    name = start.pop("model_type", backbone)
    if name not in MODEL_MAPPING_NAMES or name == "mmssl":
        raise ValueError(
            f"backbone: transformers has no model type {backbone!r}{_nearest(backbone, [*presets, *MODEL_MAPPING_NAMES])}; "
            f"short names are {', '.join(presets)}"
        )
    return CONFIG_MAPPING[name], start


def _plain(config: PreTrainedConfig, names: Iterable[str]) -> dict[str, Any]:
    """Those options as JSON knows them."""
    told = json.loads(config.to_json_string(use_diff=False))
    return {name: told[name] for name in names if name in told}


def _tried(key: str, make: Any) -> Any:
    """What `make` makes. A stranger's code fails in its own way: ValueError that begins with the key and tells how."""
    try:
        return make()
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ValueError(f"{key}: transformers refuses, {type(error).__name__}: {text}") from None


@contextmanager
def _few_modules() -> Iterator[None]:
    """Modules that are made meanwhile are counted, for a number of blocks that is a slip takes minutes even without memory.

    Raises: ValueError.
    """
    count = 0

    def counted(parent: torch.nn.Module, name: str, module: torch.nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > MODULES:
            raise ValueError(f"more than {MODULES} modules; is a number of layers a slip?")

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def _nearest(found: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(found, [*names], 1, 0.6)
    return f" (did you mean {close[0]}?)" if close else ""
