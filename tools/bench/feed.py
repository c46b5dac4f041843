"""Sound and text from files to batches on one core, against what the examples of transformers for pretraining do."""

from __future__ import annotations

import io
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from mmssl.config import Recipe
from mmssl.data.quarantine import Quarantine
from mmssl.data.sources import open_source
from mmssl.random import generator
from mmssl.registry import modality
from modalities.speech.data import RATE
from modalities.speech.data import decode as wave_of
from modalities.text.data import prepare
from modalities.text.tokenizer import load, train
from tools.bench.turns import by_turns

Ways = dict[str, Callable[[], Any]]
SECONDS, VOCABULARY, BLOCK = 10.0, 8000, 512


def run(kind: str = "speech", rate: str = "16000", samples: str = "16", files: str = "400", pairs: str = "7") -> dict[str, Any]:
    """By turns, one thread.

    Args:
        kind: speech: FLAC files of ten seconds are decoded, normalised and masked as for wav2vec 2.0. text: modules of
            Python's own library are cut into tokens and packed into blocks of 512; then blocks are masked as for RoBERTa.
        rate: of the recordings, in Hz.  samples: of a batch.  files: of text.
    Returns: `time_ratio` (ours : theirs), its spread, samples or tokens a second of both; of text also `masking_ratio`.
    Raises: RuntimeError if the two sides make different batches: other waves, shares of hidden places, numbers of tokens.
    """
    torch.set_num_threads(1)
    found = {"speech": _speech, "text": _text}[kind](int(rate if kind == "speech" else files), int(samples), int(pairs))
    return found | {"peer": "transformers' example of pretraining", "peer_version": transformers.__version__}


def _close(told: dict[str, float], what: str, most: float = 0.02) -> None:
    ours, theirs = told["ours"], told["theirs"]
    if abs(ours - theirs) > most * abs(theirs):
        raise RuntimeError(f"the two sides make different {what}, {told}; there is nothing to time")


# Sound --------------------------------------------------------------------------------------------------------------


def recording(number: int, rate: int) -> bytes:
    """Ten seconds of tones that come and go, with noise, as FLAC."""
    import soundfile

    draw, t = np.random.default_rng(number), np.arange(round(SECONDS * rate)) / rate
    loud = np.abs(np.sin(2 * np.pi * draw.uniform(0.5, 3) * t))
    wave = sum(np.sin(2 * np.pi * draw.uniform(100, 3000) * t + draw.uniform(0, 6)) for _ in range(8)) * loud / 8
    file = io.BytesIO()
    soundfile.write(file, (wave + draw.normal(0, 0.003, len(t))).clip(-1, 1), rate, format="FLAC")
    return file.getvalue()


def _speech(rate: int, samples: int, pairs: int) -> dict[str, Any]:
    recordings = [recording(i, rate) for i in range(samples)]
    views, turns = Recipe.load("speech/wav2vec2-base", "views.normalise=true").build_views(), count()
    ways = {"ours": lambda: heard(views, recordings, next(turns)), "theirs": lambda: heard_by_transformers(recordings)}
    made = {name: way() for name, way in ways.items()}
    apart = max(float((a - b).abs().max()) for a, b in zip(*(x for x, _ in made.values()), strict=True))
    if apart > 1e-3:  # of waves of deviation 1
        raise RuntimeError(f"the two sides make different waves, by {apart:.2g}; there is nothing to time")
    shares = [{name: float(way()[1].float().mean()) for name, way in ways.items()} for _ in range(8)]
    hidden = {name: float(np.mean([share[name] for share in shares])) for name in ways}
    _close(hidden, "masks", 0.15)  # ours hide in each row as many as in the one with the fewest
    found = by_turns(ways, pairs).figures()
    speed = {name: round(samples * SECONDS / seconds) for name, seconds in found["seconds"].items()}
    return {"name": f"{samples} FLAC files of {SECONDS:g} s at {rate} Hz to a batch", **found, "times_real_time": speed}


