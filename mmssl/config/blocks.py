"""The blocks of a recipe that are the same for every method and kind of data, each option with its meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Share = Annotated[float, Field(ge=0, lt=1)]


class Options(BaseModel):
    """A block of the recipe. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class LoraOptions(Options):
    """Low-rank updates (arXiv:2106.09685) of linear layers of the encoder; merged into them at the end."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0, description="The update is multiplied by alpha / rank.")
    dropout: Share = Field(0.0, description="Of what goes into the update.")
    modules: list[str] = Field(
        default_factory=list, description="Ends of the names of those layers, such as attn.qkv or fc1; all of them if empty."
    )


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
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the rate that the last block of the trunk has, the one before it its square, and so on; for "
        "going on from a model (data2vec's fine-tuning: 0.65).",
    )
    heads_first: int = Field(
        0, ge=0, description="Updates in the beginning that train heads alone, with the encoder as it is; for model.init."
    )
    warmup: int = Field(0, ge=0, description="Updates of linear warm-up from 0.")
    warmup_from: float | None = Field(
        None,
        ge=0,
        description="Rate of the first update, not scaled; the last one of the warm-up then has the peak (SwAV, DINO). If "
        "unset, the first has 0 and the one after the warm-up the peak (SimCLR, BYOL).",
    )
    hold: int = Field(0, ge=0, description="Updates at the peak after the warm-up.")
    fall: Literal["cosine", "linear", "exponential", "steps", "none"] = Field(
        "cosine",
        description="By half a cosine, in a straight line, by equal factors, to a tenth at each of fall_at, or not at all.",
    )
    fall_at: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default_factory=list, validate_default=True, description="With fall=steps: shares of the run, such as [0.6, 0.8]."
    )
    lr_end: float | None = Field(
        None,
        ge=0,
        description="Rate at the end, not scaled; if unset, 0 after a cosine or a line and a hundredth of the peak after an "
        "exponential.",
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
    recompute: bool = Field(
        False,
        description="Keep only what enters each transformer block, compute the rest again in the backward pass: much less "
        "memory, about a third more time.",
    )
    encoder_batch: int | None = Field(
        None,
        ge=1,
        description="Views that pass the encoder at once in a method that compares whole samples; each part is computed again "
        "in the backward pass: a micro-batch as large as wanted, for a third more time. All of them if unset.",
    )
    split_teacher: bool = Field(
        False,
        description="Each rank keeps its part of a moving average, gathered block by block; for where no rank has memory for a "
        "whole one. Not with compile.",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of a rank; torch's default if unset.")
    log_every: int = Field(10, ge=1, description="Updates between lines of metrics.jsonl.")
    max_skips: int = Field(
        3, ge=0, description="Non-finite updates in a row that are left out; with one more, watch.on_nonfinite."
    )
    max_skip_share: float = Field(0.01, ge=0, le=1, description="The same as a share of 1000 updates.")
    hang_timeout: float = Field(
        600.0,
        ge=5,
        description="Seconds without progress after which a run ends, naming the rank that hangs; six times as many while "
        "saving, probing, describing and in the first update.",
    )
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)

    @field_validator("split_teacher")
    @classmethod
    def _eager(cls, value: bool, info: Any) -> bool:
        if value and info.data.get("compile"):
            raise ValueError("a teacher that is gathered block by block cannot be compiled; leave out train.compile or this")
        return value


class ChoiceOptions(Options):
    """A metric to go by."""

    metric: str = Field(description="Such as probe/knn, probe/linear or health/rankme, see docs/evaluation.md.")
    mode: Literal["max", "min"] = Field("max", description="Whether more or less of it is better.")
    least: float = Field(0.0, ge=0, description="How much better a value must be than the best before it.")


class StopOptions(ChoiceOptions):
    """When a run ends early."""

    patience: int = Field(5, ge=1, description="Measurements (every watch.every updates) without a better value.")


class WatchOptions(Options):
    """Whether it works: probes on held-out data, if there are labels."""

    every: int = Field(500, ge=0, description="Updates between probes; 0 = only at the end.")
    path: str | None = Field(None, description="Labelled data for the probes; data.path if unset.")
    train: str = Field("train", description="Split whose samples are the memory of the probes.")
    test: str = Field("test", description="Split that is classified; a tenth of `train` is held out if it does not exist.")
    samples: int = Field(2000, ge=20, description="At most this many samples of each split.")
    neighbours: int = Field(20, ge=1)
    linear: bool = Field(True, description="Train a linear classifier on detached features along with the model.")
    pictures: bool = Field(
        True,
        description="Draw feature maps, attention and neighbours of some samples when `mmssl pretrain` has ended.",
    )
    change: bool = Field(
        True, description="At the end, compare the exported encoder with what the run started from, see docs/evaluation.md."
    )
    guard: dict[str, float] = Field(
        default_factory=dict,
        description="Least value of a health metric, such as {target_std: 0.1}; see watch.on_collapse. wav2vec2 guards its "
        "code_perplexity by itself; 0 turns that off.",
    )
    guard_after: int = Field(5000, ge=0, description="Updates before the guard wakes.")
    on_nonfinite: Literal["stop", "rollback"] = Field(
        "stop", description="After too many skipped updates: stop, or go back to the last checkpoint with a lower rate."
    )
    on_collapse: Literal["warn", "stop", "rollback"] = Field(
        "stop", description="Below the guard: say so once, stop, or go back to the last checkpoint that proved healthy."
    )
    rollback_factor: float = Field(0.5, gt=0, le=1, description="Share of the learning rate that each rollback leaves.")
    max_rollbacks: int = Field(3, ge=1, description="Rollbacks of a run; where one more is needed it stops.")
    stop: StopOptions | None = Field(None, description="End the run once this metric has stopped getting better.")


class SaveOptions(Options):
    """What stays on disk."""

    every: int = Field(1000, ge=1, description="Updates between checkpoints.")
    keep: int = Field(2, ge=1, description="Newest checkpoints kept.")
    permanent: int = Field(10, ge=0, description="Checkpoints kept for good, spread over a run that saves more often.")
    proven: int = Field(
        1000, ge=0, description="Updates without trouble after which a checkpoint counts as healthy; the last such one is kept."
    )
    best: ChoiceOptions | None = Field(
        None, description="Keep the checkpoint with the best value of this metric as well, and its encoder in `best/`."
    )
    max_failed: int = Field(3, ge=1, description="Saves in a row that find the disk full or read-only until the run stops.")
    background: bool = Field(
        False,
        description="Write checkpoints while training goes on, from a copy in the memory of the host. Whether one could be "
        "written is known at the next save; the last one of a run is waited for.",
    )


class HubOptions(Options):
    """Send the model to the Hub while it is trained, with the token of `hf auth login` or HF_TOKEN."""

    repo: str | None = Field(
        None,
        description="ORG/NAME, made if it does not exist. A push runs beside the training and never stops it; the next save "
        "tries again. Nothing is sent if unset.",
    )
    every: int = Field(1, ge=1, description="Saves from one push to the next; the last model is sent in any case.")
    private: bool = Field(True, description="Of a new repository; one that exists stays as it is.")
