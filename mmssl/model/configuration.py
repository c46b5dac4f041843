"""Configuration of an encoder, as saved in config.json."""

from __future__ import annotations

import inspect
from typing import Any, Literal

from transformers import PretrainedConfig

BACKBONE = ("backbone", "stem", "zero_init")
OWN = ("modality", "extra_tokens", "input_dropout", "extra_std", "start", "pooling")  # what members do not share


class MmsslConfig(PretrainedConfig):
    """Feature encoder of one modality and the shared transformer. The modality's own options are kept as given.

    With `members`, a feature encoder of each and one transformer: name -> the options of its modality, those of `OWN`, and
    those that are not common. `trunk` among them names the member whose blocks it has instead of its own.

    With a `backbone`, `model_type` and options of a config of transformers, that model is the encoder, `hidden_size` wide,
    and no other option counts but `stem` and `zero_init`.

    `start` says how the linear layers of the transformer are drawn, see `draw_linear` in `encoder.py`.
    """

    model_type = "mmssl"
    attribute_map = {"num_hidden_layers": "depth", "num_attention_heads": "heads"}

    def __init__(
        self,
        modality: str = "vision",
        hidden_size: int = 768,
        depth: int = 12,
        heads: int = 12,
        prenet_depth: int = 0,
        mlp_ratio: float = 4.0,
        norm: Literal["post", "pre"] = "post",
        extra_tokens: int = 1,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path: float = 0.0,
        input_dropout: float = 0.0,
        layer_drop: float = 0.0,
        layer_scale: float = 0.0,
        extra_std: float = 1.0,
        start: Literal["normal", "xavier", "beit"] = "normal",
        activation: Literal["gelu", "gelu_tanh", "gelu_quick", "swiglu"] = "gelu",
        causal: bool = False,
        norm_kind: Literal["layer", "rms"] = "layer",
        pooling: Literal["mean", "cls"] = "mean",
        backbone: dict[str, Any] | None = None,
        stem: Literal["normal", "small"] = "normal",
        zero_init: bool = False,
        members: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ):
        self.members = members
        self.norm: Literal["post", "pre"] = norm
        self.start: Literal["normal", "xavier", "beit"] = start
        self.pooling: Literal["mean", "cls"] = pooling
        self.activation: Literal["gelu", "gelu_tanh", "gelu_quick", "swiglu"] = activation
        self.causal = causal
        self.norm_kind: Literal["layer", "rms"] = norm_kind
        self.modality = "" if members else modality
        self.stem: Literal["normal", "small"] = stem
        self.backbone, self.zero_init = backbone, zero_init
        self.hidden_size, self.depth, self.heads, self.prenet_depth = hidden_size, depth, heads, prenet_depth
        self.mlp_ratio, self.extra_tokens, self.norm_eps = mlp_ratio, extra_tokens, norm_eps
        self.dropout, self.attention_dropout, self.drop_path = dropout, attention_dropout, drop_path
        self.input_dropout, self.layer_drop, self.layer_scale, self.extra_std = (
            input_dropout,
            layer_drop,
            layer_scale,
            extra_std,
        )
        super().__init__(**kwargs)
        if members:
            self.tie_word_embeddings = True  # or transformers ties nothing

    def member(self, name: str) -> MmsslConfig:
        """Of a model of one member alone."""
        own = {key: value for key, value in (self.members or {})[name].items() if key != "trunk"}
        common = {*inspect.signature(MmsslConfig.__init__).parameters} - {*BACKBONE, *OWN, "members", "self", "kwargs"}
        return MmsslConfig(**{key: getattr(self, key) for key in common} | own)

    def trunk(self, name: str) -> str:
        """The member whose blocks and last norm a member has; its own name if they are its own."""
        return (self.members or {})[name].get("trunk", name)

    def to_dict(self) -> dict[str, Any]:
        """Without options that do not count: a backbone's where there is none, the shared transformer's beside one, of members
        what is each one's own.
        """
        options = {*inspect.signature(MmsslConfig.__init__).parameters}
        if self.members:
            idle = {*BACKBONE, *OWN}
        else:
            idle = options - {*BACKBONE, "modality", "hidden_size"} if self.backbone else {*BACKBONE, "members"}
        return {name: value for name, value in super().to_dict().items() if name not in idle}
