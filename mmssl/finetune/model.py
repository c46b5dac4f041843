"""A pretrained encoder with a head, checked for being whole, and which of its weights change at which rate."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from mmssl.config import FinetuneRecipe
from mmssl.errors import RecipeError
from mmssl.evaluate.probe import untrained
from mmssl.model import register
from mmssl.model.low_rank import chosen
from mmssl.model.modeling import MmsslModel
from mmssl.model.released import load_encoder, quiet
from mmssl.model.tasks import TASKS

AUTO = {
    "image-classification": "AutoModelForImageClassification",
    "audio-classification": "AutoModelForAudioClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
    "ctc": "AutoModelForCTC",
}
DRAWN = re.compile(r"masked_spec_embed|mask_token|pooler|position_ids|rotary|inv_freq")  # may be made anew within an encoder
DROP_PATHS = ("drop_path", "drop_path_rate")  # names in configs


def load_model(recipe: FinetuneRecipe, **facts: Any) -> PreTrainedModel:
    """The encoder of `model.init` with a new head.

    Args:
        facts: of the config: `id2label` and `label2id`, or `vocab_size`, `pad_token_id` and what the loss of transcripts needs.
    Raises: RecipeError if the folder holds no such encoder, or not all of it.
    """
    register.auto_classes()
    path, auto = str(recipe.model.init), getattr(transformers, AUTO[recipe.task])
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")  # or a Space of the Hub is asked to convert the model
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of what a new head lacks; what is wrong is told below
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
            _set_options(config, recipe, facts)
            if recipe.model.pooling and config.model_type != "mmssl":
                model = _shared(recipe, facts)
            else:
                how = {"output_loading_info": True, "ignore_mismatched_sizes": True, "weights_only": True}
                model, told = auto.from_pretrained(path, config=config, trust_remote_code=False, **how)
                _compute_tables(model, told)
                _check_whole(model, told, path)
    except RecipeError:
        raise
    except Exception as error:  # the readers of the many kinds of files raise almost anything on malformed ones
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        fitting = _fitting(path)
        raise RecipeError(
            f"model.init: {path} cannot be loaded for {recipe.task}: {reason}"
            + (f" It can be used for {' or '.join(fitting)}." if fitting and recipe.task not in fitting else "")
        ) from None
    finally:
        logging.set_verbosity(shown)
    if recipe.model.random:
        model = untrained(model, recipe.train.seed)
    model.accepts_loss_kwargs = False  # type: ignore[assignment]  # what a Trainer counts is no divisor of a loss of transcripts
    return model


def _fitting(path: str) -> list[str]:
    """Tasks that the architecture of a folder is made for."""
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception:  # what is wrong with it is told already
        return []
    names = transformers.models.auto.modeling_auto.__dict__
    found = {task: names[f"MODEL_FOR_{task.replace('-', '_').upper()}_MAPPING_NAMES"] for task in AUTO}
    return [task for task, known in found.items() if config.model_type in known]


def _set_options(config: Any, recipe: FinetuneRecipe, facts: dict[str, Any]) -> None:
    options = dict(recipe.model.options)
    if recipe.model.drop_path is not None:
        name = next((name for name in DROP_PATHS if hasattr(config, name)), None)
        if name is None:
            raise RecipeError(
                f"model.drop_path: models of type {config.model_type} have none; leave it out"
                + ("." if config.model_type != "vit" else ", or set model.pooling=mean, which takes the shared transformer.")
            )
        options[name] = recipe.model.drop_path
    for name in recipe.model.options:
        if not hasattr(config, name):
            close = difflib.get_close_matches(name, [*config.to_dict()], 1, 0.6)
            raise RecipeError(
                f"model.options.{name}: the config of {recipe.model.init} ({config.model_type}) has no such option"
                + (f" (did you mean {close[0]}?)." if close else ".")
            )
    if recipe.model.pooling and config.model_type == "mmssl":
        options["pooling"] = recipe.model.pooling
    for name, value in {**options, **facts}.items():
        setattr(config, name, value)


def _shared(recipe: FinetuneRecipe, facts: dict[str, Any]) -> PreTrainedModel:
    """On the shared transformer, which pools both ways."""
    encoder = load_encoder(str(recipe.model.init))
    if not isinstance(encoder, MmsslModel):
        raise RecipeError(
            f"model.pooling: {recipe.model.pooling}, but {type(encoder).__name__} has its own way, and the shared transformer "
            "has another structure; leave it out."
        )
    config: Any = encoder.config
    config.pooling = recipe.model.pooling
    _set_options(config, recipe.model_copy(update={"model": recipe.model.model_copy(update={"pooling": None})}), facts)
    model = TASKS[AUTO[recipe.task]](config)
    model.mmssl.load_state_dict(encoder.state_dict())
    return model


def _compute_tables(model: PreTrainedModel, told: dict[str, Any]) -> None:
    """Fixed positions for inputs of another length than the encoder had, by an option of its config, are computed anew."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("positions.table")}
    odd = [entry for entry in told["mismatched_keys"] if entry[0] in buffers]
    if odd:
        fresh = dict(type(model)(model.config).named_buffers())
        for entry in odd:
            buffers[entry[0]].copy_(fresh[entry[0]])
    told["mismatched_keys"] = [entry for entry in told["mismatched_keys"] if entry not in odd]


