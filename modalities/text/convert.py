"""To and from the transformers classes of the same structure: BERT, and RoBERTa or Data2VecText, which is RoBERTa."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from mmssl.model.configuration import MmsslConfig
from mmssl.model.native import Blocks, linears, native_shape, options, own_shape, plain, stored

NATIVE = ("bert", "roberta", "data2vec-text")
FITS = "model.norm=post and places, no prenet, extra tokens or LayerScale, and GELU (BERT, RoBERTa)"
METHODS = {"bert": "mlm", "roberta": "mlm", "data2vec-text": "data2vec1"}  # of `method=auto`
BLOCKS = Blocks(
    path="encoder.layer",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    proj="attention.output.dense",
    norm1="attention.output.LayerNorm",
    fc1="intermediate.dense",
    fc2="output.dense",
    norm2="output.LayerNorm",
)
NAMES = {
    "features.tokens.weight": "embeddings.word_embeddings.weight",
    "features.places.weight": "embeddings.position_embeddings.weight",
} | linears("features.norm", "embeddings.LayerNorm")
TYPES = "embeddings.token_type_embeddings.weight"


def to_native(
    config: MmsslConfig, weights: dict[str, Tensor], kind: Literal["roberta", "data2vec-text"] = "roberta"
) -> tuple[Any, dict[str, Tensor]] | None:
    """A RoBERTa (or by its other name Data2VecText) with the same outputs, or a BERT if positions count padding; None if the
    encoder has another structure.

    Its pooler, which has no counterpart, is the identity, so that `pooler_output` is tanh of the first token.
    """
    from transformers import BertConfig, Data2VecTextConfig, RobertaConfig

    if config.norm != "post" or config.extra_tokens or config.layer_scale or not plain(config):
        return None
    extra = options(config)
    if extra.positions == "none":
        return None
    family = {"roberta": RobertaConfig, "data2vec-text": Data2VecTextConfig}[kind]
    native = (BertConfig if extra.count_padding else family)(
        **native_shape(config),
        vocab_size=extra.vocab_size,
        max_position_embeddings=extra.max_tokens + (0 if extra.count_padding else extra.pad_token_id + 1),
        type_vocab_size=extra.token_types or 1,
        pad_token_id=extra.pad_token_id,
        bos_token_id=extra.bos_token_id,
        eos_token_id=extra.eos_token_id,
    )
    found = BLOCKS.to_theirs(weights, NAMES, config.depth)
    bias = found["embeddings.LayerNorm.bias"]
    found[TYPES] = weights["features.types.weight"] if extra.token_types else torch.zeros_like(bias)[None]
    found |= {"pooler.dense.weight": torch.eye(len(bias)).to(bias), "pooler.dense.bias": torch.zeros_like(bias)}
    return native, found


def from_native(native: Any, weights: dict[str, Tensor]) -> tuple[MmsslConfig, dict[str, Tensor]] | None:
    """The shared transformer with the outputs of that model where all tokens are of the first type; None if it is something
    else.

    A table of one type that is zero, as in RoBERTa's releases, is left out.
    """
    if native.model_type not in NATIVE or native.hidden_act != "gelu" or native.pad_token_id is None:
        return None
    if native.is_decoder or native.add_cross_attention:
        return None
    weights, bert = stored(native, weights), native.model_type == "bert"
    found = BLOCKS.to_ours(weights, NAMES, native.num_hidden_layers)
    types = weights[TYPES]
    typed = len(types) > 1 or bool(types.any())
    if typed:
        found["features.types.weight"] = types
    config = MmsslConfig(
        modality="text",
        extra_tokens=0,
        **own_shape(native),
        vocab_size=native.vocab_size,
        pad_token_id=native.pad_token_id,
        bos_token_id=native.bos_token_id,
        eos_token_id=native.eos_token_id,
        max_tokens=native.max_position_embeddings - (0 if bert else native.pad_token_id + 1),
        count_padding=bert,
        token_types=len(types) if typed else 0,
    )
    return config, found
