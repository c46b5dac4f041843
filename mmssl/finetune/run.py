"""One fine-tuning run: the plain Trainer of transformers, a run folder around it, and a vanilla model at its end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    Wav2Vec2Processor,
)
from transformers.trainer_utils import get_last_checkpoint

from mmssl.allocator import keep_freed_memory
from mmssl.config import FinetuneRecipe, checked_views, read_yaml
from mmssl.data.sampler import check_batch
from mmssl.distributed import all_sum
from mmssl.errors import INTERRUPTED, MmsslError, NonFiniteError, RecipeError
from mmssl.files import umask
from mmssl.finetune import ctc
from mmssl.finetune.card import card
from mmssl.finetune.data import Collator, Labelled, Sets, open_sets
from mmssl.finetune.model import AUTO, load_model, parameter_groups, restrict, tried
from mmssl.hub.export import CODE, appearing, auto_map
from mmssl.hub.flatten import flatten
from mmssl.model import register
from mmssl.model.released import modality_of, quiet
from mmssl.model.tasks import TASKS, MmsslTask
from mmssl.redaction import redact
from mmssl.registry import Modality
from mmssl.training.launch import import_deepspeed, launched, main_first
from mmssl.training.run_folder import RunFolder, write_atomic
from mmssl.training.signals import Signals

SCORES = ("eval_loss", "eval_accuracy", "eval_macro_f1", "eval_wer", "eval_cer")
TIMEOUT = 4 * 3600  # seconds that ranks wait for one that measures


class Follow(TrainerCallback):
    """Keys of the epoch, lines of metrics.jsonl, the guard against NaN, and the stop at a signal on all ranks at once."""

    def __init__(self, folder: RunFolder, train: Labelled):
        self.folder, self.train, self.told = folder, train, 0

    def hear(self, number: int) -> None:
        """Note a signal."""
        self.told = number

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before the loader starts its workers."""
        self.train.epoch = int(state.epoch or 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop if any rank was told to."""
        if float(all_sum(torch.tensor(float(self.told > 0), device=args.device))):
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Write. Raises: NonFiniteError."""
        logs = logs or {}
        names = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr", "epoch": "epoch"}
        found = {name: logs[key] for key, name in names.items() if key in logs}
        found |= {f"test/{k.removeprefix('eval_')}": v for k, v in logs.items() if k in SCORES}
        if {*found} - {"epoch"}:
            self.folder.log_metrics({"step": state.global_step, **found})
        if not math.isfinite(found.get("loss", 0.0)):
            raise NonFiniteError(
                f"The loss is {found['loss']} at update {state.global_step}. Lower optim.lr, raise optim.warmup, or look "
                "at the data; the last checkpoint is from before."
            )


def finetune(recipe: FinetuneRecipe, overwrite: bool = False, resume: bool = False) -> Path:
    """Train as the recipe says.

    Args:
        overwrite: remove an earlier run in the folder `recipe.out`.
        resume: go on from its newest checkpoint.
    Returns: the run folder; `model/` in it is the model, `results.json` what the test gave.
    Raises: MmsslError with the exit status of the contract.
    """
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    check_launch(recipe)
    sets, model, inputs, codec, kind = prepared(recipe)
    trained = restrict(model, recipe)
    args = training_arguments(recipe, len(sets.train), codec is not None)
    if args.device.type == "cpu":
        keep_freed_memory()
    folder = _opened(recipe, args, overwrite, resume)
    folder.write_identity(recipe.dump(), sys.argv, sets.facts)
    follow = Follow(folder, sets.train)
    try:
        with Signals(follow.hear):
            trainer = _trainer(recipe, args, sets, trained, inputs, codec, follow)
            folder.status("running", steps=args.max_steps)
            _run(recipe, trainer, folder, resume)
            if trainer.state.global_step < args.max_steps:
                folder.status("preempted", step=trainer.state.global_step, steps=args.max_steps)
                return folder.path
            scores = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items() if k in SCORES}
            if folder.is_main:
                write_atomic(folder.path / "results.json", json.dumps(scores, indent=2) + "\n")
                save(recipe, trainer, inputs, codec, kind, folder.model, scores)
            folder.status("finished", step=trainer.state.global_step, steps=args.max_steps)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        code = error.code if isinstance(error, MmsslError) else INTERRUPTED if stopped else MmsslError.code
        with contextlib.suppress(OSError, MmsslError):
            folder.status("failed", error=f"{type(error).__name__}: {error}", code=code)
        raise
    return folder.path


def _opened(recipe: FinetuneRecipe, args: TrainingArguments, overwrite: bool, resume: bool) -> RunFolder:
    """The run folder, made by the main process while the others wait. Raises: RecipeError, on all of them."""
    at = Path(recipe.out)
    folder = main_first(lambda: _going_on(recipe) if resume else RunFolder.create(at, overwrite), args)
    return folder or RunFolder(at, is_main=False)


