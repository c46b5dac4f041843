"""Speech."""

from mmssl.registry import Modality
from modalities.speech.data import COLUMNS, SUFFIXES, decode, prepare, raw, sizes
from modalities.speech.features import SpeechFeatures
from modalities.speech.picture import sketch
from modalities.speech.pretext import PRETEXTS
from modalities.speech.processor import plain_views, processor, stated
from modalities.speech.views import SpeechViews

MODEL = {"extra_tokens": 0, "norm_eps": 1e-5}
# Of wav2vec 2.0 and HuBERT.
BASE = {**MODEL, "alibi": False, "positions": "single", "position_kernel": 128, "conv_norm": "group"}
SPANS = {"kind": "span", "ratio": 0.65, "width": 10, "copies": 1}
JOINT = ("simclr", "byol", "barlow_twins", "vicreg", "swav", "dino")
DEFAULTS = {
    "data2vec2": {
        "model": MODEL,
        "method": {
            "top_k": 8,
            "final_norm": "none",
            "cls_weight": 0.0,
            "teacher_features": "share",
            "momentum": {"start": 0.999, "end": 0.99999, "steps": 75_000},
            "decoder": {"dim": 384, "groups": 16, "kernel": 7, "layers": 4, "dropout": 0.1},
        },
        "views": {"mask": {}},
    },
    "data2vec1": {
        "model": {**MODEL, "alibi": False},
        "method": {"mask_start": "uniform", "teacher_features": "share", "teacher_positions": "copy"},
        "views": {"mask": {"kind": "span", "ratio": 0.65, "width": 10, "copies": 1}},
    },
    "wav2vec2": {"model": BASE, "views": {"normalise": False, "mask": SPANS}},
    "hubert": {"model": BASE, "views": {"normalise": False, "mask": {**SPANS, "ratio": 0.8}}},
    # Nothing may see what is to come: no kernel over several frames, no mean over time.
    "cpc": {
        "model": {**MODEL, "norm": "pre", "causal": True, "position_layers": 1, "position_kernel": 1},
        "views": {"normalise": False, "longest": 1.28, "shortest": 1.28},
    },
    "bind": {"model": MODEL, "views": {"pad": True, "shortest": 0.1}},  # whole recordings, as a text tells of all that is said
    "mp3": {
        "model": {**MODEL, "norm": "pre", "alibi": False, "positions": "none"},
        "method": {"ratio": 0.5, "places": 100},
        "views": {"longest": 4.0, "shortest": 1.0},
    },
}
# Short crops: the shortest sample of an update is as long as its views, and longer ones give two that hardly overlap.
DEFAULTS |= {name: {"model": MODEL, "views": {"crops": "pair", "longest": 4.0, "shortest": 1.0}} for name in JOINT}
MODALITY = Modality(
    "speech",
    SpeechFeatures,
    SpeechViews,
    decode,
    raw,
    COLUMNS,
    SUFFIXES,
    processor,
    plain_views,
    prepare=prepare,
    defaults=DEFAULTS,
    native="modalities.speech.convert",
    stated=stated,
    tune="modalities.speech.tune",
    sketch=sketch,
    sizes=sizes,
    published="modalities.speech.published",
    pretexts=PRETEXTS,
)