def _check_whole(model: PreTrainedModel, told: dict[str, Any], path: str) -> None:
    """Whether all weights of the encoder came from the file, and the file has no more blocks than the config says.

    A checkpoint may hold heads, which are left, and must not hold this head. Raises: RecipeError.
    """
    base = f"{model.base_model_prefix}."
    own = {re.sub(r"\d+", "N", name.removeprefix(base)) for name in model.state_dict()}
    missing = [name for name in told["missing_keys"] if name.startswith(base) and not DRAWN.search(name)]
    mismatched = [
        f"{name} {tuple(file)} for {tuple(ours)}" for name, file, ours in told["mismatched_keys"] if name.startswith(base)
    ]
    extra = [name for name in told["unexpected_keys"] if re.sub(r"\d+", "N", name.removeprefix(base)) in own]
    for what, found in (("lacks", missing), ("has other shapes than its config says:", mismatched), ("has too many:", extra)):
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise RecipeError(
                f"model.init: the file of weights in {path} {what} {sorted(found)[0]}{more}, so that the encoder is not the "
                "one that was pretrained. config.json and weights do not belong together; export or fetch the model again."
            )


def restrict(model: PreTrainedModel, recipe: FinetuneRecipe) -> Any:
    """Freeze what `model.tune` says. Returns: the model to train. Raises: RecipeError if that cannot be."""
    base = model.base_model
    if recipe.model.freeze_features:
        freeze: Any = getattr(model, "freeze_feature_encoder", None)
        if freeze is None:
            raise RecipeError(f"model.freeze_features: {type(model).__name__} has no feature encoder of its own; leave it out.")
        freeze()
    if recipe.model.tune == "head":
        base.requires_grad_(False)
        evaluate = nn.Module.train

        def stay(mode: bool = True) -> nn.Module:
            return evaluate(base, False)  # neither dropout nor statistics of batches

        base.train = stay
    return low_rank(model, recipe) if recipe.model.tune == "lora" else model


def low_rank(model: PreTrainedModel, recipe: FinetuneRecipe) -> Any:
    """With updates of low rank in place of its own. Raises: RecipeError if peft is missing."""
    try:
        import peft  # type: ignore[import-not-found]  # optional
    except ImportError:
        raise RecipeError(
            "model.tune: lora needs peft, which is not installed: pip install 'mmssl[lora]', or set model.tune=full."
        ) from None
    base = {id(module) for module in model.base_model.modules()}
    lora = recipe.model.lora
    named = ((name, module) for name, module in model.named_modules() if id(module) in base and chosen(name, lora.modules))
    linear = [name for name, module in named if isinstance(module, nn.Linear)]
    if not linear:
        raise RecipeError(f"model.lora.modules: no linear layer of the encoder is called {' or '.join(lora.modules)}.")
    head = [
        name for name, module in model.named_children() if id(module) not in base and any(True for _ in module.parameters())
    ]
    options: Any = {"r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=linear, modules_to_save=head, **options))


def parameter_groups(model: Any, recipe: FinetuneRecipe) -> list[dict[str, Any]]:
    """Trained parameters by decay and rate: weights of linear, convolutional and embedding layers decay, and each block has
    `layer_decay` of the rate of the one after it; what comes before the first counts as one more, the head has the full rate.
    """
    optim = recipe.optim
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, kinds)}
    shares = layer_shares(model, optim.layer_decay)
    groups: dict[tuple[bool, float], list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((id(p) in matrices, shares[name]), []).append(p)
    return [
        {"params": params, "weight_decay": optim.weight_decay if decays else 0.0, "lr": optim.lr * share}
        for (decays, share), params in groups.items()
    ]


def layer_shares(model: Any, decay: float) -> dict[str, float]:
    """Parameter -> share of the rate. The blocks are the list of modules that is as long as the config says, or the largest."""
    names = [name for name, _ in model.named_parameters()]
    if decay == 1:
        return dict.fromkeys(names, 1.0)
    base, depth = model.base_model, getattr(model.config, "num_hidden_layers", None)
    prefix = next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
    lists = {name: module for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1}
    if not lists:
        raise RecipeError(f"optim.layer_decay: {type(base).__name__} has no list of blocks; leave it out.")
    size = {name: sum(p.numel() for p in module.parameters()) for name, module in lists.items()}
    path = max(lists, key=lambda name: (len(lists[name]) == depth, size[name]))
    count, block = len(lists[path]), re.compile(re.escape(f"{prefix}{path}.") + r"(\d+)\.")
    first = next(i for i, name in enumerate(names) if block.match(name))
    layers = {}
    for i, name in enumerate(names):
        found = block.match(name)
        inside = name.startswith(prefix) and i < first
        layers[name] = int(found[1]) + 1 if found else 0 if inside else count + 1
    return {name: decay ** (count + 1 - layer) for name, layer in layers.items()}


def tried(model: PreTrainedModel, batch: dict[str, Tensor], path: Path | str) -> None:
    """A pass over a batch, before anything is written. Raises: RecipeError if the model cannot take it."""
    device = next(model.parameters()).device
    try:
        with torch.no_grad():
            model(**{name: tensor.to(device) for name, tensor in batch.items() if name != "labels"})
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items() if name != "labels")
        size = getattr(model.config, "image_size", None)
        mend = f" The model is for images of {size} pixels: set views.side={size}." if size else ""
        raise RecipeError(f"model.init: {path} cannot take {shapes}: {' '.join(str(error).split())[:300]}{mend}") from None
