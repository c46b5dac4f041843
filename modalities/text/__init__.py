"""Text."""

from mmssl.registry import Modality
from modalities.text.data import COLUMNS, SUFFIXES, decode, prepare, raw, sizes
from modalities.text.features import TextFeatures
from modalities.text.picture import draw, sketch
from modalities.text.pretext import PRETEXTS
from modalities.text.processor import plain_views, processor, stated
from modalities.text.views import TextViews, configure

MODEL = {"extra_tokens": 0, "norm_eps": 1e-5}
JOINT = ("simclr", "byol", "barlow_twins", "vicreg", "swav", "dino")
DEFAULTS = {
    "data2vec2": {
        "model": MODEL,
        "method": {
            "top_k": 12,
            "final_norm": "none",
            "loss_scale": 1.0,
            "cls_weight": 0.0,
            "teacher_features": "share",
            "momentum": {"start": 0.9999, "end": 0.99999, "steps": 100_000},
            "decoder": {
                "dim": 768, "groups": 1, "kernel": 9, "layers": 5, "residual": False, "hidden": 1536, "dropout": 0.1,
            },
        },
        "views": {"mask": {}},
    },
    "data2vec1": {
        "model": MODEL,
        "method": {
            "top_k": 10,
            "each_norm": "layer",
            "loss_scale": 1.0,
            "beta": 4.0,
            "head_hidden": 1536,
            "teacher_features": "copy",
            "momentum": {"start": 0.999, "end": 0.9999, "steps": 300_000},
        },
        "views": {"pack": False, "mask": {"kind": "span", "ratio": 0.35, "width": 4, "copies": 1}},
    },
}  # fmt: skip
DEFAULTS |= {
    name: {"model": MODEL, "views": {"mask": {"kind": "token", "ratio": 0.15, "copies": 1}}} for name in ("mlm", "electra")
}
DEFAULTS["mae"] = {"model": MODEL, "views": {"mask": {"ratio": 0.5, "copies": 1}}}
DEFAULTS["mp3"] = {
    "model": MODEL | {"norm": "pre", "positions": "none"},
    "method": {"ratio": 0.5, "places": 64},
    "views": {"pack": False},
}
DEFAULTS["bind"] = {"model": MODEL, "views": {"pack": False}}
DEFAULTS["causal_lm"] = {"model": MODEL | {"norm": "pre", "activation": "gelu_tanh", "causal": True}}
# Dropout of the model makes views differ in addition, as in SimCSE, for which views.crops is `dropout`.
DEFAULTS |= {
    name: {"model": MODEL | {"dropout": 0.1, "attention_dropout": 0.1}, "views": {"crops": "span-drop", "pack": False}}
    for name in JOINT
}
MODALITY = Modality(
    "text",
    TextFeatures,
    TextViews,
    decode,
    raw,
    COLUMNS,
    SUFFIXES,
    processor,
    plain_views,
    prepare,
    configure,
    DEFAULTS,
    "modalities.text.convert",
    draw,
    stated=stated,
    tune="modalities.text.tune",
    sketch=sketch,
    sizes=sizes,
    published="modalities.text.published",
    pretexts=PRETEXTS,
)