def _going_on(recipe: FinetuneRecipe) -> RunFolder:
    """The folder of a run of the same recipe. Raises: RecipeError."""
    folder = RunFolder.open(recipe.out)
    folder.check_idle()
    before, now = read_yaml(folder.config), recipe.model_dump(mode="json")
    changed = [key for key in ("task", "data", "model", "views", "optim", "train", "ctc") if before.get(key) != now[key]]
    if changed:
        raise RecipeError(f"{folder.path}: the run to go on with has another {', '.join(changed)}; start one with out=FOLDER.")
    return folder


def prepared(recipe: FinetuneRecipe) -> tuple[Sets, PreTrainedModel, Any, ctc.Codec | None, Modality]:
    """All that can be wrong before the first step: data, processor, model, and a pass over the first samples."""
    path = str(recipe.model.init)
    kind = kind_of(recipe)
    module = import_module(str(kind.tune))
    options = checked_views(module.Inputs, recipe.views, "path")
    try:
        inputs = module.Inputs(path, **options)
    except ValueError as error:
        raise RecipeError(f"views.{error}" if str(error).split(":")[0] in options else f"{path}: {error}") from None
    except (OSError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RecipeError(f"model.init: {path} does not say how to prepare {kind.name}: {reason}") from None
    sets = open_sets(recipe, kind)
    codec = None
    if recipe.task == "ctc":
        codec = ctc.Codec(ctc.character_tokenizer(sets.train.transcripts(), recipe.ctc), recipe.ctc)
        size, blank = len(codec.tokenizer), codec.tokenizer.pad_token_id
        facts: dict[str, Any] = {"vocab_size": size, "pad_token_id": blank, "bos_token_id": None, "eos_token_id": None}
        facts |= {"ctc_loss_reduction": "mean", "ctc_zero_infinity": True}
    else:
        facts = {"id2label": dict(enumerate(sets.classes)), "label2id": {name: i for i, name in enumerate(sets.classes)}}
        facts["problem_type"] = "single_label_classification"
    torch.manual_seed(recipe.train.seed)
    model = load_model(recipe, **facts)
    collate = Collator(inputs, len(sets.classes), codec.encode if codec else None)
    tried(model.eval(), collate([sets.test[i] for i in range(min(2, len(sets.test)))]), path)
    return sets, model, inputs, codec, kind


def kind_of(recipe: FinetuneRecipe) -> Modality:
    """The kind of data that the encoder takes. Raises: RecipeError if it is none, or does not fit the task."""
    register.auto_classes()
    path = str(recipe.model.init)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        bare: Any = MODEL_MAPPING[type(config)]
        model: Any = SimpleNamespace(config=config, main_input_name=bare.main_input_name)
    except Exception as error:  # the readers of the many kinds of files raise almost anything
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RecipeError(f"model.init: {path} cannot be loaded as a model of transformers or of mmssl: {reason}") from None
    if members := getattr(config, "members", None):
        one = next(iter(members))
        raise RecipeError(f"model.init: {path} takes {' and '.join(members)}; name the folder of one, such as {path}/{one}.")
    kind, takes = modality_of(model), TASKS[AUTO[recipe.task]].takes
    features: Any = kind.features
    if features.input_name not in takes or kind.tune is None:
        fitting = [task for task, auto in AUTO.items() if features.input_name in TASKS[auto].takes]
        raise RecipeError(
            f"task: {recipe.task} needs a model of {' or '.join(takes)}, and {path} takes {features.input_name}; it is one for "
            f"{' or '.join(fitting) or 'none of the tasks'}."
        )
    return kind


def check_launch(recipe: FinetuneRecipe) -> None:
    """Processes of one run meet here. Raises: RecipeError if the batch cannot be shared among them."""
    share = recipe.train.global_batch // launched()
    check_batch(None, recipe.train.global_batch, recipe.train.micro_batch or max(share, 1), launched())
    if on_cpu(recipe) and launched() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))


def on_cpu(recipe: FinetuneRecipe) -> bool:
    """Whether no GPU is used."""
    forced = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    return recipe.train.device == "cpu" or forced or not torch.cuda.is_available()


