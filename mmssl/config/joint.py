"""A recipe for several kinds of data: one for each, on a trunk that they share."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError, field_validator

from mmssl.config.blocks import Options, WatchOptions
from mmssl.config.messages import explain, nearest, told
from mmssl.config.pairs import BindOptions, conflicts
from mmssl.config.recipe import BLOCKS, MODALITIES, Recipe, Settings, read_recipe, refused

if TYPE_CHECKING:
    from mmssl.methods.method import Method

OWN = ("data", "model", "method", "views")  # blocks that a member may complete; beside `modalities` they hold for all
PROBED = ("path", "train", "test", "samples", "neighbours", "linear")  # of `watch`, what a member may have of its own
TRUNK = (  # what the blocks of the shared transformer are made of
    *("hidden_size", "depth", "prenet_depth", "heads", "mlp_ratio", "norm", "norm_eps", "norm_kind", "activation", "causal"),
    *("dropout", "attention_dropout", "drop_path", "layer_drop", "layer_scale"),
)


class MemberOptions(Options):
    """One kind of data in a run of several. What is not said here is as beside `modalities`, for all."""

    weight: float = Field(1.0, ge=0, description="What its loss counts; 0: not at all, though it is computed.")
    share: float = Field(1.0, ge=0.001, le=1000, description="Part of train.global_batch, against the shares of the others.")
    data: dict[str, Any] | str = Field(default_factory=dict, description="As above; a path or id alone is enough.")
    model: dict[str, Any] = Field(default_factory=dict, description="As above, what is this member's own.")
    method: dict[str, Any] | str = Field(default_factory=dict, description="As above, or another method.")
    views: dict[str, Any] = Field(default_factory=dict, description="As above.")
    watch: dict[str, Any] = Field(default_factory=dict, description="As above, such as the path of labelled data.")

    @field_validator("data", "model", "method", "views", "watch", mode="before")
    @classmethod
    def _nothing(cls, value: Any) -> Any:
        """A key without a value stands for an empty block."""
        return {} if value is None else value


class JointRecipe(Settings):
    """A run of several kinds of data. `modalities` names each, with the blocks `data, model, method, views`.

    `bind` holds those together whose rows are pairs.
    """

    modalities: dict[str, MemberOptions] = Field(min_length=1)
    balance: Literal["weight", "magnitude"] = Field(
        "weight", description="magnitude: losses are divided by their running means, before weights multiply them."
    )
    share_trunk: bool = Field(True, description="One transformer for all; otherwise each member has its own, of any shape.")
    bind: BindOptions | None = Field(None, description="How members whose method is bind are held together.")
    _members: dict[str, Recipe] = PrivateAttr(default_factory=dict)

    @property
    def members(self) -> dict[str, Recipe]:
        """Each with its own share of the batch."""
        return self._members

    def build(self) -> dict[str, Method]:
        """The trainable modules, on one trunk, that of the first, if they share it."""
        found: dict[str, Method] = {}
        for name, recipe in self.members.items():
            trunk = next((method.student.encoder.transformer for method in found.values() if self.share_trunk), None)
            found[name] = recipe.build(trunk)
        return found

    @property
    def bound(self) -> dict[str, Recipe]:
        """The members whose rows are pairs."""
        return {name: recipe for name, recipe in self.members.items() if recipe.paired}

    @classmethod
    def check(cls, raw: dict[str, Any], where: str = "recipe") -> JointRecipe:
        """Validate a plain dict. Raises: RecipeError with all that is wrong."""
        recipe, problems, sizes = None, [], {}
        try:
            recipe = cls.model_validate({block: values for block, values in raw.items() if block not in OWN})
        except ValidationError as error:
            problems = [explain(issue, cls) for issue in told(error.errors())]
        else:
            sizes, problems = shares(recipe)
        members = raw[MODALITIES] if isinstance(raw[MODALITIES], dict) else {}
        shared = {block: _block(raw, block) for block in OWN}
        found: dict[str, Recipe] = {}
        for name, member in members.items():
            if not str(name).isidentifier():
                problems.append(f"{MODALITIES}.{name}: a name is made of letters, digits and underscores")
            elif isinstance(member, dict):
                own, wrong = _alone(raw, shared, name, member, sizes.get(name, {}))
                problems += wrong
                found |= {name: own} if own is not None else {}
        problems = [*dict.fromkeys(problems)]  # what is wrong above `modalities` is wrong for each
        if recipe is not None and not problems:
            recipe._members = found
            for name, member in recipe.modalities.items():
                for block in OWN:
                    setattr(member, block, getattr(found[name], block).model_dump(mode="json"))
                member.watch = found[name].watch.model_dump(mode="json", include={*PROBED})
            problems = recipe.conflicts()
            if recipe.bound and recipe.bind is None:
                recipe.bind = BindOptions.model_validate({})
        if recipe is None or problems:
            raise refused(where, problems)
        return recipe

    def conflicts(self) -> list[str]:
        """What cannot be learned together."""
        found = []
        configs = {name: recipe.config() for name, recipe in self.members.items()}
        for name, recipe in self.members.items():
            if recipe.wrapped and self.share_trunk:
                return [
                    f"{MODALITIES}.{name}.model.backbone: a model of transformers has no trunk to share; leave it out, or set "
                    "share_trunk=false"
                ]
            if self.share_trunk and recipe.model.freeze:  # type: ignore[attr-defined]
                found.append(f"{MODALITIES}.{name}.model.freeze: its transformer is that of all members; set share_trunk=false")
        loras = {name: recipe.model.lora for name, recipe in self.members.items()}  # type: ignore[attr-defined]
        if self.share_trunk and any(lora != next(iter(loras.values())) for lora in loras.values()):
            found.append(
                "model.lora: updates layers of the transformer that all members share; set it once beside `modalities`"
            )
        (first, one), *others = configs.items()
        for name, other in others if self.share_trunk else ():
            unlike = [key for key in TRUNK if getattr(one, key) != getattr(other, key)]
            found += [
                f"model.{key}: {getattr(one, key)!r} for {first} and {getattr(other, key)!r} for {name}; the transformer that "
                "they share has one, set it once beside `modalities`"
                for key in unlike
            ]
        if not sum(member.weight for member in self.modalities.values()):
            found.append(f"{MODALITIES}: all weights are 0; one at least must be above")
        if self.train.epochs is not None:
            found.append("train.epochs: passes over several data sets are of unlike length; give train.steps instead")
        if self.optim.by == "epoch":
            found.append("optim.by: epoch, and a run of several data sets has none; set it to step")
        if "bind" in self.members:
            found.append(f"{MODALITIES}.bind: metrics of the binding have this name; take another")
        return found + conflicts(self.bind, self.bound, {name: member.share for name, member in self.modalities.items()})


def shares(recipe: JointRecipe) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Member -> its `global_batch` and `micro_batch`, and why they cannot be whole numbers."""
    parts = {name: Fraction(member.share).limit_denominator(1000) for name, member in recipe.modalities.items()}
    whole = sum(parts.values())
    unit = math.lcm(*((part / whole).denominator for part in parts.values()))
    sizes: dict[str, dict[str, int]] = {name: {} for name in parts}
    problems = []
    for key in ("global_batch", "micro_batch"):
        total = getattr(recipe.train, key)
        if total is None:
            continue
        if total % unit:
            near = " or ".join(str(n) for n in (total // unit * unit, (total // unit + 1) * unit) if n)
            told_as = " : ".join(f"{member.share:g}" for member in recipe.modalities.values())
            problems.append(f"train.{key}: {total} samples cannot be shared as {told_as}; take {near}")
        for name, part in parts.items():
            sizes[name][key] = max(1, int(total * part / whole))
    return sizes, problems


def _alone(
    raw: dict[str, Any], shared: dict[str, dict[str, Any]], name: str, member: dict[str, Any], sizes: dict[str, int]
) -> tuple[Recipe | None, list[str]]:
    """The recipe of a member, completed by what holds for all, and what is wrong in it, by its key in the whole."""
    own: dict[str, Any] = {block: shared[block] | _block(member, block) for block in OWN}
    own["data"].setdefault("modality", name)
    chosen = _block(member, "method")
    if chosen.get("name", shared["method"].get("name")) != shared["method"].get("name"):
        own["method"] = chosen  # of another method the options mean nothing
    own["train"] = _block(raw, "train") | sizes
    own["watch"] = _block(raw, "watch") | _block(member, "watch")
    common = [f"{MODALITIES}.{name}.watch.{key}: is for the whole run; set watch.{key}, beside `{MODALITIES}`"
              for key in _block(member, "watch") if key in WatchOptions.model_fields and key not in PROBED]  # fmt: skip
    found, wrong = Recipe.found({"out": raw.get("out"), **own, **{block: _block(raw, block) for block in ("optim", "save")}})
    mine = re.compile(rf"({'|'.join((*OWN, 'watch'))})\b")
    return found, [*common, *(f"{MODALITIES}.{name}.{line}" if mine.match(line) else line for line in wrong)]


def _block(raw: dict[str, Any], block: str) -> dict[str, Any]:
    """A block as a dict, where a word alone stands for a path or a name; what is none is refused elsewhere."""
    found = raw.get(block)
    if isinstance(found, str) and block in ("data", "method"):
        return {"path" if block == "data" else "name": found}
    return dict(found) if isinstance(found, dict) else {}


def check_recipe(raw: dict[str, Any], where: str = "recipe") -> Settings:
    """A recipe for one kind of data or for several, from a plain dict. Raises: RecipeError."""
    if unknown := [name for name in raw if name not in BLOCKS] if MODALITIES in raw else []:
        raise refused(where, [f"{name}: unknown key{nearest(name, BLOCKS)}" for name in unknown])
    return JointRecipe.check(raw, where) if MODALITIES in raw else Recipe.check(raw, where)


def load_recipe(path: str | Path | None, *overrides: str, **more: Any) -> Settings:
    """As `Recipe.load`, for one kind of data or for several."""
    return check_recipe(read_recipe(path, *overrides, **more), str(path or "recipe"))
