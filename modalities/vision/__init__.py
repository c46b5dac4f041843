"""Images."""

from mmssl.registry import Modality
from modalities.vision.data import COLUMNS, SUFFIXES, decode, raw
from modalities.vision.features import PatchFeatures
from modalities.vision.processor import plain_views, processor
from modalities.vision.views import ImageViews

DEFAULTS = {
    "data2vec2": {"views": {"mask": {}}},
    "data2vec1": {
        "method": {"top_k": 6, "collect": "block", "each_norm": "layer", "final_norm": "layer", "beta": 2.0},
        "views": {"mask": {"kind": "rectangle", "ratio": 0.6123, "copies": 1}},
    },
}
MODALITY = Modality(
    "vision",
    PatchFeatures,
    ImageViews,
    decode,
    raw,
    COLUMNS,
    SUFFIXES,
    processor,
    plain_views,
    defaults=DEFAULTS,
    native="modalities.vision.convert",
)
