"""Speech."""

from mmssl.registry import Modality
from modalities.speech.data import COLUMNS, SUFFIXES, decode, prepare, raw
from modalities.speech.features import SpeechFeatures
from modalities.speech.processor import plain_views, processor
from modalities.speech.views import SpeechViews

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
    native="modalities.speech.convert",
)
