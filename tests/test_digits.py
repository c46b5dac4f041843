"""Strings of digits cut together from single ones."""

import io

import datasets
import numpy as np
import pytest
import soundfile

from tools.digits import DIGITS, write


@pytest.fixture
def fsdd(tmp_path):
    """Recordings whose samples are all the same number, that of their row: 100 of each split."""
    (folder := tmp_path / "fsdd").mkdir()
    for split, first in (("train", 0), ("test", 100)):
        rows = {"audio": [], "label": [], "speaker": []}
        for i in range(100):
            file = io.BytesIO()
            soundfile.write(file, np.full(400, (first + i + 1) / 256, np.float32), 8000, format="WAV", subtype="FLOAT")
            rows["audio"].append({"bytes": file.getvalue(), "path": None})
            rows["label"].append(i % 10)
            rows["speaker"].append(i // 25)
        table = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=False))
        table.to_parquet(folder / f"{split}-00000.parquet")
    return folder


def heard(folder, split):
    """Of each string its text, speaker and the rows that it is made of."""
    found = []
    for row in datasets.Dataset.from_parquet(str(folder / f"{split}.parquet")):
        wave, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
        assert rate == 8000
        steps = [round(256 * value) - 1 for value in wave[np.flatnonzero(np.diff(wave, prepend=0))] if value > 0]
        found.append((row["text"], row["speaker"], steps))
    return found


@pytest.mark.parametrize("held", [None, 2])
def test_strings_say_what_was_recorded_and_splits_share_no_recording(fsdd, tmp_path, held):
    write(fsdd, tmp_path / "a", train=40, test=20, held=held)
    write(fsdd, tmp_path / "b", train=40, test=20, held=held)
    learned, asked = (heard(tmp_path / "a", split) for split in ("train", "test"))
    assert (learned, asked) == tuple(heard(tmp_path / "b", split) for split in ("train", "test"))
    assert (len(learned), len(asked)) == (40, 20)
    for text, speaker, rows in learned + asked:
        assert 1 <= len(rows) <= 3
        assert {row % 100 // 25 for row in rows} == {speaker}
        assert text == " ".join(DIGITS[row % 10] for row in rows)
    assert {len(rows) for *_, rows in learned} == {1, 2, 3}
    used = [{row for *_, rows in part for row in rows} for part in (learned, asked)]
    assert not used[0] & used[1]
    if held is None:
        assert max(used[0]) < 100 <= min(used[1])
    else:
        assert {speaker for _, speaker, _ in asked} == {2}
        assert 2 not in {speaker for _, speaker, _ in learned}
