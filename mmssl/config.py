"""The checked recipe: one YAML file, seven blocks, every error at once and each with its mend."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import math
import re
import typing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from mmssl.errors import RecipeError
from mmssl.registry import Modality, modality
from mmssl.schedules import Schedule

if TYPE_CHECKING:
    from mmssl.methods.method import Method
    from mmssl.model.configuration import MmsslConfig

MAX_BYTES, MAX_DEPTH = 1_000_000, 32


class Options(BaseModel):
    """A block of the recipe. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class DataOptions(Options):
    """What to learn from."""

    path: str | None = Field(None, description="Folder, table (parquet, csv, jsonl) or Hub data set id.")
    modality: str = Field(description="Kind of data; `mmssl list modalities` shows them.")
    split: str = Field("train", description="Sub-folder, file prefix or Hub split to train on.")
    column: str | None = Field(None, description="Column that holds the data; found by name if unset.")
    label: str | None = Field(None, description="Column of class labels for probes only; found by name if unset.")
    root: str | None = Field(None, description="Folder that names in a table are relative to; the table's own if unset.")
    config: str | None = Field(None, description="Configuration name of a Hub data set.")
    revision: str | None = Field(None, description="Commit of a Hub data set.")
    streaming: bool = Field(False, description="Read a table or Hub data set without downloading it whole.")
    readers: int = Field(8, ge=1, description="Independent readers of a stream for each rank; a multiple of `workers`.")
    block: int = Field(1024, ge=1, description="Rows of a stream that are shuffled together.")
    limit: int | None = Field(None, ge=1, description="Use only this many samples, spread evenly.")
    buckets: int = Field(16, ge=1, description="Groups of samples of like length that are batched together.")
    budget: int | None = Field(
        None,
        ge=1,
        description="Audio samples (speech) or tokens (text documents) in a micro-batch; train.micro_batch times the longest "
        "view if unset.",
    )
    workers: int = Field(2, ge=0, description="Processes for each rank that decode and augment.")
    max_bad: float = Field(0.001, ge=0, le=1, description="Share of unreadable samples above which the run stops.")
    min_bad: int = Field(100, ge=0, description="Unreadable samples that are always tolerated; 0 with max_bad=0 is strict.")


