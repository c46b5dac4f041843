"""The encoder as a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder


class MmsslModel(PreTrainedModel):
    """What a run exports: loads with `AutoModel`, gives `last_hidden_state` and `pooler_output`."""

    config_class = MmsslConfig
    config: MmsslConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True

    def __init__(self, config: MmsslConfig):
        super().__init__(config)
        self.encoder = Encoder.from_config(config)
        self.main_input_name = self.encoder.features.input_name
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Weights are drawn where modules are built; nothing to add."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """Encode.

        Args:
            pixel_values: (B, C, H, W), or input_values or input_ids, whichever the modality takes.
        Returns: last_hidden_state (B, E + L, D) with extra tokens first, pooler_output (B, D).
        Raises: ValueError if the input of this model's modality is missing.
        """
        given = {"pixel_values": pixel_values, "input_values": input_values, "input_ids": input_ids}
        x = given[self.main_input_name]
        if x is None:
            raise ValueError(f"This model takes {self.main_input_name}.")
        encoder = self.encoder
        hidden = encoder.positions(encoder.features(x))
        tokens, layers = encoder.transformer(hidden, collect="block" if output_hidden_states else None)
        extra = encoder.transformer.extra_tokens
        pooled = tokens[:, 0] if encoder.pooling == "cls" else tokens[:, extra:].mean(1)
        out = BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=pooled, hidden_states=layers if output_hidden_states else None
        )
        return out if return_dict or return_dict is None else out.to_tuple()
