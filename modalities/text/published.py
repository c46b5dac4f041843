"""data2vec checkpoints for text as their authors have published them, in fairseq's layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmssl.model.configuration import MmsslConfig
from mmssl.model.published import (
    Layout,
    Names,
    Told,
    both,
    count,
    data2vec2_idle,
    data2vec2_names,
    data2vec2_shape,
    fairseq_names,
    heads_of,
)
from modalities.text.tokenizer import from_fairseq

LOCAL, SENTENCE = "modality_encoders.TEXT.local_encoder", "encoder.sentence_encoder"
EPS = 1e-5  # of fairseq's norm after the embeddings, whatever the blocks have
FILES = ("dictionary", "vocab", "merges")
HOW = (
    "No tokenizer was written: the ids of the model are those of the dictionary that it was released with. Convert again with "
    "dictionary=dict.txt and GPT-2's byte pairs, vocab=encoder.json merges=vocab.bpe, to have one in the folder."
)


def _words(tensors: Mapping[str, Tensor], stem: str) -> dict[str, Any]:
    """Options of the embeddings: fairseq's first ids are `<s>`, `<pad>`, `</s>` and `<unk>`, the last is `<mask>`."""
    size, places = (len(tensors[f"{stem}.embed_{table}.weight"]) for table in ("tokens", "positions"))
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "mask_token_id": size - 1}
    return {"modality": "text", "vocab_size": size, "max_tokens": places - 2, **ids}


def _embeddings(stem: str) -> Names:
    names = {
        f"features.{ours}.weight": (f"{stem}.embed_{t}.weight",) for ours, t in (("tokens", "tokens"), ("places", "positions"))
    }
    return names | both("features.norm", f"{stem}.layernorm_embedding")


def _plain(told: Told, path: str) -> None:
    """Raises: ValueError if embeddings are multiplied, which they are in no published model."""
    if told(f"{path}.no_scale_embedding", bool) is False:
        raise ValueError(f"{path}.no_scale_embedding is false; data2vec was published without that scale")


def _config2(tensors: Mapping[str, Tensor], told: Told) -> MmsslConfig:
    _plain(told, "model.modalities.text")
    shape = data2vec2_shape(tensors, told, "TEXT", EPS)
    if shape["norm_eps"] != EPS:
        raise ValueError(
            f"model.norm_eps is {shape['norm_eps']}, of embeddings {EPS}; data2vec was published with one for both"
        )
    if not shape["prenet_depth"]:
        shape["input_dropout"] = told("model.modalities.text.dropout", float) or 0.0
    return MmsslConfig(**_words(tensors, LOCAL), **shape)


def _config1(tensors: Mapping[str, Tensor], told: Told) -> MmsslConfig:
    own = "model.transformer"
    _plain(told, own)
    if told(f"{own}.encoder.normalize_before", bool):
        raise ValueError(f"{own}.encoder.normalize_before is true; data2vec was published with norms after each sum")
    if (told(f"{own}.activation_fn", str) or "gelu") != "gelu":
        raise ValueError(f"{own}.activation_fn is {told(f'{own}.activation_fn', str)}; data2vec was published with gelu")
    width = tensors[f"{SENTENCE}.embed_tokens.weight"].shape[1]
    dropout = told(f"{own}.dropout", float) or 0.0
    return MmsslConfig(
        **_words(tensors, SENTENCE),
        hidden_size=width,
        depth=told(f"{own}.encoder.layers", int) or count(tensors, f"{SENTENCE}.layers"),
        heads=told(f"{own}.encoder.attention_heads", int) or heads_of(width),
        mlp_ratio=len(tensors[f"{SENTENCE}.layers.0.fc1.weight"]) / width,
        extra_tokens=0,
        norm_eps=EPS,
        dropout=dropout,
        input_dropout=dropout,
        attention_dropout=told(f"{own}.attention_dropout", float) or 0.0,
    )


def _prepare(config: MmsslConfig, told: Told, files: Mapping[str, Path]) -> tuple[Any, str]:
    """The tokenizer of the release. Raises: ValueError if its files are not those of the model."""
    if not files:
        return None, HOW
    if missing := [name for name in FILES if name not in files]:
        raise ValueError(f"{missing[0]}: missing; a tokenizer is made of {', '.join(FILES)}")
    return from_fairseq(*(files[name] for name in FILES), size=config.vocab_size, longest=config.max_tokens)


LAYOUTS = (
    Layout(
        "data2vec 2.0, text",
        "modality_encoders.TEXT.",
        _config2,
        lambda config: _embeddings(LOCAL) | data2vec2_names(config, "TEXT"),
        data2vec2_idle("TEXT"),
        "blocks.",
        ("modality_encoders.TEXT.",),
        _prepare,
    ),
    Layout(
        "data2vec 1, text",
        f"{SENTENCE}.",
        _config1,
        lambda config: _embeddings(SENTENCE) | fairseq_names(config, f"{SENTENCE}.layers"),
        ("encoder.regression_head.", "encoder.lm_head.", f"{SENTENCE}.version", "classification_heads."),
        f"{SENTENCE}.",
        (f"{SENTENCE}.embed_", f"{SENTENCE}.layernorm_embedding."),
        _prepare,
        native="data2vec-text",
    ),
)