class OptimOptions(Options):
    """How weights change."""

    name: Literal["adamw", "sgd", "lars", "larc"] = Field(
        "adamw", description="lars and larc, apex's relative (SwAV), adapt the parameters that decay; not under DeepSpeed."
    )
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    scale: Literal["none", "linear", "sqrt"] = Field(
        "none", description="Multiply lr and bias_lr by N/256 or by sqrt(N/256), N being train.global_batch."
    )
    bias_lr: float | None = Field(
        None,
        gt=0,
        description="Peak rate of parameters of at most one dimension. The 0.0048 of Barlow Twins was tuned to gradients that "
        "its 32 ranks made 32 times too small, which only shows where a step is not adapted: with exact ones it is 0.00015.",
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95), description="adamw only."
    )
    eps: float = Field(1e-8, gt=0, description="adamw only.")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd, lars and larc.")
    nesterov: bool = Field(False, description="sgd only.")
    trust: float = Field(1e-3, gt=0, description="lars and larc: share of its length that a tensor may move at a rate of 1.")
    variant: Literal["outside", "classic", "popular", "paper"] = Field(
        "outside",
        description="lars only. outside: the rate multiplies the momentum buffer (BYOL, Barlow Twins, VICReg, MoCo v3, DINO); "
        "classic: it is inside (SimCLR); popular: trust by the length of the buffer; paper: inside, and a sum of lengths.",
    )
    trust_clip: bool = Field(False, description="larc only: no step is longer than that of plain SGD.")
    weight_decay: float = Field(0.05, ge=0, description="Decoupled in adamw, part of the gradient in the others.")
    weight_decay_end: float | None = Field(
        None, ge=0, description="Where half a cosine over the run takes the weight decay (DINO: from 0.04 to 0.4)."
    )
    decay: Literal["matrices", "above_1d", "all"] = Field(
        "matrices",
        description="What decays: weights of linear, convolutional and embedding layers; whatever has two dimensions or more "
        "and is no bias (DINO, Barlow Twins, VICReg, MoCo v3 with LARS); everything (data2vec, MoCo, SimSiam, SwAV).",
    )
    exclude: list[str] = Field(
        default_factory=list, description="Parts of the method, such as `student.projector`, that do not decay in any case."
    )
    steady: list[str] = Field(
        default_factory=list, description="Parts of the method, such as `predictor` (SimSiam), whose rate stays at the peak."
    )
    warmup: int = Field(0, ge=0, description="Updates of linear warm-up from 0.")
    warmup_from: float | None = Field(
        None,
        ge=0,
        description="Rate of the first update, not scaled; the last one of the warm-up then has the peak (SwAV, DINO). If "
        "unset, the first has 0 and the one after the warm-up the peak (SimCLR, BYOL).",
    )
    hold: int = Field(0, ge=0, description="Updates at the peak after the warm-up.")
    fall: Literal["cosine", "exponential", "steps", "none"] = Field(
        "cosine", description="By half a cosine, by equal factors, to a tenth at each of fall_at, or not at all."
    )
    fall_at: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=list, validate_default=True, description="With fall=steps: shares of the run, such as [0.6, 0.8]."
    )
    lr_end: float | None = Field(
        None,
        ge=0,
        description="Rate at the end, not scaled; if unset, 0 after a cosine and a hundredth of the peak after an exponential.",
    )
    by: Literal["step", "epoch"] = Field(
        "step", description="epoch: the rate is constant in each epoch (MoCo, SimSiam); warmup and hold are then epochs."
    )
    clip: float = Field(0.0, ge=0, description="Largest global gradient norm; 0 = no clipping.")
    clip_each: float = Field(0.0, ge=0, description="Largest gradient norm of each single parameter (DINO); 0 = no clipping.")

    @field_validator("nesterov", "variant", "trust_clip", "warmup_from", "fall_at", "lr_end", "clip_each")
    @classmethod
    def _agrees(cls, value: Any, info: Any) -> Any:
        """Whether a key has something to act on, and contradicts none of those above it."""
        given = info.data
        name, fall = given.get("name"), given.get("fall")
        if info.field_name == "nesterov" and value and (name != "sgd" or not given.get("momentum")):
            raise ValueError("Nesterov's momentum is for optim.name=sgd with optim.momentum above 0; leave it out")
        if info.field_name == "variant" and value != "outside" and name != "lars":
            raise ValueError(f"{value} is a variant of lars, optim.name is {name}; leave it out or set optim.name=lars")
        if info.field_name == "trust_clip" and value and name != "larc":
            raise ValueError(f"is for larc, optim.name is {name}; leave it out or set optim.name=larc")
        if info.field_name == "warmup_from" and value is not None and not given.get("warmup"):
            raise ValueError(f"{value}, but there is no warm-up; set optim.warmup or leave it out")
        if info.field_name == "fall_at" and bool(value) != (fall == "steps"):
            raise ValueError(f"{value}, optim.fall is {fall}; give shares, such as [0.6, 0.8], with optim.fall=steps only")
        if info.field_name == "lr_end" and value is not None:
            if fall in ("steps", "none"):
                raise ValueError(f"{value}, but with optim.fall={fall} the end follows from optim.lr; leave it out")
            if fall == "exponential" and not value:
                raise ValueError("0, which equal factors never reach; give a rate above 0 or set optim.fall=cosine")
        if info.field_name == "clip_each" and value and given.get("clip"):
            raise ValueError("optim.clip is set too; clip by the norm of all gradients or by each parameter's own, not both")
        return value


