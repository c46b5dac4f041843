"""Going on from a model: what a recipe leaves open is taken from the one that it begins with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from typing import Any

from mmssl.errors import RecipeError
from mmssl.registry import Modality, modalities, modality

AUTO = "auto"
# For `mmssl pretrain model.init=... data=...`: small steps, smaller for the first blocks, after heads have learned.
RECIPE: dict[str, Any] = {
    "out": "runs/continued",
    "method": {"name": AUTO},
    "optim": {"lr": 1e-4, "warmup": 50, "heads_first": 50, "layer_decay": 0.8, "clip": 1.0},
    "train": {"epochs": 20, "global_batch": 64},
}
OWN = (
    "init",
    "freeze",
    "freeze_features",
    "lora",
    "backbone",
    "start",
    "extra_std",
    "pooling",
)  # options that are no part of a model's shape


def adopt(raw: dict[str, Any], options: Callable[[Modality], dict[str, Any]]) -> None:
    """Complete a raw recipe by the model in `model.init`: its kind of data, shape and preprocessing, and a method for `auto`.

    What the recipe says stays. Without `model.init`, nothing is done.

    Args:
        raw: changed in place.
        options: of the `model` block of a kind of data, by name.
    Raises: RecipeError if the model cannot be read, or is of no kind of data that is installed.
    """
    model, method = raw.get("model"), raw.get("method")
    init = model.get("init") if isinstance(model, dict) else None
    name = method.get("name") if isinstance(method, dict) else None
    names = name.split("+") if isinstance(name, str) else []
    auto = AUTO in names
    if not isinstance(init, str) or not isinstance(model, dict):
        if auto:
            raise RecipeError("method.name: auto chooses what suits the model to go on from; give model.init, or name a method")
        return
    data = raw.get("data")
    told = data.get("modality") if isinstance(data, dict) else None
    if not auto and told is not None and (model.get("backbone") or _complete(model, told, options)):
        return
    kind, config, released = _read(init, told if isinstance(told, str) else None)
    if isinstance(data, dict):
        data.setdefault("modality", kind.name)
    if isinstance(raw.get("views", {}), dict):
        given = {key: value for key, value in model.items() if value is not None}
        raw["views"] = (kind.stated(init, given) if kind.stated else {}) | (raw.get("views") or {})
    if auto and isinstance(method, dict):
        chosen = _method(kind, config, released)
        method["name"] = "+".join(chosen if one == AUTO else one for one in names)
        if chosen.startswith("data2vec") and config.depth < 10:  # layers that it averages if nothing is said
            place = method if method["name"] == chosen else method.setdefault(chosen, {})
            place.setdefault("top_k", config.depth)
    if config is None:
        model.setdefault("backbone", released.model_type)
    elif not model.get("backbone"):
        known = options(kind).keys() - {*OWN}
        model |= {key: value for key, value in config.to_dict().items() if key in known and key not in model}
        if kind.configure and isinstance(raw["views"], dict):  # a tokenizer knows of a mask token, released configs do not
            with suppress(ValueError):  # one that cannot be loaded is refused later, with all else that is wrong
                decided = kind.configure({}, raw["views"])
                model |= {key: value for key, value in decided.items() if model.get(key) is None}


def _complete(model: dict[str, Any], told: Any, options: Callable[[Modality], dict[str, Any]]) -> bool:
    """Whether nothing is left open, as in the recipe of a run that has begun."""
    return isinstance(told, str) and told in modalities() and not options(modality(told)).keys() - {*OWN} - model.keys()


@lru_cache(maxsize=4)
def _read(init: str, told: str | None) -> tuple[Modality, Any, Any]:
    """The kind of data of a model; its config on the shared transformer, None if it is another network; and its own config.

    Args:
        told: the kind of data that is asked for, which chooses among the members of a joint model.
    """
    from transformers import AutoConfig

    from mmssl.model.released import load_encoder, modality_of

    try:
        network: Any = load_encoder(init)
        shared = network.config if network.config.model_type == "mmssl" else None
        if shared is not None and shared.members:
            fitting = [name for name, own in shared.members.items() if own["modality"] == told]
            if len(fitting) != 1:
                raise RecipeError(f"{init} takes {' and '.join(shared.members)}; name the folder of one, {init}/NAME")
            shared = shared.member(fitting[0])
        kind = modality_of(network) if shared is None else modality(shared.modality)
    except RecipeError as error:
        raise RecipeError(f"model.init: {error}") from None
    if shared is not None and shared.backbone:
        return kind, None, AutoConfig.for_model(**shared.backbone)
    return kind, copy.deepcopy(shared), AutoConfig.from_pretrained(init, trust_remote_code=False)


def _method(kind: Modality, config: Any, released: Any) -> str:
    """What suits the architecture: the method that it comes from, where a table of its kind of data says so."""
    table = import_module(kind.native).METHODS if kind.native else {}
    if config is not None and config.causal:
        return {"vision": "igpt", "text": "causal_lm"}.get(kind.name, "cpc")
    return table.get(released.model_type, "byol" if config is None else "data2vec2")
