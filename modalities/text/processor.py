"""The tokenizer a model was trained with, for whoever loads it."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from modalities.text.tokenizer import load
from modalities.text.views import TextViews


def processor(config: Any, views: Any) -> Any:
    """The tokenizer, which states how long a text the model takes."""
    tokenizer = copy.deepcopy(views.tokenizer)
    tokenizer.model_max_length = views.max_tokens
    return tokenizer


def stated(path: str, model: dict[str, Any]) -> dict[str, Any]:
    """View options: the tokenizer beside the model."""
    return {"tokenizer": path}


def plain_views(model: Any, path: Any) -> TextViews:
    """Views with the tokenizer in a model's folder. Raises: ValueError if that cannot be loaded."""
    tokenizer = load(str(path))
    size = getattr(model.config, "vocab_size", None) or len(tokenizer)
    ids = {"pad_token_id": tokenizer.pad_token_id, "mask_id": tokenizer.mask_token_id}
    shape = SimpleNamespace(vocab_size=size, max_tokens=_length(model, tokenizer), **ids)
    views = TextViews(shape, str(path), pack=False)
    views.tokenizer = tokenizer
    return views


def _length(model: Any, tokenizer: Any) -> int:
    """Tokens that the model takes at most, 512 if nothing says so."""
    if model.config.model_type == "mmssl":
        return getattr(model.config, "max_tokens", 512)
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = getattr(tables[0], "padding_idx", None) if tables else None
    # Like RoBERTa, models whose positions know of padding count from the row after it.
    unused = 0 if padding is None else padding + 1
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(positions - unused if positions else 512, tokenizer.model_max_length)
