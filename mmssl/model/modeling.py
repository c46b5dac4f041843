"""The encoder as a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmssl.model.backbone import Backbone, build_encoder
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.positions import attention_bias
from mmssl.types import Encoded


class MmsslModel(PreTrainedModel):
    """What a run exports: loads with `AutoModel`, gives `last_hidden_state` and `pooler_output`."""

    config_class = MmsslConfig
    config: MmsslConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True

    def __init__(self, config: MmsslConfig):
        super().__init__(config)
        self.encoder = build_encoder(config)
        self.main_input_name = self.encoder.input_name
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Weights are drawn where modules are built; nothing to add."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pad: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode.

        Args:
            pixel_values: (B, C, H, W); or input_values (B, samples), input_ids (B, L) or input_features (B, T, F): what the
                modality takes.
            attention_mask: 1 = valid, 0 = padding, of samples, ids or frames.
            pad: (B, L) bool, True = padding, of tokens or frames; instead of attention_mask.
        Returns: last_hidden_state (B, E + L, D) with extra tokens first, or the map (B, D, H, W) of a backbone that makes
            one; pooler_output (B, D).
        Raises: ValueError if the input of this model's modality is missing.
        """
        given = {"pixel_values": pixel_values, "input_values": input_values, "input_ids": input_ids}
        x = (given | {"input_features": input_features})[self.main_input_name]
        if x is None:
            raise ValueError(f"This model takes {self.main_input_name}.")
        layers = bool(output_hidden_states)
        if isinstance(self.encoder, Backbone):
            out = BaseModelOutputWithPooling(*self.encoder.outputs(x, layers))
        else:
            out = self._transform(self.encoder, x, attention_mask, pad, layers)
        return out if return_dict or return_dict is None else out.to_tuple()

    def _transform(
        self, encoder: Encoder, x: Tensor, attention_mask: Tensor | None, pad: Tensor | None, layers: bool
    ) -> BaseModelOutputWithPooling:
        """By the shared transformer."""
        features = encoder.features
        if pad is None and attention_mask is not None and hasattr(features, "pad") and not bool(attention_mask.all()):
            pad = features.pad(attention_mask)
        bare, bias = encoder.positions(features(x), None, pad)
        extra = encoder.transformer.extra_tokens
        tokens, hidden = encoder.transformer(bare, "block" if layers else None, attention_bias(bias, pad, extra))
        pooled = encoder.pool(Encoded(tokens[:, extra:], tokens[:, 0] if extra else None, pad=pad))
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=pooled, hidden_states=hidden if layers else None
        )
