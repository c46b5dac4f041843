"""What a model's output holds, ours or of transformers: content tokens, the class token, the layers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmssl.model.encoder import mean_tokens
from mmssl.types import View


class Read(NamedTuple):
    """An output by its parts."""

    tokens: Tensor  # (B, L, D) of content: patches, frames, words; the places of a map row by row
    valid: Tensor  # (B, L) bool, False = padding
    cls: Tensor | None  # (B, D)
    layers: tuple[Tensor, ...]  # (B, L, D) of content after each block, the first one first; if they were asked for


def is_ours(model: Any) -> bool:
    """Whether it runs on the shared transformer, or was trained here as a backbone."""
    return getattr(model.config, "model_type", None) == "mmssl"


def read(out: Any, view: View, inputs: dict[str, Tensor], model: Any) -> Read:
    """The parts of an output.

    Args:
        out: with `last_hidden_state`, and `hidden_states` where layers are wanted.
        inputs: what the model was called with.
    """
    states = getattr(out, "hidden_states", None) or ()
    if _transformer(model) is None:
        states = states[1:]  # models of transformers begin with what enters the first block
    extra = extra_tokens(out.last_hidden_state, view, model)
    tokens, *layers = (_rows(state)[:, extra:] for state in (out.last_hidden_state, *states))
    first = _rows(out.last_hidden_state)[:, 0] if extra else None
    return Read(tokens, valid_tokens(tokens, view, inputs, model), first, tuple(layers))


def layer_means(parts: Read) -> list[Tensor]:
    """(B, D) of each layer, the mean of its valid tokens; a layer may have its own width, and maps their own size."""
    same = parts.tokens.shape[1]
    return [mean_tokens(layer, ~parts.valid if layer.shape[1] == same else None) for layer in parts.layers]


def extra_tokens(last: Tensor, view: View, model: Any) -> int:
    """How many tokens stand before those of content. Of models of transformers for images it is what patches leave over."""
    transformer = _transformer(model)
    if transformer is not None:
        return transformer.extra_tokens
    patch = getattr(model.config, "patch_size", None)
    if view.x.ndim == 4 and last.ndim == 3 and isinstance(patch, int):
        return last.shape[1] - (view.x.shape[2] // patch) * (view.x.shape[3] // patch)
    return 0


def valid_tokens(tokens: Tensor, view: View, inputs: dict[str, Tensor], model: Any) -> Tensor:
    """(B, L) bool: those that are not padding."""
    frames = getattr(model, "_get_feature_vector_attention_mask", None)
    if view.pad is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if frames is not None and not is_ours(model):
        return frames(tokens.shape[1], inputs["attention_mask"]).bool()
    return ~view.pad


def _transformer(model: Any) -> Any:
    return getattr(getattr(model, "encoder", None), "transformer", None) if is_ours(model) else None


def _rows(state: Tensor) -> Tensor:
    """A map (B, D, H, W) as (B, HW, D); tokens as they are."""
    return state.flatten(2).transpose(1, 2) if state.ndim == 4 else state
