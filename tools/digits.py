"""Strings of spoken digits beside what was said, cut together from recordings of single digits.

python -m tools.digits FSDD FOLDER [train=1000] [test=200] [digits=3] [seed=0]

FSDD is a folder of parquet tables with `audio`, `label` (0 to 9) and `speaker`. A string is of one speaker. Those of the test
are made of the split `test`, whose recordings no string to learn from has; with held=SPEAKER of all recordings of that speaker,
of whom then none is learned from. Between digits lie 50 to 150 ms of silence.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import datasets
import numpy as np
import soundfile

from mmssl.random import generator

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def strings(rows: datasets.Dataset, count: int, most: int, *key: int | str) -> datasets.Dataset:
    """So many strings of 1 to `most` digits, drawn by the key: `audio` (wav bytes), `text`, `speaker`."""
    speakers = np.array(rows["speaker"])
    own = {who: np.flatnonzero(speakers == who) for who in sorted({*speakers.tolist()})}
    found: dict[str, list] = {"audio": [], "text": [], "speaker": []}
    for i in range(count):
        draw = np.random.default_rng(generator(*key, i).initial_seed())
        who = [*own][int(draw.integers(len(own)))]
        waves, words = [], []
        for place in draw.choice(own[who], int(draw.integers(1, most + 1))):
            row = rows[int(place)]
            wave, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
            waves += [wave, np.zeros(int(rate * draw.uniform(0.05, 0.15)), np.float32)]
            words.append(DIGITS[row["label"]])
        file = io.BytesIO()
        soundfile.write(file, np.concatenate(waves[:-1]), rate, format="WAV")
        found["audio"].append({"bytes": file.getvalue(), "path": None})
        found["text"].append(" ".join(words))
        found["speaker"].append(who)
    return datasets.Dataset.from_dict(found)


def write(
    data: Path, folder: Path, train: int = 1000, test: int = 200, digits: int = 3, seed: int = 0, held: int | None = None
) -> None:
    """`train.parquet` and `test.parquet`."""
    parts: dict = {name: datasets.Dataset.from_parquet(str(next(data.glob(f"{name}*.parquet")))) for name in ("train", "test")}
    parts = {name: rows.cast_column("audio", datasets.Audio(decode=False)) for name, rows in parts.items()}
    if held is not None:
        whole = datasets.concatenate_datasets([*parts.values()])
        rows = {False: [], True: []}
        for i, who in enumerate(whole["speaker"]):
            rows[who == held].append(i)
        parts = {"train": whole.select(rows[False]), "test": whole.select(rows[True])}
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("test", test)):
        strings(parts[name], count, digits, seed, name).to_parquet(folder / f"{name}.parquet")


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if "=" not in word]
    if len(words) != 2:
        sys.exit(__doc__)
    given = {name: int(value) for name, value in (word.split("=", 1) for word in sys.argv[1:] if "=" in word)}
    write(Path(words[0]), Path(words[1]), **given)