class TrainOptions(Options):
    """How long, how much at once, in which precision."""

    steps: int | None = Field(None, ge=1, strict=True, description="Optimizer updates.")
    epochs: float | None = Field(None, gt=0, description="Passes over the data, instead of steps.")
    global_batch: int = Field(256, ge=1, description="Samples of one update, over all ranks and micro-batches.")
    micro_batch: int | None = Field(None, ge=1, description="Samples on a device at once; all of a rank's share if unset.")
    seed: int = Field(0, ge=0)
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 is autocast: weights stay fp32.")
    device: Literal["auto", "cpu"] = "auto"
    compile: bool = Field(False, description="torch.compile on each transformer block.")
    threads: int | None = Field(None, ge=1, description="CPU threads of a rank; torch's default if unset.")
    log_every: int = Field(10, ge=1, description="Updates between lines of metrics.jsonl.")
    max_skips: int = Field(3, ge=0, description="Non-finite updates in a row after which the run stops.")
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)


class WatchOptions(Options):
    """Whether it works: probes on held-out data, if there are labels."""

    every: int = Field(500, ge=0, description="Updates between probes; 0 = only at the end.")
    path: str | None = Field(None, description="Labelled data for the probes; data.path if unset.")
    train: str = Field("train", description="Split whose samples are the memory of the probes.")
    test: str = Field("test", description="Split that is classified; a tenth of `train` is held out if it does not exist.")
    samples: int = Field(5000, ge=20, description="At most this many samples of each split.")
    neighbours: int = Field(20, ge=1)
    linear: bool = Field(True, description="Train a linear classifier on detached features along with the model.")
    guard: dict[str, float] = Field(
        default_factory=dict, description="Least value of a health metric, such as {target_std: 0.1}; below it the run stops."
    )
    guard_after: int = Field(5000, ge=0, description="Updates before the guard wakes.")


class SaveOptions(Options):
    """What stays on disk."""

    every: int = Field(1000, ge=1, description="Updates between checkpoints.")
    keep: int = Field(2, ge=1, description="Checkpoints kept.")


def _block(kind: type[Options]) -> Any:
    return Field(default_factory=kind)


