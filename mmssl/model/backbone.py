"""A model of transformers as it is, in place of feature encoder and shared transformer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder, mean_tokens
from mmssl.types import Encoded, View


class Backbone(nn.Module):
    """View -> Encoded, for methods that see whole views. Weights keep the names of transformers."""

    passes: Any = None  # as in `Encoder`

    def __init__(self, model: PreTrainedModel, config: MmsslConfig):
        """Change stem and start as the configuration says. Raises: ValueError if the model is not made for it."""
        super().__init__()
        kind = model.config.model_type
        if config.stem == "small":
            if kind != "resnet":
                raise ValueError(f"stem: small is a stem of resnet, {kind} has its own; leave it out")
            small_stem(model)
        if config.zero_init:
            if kind != "resnet":
                raise ValueError(f"zero_init: no batch norm ends the residual blocks of {kind}; leave it out")
            zero_init(model)
        for name, parameter in model.named_parameters():
            if name.endswith("mask_token"):  # nothing is masked, and DDP waits for every gradient
                parameter.requires_grad_(False)
        self.model, self.config = model, config
        self.modality, self.dim, self.input_name = config.modality, config.hidden_size, model.main_input_name

    @classmethod
    def from_config(cls, config: MmsslConfig) -> Backbone:
        """Build with fresh weights. Raises: ValueError that begins with the option that is wrong."""
        from transformers import AutoModel  # here, since it registers our model when it is loaded, which imports this file

        return cls(AutoModel.from_config(AutoConfig.for_model(**(config.backbone or {}))), config)

    def forward(self, view: View) -> Encoded:
        """Encode a whole view.

        Returns: tokens (B, L, D), the places of the last feature map row by row or the tokens as the model gives them;
            cls (B, D), what the model pools.
        """
        last, pooled, _ = self.outputs(view.x)
        return Encoded(_places(last), pooled)

    def outputs(self, x: Tensor, layers: bool = False) -> tuple[Tensor, Tensor, tuple[Tensor, ...] | None]:
        """The model's last hidden state as it is, what it pools, and its hidden states.

        Args:
            x: what the model takes, such as pixels (B, C, H, W).
            layers: whether hidden states are wanted.
        Returns: a map (B, D, H, W) or tokens (B, L, D); (B, D), the mean over all places if the model pools nothing; hidden
            states, None if not wanted or not given.
        """
        if x.ndim == 4:  # networks of convolutions take a fifth less time where the channels of a place lie side by side
            x = x.contiguous(memory_format=torch.channels_last)
        out = self.model(**{self.input_name: x}, output_hidden_states=layers)
        pooled = getattr(out, "pooler_output", None)
        pooled = _places(out.last_hidden_state).mean(1) if pooled is None else pooled.flatten(1)
        return out.last_hidden_state, pooled, getattr(out, "hidden_states", None)

    def inspect(self, view: View) -> tuple[Tensor, Tensor]:
        """Of a whole view: (B, D) pooled, and (B, C) what the stem gives in the middle."""
        last, pooled, hidden = self.outputs(view.x, layers=True)
        first = hidden[0] if hidden else last
        if first.ndim == 4:
            return pooled, first[:, :, first.shape[2] // 2, first.shape[3] // 2]
        return pooled, first[:, first.shape[1] // 2]

    def pool(self, encoded: Encoded) -> Tensor:
        """(B, D): what the model pools."""
        return mean_tokens(encoded.tokens) if encoded.cls is None else encoded.cls

    def compilable(self) -> list[nn.Module]:
        """What `train.compile` compiles."""
        return [self.model]


def small_stem(model: Any) -> None:
    """For small images: 3 x 3 convolution of stride 1 and padding 1, no pooling (arXiv:2002.05709, section B.9).

    Images of 32 pixels keep their size up to the first stage. Some code bases pad by 2, which makes it 34.
    """
    stem = model.embedder
    old = stem.embedder.convolution
    conv = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    stem.embedder.convolution, stem.pooler = conv, nn.Identity()


def zero_init(model: Any) -> None:
    """Scale 0 for the last batch norm of each residual block, so that blocks begin as the identity (arXiv:1706.02677)."""
    for stage in model.encoder.stages:
        for block in stage.layers:
            nn.init.zeros_(block.layer[-1].normalization.weight)


def build_encoder(config: MmsslConfig) -> Encoder | Backbone:
    """The encoder of a configuration with fresh weights. Raises: ValueError that begins with the option that is wrong."""
    return Backbone.from_config(config) if config.backbone else Encoder.from_config(config)


def _places(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, H*W, D); tokens (B, L, D) stay."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
