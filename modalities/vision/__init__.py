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
POLICY_OF = {
    "simclr": "simclr",
    "simclr_v2": "simclr",
    "moco_v1": "moco1",
    "moco_v2": "moco2",
    "moco_v3": "mocov3",
    "instance_discrimination": "instdisc",
    "byol": "byol",
    "simsiam": "moco2",
    "swav": "swav",
    "deepcluster": "deepcluster",
    "deepcluster_v2": "swav",
    "sela_v2": "swav",
    "barlow_twins": "byol",
    "vicreg": "byol",
    "dino": "dino",
}
DEFAULTS |= {method: {"views": {"crops": name}} for method, name in POLICY_OF.items()}
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
