"""Text."""

from mmssl.registry import Modality
from modalities.text.data import COLUMNS, SUFFIXES, decode, prepare, raw
from modalities.text.features import TextFeatures
from modalities.text.processor import plain_views, processor
from modalities.text.views import TextViews, configure

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
    "modalities.text.convert",
)