def heard(views: Any, recordings: Sequence[bytes], turn: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch as workers make it: x (B, n), and hidden (B, frames) bool."""
    made = [views(wave_of(data), lambda view, i=i: generator("bench", turn, i, view)) for i, data in enumerate(recordings)]
    (view,) = views.collate(made)
    return view.x, view.mask.hidden


def heard_by_transformers(recordings: Sequence[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
    """What `run_wav2vec2_pretraining_no_trainer.py` does, without its negatives, which we draw on the device."""
    import soundfile
    from torchaudio.functional import resample
    from transformers.models.wav2vec2.modeling_wav2vec2 import _compute_mask_indices

    extract = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False)
    rows = []
    for data in recordings:
        wave, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        wave = wave if rate == RATE else resample(torch.from_numpy(wave), rate, RATE).numpy()
        rows.append({"input_values": extract(wave, sampling_rate=RATE).input_values[0]})
    x = extract.pad(rows, return_tensors="pt").input_values
    frames = x.shape[1]
    for width, stride in ((10, 5), *((3, 2),) * 4, *((2, 2),) * 2):
        frames = (frames - width) // stride + 1
    return x, torch.from_numpy(_compute_mask_indices((len(x), frames), 0.65, 10))


# Text ---------------------------------------------------------------------------------------------------------------


def documents(most: int) -> list[str]:
    """Modules of Python's own library, packages last."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path for depth in ("*.py", "*/*.py") for path in sorted(root.glob(depth))]
    texts = (path.read_text("utf-8", errors="ignore") for path in paths if "site-packages" not in path.parts)
    return [text for text in texts if text.strip()][:most]


def _text(files: int, samples: int, pairs: int) -> dict[str, Any]:
    import datasets.config

    datasets.disable_progress_bars()
    held = datasets.config.HF_DATASETS_CACHE
    with tempfile.TemporaryDirectory() as folder:
        texts = documents(files)
        train([part for text in texts[:50] for part in text.split("\n\n")], "bpe", VOCABULARY, f"{folder}/tokenizer")
        datasets.Dataset.from_dict({"text": texts}).to_parquet(f"{folder}/texts.parquet")
        ways = {"ours": lambda: packed(folder), "theirs": lambda: packed_by_transformers(folder)}
        try:
            made = {name: way() for name, way in ways.items()}
            _close({name: float(BLOCK * len(rows)) for name, rows in made.items()}, "numbers of tokens")
            found = by_turns(ways, pairs).figures()
            masking = _masking(folder, {name: rows[:samples] for name, rows in made.items()})
            shares = {name: float(np.mean([float(way().float().mean()) for _ in range(8)])) for name, way in masking.items()}
            _close(shares, "masks", 0.04)
            masked = by_turns(masking, pairs).figures()
        finally:
            datasets.config.HF_DATASETS_CACHE = held
    speed = {name: round(BLOCK * len(made[name]) / seconds) for name, seconds in found["seconds"].items()}
    return {
        "name": f"{len(texts)} modules of Python to blocks of {BLOCK} tokens, and {samples} of these to a masked batch",
        **found,
        "tokens_a_second": speed,
        "masking_ratio": masked["time_ratio"],
        "masking_milliseconds": {name: round(1000 * seconds, 2) for name, seconds in masked["seconds"].items()},
    }


def _recipe(folder: str) -> Recipe:
    words = (f"views.tokenizer={folder}/tokenizer", f"model.vocab_size={VOCABULARY}", f"model.mask_token_id={VOCABULARY - 1}")
    return Recipe.load("text/mlm-base", *words, "views.mask.ends=false", f"data.path={folder}/texts.parquet")


def _nothing_cached(folder: str) -> None:
    import datasets.config

    datasets.config.HF_DATASETS_CACHE = Path(tempfile.mkdtemp(dir=folder))


def packed(folder: str) -> list[list[int]]:
    """Blocks of tokens as a run prepares them, nothing in the cache."""
    _nothing_cached(folder)
    recipe = _recipe(folder)
    source = open_source(recipe.data, modality("text"), "train")
    rows = prepare(source, recipe.build_views(), Quarantine(None, 0.5, 3)).rows
    return rows["ids"]


def packed_by_transformers(folder: str) -> list[list[int]]:
    """What `run_mlm.py` does without `--line_by_line`."""
    import datasets.config

    _nothing_cached(folder)
    tokenizer = load(f"{folder}/tokenizer")
    rows = datasets.load_dataset("parquet", data_files=f"{folder}/texts.parquet", split="train")

    def tokenised(batch: dict[str, list[str]]) -> Any:
        return tokenizer(batch["text"], return_special_tokens_mask=True)

    def grouped(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        whole = {name: [token for row in rows for token in row] for name, rows in batch.items()}
        length = len(whole["input_ids"]) // BLOCK * BLOCK
        return {name: [row[i : i + BLOCK] for i in range(0, length, BLOCK)] for name, row in whole.items()}

    tokens: Any = rows.map(tokenised, batched=True, remove_columns=["text"])
    return tokens.map(grouped, batched=True)["input_ids"]


def _masking(folder: str, blocks: dict[str, Any]) -> Ways:
    """A batch of packed blocks to what is hidden: (B, n) bool."""
    views, tokenizer = _recipe(folder).build_views(), load(f"{folder}/tokenizer")
    collate = transformers.DataCollatorForLanguageModeling(tokenizer)
    ours, theirs = (np.asarray(blocks["ours"]), [{"input_ids": row} for row in blocks["theirs"]])
    turns = count()

    def masked() -> torch.Tensor:
        turn = next(turns)
        made = [views(row, lambda view, i=i: generator("bench", turn, i, view)) for i, row in enumerate(ours)]
        (view,) = views.collate(made)
        return view.mask.hidden

    return {"ours": masked, "theirs": lambda: collate(theirs)["labels"] != -100}
