"""What binds several kinds of data by the rows of one table, and what they must have in common for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from mmssl.config.blocks import Options

if TYPE_CHECKING:
    from mmssl.config.recipe import Recipe
    from mmssl.methods.bind import Binding

ROWS = ("path", "split", "config", "revision", "limit")  # of `data`, what says which rows there are


class BindOptions(Options):
    """How members whose method is bind are held together: rows of one table are pairs."""

    loss: Literal["infonce", "sigmoid"] = Field("infonce", description="As CLIP, or as SigLIP.")
    temperature: float | None = Field(
        None, gt=0, description="At the start, then learned; 0.07 for infonce, which keeps it above 0.01, 0.1 for sigmoid."
    )
    bias: float = Field(-10.0, description="Of sigmoid, at the start; then it is learned.")
    weight: float = Field(1.0, gt=0, description="Of its loss, beside those that members have of their own.")
    same: Literal["leave_out", "positive", "negative"] = Field(
        "leave_out", description="What rows are to each other that have the same content on one side, such as the same caption."
    )
    incomplete: Literal["refuse", "skip"] = Field(
        "refuse", description="Rows that lack one side: end before the first update, or leave them out as bad samples."
    )
    prompts: list[str] = Field(
        ["{}"], min_length=1, description="What the zero-shot probe puts names of classes into, such as `a photo of a {}`."
    )

    @field_validator("prompts")
    @classmethod
    def _holds(cls, value: list[str]) -> list[str]:
        """Whether a name has a place in each."""
        for prompt in value:
            if prompt.count("{}") != 1:
                raise ValueError(f"{prompt!r} has no single place {{}} for the name of a class")
        return value

    def build(self) -> Binding:
        """Raises: ValueError that begins with the option that is wrong."""
        from mmssl.methods.bind import Binding

        return Binding(self.loss, self.temperature, self.bias, self.weight, self.same)


def conflicts(bind: BindOptions | None, bound: Mapping[str, Recipe], shares: Mapping[str, float]) -> list[str]:
    """Why the rows of these members cannot be pairs. shares: of the batch, of each."""
    if not bound:
        return ["bind: no member has method.name=bind; give it to those whose rows are pairs"] if bind else []
    (first, one), *others = bound.items()
    if not others:
        return [f"modalities.{first}.method.name: bind compares the rows of two members or more, and no other one has it"]
    found = []
    for name, other in others:
        for key in ROWS:
            mine, theirs = getattr(one.data, key), getattr(other.data, key)
            if mine != theirs:
                found.append(
                    f"modalities.{name}.data.{key}: {theirs!r}, and {mine!r} for {first}; pairs are rows of one table, read "
                    "it for both and choose with data.column"
                )
        if shares[name] != shares[first]:
            found.append(f"modalities.{name}.share: {shares[name]:g}, and {shares[first]:g} for {first}; pairs need equal ones")
    for name, recipe in bound.items():
        if recipe.data.streaming:
            found.append(f"modalities.{name}.data.streaming: pairs are found by their row in the table; set it to false")
        if recipe.data.budget is not None:
            found.append(f"modalities.{name}.data.budget: pairs stay side by side, whatever their lengths; leave it out")
    try:
        (bind or BindOptions.model_validate({})).build()
    except ValueError as error:
        found.append(f"bind.{error}")
    return found
