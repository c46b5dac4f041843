"""Transcripts: characters, their search in the logits of frames, and how much of them is wrong."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmssl.config.finetune import CtcOptions
from mmssl.errors import RecipeError

PAD, UNKNOWN, SPACE = "<pad>", "<unk>", "|"  # the blank; what no transcript of the training has; between words


def character_tokenizer(texts: Iterable[str], options: CtcOptions) -> Any:
    """A `Wav2Vec2CTCTokenizer` of all characters of the transcripts, the same for the same texts.

    Raises: RecipeError if a transcript holds the sign that stands for a space.
    """
    from transformers import Wav2Vec2CTCTokenizer

    found = {character for text in texts for character in (text.lower() if options.lower else text)}
    if SPACE in found:
        raise RecipeError(f"data.text: a transcript holds {SPACE!r}, which stands for the space between words; take it out.")
    names = [PAD, UNKNOWN, SPACE, *sorted(found - {" "})]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vocab.json"
        file.write_text(json.dumps({name: i for i, name in enumerate(names)}, ensure_ascii=False), encoding="utf-8")
        special = {"bos_token": None, "eos_token": None, "pad_token": PAD, "unk_token": UNKNOWN}
        return Wav2Vec2CTCTokenizer(str(file), word_delimiter_token=SPACE, do_lower_case=False, **special)  # type: ignore[arg-type]


class Codec:
    """Texts to ids and logits to texts."""

    def __init__(self, tokenizer: Any, options: CtcOptions):
        """Raises: RecipeError if the decoder is not installed."""
        self.tokenizer, self.options = tokenizer, options
        self.search = _beam_search(tokenizer, options) if options.decoder == "beam" else None

    def clean(self, text: str) -> str:
        """As transcripts are learned."""
        return text.lower() if self.options.lower else text

    def encode(self, text: str) -> list[int]:
        """Ids of the characters."""
        return self.tokenizer(self.clean(text)).input_ids

    def texts(self, ids: Tensor) -> list[str]:
        """Of labels (B, n), -100 = padding. A character that the vocabulary lacks is one that nothing equals."""
        rows = self.tokenizer.batch_decode(ids.masked_fill(ids < 0, self.tokenizer.pad_token_id), group_tokens=False)
        return [row.replace(UNKNOWN, "\ufffd") for row in rows]

    def read(self, logits: Tensor) -> list[str]:
        """Most probable transcripts: (B, L, V) logits, or for a greedy search (B, L) most probable ids of each frame."""
        if self.search is None:
            return self.tokenizer.batch_decode(logits.argmax(-1) if logits.ndim == 3 else logits)
        scores = logits.float().log_softmax(-1).cpu().contiguous()
        best = (hypotheses[0].tokens if hypotheses else torch.empty(0) for hypotheses in self.search(scores))
        return [self.tokenizer.decode(tokens.tolist(), group_tokens=False).strip() for tokens in best]


def _beam_search(tokenizer: Any, options: CtcOptions) -> Any:
    try:
        from torchaudio.models.decoder import ctc_decoder

        names = tokenizer.convert_ids_to_tokens([*range(len(tokenizer))])
        special = {"blank_token": PAD, "sil_token": SPACE, "unk_word": UNKNOWN}
        return ctc_decoder(None, names, beam_size=options.beam, log_add=True, **special)
    except (ImportError, RuntimeError, OSError):
        raise RecipeError(
            "ctc.decoder: beam needs flashlight-text, which is not installed: pip install flashlight-text, or set "
            "ctc.decoder=greedy."
        ) from None


class Errors:
    """Rates of wrong words and characters, over all batches of a set: what a Trainer calls with each batch.

    Insertions, deletions and substitutions, divided by the length of the transcripts; those without any text do not count.
    """

    def __init__(self, codec: Codec):
        self.codec = codec
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.words, self.characters = [0, 0], [0, 0]  # wrong, all

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        """Count a batch; the rates with the last one."""
        labels = prediction.label_ids[0] if isinstance(prediction.label_ids, (tuple, list)) else prediction.label_ids
        self.count(self.codec.texts(torch.as_tensor(labels)), self.codec.read(torch.as_tensor(prediction.predictions)))
        if not compute_result:
            return {}
        found = {"wer": self.words[0] / max(1, self.words[1]), "cer": self.characters[0] / max(1, self.characters[1])}
        self.reset()
        return found

    def count(self, wanted: Sequence[str], read: Sequence[str]) -> None:
        """Compare transcripts."""
        from torchaudio.functional import edit_distance

        for one, other in zip(wanted, read):
            if one:
                for tally, a, b in ((self.words, one.split(), other.split()), (self.characters, [*one], [*other])):
                    tally[0] += edit_distance(a, b)
                    tally[1] += len(a)


def frames_of(model: Any, mask: Tensor) -> Tensor:
    """(B,) frames that come of the valid samples; mask: (B, samples), 1 = valid, what is below 0 counts as padding."""
    return model._get_feat_extract_output_lengths(mask.clamp(min=0).sum(1))


def silenced(logits: Tensor, frames: Tensor | None, blank: int) -> Tensor:
    """(B, L, V) logits with the blank wherever a frame is padding."""
    if frames is None:
        return logits
    beyond = torch.arange(logits.shape[1], device=logits.device) >= frames.to(logits.device)[:, None]
    certain = torch.full_like(logits[0, 0], -1e4)
    certain[blank] = 0.0
    return torch.where(beyond[..., None], certain, logits)
