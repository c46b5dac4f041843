"""Images."""

from mmssl.registry import Modality
from modalities.vision.data import COLUMNS, SUFFIXES, decode, raw, sizes
from modalities.vision.features import PatchFeatures
from modalities.vision.picture import draw, sketch
from modalities.vision.pretext import PRETEXTS
from modalities.vision.processor import plain_views, processor, stated
from modalities.vision.segments import segments
from modalities.vision.views import ImageViews

DEFAULTS = {
    "data2vec2": {"views": {"mask": {}}},
    "data2vec1": {
        "method": {"top_k": 6, "collect": "block", "each_norm": "layer", "final_norm": "layer", "beta": 2.0},
        "views": {"mask": {"kind": "rectangle", "ratio": 0.6123, "copies": 1}},
    },
    "mae": {"views": {"mask": {"kind": "random", "ratio": 0.75, "copies": 1}}},
    "simmim": {"views": {"mask": {"kind": "unit", "ratio": 0.6, "width": 2, "copies": 1}}},
    "beit": {"views": {"mask": {"kind": "rectangle", "ratio": 0.385, "copies": 1}}},
    "cae": {"views": {"mask": {"kind": "rectangle", "ratio": 0.5, "copies": 1}}},
    "splitmask": {"views": {"mask": {"kind": "rectangle", "ratio": 0.5, "copies": 1}}},
    "ibot": {"model": {"pooling": "cls"}, "views": {"crops": "dino-800", "mask": {"kind": "mixed", "copies": 1}}},
    "msn": {
        "model": {"pooling": "cls"},
        "views": {
            "crops": [
                {"count": 2, "scale": [0.3, 1.0], "jitter": [0.4, 0.4, 0.4, 0.1], "grey": 0.2, "blur": 0.5},
                {"count": 10, "size": 96, "scale": [0.05, 0.3], "jitter": [0.4, 0.4, 0.4, 0.1], "grey": 0.2, "blur": 0.5},
            ],
            "mask": {"kind": "random", "ratio": 0.3, "copies": 1},
        },
    },
    "ijepa": {
        "model": {"extra_tokens": 0},
        "views": {"scale": [0.3, 1.0], "flip": 0.0, "mask": {"kind": "multiblock", "copies": 1}},
    },
    "sit": {"model": {"pooling": "cls"}, "views": {"crops": "dino-two-crop"}},
    # The image itself, and a view by SimCLR's policy.
    "aasae": {
        "views": {
            "crops": [
                {"scale": [1.0, 1.0], "flip": 0.0},
                {"jitter": [0.8, 0.8, 0.8, 0.2], "grey": 0.2, "blur": 0.5},
            ]
        }
    },
    "bind": {"views": {"scale": [0.9, 1.0], "flip": 0.0}},  # texts may say where things are
    "mp3": {"model": {"positions": "none", "extra_tokens": 0}},
    "igpt": {
        "model": {
            "image_size": 32,
            "patch_size": 1,
            "palette": 512,
            "positions": "learned",
            "causal": True,
            "norm": "pre",
            "norm_kind": "rms",
            "norm_eps": 1e-5,
            "activation": "gelu_quick",
            "extra_std": 0.02,
        },
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
    draw=draw,
    stated=stated,
    tune="modalities.vision.tune",
    sketch=sketch,
    sizes=sizes,
    published="modalities.vision.published",
    pretexts=PRETEXTS,
    segments=segments,
)
