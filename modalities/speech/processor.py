"""The preprocessing a model was trained with, for whoever loads it."""

from __future__ import annotations

from typing import Any, NamedTuple

from modalities.speech.data import RATE
from modalities.speech.features import KERNELS, STRIDES
from modalities.speech.views import SpeechViews


class Convolutions(NamedTuple):
    """The lengths that a stack of convolutions without padding gives."""

    kernels: tuple[int, ...] = KERNELS
    strides: tuple[int, ...] = STRIDES
    conv_norm: str = "layer"

    def frames(self, samples: int) -> int:
        """Frames of a wave; 0 if it is too short for one."""
        for kernel, stride in zip(self.kernels, self.strides):
            samples = max(0, (samples - kernel) // stride + 1)
        return samples


def processor(config: Any, views: Any) -> Any:
    """A feature extractor that does what `SpeechViews.plain` does: normalise each wave, pad with zeros.

    It makes no mask of the padding for features with group norm, which must be given samples of equal length: padding changes
    all of their frames. Departs from `plain` by its 1e-7 for our 1e-5 beside the variance, which shows in recordings that are
    hardly audible only, and by not cutting long ones.
    """
    from transformers import Wav2Vec2FeatureExtractor

    return Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=views.normalise, return_attention_mask=not views.repeats)


def stated(path: str, model: dict[str, Any]) -> dict[str, Any]:
    """View options: whether each wave is normalised, where the model's folder states it."""
    from transformers import AutoFeatureExtractor

    try:
        return {"normalise": bool(AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False).do_normalize)}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def plain_views(model: Any, path: Any) -> SpeechViews:
    """Views for the frames of a model, with the normalisation that its folder states; normalised where it states none.

    Raises: ValueError if the model listens at another rate than 16 kHz.
    """
    from transformers import AutoFeatureExtractor

    config, shape = model.config, Convolutions()
    if hasattr(config, "conv_kernel"):
        norm = getattr(config, "feat_extract_norm", "layer")
        shape = Convolutions(tuple(config.conv_kernel), tuple(config.conv_stride), norm)
        if getattr(config, "add_adapter", False):  # strided convolutions on top
            more = config.num_adapter_layers
            shape = Convolutions((*shape.kernels, *[1] * more), (*shape.strides, *[config.adapter_stride] * more), norm)
    try:
        saved = AutoFeatureExtractor.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, TypeError, AttributeError):
        return SpeechViews(shape, shortest=0.0)
    rate = getattr(saved, "sampling_rate", RATE)
    if rate != RATE:
        raise ValueError(f"{path} listens at {rate} Hz; only models for {RATE} Hz can be used")
    return SpeechViews(shape, shortest=0.0, normalise=bool(getattr(saved, "do_normalize", True)))
