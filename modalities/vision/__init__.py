"""Images."""

from mmssl.registry import Modality
from modalities.vision.data import COLUMNS, SUFFIXES, decode, raw
from modalities.vision.features import PatchFeatures
from modalities.vision.processor import plain_views, processor
from modalities.vision.views import ImageViews

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
    native="modalities.vision.convert",
)
