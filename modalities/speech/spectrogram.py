"""Sound as log-mel spectrograms: the same recordings as speech, cut into patches."""

from __future__ import annotations

from typing import Any

from mmssl.registry import Modality
from modalities.speech.data import COLUMNS, RATE, SUFFIXES, decode, prepare, raw, sizes
from modalities.speech.mel_features import MelFeatures
from modalities.speech.mel_views import MelViews
from modalities.speech.picture import draw, sketch
from modalities.speech.pretext import PRETEXTS

# Of AudioSet: the published -4.27 and 4.57 (arXiv:2207.06405) are for a full scale of 1, Kaldi's is 2^15: 2 ln 2^15 more.
# The standard deviation is doubled, as in the authors' code.
AUDIOSET = {"mean": 16.526676, "std": 9.1379948}
SEQUENCE = {"extra_tokens": 0, "patch_frames": 2, "frames": 2000}
DEFAULTS = {
    "mae": {
        "model": {"bands": 128, "frames": 1024, "patch_frames": 16, "patch_bands": 16, "norm": "pre", **AUDIOSET},
        "views": {"normalise": False, "mask": {}},
    },
    "tera": {"model": {"extra_tokens": 0, "norm_eps": 1e-12}, "views": {"alter": {}}},
    "data2vec2": {
        "model": {**SEQUENCE, "norm_eps": 1e-5},
        "method": {
            "top_k": 8,
            "final_norm": "none",
            "cls_weight": 0.0,
            "momentum": {"start": 0.999, "end": 0.99999, "steps": 75_000},
            "decoder": {"dim": 384, "groups": 16, "kernel": 7, "layers": 4, "dropout": 0.1},
        },
        "views": {"mask": {"kind": "block", "ratio": 0.5, "adjust": 0.05, "width": 5, "copies": 8}},
    },
    "data2vec1": {
        "model": {**SEQUENCE, "norm_eps": 1e-5},
        "method": {"mask_start": "uniform", "teacher_features": "share"},
        "views": {"mask": {"kind": "span", "ratio": 0.65, "width": 10, "copies": 1}},
    },
    "bind": {"model": {**SEQUENCE, "norm_eps": 1e-5}, "views": {"pad": True, "shortest": 0.1}},
    "cpc": {
        "model": {"extra_tokens": 0, "causal": True, "norm": "pre", **AUDIOSET},
        "views": {"normalise": False, "longest": 1.28, "shortest": 1.28},  # a mean over time would tell what comes
    },
    "mp3": {
        "model": {"extra_tokens": 0, "norm": "pre", "frames": 400, "patch_frames": 4, "positions": "none"},
        "method": {"ratio": 0.5, "places": 100},
        "views": {"shortest": 1.0},
    },
}


def processor(config: Any, views: Any) -> Any:
    """A feature extractor that does what `MelViews.plain` does, but for cutting long recordings.

    Departs from it by nothing beside the variance for our 1e-5: of a band that never changes it gives NaN, we 0.
    """
    from transformers import Speech2TextFeatureExtractor

    return Speech2TextFeatureExtractor(config.bands, RATE, config.bands, do_ceptral_normalize=views.normalise)


def plain_views(model: Any, path: Any) -> MelViews:
    """Views for one of our models, normalised as its folder states.

    Raises: ValueError if it is another's.
    """
    from transformers import AutoFeatureExtractor

    config = model.config
    if getattr(config, "model_type", None) != "mmssl":
        raise ValueError(f"{path}: {type(model).__name__} is no model of ours; say modality=speech if it takes waves")
    names = ("bands", "frames", "patch_frames", "patch_bands", "mean", "std")
    features = MelFeatures(config.hidden_size, **{name: getattr(config, name) for name in names if hasattr(config, name)})
    try:
        saved = AutoFeatureExtractor.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, TypeError, AttributeError):
        return MelViews(features, shortest=0.0)
    return MelViews(features, shortest=0.0, normalise=bool(getattr(saved, "do_ceptral_normalize", True)))


MODALITY = Modality(
    "spectrogram",
    MelFeatures,
    MelViews,
    decode,
    raw,
    COLUMNS,
    SUFFIXES,
    processor,
    plain_views,
    prepare=prepare,
    defaults=DEFAULTS,
    draw=draw,
    tune="modalities.speech.tune",
    sketch=sketch,
    sizes=sizes,
    pretexts=PRETEXTS,
)