class Recipe(Options):
    """A whole run. `model`, `method` and `views` take the options of the chosen method and modality."""

    out: str | None = Field(None, description="Run folder; runs/NAME if unset.")
    data: DataOptions
    model: Options
    method: Options
    views: Options
    optim: OptimOptions = _block(OptimOptions)
    train: TrainOptions = _block(TrainOptions)
    watch: WatchOptions = _block(WatchOptions)
    save: SaveOptions = _block(SaveOptions)

    @model_validator(mode="after")
    def _length(self) -> Recipe:
        if (self.train.steps is None) == (self.train.epochs is None):
            raise ValueError("train: give either steps or epochs")
        if self.data.streaming and self.train.steps is None:
            raise ValueError("train.steps: a stream has no known length, give the number of updates instead of epochs")
        if self.data.streaming and self.data.workers and self.data.readers % self.data.workers:
            raise ValueError("data.readers: must be a multiple of data.workers")
        return self

    @classmethod
    def load(cls, path: str | Path, *overrides: str, **more: Any) -> Recipe:
        """Read and check a recipe.

        Args:
            path: a YAML file, or the name of a shipped recipe such as `vision/data2vec2-demo`.
            overrides: `key.sub=value`, the value in YAML.
            more: the same as keywords, with `__` for the dot.
        Raises: RecipeError with all errors, each with key, finding and mend.
        """
        file = find_recipe(path)
        raw = {"out": f"runs/{file.stem}", **read_yaml(file)}
        for text in (*overrides, *(f"{name.replace('__', '.')}={dump_value(value)}" for name, value in more.items())):
            apply_override(raw, text)
        return cls.check(raw, str(path))

    @classmethod
    def check(cls, raw: dict[str, Any], where: str = "recipe") -> Recipe:
        """Validate a plain dict. Raises: RecipeError."""
        from mmssl.methods import METHODS

        if isinstance(raw.get("data"), str):
            raw["data"] = {"path": raw["data"]}
        problems = []
        name = _sub(raw, "method", "name")
        known = isinstance(name, str) and name in METHODS
        if not known:
            problems.append(
                f"method.name: found {name!r}, known methods are {', '.join(sorted(METHODS))}" + nearest(name, METHODS)
            )
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
            defaults = copy.deepcopy(found.defaults.get(name, {}))
            _fill(raw, {block: values for block, values in defaults.items() if block != "model" or not wrapped})
        chosen = recipe_class(name if known else None, found.name if found else None, wrapped)
        try:
            recipe = chosen.model_validate(raw)
        except ValidationError as error:
            problems += [explain(issue, chosen) for issue in told(error.errors())]
            recipe = _without(raw, [issue["loc"] for issue in error.errors()], chosen)
        if recipe is not None and known and found:
            problems += recipe.conflicts()
        if problems or recipe is None:
            listing = "\n".join(f"  {line}" for line in dict.fromkeys(problems))
            raise RecipeError(f"{where} has {len(set(problems))} error{'s' * (len(set(problems)) > 1)}:\n{listing}")
        return recipe

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
                else:
                    problems += self._views_conflict(built, chosen) if build == self.build_views else []
        return problems

    def _views_conflict(self, views: Any, method: type[Method]) -> list[str]:
        """Whether the method takes that many views."""
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
        return []

    def config(self) -> MmsslConfig:
        """The configuration of the encoder that this recipe trains."""
        from mmssl.model import library
        from mmssl.model.configuration import MmsslConfig

        options = self.model.model_dump(exclude={"init", "freeze_features"})
        if self.wrapped:
            return library.configuration(self.data.modality, **options)
        return MmsslConfig(modality=self.data.modality, **options)

    def _encoder(self) -> Any:
        from mmssl.model.backbone import Backbone, build_encoder
        from mmssl.model.norm import synchronised

        encoder = build_encoder(self.config())
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

    def build(self) -> Method:
        """The trainable module, without probes. Weights depend on `train.seed` alone; works under `torch.device("meta")`."""
        import torch

        from mmssl.methods import METHODS
        from mmssl.random import key

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(self.train.seed, "init"))
            options = {name: getattr(self.method, name) for name in type(self.method).model_fields if name != "name"}
            return METHODS[self.method.name](self._encoder(), **options)  # type: ignore[attr-defined]

    def dump(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def keyed(block: str, error: ValueError) -> str:
    """The text of an error in that block, which begins with a key of the recipe."""
    named = re.match(rf"({'|'.join(Recipe.model_fields)})\.\w", str(error))
    return str(error) if named else f"{block}.{error}"


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


class _Unchecked(Options):
    model_config = ConfigDict(extra="allow")


def _model(name: str, base: type[BaseModel], fields: dict[str, Any]) -> Any:
    return create_model(name, __base__=base, **fields)


def _model_block(kind: Modality, wrapped: bool) -> type[Options]:
    from mmssl.model import library
    from mmssl.model.configuration import MmsslConfig

    core = options_of(MmsslConfig, "modality", "kwargs", "backbone")
    whole = {name: core.pop(name) for name in ("stem", "zero_init")}
    fields: dict[str, Any] = {
        "init": (str | None, Field(None, description="Folder or Hub id of a model of the same shape to start from.")),
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


@cache
def recipe_class(method: str | None, kind: str | None, wrapped: bool = False) -> type[Recipe]:
    """The recipe with the options of that method and modality; unchecked blocks where one is unknown.

    Args:
        wrapped: with those of a model of transformers as the encoder, in place of those of the shared transformer.
    """
    from mmssl.methods import METHODS

    blocks: dict[str, Any] = {"model": (_Unchecked, ...), "method": (_Unchecked, ...), "views": (_Unchecked, ...)}
    if method is not None:
        fields = options_of(METHODS[method], "encoder")
        blocks["method"] = (_model("Method", _ScheduleOptions, {"name": (Literal[method], method), **fields}), ...)
    if kind is not None:
        found: Modality = modality(kind)
        blocks["model"] = (_model_block(found, wrapped), ...)
        views = _model("Views", Options, options_of(found.views, "features"))
        blocks["views"] = (views, Field(default_factory=dict, validate_default=True))
    return _model("Recipe", Recipe, blocks)


# Reading and errors -------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Safe, with `1e-3` a number, and duplicate keys an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain name", name.start_mark)
            if name.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {name.value!r} is given twice", name.start_mark)
            seen.add(name.value)
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(None, None, "aliases are not allowed", self.peek_event().start_mark)
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:
            raise yaml.constructor.ConstructorError(None, None, "nested too deeply", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """YAML by the safe loader. Raises: RecipeError naming `where` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe file as a dict. Raises: RecipeError."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path} is larger than {MAX_BYTES} bytes; a recipe fits one screen.")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path} holds {type(raw).__name__}, expected the blocks data, model, method, views, optim, train, watch."
        )
    return raw


def recipe_root() -> Path:
    """The folder of the shipped recipes."""
    return Path(__file__).resolve().parent.parent / "recipes"


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes, as `find_recipe` takes them."""
    root = recipe_root()
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.glob("*/*.yaml") if p.parent.name != "accelerate")


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe given by path or by shipped name. Raises: RecipeError with the nearest names."""
    path = Path(name)
    shipped = recipe_root() / (path.with_suffix(".yaml") if path.name else "-")
    for candidate in (path, shipped, recipe_root().parent / path):
        if candidate.is_file():
            return candidate
    names = shipped_recipes()
    raise RecipeError(
        f"{name}: no such recipe file, and no shipped recipe of that name{nearest(str(name), names)}. "
        f"Shipped: {', '.join(names)}."
    )


def dump_value(value: Any) -> str:
    """A Python value as a one-line YAML value."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()


ALIASES = {"method": "method.name", "data": "data.path", "model": "model.init"}


def apply_override(raw: dict[str, Any], text: str) -> None:
    """Set `key.sub=value` in a raw recipe. Raises: RecipeError."""
    name, equals, value = text.partition("=")
    name = ALIASES.get(name, name)
    if not equals or not name:
        raise RecipeError(f"{text!r} is not understood: overrides are key.sub=value, for example optim.lr=1e-3.")
    if isinstance(raw.get("data"), str):
        raw["data"] = {"path": raw["data"]}
    *blocks, leaf = name.split(".")
    target = raw
    for block in blocks:
        inner = target.setdefault(block, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{name}: {block} is {inner!r} in the recipe, it has no key {leaf!r}.")
        target = inner
    target[leaf] = parse_yaml(value, name) if value else None


def nearest(found: Any, names: typing.Iterable[str]) -> str:
    """' (did you mean X?)' or ''."""
    close = difflib.get_close_matches(str(found), list(names), 1, 0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _fields_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    """Names of the options at that place: of a block, or of a dataclass inside one, perhaps in a union."""
    for step in (part for part in location if not isinstance(part, int)):
        fields = _fields(model)
        if step not in fields:
            return []
        model = fields[step]
    return [*_fields(model)]


def _fields(kind: Any) -> dict[str, Any]:
    """Name -> type."""
    if hasattr(kind, "model_fields"):
        return {name: field.annotation for name, field in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind):
        return {field.name: field.type for field in dataclasses.fields(kind)}
    return {name: inner for choice in typing.get_args(kind) for name, inner in _fields(choice).items()}


CHOICES = ("function-", "Schedule", "float", "list[")  # how pydantic names the choices of a union


def told(issues: list[Any]) -> list[Any]:
    """Those issues that are about what was given: a list that is wrong inside is not also wrong for being no name."""
    return [issue for issue in issues if issue["loc"][-1:] != ("str",) or not isinstance(issue["input"], list)]


def explain(issue: Any, model: type[BaseModel]) -> str:
    """One line for one pydantic error: key, finding, what is allowed, the nearest valid name."""
    location = tuple(part for part in issue["loc"] if isinstance(part, int) or not str(part).startswith(CHOICES))
    where = ".".join(str(part) for part in location) or "recipe"
    kind, message = issue["type"], issue["msg"].removeprefix("Value error, ")
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        names = _fields_at(model, location[:-1])
        return f"{where}: unknown key{nearest(location[-1], names)}" + (f"; allowed are {', '.join(names)}" if names else "")
    if kind == "missing":
        return f"{where}: missing"
    if kind == "value_error":
        return message if where == "recipe" else f"{where}: {message}"
    return f"{where}: found {issue['input']!r}; {message[0].lower()}{message[1:]}"
