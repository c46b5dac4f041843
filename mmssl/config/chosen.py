"""The blocks of a recipe that follow from the chosen method and kind of data, read from the signatures of their classes."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator

from mmssl.config.blocks import LoraOptions, Options
from mmssl.registry import Modality
from mmssl.schedules import Schedule


def chosen_blocks(method: str | None, kind: Modality | None, wrapped: bool) -> dict[str, Any]:
    """The fields `model`, `method` and `views` of a recipe; unchecked blocks where method or modality is unknown."""
    from mmssl.methods import METHODS

    blocks: dict[str, Any] = {"model": (_Unchecked, ...), "method": (_Unchecked, ...), "views": (_Unchecked, ...)}
    if method is not None:
        each = {name: options_of(member, "encoder") for name, member in METHODS.members(method).items()}
        fields = each[method] if method in each else {name: _member(options) for name, options in each.items()}
        blocks["method"] = (_model("Method", _ScheduleOptions, {"name": (Literal[method], method), **fields}), ...)
    if kind is not None:
        blocks["model"] = (_model_block(kind, wrapped), ...)
        views = _model("Views", Options, options_of(kind.views, "features"))
        blocks["views"] = (views, Field(default_factory=dict, validate_default=True))
    return blocks


def _member(options: dict[str, tuple[Any, Any]]) -> tuple[Any, Any]:
    """A method among others: a block in its own right."""
    weight = Field(1.0, ge=0, description="What its loss counts; 0: not at all, though it is computed.")
    block = _model("Member", _ScheduleOptions, {"weight": (float, weight), **options})
    return block, Field(default_factory=dict, validate_default=True)


def options_of(target: Callable[..., Any], *skip: str) -> dict[str, tuple[Any, Any]]:
    """Fields of a pydantic model, read from a constructor's signature: name -> (type, default)."""
    init = target.__init__ if inspect.isclass(target) else target
    hints = typing.get_type_hints(init, include_extras=True)
    fields = {}
    for name, parameter in list(inspect.signature(target).parameters.items()):
        if name in skip:
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        kind = hints.get(name, Any)
        fields[name] = (kind | float if kind is Schedule else kind, default)  # a plain number is a constant schedule
    return fields


class _ScheduleOptions(Options):
    @field_validator("*", mode="after")
    @classmethod
    def _constant(cls, value: Any, info: Any) -> Any:
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, float) and Schedule in typing.get_args(kind):
            return Schedule(value, value)
        return value


class _Unchecked(Options):
    model_config = ConfigDict(extra="allow")


def _model(name: str, base: type[BaseModel], fields: dict[str, Any]) -> Any:
    return create_model(name, __base__=base, **fields)


def model_options(kind: Modality) -> dict[str, Any]:
    """Options of the `model` block of a kind of data, by name, where the encoder is the shared transformer."""
    return dict(_model_block(kind, wrapped=False).model_fields)


def _model_block(kind: Modality, wrapped: bool) -> type[Options]:
    from mmssl.model import library
    from mmssl.model.configuration import MmsslConfig

    core = options_of(MmsslConfig, "modality", "kwargs", "backbone", "members")
    whole = {name: core.pop(name) for name in ("stem", "zero_init")}
    fields: dict[str, Any] = {
        "init": (str | None, Field(None, description="Folder or Hub id of a model of the same shape to start from.")),
        "freeze": (bool, Field(False, description="Train nothing of the encoder; for bind, with share_trunk=false.")),
        "lora": (
            LoraOptions | None,
            Field(
                None,
                description="Train low-rank updates of the model of init, which stays as it is besides: rank, alpha, dropout, "
                "modules, see continuing.md.",
            ),
        ),
        "backbone": (str | None, Field(None, description="Model type of transformers, or resnet18, resnet34, resnet50.")),
    }
    if not wrapped:
        frozen = Field(False, description="Keep the weights of the feature encoder as they are drawn or loaded.")
        fields |= {**core, **options_of(kind.features, "dim"), "freeze_features": (bool, frozen)}
        return _model("Model", Options, fields)
    options = Field(default_factory=dict, description="Of the config of transformers.")
    inputs = library.INPUTS.get(kind.name)
    fields |= {"options": (dict[str, Any], options), **whole, **(options_of(inputs) if inputs else {})}
    return _model("Model", Options if inputs else _Unchecked, fields)
