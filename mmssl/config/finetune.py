"""The recipe of a fine-tuning run: labels, a pretrained encoder, and how its weights may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, create_model, field_validator

from mmssl.config.blocks import DataOptions, LoraOptions, Options, Share
from mmssl.config.chosen import options_of
from mmssl.config.messages import explain, told
from mmssl.config.recipe import _block, read_recipe, refused


class LabelledOptions(Options):
    """What to learn from, and what to be measured on."""

    path: str | None = Field(None, description="Folder, table (parquet, csv, jsonl) or Hub data set id.")
    split: str = Field("train", description="Split to learn from.")
    test: str = Field("test", description="Split that is measured; a tenth of `split` is held out if it does not exist.")
    column: str | None = Field(None, description="Column that holds the data; found by name if unset.")
    label: str | None = Field(None, description="Column of classes; found by name if unset.")
    text: str | None = Field(None, description="Column of transcripts, for ctc; found by name if unset.")
    root: str | None = Field(None, description="Folder that names in a table are relative to; the table's own if unset.")
    config: str | None = Field(None, description="Configuration name of a Hub data set.")
    revision: str | None = Field(None, description="Commit of a Hub data set.")
    limit: int | None = Field(None, ge=1, description="Use only this many samples of each split, spread evenly.")
    labels: float | None = Field(
        None, gt=0, description="Learn from this share of the samples, or from so many of each class (1 or more); ctc: a share."
    )
    workers: int = Field(2, ge=0, description="Processes for each rank that decode and augment.")

    def source(self, modality: str, **changes: Any) -> DataOptions:
        """The same for `open_source`."""
        given = self.model_dump(exclude={"test", "text", "labels"}) | changes
        return DataOptions(modality=modality, **given)


class TunedOptions(Options):
    """The encoder, and which of its weights change."""

    init: str | None = Field(None, description="Model folder or Hub id.")
    random: bool = Field(False, description="Draw all weights anew: the baseline that a pretrained encoder has to beat.")
    tune: Literal["full", "head", "lora"] = Field("full", description="head: the encoder stays as it is; lora needs peft.")
    freeze_features: bool = Field(False, description="Keep the convolutions over the wave as they are, as usual for ctc.")
    pooling: Literal["mean", "cls"] | None = Field(
        None,
        description="What the classifier reads. If unset what one of our models was trained for, otherwise what the class of "
        "transformers takes; where that has another way, the model becomes an MmsslModel.",
    )
    drop_path: Share | None = Field(None, description="Largest share of residual branches left out, of the last block.")
    options: dict[str, Any] = Field(
        default_factory=dict, description="Of the model's config, such as hidden_dropout_prob, or mask_time_prob (SpecAugment)."
    )
    lora: LoraOptions = _block(LoraOptions)


class CtcOptions(Options):
    """Characters and how they are found."""

    lower: bool = Field(True, description="Write transcripts in lower case.")
    decoder: Literal["greedy", "beam"] = Field("greedy", description="beam: torchaudio's, which needs flashlight-text.")
    beam: int = Field(20, ge=1, description="Hypotheses of a beam search.")


class RateOptions(Options):
    """AdamW; linear warm-up, then half a cosine to 0."""

    lr: float = Field(1e-3, gt=0, description="Peak learning rate, of the head.")
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: float = Field(0.05, ge=0, description="Of weights of linear, convolutional and embedding layers.")
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="Factor of the rate from each block to the one before it (BEiT, MAE: 0.65 to 0.75)."
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the run.")
    clip: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 = no clipping.")
    label_smoothing: Share = 0.0


class LengthOptions(Options):
    """How long, how much at once, in which precision."""

    steps: int | None = Field(None, ge=1, description="Optimizer updates.")
    epochs: float | None = Field(None, gt=0, description="Passes over the data, instead of steps.")
    global_batch: int = Field(64, ge=1, description="Samples of one update, over all ranks and micro-batches.")
    micro_batch: int | None = Field(None, ge=1, description="Samples on a device at once; all of a rank's share if unset.")
    seed: int = Field(0, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu"] = "auto"
    threads: int | None = Field(None, ge=1, description="CPU threads of a rank; torch's default if unset.")
    log_every: int = Field(10, ge=1, description="Updates between lines of metrics.jsonl.")

    @field_validator("epochs")
    @classmethod
    def _one(cls, value: float | None, info: Any) -> float | None:
        if value is not None and info.data.get("steps") is not None:
            raise ValueError("train.steps is set too; give one of them")
        return value


class KeptOptions(Options):
    """Checkpoints, which `resume=true` goes on from."""

    every: int = Field(500, ge=1, description="Updates between checkpoints.")
    keep: int = Field(1, ge=1, description="Newest checkpoints kept.")


class MeasuredOptions(Options):
    """Accuracy or error rates on the test split."""

    every: int = Field(0, ge=0, description="Updates between measurements; 0 = only at the end.")
    samples: int | None = Field(None, ge=1, description="At most this many samples; all if unset.")


class FinetuneRecipe(Options):
    """A checked fine-tuning recipe; `views` is checked when the kind of data is known."""

    task: Literal["image-classification", "audio-classification", "sequence-classification", "ctc"]
    out: str
    data: LabelledOptions = _block(LabelledOptions)
    model: TunedOptions = _block(TunedOptions)
    views: dict[str, Any] = Field(default_factory=dict)
    optim: RateOptions = _block(RateOptions)
    train: LengthOptions = _block(LengthOptions)
    ctc: CtcOptions = _block(CtcOptions)
    watch: MeasuredOptions = _block(MeasuredOptions)
    save: KeptOptions = _block(KeptOptions)

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> FinetuneRecipe:
        """Read and check a file, or a shipped recipe by name, with `key.sub=value` words. Raises: RecipeError.

        Steps in place of the file's epochs need no word that takes these away, nor the other way round.
        """
        raw, given = read_recipe(path, *overrides), {word.partition("=")[0] for word in overrides}
        for one, other in (("steps", "epochs"), ("epochs", "steps")):
            if f"train.{one}" in given and f"train.{other}" not in given and isinstance(raw.get("train"), dict):
                raw["train"].pop(other, None)
        return cls.check(raw, str(path))

    @classmethod
    def check(cls, raw: dict[str, Any], where: str = "recipe") -> FinetuneRecipe:
        """From a plain dict. Raises: RecipeError that names all that is wrong."""
        raw = {**raw, **{block: {key: raw[block]} for block, key in (("data", "path"), ("model", "init"))
                         if isinstance(raw.get(block), str)}}  # fmt: skip
        try:
            recipe = cls.model_validate(raw)
        except ValidationError as error:
            raise refused(where, [explain(issue, cls) for issue in told(error.errors())]) from None
        if problems := recipe._contradictions():
            raise refused(where, problems)
        return recipe

    def _contradictions(self) -> list[str]:
        found = []
        if not self.model.init:
            found.append("model.init: missing; give a model folder or Hub id, for example model=runs/scans/model")
        if not self.data.path:
            found.append("data.path: missing; give a labelled folder, table or Hub id, for example data=labelled/")
        if self.train.steps is None and self.train.epochs is None:
            found.append("train.epochs: missing; give it or train.steps")
        if self.model.tune != "full" and self.optim.layer_decay < 1:
            found.append(
                f"optim.layer_decay: {self.optim.layer_decay}, but with model.tune={self.model.tune} the blocks stay as they "
                "are and have no rate; leave it out or set model.tune=full"
            )
        if self.model.tune == "head" and self.model.random:
            found.append("model.random: true, and model.tune=head would never train it; set model.tune=full")
        if self.task == "ctc":
            if self.optim.label_smoothing:
                found.append("optim.label_smoothing: the loss of transcripts has none; leave it out")
            if self.model.pooling:
                found.append("model.pooling: ctc reads every frame and pools none; leave it out")
            if self.data.labels is not None and self.data.labels >= 1:
                found.append("data.labels: transcripts have no classes; give a share below 1")
        return found

    def dump(self) -> str:
        """As YAML, all defaults written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def checked_views(make: Any, given: dict[str, Any], *skip: str) -> dict[str, Any]:
    """Options for a constructor, read from its signature. Raises: RecipeError that names all that is wrong."""
    options: Any = options_of(make, *skip)
    block: Any = create_model("Views", __base__=Options, **options)
    try:
        found = block.model_validate(given)
    except ValidationError as error:
        whole: Any = create_model("Recipe", __base__=Options, views=(block, ...))
        issues = [{**issue, "loc": ("views", *issue["loc"])} for issue in error.errors()]
        raise refused("recipe", [explain(issue, whole) for issue in told(issues)]) from None
    return {name: getattr(found, name) for name in block.model_fields}