def training_arguments(recipe: FinetuneRecipe, samples: int, spoken: bool) -> TrainingArguments:
    """Of the Trainer, for so many samples to learn from. Its `dataloader_drop_last` would cut the test as well."""
    train, processes, cpu = recipe.train, launched(), on_cpu(recipe)
    share = train.global_batch // processes
    micro = train.micro_batch or share
    steps = train.steps or max(1, round((train.epochs or 1) * samples / train.global_batch))
    import_deepspeed()
    args = TrainingArguments(
        output_dir=str(Path(recipe.out) / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        learning_rate=recipe.optim.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(recipe.optim.warmup * steps),
        max_grad_norm=recipe.optim.clip,
        seed=train.seed,
        bf16=train.precision == "bf16",
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and processes > 1 else None,
        ddp_timeout=TIMEOUT,
        logging_steps=train.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if recipe.watch.every else "no",
        eval_steps=recipe.watch.every or None,
        save_strategy="steps",
        save_steps=recipe.save.every,
        save_total_limit=recipe.save.keep,
        batch_eval_metrics=spoken,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        remove_unused_columns=False,
        dataloader_num_workers=recipe.data.workers,
    )
    args._n_gpu = min(args.n_gpu, 1)  # or the Trainer would wrap the model in DataParallel
    return args


def _trainer(
    recipe: FinetuneRecipe,
    args: TrainingArguments,
    sets: Sets,
    model: Any,
    inputs: Any,
    codec: ctc.Codec | None,
    follow: Follow,
) -> Trainer:
    """The Trainer as it is: a loss, metrics, parameter groups and a callback are what it takes from us."""
    collate = Collator(inputs, len(sets.classes), codec.encode if codec else None)
    groups = parameter_groups(model, recipe)
    how: dict[str, Any] = {"lr": recipe.optim.lr, "betas": recipe.optim.betas}
    scoring: dict[str, Any]
    if codec:
        first = collate([sets.test[0]])
        if "attention_mask" in first:
            args.label_names = ["labels", "attention_mask"]  # what is told of a batch beside its logits
        scoring = {"compute_metrics": ctc.Errors(codec), "preprocess_logits_for_metrics": _frames(model, codec)}
    else:
        args.label_names = ["labels"]
        scoring = {"compute_metrics": _scores, "preprocess_logits_for_metrics": lambda logits, labels: _best(logits)}
        scoring["compute_loss_func"] = Loss(recipe.optim.label_smoothing)
    trainer = Trainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=sets.train,
        eval_dataset=sets.test,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups, **how}),
        callbacks=[follow],
        **scoring,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Loss:
    """Cross entropy of classes, or of shares of them, over all samples of an update on all ranks.

    Labels are smoothed in training only: the loss of the test is that of the labels.
    """

    def __init__(self, smoothing: float):
        self.smoothing = smoothing

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """labels: (B,) or (B, C).  num_items_in_batch: how many there are of them in the update, each share counted."""
        logits = outputs["logits"].float()
        if num_items_in_batch is None:
            return F.cross_entropy(logits, labels)
        total = F.cross_entropy(logits, labels, label_smoothing=self.smoothing, reduction="sum")
        return total * (labels.shape[1] if labels.ndim == 2 else 1) / num_items_in_batch


def _best(logits: Any) -> Tensor:
    """(B,) classes; other outputs of a model may come along."""
    return (logits[0] if isinstance(logits, (tuple, list)) else logits).argmax(-1)


def _frames(model: Any, codec: ctc.Codec) -> Any:
    """What is kept of a batch's logits: the most probable ids of frames, or all for a beam search, padding being blank."""

    def kept(logits: Any, labels: Any) -> Tensor:
        found = logits[0] if isinstance(logits, (tuple, list)) else logits
        frames = ctc.frames_of(model, labels[1]) if isinstance(labels, (tuple, list)) else None
        found = ctc.silenced(found, frames, codec.tokenizer.pad_token_id)
        return found if codec.search else found.argmax(-1)

    return kept


def _scores(prediction: Any) -> dict[str, float]:
    """Accuracy, and F1 as the mean over classes."""
    from sklearn.metrics import f1_score

    labels, found = prediction.label_ids, prediction.predictions
    counts = labels >= 0
    return {
        "accuracy": float((labels == found)[counts].mean()),
        "macro_f1": float(f1_score(labels[counts], found[counts], average="macro")),
    }


def _run(recipe: FinetuneRecipe, trainer: Trainer, folder: RunFolder, resume: bool) -> None:
    """To the end, or to a signal."""
    place = str(folder.path / "checkpoints")
    newest = get_last_checkpoint(place) if resume and Path(place).is_dir() else None
    done = TrainerState.load_from_json(f"{newest}/trainer_state.json").global_step if newest else 0
    folder.truncate_metrics(done)
    with quiet():
        trainer.train(resume_from_checkpoint=newest)


def save(
    recipe: FinetuneRecipe,
    trainer: Trainer,
    inputs: Any,
    codec: ctc.Codec | None,
    kind: Modality,
    path: Path,
    scores: dict[str, float],
) -> None:
    """The model, what prepares its input, and a card; whole or not at all."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if recipe.model.tune == "lora":
        model = model.merge_and_unload()
    model.__dict__.pop("accepts_loss_kwargs", None)
    own = isinstance(model, MmsslTask)
    if own:
        model.config.auto_map = auto_map(model.config)
    with appearing(path) as aside, quiet():
        model.save_pretrained(aside)
        if own:
            (aside / CODE).write_text(flatten(kind.features.__module__))
        inputs.processor.save_pretrained(aside)
        if codec:
            codec.tokenizer.save_pretrained(aside)
            if model.main_input_name == "input_values":  # AutoProcessor has none for spectrograms
                Wav2Vec2Processor(inputs.processor, codec.tokenizer).save_pretrained(aside)
        (aside / "README.md").write_text(redact(card(recipe, model, scores)))
        for file in aside.iterdir():  # safetensors writes 0600, whatever the umask
            file.chmod(0o666 & ~umask())
