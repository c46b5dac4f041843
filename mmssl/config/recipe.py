"""The recipe: how it is loaded, checked against what cannot work, and turned into views and a module."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import Field, ValidationError, create_model, model_validator

from mmssl.config.blocks import DataOptions, HubOptions, OptimOptions, Options, SaveOptions, TrainOptions, WatchOptions
from mmssl.config.chosen import chosen_blocks, model_options
from mmssl.config.continuing import RECIPE, adopt
from mmssl.config.messages import explain, nearest, told
from mmssl.config.reading import apply_override, dump_value, find_recipe, read_yaml
from mmssl.errors import RecipeError
from mmssl.registry import modality

if TYPE_CHECKING:
    from mmssl.methods.method import Method
    from mmssl.model.configuration import MmsslConfig
    from mmssl.model.transformer import Transformer


MODALITIES = "modalities"  # block of recipes for several kinds of data, see mmssl/config/joint.py
BLOCKS = (
    *("out", MODALITIES, "balance", "share_trunk", "bind"),
    *("data", "model", "method", "views", "optim", "train", "watch", "save", "hub"),
)


def _block(kind: type[Options]) -> Any:
    return Field(default_factory=kind)


class Settings(Options):
    """What every run has, whatever it learns from."""

    out: str | None = Field(None, description="Run folder; runs/NAME if unset.")
    optim: OptimOptions = _block(OptimOptions)
    train: TrainOptions = _block(TrainOptions)
    watch: WatchOptions = _block(WatchOptions)
    save: SaveOptions = _block(SaveOptions)
    hub: HubOptions = _block(HubOptions)

    @property
    def members(self) -> dict[str, Recipe]:
        """Name -> what is learned from one kind of data; the name is empty where there is only one."""
        raise TypeError(f"{type(self).__name__} defines no members")

    def dump(self) -> str:
        """The resolved recipe as YAML."""
        found = self.model_dump(mode="json")
        return yaml.safe_dump({name: found[name] for name in BLOCKS if name in found}, sort_keys=False)


class Recipe(Settings):
    """A whole run. `model`, `method` and `views` take the options of the chosen method and modality."""

    data: DataOptions
    model: Options
    method: Options
    views: Options

    @property
    def members(self) -> dict[str, Recipe]:
        """Itself."""
        return {"": self}

    @model_validator(mode="after")
    def _length(self) -> Recipe:
        if (self.train.steps is None) == (self.train.epochs is None):
            raise ValueError("train: give either steps or epochs")
        if self.train.steps is not None and self.optim.heads_first >= self.train.steps:
            raise ValueError(
                f"optim.heads_first: {self.optim.heads_first} of train.steps {self.train.steps}, nothing else learns"
            )
        if self.data.streaming and self.train.steps is None:
            raise ValueError("train.steps: a stream has no known length, give the number of updates instead of epochs")
        if self.data.streaming and self.data.workers and self.data.readers % self.data.workers:
            raise ValueError("data.readers: must be a multiple of data.workers")
        return self

    @classmethod
    def load(cls, path: str | Path | None, *overrides: str, **more: Any) -> Recipe:
        """Read and check a recipe.

        Args:
            path: a YAML file, or the name of a shipped recipe such as `vision/data2vec2-demo`, or None to go on from the model
                that `model.init` names.
            overrides: `key.sub=value`, the value in YAML.
            more: the same as keywords, with `__` for the dot.
        Raises: RecipeError with all errors, each with key, finding and mend.
        """
        return cls.check(read_recipe(path, *overrides, **more), str(path or "recipe"))

    @classmethod
    def check(cls, raw: dict[str, Any], where: str = "recipe") -> Recipe:
        """Validate a plain dict. Raises: RecipeError."""
        recipe, problems = cls.found(raw)
        if problems or recipe is None:
            raise refused(where, problems)
        return recipe

    @classmethod
    def found(cls, raw: dict[str, Any]) -> tuple[Recipe | None, list[str]]:
        """The recipe of a plain dict, if it can be read as one, and all that is wrong with it."""
        from mmssl.methods import METHODS

        if MODALITIES in raw:
            return None, [f"{MODALITIES}: this recipe is for several kinds of data, and is asked for one"]
        if isinstance(raw.get("data"), str):
            raw["data"] = {"path": raw["data"]}
        problems = []
        try:
            adopt(raw, model_options)
        except RecipeError as error:
            return None, [str(error)]
        name = _sub(raw, "method", "name")
        known = isinstance(name, str) and name in METHODS
        if not known:
            problems.append(_unknown_method(name))
        kind = _sub(raw, "data", "modality")
        try:
            found = modality(kind) if isinstance(kind, str) else None
        except RecipeError as error:
            problems.append(str(error))
            found = None
        if kind is None:
            problems.append("data.modality: missing; `mmssl list modalities` shows the choices")
        wrapped = _sub(raw, "model", "backbone") is not None
        if found is not None and known:
            _fill_for(raw, found.defaults, [*METHODS.members(name)], wrapped)
        chosen = recipe_class(name if known else None, found.name if found else None, wrapped)
        try:
            recipe = chosen.model_validate(raw)
        except ValidationError as error:
            problems += [explain(issue, chosen) for issue in told(error.errors())]
            recipe = _without(raw, [issue["loc"] for issue in error.errors()], chosen)
        if recipe is not None and known and found and recipe.wrapped == wrapped:  # else its block is not that of its encoder
            problems += recipe.conflicts()
        return recipe, problems

    def configure(self) -> None:
        """Write the model options that the views decide, such as the size of a vocabulary, into `model`; and those of the
        model of transformers to start from.

        Raises: ValueError that begins with the key that is wrong.
        """
        kind = modality(self.data.modality)
        if self.wrapped and self.model.init:  # type: ignore[attr-defined]
            from mmssl.model import library

            options = library.released(self.model.init, kind.name, self.model.backbone, self.model.options)  # type: ignore[attr-defined]
            self.model = self.model.model_copy(update={"options": options})
        elif kind.configure is not None and not self.wrapped:
            decided = kind.configure(self.model.model_dump(exclude={"init"}), self._view_options())
            self.model = self.model.model_copy(update=decided)

    @property
    def wrapped(self) -> bool:
        """Whether the encoder is a model of transformers as it is, instead of the shared transformer."""
        return getattr(self.model, "backbone", None) is not None

    @property
    def paired(self) -> bool:
        """Whether its rows are compared with the same rows of other kinds of data."""
        from mmssl.methods import METHODS

        return METHODS[self.method.name].pairs  # type: ignore[attr-defined]

    def conflicts(self) -> list[str]:
        """Combinations that cannot work, found by building model and views without memory."""
        import torch

        from mmssl.methods import METHODS

        problems = []
        name: str = self.method.name  # type: ignore[attr-defined]
        chosen = METHODS[name]
        if self.wrapped and chosen.masks:
            return [f"model.backbone: {name} hides tokens, which the shared transformer alone can do; leave it out"]
        if self.wrapped and getattr(self.views, "mask", None) is not None:
            problems.append("views.mask: a backbone sees whole views; leave it out, or model.backbone")
        if not chosen.alone:
            problems.append(f"method.name: {name} holds another method back; put one before it, such as data2vec2+{name}")
        if self.model.freeze and not chosen.pairs:  # type: ignore[attr-defined]
            problems.append(f"model.freeze: {name} would have no encoder to train; leave it out")
        if self.model.lora and not self.model.init:  # type: ignore[attr-defined]
            problems.append("model.lora: updates a model that is there already; give model.init, or leave it out")
        if self.model.lora and self.model.freeze:  # type: ignore[attr-defined]
            problems.append("model.freeze: leaves model.lora nothing to train; leave one of them out")
        if chosen.masks and getattr(self.views, "mask", None) is None:
            problems.append(f"views.mask: {name} learns from hidden tokens; give views.mask={{}} or a ratio")
        with torch.device("meta"):
            steps = (("model", self.configure), ("model", self._encoder), ("views", self.build_views), ("method", self.build))
            for block, build in steps:
                try:
                    built = build()
                except ValueError as error:
                    problems.append(keyed(block, error))
                    if block == "model":
                        break  # the others cannot be built on it
                except (ArithmeticError, MemoryError, RuntimeError, TypeError) as error:  # of sizes that no check foresaw
                    problems.append(f"{block}: cannot be built, {type(error).__name__}: {str(error).splitlines()[0][:200]}")
                    break
                else:
                    problems += self._views_conflict(built, chosen) if build == self.build_views else []
        return problems

    def _views_conflict(self, views: Any, method: type[Method]) -> list[str]:
        """Whether the method takes that many views."""
        from mmssl.methods import METHODS

        name, found = self.method.name, views.count  # type: ignore[attr-defined]
        if found != method.views:
            return [
                f"views: {name} takes {method.views} full-size view{'s' * (method.views > 1)} of a sample, these are {found}; "
                "set views.crops to a policy or a list that gives as many"
            ]
        if views.crops and not method.crops:
            return [f"views: {name} takes no smaller crops, these have {views.crops}; leave them out"]
        if not (method.masks or self.wrapped) and getattr(self.views, "mask", None) is not None:
            return [f"views.mask: {name} sees whole views; leave it out"]
        each = METHODS.members(name)
        dropping = next((one for one, member in each.items() if member.drops), None)
        if dropping and getattr(views, "replaces", False):
            kind = self.views.mask.kind  # type: ignore[attr-defined]
            others = " and ".join(one for one, member in each.items() if member.masks and one != dropping)
            return [
                f"views.mask.kind: {kind} may hide more of one sample than of another; {dropping} needs equally many, take "
                + (f"another, which suits {others} as well" if others else "another")
            ]
        mask = getattr(self.views, "mask", None)
        for member in (member for member in each.values() if member.masks and mask is not None):
            try:
                member.check_mask(mask)
            except ValueError as error:
                return [str(error)]
        return []

    def config(self) -> MmsslConfig:
        """The configuration of the encoder that this recipe trains."""
        from mmssl.model import library
        from mmssl.model.configuration import MmsslConfig

        options = self.model.model_dump(exclude={"init", "freeze", "freeze_features", "lora"})
        if self.wrapped:
            return library.configuration(self.data.modality, **options)
        return MmsslConfig(modality=self.data.modality, **options)

    def _encoder(self) -> Any:
        from mmssl.model.backbone import Backbone, build_encoder
        from mmssl.model.low_rank import add_low_rank
        from mmssl.model.norm import synchronised

        encoder, lora = build_encoder(self.config()), self.model.lora  # type: ignore[attr-defined]
        if lora is not None:
            add_low_rank(encoder, lora.rank, lora.alpha, lora.dropout, lora.modules)
        if self.model.freeze:  # type: ignore[attr-defined]
            encoder.requires_grad_(False)
        if isinstance(encoder, Backbone):
            return synchronised(encoder)
        if self.model.freeze_features:  # type: ignore[attr-defined]
            encoder.features.requires_grad_(False)
        return encoder

    def build_views(self) -> Any:
        """The view maker of the modality."""
        kind = modality(self.data.modality)
        if self.wrapped:
            from mmssl.model.library import inputs_class

            inputs = inputs_class(kind.name)
            return kind.views(inputs(**_known(inputs, self.model.model_dump())), **self._view_options())
        with_features = kind.features(**_known(kind.features, self.config().to_dict() | {"dim": self.config().hidden_size}))
        return kind.views(with_features, **self._view_options())

    def _view_options(self) -> dict[str, Any]:
        return {name: getattr(self.views, name) for name in type(self.views).model_fields}

    def build(self, trunk: Transformer | None = None) -> Method:
        """The trainable module, without probes. Weights depend on `train.seed` alone; works under `torch.device("meta")`.

        Args:
            trunk: whose blocks the encoder uses instead of its own.
        """
        import torch

        from mmssl.methods import METHODS
        from mmssl.random import key

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(self.train.seed, "init"))
            options = _options(self.method)
            encoder = self._encoder()
            if trunk is not None:
                encoder.transformer.share(trunk)
            return METHODS[options.pop("name")](encoder, **options)


def refused(where: str, problems: list[str]) -> RecipeError:
    """All that is wrong, each once."""
    lines = [*dict.fromkeys(problems)]
    listing = "\n".join(f"  {line}" for line in lines)
    return RecipeError(f"{where} has {len(lines)} error{'s' * (len(lines) > 1)}:\n{listing}")


def read_recipe(path: str | Path | None, *overrides: str, **more: Any) -> dict[str, Any]:
    """A recipe as a plain dict, with what is overridden; see `Recipe.load`. Raises: RecipeError.

    Args:
        path: None for the one that goes on from a model, which `model.init` names.
    """
    if path is None:
        raw = copy.deepcopy(RECIPE)
    else:
        file = find_recipe(path)
        raw = {"out": f"runs/{file.stem}", **read_yaml(file)}
    for text in (*overrides, *(f"{name.replace('__', '.')}={dump_value(value)}" for name, value in more.items())):
        apply_override(raw, text)
    if path is None and not _sub(raw, "model", "init"):
        raise RecipeError(
            "RECIPE: missing; name one (`mmssl list recipes`), or a model to go on from: model.init=FOLDER_OR_ID data=PATH."
        )
    return raw


def keyed(block: str, error: ValueError) -> str:
    """The text of an error in that block, which begins with a key of the recipe."""
    named = re.match(rf"({'|'.join(Recipe.model_fields)})\.\w", str(error))
    return str(error) if named else f"{block}.{error}"


@cache
def recipe_class(method: str | None, kind: str | None, wrapped: bool = False) -> type[Recipe]:
    """The recipe with the options of that method and modality; unchecked blocks where one is unknown.

    Args:
        wrapped: with those of a model of transformers as the encoder, in place of those of the shared transformer.
    """
    fields = chosen_blocks(method, None if kind is None else modality(kind), wrapped)
    return create_model("Recipe", __base__=Recipe, **fields)


def _options(block: Options) -> dict[str, Any]:
    """Its options by name, of a block in it as well."""
    found = {name: getattr(block, name) for name in type(block).model_fields}
    return {name: _options(value) if isinstance(value, Options) else value for name, value in found.items()}


def _unknown_method(name: Any) -> str:
    """What is wrong with the name of a method, or of several."""
    from mmssl.methods import METHODS

    names = name.split("+") if isinstance(name, str) else [name]
    wrong = [one for one in names if not isinstance(one, str) or one not in METHODS]
    if not wrong:
        return f"method.name: found {name!r}, which names a method twice; take each once"
    within = f" in {name!r}" if len(names) > 1 else ""
    return f"method.name: found {wrong[0]!r}{within}, known methods are {', '.join(sorted(METHODS))}" + nearest(
        wrong[0], METHODS
    )


def _fill_for(raw: dict[str, Any], defaults: dict[str, Any], methods: list[str], wrapped: bool) -> None:
    """Put a modality's defaults for these methods where the recipe says nothing; where they differ, those of the first count.

    Args:
        defaults: method -> block -> options.
        wrapped: whether those of the shared transformer mean nothing.
    """
    merged: dict[str, dict[str, Any]] = {}
    for name in methods:
        for block, values in copy.deepcopy(defaults.get(name, {})).items():
            if block == "method" and len(methods) > 1:
                _fill(raw["method"], {name: values})
            elif block != "model" or not wrapped:
                merged[block] = values | merged.get(block, {})
    _fill(raw, merged)


def _fill(raw: dict[str, Any], defaults: dict[str, dict[str, Any]]) -> None:
    """Put the modality's defaults where the recipe says nothing; a mask that is given in part is completed."""
    for block, values in defaults.items():
        inner = raw.setdefault(block, {})
        if isinstance(inner, dict):
            for key, value in values.items():
                given = inner.setdefault(key, value)
                if key == "mask" and isinstance(given, dict):
                    inner[key] = value | given


def _sub(raw: dict[str, Any], block: str, name: str) -> Any:
    inner = raw.get(block)
    return inner.get(name) if isinstance(inner, dict) else None


def _known(target: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    """Those values that `target` takes."""
    return {name: values[name] for name in inspect.signature(target).parameters if name in values}


def _without(raw: dict[str, Any], wrong: list[tuple[Any, ...]], kind: type[Recipe]) -> Recipe | None:
    """The recipe without its wrong keys, so that what else is wrong can be found at the same time; None if it needs them."""
    rest = copy.deepcopy(raw)
    for location in wrong:
        target: Any = rest
        for step in location[:-1]:
            target = target.get(step) if isinstance(target, dict) else None
        if isinstance(target, dict) and location:
            target.pop(location[-1], None)
    try:
        return kind.model_validate(rest)
    except ValidationError:
        return None
