"""The encoder as a transformers model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmssl.model.backbone import Backbone, build_encoder
from mmssl.model.configuration import MmsslConfig
from mmssl.model.encoder import Encoder
from mmssl.model.positions import attention_bias
from mmssl.model.transformer import SHARED
from mmssl.types import Encoded


class MmsslModel(PreTrainedModel):
    """What a run exports: loads with `AutoModel`, gives `last_hidden_state` and `pooler_output`.

    Of several kinds of data, `members` holds an encoder of each, which share blocks and last norm as `config.trunk` says.
    """

    config_class = MmsslConfig
    config: MmsslConfig
    base_model_prefix = "mmssl"  # of models with a head
    _supports_sdpa = True

    def __init__(self, config: MmsslConfig):
        super().__init__(config)
        if config.members:
            self.members = _joined(config)
            trunk = rf"transformer\.({'|'.join(SHARED)})\."
            shared = {name: config.trunk(name) for name in config.members if config.trunk(name) != name}
            # What is saved once, under the name of its first member.
            self._tied_weights_keys = {rf"members\.{n}\.{trunk}": rf"members\.{first}\.{trunk}" for n, first in shared.items()}
        else:
            self.encoder = build_encoder(config)
        self.main_input_name = next(iter(self.encoders.values())).input_name
        self.post_init()

    @property
    def encoders(self) -> dict[str, Any]:
        """By the name of their member; the only one of most models has none."""
        return dict(self.members.items()) if self.config.members else {"": self.encoder}

    def _init_weights(self, module: nn.Module) -> None:
        """Weights are drawn where modules are built; nothing to add."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pad: Tensor | None = None,
        member: str | None = None,
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
            member: whose input it is, where a model of several kinds of data has more than one that takes it.
        Returns: last_hidden_state (B, E + L, D) with extra tokens first, or the map (B, D, H, W) of a backbone that makes
            one; pooler_output (B, D).
        Raises: ValueError if the input of this model's modality is missing, or if it could be that of several members.
        """
        given = {"pixel_values": pixel_values, "input_values": input_values, "input_ids": input_ids}
        encoder, x = self._choose(given | {"input_features": input_features}, member)
        layers = bool(output_hidden_states)
        if isinstance(encoder, Backbone):
            out = BaseModelOutputWithPooling(*encoder.outputs(x, layers))
        else:
            out = self._transform(encoder, x, attention_mask, pad, layers)
        return out if return_dict or return_dict is None else out.to_tuple()

    def _choose(self, given: dict[str, Tensor | None], member: str | None) -> tuple[Any, Tensor]:
        """The encoder that takes what was given, and its input."""
        encoders = {name: one for name, one in self.encoders.items() if member in (None, name)}
        if not encoders:
            raise ValueError(f"member={member!r}: this model has {_listed(self.encoders) if self.config.members else 'none'}.")
        fitting = {name: one.input_name for name, one in encoders.items() if given[one.input_name] is not None}
        if not fitting:
            raise ValueError(f"This model takes {_listed(dict.fromkeys(one.input_name for one in encoders.values()), 'or')}.")
        if len({*fitting.values()}) > 1:
            raise ValueError(
                f"{_listed(dict.fromkeys(fitting.values()))} are inputs of {_listed(fitting)}; give those of one in each call."
            )
        if len(fitting) > 1:
            raise ValueError(f"{_listed(fitting)} take {min(fitting.values())}; say whose it is with member=NAME.")
        ((name, kind),) = fitting.items()
        x = given[kind]
        assert x is not None
        return encoders[name], x

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


def _joined(config: MmsslConfig) -> nn.ModuleDict:
    """The encoders of all members, on the trunks that they share."""
    found: dict[str, Any] = {name: build_encoder(config.member(name)) for name in config.members or ()}
    for name, encoder in found.items():
        if config.trunk(name) != name:
            encoder.transformer.share(found[config.trunk(name)].transformer)
    return nn.ModuleDict(found)


def _listed(names: Iterable[str], last: str = "and") -> str:
    """In words."""
    *others, final = names
    return f"{', '.join(others)} {last} {final}" if others else final
